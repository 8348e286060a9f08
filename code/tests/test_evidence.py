"""`a3_evidence.py`: its estimates and curves against independent oracles, then the script."""

import hashlib
import json
import math
import shlex
import shutil
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, distributions
from torch.distributions import Normal, kl_divergence

import a3_ae
import a3_evidence
import a3_nf
import a3_vae
import command_line
import measures
import runs
from a3_evidence import FIGURES, Material, importance_log_weights, naive_log_weights
from datasets import digits
from datasets.common import Loader
from experiments import AUTOENCODERS, FLOWS, LATENT_SIZES, MONTE_CARLO, find
from helpers import assert_one_line, read_csv, stamps

PRIOR = Normal(0., 1.)
FEW_DIGITS = (200, 100, 100)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off_by_errors(samples: Tensor, expected: Tensor | float) -> float:
    """How many standard errors the mean of the samples (along the first axis) is off, at most."""
    error = samples.std(0) / math.sqrt(len(samples))
    return float(((samples.mean(0) - expected) / error).abs().max())


def columns(path: Path) -> dict[str, np.ndarray]:
    rows = read_csv(path)
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def drawn(name: str, **given) -> tuple[dict[str, float], Figure]:
    """The metrics of a figure and the figure, of nothing but the material that is given."""
    material = dict.fromkeys(Material._fields[:8]) | Material._field_defaults | given
    figure = Figure()
    torch.manual_seed(1)
    return FIGURES[name][0](Material(**material), figure), figure


@pytest.fixture
def few(tmp_path) -> dict:
    """300 images of noise, and untrained models, none of them the prior's own."""
    images = torch.randint(256, (300, 784), generator=torch.Generator().manual_seed(1))
    train, loader = (Loader(grey.to(torch.uint8), torch.arange(300) % 10, 100, False, {})
                     for grey in (images.roll(1, 1), images))
    bits, models = (images > 127).float(), {}
    torch.manual_seed(2)
    for run in dict.fromkeys(AUTOENCODERS + MONTE_CARLO):
        kind, zdim = run.split('_z')
        vae = a3_vae.VAE(32, int(zdim), 1, False)
        model = models[run] = (vae if kind == 'vae' else a3_ae.AutoEncoder(vae)
                               ).eval().requires_grad_(False)
        model.encoder.net.last.weight *= 3
        model.decoder.net.last.weight *= 20
        seen = model.seen = []  # the codes that are decoded
        model.decoder.register_forward_pre_hook(lambda _, codes, seen=seen: seen.append(*codes))
    models |= {run: a3_nf.make_model(a3_nf.parse_args([*find(run).words, '--n_hidden', '8'])
                                     ).requires_grad_(False) for run in FLOWS}
    return {'folder': tmp_path, 'models': models, 'train': train, 'val': loader, 'test': loader,
            'train_bits': bits.roll(1, 1), 'test_bits': bits, 'n_naive': 64, 'n_importance': 16}


def expected_kl(model: a3_vae.VAE, images: Tensor) -> Tensor:
    return kl_divergence(Normal(*model.encoder(images)), PRIOR)


@pytest.fixture(scope='module')
def exact() -> tuple[a3_vae.VAE, Tensor, Tensor]:
    """A random float64 VAE with one latent dimension, images, and their log p(x) by quadrature."""
    torch.manual_seed(3)
    model = a3_vae.VAE(8, 1, n_layers=1, skip=False).double().eval().requires_grad_(False)
    for network, size in ((model.decoder, 0.15), (model.encoder, 0.05)):
        network.net.first.weight.normal_()
        network.net.last.weight.normal_(std=size)
    model.encoder.net.last.bias[1:] = 1.0  # a wide q: no rare, heavy weights
    x = (random(3, 784) > 0.3).double()
    z = torch.linspace(-9, 9, 1001, dtype=torch.float64)[:, None]
    log_joint = PRIOR.log_prob(z) + torch.stack([distributions.Bernoulli(
        model.decoder(z)).log_prob(image).sum(1) for image in x], dim=1)
    log_px = log_joint.logsumexp(0) + math.log(18 / 1000)  # the trapezoidal rule
    assert (log_joint.amax(0) - log_joint.mean(0)).min() > 5  # not flat: the estimates do differ
    return model, x, log_px


@pytest.mark.parametrize('weights', [naive_log_weights, importance_log_weights])
def test_the_average_weight_is_the_probability_and_the_estimates_rise_to_it(exact, weights):
    model, x, log_px = exact
    torch.manual_seed(1)
    log_w = weights(model, x, 2 ** 13)
    ratio = (log_w - log_px).exp()
    assert off_by_errors(ratio, 1.) < 4 and ratio.std(0).max() < 4
    means = [row['mean'] for row in a3_evidence.block_estimates(log_w)]
    assert means == sorted(means) and means[0] < log_px.mean() - 0.1
    assert means[-1] == pytest.approx(float(log_px.mean()), abs=0.1)


def test_block_estimates_are_those_of_disjoint_blocks():
    log_w = 5 * random(32, 3) - 700  # whose exponentials underflow in float32
    rows = a3_evidence.block_estimates(log_w)
    assert [row['samples'] for row in rows] == [1, 2, 4, 8, 16, 32]
    for row in rows:
        blocks = log_w.numpy().reshape(-1, row['samples'], 3)
        repeated = scipy.special.logsumexp(blocks, axis=1).mean(1) - np.log(row['samples'])
        bounds = np.quantile(repeated, [0.1, 0.9]).tolist() if len(repeated) > 2 else [None] * 2
        assert list(row.values())[1:] == pytest.approx([repeated.mean(), *bounds])


@pytest.mark.parametrize('goal, expected', [(-12., 0.), (-10., 0.), (-7., 0.5), (-4., 1.),
                                            (-3., 1.25), (0., 2.), (0.1, None)])
def test_the_needed_samples_are_those_where_the_mean_first_is_at_the_goal(goal, expected):
    rows = [{'samples': samples, 'mean': mean} for samples, mean in (
        (1, -10.), (10, -4.), (100, 0.), (1000, -1.))]
    assert a3_evidence.needed_log10(rows, goal) == pytest.approx(expected)


def test_monte_carlo_counts_the_samples_only_where_they_suffice(few, monkeypatch):
    weights, needed, panels = [], [], [0, None, None, 1, 2, 3]

    def recorded(model: a3_vae.VAE, x: Tensor, n: int) -> Tensor:
        weights.append(naive_log_weights(model, x, n) - 5. * (model.z_dim == 20 and n == 64))
        return weights[-1]
    monkeypatch.setattr(a3_evidence, 'naive_log_weights', recorded)
    monkeypatch.setattr(a3_evidence, 'importance_log_weights', recorded)
    monkeypatch.setattr(a3_evidence, 'importance_sampled_log_px', lambda model, x, n: (
        torch.full([len(x)], -math.inf)))
    monkeypatch.setattr(a3_evidence, 'log_px_on_lattice', lambda model, x: (
        weights[-2].logsumexp(0) - math.log(64)))
    metrics, figure = drawn('monte_carlo', **few, n_images=50)
    for zdim, panel, naive, importance in zip((2, 3, 4, 5, 10, 20), panels, weights[::2],
                                              weights[1::2], strict=True):
        row = {name.partition('_')[2]: value for name, value in metrics.items()
               if name.startswith(f'z{zdim}_')}
        assert naive.shape == (64, 50) and importance.shape == (16, 50)
        last = [scipy.special.logsumexp(log_w, 0) - math.log(len(log_w))
                for log_w in (naive, importance)]
        reference = last[0] if zdim == 2 else max(last, key=np.mean)
        assert row['reference_nats'] == pytest.approx(reference.mean(), 1e-6)
        for i, (name, estimate) in enumerate(zip(('naive', 'importance'), last, strict=True)):
            gap = pytest.approx(row['reference_nats'] - estimate.mean(), abs=1e-3)
            assert row[f'{name}_gap_nats'] == gap
            if panel is not None:
                line = figure.axes[panel].lines[i]
                assert (line.get_ydata()[-1], line.get_label()) == (gap, name)
                band = figure.axes[panel].collections[0].get_paths()[0]
                assert {1, 2} <= set(band.vertices[:, 0])  # samples
        kl = expected_kl(few['models'][f'vae_z{zdim}'], few['test_bits'][::6]).sum(1).numpy()
        assert [row[f'exp_kl{end}_log10'] for end in ('', '_low', '_high')] == pytest.approx(
            np.array([kl.mean(), *np.quantile(kl, [0.1, 0.9])]) / math.log(10), 1e-4)
        measured = a3_evidence.needed_log10(a3_evidence.block_estimates(naive),
                                            row['reference_nats'] - 1)
        assert row['needed_log10'] == measured and (measured is None) == (zdim == 20)
        needed.append([zdim, math.nan if measured is None else measured])
    points = {line.get_label(): line.get_xydata() for line in figure.axes[4].lines}
    np.testing.assert_array_equal(points['measured'], needed)


def test_neighbours_are_those_of_a_tree():
    train, z, labels = random(500, 3), random(200, 3, seed=1), torch.arange(500) % 10
    near = scipy.spatial.cKDTree(train).query(z, 7)[1]
    expected = [np.bincount(labels.numpy()[row]).argmax() for row in near]
    assert a3_evidence.nearest_neighbours(train, labels, z, k=7).tolist() == expected


def test_codes_shows_the_mean_codes_and_how_well_training_codes_predict_classes(few, monkeypatch):
    probed = []
    monkeypatch.setattr(a3_evidence, 'nearest_neighbours', lambda train_z, train_y, z: (
        probed.append((train_z, z)) or train_y))
    metrics, figure = drawn('codes', **few)
    probes = AUTOENCODERS + FLOWS + [f'{run}_without_noise' for run in FLOWS]
    for name, codes in zip(probes, probed, strict=True):
        model = few['models'][name.removesuffix('_without_noise')]
        if name not in AUTOENCODERS:
            for z, loader in zip(codes, ('train', 'test'), strict=True):
                noise = model.decode(z) - few[loader].images
                if name in FLOWS:
                    assert -0.01 < noise.min() < 0.1 and 0.9 < noise.max() < 1.01
                else:
                    torch.testing.assert_close(noise, noise * 0 + 0.5, rtol=0, atol=0.02)
        else:
            torch.testing.assert_close(codes, tuple(model.encoder(few[bits])[0] for bits in (
                'train_bits', 'test_bits')))
    shown = columns(few['folder'] / 'codes.csv')
    assert shown.pop('class').tolist() == few['test'].labels.tolist()
    for run, axes in zip(('ae_z2', 'dae_z2', 'vae_z2'), figure.axes, strict=True):
        z = few['models'][run].encoder(few['test_bits'])[0].numpy()
        np.testing.assert_allclose(np.stack([shown.pop(f'{run}_{d}') for d in (1, 2)], axis=1), z,
                                   atol=0.0051)
        np.testing.assert_allclose(axes.collections[0].get_offsets(), z)
        low, high = np.quantile(z, [0.005, 0.995], axis=0)
        sides = (low + high) / 2 + np.array([[-.55], [.55]]) * (high - low).max()
        np.testing.assert_allclose([axes.get_xlim(), axes.get_ylim()], sides.T, rtol=1e-4)
    assert not shown
    assert metrics == {f'{name}_knn_accuracy': 1. for name in probes}


def test_decodings_measures_the_codes_and_decodes_the_same_noise_for_all_kinds(few, monkeypatch):
    judged = []
    # Sure of an image if one of its pixels is bright.
    monkeypatch.setattr(measures, 'load_classifier', lambda *_: SimpleNamespace(
        look_at=lambda images: (None, F.pad(9 * images[:, 100:101], (0, 9)).log_softmax(1))))
    monkeypatch.setattr(measures, 'Judge', lambda *_: SimpleNamespace(
        glance=lambda images: judged.append(images) or {'frechet': float(len(images))}))
    metrics, figure = drawn('decodings', **few | {'n_decoded': 4000})
    [grid] = figure.axes[0].images
    assert torch.equal(judged[-1], few['val'].images / 255)
    assert metrics['frechet_floor'] == 300 and metrics['vae_z2_frechet_fitted'] == 4000
    vae = few['models']['vae_z20']
    z = vae.seen[0][:800]  # before the codes of test images
    posteriors = distributions.MixtureSameFamily(
        distributions.Categorical(torch.ones(300)),
        distributions.Independent(Normal(*vae.encoder(few['train_bits'])), 1))
    cover = posteriors.log_prob(z) - PRIOR.log_prob(z).sum(1)
    sure = vae.decoder(z)[:, 100].mul(9).exp()
    unsure = (sure / (sure + 9) < 0.9).float()[cover.argsort()]
    assert [metrics[f'unsure_share_{which}_covered'] for which in ('least', 'best')] == (
        pytest.approx([unsure[:200].mean().item(), unsure[600:].mean().item()], abs=0.006))
    assert abs(unsure[:200].mean() - unsure[600:].mean()) > 0.1
    sure = vae.decoder(vae.encoder(few['test_bits'])[0])[:, 100].mul(9).exp()
    assert metrics['unsure_share_of_test'] == pytest.approx(
        (sure / (sure + 9) < 0.9).float().mean().item(), abs=0.006)
    for run, zdim in zip(AUTOENCODERS, (2, 2, 2, 20, 20, 20), strict=True):
        model = few['models'][run]
        prior, fitted, *_ = model.seen
        assert torch.equal(prior, few['models'][f'ae_z{zdim}'].seen[0])
        if zdim == 20:  # the fourth image of the row
            top = 30 * ['ae', 'dae', 'vae'].index(run.removesuffix('_z20'))
            np.testing.assert_allclose(grid.get_array()[top + 1:top + 29, 91:119].flatten(),
                                       model.decoder(prior[3]), atol=1e-5)
        pixels = distributions.Bernoulli(model.decoder(model.encoder(few['test_bits'])[0]))
        assert metrics[f'{run}_reconstruction_nats'] == pytest.approx(
            -float(pixels.log_prob(few['test_bits']).sum(1).mean()), rel=1e-4)
        assert off_by_errors(prior, 0.) < 4 and off_by_errors(prior.square(), 1.) < 4
        train, test = (
            Normal(mean, std if run.startswith('vae') else 1e-6).sample((100,)).flatten(0, 1)
            for mean, std in map(model.encoder, (few['train_bits'], few['test_bits'])))
        assert metrics[f'{run}_code_std'] == pytest.approx(float(test.std(0).mean()), .02)
        kl = kl_divergence(Normal(test.mean(0), test.std(0)), PRIOR).sum()
        assert metrics[f'{run}_code_kl_nats'] == pytest.approx(float(kl), .03)
        assert off_by_errors(fitted, train.mean(0)) < 4.5
        torch.testing.assert_close(fitted.T.cov(), train.T.cov(), rtol=0.2,
                                   atol=0.1 * float(train.var(0).max()))


def test_the_table_of_latent_sizes_has_the_runs_own_numbers_and_the_dimensions_in_use(few):
    metrics = {run: {name: 100. * i + j + 0.26 for j, name in enumerate(a3_evidence.TABLE)}
               for i, run in enumerate(LATENT_SIZES)}
    for run in LATENT_SIZES:
        last = few['models'][run].encoder.net.last
        last.weight[:2], last.bias[:2] = 0., torch.tensor([3., 0.])  # the first mean is used only
        last.weight[len(last.bias) // 2 + 1], last.bias[len(last.bias) // 2 + 1] = 0., 0.
    found, _ = drawn('latent_sizes', **few, metrics=metrics)
    rows = read_csv(few['folder'] / 'latent_sizes.csv')
    assert list(rows[0]) == ['zdim', *a3_evidence.TABLE, 'dims_in_use']
    assert [row['test_nll_nats'] for row in rows] == ['4.26', '104.26', '204.26', '304.26']
    kl = [expected_kl(few['models'][run], few['test_bits']).mean(0) for run in LATENT_SIZES]
    assert list(found.values()) == [int((nats > 0.1).sum()) for nats in kl]
    assert 1 <= found['z20_dims_in_use'] < 20


def test_a_walk_changes_one_dimension_and_the_most_used_comes_first(few):
    model = few['models']['vae_z10']
    _, figure = drawn('traversals', **few)
    rows = columns(few['folder'] / 'traversals.csv')
    kl = expected_kl(model, few['test_bits']).mean(0)
    order = kl.argsort(descending=True)
    np.testing.assert_allclose(rows['kl_nats'], kl[order], rtol=1e-4)
    assert rows['dimension'].tolist() == (order + 1).tolist()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f'$z_{{{axis + 1}}}$' for axis in order]
    for walk, axis in zip(model.seen[0].view(10, 11, 10), order, strict=True):
        expected = model.encoder(few['test_bits'])[0][3].repeat(11, 1)  # the first of class 3
        expected[:, axis] = torch.linspace(-3, 3, 11)
        torch.testing.assert_close(walk, expected)


def test_the_map_is_the_kl_divergence_of_torch_distributions(tmp_path):
    metrics, figure = drawn('kl_map', folder=tmp_path)
    mean, variance, nats = map(torch.tensor, columns(tmp_path / 'kl_map.csv').values())
    assert (mean.diff() >= 0).all() and torch.equal(variance, variance[:61].repeat(61))
    assert len(mean.unique()) == len(variance.unique()) == 61 and len(mean) == 61 ** 2
    torch.testing.assert_close(nats, kl_divergence(Normal(mean, variance.sqrt()), PRIOR),
                               rtol=1e-4, atol=1e-5)
    small, large = (Normal(metrics[f'{name}_mean'], math.sqrt(metrics[f'{name}_variance']))
                    for name in ('small', 'large'))
    assert metrics['small_nats'] == pytest.approx(float(kl_divergence(small, PRIOR)), 1e-4)
    assert metrics['large_nats'] == pytest.approx(float(kl_divergence(large, PRIOR)), 1e-4)
    assert metrics['small_nats'] < 0.01 and metrics['large_nats'] > 10
    for line, density in zip(figure.axes[1].lines, (PRIOR, small, large), strict=True):
        x, y = map(torch.tensor, line.get_data())
        np.testing.assert_allclose(y, density.log_prob(x).exp(), atol=1e-4)


def test_the_losses_and_their_gradients_are_the_closed_forms(tmp_path):
    metrics, _ = drawn('gan_gradients', folder=tmp_path)
    rows = columns(tmp_path / 'gan_gradients.csv')
    D = scipy.special.expit(rows['logit'])
    for name, expected in (('saturating_loss_nats', np.log(1 - D)), ('saturating_gradient', -D),
                           ('non_saturating_loss_nats', -np.log(D)),
                           ('non_saturating_gradient', D - 1)):
        np.testing.assert_allclose(rows[name], expected, rtol=1e-4, err_msg=name)
        [early] = expected[rows['logit'] == -5]
        assert metrics[f'early_{name}'] == pytest.approx(early, 1e-4)


def test_the_generators_of_the_first_epoch_differ_by_their_losses_alone(few, tmp_path,
                                                                        monkeypatch):
    descents, descent = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, 'SGD', lambda weights, **options: (
        descents.append(options) or descent(weights, **options)))
    monkeypatch.setattr(measures, 'load_classifier', lambda *_: None)
    judged = []

    def glance(samples: Tensor) -> dict[str, float]:
        judged.append((float(samples.min()), float(samples.double().mean())))
        return {'frechet': judged[-1][1]}
    monkeypatch.setattr(measures, 'Judge', lambda _, images, labels: SimpleNamespace(
        glance=glance if torch.equal(images, few['val'].images / 255) else None))
    metrics, _ = drawn('gan_early', **few)
    lowest, means = zip(*judged, strict=True)
    assert 0 <= min(lowest) < 0.5  # not in [−1, 1]
    assert means[:6:2] == means[6::2] and len(set(means)) == 9  # three are of untrained ones
    assert [metrics[f'{name}_frechet_median'] for name in (
        'untrained', 'non_saturating', 'saturating')] == [
        np.median(found) for found in (means[:6:2], means[1:6:2], means[7::2])]
    assert descents == [{'lr': 0.01}] * 6
    rows = columns(tmp_path / 'gan_early.csv')
    assert len(rows['step']) == 5  # batches of 64 of all 300 images
    starts = [rows[f'saturating_d_fake_{seed}'][0] for seed in range(3)]
    assert len(set(starts)) == 3
    for seed, D in enumerate(starts):
        assert rows[f'non_saturating_d_fake_{seed}'][0] == D and 0.4 < D < 0.6
        # At first D is nearly the same for all fakes, so the gradients are those of one logit.
        for name in ('saturating', 'non_saturating'):
            assert rows[f'{name}_gradient_ratio_{seed}'][0] == pytest.approx(D / (1 - D), rel=0.02)
        assert rows[f'saturating_d_fake_{seed}'][1] != rows[f'non_saturating_d_fake_{seed}'][1]
    for name in ('saturating', 'non_saturating'):
        assert metrics[f'{name}_gradient_ratio_median'] == pytest.approx(
            np.median([rows[f'{name}_gradient_ratio_{seed}'] for seed in range(3)]), rel=1e-4)


def test_the_mixture_is_that_of_torch_distributions():
    weights, x = random(6, 5), 2 * random(50, 2, seed=1)
    expected = distributions.MixtureSameFamily(
        distributions.Categorical(logits=weights[:, 4]),
        distributions.Independent(Normal(weights[:, :2], weights[:, 2:4].exp()), 1)).log_prob(x)
    torch.testing.assert_close(a3_evidence.mixture_log_density(x, weights), expected)


def test_the_density_of_integers_runs_away_and_that_of_dequantised_ones_does_not(tmp_path,
                                                                                 monkeypatch):
    calls, mixture = [], a3_evidence.mixture_log_density
    monkeypatch.setattr(a3_evidence, 'mixture_log_density',
                        lambda *inputs: calls.append(inputs) or mixture(*inputs))
    metrics, figure = drawn('dequantisation', folder=tmp_path)
    shown = figure.axes[2].images[0].get_array()[300, 100]  # of x₁ = 0.75 and x₂ = 3.25
    assert shown == pytest.approx(float(mixture(torch.tensor([[.75, 3.25]]), calls[-1][1]).exp()))
    assert list(figure.axes[2].images[0].get_extent()) == [-0.5, 4.5, -0.5, 4.5]
    rows = columns(tmp_path / 'dequantisation.csv')
    mass = np.array([1, 2, 1, 4, 1, 1, 4, 1, 2, 1]) / 18
    entropy = -float(mass @ np.log(mass))
    assert metrics['bound_nats'] == pytest.approx(-entropy)
    assert metrics['integers_nats'] == pytest.approx(rows['integers_nats'][-1], rel=1e-4)
    assert rows['integers_nats'][-1] > -entropy + 2
    assert np.diff(rows['integers_nats'][-100:]).mean() > 0.01  # and there is no end to it
    assert -entropy - 0.5 < rows['dequantised_nats'][-50:].mean() < -entropy
    assert rows['dequantised_nats'].max() < -entropy + 0.1  # noise of 256 draws a step


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> Path:
    """The folder of a dry run, the only file system change of one started without a network."""
    here, temporary = tmp_path_factory.mktemp('here'), tmp_path_factory.mktemp('temporary')
    connections = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(tempfile, 'tempdir', str(temporary))
        patch.setattr(socket, 'create_connection', lambda *_, **__: connections.append(1))
        patch.setattr(measures, 'train_classifier', lambda _: measures.DigitClassifier().eval())
        patch.setattr(digits, 'SIZES', FEW_DIGITS)
        args = a3_evidence.parse_args(['--dry_run', '--data_dir', 'empty', '--results_dir', 'no'])
        command_line.launch(a3_evidence.main, args)
    assert not any(here.iterdir()) and not connections
    [folder] = temporary.glob('*/evidence')
    return folder


def test_the_flow_draws_the_plan_first_and_a_pixel_sees_earlier_ones_only(tmp_path):
    metrics, _ = drawn('flow_order', folder=tmp_path)
    _, position, in_plan, *sees = columns(tmp_path / 'flow_order.csv').values()
    assert sorted(position) == list(range(784)) and (in_plan == (position < 196)).all()
    assert in_plan.reshape(28, 28)[::2, ::2].all()
    pixels = 12 * 28 + 14, 14 * 28 + 15
    for name, pixel, seen in zip(('plan', 'detail'), pixels, sees, strict=True):
        assert position[seen > 0].max() == position[pixel] - 1
        assert metrics[f'{name}_pixel_sees'] == seen.sum() > 50


def test_a_dry_run_makes_every_figure_offline_and_leaves_no_results(finished):
    assert {path.name for path in finished.iterdir()} == {
        'config.json', 'metrics.json', 'codes_probes.csv', 'monte_carlo_needed.csv',
        'flow_order.png',
        *(f'{name}.{kind}' for name in FIGURES for kind in ('pdf', 'csv'))}
    metrics = json.loads((finished / 'metrics.json').read_text())
    assert all(any(key.startswith(name) for key in metrics) for name in FIGURES)


def test_figures_made_alone_are_the_same_and_leave_the_others(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, 'SIZES', FEW_DIGITS)
    folder = shutil.copytree(finished, tmp_path / 'evidence')
    metrics = (folder / 'metrics.json').read_text()
    (folder / 'metrics.json').write_text(metrics.replace('{', '{"gan_gradients_gone": 1,', 1))
    before = stamps(folder)
    a3_evidence.main(a3_evidence.parse_args([
        '--dry_run', '--data_dir', 'empty', '--results_dir', str(tmp_path), '--only',
        'latent_sizes', 'gan_gradients']))
    after = stamps(folder)
    assert {name.split('.')[0] for name in after if before[name] != after[name]} == {
        'config', 'metrics', 'latent_sizes', 'gan_gradients'}
    assert all((folder / name).read_bytes() == (finished / name).read_bytes()
               for name in after if name != 'config.json')


def test_a_trained_run_is_used_and_named_by_the_sha256_of_its_metrics(tmp_path, run_here,
                                                                     monkeypatch):
    monkeypatch.setattr(runs, 'fingerprint', lambda *_: {})  # it takes another run
    shared = ('--dataset', 'digits', '--results_dir', tmp_path)
    assert run_here('a3_vae.py', '--zdim', 10, '--hidden_dim', 16, '--n_layers', 1, '--epochs', 1,
                    '--iw_samples', 1, '--run', 'vae_z10_digits', *shared).returncode == 0
    assert run_here('a3_evidence.py', '--only', 'traversals', *shared).returncode == 0
    config = json.loads((tmp_path / 'evidence_digits' / 'config.json').read_text())
    content = (tmp_path / 'vae_z10_digits' / 'metrics.json').read_bytes()
    assert config['runs'] == {'vae_z10_digits': hashlib.sha256(content).hexdigest()}
    kl = columns(tmp_path / 'evidence_digits' / 'traversals.csv')['kl_nats'].sum()
    assert kl == pytest.approx(json.loads(content)['test_kl_nats'], rel=0.01)


@pytest.mark.parametrize('run', dict.fromkeys(AUTOENCODERS + FLOWS + MONTE_CARLO))
def test_a_missing_run_is_one_line_with_the_command_that_makes_it(tmp_path, run_here, monkeypatch,
                                                                  run):
    monkeypatch.setattr(a3_evidence, 'mnist', None)  # no work before
    monkeypatch.setitem(FIGURES, 'kl_map', (None, 1., [run]))
    done = run_here('a3_evidence.py', '--results_dir', tmp_path / 'no', '--dataset', 'digits',
                    '--only', 'kl_map')
    assert_one_line(done, f'no/{run}_digits is missing')
    script, *words = shlex.split(done.stderr.split('make it with: python code/')[1])
    module = {'a3_vae.py': a3_vae, 'a3_ae.py': a3_ae, 'a3_nf.py': a3_nf}[script]
    made = module.parse_args(words)
    assert (made.name, made.dataset) == (run, 'digits') and not any(tmp_path.iterdir())
