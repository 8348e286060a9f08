"""`a3_vae.py` as a user starts it: what it leaves, what it survives, what it says."""

import json
import math
import re

import matplotlib.image
import numpy as np
import pytest
import torch

import a3_vae
import runs
from datasets import digits
from conftest import FEWER_DIGITS
from helpers import TIMES, assert_one_line, read_csv, stamps, stop_twice

TINY = ('--dataset', 'digits', '--hidden_dim', 16, '--n_layers', 1, '--batch_size', 50,
        '--iw_samples', 2, '--seed', 7)
TWO = (*TINY, '--zdim', 2, '--epochs', 4, '--run', 'two')
GREY = (*TINY, '--likelihood', 'gaussian', '--zdim', 2, '--epochs', 4)
FIXED_METRICS = {'val_neg_elbo_nats', 'test_neg_elbo_nats', 'test_nll_nats', 'seed', 'epochs',
                 'parameters', 'train_minutes', 'peak_memory_mb'}


def expected_files(epochs: list[int], zdim: int) -> set[str]:
    each = ['samples_epoch{:02d}_draws.png', 'samples_epoch{:02d}_means.png']
    manifolds = [f'manifold_epoch{epoch:02d}.png' for epoch in epochs[::2] if zdim == 2]
    return {'config.json', 'log.csv', 'checkpoint.pt', 'metrics.json', 'elbo.pdf', 'elbo.csv',
            'reconstructions.png', *manifolds,
            *(name.format(epoch) for name in each for epoch in epochs)}


# --- one run, and what became of it --------------------------------------------------------------


@pytest.fixture(scope='module')
def finished(tmp_path_factory, run_script, read_run):
    """The folder of a finished run, and what was in it when the run ended."""
    results = tmp_path_factory.mktemp('finished')
    done = run_script('a3_vae.py', *TWO, '--results_dir', results, fewer_digits=True)
    assert done.returncode == 0, done.stderr
    return results / 'two', read_run(results / 'two'), done.stdout


def test_a_run_leaves_these_files_lists_them_and_nothing_else(finished):
    folder, left, stdout = finished
    assert set(left) == expected_files([0, 1, 2, 3, 4], zdim=2)
    assert all(name in stdout.splitlines()[-1] for name in left)
    assert [path.name for path in folder.parent.iterdir()] == ['two']


def test_the_log_has_a_row_for_each_epoch_from_the_untrained_network_on(finished):
    rows = read_csv(finished[0] / 'log.csv')
    assert list(rows[0]) == ['epoch', 'train_neg_elbo_nats', 'val_neg_elbo_nats',
                             'running_neg_elbo_nats', *TIMES]
    assert [row['epoch'] for row in rows] == ['0', '1', '2', '3', '4']
    assert [name for row in rows for name in row if row[name] == ''] == ['running_neg_elbo_nats']
    for name in ('train_neg_elbo_nats', 'val_neg_elbo_nats'):
        assert abs(float(rows[0][name]) - 784 * math.log(2)) < 40
        assert float(rows[-1][name]) < float(rows[0][name]) - 40


def test_metrics_have_the_fixed_names_and_agree(finished):
    metrics = json.loads((finished[0] / 'metrics.json').read_text())
    assert set(metrics) >= FIXED_METRICS and not [name for name in metrics if 'bpd' in name]
    assert metrics['seed'] == 7 and metrics['epochs'] == 4
    assert metrics['test_neg_elbo_nats'] == pytest.approx(
        metrics['test_reconstruction_nats'] + metrics['test_kl_nats'], rel=1e-5)
    state = torch.load(finished[0] / 'checkpoint.pt', weights_only=True)['parts']['model']
    assert metrics['parameters'] == sum(weight.numel() for weight in state.values())
    last = read_csv(finished[0] / 'log.csv')[-1]
    assert metrics['val_neg_elbo_nats'] == pytest.approx(float(last['val_neg_elbo_nats']), rel=.02)


def test_the_config_says_what_was_run_on_what(finished):
    config = json.loads((finished[0] / 'config.json').read_text())
    assert config['arguments']['zdim'] == 2 and config['arguments']['seed'] == 7
    assert config['data']['dataset'] == 'digits' and len(config['data']['sha256']) == 4
    assert config['versions']['torch'] == torch.__version__ and config['device']


def test_the_curve_is_that_of_the_log(finished):
    log = read_csv(finished[0] / 'log.csv')
    curve = read_csv(finished[0] / 'elbo.csv')
    for name, column in (('training', 'train_neg_elbo_nats'), ('validation', 'val_neg_elbo_nats')):
        assert [float(row[name]) for row in curve] == [-float(row[column]) for row in log]


def test_a_finished_run_starts_anew_and_ends_the_same(finished, run_script, read_run):
    folder, left, _ = finished
    (folder / 'samples_epoch99_draws.png').write_bytes(b'of an earlier run')
    before = (folder / 'checkpoint.pt').stat().st_mtime_ns
    done = run_script('a3_vae.py', *TWO, '--results_dir', folder.parent, fewer_digits=True)
    assert done.returncode == 0 and (folder / 'checkpoint.pt').stat().st_mtime_ns > before
    assert read_run(folder) == left


def test_a_run_killed_and_interrupted_and_resumed_ends_as_one_never_stopped(
        finished, tmp_path, start_script, run_script, read_run):
    folder = tmp_path / 'two'
    words = stop_twice(start_script, folder, 'a3_vae.py', *TWO, '--results_dir', tmp_path)
    done = run_script(*words, fewer_digits=True)
    assert done.returncode == 0 and 'going on after epoch' in done.stdout
    assert read_run(folder) == finished[1]


def test_resuming_a_finished_run_says_so_and_changes_nothing(copied, run_here):
    before = stamps(copied)
    done = run_here('a3_vae.py', *TWO, '--results_dir', copied.parent, '--resume')
    assert done.returncode == 0 and 'finished' in done.stdout
    assert stamps(copied) == before


def test_resuming_with_another_argument_is_refused(copied, run_here):
    before = stamps(copied)
    done = run_here('a3_vae.py', *TWO, '--results_dir', copied.parent, '--resume', '--lr', 0.123)
    assert_one_line(done, r'is another run: lr was .*, is now 0\.123')
    assert stamps(copied) == before


@pytest.mark.parametrize('flag', [('--resume',), ('--sample', 3)])
def test_going_on_with_another_likelihood_is_refused(copied, run_here, flag):
    before = stamps(copied)
    done = run_here('a3_vae.py', *TWO, '--results_dir', copied.parent, *flag,
                    '--likelihood', 'gaussian')
    assert_one_line(done, 'is another run: likelihood was bernoulli, is now gaussian')
    assert stamps(copied) == before


def test_sample_writes_a_grid_and_changes_nothing_else(copied, run_here):
    before = stamps(copied)
    done = run_here('a3_vae.py', *TWO, '--results_dir', copied.parent, '--sample', 3)
    assert done.returncode == 0, done.stderr
    new, after = {'sample_draws.png', 'sample_means.png'}, stamps(copied)
    assert set(after) - set(before) == new and all(name in done.stdout for name in new)
    assert {name: after[name] for name in before} == before


def test_sampling_a_run_that_is_not_there_is_one_line(tmp_path, run_here):
    done = run_here('a3_vae.py', *TINY, '--results_dir', tmp_path / 'none', '--sample', 3)
    assert_one_line(done, 'train this run first')
    assert not (tmp_path / 'none').exists()


def test_sampling_with_other_layers_is_refused_though_the_tensors_would_fit(finished, run_here):
    done = run_here('a3_vae.py', *TWO, '--results_dir', finished[0].parent, '--skip', 'yes',
                    '--sample', 3)
    assert_one_line(done, 'skip was no, is now yes')


def test_divergence_ends_with_status_1_and_one_line(tmp_path, run_script):
    done = run_script('a3_vae.py', *TINY, '--epochs', 1, '--lr', 1e20, '--results_dir', tmp_path,
                      fewer_digits=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert re.search(r'is (nan|inf) after epoch 1; .*checkpoint.pt is of epoch 0', done.stderr)


def test_one_epoch_and_one_dimension_are_enough(tmp_path, run_script):
    done = run_script('a3_vae.py', *TINY, '--epochs', 1, '--zdim', 1, '--results_dir', tmp_path,
                      fewer_digits=True)
    assert done.returncode == 0, done.stderr
    [folder] = tmp_path.iterdir()
    assert re.fullmatch('vae_z1_epochs1_.*seed7_digits', folder.name)
    assert {path.name for path in folder.iterdir()} == expected_files([0, 1], zdim=1)


def test_the_template_has_its_flags_and_defaults():
    args = a3_vae.parse_args([])
    assert (args.epochs, args.zdim, args.seed) == (40, 20, 42)
    args = a3_vae.parse_args(['--epochs', '3', '--zdim', '5'])
    assert (args.epochs, args.zdim) == (3, 5)


# --- grey images ---------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def grey(tmp_path_factory, read_run):
    """The folder of a finished run on grey images, and what was in it when the run ended."""
    results = tmp_path_factory.mktemp('grey')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'SIZES', FEWER_DIGITS)
        a3_vae.main(a3_vae.parse_args([*map(str, GREY), f'--results_dir={results}']))
    [folder] = results.iterdir()
    return folder, read_run(folder)


def test_the_folder_of_a_run_on_grey_images_says_so_and_has_the_same_files(grey):
    folder, left = grey
    assert re.fullmatch('vae_gaussian_z2_epochs4_.*_seed7_digits', folder.name)
    assert not re.search('likelihood|iwsamples', folder.name)
    assert set(left) == expected_files([0, 1, 2, 3, 4], zdim=2)
    assert left['config.json']['data']['description'].count('binarised') == 0


def test_bits_per_dimension_are_those_of_the_nats(grey):
    metrics = json.loads((grey[0] / 'metrics.json').read_text())
    assert set(metrics) >= FIXED_METRICS
    for name in ('neg_elbo', 'nll'):
        assert metrics[f'test_{name}_bpd'] == pytest.approx(
            metrics[f'test_{name}_nats'] / (784 * math.log(2)), rel=1e-5)


def test_grey_pixels_cost_nine_bits_untrained_and_fewer_later(grey):
    rows = read_csv(grey[0] / 'log.csv')
    for name in ('train_neg_elbo_nats', 'val_neg_elbo_nats'):
        bpd = [float(row[name]) / (784 * math.log(2)) for row in rows]
        assert 9.3 < bpd[0] < 9.6  # log2(256 sqrt(2 pi)) = 9.33, and something for the distance
        assert bpd[-1] < bpd[0] - 0.5
    curve = read_csv(grey[0] / 'elbo.csv')
    assert [float(row['training']) for row in curve] == [-float(row['train_neg_elbo_nats'])
                                                         for row in rows]


def test_a_run_on_grey_images_interrupted_and_resumed_ends_as_one_never_stopped(
        grey, tmp_path, monkeypatch, run_here, read_run):
    end_epoch = runs.Run.end_epoch

    def interrupt(run: runs.Run, row: dict) -> None:
        end_epoch(run, row)
        if row['epoch'] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, 'end_epoch', interrupt)
        assert run_here('a3_vae.py', *GREY, '--results_dir', tmp_path).returncode == 130
    torch.manual_seed(99)  # another process has another state
    done = run_here('a3_vae.py', *GREY, '--results_dir', tmp_path, '--resume')
    assert done.returncode == 0 and 'going on after epoch 2' in done.stdout
    assert read_run(tmp_path / grey[0].name) == grey[1]


def test_grey_samples_are_drawn_around_their_means(grey, run_here):
    folder, left = grey
    done = run_here('a3_vae.py', *GREY, '--results_dir', folder.parent, '--sample', 4)
    assert done.returncode == 0, done.stderr
    draws, means = (matplotlib.image.imread(folder / f'sample_{kind}.png')
                    for kind in ('draws', 'means'))
    assert draws.shape == means.shape
    assert len(np.unique(draws)) > 50 and np.abs(draws - means).mean() > 0.01
    assert set(left) < {path.name for path in folder.iterdir()}


def test_a_dry_run_on_grey_images_ends_with_bits(tmp_path, run_here, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    done = run_here('a3_vae.py', '--likelihood', 'gaussian', '--dry_run', '--dataset', 'digits')
    assert done.returncode == 0, done.stderr
    [metrics] = tmp_path.glob('a3_*/vae_gaussian_z20_digits/metrics.json')
    assert 5 < json.loads(metrics.read_text())['test_nll_bpd'] < 10
