"""What all scripts share: an import that runs nothing, their flags, a dry run, no MNIST."""

import importlib
import re
import socket
import subprocess
import sys

import pytest

import a3_gan
from helpers import CODE, assert_one_line

FOLDERS = {'a3_vae.py': 'vae_z20_digits', 'a3_ae.py': 'ae_z20_digits', 'a3_gan.py': 'gan_digits',
           'a3_nf.py': 'nf_digits'}  # of dry runs
EVERY_SCRIPT = [*FOLDERS, 'a3_compare.py', 'a3_evidence.py']
WATCHED_IMPORT = """
import importlib, random, sys
import matplotlib.figure, matplotlib.image, numpy, torch, tqdm  # may write caches of their own
import torch.optim.swa_utils

def state():
    return (str(random.getstate()), str(numpy.random.get_state()),
            torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled())

def forbid(event, arguments):
    writes = event == 'open' and isinstance(arguments[1], str) and set(arguments[1]) & set('wax+')
    if writes or event in ('os.mkdir', 'os.remove', 'os.rename', 'socket.getaddrinfo',
                           'socket.connect', 'subprocess.Popen'):
        raise SystemExit(f'importing did {event} {arguments}')

before = state()
sys.addaudithook(forbid)
for script in sys.argv[1:-1]:
    importlib.import_module(script.removesuffix('.py'))
    assert state() == before, f'importing {script} changed a generator or a setting'
"""

each_script = pytest.mark.parametrize('script', FOLDERS)


def test_importing_runs_nothing(tmp_path):
    done = subprocess.run([sys.executable, '-B', '-c', WATCHED_IMPORT, *EVERY_SCRIPT, '--no_flag'],
                          env={'PYTHONPATH': str(CODE), 'OMP_NUM_THREADS': '1'}, cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert list(tmp_path.iterdir()) == []


def test_scripts_write_their_densities_out():
    for path in CODE.glob('*.py'):
        assert not re.search(r'torch\.distributions|import .*\bdistributions\b', path.read_text())


@pytest.mark.parametrize('script', EVERY_SCRIPT)
def test_help_names_every_flag_and_says_what_the_script_does(run_here, script):
    module = importlib.import_module(script.removesuffix('.py'))
    done = run_here(script, '--help')
    assert done.returncode == 0 and module.__doc__ in done.stdout
    flags = {f'--{name}' for name in vars(module.parse_args([])) if name != 'name'}
    assert {flag for flag in flags if flag not in done.stdout} == set()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty folder to work in, and proxies at a server to which nobody may come."""
    monkeypatch.chdir(tmp_path)
    with socket.create_server(('127.0.0.1', 0)) as server:
        for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'):
            monkeypatch.setenv(name, f'http://127.0.0.1:{server.getsockname()[1]}')
        yield tmp_path
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@each_script
def test_a_dry_run_works_from_anywhere_offline_and_leaves_no_results(
        offline, tmp_path_factory, monkeypatch, run_here, run_script, script):
    temporary = tmp_path_factory.mktemp('temporary')
    for name, value in (('TMPDIR', str(temporary)), ('OMP_NUM_THREADS', '1')):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr('tempfile.tempdir', str(temporary))
    monkeypatch.setattr(a3_gan, 'EVAL_BATCH', 100)
    run = run_script if script == 'a3_ae.py' else run_here  # once as a user starts it
    done = run(script, '--dry_run', '--data_dir', 'empty', '--results_dir', 'results')
    assert done.returncode == 0, done.stderr
    no_mnist, digits_instead, *of_epochs = done.stderr.splitlines()
    assert no_mnist.startswith('WARNING: no MNIST in empty')
    assert digits_instead.startswith('WARNING:')
    assert all(line.startswith('WARNING: epoch') for line in of_epochs)
    assert not any(offline.iterdir())
    [metrics] = temporary.glob(f'a3_*/{FOLDERS[script]}/metrics.json')
    assert f'files in {metrics.parent}: ' in done.stdout.splitlines()[-1]


@each_script
def test_mnist_that_is_nowhere_is_one_line(tmp_path, run_here, monkeypatch, script):
    for name in ('http_proxy', 'https_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')  # the discard port: refused at once
    monkeypatch.chdir(tmp_path)
    done = run_here(script, '--dataset', 'mnist', '--data_dir', 'empty')
    assert_one_line(done, 'train-images-idx3-ubyte.*empty.*https://')
    assert not any(tmp_path.iterdir())
