"""The measures against independent oracles, then the classifier, its file and the judge."""

import hashlib
import json
import math
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn

import measures
from datasets import mnist
from datasets.common import Loader
from measures import (DigitClassifier, Judge, categorical_kl, class_shares, distances, fingerprint,
                      frechet_distance, inception_score, load_classifier, manifold_measures,
                      train_classifier)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_frechet_distance_is_the_closed_form_of_two_gaussians_in_float64(dtype, seed):
    a, b = random(20, 6, seed=seed).to(dtype) + 100, 2 * random(30, 6, seed=9).to(dtype) + 101
    x, y = a.double(), b.double()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    expected = (((x.mean(0) - y.mean(0)) ** 2).sum().item()
                + np.trace(cov_x + cov_y - 2 * scipy.linalg.sqrtm(cov_x @ cov_y)).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('n, m', [(5, 4), (5, 100), (2, 2)])
def test_frechet_distance_holds_for_fewer_rows_than_dimensions(n, m):
    a, b = random(n, 20), 2 * random(m, 20, seed=1) + 0.3
    # The trace of (Σ_a Σ_b)^½ is the sum of the singular values of A Bᵀ, both centred and scaled.
    A, B = ((x - x.mean(0)).numpy() / math.sqrt(len(x) - 1) for x in (a, b))
    expected = ((a.mean(0) - b.mean(0)).square().sum().item() + (A ** 2).sum() + (B ** 2).sum()
                - 2 * scipy.linalg.svdvals(A @ B.T).sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_is_nan_if_a_feature_of_either_set_is_not_finite():
    good, bad = random(10, 4), random(10, 4)
    bad[3, 2] = math.inf
    assert math.isnan(frechet_distance(good, bad)) and math.isnan(frechet_distance(bad, good))


@pytest.mark.parametrize('log_probs', [
    (3 * random(40, 10)).log_softmax(1),
    torch.full((9, 10), -1e4).scatter(1, torch.arange(9)[:, None] % 4, 0.)])  # all but certain
def test_inception_score_is_the_exponential_of_the_mean_divergence_from_the_marginal(log_probs):
    probs = log_probs.exp().numpy()
    divergences = scipy.stats.entropy(probs, probs.mean(0, keepdims=True), axis=1)
    assert inception_score(log_probs) == pytest.approx(math.exp(divergences.mean()))


def test_class_shares_count_all_ten_classes():
    assert class_shares(torch.tensor([3, 0, 3, 7])).tolist() == [.25, 0, 0, .5, 0, 0, 0, .25, 0, 0]


@pytest.mark.parametrize('p, q, nats', [
    ([.5, .5, 0], [.25, .25, .5], math.log(2)), ([.25, .75], [.5, .5], math.log(27 / 16) / 4),
    ([.4, 0, .6], [.4, 0, .6], 0), ([.5, .5], [1, 0], math.inf)])
def test_categorical_kl_agrees_with_worked_examples(p, q, nats):
    assert categorical_kl(*torch.tensor([p, q], dtype=torch.float64)) == pytest.approx(nats)


def manifold_measures_by_loops(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    def balls(centres: np.ndarray, others: np.ndarray) -> list[set[int]]:
        found = []
        for centre in centres:
            radius = sorted(np.linalg.norm(centres - centre, axis=1))[k]  # the first is its own, 0
            found.append(set(np.flatnonzero(np.linalg.norm(others - centre, axis=1) <= radius)))
        return found
    in_real, in_fake = balls(real, fake), balls(fake, real)
    return {'precision': len(set.union(*in_real)) / len(fake),
            'recall': len(set.union(*in_fake)) / len(real),
            'density': sum(map(len, in_real)) / (k * len(fake)),
            'coverage': sum(map(bool, in_real)) / len(real)}


@pytest.mark.parametrize('rows_per_block', [7, 1000])
@pytest.mark.parametrize('k', [1, 5])
@pytest.mark.parametrize('place', [Tensor.clone, Tensor.round], ids=['scattered', 'with ties'])
def test_manifold_measures_are_those_of_the_papers(monkeypatch, place, k, rows_per_block):
    monkeypatch.setattr(measures, 'ROWS', rows_per_block)
    real, fake = place(random(20, 3, seed=4)), place(1.5 * random(31, 3, seed=5)) + 1
    expected = manifold_measures_by_loops(real.numpy(), fake.numpy(), k)
    default = () if k == 5 else (k,)
    assert manifold_measures(real, fake, *default) == pytest.approx(expected)
    assert len(set(expected.values()) - {0, 1}) == 4  # no measure can pass for another


def test_manifold_measures_agree_with_a_worked_example():
    real, fake = torch.tensor([[0.], [1.], [3.]]), torch.tensor([[0.5], [6.], [7.]])
    # The radii are 1, 1, 2 and 5.5, 1, 1. Only the fake row 0.5 is in real balls, in two of them.
    assert manifold_measures(real, fake, k=1) == pytest.approx(
        {'precision': 1 / 3, 'recall': 1, 'density': 2 / 3, 'coverage': 2 / 3})


def test_distances_are_exact_far_from_the_origin_and_zero_between_equal_rows():
    a, b = random(50, 20).float() + 1000, random(30, 20, seed=1).float() + 1000
    assert distances(a, b).numpy() == pytest.approx(cdist(a.double(), b.double()), rel=1e-6)
    assert (distances(a, a).diagonal() == 0).all()


@pytest.fixture(scope='module')
def digits() -> tuple[Loader, ...]:
    """A small part of the shipped digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('datasets.digits.SIZES', (750, 600, 100))
        return mnist.mnist(dataset='digits')


@pytest.fixture(scope='module')
def classifier(digits) -> DigitClassifier:
    return train_classifier(digits[0])


def test_the_classifier_learns_the_digits_in_a_few_updates(classifier, digits):
    hits = classifier.look_at(digits[1].images / 255)[1].argmax(1) == digits[1].labels
    assert hits.double().mean() > 0.6 and not classifier.training
    assert classifier.head.bias.grad.abs().max() < 0.2  # from the last batch alone


def test_the_classifier_sees_the_images_in_another_order_each_epoch(digits, monkeypatch):
    orders, permute, seen, forward = [], torch.randperm, [], DigitClassifier.forward
    monkeypatch.setattr(DigitClassifier, 'forward',
                        lambda self, images: seen.append(images) or forward(self, images))
    monkeypatch.setattr(torch, 'randperm', lambda n, **options: orders.append(
        permute(n, **options)) or orders[-1])
    model = train_classifier(digits[0].head(20), epochs=2)
    assert len(orders) == 2 and not torch.equal(*orders)
    torch.testing.assert_close(seen[0].sum((1, 2)),
                               (digits[0].images[orders[0]] / 255).sum(1))  # each only moved
    assert all(layer.bias is None for layer in model.modules() if isinstance(layer, nn.Conv2d))


def test_the_weights_do_not_depend_on_the_seed_of_the_run(digits):
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights.append(fingerprint(train_classifier(digits[0].head(20), epochs=1)))
    assert weights[0] == weights[1]


def test_looking_gives_features_and_log_probabilities(classifier, digits, monkeypatch):
    images = (digits[1].images[:50] / 255).requires_grad_()
    features, logits = classifier(images)
    assert features.shape == (50, 128) and logits.shape == (50, 10) and features.requires_grad
    monkeypatch.setattr(measures, 'ROWS', 7)
    seen = classifier.look_at(images)
    torch.testing.assert_close(seen, (features, logits.log_softmax(1)), rtol=1e-4, atol=1e-4)
    assert not any(part.requires_grad for part in seen)


def test_looking_rounds_to_8_bits(classifier, digits):
    grey = digits[1].images[:50].float()
    features, _ = classifier.look_at(grey / 255)
    for shift in (-0.49, 0.49):
        assert torch.equal(classifier.look_at((grey + shift) / 255)[0], features)
    assert (classifier.look_at((grey - 1).abs() / 255)[0] != features).any(1).all()


def test_the_fingerprint_is_the_sha256_of_the_weights_in_any_memory_format():
    model = nn.Conv2d(3, 4, 2)
    content = model.weight.detach().numpy().tobytes() + model.bias.detach().numpy().tobytes()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        assert fingerprint(model) == hashlib.sha256(content).hexdigest()


@pytest.fixture
def trained(monkeypatch, classifier) -> list[Loader]:
    """What each training was given; it takes 90 seconds and results in the same classifier."""
    loaders = []
    monkeypatch.setattr(measures, 'train_classifier',
                        lambda loader: loaders.append(loader) or classifier)
    monkeypatch.setattr(measures, 'time', SimpleNamespace(perf_counter=lambda: 90 * len(loaders)))
    return loaders


@pytest.fixture
def saved(tmp_path, digits, trained, capsys) -> Path:
    """The folder of a classifier that has just been trained."""
    folder = tmp_path / 'results' / 'classifier_digits'
    load_classifier(folder.parent, digits[0], digits[1])
    assert capsys.readouterr().out.count('\n') == len(trained) == 1
    return folder


def test_a_new_classifier_is_saved_with_accuracy_and_minutes(saved, digits, classifier):
    hits = classifier.look_at(digits[1].images / 255)[1].argmax(1) == digits[1].labels
    assert json.loads((saved / 'metrics.json').read_text()) == {
        'val_accuracy': round(hits.tolist().count(True) / 600, 6), 'seed': 42,
        'parameters': sum(map(torch.numel, classifier.parameters())), 'train_minutes': 1.5}
    assert fingerprint(classifier) in (saved / 'config.json').read_text()


def test_a_saved_classifier_is_loaded_for_evaluation_and_its_files_are_left_alone(
        saved, digits, classifier, trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in saved.iterdir()}
    loaded = load_classifier(saved.parent, digits[0], digits[1])
    assert loaded is not classifier and fingerprint(loaded) == fingerprint(classifier)
    assert not loaded.training and len(trained) == 1 and capsys.readouterr().out == ''
    assert before == {path: path.stat().st_mtime_ns for path in saved.iterdir()}


class Payload:
    def __reduce__(self):  # unpickling makes a folder
        return os.mkdir, ('it_ran',)


@pytest.mark.parametrize('damage', [
    lambda path: path.write_bytes(b''), lambda path: path.write_bytes(b'not a checkpoint'),
    lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    lambda path: torch.save(torch.load(path, weights_only=True) | {'model': {}}, path),
    lambda path: torch.save([1, 2], path), lambda path: torch.save({'model': {}}, path),
    lambda path: path.write_bytes(pickle.dumps(Payload(), protocol=2)),
    lambda path: torch.save({'made_from': Payload()}, path)],
    ids=['empty', 'garbage', 'truncated', 'no weights', 'list', 'no source', 'pickle', 'payload'])
def test_a_damaged_file_is_reported_and_replaced_and_never_run_as_code(
        saved, digits, classifier, trained, damage, monkeypatch, capsys):
    monkeypatch.chdir(saved)
    damage(saved / 'checkpoint.pt')
    (saved / 'checkpoint.pt.123.tmp').write_bytes(b'what a killed process leaves')
    for _ in range(2):  # the second time, from the new file
        loaded = load_classifier(saved.parent, digits[0], digits[1])
        assert fingerprint(loaded) == fingerprint(classifier) and len(trained) == 2
    assert capsys.readouterr().out.count(f'{saved}/checkpoint.pt cannot be loaded') == 1
    assert sorted(os.listdir(saved)) == ['checkpoint.pt', 'config.json', 'metrics.json']


@pytest.mark.parametrize('change', ['file', 'images', 'EPOCHS', 'SEED'])
def test_a_classifier_of_other_images_or_of_another_recipe_is_replaced(
        saved, digits, trained, change, monkeypatch, capsys):
    other = digits[0].head(749 if change == 'images' else 750)
    if change == 'file':
        other.source = other.source | {'sha256': {'digits.npz': 'another digest'}}
    elif change != 'images':
        monkeypatch.setattr(measures, change, 7)
    for _ in range(2):
        load_classifier(saved.parent, other, digits[1])
        assert trained[1:] == [other] and 'cannot' not in capsys.readouterr().out


def test_the_judge_measures_what_the_classifier_sees(classifier, digits):
    real, fake = digits[1].images[:300] / 255, digits[1].images[300:480] / 255
    judge = Judge(classifier, real, torch.arange(300) % 10)  # not the classes of the images
    (real_features, _), (features, log_probs) = classifier.look_at(real), classifier.look_at(fake)
    shares = np.bincount(log_probs.argmax(1), minlength=10) / 180
    expected = {'frechet': frechet_distance(real_features, features),
                'inception_score': inception_score(log_probs),
                'class_share_min': shares.min(), 'class_share_max': shares.max(),
                'class_kl': scipy.stats.entropy(shares, [0.1] * 10),
                **manifold_measures(real_features, features)}
    found = judge.measure(fake)
    assert list(found) == list(expected) and found == pytest.approx(expected)
    assert judge.glance(fake) == {name: found[name] for name in ('frechet', 'class_share_min')}
    noise = judge.measure((random(300, 784) > 0).float())
    assert found['frechet'] < noise['frechet'] / 10 and found['recall'] > noise['recall'] + 0.5
