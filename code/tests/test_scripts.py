"""What all scripts have alike: an import that runs nothing, their flags, a dry run."""

import importlib
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import CODE, assert_one_line

DRY_RUNS = {  # the folder, and what is in it beside the files of every run
    'a3_vae.py': ('vae_z20_digits', {
        'elbo.pdf', 'elbo.csv', 'reconstructions.png',
        *(f'samples_epoch0{epoch}_{kind}.png' for epoch in range(3)
          for kind in ('draws', 'means'))}),
    'a3_ae.py': ('ae_z20_digits', {'loss.pdf', 'loss.csv', 'reconstructions.png',
                                   'decodings.png'}),
    'a3_gan.py': ('gan_digits', {
        'losses.pdf', 'losses.csv', 'interpolation.png', 'interpolations.png',
        'interpolations.csv', *(f'samples_epoch00{epoch}.png' for epoch in range(3))}),
    'a3_nf.py': ('nf_digits', {
        'bpd.pdf', 'bpd.csv', 'interpolations.png',
        *(f'{kind}_epoch0{epoch}.png' for epoch in range(3) for kind in ('samples', 'cool'))}),
}
PROXIES = ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY')
MODULES = {script: importlib.import_module(script.removesuffix('.py')) for script in DRY_RUNS}
ACTIONS = {script: module.build_parser()._actions for script, module in MODULES.items()}
TYPED_FLAGS = [(script, action.option_strings[0]) for script in ACTIONS
               for action in ACTIONS[script] if action.type not in (None, Path)]

each_script = pytest.mark.parametrize('script', DRY_RUNS)


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize('path', sorted(CODE.glob('*.py')), ids=lambda path: path.name)
def test_scripts_write_their_densities_out(path):
    assert not re.search(r'torch\.distributions|import .*\bdistributions\b', path.read_text())


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
importlib.import_module(sys.argv[1])
assert state() == before, 'importing changed a generator or a setting'
"""


@each_script
def test_importing_runs_nothing(tmp_path, script):
    done = subprocess.run([sys.executable, '-B', '-c', WATCHED_IMPORT, Path(script).stem,
                           '--no_such_flag'],
                          env={'PYTHONPATH': str(CODE), 'OMP_NUM_THREADS': '1'}, cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert list(tmp_path.iterdir()) == []


# --- the flags -----------------------------------------------------------------------------------


@each_script
def test_help_names_every_flag(run_here, script):
    done = run_here(script, '--help')
    assert done.returncode == 0 and done.stderr == ''
    flags = {flag for action in ACTIONS[script] for flag in action.option_strings}
    assert flags >= {'--epochs', '--seed', '--device', '--data_dir', '--results_dir', '--run',
                     '--dataset', '--resume', '--dry_run', '--sample'}
    assert {flag for flag in flags if flag not in done.stdout} == set()


@each_script
def test_a_typo_is_one_line_that_names_the_flag(run_here, script):
    for flag in (flag for action in ACTIONS[script] for flag in action.option_strings[-1:]):
        typo = flag + flag[-1]
        assert_one_line(run_here(script, '--' + typo[2:].replace('_', '-'), 3),
                        rf'{typo}, did you mean {flag}\?')


@pytest.mark.parametrize('value', ['nonsense', '', '-1', 'nan'])
@pytest.mark.parametrize('script, flag', TYPED_FLAGS)
def test_a_bad_value_is_one_line_that_names_its_flag(capsys, script, flag, value):
    with pytest.raises(SystemExit, match='^2$'):
        MODULES[script].parse_args([f'{flag}={value}'])
    message = capsys.readouterr().err
    assert message.count('\n') == 1 and flag in message and repr(value) in message


# --- without MNIST -------------------------------------------------------------------------------


@each_script
def test_mnist_that_is_nowhere_is_one_line(tmp_path, run_here, monkeypatch, script):
    for name in PROXIES:
        monkeypatch.setenv(name, 'http://127.0.0.1:9')  # the discard port: refused at once
    monkeypatch.chdir(tmp_path)
    done = run_here(script, '--dataset', 'mnist', '--data_dir', 'empty', '--results_dir',
                    'results')
    assert_one_line(done, 'train-images-idx3-ubyte.*empty.*https://')
    assert not any(tmp_path.iterdir())


@each_script
def test_a_dry_run_works_from_anywhere_offline_and_leaves_no_results(tmp_path, run_script, script):
    here, temporary = tmp_path / 'here', tmp_path / 'temporary'
    here.mkdir(), temporary.mkdir()
    with socket.create_server(('127.0.0.1', 0)) as server:  # whoever wants the network comes here
        proxy = f'http://127.0.0.1:{server.getsockname()[1]}'
        done = run_script(script, '--dry_run', '--data_dir', 'empty', '--results_dir', 'results',
                          cwd=here, environment={name: proxy for name in PROXIES}
                          | {'TMPDIR': str(temporary)})
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert done.returncode == 0, done.stderr
    no_mnist, digits_instead, *of_epochs = done.stderr.splitlines()
    assert no_mnist.startswith('WARNING: no MNIST in empty')
    assert digits_instead.startswith('WARNING:')
    assert all(line.startswith('WARNING: epoch') for line in of_epochs)
    assert not any(here.iterdir())
    name, files = DRY_RUNS[script]
    [folder] = temporary.glob(f'a3_*/{name.partition("_")[0]}*')
    files = sorted(files | {'config.json', 'log.csv', 'checkpoint.pt', 'metrics.json'})
    assert folder.name == name and sorted(path.name for path in folder.iterdir()) == files
    assert done.stdout.splitlines()[-1] == f'files in {folder}: ' + ', '.join(files)
