"""The measures against independent oracles, in float64; then the classifier, its file, the judge.

The oracles are written from the papers' equations with numpy and scipy, some of them as loops.
"""

import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.stats
import torch
from torch import Tensor, distributions

import measures
from datasets import mnist
from datasets.common import Loader
from measures import (
    NEIGHBOURS,
    DigitClassifier,
    Judge,
    categorical_kl,
    class_shares,
    distances,
    frechet_distance,
    inception_score,
    load_classifier,
    manifold_measures,
    neighbour_radii,
    train_classifier,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the Fréchet distance ------------------------------------------------------------------------


def gaussian_rows(n: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """n rows whose sample mean and covariance are exactly these."""
    rows = random(n, len(mean), seed=seed)
    rows -= rows.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(rows.T @ rows / (n - 1)), rows.T,
                                          upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def frechet_by_singular_values(a: np.ndarray, b: np.ndarray) -> float:
    """Tr (Σ_a Σ_b)^½ as the sum of the singular values of A Bᵀ, centred: of whatever rank."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = (a - mean_a) / math.sqrt(len(a) - 1), (b - mean_b) / math.sqrt(len(b) - 1)
    return (((mean_a - mean_b) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum()
            - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum())


@pytest.mark.parametrize('seed', range(3))
def test_frechet_distance_is_the_closed_form_of_two_gaussians(seed):
    mean_a, mean_b = random(2, 6, seed=seed)
    cov_a, cov_b = (root @ root.T for root in random(2, 6, 6, seed=10 + seed))
    expected = ((mean_a - mean_b).square().sum() + (cov_a + cov_b).trace()
                - 2 * scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).trace().real)
    a, b = gaussian_rows(20, mean_a, cov_a, seed=1), gaussian_rows(30, mean_b, cov_b, seed=2)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize('shift', [0., 3.])
def test_frechet_distance_of_a_shifted_set_is_the_shift_squared(shift):
    a = random(50, 8) @ random(8, 8, seed=1)
    assert frechet_distance(a, a + shift) == pytest.approx(8 * shift ** 2, abs=1e-9)


@pytest.mark.parametrize('n, m', [(5, 4), (5, 100), (2, 2)])
def test_frechet_distance_of_fewer_rows_than_dimensions(n, m):
    a, b = random(n, 20), 2 * random(m, 20, seed=1) + 0.3
    expected = pytest.approx(frechet_by_singular_values(a.numpy(), b.numpy()), rel=1e-6)
    assert frechet_distance(a, b) == expected and frechet_distance(b, a) == expected
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_to_a_single_point_is_the_mean_squared_distance():
    a, point = random(30, 20), random(20, seed=1)
    expected = (a.mean(0) - point).square().sum() + a.var(0).sum()
    for one, other in ((a, point.expand(10, 20)), (point.expand(10, 20), a)):
        assert frechet_distance(one, other) == pytest.approx(float(expected))
    assert frechet_distance(point.expand(3, 20), point.expand(4, 20) + 1) == pytest.approx(20)


def test_frechet_distance_of_float32_features_is_computed_in_float64():
    a, b = random(300, 20).float() + 1000, random(300, 20, seed=1).float() + 1000
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a.double(), b.double()))


# --- classes -------------------------------------------------------------------------------------


def sure_of(classes: Tensor) -> Tensor:
    """log p(y|x) of a classifier that is as good as certain, where 0 · log 0 threatens."""
    return torch.full((len(classes), 10), -1e4).scatter(1, classes[:, None], 0.)


@pytest.mark.parametrize('log_probs, score', [
    (torch.full((30, 10), -math.log(10)), 1), (sure_of(torch.arange(30) % 10), 10),
    (sure_of(torch.arange(30) % 2 * 7), 2), (sure_of(torch.full((30,), 4)), 1)],
    ids=['undecided', 'ten classes', 'two classes', 'one class'])
def test_inception_score_counts_the_classes_that_images_tell(log_probs, score):
    assert inception_score(log_probs) == pytest.approx(score, rel=1e-6)


def test_inception_score_is_the_average_divergence_from_the_marginal():
    log_probs = (3 * random(40, 10)).log_softmax(1)
    probs = log_probs.exp().numpy()
    divergences = scipy.stats.entropy(probs, probs.mean(0, keepdims=True), axis=1)
    assert inception_score(log_probs) == pytest.approx(math.exp(divergences.mean()))


def test_class_shares_count_all_ten_classes():
    assert class_shares(torch.tensor([3, 0, 3, 7])).tolist() == [.25, 0, 0, .5, 0, 0, 0, .25, 0, 0]


@pytest.mark.parametrize('p, q, nats', [
    ([.5, .5, 0], [.25, .25, .5], math.log(2)), ([.25, .75], [.5, .5], math.log(27 / 16) / 4),
    ([0] * 9 + [1], [.1] * 10, math.log(10)), ([.4, 0, .6], [.4, 0, .6], 0)])
def test_categorical_kl_of_worked_examples(p, q, nats):
    p, q = torch.tensor([p, q], dtype=torch.float64)
    assert categorical_kl(p, q) == pytest.approx(nats)


def test_categorical_kl_is_that_of_torch_distributions():
    p, q = (2 * random(2, 10)).softmax(1)
    expected = distributions.kl_divergence(*map(distributions.Categorical, (p, q)))
    assert categorical_kl(p, q) == pytest.approx(float(expected))


# --- the manifolds -------------------------------------------------------------------------------


@pytest.fixture(params=[7, 1000], ids=['blocks of 7', 'one block'])
def block(request, monkeypatch) -> None:
    monkeypatch.setattr(measures, 'ROWS', request.param)


def scattered(n: int, scale: float, seed: int) -> Tensor:
    return scale * random(n, 3, seed=seed)


def on_a_grid(n: int, scale: float, seed: int) -> Tensor:
    """Whole coordinates: many rows alike, many distances equal, and all of them exact."""
    return scattered(n, scale, seed).round()


def radius_by_loops(rows: np.ndarray, i: int, k: int) -> float:
    return sorted(np.linalg.norm(rows[i] - row) for j, row in enumerate(rows) if j != i)[k - 1]


def manifold_measures_by_loops(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    in_real, in_fake = np.zeros((2, len(real), len(fake)), dtype=bool)
    for i, r in enumerate(real):
        for j, f in enumerate(fake):
            in_real[i, j] = np.linalg.norm(r - f) <= radius_by_loops(real, i, k)
            in_fake[i, j] = np.linalg.norm(r - f) <= radius_by_loops(fake, j, k)
    return {'precision': np.mean([any(in_real[:, j]) for j in range(len(fake))]),
            'recall': np.mean([any(in_fake[i]) for i in range(len(real))]),
            'density': sum(in_real.flat) / (k * len(fake)),
            'coverage': np.mean([any(in_real[i]) for i in range(len(real))])}


@pytest.mark.parametrize('k', [1, NEIGHBOURS])
@pytest.mark.parametrize('n, m', [(20, 31), (31, 20)])
@pytest.mark.parametrize('draw', [scattered, on_a_grid])
def test_manifold_measures_are_those_of_the_papers(block, draw, n, m, k):
    real, fake = draw(n, 1., seed=4), draw(m, 1.5, seed=5) + 1
    expected = manifold_measures_by_loops(real.numpy(), fake.numpy(), k)
    assert manifold_measures(real, fake, k) == pytest.approx(expected)
    assert len(set(expected.values())) == 4  # or one could stand for another
    assert all(0 < expected[name] < 1 for name in ('precision', 'recall', 'coverage'))


def test_manifold_measures_of_a_worked_example():
    real, fake = torch.tensor([[0.], [1.], [3.]]), torch.tensor([[0.5], [6.], [7.]])
    # The radii are 1, 1, 2 and 5.5, 1, 1: of the fake rows, 0.5 alone is in real balls, in two.
    assert manifold_measures(real, fake, k=1) == pytest.approx(
        {'precision': 1 / 3, 'recall': 1, 'density': 2 / 3, 'coverage': 2 / 3})


def test_five_neighbours_unless_told_otherwise():
    real, fake = scattered(40, 1., seed=1), scattered(40, 2., seed=2)
    assert manifold_measures(real, fake) == manifold_measures(real, fake, 5)
    assert torch.equal(neighbour_radii(real), neighbour_radii(real, 5))


def test_a_set_covers_itself(block):
    rows = random(60, 20)
    expected = {'precision': 1, 'recall': 1, 'density': (NEIGHBOURS + 1) / NEIGHBOURS,
                'coverage': 1}
    assert manifold_measures(rows, rows.flip(0)) == pytest.approx(expected)


def test_sets_far_apart_share_nothing(block):
    far = manifold_measures(random(30, 20), random(40, 20, seed=1) + 1000)
    assert far == {'precision': 0, 'recall': 0, 'density': 0, 'coverage': 0}


@pytest.mark.parametrize('width', [0, 1e-6])
def test_a_collapsed_set_is_precise_and_covers_little(width):
    real = random(200, 2)
    collapsed = manifold_measures(real, real[17] + width * random(100, 2, seed=1))
    assert collapsed['precision'] == 1
    assert collapsed['recall'] <= 1 / 200 and collapsed['coverage'] < 0.1


@pytest.mark.parametrize('draw', [scattered, on_a_grid])
def test_radii_are_those_of_a_tree(block, draw):
    rows = draw(40, 1.5, seed=3)
    tree = scipy.spatial.cKDTree(rows.numpy()).query(rows.numpy(), NEIGHBOURS + 1)[0][:, -1]
    torch.testing.assert_close(neighbour_radii(rows), torch.from_numpy(tree))


def test_distances_are_exact_between_rows_alike_and_far_from_0():
    a, b = random(50, 20).float() + 1000, random(30, 20, seed=1).float() + 1000
    exact = scipy.spatial.distance.cdist(a.double().numpy(), b.double().numpy())
    torch.testing.assert_close(distances(a, b), torch.from_numpy(exact).float())
    assert (distances(a, a).diagonal() == 0).all()


# --- the classifier ------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def digits() -> tuple[Loader, ...]:
    """Fewer of the shipped digits than there are: a short setup."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('datasets.digits.SIZES', (1500, 600, 100))
        return mnist.mnist(dataset='digits')


@pytest.fixture(scope='module')
def val(digits) -> Loader:
    return digits[1]


@pytest.fixture(scope='module')
def classifier(digits) -> DigitClassifier:
    return train_classifier(digits[0])


def test_the_classifier_learns_the_digits(classifier, val):
    hits = classifier.look_at(val.images / 255)[1].argmax(1) == val.labels
    assert hits.double().mean() > 0.8


def test_the_classifier_gives_features_and_logits():
    features, logits = DigitClassifier()(torch.rand(7, 784))
    assert features.shape == (7, 128) and logits.shape == (7, 10)


def test_the_classifier_comes_from_its_own_seed(digits):
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(train_classifier(digits[0].head(20), epochs=1))
    assert_same_weights(*models)


def test_looking_gives_features_and_log_probabilities_without_gradients(classifier, val):
    images = (val.images[:50] / 255).requires_grad_()
    features, log_probs = classifier.look_at(images)
    assert features.shape == (50, 128) and log_probs.shape == (50, 10)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(50))
    expected = classifier(images)
    assert expected[0].requires_grad
    torch.testing.assert_close((features, log_probs), (expected[0], expected[1].log_softmax(1)))
    assert not features.requires_grad and not log_probs.requires_grad


def test_looking_rounds_to_8_bits(classifier, val):
    grey = val.images[:50].float()
    features, log_probs = classifier.look_at(grey / 255)
    for shift in (-0.49, 0.49):  # of 1/255
        nearly = classifier.look_at((grey + shift) / 255)
        assert torch.equal(nearly[0], features) and torch.equal(nearly[1], log_probs)
    assert (classifier.look_at((grey - 1).abs() / 255)[0] != features).any(1).all()


def test_what_is_seen_in_an_image_does_not_depend_on_the_others(classifier, val, monkeypatch):
    images = val.images[:20] / 255
    together = classifier.look_at(images)
    alone = [classifier.look_at(image) for image in images.split(1)]
    for whole, *parts in zip(together, *alone, strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(measures, 'ROWS', 7)
    torch.testing.assert_close(classifier.look_at(images), together, rtol=1e-4, atol=1e-4)


# --- its file ------------------------------------------------------------------------------------


def assert_same_weights(one: DigitClassifier, other: DigitClassifier) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def of_other_data(loader: Loader) -> Loader:
    return Loader(loader.images, loader.labels, loader.batch_size, shuffle=False,
                  source=loader.source | {'sha256': {'digits.npz': 'of something else'}})


@pytest.fixture
def few(digits) -> list[Loader]:
    return [digits[0].head(40), digits[1].head(30)]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / 'results' / 'classifier'


@pytest.fixture
def kept(folder, few, capsys) -> DigitClassifier:
    """The classifier of `few`, kept in `folder` from now on; what that printed is forgotten."""
    model = load_classifier(folder, *few)
    assert capsys.readouterr().out.count('\n') == 1
    return model


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, 'train_classifier', lambda train: pytest.fail('it trained'))


def test_a_new_classifier_is_kept_with_its_accuracy(folder, few, kept):
    assert sorted(os.listdir(folder)) == ['checkpoint.pt', 'config.json', 'metrics.json']
    saw = kept.look_at(few[1].images / 255)[1].argmax(1)
    metrics = json.loads((folder / 'metrics.json').read_text())
    right = float((saw == few[1].labels).double().mean())
    assert metrics['val_accuracy'] == pytest.approx(right, abs=1e-6)
    assert metrics['parameters'] == sum(weight.numel() for weight in kept.parameters())


def test_a_kept_classifier_is_loaded_and_its_files_left_alone(folder, few, kept, monkeypatch,
                                                              capsys):
    forbid_training(monkeypatch)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    loaded = load_classifier(folder, *few)
    assert capsys.readouterr().out == ''
    assert_same_weights(loaded, kept)
    torch.testing.assert_close(loaded.look_at(few[1].images / 255),
                               kept.look_at(few[1].images / 255))
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes())
                      for path in folder.iterdir()}


def without_a_tensor(path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    saved['model'].popitem()
    torch.save(saved, path)


@pytest.mark.parametrize('damage', [
    lambda path: path.write_bytes(b''), lambda path: path.write_bytes(b'not a checkpoint'),
    lambda path: path.write_bytes(path.read_bytes()[:-1000]), without_a_tensor,
    lambda path: torch.save([1, 2], path), lambda path: torch.save({'model': {}}, path)],
    ids=['empty', 'garbage', 'truncated', 'a tensor less', 'a list', 'no data'])
def test_a_damaged_checkpoint_is_told_and_replaced(folder, few, kept, damage, monkeypatch, capsys):
    path = folder / 'checkpoint.pt'
    damage(path)
    assert_same_weights(load_classifier(folder, *few), kept)
    told = [line for line in capsys.readouterr().out.splitlines() if 'is damaged' in line]
    assert len(told) == 1 and str(folder) in told[0]
    forbid_training(monkeypatch)
    assert_same_weights(load_classifier(folder, *few), kept)


@pytest.mark.parametrize('change', [of_other_data, lambda loader: loader.head(39)],
                         ids=['sha256', 'number'])
def test_a_checkpoint_of_other_images_is_replaced(folder, few, kept, change, monkeypatch, capsys):
    other = change(few[0])
    new = load_classifier(folder, other, few[1])
    assert 'is damaged' not in capsys.readouterr().out
    forbid_training(monkeypatch)
    assert_same_weights(load_classifier(folder, other, few[1]), new)
    with pytest.raises(pytest.fail.Exception, match='it trained'):
        load_classifier(folder, *few)


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('dump', [pickle.dumps, None], ids=['pickle', 'torch.save'])
def test_a_checkpoint_is_never_run_as_code(tmp_path, folder, few, kept, dump, capsys):
    path, payload = folder / 'checkpoint.pt', {'data': Payload(tmp_path / 'it_ran')}
    if dump:
        path.write_bytes(dump(payload, protocol=2))
    else:
        torch.save(payload, path)
    load_classifier(folder, *few)
    assert 'is damaged' in capsys.readouterr().out and not (tmp_path / 'it_ran').exists()


# --- the judge -----------------------------------------------------------------------------------


NAMES = ['frechet', 'inception_score', 'class_share_min', 'class_share_max', 'class_kl',
         'precision', 'recall', 'density', 'coverage']


@pytest.fixture(scope='module')
def real(val) -> Tensor:
    return val.images[:300] / 255


@pytest.fixture(scope='module')
def judge(classifier, real) -> Judge:
    """Its labels are made up, an even tenth of each class: they are not what the images show."""
    return Judge(classifier, real, torch.arange(300) % 10)


def test_real_images_are_judged_perfect(judge, real):
    found = judge.measure(real)
    assert list(found) == NAMES and all(isinstance(value, float) for value in found.values())
    assert found['frechet'] == pytest.approx(0, abs=1e-6)
    assert found['precision'] == found['recall'] == found['coverage'] == 1
    assert 5 < found['inception_score'] <= 10


def test_images_of_one_class_are_judged_collapsed(judge, real, val):
    saw = judge.classifier.look_at(real)[1].argmax(1)
    found = judge.measure(real[saw == 3])
    assert found['class_share_min'] == 0 and found['class_share_max'] == 1
    assert found['class_kl'] == pytest.approx(math.log(10))
    assert found['precision'] == 1 and found['recall'] < 0.5 and found['coverage'] < 0.5
    assert found['inception_score'] < 2 and found['frechet'] > 1


def test_other_digits_are_judged_better_than_noise(judge, val):
    noise = (random(300, 784) > 0).float()
    good, bad = judge.measure(val.images[300:] / 255), judge.measure(noise)
    assert good['frechet'] < bad['frechet'] / 10
    assert all(good[name] > bad[name] + 0.5 for name in ('inception_score', 'recall', 'coverage'))


def test_class_measures_are_of_what_the_classifier_sees(judge, val):
    images = val.images[300:] / 255
    saw = judge.classifier.look_at(images)[1].argmax(1)
    shares = [(saw == i).double().mean().item() for i in range(10)]
    found = judge.measure(images)
    assert (found['class_share_min'], found['class_share_max']) == (min(shares), max(shares))
    assert found['class_kl'] == pytest.approx(scipy.stats.entropy(shares, [0.1] * 10))


def test_a_glance_agrees_with_the_measure(judge, val):
    images = val.images[300:400] / 255
    found = judge.measure(images)
    assert judge.glance(images) == pytest.approx(
        {name: found[name] for name in ('frechet', 'class_share_min')})
