"""Faults, each as it comes: kills, signals, full disks, damaged files, numbers out of bounds.

`python -m pytest -q code -m slow` does what takes minutes: a hundred kills at random moments, and
one while each kind of file is written.
"""

import contextlib
import gzip
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
import torch

import a3_gan
import datasets.bmnist
import datasets.common
import datasets.digits
import datasets.mnist
import test_ae
import test_gan_script
import test_nf_script
import test_vae_script
from helpers import CODE, assert_one_line, read_csv, stamps
from test_data import Server, amat, idx, packed, tree, write
from test_runs import Payload
from test_scripts import ACTIONS, MODULES, TYPED_FLAGS

if sys.platform == 'win32':
    pytest.skip('signals and limits are those of POSIX', allow_module_level=True)

TINY = {'a3_vae.py': (*test_vae_script.TINY, '--zdim', 2), 'a3_gan.py': test_gan_script.TINY,
        'a3_nf.py': test_nf_script.TINY, 'a3_ae.py': (*test_ae.TINY, '--model', 'dae')}
FEW_DIGITS = (200, 100, 60)
# A process that has the imports behind it and forks for each run: the script on these digits.
SERVER = f"""
import importlib, signal, sys
sys.path.append({str(CODE / "tests")!r})
import torch._dynamo
import a3_ae, a3_gan, a3_nf, a3_vae, helpers, runs
from datasets import digits
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
digits.SIZES = {FEW_DIGITS}
vars(a3_gan).update({test_gan_script.FEWER_SAMPLES})
helpers.serve()
script = importlib.import_module(sys.argv[0].removesuffix('.py'))
runs.launch(script.main, script.parse_args())
"""
CURVES = {'a3_vae.py': 'elbo.pdf', 'a3_gan.py': 'losses.pdf', 'a3_nf.py': 'bpd.pdf',
          'a3_ae.py': 'loss.pdf'}
# The last file before the final estimates.
LAST_FIGURE = {'a3_vae.py': 'elbo.csv', 'a3_gan.py': 'interpolations.csv',
               'a3_nf.py': 'interpolations.png', 'a3_ae.py': 'loss.csv'}
NAMES = datasets.mnist.FILES

each_script = pytest.mark.parametrize('script', TINY)
only_vae = pytest.mark.parametrize('finished', ['a3_vae.py'], indirect=True)


class Finished(NamedTuple):
    """A run that nothing disturbed: what it left, how it is started, how long it took."""

    folder: Path
    left: dict
    script: str
    words: tuple
    seconds: float

    def command(self, results: Path, *more: object) -> tuple:
        return self.script, *self.words, '--results_dir', results, *more


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sizes as those of SERVER, in this process."""
    monkeypatch.setattr(datasets.digits, 'SIZES', FEW_DIGITS)
    for name, value in test_gan_script.FEWER_SAMPLES.items():
        monkeypatch.setattr(a3_gan, name, value)


def share_classifier(finished: Finished, results: Path) -> None:
    for folder in finished.folder.parent.glob('classifier*'):
        shutil.copytree(folder, results / folder.name)


@pytest.fixture(scope='module')
def start(tmp_path_factory) -> Iterator[Callable]:
    """Start a script in a process of its own, after the code `first`.

    Returns its id, and what waits until it stops or ends.
    """
    printed = tmp_path_factory.mktemp('printed') / 'by_script'
    environment = {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(CODE), 'PYTHONIOENCODING': 'utf-8',
                   'PYTHONUNBUFFERED': '1'}
    with subprocess.Popen([sys.executable, '-c', SERVER], env=os.environ | environment, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        def start(*words: object, first: str = '') -> tuple[int, Callable]:
            words = [str(word) for word in words]
            print(json.dumps([words, first, str(printed)]), file=server.stdin, flush=True)
            child = int(server.stdout.readline())

            def wait() -> subprocess.CompletedProcess:
                code = int(server.stdout.readline())
                return subprocess.CompletedProcess(words, code, *(
                    printed.with_suffix(end).read_text() for end in ('.out', '.err')))
            return child, wait
        yield start
        server.stdin.close()


@pytest.fixture(scope='module')
def read_run(read_run):
    """The same, but for one more time."""
    def read(folder: Path) -> dict:
        left = read_run(folder)
        left.get('metrics.json', {}).pop('sample_seconds_per_100', None)
        return left
    return read


@pytest.fixture(scope='module', params=TINY)
def finished(request, tmp_path_factory, read_run) -> Finished:
    folder = tmp_path_factory.mktemp('finished') / 'three'
    words = (*TINY[request.param], '--epochs', 3, '--run', 'three')
    module, began = MODULES[request.param], time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        module.main(module.parse_args([*map(str, words), f'--results_dir={folder.parent}']))
    return Finished(folder, read_run(folder), request.param, words, time.monotonic() - began)


@pytest.fixture(scope='module')
def killed(finished, tmp_path_factory, start) -> Path:
    """The folder of such a run, killed half way through the checkpoint of epoch 2."""
    results = tmp_path_factory.mktemp('killed')
    share_classifier(finished, results)
    _, wait = start(*finished.command(results), first="strike('checkpoint.pt', 3, signal.SIGKILL)")
    assert wait().returncode == -signal.SIGKILL
    return results / 'three'


@pytest.fixture
def stopped(killed: Path, tmp_path: Path) -> Path:
    """A copy of that folder, beside the classifier's and the lock that the killed run left."""
    return Path(shutil.copytree(killed.parent, tmp_path / 'results')) / 'three'


@pytest.fixture
def run_here(monkeypatch, run_here):
    make_small(monkeypatch)
    return run_here


@pytest.fixture
def go_on(finished, run_here, read_run) -> Callable[[Path], str]:
    """Resume a run, which must end as the one that nothing disturbed. Returns what it said."""
    def resume(folder: Path) -> str:
        done = run_here(*finished.command(folder.parent, '--resume'))
        assert done.returncode == 0, done.stderr
        assert read_run(folder) == finished.left
        assert not [path for path in folder.parent.rglob('*') if path.suffix in ('.tmp', '.lock')]
        return done.stdout
    return resume


@contextlib.contextmanager
def limited(name: str, most: int) -> Iterator[None]:
    """This process under a limit of the kernel, RLIMIT_…"""
    resource = pytest.importorskip('resource')
    kind = getattr(resource, name)
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


# --- kills ---------------------------------------------------------------------------------------


def test_a_run_killed_half_way_through_its_checkpoint_ends_as_one_never_stopped(stopped, go_on):
    assert list(stopped.glob('checkpoint.pt.*.tmp'))
    assert 'going on after epoch 1' in go_on(stopped)


def test_a_run_killed_half_way_through_each_kind_of_file_ends_as_one_never_stopped(
        finished, tmp_path, start, go_on):
    folder = tmp_path / 'three'
    share_classifier(finished, tmp_path)
    for name, count in (('config.json', 1), ('checkpoint.pt', 1), ('log.csv', 3),
                        (CURVES[finished.script], 1), ('metrics.json', 1)):
        _, wait = start(*finished.command(tmp_path, '--resume'),
                        first=f'strike({name!r}, {count}, signal.SIGKILL)')
        assert wait().returncode == -signal.SIGKILL
        [half] = folder.glob('*.tmp')
        assert half.name.startswith(f'{name}.') and half.stat().st_size > 0
        assert not (folder / 'metrics.json').exists()
    assert 'going on after epoch 3' in go_on(folder)


@pytest.mark.parametrize('finished', ['a3_gan.py'], indirect=True)
def test_a_kill_half_way_through_the_classifier_leaves_nothing_behind(
        finished, tmp_path, start, go_on):
    _, wait = start(*finished.command(tmp_path),
                    first="strike('checkpoint.pt', 1, signal.SIGKILL)")
    assert wait().returncode == -signal.SIGKILL
    assert list((tmp_path / 'classifier_digits').glob('checkpoint.pt.*.tmp'))
    go_on(tmp_path / 'three')


@pytest.mark.slow
def test_a_run_killed_half_way_through_any_file_ends_as_one_never_stopped(
        finished, tmp_path, start, go_on):
    for name in sorted(finished.left):
        results = tmp_path / name
        share_classifier(finished, results)
        _, wait = start(*finished.command(results),
                        first=f'strike({name!r}, 1, signal.SIGKILL)')
        assert wait().returncode == -signal.SIGKILL
        go_on(results / 'three')


@pytest.mark.slow
@pytest.mark.parametrize('finished, kills', [('a3_vae.py', 34), ('a3_gan.py', 33),
                                             ('a3_nf.py', 33)], indirect=['finished'])
def test_a_run_killed_at_random_moments_ends_as_one_never_stopped(
        finished, tmp_path, start, go_on, kills):
    random, codes, n = Random(kills), [], 0
    while codes.count(-signal.SIGKILL) < kills and len(codes) < 10 * kills:
        results = tmp_path / str(n := n + 1)
        for _ in range(5):
            child, wait = start(*finished.command(results, '--resume'))
            time.sleep(random.uniform(0, finished.seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            done = wait()
            assert done.returncode in (0, -signal.SIGKILL), done.stderr
            codes.append(done.returncode)
            if done.returncode == 0:
                break
        go_on(results / 'three')
    assert codes.count(-signal.SIGKILL) >= kills


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize('moment, number', [
    ('in an epoch', signal.SIGTERM), ('in the final estimates', signal.SIGINT),
    pytest.param('in an epoch', signal.SIGINT, marks=pytest.mark.slow),
    pytest.param('in the final estimates', signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_and_the_line_that_it_prints_goes_on(
        finished, tmp_path, start, run_here, read_run, moment, number):
    folder = tmp_path / 'three'
    name, count, calls = (('checkpoint.pt', 2, 200) if moment == 'in an epoch' else
                          (LAST_FIGURE[finished.script], 1, 60))
    share_classifier(finished, tmp_path)
    _, wait = start(*finished.command(tmp_path),
                    first=f'strike({name!r}, {count}, {number:d}, {calls})')
    done = wait()
    assert time.time() - (folder / name).stat().st_mtime < 5
    assert done.returncode == 128 + number
    [line] = [line for line in done.stderr.splitlines()
              if line and not line.startswith('WARNING:')]
    ended = 'interrupted' if number == signal.SIGINT else 'terminated'
    said, command = line.split('; go on with: python ')
    assert said == f'{finished.script}: {ended}'
    assert not (folder / 'metrics.json').exists()
    done = run_here(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert f'going on after epoch {1 if moment == "in an epoch" else 3}' in done.stdout
    assert read_run(folder) == finished.left


# --- two at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize('finished', [
    'a3_vae.py', *(pytest.param(script, marks=pytest.mark.slow)
                   for script in ('a3_gan.py', 'a3_nf.py'))], indirect=True)
def test_a_second_run_in_the_folder_is_refused_and_a_look_at_its_samples_is_not(
        finished, tmp_path, start, run_here, read_run):
    folder = tmp_path / 'three'
    share_classifier(finished, tmp_path)
    child, wait = start(*finished.command(tmp_path),
                        first="strike('checkpoint.pt', 2, signal.SIGSTOP)")
    assert wait().returncode == signal.SIGSTOP
    try:
        before = stamps(folder)
        for more in ((), ('--resume',), ('--epochs', 2)):
            assert_one_line(run_here(*finished.command(tmp_path, *more)),
                            f'three is in use by process {child}')
        assert stamps(folder) == before
        sampled = run_here(*finished.command(tmp_path, '--sample', 3))
        assert sampled.returncode == 0, sampled.stderr
    finally:
        os.kill(child, signal.SIGCONT)
        done = wait()
    assert done.returncode == 0, done.stderr
    assert {name: content for name, content in read_run(folder).items()
            if not re.match('sample[_.]', name)} == finished.left
    assert not (tmp_path / '.three.lock').exists()


@only_vae
@pytest.mark.parametrize('content', ['', 'nonsense', '999999999', str(os.getpid())])
def test_a_lock_left_behind_stops_nobody(stopped, go_on, content):
    lock = stopped.with_name('.three.lock')
    assert lock.is_file()  # the killed run's
    lock.write_text(content)
    go_on(stopped)


# --- disks ---------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A folder; for root, whom no permission stops, a small file system of its own."""
    path = tmp_path / 'disk'
    path.mkdir()
    if os.geteuid() != 0:
        yield path
        return
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', path]
    if not shutil.which('mount') or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('may not mount')
    yield path
    subprocess.run(['umount', '-l', path], check=True)


def let_write(disk: Path, allowed: bool) -> None:
    if os.path.ismount(disk):
        subprocess.run(['mount', '-o', f'remount,{"rw" if allowed else "ro"}', disk], check=True)
    else:
        for folder in (disk, *(path for path in disk.rglob('*') if path.is_dir())):
            folder.chmod(0o755 if allowed else 0o555)


def test_a_file_that_does_not_fit_is_one_line_and_the_last_checkpoint_stays(
        finished, stopped, run_here, go_on):
    before = (stopped / 'checkpoint.pt').read_bytes()
    with limited('RLIMIT_FSIZE', len(before) // 2):
        done = run_here(*finished.command(stopped.parent, '--resume'))
    assert_one_line(done, 'File too large: .*three')
    assert (stopped / 'checkpoint.pt').read_bytes() == before
    assert not list(stopped.glob('*.tmp'))
    assert 'going on after epoch 1' in go_on(stopped)


@only_vae
@pytest.mark.parametrize('room', [0, 8_000, 100_000])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(finished, killed, disk, run_here,
                                                               go_on, room):
    if not os.path.ismount(disk):
        pytest.skip('may not mount')
    folder = Path(shutil.copytree(killed.parent, disk / 'results')) / 'three'
    for path in folder.glob('*.tmp'):
        path.unlink()
    before = (folder / 'checkpoint.pt').read_bytes()
    with (disk / 'filler').open('wb', buffering=0) as filler:
        with contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        filler.truncate(filler.tell() - room)
    assert_one_line(run_here(*finished.command(folder.parent, '--resume')),
                    rf'No space left on device: .*{re.escape(str(disk))}')
    assert (folder / 'checkpoint.pt').read_bytes() == before
    assert not list(folder.glob('*.tmp'))
    (disk / 'filler').unlink()
    assert 'going on after epoch' in go_on(folder)


@only_vae
def test_a_folder_that_nobody_may_write_to_is_one_line(finished, killed, disk, run_here, go_on):
    folder = Path(shutil.copytree(killed.parent, disk / 'results')) / 'three'
    before = stamps(folder)
    let_write(disk, False)
    try:
        for more in (('--resume',), (), ('--run', 'new'), ('--sample', 3)):
            assert_one_line(run_here(*finished.command(folder.parent, *more)),
                            rf'(Read-only file system|Permission denied): .*{folder.parent}')
        assert stamps(folder) == before and not (folder.parent / 'new').exists()
    finally:
        let_write(disk, True)
    go_on(folder)


@only_vae
@pytest.mark.parametrize('deleted', ['results', 'results/three'])
def test_a_folder_deleted_while_the_run_goes_on_is_one_line(finished, tmp_path, run_here,
                                                            monkeypatch, go_on, deleted):
    write_bytes, logs = Path.write_bytes, []

    def delete(path: Path, content: bytes) -> int:
        logs.extend([path] if path.name.startswith('log.csv') else [])
        if len(logs) == 3:
            shutil.rmtree(tmp_path / deleted)
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_bytes', delete)
        done = run_here(*finished.command(tmp_path / 'results'))
    assert_one_line(done, r'No such file or directory: .*three/log\.csv')
    assert not (tmp_path / deleted).exists()
    assert 'starting anew' in go_on(tmp_path / 'results' / 'three')


@only_vae
@pytest.mark.parametrize('words, reason', [
    (('--results_dir', 'a_file'), 'a_file'), (('--results_dir', 'a_file/b'), 'a_file'),
    (('--run', 'a_file'), 'a_file'), (('--run', 300 * 'x'), 'File name too long')])
def test_results_that_can_have_no_folder_are_one_line(finished, tmp_path, run_here, monkeypatch,
                                                      words, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a_file').write_text('of the user')
    assert_one_line(run_here(*finished.command('.', *words)), reason)
    assert (tmp_path / 'a_file').read_text() == 'of the user'


@each_script
def test_a_folder_of_something_else_is_refused_and_left_as_it_was(tmp_path, run_here, script):
    folder = tmp_path / 'of_the_user'
    folder.mkdir()
    for name in ('config.json', 'figure.png', 'draft.tmp'):
        (folder / name).write_text('{}')
    before = stamps(folder)
    assert_one_line(run_here(script, *TINY[script], '--results_dir', tmp_path, '--run',
                             folder.name), 'holds files of something else')
    assert stamps(folder) == before


# --- checkpoints ---------------------------------------------------------------------------------


def truncated(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-100])
    return 'is damaged'


def bit_flipped(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return 'is damaged'


def of_another_script(path: Path) -> str:
    torch.save(torch.load(path, weights_only=True) | {'script': 'a3_other'}, path)
    return r'is of a3_other\.py, not of a3_'


def of_a_newer_format(path: Path) -> str:
    torch.save(torch.load(path, weights_only=True) | {'format': 2}, path)
    return 'is of format 2, this code reads format 1'


def of_no_format(path: Path) -> str:
    torch.save([], path)
    return 'is damaged'


def of_code(path: Path) -> str:
    torch.save(torch.load(path, weights_only=True) | {'rows': Payload(path.parent / 'it_ran')},
               path)
    return 'more than tensors and numbers'


@pytest.mark.parametrize('flag', [('--resume',), ('--sample', 3)])
@pytest.mark.parametrize('breakage', [truncated, bit_flipped, of_another_script,
                                      of_a_newer_format, of_no_format, of_code])
def test_a_checkpoint_that_cannot_be_trusted_is_one_line_and_nothing_is_written(
        finished, stopped, run_here, breakage, flag):
    for path in stopped.glob('*.tmp'):
        path.unlink()
    reason = breakage(stopped / 'checkpoint.pt')
    before = stamps(stopped)
    assert_one_line(run_here(*finished.command(stopped.parent, *flag)), reason)
    assert stamps(stopped) == before


@pytest.mark.parametrize('flag', [('--resume',), ('--sample', 3)])
def test_a_checkpoint_of_other_arguments_is_one_line_and_nothing_is_written(
        finished, stopped, run_here, flag):
    other = {'a3_vae.py': '--hidden_dim', 'a3_gan.py': '--latent_dim', 'a3_nf.py': '--n_hidden',
             'a3_ae.py': '--hidden_dim'}
    done = run_here(*finished.command(stopped.parent, other[finished.script], 9,
                                      '--epochs', 1, '--run', 'other'))
    assert done.returncode == 0, done.stderr
    for path in stopped.glob('*.tmp'):
        path.unlink()
    shutil.copy(stopped.with_name('other') / 'checkpoint.pt', stopped / 'checkpoint.pt')
    before = stamps(stopped)
    assert_one_line(run_here(*finished.command(stopped.parent, *flag)), 'of another model')
    assert stamps(stopped) == before


# --- data ----------------------------------------------------------------------------------------


def make_mnist(monkeypatch, images: np.ndarray) -> dict[str, bytes]:
    """The unpacked files of an MNIST of these images, (4 n, 28, 28), expected from now on."""
    n = len(images) // 4
    labels = (np.arange(4 * n) % 10).astype(np.uint8)
    contents = dict(zip(NAMES, map(idx, (images[:3 * n], labels[:3 * n], images[3 * n:],
                                         labels[3 * n:])), strict=True))
    for name, content in contents.items():
        monkeypatch.setitem(NAMES, name, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(datasets.mnist, 'N_VALIDATION', n)
    monkeypatch.setattr(datasets.mnist, 'MIRRORS', ['http://127.0.0.1:9/'])  # refused at once
    return contents


@pytest.fixture
def small_mnist(monkeypatch) -> dict[str, bytes]:
    return make_mnist(monkeypatch, np.random.RandomState(0).randint(
        256, size=(80, 28, 28)).astype(np.uint8))


def missing_file(path: Path, other: Path) -> None:
    path.unlink()


def truncated_file(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flipped_file(path: Path, other: Path) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[len(content) // 2 & ~1] ^= 2
    path.write_bytes(gzip.compress(content))


def swapped_file(path: Path, other: Path) -> None:
    shutil.copy(other, path)


def web_page(path: Path, other: Path) -> None:
    path.write_bytes(b'<!DOCTYPE html>\n<html>404</html>')


def folder_of_that_name(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


BREAKAGES = (missing_file, truncated_file, flipped_file, swapped_file, web_page,
             folder_of_that_name)


@pytest.mark.parametrize('breakage', BREAKAGES)
@pytest.mark.parametrize('name', NAMES)
@each_script
def test_each_file_of_mnist_that_is_broken_is_one_line_that_names_it(
        tmp_path, run_here, small_mnist, script, name, breakage):
    data = tmp_path / 'data'
    write(small_mnist, data)
    breakage(data / f'{name}.gz', data / f'{next(n for n in NAMES if n != name)}.gz')
    before = tree(tmp_path)
    assert_one_line(run_here(script, *TINY[script][2:], '--data_dir', data, '--results_dir',
                             tmp_path / 'results'), name)
    assert tree(tmp_path) == before


@pytest.mark.parametrize('breakage', BREAKAGES)
@pytest.mark.parametrize('name', datasets.bmnist.FILES)
def test_each_file_of_binarised_mnist_that_is_broken_is_one_line_that_names_it(
        tmp_path, run_here, monkeypatch, name, breakage):
    data, random = tmp_path / 'data', np.random.RandomState(1)
    sizes = dict(zip(datasets.bmnist.FILES, (6, 4, 5), strict=True))
    for key, size in sizes.items():
        monkeypatch.setitem(datasets.bmnist.FILES, key, size)
    write({key: amat(random.randint(2, size=(size, 784))) for key, size in sizes.items()}, data)
    breakage(data / f'{name}.gz', data / f'{next(key for key in sizes if key != name)}.gz')
    before = tree(tmp_path)
    assert_one_line(run_here('a3_vae.py', '--data_dir', data, '--results_dir',
                             tmp_path / 'results'), name)
    assert tree(tmp_path) == before


@pytest.mark.parametrize('how', ['web page', 'dies half way'])
@each_script
def test_a_download_that_fails_is_one_line_and_leaves_nothing(tmp_path, run_here, monkeypatch,
                                                              small_mnist, script, how):
    files = packed(small_mnist)
    last = list(files)[-1]
    dies = how == 'dies half way'
    files[last] = files[last][:-9] if dies else b'<html>log in first</html>'
    with Server(files, promised=9 * dies) as server:
        monkeypatch.setattr(datasets.mnist, 'MIRRORS', [server.address])
        done = run_here(script, '--dataset', 'mnist', '--data_dir', tmp_path / 'data',
                        '--results_dir', tmp_path / 'results')
    assert_one_line(done, f'MNIST is missing or incomplete.*{server.address}')
    assert tree(tmp_path) == {}


def test_two_scripts_may_start_at_once_on_an_empty_data_folder(
        tmp_path, start, run_here, monkeypatch, small_mnist):
    # The server holds the one's request until the other has asked too.
    monkeypatch.setattr(datasets.common, 'SILENCE_SECONDS', 60.)
    words = ('--epochs', 1, '--data_dir', tmp_path / 'data', '--results_dir', tmp_path / 'results',
             '--run')
    with Server(packed(small_mnist), together=2) as server:
        mirrors = [server.address]
        monkeypatch.setattr(datasets.mnist, 'MIRRORS', mirrors)
        first = (f'import datasets.mnist as m; m.FILES.update({dict(NAMES)}); '
                 f'm.MIRRORS = {mirrors}; m.N_VALIDATION = {datasets.mnist.N_VALIDATION}')
        _, wait = start('a3_vae.py', *TINY['a3_vae.py'][2:], *words, 'vae', first=first)
        done = run_here('a3_nf.py', *TINY['a3_nf.py'][2:], *words, 'nf')
        other = wait()
    assert (done.returncode, done.stderr) == (other.returncode, other.stderr) == (0, '')
    assert server.requests.count(f'/{next(iter(NAMES))}.gz') >= 2
    assert set(tree(tmp_path / 'data')) == {'MNIST', 'MNIST/raw',
                                            *(f'MNIST/raw/{name}.gz' for name in NAMES)}
    assert all((tmp_path / 'results' / name / 'metrics.json').is_file() for name in ('vae', 'nf'))


# --- numbers -------------------------------------------------------------------------------------


def assert_ends_well(done: subprocess.CompletedProcess, results: Path) -> None:
    """The run ended, or with one line that says why not; no file holds what is not a number."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith('WARNING:')]
    assert done.returncode in (0, 1) and len(lines) == done.returncode, done.stderr
    for path in results.rglob('*.json'):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    for path in results.rglob('*.csv'):
        assert not [row for row in read_csv(path) for cell in row.values()
                    if cell and not math.isfinite(float(cell))]


@pytest.mark.filterwarnings('error')  # which would be lines on stderr
@pytest.mark.parametrize('lr', ['1e20', '1e39', '1e300'])
@each_script
def test_a_learning_rate_out_of_bounds_is_one_line_at_most(tmp_path, run_here, script, lr):
    done = run_here(script, *TINY[script], '--epochs', 2, '--lr', lr, '--results_dir', tmp_path)
    assert_ends_well(done, tmp_path)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('pixel', [0, 255])
@each_script
def test_images_of_one_colour_are_no_fault(tmp_path, run_here, monkeypatch, script, pixel):
    write(make_mnist(monkeypatch, np.full((160, 28, 28), pixel, np.uint8)), tmp_path / 'data')
    done = run_here(script, *TINY[script][2:], '--epochs', 2, '--data_dir', tmp_path / 'data',
                    '--results_dir', tmp_path / 'results')
    assert_ends_well(done, tmp_path / 'results')
    assert done.returncode == 0 or script == 'a3_gan.py', done.stderr


WORDS = [(script, ('--batch_size', size)) for script in TINY for size in (2, 7, 1_000_000)] + [
    *((script, ('--batch_size', 1)) for script in ('a3_vae.py', 'a3_nf.py', 'a3_ae.py')),
    ('a3_vae.py', ('--zdim', 1000)), ('a3_gan.py', ('--latent_dim', 1000)),
    ('a3_nf.py', ('--n_hidden', 1)), ('a3_nf.py', ('--arch', 'mlp', '--n_hidden', 1))]


@pytest.mark.parametrize('script, words', WORDS)
def test_extreme_sizes_are_no_fault(tmp_path, run_here, monkeypatch, script, words):
    monkeypatch.setattr(datasets.digits, 'SIZES', (60, 30, 30))
    done = run_here(script, *TINY[script], '--epochs', 1, *words, '--results_dir', tmp_path)
    assert_ends_well(done, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('script, words', [
    ('a3_vae.py', ('--hidden_dim', 999999999)), ('a3_vae.py', ('--zdim', 999999999)),
    ('a3_vae.py', ('--likelihood', 'gaussian', '--hidden_dim', 999999999)),
    ('a3_ae.py', ('--hidden_dim', 999999999)), ('a3_ae.py', ('--zdim', 999999999)),
    ('a3_gan.py', ('--latent_dim', 999999999)), ('a3_nf.py', ('--n_hidden', 999999999)),
    ('a3_nf.py', ('--n_embedding', 999999999)),
    ('a3_nf.py', ('--arch', 'mlp', '--n_hidden', 999999999))])
@pytest.mark.skipif(sys.platform != 'linux', reason='memory has no limit')
def test_a_size_that_no_machine_has_is_one_line(tmp_path, run_here, script, words):
    with limited('RLIMIT_AS', 64 * 2 ** 30):  # some systems would promise more
        done = run_here(script, *TINY[script], *words, '--results_dir', tmp_path / 'results')
    assert_one_line(done, 'not enough memory for these arguments')
    assert tree(tmp_path) == {}


@pytest.mark.parametrize('value', ['inf', '1e999', '0x10'])
@pytest.mark.parametrize('script, flag', TYPED_FLAGS)
def test_nonsense_is_one_line_that_names_its_flag(capsys, script, flag, value):
    with pytest.raises(SystemExit, match='^2$'):
        MODULES[script].parse_args([f'{flag}={value}'])
    message = capsys.readouterr().err
    assert message.count('\n') == 1 and flag in message and repr(value) in message


@each_script
def test_no_epochs_are_one_line(capsys, script):
    [flag] = {action.option_strings[0] for action in ACTIONS[script] if action.dest == 'epochs'}
    for name in {flag, '--epochs'}:
        with pytest.raises(SystemExit, match='^2$'):
            MODULES[script].parse_args([name, '0'])
        assert re.fullmatch(f".*{flag}.*'0'.*\n", capsys.readouterr().err)
