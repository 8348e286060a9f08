"""`a3_evidence.py`: its estimates and curves against independent oracles, then the script."""

import csv
import hashlib
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.spatial
import scipy.stats
import torch
from torch import Tensor, distributions

import a3_ae
import a3_evidence
import a3_vae
import measures
from a3_evidence import (
    FIGURES,
    Material,
    block_estimates,
    importance_log_weights,
    kl_by_dimension,
    linear_probe,
    mixture_log_density,
    naive_log_weights,
    nearest_neighbours,
    needed_log10,
)
from datasets.common import Loader
from helpers import assert_one_line, read_csv, stamps

ALL_FILES = {'config.json', 'metrics.json', 'latent_sizes.tex', 'codes_probes.csv',
             'monte_carlo_needed.csv',
             *(f'{name}.{kind}' for name in FIGURES for kind in ('pdf', 'csv'))}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off_by_errors(samples: Tensor, expected: Tensor | float) -> float:
    """How many standard errors the mean of the samples (along the first axis) is off, at most."""
    error = samples.std(0) / math.sqrt(len(samples))
    return float(((samples.mean(0) - expected) / error).abs().max())


def columns(path: Path) -> dict[str, np.ndarray]:
    rows = read_csv(path)
    return {name: np.array([float(row[name] or 'nan') for row in rows]) for name in rows[0]}


def empty(folder: Path, **given) -> Material:
    """Material of nothing but what is given."""
    return Material(**dict.fromkeys(Material._fields[:8]) | Material._field_defaults
                    | {'folder': folder} | given)


@pytest.fixture(scope='module')
def few(tmp_path_factory) -> Material:
    """300 images of noise, and untrained models, none of them the prior's own."""
    images = torch.randint(256, (300, 784), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(300) % 10
    loader = Loader(images.to(torch.uint8), labels, 100, False, {})
    torch.manual_seed(2)
    models = {run: (a3_vae.VAE(32, int(run.split('_z')[1]), 1, False) if run.startswith('vae') else
                    a3_ae.AutoEncoder(32, int(run.split('_z')[1])))
              for run in dict.fromkeys(a3_evidence.OF_EACH_KIND + a3_evidence.OF_EACH_SIZE)}
    for model in models.values():
        model.eval().requires_grad_(False)
        model.encoder.net.last.weight *= 3
        model.decoder.net.last.weight *= 20
    bits = (images > 127).float()
    return Material(tmp_path_factory.mktemp('few') / 'evidence', models, {}, loader, loader,
                    loader, bits, bits, 300, 10, 64, 16, 20)


@pytest.fixture
def material(few, tmp_path) -> Material:
    return few._replace(folder=tmp_path)


# --- the estimates of log p(x), against quadrature -----------------------------------------------


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
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    log_joint = distributions.Normal(0., 1.).log_prob(z)[:, None] + torch.stack([
        distributions.Bernoulli(model.decoder(z[:, None])).log_prob(image).sum(1)
        for image in x], dim=1)
    log_px = torch.from_numpy(np.log(scipy.integrate.simpson(
        (log_joint - log_joint.amax(0)).exp().numpy(), x=z.numpy(), axis=0))) + log_joint.amax(0)
    assert (log_joint.amax(0) - log_joint.mean(0)).min() > 5  # not flat: the estimates do differ
    return model, x, log_px


@pytest.mark.parametrize('weights', [naive_log_weights, importance_log_weights])
def test_the_average_weight_is_the_probability(exact, weights):
    model, x, log_px = exact
    torch.manual_seed(1)
    ratio = (weights(model, x, 40_000) - log_px).exp()
    assert off_by_errors(ratio, 1.) < 4 and ratio.std(0).max() < 4


@pytest.mark.parametrize('weights', [naive_log_weights, importance_log_weights])
def test_estimates_are_lower_bounds_that_rise_to_log_px(exact, weights):
    model, x, log_px = exact
    torch.manual_seed(1)
    means = [row['mean'] for row in block_estimates(weights(model, x, 2 ** 14))]
    assert means == sorted(means) and means[0] < log_px.mean() - 0.1
    assert means[-1] == pytest.approx(float(log_px.mean()), abs=0.1)


def test_importance_weights_are_those_of_the_vae(exact):
    model, x, _ = exact
    torch.manual_seed(1)
    expected = model.log_px(x, 32)
    torch.manual_seed(1)
    log_w = importance_log_weights(model, x, 32)
    torch.testing.assert_close(log_w.logsumexp(0) - math.log(32), expected)


def test_chunks_do_not_change_the_weights(exact, monkeypatch):
    model, x, _ = exact
    for weights in (naive_log_weights, importance_log_weights):
        torch.manual_seed(1)
        at_once = weights(model, x, 40)
        monkeypatch.setattr(a3_vae, 'IW_ROWS', 21)
        torch.manual_seed(1)
        torch.testing.assert_close(weights(model, x, 40), at_once)


def test_block_estimates_are_those_of_disjoint_blocks():
    log_w = 5 * random(32, 3) - 700  # whose exponentials underflow in float32
    rows = block_estimates(log_w)
    assert [row['samples'] for row in rows] == [1, 2, 4, 8, 16, 32]
    for row in rows:
        blocks = log_w.numpy().reshape(-1, row['samples'], 3)
        repeated = scipy.special.logsumexp(blocks, axis=1).mean(1) - np.log(row['samples'])
        assert row['mean'] == pytest.approx(repeated.mean())
        if row['samples'] > 8:
            assert row['low'] is row['high'] is None
        else:
            assert [row['low'], row['high']] == pytest.approx(np.quantile(repeated, [0.1, 0.9]))


@pytest.mark.parametrize('goal, expected', [(-12., 0.), (-10., 0.), (-7., 0.5), (-4., 1.),
                                            (-3., 1.25), (0., 2.), (0.1, None)])
def test_the_needed_samples_of_a_curve_worked_by_hand(goal, expected):
    rows = [{'samples': 1, 'mean': -10.}, {'samples': 10, 'mean': -4.},
            {'samples': 100, 'mean': 0.}]
    assert needed_log10(rows, goal) == (expected if expected is None else pytest.approx(expected))


def test_monte_carlo_tells_what_it_measured_from_what_it_extrapolated(material, monkeypatch):
    drawn = []

    def recorded(model: a3_vae.VAE, x: Tensor, n: int) -> Tensor:
        worse = 5. * (model.z_dim == 20 and n == 64)
        drawn.append(naive_log_weights(model, x, n) - worse)
        return drawn[-1]
    monkeypatch.setattr(a3_evidence, 'naive_log_weights', recorded)
    monkeypatch.setattr(a3_evidence, 'importance_log_weights', recorded)
    torch.manual_seed(1)
    metrics = a3_evidence.monte_carlo(material)
    needed = read_csv(material.folder / 'monte_carlo_needed.csv')
    assert [row['zdim'] for row in needed] == ['2', '5', '10', '20']
    assert [row['extrapolated'] for row in needed] == ['False', 'False', 'False', 'True']
    for row, naive, importance in zip(needed, drawn[::2], drawn[1::2], strict=True):
        prefix = f'z{row["zdim"]}_'
        assert (len(naive), len(importance)) == (64, 16)
        last = [scipy.special.logsumexp(log_w, 0) - math.log(len(log_w))
                for log_w in (naive, importance)]
        reference = np.maximum(*last).mean()
        assert metrics[prefix + 'reference_nats'] == pytest.approx(reference, 1e-6)
        for name, estimate in zip(('naive', 'importance'), last, strict=True):
            gap = metrics[f'{prefix}{name}_gap_nats']
            assert gap == pytest.approx(reference - estimate.mean(), abs=1e-3) and gap > -1e-3

        mean, std = material.models[f'vae_{prefix[:-1]}'].encoder(material.test_bits[::30])
        kl = distributions.kl_divergence(distributions.Normal(mean, std),
                                         distributions.Normal(0., 1.)).sum(1) / math.log(10)
        for end, value in (('', kl.mean()), ('_low', kl.quantile(0.1)),
                           ('_high', kl.quantile(0.9))):
            assert metrics[f'{prefix}exp_kl{end}_log10'] == pytest.approx(float(value), 1e-4)
        if row['extrapolated'] == 'True':
            assert row['needed_log10'] == row['exp_kl_log10']
        else:
            assert 0 <= float(row['needed_log10']) <= math.log10(64)


# --- codes and decodings -------------------------------------------------------------------------


def test_neighbours_are_those_of_a_tree():
    train, z, labels = random(500, 3), random(200, 3, seed=1), torch.arange(500) % 10
    near = scipy.spatial.cKDTree(train).query(z, 7)[1]
    expected = [np.bincount(labels.numpy()[row]).argmax() for row in near]
    assert nearest_neighbours(train, labels, z, k=7).tolist() == expected


def test_the_linear_probe_tells_what_is_separable_whatever_the_scale():
    labels = torch.arange(400) % 10
    angle = labels * 2 * math.pi / 10
    z = torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * random(400, 2)
    assert (linear_probe(z, labels, z) == labels).all()
    wide = z * torch.tensor([1e4, 1e-3]) + 50
    assert (linear_probe(wide, labels, wide) == labels).all()


def test_the_linear_probe_is_the_optimum_of_another_solver():
    labels = torch.arange(300) % 10
    z = random(300, 2) + labels[:, None] / 3
    x = np.concatenate([z.numpy(), np.ones((300, 1))], axis=1)

    def nats(weights: np.ndarray) -> float:
        logits = x @ weights.reshape(3, 10)
        return float(np.mean(scipy.special.logsumexp(logits, 1) - logits[range(300), labels]))
    best = scipy.optimize.minimize(nats, np.zeros(30), method='BFGS').x.reshape(3, 10)
    assert (linear_probe(z, labels, z).numpy() == (x @ best).argmax(1)).mean() > 0.98


def test_codes_writes_the_codes_and_the_shares_told(material, monkeypatch):
    monkeypatch.setattr(a3_evidence, 'nearest_neighbours', lambda train_z, train_y, z: train_y)
    monkeypatch.setattr(a3_evidence, 'linear_probe', lambda train_z, train_y, z: train_y * 0)
    metrics = a3_evidence.codes(material)
    shown = columns(material.folder / 'codes.csv')
    assert shown.pop('class').tolist() == material.test.labels.tolist()
    for run in ('ae_z2', 'dae_z2', 'vae_z2'):
        expected = material.models[run].encoder(material.test_bits)[0].numpy()
        found = np.stack([shown.pop(f'{run}_1'), shown.pop(f'{run}_2')], axis=1)
        np.testing.assert_allclose(found, expected, atol=0.0051)
    assert not shown
    assert metrics == {f'{run}_{probe}_accuracy': pytest.approx(share)
                       for run in a3_evidence.OF_EACH_KIND
                       for probe, share in (('knn', 1.), ('linear', 0.1))}


class NoJudge:
    """In place of a classifier and a judge, which take long."""
    def __init__(self, *_):
        pass

    def glance(self, images: Tensor) -> dict[str, float]:
        return {'frechet': float(len(images))}


def test_decodings_measures_the_codes_and_draws_alike_for_all(material, monkeypatch):
    monkeypatch.setattr(measures, 'load_classifier', NoJudge)
    monkeypatch.setattr(measures, 'Judge', NoJudge)
    decoded = {run: [] for run in a3_evidence.OF_EACH_KIND}
    for run, seen in decoded.items():
        material.models[run].decoder.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(inputs[0]))
    torch.manual_seed(1)
    metrics = a3_evidence.decodings(material._replace(n_decoded=4000))
    assert metrics['frechet_floor'] == 300 and metrics['vae_z2_frechet_fitted'] == 4000
    for zdim in (2, 20):
        prior = decoded[f'ae_z{zdim}'][0]
        assert off_by_errors(prior, 0.) < 4 and off_by_errors(prior.square(), 1.) < 4
        for kind in ('ae', 'dae', 'vae'):
            run = f'{kind}_z{zdim}'
            assert torch.equal(decoded[run][0], prior)
            mean, std = material.models[run].encoder(material.test_bits)
            codes = mean.repeat(300, 1)
            if kind == 'vae':
                codes = codes + std.repeat(300, 1) * torch.randn_like(codes)
            assert metrics[f'{run}_code_std'] == pytest.approx(float(codes.std(0).mean()), .02)
            kl = distributions.kl_divergence(
                distributions.Normal(codes.mean(0), codes.std(0)),
                distributions.Normal(0., 1.)).sum()
            assert metrics[f'{run}_code_kl_nats'] == pytest.approx(float(kl), .03)
            [_, fitted] = decoded[run]
            assert off_by_errors(fitted, codes.mean(0)) < 4.5
            torch.testing.assert_close(fitted.T.cov(), codes.T.cov(), rtol=0.2,
                                       atol=0.1 * float(codes.var(0).max()))


# --- latent dimensions ---------------------------------------------------------------------------


def test_the_kl_of_the_dimensions_adds_up_to_that_of_all(few):
    model, x = few.models['vae_z10'], few.test_bits
    kl = kl_by_dimension(model, x)
    assert kl.shape == (10,)
    torch.testing.assert_close(kl.sum(), model.elbo_terms(x)[1].mean())


def test_the_table_of_latent_sizes_has_the_runs_own_numbers(material):
    metrics = {run: {name: 100. * i + j + 0.26 for j, name in enumerate(a3_evidence.TABLE)}
               for i, run in enumerate(a3_evidence.OF_EACH_SIZE)}
    for model in material.models.values():
        if isinstance(model, a3_vae.VAE):
            weight, bias = model.encoder.net.last.weight, model.encoder.net.last.bias
            weight[1], weight[model.z_dim + 1], bias[1], bias[model.z_dim + 1] = 0., 0., 0., 0.
            bias[0] = 3.  # the first dimension is in use, the second never
    found = a3_evidence.latent_sizes(material._replace(metrics=metrics))
    rows = read_csv(material.folder / 'latent_sizes.csv')
    assert list(rows[0]) == ['zdim', *a3_evidence.TABLE, 'dims_in_use']
    assert [row['test_nll_nats'] for row in rows] == ['4.26', '104.26', '204.26', '304.26']
    assert found['z2_dims_in_use'] == 1 and 1 <= found['z20_dims_in_use'] <= 19
    tex = (material.folder / 'latent_sizes.tex').read_text()
    assert r'2 & 0.3 & 1.3 & 2.3 & 3.3 & 4.3 & 1 \\' in tex.splitlines()
    assert tex.count('&') == 6 * 5 and tex.count(r'\\') == 5


def test_a_walk_changes_one_dimension_and_the_most_used_comes_first(material):
    model, seen = material.models['vae_z10'], []
    handle = model.decoder.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0]))
    a3_evidence.traversals(material)
    handle.remove()
    rows = columns(material.folder / 'traversals.csv')
    kl = kl_by_dimension(model, material.test_bits)
    assert sorted(rows['dimension']) == list(range(1, 11))
    assert (np.diff(rows['kl_nats']) <= 0).all()
    [start] = model.encoder(material.test_bits[3:4])[0]  # the first of class 3
    for walk, dimension, nats in zip(seen[0].view(10, 11, 10), rows['dimension'], rows['kl_nats'],
                                     strict=True):
        axis = int(dimension) - 1
        assert nats == pytest.approx(float(kl[axis]), 1e-4)
        others = torch.arange(10) != axis
        assert torch.equal(walk[:, others], start[others].expand(11, 9))
        torch.testing.assert_close(walk[:, axis], torch.linspace(-3, 3, 11))


# --- formulas ------------------------------------------------------------------------------------


def test_the_map_is_the_kl_divergence_of_torch_distributions(tmp_path):
    metrics = a3_evidence.kl_map(empty(tmp_path))
    rows = {name: torch.from_numpy(values) for name, values in
            columns(tmp_path / 'kl_map.csv').items()}
    assert len(set(rows['mean'].tolist())) * len(set(rows['variance'].tolist())) == len(
        rows['mean'])

    def kl(mean: Tensor, variance: Tensor) -> Tensor:
        return distributions.kl_divergence(distributions.Normal(mean, variance.sqrt()),
                                           distributions.Normal(0., 1.))
    torch.testing.assert_close(rows['kl_nats'], kl(rows['mean'], rows['variance']),
                               rtol=1e-4, atol=1e-5)
    for name in ('small', 'large'):
        mean, variance = (torch.tensor(metrics[f'{name}_{parameter}'], dtype=torch.float64)
                          for parameter in ('mean', 'variance'))
        assert metrics[f'{name}_nats'] == pytest.approx(float(kl(mean, variance)), rel=1e-4)
    assert metrics['small_nats'] < 0.01 and metrics['large_nats'] > 10


def test_the_losses_and_their_gradients_are_the_closed_forms(tmp_path):
    metrics = a3_evidence.gan_gradients(empty(tmp_path))
    rows = columns(tmp_path / 'gan_gradients.csv')
    D = scipy.special.expit(rows['logit'])
    for name, expected in (('saturating_loss_nats', np.log(1 - D)), ('saturating_gradient', -D),
                           ('non_saturating_loss_nats', -np.log(D)),
                           ('non_saturating_gradient', D - 1)):
        np.testing.assert_allclose(rows[name], expected, rtol=1e-4, err_msg=name)
    assert metrics['early_logit'] == -5
    assert metrics['early_saturating_gradient'] == pytest.approx(-1 / (1 + math.exp(5)))
    assert metrics['early_non_saturating_gradient'] == pytest.approx(-1 / (1 + math.exp(-5)))


def test_the_mixture_is_that_of_torch_distributions():
    weights, x = random(6, 5), 2 * random(50, 2, seed=1)
    expected = distributions.MixtureSameFamily(
        distributions.Categorical(logits=weights[:, 4]),
        distributions.Independent(distributions.Normal(weights[:, :2], weights[:, 2:4].exp()), 1))
    torch.testing.assert_close(mixture_log_density(x, weights), expected.log_prob(x))


def test_density_of_integers_runs_away_and_that_of_dequantised_ones_does_not(tmp_path):
    torch.manual_seed(1)
    metrics = a3_evidence.dequantisation(empty(tmp_path))
    rows = columns(tmp_path / 'dequantisation.csv')
    entropy = scipy.stats.entropy([1, 2, 1, 4, 1, 1, 4, 1, 2, 1])
    assert metrics['bound_nats'] == pytest.approx(-entropy)
    assert rows['integers_nats'][-1] > -entropy + 2
    assert np.diff(rows['integers_nats'][-100:]).mean() > 0.01  # and there is no end to it
    assert -entropy - 0.5 < rows['dequantised_nats'][-50:].mean() < -entropy
    assert rows['dequantised_nats'].max() < -entropy + 0.1  # noise of 256 draws a step
    assert metrics['integers_nats'] == pytest.approx(rows['integers_nats'][-1], rel=1e-4)


# --- the script ----------------------------------------------------------------------------------


def dry_run_folder(stdout: str) -> Path:
    return Path(stdout.splitlines()[-1].removeprefix('files in ').partition(': ')[0])


def test_a_dry_run_makes_every_figure_offline_and_leaves_no_results(tmp_path, run_script,
                                                                   run_here):
    here, temporary = tmp_path / 'here', tmp_path / 'temporary'
    here.mkdir(), temporary.mkdir()
    done = run_script('a3_evidence.py', '--dry_run', '--data_dir', 'empty', '--results_dir',
                      'results', cwd=here, fewer_digits=True, environment={
                          'TMPDIR': str(temporary), 'https_proxy': 'http://127.0.0.1:9'})
    assert done.returncode == 0, done.stderr
    folder = dry_run_folder(done.stdout)
    assert not any(here.iterdir()) and folder.is_relative_to(temporary)
    assert {path.name for path in folder.iterdir()} == ALL_FILES
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert all(math.isfinite(value) for value in metrics.values())
    assert {name for name in FIGURES if any(key.startswith(name) for key in metrics)} == set(
        FIGURES)
    for path in folder.glob('*.csv'):
        with path.open() as file:
            assert len({len(row) for row in csv.reader(file)}) == 1
    for path in folder.glob('*.pdf'):
        content = path.read_bytes()
        assert b'CreationDate' not in content and b'/Type3' not in content
        assert b'/MediaBox [ 0 0 396 ' in content  # 5.5 in

    # and again, some of it: the same, to the byte
    done = run_here('a3_evidence.py', '--dry_run', '--dataset', 'digits', '--only', 'monte_carlo',
                    'traversals', 'dequantisation', 'codes')
    again = dry_run_folder(done.stdout)
    made = {path.name for path in again.iterdir()} - {'config.json', 'metrics.json'}
    assert len(made) == 10
    assert [name for name in sorted(made)
            if (again / name).read_bytes() != (folder / name).read_bytes()] == []


def test_one_figure_alone_leaves_the_others_as_they_are(tmp_path, run_here):
    words = ('a3_evidence.py', '--dataset', 'digits', '--results_dir', tmp_path, '--only')
    assert run_here(*words, 'kl_map').returncode == 0
    folder = tmp_path / 'evidence_digits'
    assert {path.name for path in folder.iterdir()} == {'config.json', 'metrics.json',
                                                        'kl_map.pdf', 'kl_map.csv'}
    before, first = stamps(folder), json.loads((folder / 'metrics.json').read_text())
    assert run_here(*words, 'gan_gradients').returncode == 0
    after, both = stamps(folder), json.loads((folder / 'metrics.json').read_text())
    assert set(after) - set(before) == {'gan_gradients.pdf', 'gan_gradients.csv'}
    assert all(after[name] == before[name] for name in ('kl_map.pdf', 'kl_map.csv'))
    assert first.items() < both.items() and all(
        key.startswith('gan_gradients_') for key in both.keys() - first.keys())


def test_a_trained_run_is_used_and_named_by_the_sha256_of_its_metrics(tmp_path, run_here):
    done = run_here('a3_vae.py', '--dataset', 'digits', '--zdim', 10, '--hidden_dim', 16,
                    '--n_layers', 1, '--epochs', 1, '--iw_samples', 1, '--run', 'vae_z10_digits',
                    '--results_dir', tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_here('a3_evidence.py', '--dataset', 'digits', '--only', 'traversals',
                    '--results_dir', tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / 'evidence_digits' / 'config.json').read_text())
    content = (tmp_path / 'vae_z10_digits' / 'metrics.json').read_bytes()
    assert config['runs'] == {'vae_z10_digits': hashlib.sha256(content).hexdigest()}
    kl = columns(tmp_path / 'evidence_digits' / 'traversals.csv')['kl_nats'].sum()
    assert kl == pytest.approx(json.loads(content)['test_kl_nats'], rel=0.01)


@pytest.mark.parametrize('name', [name for name in FIGURES if FIGURES[name][1]])
def test_a_missing_run_is_one_line_with_the_command_that_makes_it(tmp_path, run_here, name,
                                                                  monkeypatch):
    monkeypatch.setattr(a3_evidence, 'mnist', None)  # no work before
    done = run_here('a3_evidence.py', '--results_dir', tmp_path / 'none', '--only', 'kl_map', name)
    run = FIGURES[name][1][0]
    assert_one_line(done, f'none/{run} is missing.*make it with: python code/a3_.*')
    assert not any(tmp_path.iterdir())


def test_the_commands_of_missing_runs_are_those_of_their_scripts(tmp_path):
    args = a3_evidence.parse_args(['--results_dir', str(tmp_path)])
    for run in {run for _, needed in FIGURES.values() for run in needed}:
        with pytest.raises(a3_evidence.runs.RunError) as error:
            a3_evidence.load(run, args)
        script, *words = shlex.split(str(error.value).split('python code/')[1])
        module = {'a3_vae.py': a3_vae, 'a3_ae.py': a3_ae}[script]
        made = module.parse_args(words)
        kind = 'vae' if module is a3_vae else made.model
        assert run == f'{kind}_z{made.zdim}'


def test_an_unknown_figure_is_one_line_that_lists_those_there_are(run_here):
    done = run_here('a3_evidence.py', '--only', 'no_such')
    assert_one_line(done, "--only: invalid choice: 'no_such'.*monte_carlo")
    assert all(name in run_here('a3_evidence.py', '--help').stdout for name in FIGURES)
