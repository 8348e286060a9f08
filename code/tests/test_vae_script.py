"""`a3_vae.py` as a user starts it: what it leaves, what it survives, what it says."""

import csv
import json
import math
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

import a3_vae

TINY = ('--dataset', 'digits', '--hidden_dim', 16, '--n_layers', 1, '--batch_size', 50,
        '--iw_samples', 2, '--seed', 7)
TWO = (*TINY, '--zdim', 2, '--epochs', 4, '--run', 'two')
NO_NETWORK = {name: 'http://127.0.0.1:9' for name in  # the discard port: refused at once
              ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY')}
FIXED_METRICS = {'val_neg_elbo_nats', 'test_neg_elbo_nats', 'test_nll_nats', 'seed', 'epochs',
                 'parameters', 'train_minutes', 'peak_memory_mb'}


def expected_files(epochs: list[int], zdim: int) -> set[str]:
    each = ['samples_epoch{:02d}_draws.png', 'samples_epoch{:02d}_means.png']
    manifolds = [f'manifold_epoch{epoch:02d}.png' for epoch in epochs[::2] if zdim == 2]
    return {'config.json', 'log.csv', 'checkpoint.pt', 'metrics.json', 'elbo.pdf', 'elbo.csv',
            'reconstructions.png', *manifolds,
            *(name.format(epoch) for name in each for epoch in epochs)}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}


def assert_one_line(done, words: str) -> None:
    """The script ended with status 2 and one line on stderr that matches `words`."""
    assert done.returncode == 2 and re.fullmatch(f'a3_vae.py: error: .*{words}.*\n', done.stderr)


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
    rows = list(csv.DictReader((finished[0] / 'log.csv').open()))
    assert list(rows[0]) == ['epoch', 'train_neg_elbo_nats', 'val_neg_elbo_nats',
                             'running_neg_elbo_nats', 'seconds']
    assert [row['epoch'] for row in rows] == ['0', '1', '2', '3', '4']
    assert [name for row in rows for name in row if row[name] == ''] == ['running_neg_elbo_nats']
    for name in ('train_neg_elbo_nats', 'val_neg_elbo_nats'):
        assert abs(float(rows[0][name]) - 784 * math.log(2)) < 40
        assert float(rows[-1][name]) < float(rows[0][name]) - 40


def test_metrics_have_the_fixed_names_and_agree(finished):
    metrics = json.loads((finished[0] / 'metrics.json').read_text())
    assert set(metrics) >= FIXED_METRICS
    assert metrics['seed'] == 7 and metrics['epochs'] == 4
    assert metrics['test_neg_elbo_nats'] == pytest.approx(
        metrics['test_reconstruction_nats'] + metrics['test_kl_nats'], rel=1e-5)
    state = torch.load(finished[0] / 'checkpoint.pt', weights_only=True)['parts']['model']
    assert metrics['parameters'] == sum(weight.numel() for weight in state.values())
    last = list(csv.DictReader((finished[0] / 'log.csv').open()))[-1]
    assert metrics['val_neg_elbo_nats'] == pytest.approx(float(last['val_neg_elbo_nats']), rel=.02)


def test_the_config_says_what_was_run_on_what(finished):
    config = json.loads((finished[0] / 'config.json').read_text())
    assert config['arguments']['zdim'] == 2 and config['arguments']['seed'] == 7
    assert config['data']['dataset'] == 'digits' and len(config['data']['sha256']) == 4
    assert config['versions']['torch'] == torch.__version__ and config['device']


def test_the_curve_is_that_of_the_log(finished):
    log = list(csv.DictReader((finished[0] / 'log.csv').open()))
    curve = list(csv.DictReader((finished[0] / 'elbo.csv').open()))
    for name, column in (('training', 'train_neg_elbo_nats'), ('validation', 'val_neg_elbo_nats')):
        assert [float(row[name]) for row in curve] == [-float(row[column]) for row in log]


def test_a_finished_run_starts_anew_and_ends_the_same(finished, run_script, read_run):
    folder, left, _ = finished
    (folder / 'samples_epoch99_draws.png').write_bytes(b'of an earlier run')
    before = (folder / 'checkpoint.pt').stat().st_mtime_ns
    done = run_script('a3_vae.py', *TWO, '--results_dir', folder.parent, fewer_digits=True)
    assert done.returncode == 0 and (folder / 'checkpoint.pt').stat().st_mtime_ns > before
    assert read_run(folder) == left


def wait_for_epoch(process, folder: Path, epoch: int) -> None:
    """Return as soon as the log has the epoch, with the run still going on."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (folder / 'log.csv').is_file() and (folder / 'log.csv').read_text().count(
                '\n') >= epoch + 2:
            return
        time.sleep(0.005)
    process.kill()
    pytest.fail(f'no epoch {epoch} in the log: {process.communicate()}')


def test_a_run_killed_and_interrupted_and_resumed_ends_as_one_never_stopped(
        finished, tmp_path, start_script, run_script, read_run):
    words, folder = ('a3_vae.py', *TWO, '--results_dir', tmp_path), tmp_path / 'two'
    with start_script(*words, fewer_digits=True) as process:
        wait_for_epoch(process, folder, 1)
        process.kill()
    assert not (folder / 'metrics.json').exists()

    with start_script(*words, '--resume', fewer_digits=True) as process:
        wait_for_epoch(process, folder, 2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130 and 'Traceback' not in stderr
    assert not (folder / 'metrics.json').exists()

    said, command = stderr.strip().split('go on with: python ')
    done = run_script('a3_vae.py', *shlex.split(command)[1:], fewer_digits=True)
    assert done.returncode == 0 and 'going on after epoch' in done.stdout
    assert read_run(folder) == finished[1]


@pytest.fixture(scope='module')
def afterwards(finished, tmp_path_factory, start_script):
    """What was said, and the folder before and after, for three commands on copies of that run.

    They start at once: each spends most of its time on imports.
    """
    started = {}
    for case, words in {'resume': ('--resume',), 'differ': ('--resume', '--lr', 0.123),
                        'sample': ('--sample', 3)}.items():
        folder = tmp_path_factory.mktemp(case) / 'two'
        shutil.copytree(finished[0], folder)
        process = start_script('a3_vae.py', *TWO, '--results_dir', folder.parent, *words,
                               fewer_digits=True)
        started[case] = folder, stamps(folder), process
    results = {}
    for case, (folder, before, process) in started.items():
        stdout, stderr = process.communicate(timeout=180)
        done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
        results[case] = done, before, stamps(folder)
    return results


def test_resuming_a_finished_run_says_so_and_changes_nothing(afterwards):
    done, before, after = afterwards['resume']
    assert done.returncode == 0 and 'finished' in done.stdout
    assert after == before


def test_resuming_with_another_argument_is_refused(afterwards):
    done, before, after = afterwards['differ']
    assert_one_line(done, r'is another run: lr was .*, is now 0\.123')
    assert after == before


def test_sample_writes_a_grid_and_changes_nothing_else(afterwards):
    done, before, after = afterwards['sample']
    assert done.returncode == 0, done.stderr
    new = {'sample_draws.png', 'sample_means.png'}
    assert set(after) - set(before) == new and all(name in done.stdout for name in new)
    assert {name: after[name] for name in before} == before


def test_sampling_a_run_that_is_not_there_is_one_line(tmp_path, run_script):
    done = run_script('a3_vae.py', *TINY, '--results_dir', tmp_path / 'none', '--sample', 3,
                      fewer_digits=True)
    assert_one_line(done, 'train this run first')
    assert not (tmp_path / 'none').exists()


def test_sampling_with_other_layers_is_refused_though_the_tensors_would_fit(finished, run_script):
    done = run_script('a3_vae.py', *TWO, '--results_dir', finished[0].parent, '--skip', 'yes',
                      '--sample', 3, fewer_digits=True)
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


# --- a dry run, and words that are wrong ---------------------------------------------------------


def test_a_dry_run_works_from_anywhere_offline_and_leaves_no_results(tmp_path, run_script):
    here, temporary = tmp_path / 'here', tmp_path / 'temporary'
    here.mkdir(), temporary.mkdir()
    with socket.create_server(('127.0.0.1', 0)) as server:  # whoever wants the network comes here
        proxy = f'http://127.0.0.1:{server.getsockname()[1]}'
        done = run_script('a3_vae.py', '--dry_run', '--data_dir', 'empty', '--results_dir',
                          'results', cwd=here,
                          environment={name: proxy for name in NO_NETWORK}
                          | {'TMPDIR': str(temporary)})
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert done.returncode == 0, done.stderr
    assert [line[:8] for line in done.stderr.splitlines()] == ['WARNING:'] * 2  # no MNIST here
    assert all(name in done.stdout.splitlines()[-1] for name in expected_files([0, 1, 2], zdim=20))
    assert not any(here.iterdir())
    [folder] = temporary.glob('a3_*/*')
    assert folder.name == 'vae_z20_digits' and (folder / 'metrics.json').is_file()


def test_help_names_every_flag(run_script):
    done = run_script('a3_vae.py', '--help')
    assert done.returncode == 0 and done.stderr == ''
    for flag in ('--epochs', '--zdim', '--seed', '--device', '--data_dir', '--results_dir',
                 '--run', '--dataset', '--resume', '--dry_run', '--sample', '--iw_samples'):
        assert flag in done.stdout


def test_a_typo_is_one_line(run_script):
    assert_one_line(run_script('a3_vae.py', '--z-dimm', 3), r'--z_dimm, did you mean --zdim\?')


def test_mnist_that_is_nowhere_is_one_line(tmp_path, run_script):
    done = run_script('a3_vae.py', '--dataset', 'mnist', '--data_dir', 'empty', '--results_dir',
                      'results', cwd=tmp_path, environment=NO_NETWORK)
    assert_one_line(done, 'train-images-idx3-ubyte.*empty.*https://')
    assert not any(tmp_path.iterdir())


TYPED_FLAGS = [action.option_strings[0] for action in a3_vae.build_parser()._actions
               if action.type not in (None, Path)]


@pytest.mark.parametrize('value', ['nonsense', '', '-1', 'nan'])
@pytest.mark.parametrize('flag', TYPED_FLAGS)
def test_a_bad_value_is_one_line_that_names_its_flag(capsys, flag, value):
    with pytest.raises(SystemExit, match='^2$'):
        a3_vae.parse_args([f'{flag}={value}'])
    message = capsys.readouterr().err
    assert message.count('\n') == 1 and flag in message and repr(value) in message


def test_the_template_has_its_flags_and_defaults():
    args = a3_vae.parse_args([])
    assert (args.epochs, args.zdim, args.seed) == (40, 20, 42)
    args = a3_vae.parse_args(['--epochs', '3', '--zdim', '5'])
    assert (args.epochs, args.zdim) == (3, 5)
