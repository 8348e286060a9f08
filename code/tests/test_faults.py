"""Faults, each as it comes: kills and signals, damaged data, numbers out of the ordinary.

`python -m pytest -q code -m slow` does what takes minutes: a hundred kills at random moments.
"""

import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from subprocess import CompletedProcess

import numpy as np
import pytest

import a3_gan
import files
from datasets import digits, mnist
from helpers import assert_one_line, read_csv, stamps

if sys.platform == 'win32':
    pytest.skip('signals are those of POSIX', allow_module_level=True)

TINY = {  # networks
    'a3_vae.py': ('--zdim=2', '--hidden_dim=16', '--n_layers=1', '--iw_samples=2'),
    'a3_ae.py': ('--model=dae', '--hidden_dim=16'),
    'a3_gan.py': ('--latent_dim=8', '--save_interval=3'), 'a3_nf.py': ('--n_hidden=8',)}
CURVES = {'a3_vae.py': 'elbo.pdf', 'a3_ae.py': 'loss.pdf', 'a3_gan.py': 'losses.pdf',
          'a3_nf.py': 'bpd.pdf'}
KILL, INTERRUPT, TERMINATE = signal.SIGKILL, signal.SIGINT, signal.SIGTERM

each_script = pytest.mark.parametrize('script', TINY)


@pytest.fixture
def command(monkeypatch, run_here, tmp_path, script) -> Callable[..., tuple]:
    """The command line of a short run in a results folder, with more words."""
    monkeypatch.setattr(digits, 'SIZES', (120, 60, 60))
    monkeypatch.setattr(a3_gan, 'EVAL_BATCH', 40)
    return lambda results, *more: (
        script, *TINY[script], '--dataset=digits', '--batch_size=40', '--epochs=3', '--run=three',
        '--results_dir', tmp_path / results, *more)


# --- kills and signals ---------------------------------------------------------------------------


def in_a_fork(fate: Callable[[], object], run: Callable[[], CompletedProcess], said: Path
              ) -> int | None:
    """The exit status of `run` in a process of its own, after `fate`; less than 0 if a signal
    killed it. What it says on stderr goes to a file. A fork has the imports behind it."""
    def live() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
        fate()
        done = run()
        said.write_text(done.stderr)
        sys.exit(done.returncode)
    process = multiprocessing.get_context('fork').Process(target=live)
    process.start()
    process.join(180)
    process.kill()  # what hangs would outlive its test
    return process.exitcode


def strike(path: Path, count: int, number: int) -> None:
    """From now on, this process gets a signal when half of that file is written anew, the
    count-th time."""
    replace, seen = os.replace, []

    def replace_or_strike(temporary: Path, target: Path) -> None:
        seen.extend([0] * (target == path))
        if target == path and len(seen) == count:
            os.truncate(temporary, temporary.stat().st_size // 2)
            os.kill(os.getpid(), number)
        replace(temporary, target)
    files.os.replace = replace_or_strike


@each_script
def test_a_run_stopped_half_way_through_each_kind_of_file_ends_as_one_never_stopped(
        script, command, run_here, read_run, tmp_path):
    folder, said, words = tmp_path / 'stopped' / 'three', tmp_path / 'said', command('stopped')
    assert run_here(*command('straight')).returncode == 0  # first, as it imports what is forked
    classifier = tmp_path / 'stopped' / 'classifier_digits' / 'checkpoint.pt'
    for path, count, number in [
            (folder / 'config.json', 1, KILL), *[(classifier, 1, KILL)] * (script == 'a3_gan.py'),
            (folder / 'checkpoint.pt', 1, KILL), (folder / 'log.csv', 2, TERMINATE),
            (folder / 'checkpoint.pt', 2, KILL), (folder / CURVES[script], 1, KILL),
            (folder / 'metrics.json', 1, INTERRUPT)]:
        status = in_a_fork(partial(strike, path, count, number), partial(run_here, *words), said)
        halves = list(path.parent.glob('*.tmp'))
        if number == KILL:
            assert status == -KILL and len(halves) == 1
            assert halves[0].name.startswith(path.name) and halves[0].stat().st_size > 0
            words = command('stopped', '--resume')
        else:  # the line that it prints goes on
            *_, line = said.read_text().splitlines()
            start, _, typed = line.partition('; go on with: python ')
            ended = {INTERRUPT: 'interrupted', TERMINATE: 'terminated'}[number]
            assert status == 128 + number and start == f'{script}: {ended}' and halves == []
            words = shlex.split(typed)
        assert not (folder / 'metrics.json').exists()
    assert 'going on after epoch 3' in run_here(*words).stdout
    assert read_run(folder) == read_run(tmp_path / 'straight' / 'three')
    assert not list(tmp_path.rglob('*.tmp'))
    before = stamps(folder)
    assert 'finished already' in run_here(*command('stopped')).stdout and stamps(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize('script, kills', [('a3_vae.py', 34), ('a3_gan.py', 33),
                                           ('a3_nf.py', 33)])
def test_a_run_killed_at_random_moments_ends_as_one_never_stopped(command, run_here, read_run,
                                                                  tmp_path, kills):
    random, killed, n, started = Random(kills), 0, 0, time.monotonic()
    assert run_here(*command('straight')).returncode == 0
    seconds = time.monotonic() - started
    while killed < kills:
        n += 1
        run = partial(run_here, *command(str(n), '--resume'))
        for _ in range(5):
            kill = partial(signal.setitimer, signal.ITIMER_REAL, random.uniform(0.001, seconds))
            status = in_a_fork(kill, run, tmp_path / 'said')
            assert status in (0, -signal.SIGALRM)  # which nothing catches
            killed += status != 0
        assert run().returncode == 0
        assert read_run(tmp_path / str(n) / 'three') == read_run(tmp_path / 'straight' / 'three')


# --- data and numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize('script', ['a3_nf.py'])
def test_damaged_data_are_one_line_that_names_the_file(command, run_here, tmp_path):
    for name in mnist.FILES:
        (tmp_path / name).write_bytes(b'damaged')
    done = run_here(*command('results', '--dataset', 'mnist', '--data_dir', tmp_path))
    assert_one_line(done, f'{next(iter(mnist.FILES))}: expected sha256')
    assert not (tmp_path / 'results').exists()


@pytest.mark.filterwarnings('error')  # which would be lines on stderr
@each_script
@pytest.mark.parametrize('words', [('--lr', '1e30'), ('--batch_size', 1_000_000), ()])
def test_numbers_and_images_out_of_the_ordinary_are_one_line_at_most(
        script, command, run_here, monkeypatch, tmp_path, words):
    if not words:  # images that are all black
        blank = np.zeros((60, 784), np.uint8), np.arange(60) % 10
        monkeypatch.setattr(mnist, 'load_digits', lambda: (
            [blank] * 3, {'dataset': 'digits', 'description': 'blank', 'sha256': {}}))
    done = run_here(*command('results', '--epochs', 2, *words))
    lines = [line for line in done.stderr.splitlines() if not line.startswith('WARNING:')]
    allowed = (0, 1) if words[:1] == ('--lr',) or script == 'a3_gan.py' else (0,)
    assert done.returncode in allowed and len(lines) == done.returncode, done.stderr
    for path in (tmp_path / 'results').rglob('*.json'):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    for path in (tmp_path / 'results').rglob('*.csv'):
        assert all(math.isfinite(float(cell or 0)) for row in read_csv(path)
                   for cell in row.values())
