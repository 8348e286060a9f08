"""`a3_nf.py` as a user starts it: what it leaves, what it survives, what it says."""

import json
import re

import matplotlib.image
import pytest
import torch

import a3_nf
from helpers import TIMES, assert_one_line, read_csv, stamps, stop_twice

TINY = ('--dataset', 'digits', '--n_hidden', 8, '--batch_size', 50, '--seed', 7)
FOUR = (*TINY, '--epochs', 4, '--run', 'four')
FIXED_METRICS = {'val_bpd', 'test_bpd', 'test_bpd_iw', 'sample_seconds_per_100',
                 'roundtrip_max_error', 'seed', 'epochs', 'parameters', 'train_minutes',
                 'peak_memory_mb'}


def expected_files(epochs: list[int]) -> set[str]:
    return {'config.json', 'log.csv', 'checkpoint.pt', 'metrics.json', 'bpd.pdf', 'bpd.csv',
            'interpolations.png', *(f'{kind}_epoch{epoch:02d}.png' for epoch in epochs
                                    for kind in ('samples', 'cool'))}


@pytest.fixture(scope='module')
def read_run(read_run):
    """The same, but for one more time."""
    def read(folder):
        left = read_run(folder)
        left['metrics.json'].pop('sample_seconds_per_100')
        return left
    return read


# --- one run, and what became of it --------------------------------------------------------------


@pytest.fixture(scope='module')
def finished(tmp_path_factory, run_script, read_run):
    """The folder of a finished run, what was in it when the run ended, and what was said."""
    results = tmp_path_factory.mktemp('finished')
    done = run_script('a3_nf.py', *FOUR, '--results_dir', results, fewer_digits=True)
    assert (done.returncode, done.stderr) == (0, '')
    return results / 'four', read_run(results / 'four'), done.stdout


@pytest.fixture
def metrics(finished) -> dict:
    return json.loads((finished[0] / 'metrics.json').read_text())


def test_a_run_leaves_these_files_lists_them_and_nothing_else(finished):
    folder, left, stdout = finished
    assert set(left) == expected_files([0, 1, 2, 3, 4])
    assert all(name in stdout.splitlines()[-1] for name in left)
    assert [path.name for path in folder.parent.iterdir()] == ['four']


def test_the_log_has_a_row_for_each_epoch_from_the_untrained_network_on(finished):
    rows = read_csv(finished[0] / 'log.csv')
    assert list(rows[0]) == ['epoch', 'train_bpd', 'val_bpd', 'running_bpd', *TIMES]
    assert [row['epoch'] for row in rows] == ['0', '1', '2', '3', '4']
    assert [name for row in rows for name in row if row[name] == ''] == ['running_bpd']
    for name in ('train_bpd', 'val_bpd'):
        assert float(rows[0][name]) == pytest.approx(8, abs=0.05)  # in bfloat16 not quite
        assert float(rows[-1][name]) < 5


def test_metrics_have_the_fixed_names_and_agree(finished, metrics):
    assert set(metrics) >= FIXED_METRICS
    assert metrics['seed'] == 7 and metrics['epochs'] == 4
    last = read_csv(finished[0] / 'log.csv')[-1]
    assert metrics['val_bpd'] == pytest.approx(float(last['val_bpd']), rel=0.01)
    assert metrics['test_bpd'] == pytest.approx(metrics['val_bpd'], rel=0.1)
    assert metrics['test_bpd_iw'] == pytest.approx(metrics['test_bpd'], rel=1e-5)
    assert 0 < metrics['roundtrip_max_error'] < 1e-6
    state = torch.load(finished[0] / 'checkpoint.pt', weights_only=True)['parts']['optimizer']
    assert metrics['parameters'] == sum(
        moments['exp_avg'].numel() for moments in state['state'].values())


def test_the_config_says_what_was_run_on_what(finished):
    config = json.loads((finished[0] / 'config.json').read_text())
    assert config['arguments']['n_hidden'] == 8 and config['arguments']['seed'] == 7
    assert config['arguments']['lr'] > 0 and config['arguments']['precision'] in ('bf16', 'fp32')
    assert config['data']['dataset'] == 'digits' and config['data']['sha256']
    assert config['versions']['torch'] == torch.__version__ and config['device']


def test_the_curve_is_that_of_the_log(finished):
    log, curve = (read_csv(finished[0] / name) for name in ('log.csv', 'bpd.csv'))
    assert [(row['epoch'], row['training'], row['validation']) for row in curve] == [
        (row['epoch'], row['train_bpd'], row['val_bpd']) for row in log]


def test_snapshots_are_25_images_that_differ_by_epoch_and_temperature(finished):
    images = [matplotlib.image.imread(finished[0] / f'{kind}_epoch{epoch:02d}.png')
              for epoch in range(5) for kind in ('samples', 'cool')]
    assert {image.shape[:2] for image in images} == {((5 * 29 - 1) * 3, (5 * 29 - 1) * 3)}
    assert all((a != b).any() for i, a in enumerate(images) for b in images[:i])


def test_interpolations_are_nine_images_for_each_two_classes(finished):
    image = matplotlib.image.imread(finished[0] / 'interpolations.png')
    assert image.shape[:2] == ((5 * 29 - 1) * 3, (9 * 29 - 1) * 3)


def test_a_finished_run_starts_anew_and_ends_the_same(finished, run_here, read_run):
    folder, left, _ = finished
    (folder / 'samples_epoch99.png').write_bytes(b'of an earlier run')
    before = (folder / 'checkpoint.pt').stat().st_mtime_ns
    done = run_here('a3_nf.py', *FOUR, '--results_dir', folder.parent)
    assert done.returncode == 0 and (folder / 'checkpoint.pt').stat().st_mtime_ns > before
    assert read_run(folder) == left


def test_a_run_killed_and_interrupted_and_resumed_ends_as_one_never_stopped(
        finished, tmp_path, start_script, run_script, read_run):
    folder = tmp_path / 'four'
    words = stop_twice(start_script, folder, 'a3_nf.py', *FOUR, '--results_dir', tmp_path)
    done = run_script(*words, fewer_digits=True)
    assert done.returncode == 0 and 'going on after epoch' in done.stdout
    assert read_run(folder) == finished[1]


def test_resuming_a_finished_run_says_so_and_changes_nothing(copied, run_here):
    before = stamps(copied)
    done = run_here('a3_nf.py', *FOUR, '--results_dir', copied.parent, '--resume')
    assert done.returncode == 0 and 'finished' in done.stdout
    assert stamps(copied) == before


@pytest.mark.parametrize('unfinished', [False, True])
def test_resuming_with_another_argument_is_refused(copied, run_here, unfinished):
    if unfinished:
        (copied / 'metrics.json').unlink()
    before = stamps(copied)
    done = run_here('a3_nf.py', *FOUR, '--results_dir', copied.parent, '--resume', '--lr', 0.123)
    assert_one_line(done, r'is another run: lr was .*, is now 0\.123')
    assert stamps(copied) == before


def test_sample_writes_a_grid_and_changes_nothing_else(copied, run_here):
    before = stamps(copied)
    done = run_here('a3_nf.py', *FOUR, '--results_dir', copied.parent, '--sample', 3)
    assert (done.returncode, done.stderr) == (0, '') and 'sample.png' in done.stdout
    after = stamps(copied)
    assert set(after) - set(before) == {'sample.png'}
    assert {name: after[name] for name in before} == before
    assert matplotlib.image.imread(copied / 'sample.png').shape[:2] == (57 * 3, 57 * 3)


@pytest.mark.parametrize('words, reason', [
    (('--arch', 'mlp'), 'arch was multiscale, is now mlp'),
    (('--n_hidden', 9), 'n_hidden was 8, is now 9'),
    (('--max_ranks', 8), 'max_ranks was 16, is now 8'),
    (('--n_embedding', 4), 'n_embedding was 8, is now 4')])
def test_sampling_with_another_flow_is_refused(copied, run_here, words, reason):
    before = stamps(copied)
    done = run_here('a3_nf.py', *FOUR, '--results_dir', copied.parent, *words, '--sample', 3)
    assert_one_line(done, reason)
    assert stamps(copied) == before


# --- other runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize('words, name', [
    ((), 'nf_digits'), (('--arch', 'multiscale', '--epochs', 40, '--seed', 42), 'nf_digits'),
    (('--arch', 'mlp'), 'nf_mlp_digits'), (('--seed', 43), 'nf_seed43_digits'),
    (('--max_ranks', 8), 'nf_maxranks8_digits'),
    (('--arch', 'mlp', '--n_hidden', 8), 'nf_mlp_nhidden8_digits')])
def test_the_name_of_a_run_says_what_is_not_default(tmp_path, run_here, words, name):
    done = run_here('a3_nf.py', '--dataset', 'digits', '--results_dir', tmp_path, '--sample', 3,
                    *words)
    assert_one_line(done, f'/{name}/checkpoint.pt does not exist: train this run first')
    assert not any(tmp_path.iterdir())


def test_the_template_flow_runs_to_the_end_in_bfloat16(tmp_path, run_here):
    done = run_here('a3_nf.py', *TINY, '--arch', 'mlp', '--epochs', 1, '--precision', 'bf16',
                    '--results_dir', tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    [folder] = tmp_path.iterdir()
    assert re.fullmatch('nf_mlp_epochs1_.*seed7_.*digits', folder.name)
    assert {path.name for path in folder.iterdir()} == expected_files([0, 1])
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert metrics['test_bpd_iw'] < metrics['test_bpd'] - 1e-3  # the density varies in a cell


def test_curves_are_of_fixed_noise_and_a_fixed_part_and_training_is_not(tmp_path, run_here):
    done = run_here('a3_nf.py', *TINY, '--arch', 'mlp', '--epochs', 2, '--lr', 0, '--precision',
                    'fp32', '--results_dir', tmp_path, '--run', 'still')
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / 'still' / 'log.csv')
    assert {name: len({row[name] for row in rows}) for name in rows[0] if name not in TIMES} == {
        'epoch': 3, 'train_bpd': 1, 'val_bpd': 1, 'running_bpd': 3}
    metrics = json.loads((tmp_path / 'still' / 'metrics.json').read_text())
    assert metrics['val_bpd'] == float(rows[0]['val_bpd'])


def test_images_are_moved_but_for_the_last_fifth_of_the_epochs(tmp_path, run_here, monkeypatch):
    shifts, moved = [], a3_nf.moved
    monkeypatch.setattr(a3_nf, 'moved', lambda data, max_shift: shifts.append(max_shift)
                        or moved(data, max_shift))
    done = run_here('a3_nf.py', *TINY, '--arch', 'mlp', '--epochs', 5, '--max_shift', 2,
                    '--results_dir', tmp_path)
    assert done.returncode == 0, done.stderr
    assert shifts == [2, 2, 2, 2, 0]


@pytest.mark.filterwarnings('error')  # which would be lines on stderr
@pytest.mark.parametrize('arch, lr', [('multiscale', 1e38), ('mlp', 1e20)])
def test_divergence_ends_with_status_1_and_one_line_and_the_last_checkpoint(
        tmp_path, run_here, arch, lr):
    done = run_here('a3_nf.py', *TINY, '--arch', arch, '--epochs', 2, '--lr', lr,
                    '--results_dir', tmp_path, '--run', 'two')
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert re.search(r'is (nan|inf) after epoch 1; .*checkpoint.pt is of epoch 0', done.stderr)
    saved = torch.load(tmp_path / 'two' / 'checkpoint.pt', weights_only=True)
    assert [row['epoch'] for row in saved['rows']] == [0]
    assert all(weight.isfinite().all() for weight in saved['parts']['model'].values())
    assert not (tmp_path / 'two' / 'metrics.json').exists()


# --- the flags -----------------------------------------------------------------------------------


@pytest.mark.parametrize('flag, value', [('--arch', 'glow'), ('--max_shift', 3),
                                         ('--precision', 'fp16'), ('--batch_size', 0),
                                         ('--max_ranks', 0), ('--lr', -1)])
def test_a_bad_value_is_one_line_that_names_its_flag(run_here, flag, value):
    assert_one_line(run_here('a3_nf.py', flag, value), f'{flag}.*{value}')


@pytest.mark.parametrize('arch, flag', [('mlp', '--n_layers'), ('mlp', '--n_embedding'),
                                        ('mlp', '--max_ranks'), ('multiscale', '--n_flows')])
def test_a_flag_of_the_other_flow_is_one_line(run_here, arch, flag):
    assert_one_line(run_here('a3_nf.py', '--arch', arch, flag, 5),
                    f'{flag} has no meaning with --arch {arch}')


def test_the_template_has_its_flags_and_defaults():
    args = a3_nf.parse_args([])
    assert (args.epochs, args.seed, args.arch) == (40, 42, 'multiscale')
    assert a3_nf.parse_args(['--epochs', '3']).epochs == 3
