"""`a3_compare.py`: nearest images, near copies, and the whole path on tiny trained runs."""

import hashlib
import importlib
import json
import shutil
import statistics
import time
from functools import partial
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

import a3_compare
import a3_gan
import a3_nf
import a3_vae
import experiments
import measures
import runs
from conftest import FEWER_DIGITS
from datasets import digits
from datasets.bmnist import bmnist
from datasets.mnist import mnist
from experiments import Job
from files import read_csv
from helpers import assert_one_line, stamps

FILES = ['config.json', 'measures.csv', 'metrics.json']
N = 100  # samples of each tiny run
TINY_VAE = 'a3_vae.py --zdim 3 --hidden_dim 16 --n_layers 1 --epochs 1 --iw_samples 2'
JOBS = [Job('one', TINY_VAE, 1), Job('one_seed43', f'{TINY_VAE} --seed 43', 1),
        Job('grey', f'{TINY_VAE} --likelihood logistic', 1),
        Job('two', 'a3_gan.py --latent_dim 8 --batch_size 50 --epochs 1', 1),
        Job('three', 'a3_nf.py --n_hidden 4 --n_layers 1 --epochs 1', 1)]
LABELS = {'one': 'VAE', 'grey': 'VAE, grey', 'two': 'GAN', 'three': 'flow'}
TINY = ((experiments, 'MAIN', JOBS), (a3_compare, 'COMPARED', LABELS),
        (a3_compare, 'N_SAMPLES', N), (a3_compare, 'N_DRAWS', 2), (a3_gan, 'N_JUDGED', N),
        (a3_gan, 'EVAL_BATCH', 50))
RUNS = [f'{job.name}_digits' for job in JOBS]
PICTURES = [f'samples_{name}.png' for name in sorted(('real', *LABELS))]


# --- nearest images and near copies --------------------------------------------------------------


def test_nearest_distances_are_those_of_a_search_tree_and_0_for_a_copy(monkeypatch):
    monkeypatch.setattr(a3_compare, 'ROWS', 7)  # the last block is smaller
    torch.manual_seed(1)
    images, others = torch.rand(40, 30), torch.rand(60, 30)
    images[::9] = others[:5]
    found = a3_compare.nearest_distances(images, others)
    expected, _ = cKDTree(others.double().numpy()).query(images.double().numpy())
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=0)
    assert (found == 0).tolist() == [i % 9 == 0 for i in range(40)]


def test_near_copies_are_nearer_to_training_images_than_test_images_are():
    torch.manual_seed(3)
    real = {name: torch.rand(size, 20).square() for name, size in
            (('train', 3000), ('val', 1000), ('test', 2000), ('new', 2000))}
    floor, threshold = a3_compare.copy_measures(real['test'], real['train'], real['val'])

    def measured(images: torch.Tensor) -> dict[str, float]:
        return a3_compare.copy_measures(images, real['train'], real['val'], threshold)[0]
    assert floor == measured(real['test'])
    assert floor['near_copy_share'] == pytest.approx(a3_compare.NEAR_COPY, abs=1e-3)
    to_train, _ = cKDTree(real['train'].numpy()).query(real['test'].numpy())
    assert floor['nearest_train_median'] == pytest.approx(sorted(to_train)[999], rel=1e-5)
    assert measured(real['new'])['near_copy_share'] < 0.025
    assert measured(real['train'][:500]) == {'nearest_train_median': 0, 'near_copy_share': 1}
    assert measured(real['val'][:500])['near_copy_share'] == 0
    blurred = measured(0.3 * real['new'] + 0.7 * real['train'].mean(0))  # near to everything
    assert blurred['nearest_train_median'] < 0.9 * floor['nearest_train_median']
    assert blurred['near_copy_share'] < 0.025


# --- samples -------------------------------------------------------------------------------------


def test_samples_have_8_bits_and_the_speed_is_that_of_the_median_block(monkeypatch):
    ticks = iter([0, 1] * 4 + [0, 100] + [0, 2] * 5)
    monkeypatch.setattr(time, 'perf_counter', lambda: next(ticks))
    monkeypatch.setattr(a3_compare, 'sample', lambda _, n: torch.rand(n, 784))
    images, rate = a3_compare.draw(None, 200)
    assert images.shape == (200, 784) and rate == 10  # blocks of 20 take 1, 2 or 100
    levels = 255 * images
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert len(levels.round().unique()) == 256


def test_each_kind_of_model_is_sampled_as_its_script_says():
    torch.manual_seed(6)
    vae, generator = a3_vae.VAE(16, 3, 1).eval(), a3_gan.Generator(8).eval()
    flow = a3_nf.Model([784], a3_nf.AutoregressiveFlow(4, 1))  # at first uniform
    drawn, expected = [], []
    for results, vae_sample, gan_sample in (
            (drawn, partial(a3_compare.sample, vae), partial(a3_compare.sample, generator)),
            (expected, lambda n: vae.sample(n)[1],
             lambda n: a3_gan.sample(generator, torch.randn(n, 8)))):
        torch.manual_seed(7)
        results += [vae_sample(6), gan_sample(6).detach()]
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
    images = a3_compare.sample(flow, 50)
    assert images.unique().numel() == 256 and (images.min(), images.max()) == (0, 1)


@pytest.mark.parametrize('likelihood', ['bernoulli', 'logistic'])
def test_the_vae_decodes_what_it_was_trained_on(likelihood):
    torch.manual_seed(9)
    model = a3_vae.VAE(16, 3, 1, likelihood=likelihood)
    grey = torch.randint(0, 256, (5, 784)).float()
    bits = (grey > 128).float()
    with torch.no_grad():
        errors = a3_compare.decoding_errors(model, grey, bits)
        x = bits if likelihood == 'bernoulli' else grey / 255
        expected = model.decoder(model.encoder(x)[0]) - x
    torch.testing.assert_close(errors, expected, rtol=0, atol=0)


def test_the_flow_decodes_exactly():
    torch.manual_seed(10)
    model = a3_nf.Model([784], a3_nf.AutoregressiveFlow(4, 1))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        errors = a3_compare.decoding_errors(
            model, torch.randint(0, 256, (300, 784)).float(), None)
    assert errors.shape == (300, 784) and 0 < errors.abs().max() < 1e-9


# --- the whole path ------------------------------------------------------------------------------


def test_missing_runs_are_one_line_with_the_commands_that_make_them(tmp_path, run_here):
    done = run_here('a3_compare.py', '--dataset', 'digits', '--results_dir', tmp_path / 'none')
    assert_one_line(done, 'missing, unfinished or without weights: vae_z20_digits, .*, '
                    'nf_mlp_digits; make them with: python code/a3_vae.py')
    commands = done.stderr.strip().split('make them with: ')[1].split(' && ')
    assert len(commands) == len(experiments.NEEDED['compare']) and commands[2] == (
        'python code/a3_vae.py --zdim 20 --seed 44 --run vae_z20_seed44_digits '
        f'--dataset digits --results_dir {tmp_path / "none"}')
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> tuple[Path, dict[str, tuple[int, int]]]:
    """The folder of a comparison of tiny trained runs, and what the runs' folders held before."""
    results = tmp_path_factory.mktemp('results')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'SIZES', FEWER_DIGITS)
        for where, name, value in TINY:
            patch.setattr(where, name, value)
        for job in JOBS:
            module = importlib.import_module(job.script)
            module.main(module.parse_args([*job.words, '--dataset', 'digits', '--run',
                                           f'{job.name}_digits', '--results_dir', str(results)]))
        before = {name: stamps(results / name) for name in (*RUNS, 'classifier_digits')}
        a3_compare.main(a3_compare.parse_args(['--dataset', 'digits', '--results_dir',
                                               str(results)]))
    return results / 'compare_digits', before


@pytest.fixture
def compare(run_here, monkeypatch):
    """`a3_compare.py` on the tiny runs of a results folder."""
    for where, name, value in TINY:
        monkeypatch.setattr(where, name, value)
    return lambda results, *words: run_here('a3_compare.py', '--dataset', 'digits',
                                            '--results_dir', results, *words)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the results folder, to be changed."""
    return Path(shutil.copytree(finished[0].parent, tmp_path / 'results'))


def rows_of(results: Path) -> dict[str, dict[str, str]]:
    """The rows of the comparison by run, but for the speed, which no seed decides."""
    return {row['run']: {key: value for key, value in row.items() if key != 'images_per_second'}
            for row in read_csv(results / 'compare_digits' / 'measures.csv')}


def test_a_comparison_leaves_its_files_and_the_runs_as_they_were(finished):
    folder, before = finished
    assert sorted(path.name for path in folder.iterdir()) == FILES + PICTURES
    assert {path.name for path in folder.parent.iterdir()} == {*before, folder.name}
    assert {name: stamps(folder.parent / name) for name in before} == before
    config = json.loads((folder / 'config.json').read_text())
    assert {'digits.npz', 'bits_test'} <= set(config['data']['sha256'])
    assert config['runs'] == {
        name: hashlib.sha256((folder.parent / name / 'metrics.json').read_bytes()).hexdigest()
        for name in RUNS}


def test_every_run_has_a_row_with_every_measure_that_it_can_have(finished):
    folder, _ = finished
    rows = rows_of(folder.parent)
    assert list(rows) == ['floor', 'floor_train', 'floor_bits', *RUNS]
    draws, codes = {'frechet_draws'}, {'reconstruction_rms'}
    real = {'test_nll_nats', 'test_bpd', 'parameters', 'train_minutes'} | draws | codes
    copies = {'nearest_train_median', 'near_copy_share'}
    absent = {'floor': real, 'one_digits': {'test_bpd'},
              'floor_train': real | copies, 'floor_bits': real | copies,
              'one_seed43_digits': {'test_bpd'}, 'grey_digits': {'test_nll_nats'},
              'two_digits': {'test_nll_nats', 'test_bpd'} | draws | codes,
              'three_digits': {'test_nll_nats'} | draws}
    assert {name: {key for key in row if row[key] == ''} for name, row in rows.items()} == absent
    for name in RUNS:
        metrics = json.loads((folder.parent / name / 'metrics.json').read_text())
        row = {key: float(value) for key, value in rows[name].items() if key != 'run' and value}
        assert row['parameters'] == metrics['parameters']
        assert row['train_minutes'] == metrics['train_minutes']
        assert row.get('test_bpd') == metrics.get('test_neg_elbo_bpd', metrics.get('test_bpd'))
        assert row.get('test_nll_nats', 0) == (metrics['test_nll_nats'] if 'one' in name else 0)


def test_the_floor_and_a_run_are_measured_as_by_hand(finished, monkeypatch):
    monkeypatch.setattr(digits, 'SIZES', FEWER_DIGITS)
    folder, _ = finished
    train, val, test = mnist(dataset='digits')
    rows = rows_of(folder.parent)
    classifier = measures.load_classifier(folder.parent, train, val)
    judge = measures.Judge(classifier, test.images / 255, test.labels)
    flow = runs.load_trained(folder.with_name('three_digits'), 'a3_nf', 'model', a3_nf.make_model)
    runs.seed_all(42, 'compared three_digits')
    with torch.no_grad():
        draws = [torch.cat([flow.sample(10).floor() / 255 for _ in range(10)]) for _ in range(2)]
    for name, those in (('floor', [val.images / 255]), ('three_digits', draws),
                        ('floor_train', [train.images[::len(train.images) // N] / 255]),
                        ('floor_bits', [bmnist(dataset='digits')[1].images.float()])):
        judged = [judge.measure(images) for images in those]
        for measure in judged[0]:
            assert float(rows[name][measure]) == pytest.approx(
                sum(row[measure] for row in judged) / len(judged), rel=1e-5, abs=1e-9)
    for name, those in (('floor', test.images / 255), ('three_digits', draws[0])):
        to_train, _ = cKDTree(train.images.numpy() / 255).query(those.numpy())
        assert float(rows[name]['nearest_train_median']) == pytest.approx(
            sorted(to_train)[N // 2 - 1], rel=1e-5)
    assert float(rows['floor']['near_copy_share']) == pytest.approx(0.01)
    vae = runs.load_trained(folder.with_name('one_digits'), 'a3_vae', 'model', a3_vae.make_model)
    with torch.no_grad():
        bits = bmnist(dataset='digits')[2].images[::10].float()
        errors = vae.decoder(vae.encoder(bits)[0]) - bits
    assert float(rows['one_digits']['reconstruction_rms']) == pytest.approx(
        float(errors.square().mean().sqrt()), rel=1e-5)
    draws, means = (judge.glance(images)['frechet'] for images in vae.sample(N))
    assert float(rows['one_digits']['frechet_draws']) == pytest.approx(draws, rel=0.05)
    assert abs(draws / means - 1) > 0.1


def test_metrics_are_means_and_spreads_of_the_rows(finished):
    folder, _ = finished
    metrics = json.loads((folder / 'metrics.json').read_text())
    rows = rows_of(folder.parent)
    values = [float(rows[name]['frechet']) for name in RUNS[:2]]
    assert metrics['one_frechet'] == pytest.approx(sum(values) / 2, rel=1e-5)
    assert metrics['one_frechet_spread'] == pytest.approx(statistics.stdev(values), rel=1e-3)
    assert metrics['one_train_minutes'] == float(rows['one_digits']['train_minutes'])
    assert metrics['floor_recall'] == float(rows['floor']['recall'])
    assert metrics['three_test_bpd'] == float(rows['three_digits']['test_bpd'])
    assert metrics['samples'] == N and 0 < metrics['near_copy_ratio'] < 1
    assert not {'two_reconstruction_rms', 'grey_frechet_spread'} & set(metrics)


def shown(results: Path) -> dict[str, np.ndarray]:
    """The samples that are shown, (2, 25, 28, 28) from 0 to 255, by the name of the model."""
    pictures = {}
    for name in ('real', *LABELS):
        picture = matplotlib.image.imread(results / 'compare_digits' / f'samples_{name}.png')
        rows = np.pad((255 * picture[::2, ::2, 0]).round(), (0, 1)).reshape(2, 29, 25, 29)
        pictures[name] = rows.swapaxes(1, 2)[:, :, :28, :28]
    return pictures


def test_the_samples_shown_are_pixel_for_pixel_what_was_drawn(finished, monkeypatch):
    monkeypatch.setattr(digits, 'SIZES', FEWER_DIGITS)
    folder, _ = finished
    pictures = shown(folder.parent)
    *_, test = mnist(dataset='digits')
    assert (pictures['real'].reshape(50, 784) == test.images[:50].numpy()).all()
    for name, script in (('one', 'a3_vae'), ('three', 'a3_nf')):
        _, part, make = a3_compare.NETWORKS[script]
        network = runs.load_trained(folder.with_name(f'{name}_digits'), script, part, make)
        runs.seed_all(42, f'compared {name}_digits')
        with torch.no_grad():
            first = (255 * a3_compare.sample(network, 10)[0]).round().view(28, 28).numpy()
        assert (pictures[name][0, 0] == first).all()


def test_only_measures_one_model_again_and_keeps_the_others(copied, compare):
    rows, pictures = rows_of(copied), shown(copied)
    before = json.loads((copied / 'compare_digits' / 'metrics.json').read_text())
    assert compare(copied, '--only', 'three', '--seed', 1).returncode == 0
    after = json.loads((copied / 'compare_digits' / 'metrics.json').read_text())
    changed = {key for key in before if after[key] != before[key]}
    assert list(after) == list(before) and 'three_frechet' in changed
    assert changed <= {'seed', *(key for key in before if key.startswith('three_'))}
    assert [run for run in rows if rows_of(copied)[run] != rows[run]] == ['three_digits']
    assert [name for name, images in shown(copied).items() if (images != pictures[name]).any()
            ] == ['three']
    config = json.loads((copied / 'compare_digits' / 'config.json').read_text())
    assert list(config['runs']) == RUNS and config['arguments']['only'] is None


@pytest.mark.parametrize('spoil, reason', [
    (lambda folder: (folder / 'measures.csv').unlink(), 'no comparison to add to'),
    (lambda folder: (folder / 'metrics.json').write_text('{"classifier_sha256": "0"}'),
     'judged by another classifier'),
    (lambda folder: (folder / 'samples_two.png').unlink(), 'no comparison to add to'),
    (lambda folder: (folder / 'measures.csv').write_text((folder / 'measures.csv').read_text(
        ).replace('frechet_draws', 'frechet_means')), 'other columns')])
def test_only_has_nothing_to_add_to_in_another_comparison(copied, compare, spoil, reason):
    spoil(copied / 'compare_digits')
    before = stamps(copied / 'compare_digits')
    assert_one_line(compare(copied, '--only', 'three'), reason)
    assert stamps(copied / 'compare_digits') == before


@pytest.mark.parametrize('name, content, reason', [
    ('metrics.json', None, 'weights: three_digits; make it with: python code/a3_nf.py .* '
     '--run three_digits --dataset digits --results_dir '),
    ('checkpoint.pt', b'PK', r'three_digits/checkpoint\.pt is damaged or of another model'),
    ('config.json', b'{}', r'three_digits/config\.json is not the config of a3_nf\.py')])
def test_a_missing_or_damaged_run_is_one_line_and_nothing_is_written(copied, compare, name,
                                                                      content, reason):
    path = copied / 'three_digits' / name
    path.unlink() if content is None else path.write_bytes(content)
    before = stamps(copied / 'compare_digits')
    assert_one_line(compare(copied), reason)
    assert stamps(copied / 'compare_digits') == before


def test_a_dry_run_compares_untrained_networks_whatever_the_data_folder_is_called(
        tmp_path, run_here, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    done = run_here('a3_compare.py', '--dry_run', '--data_dir', 'a path with spaces')
    assert done.returncode == 0 and 'WARNING: no MNIST in a path with spaces' in done.stderr
    [folder] = tmp_path.glob('a3_*/compare_digits')
    assert done.stdout.splitlines()[-1] == f'files in {folder}: ' + ', '.join(
        FILES + [f'samples_{name}.png' for name in sorted(('real', *experiments.COMPARED))])
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert {'vae_z20_frechet_spread', 'nf_mlp_frechet', 'floor_coverage'} <= set(metrics)
