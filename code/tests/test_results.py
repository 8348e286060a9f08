"""`make -C report results`, its table of runs, and every committed result.

The README's tables have runs as rows and, as the last word of a column's head, the metric's name
in `metrics.json`. A docstring's paragraph that starts with `Measured` names a run and then each
metric with its value.
"""

import ast
import hashlib
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import experiments
import runs
from experiments import Job
from helpers import CODE

ROOT = CODE.parent
COMMITTED = ROOT / 'report' / 'results'
README = (ROOT / 'README.md').read_text(encoding='utf-8')
NAME, DECIMAL = r'`(\w+)`', r'(?<![\w.])\d+\.\d+(?![\w.])'
JOB = Job('flow', 'a3_nf.py --arch mlp --epochs 3', 1)
SPEC = importlib.util.spec_from_file_location('results', ROOT / 'report' / 'results.py')
results = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(results)


# --- the table of runs ---------------------------------------------------------------------------


def test_every_run_of_the_table_has_a_name_of_its_own_and_a_command_of_its_script():
    jobs = experiments.every_job()
    assert len({job.name for job in jobs}) == len(jobs) > 40
    for job in jobs:
        args = importlib.import_module(job.script).parse_args(job.words)
        if job in experiments.ASKED_FOR:
            assert args.name == job.name
    assert {name for names in experiments.NEEDED.values() for name in names} <= {
        job.name for job in experiments.MAIN}
    for name in experiments.COMPARED:
        seeds = [importlib.import_module(job.script).parse_args(job.words)
                 for job in experiments.seeds_of(name)]
        assert [args.seed for args in seeds] == [42, 43, 44][:len(seeds)]


# --- what is to be done --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of a run of JOB, as the script leaves it before it trains."""
    monkeypatch.setattr(results, 'RESULTS', tmp_path)
    module = importlib.import_module(JOB.script)
    config = runs.describe(module.main, module.parse_args(JOB.words), {'sha256': {}},
                           torch.device('cpu'))
    config['arguments']['precision'] = 'fp32'  # what the script chose
    folder = tmp_path / JOB.name
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config | {'fingerprint': prints(1.)}))
    (folder / 'checkpoint.pt').write_bytes(b'')
    monkeypatch.setattr(runs, 'fingerprint', lambda main, args: prints(1.))
    return folder


def prints(value: float) -> dict:
    return {'torch': torch.__version__, 'numbers': {'loss_nats': value}}


def test_a_run_is_cut_off_then_finished_and_to_do_without_a_readable_config(folder):
    assert results.state(JOB) == 'cut off'
    (folder / 'metrics.json').write_text('{}')
    assert results.state(JOB) == 'finished'
    (folder / 'checkpoint.pt').unlink()  # results are committed without it
    assert results.state(JOB) == 'finished'
    for text in ('', '[]', '{"arguments": {}}', '\0'):
        (folder / 'config.json').write_text(text)
        assert results.state(JOB) == 'to do'


@pytest.mark.parametrize('command', ['a3_nf.py --arch mlp', 'a3_nf.py --epochs 3',
                                     'a3_nf.py --arch mlp --epochs 3 --precision bf16'])
def test_a_run_with_other_arguments_is_to_do(folder, command):
    (folder / 'metrics.json').write_text('{}')
    assert results.state(JOB._replace(command=command)) == 'to do'


def test_a_run_by_code_that_does_something_else_is_to_do(folder, monkeypatch):
    (folder / 'metrics.json').write_text('{}')
    monkeypatch.setattr(runs, 'fingerprint', lambda main, args: prints(1.00001))
    assert results.state(JOB) == 'finished'
    monkeypatch.setattr(runs, 'fingerprint', lambda main, args: prints(1.001))
    assert results.state(JOB) == 'to do'


def test_figures_are_to_do_where_a_run_that_they_show_is_new_or_only_some_were_made(
        tmp_path, monkeypatch):
    monkeypatch.setattr(results, 'RESULTS', tmp_path)
    job = experiments.FIGURES[0]
    for name in ('vae', job.name):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.json').write_text('{}')
    module = importlib.import_module(job.script)
    config = runs.describe(module.main, module.parse_args(job.words), {'sha256': {}},
                           torch.device('cpu')) | {'runs': {'vae': results.sha256('vae')}}
    path = tmp_path / job.name / 'config.json'
    path.write_text(json.dumps(config))
    assert results.state(job) == 'finished'
    path.write_text(json.dumps(config | {'arguments': config['arguments'] | {'only': ['codes']}}))
    assert results.state(job) == 'to do'
    path.write_text(json.dumps(config))
    (tmp_path / 'vae' / 'metrics.json').write_text('{"other": 1}')
    assert results.state(job) == 'to do'


# --- doing it ------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path, monkeypatch) -> list[list[str]]:
    """The commands that results.py starts, none of which runs; a run called `bad` fails."""
    commands = []

    def start(command: list[str], **options) -> subprocess.CompletedProcess:
        commands.append([*command[1:], options['env']['OMP_NUM_THREADS']])
        return subprocess.CompletedProcess(command, -9 if 'bad' in command else 0)
    monkeypatch.setattr(results, 'RESULTS', tmp_path)
    monkeypatch.setattr(subprocess, 'run', start)
    monkeypatch.setattr(results.os, 'cpu_count', lambda: 4)
    monkeypatch.setattr(experiments, 'ABLATIONS', {})
    return commands


def run_results(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, 'argv', ['results.py', *words])
    results.main()


def test_stale_runs_are_replaced_cut_off_ones_resumed_and_threads_shared_out(
        started, monkeypatch, tmp_path):
    jobs = [JOB, JOB._replace(name='other', data='MNIST/raw')]
    monkeypatch.setattr(experiments, 'MAIN', jobs)
    monkeypatch.setattr(experiments, 'FIGURES', [])
    monkeypatch.setattr(results, 'state', lambda job: 'cut off' if job is JOB else 'to do')
    run_results(monkeypatch, '--data_dir', str(tmp_path / 'a b'), '--jobs', '2')
    first, second = sorted(started, key=lambda words: 'other' in words)
    assert first[-3:] == [JOB.name, '--resume', '2'] and second[-3:] == ['other', '--overwrite',
                                                                         '2']
    assert str(tmp_path / 'a b') in first and str(tmp_path / 'a b' / 'MNIST/raw') in second


def test_a_figure_brings_the_runs_that_it_needs_and_that_have_no_weights(
        started, monkeypatch, tmp_path, capsys):
    figure = Job('figure', 'a3_compare.py', 1)
    jobs = [Job(name, 'a3_nf.py', 1) for name in ('a', 'b', 'c')]
    monkeypatch.setattr(experiments, 'MAIN', jobs)
    monkeypatch.setattr(experiments, 'FIGURES', [figure])
    monkeypatch.setattr(experiments, 'NEEDED', {'figure': ['a', 'b']})
    (tmp_path / 'a').mkdir()
    for name in ('metrics.json', 'checkpoint.pt'):
        (tmp_path / 'a' / name).write_text('')
    monkeypatch.setattr(results, 'state',
                        lambda job: 'to do' if job is figure else 'finished')
    run_results(monkeypatch, '--plan')
    assert started == [] and '2 runs to make, about 2 minutes' in capsys.readouterr().out
    run_results(monkeypatch)
    assert [words[0].rpartition('/')[2] for words in started] == ['a3_nf.py', 'a3_compare.py']
    assert 'b' in started[0] and not {'--run', '--overwrite'} & set(started[1])


def test_a_failure_ends_everything_with_its_status(started, monkeypatch):
    monkeypatch.setattr(experiments, 'MAIN',
                        [JOB._replace(name=name) for name in ('bad', *'abcdef')])
    start = subprocess.run  # all but the first take a while, so that there is something to cancel
    monkeypatch.setattr(subprocess, 'run', lambda command, **options: (
        time.sleep(0.5 * bool(started)), start(command, **options))[1])
    monkeypatch.setattr(experiments, 'FIGURES', [])
    monkeypatch.setattr(results, 'state', lambda job: 'to do')
    with pytest.raises(SystemExit, match='^137$'):
        run_results(monkeypatch)
    assert len(started) < 7


def test_a_table_of_ablations_has_the_last_figures_of_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(results, 'RESULTS', tmp_path)
    for n, job in enumerate(experiments.ablation_jobs('nf')):
        folder = tmp_path / job.name
        folder.mkdir(parents=True)
        (folder / 'log.csv').write_text(f'epoch,val_bpd,train_bpd\n0,8,8\n1,{n}.5,{n}.25\n')
        (folder / 'metrics.json').write_text(f'{{"train_minutes": {n}, "parameters": 7, "seed": 42'
                                             ', "val_bpd": 9, "val_frechet": 30, "other": 1}')
    results.gather('nf')
    head, first, second, *_ = (tmp_path / 'ablations_nf.csv').read_text().splitlines()
    assert head == 'setting,val_bpd,val_frechet,train_minutes,parameters,seed'
    assert first == '--epochs 1,0.5,30,0,7,42'
    assert second == '--epochs 1 --seed 43,1.5,30,1,7,42'


# --- what is committed ---------------------------------------------------------------------------


def committed(name: str) -> str:
    """The text of a results file as committed: a run of the user's own may stand in its place."""
    path = f'report/results/{name}'
    try:
        return subprocess.run(['git', 'show', f'HEAD:{path}'], cwd=ROOT, check=True,
                              capture_output=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        return (ROOT / path).read_text(encoding='utf-8')


def assert_measured(typed: str, run: str, metric: str) -> None:
    """The metric, rounded as the text rounds it, is what the text says."""
    value = json.loads(committed(f'{run}/metrics.json'))[metric]
    typed = typed.replace(',', '')
    assert f'{value:.{len(typed.partition(".")[2])}f}' == typed, f'{run}: {metric}'


def test_readme_says_what_the_runs_measured_and_types_no_other_decimals():
    claims = []
    for table in re.findall(r'(?:^\|.*\n)+', README, flags=re.M):
        head, _, *rows = [line.strip('|').split('|') for line in table.splitlines()]
        for name, *cells in rows:
            run = re.fullmatch(NAME, name.strip())
            for title, cell in zip(head[1:], cells, strict=True):
                metric = re.search(NAME + r'\s*$', title)
                typed = re.search(r'\d[\d,.]*', cell)
                if run and metric and typed:
                    claims.append((typed.group(), run.group(1), metric.group(1)))
    assert len(claims) > 50
    for claim in claims:
        assert_measured(*claim)
    prose = re.sub(r'(?:^\|.*\n)+', '', README, flags=re.M)
    assert set(re.findall(DECIMAL, prose)) <= {'3.11'}  # Python's version


@pytest.mark.parametrize('script', ['a3_vae.py', 'a3_gan.py', 'a3_nf.py', 'a3_ae.py'])
def test_docstring_says_what_its_runs_measured(script):
    docstring = ast.get_docstring(ast.parse((CODE / script).read_text(encoding='utf-8')))
    measured = re.search(r'^Measured.*?(?=\n\n|\Z)', docstring, flags=re.M | re.S).group()
    parts = re.split(r'`(\w+)`:', measured)[1:]  # run, its claims, run, its claims …
    assert len(parts) >= 2
    for run, claims in zip(parts[::2], parts[1::2], strict=True):
        found = re.findall(r'([a-z]\w+)\s+(\d+(?:\.\d+)?)', claims)
        assert found and len(found) >= len(re.findall(DECIMAL, claims))
        for metric, typed in found:
            assert_measured(typed, run, metric)


@pytest.mark.parametrize('job', [
    job if job in experiments.ASKED_FOR else pytest.param(job, marks=pytest.mark.slow)
    for job in experiments.every_job()], ids=lambda job: job.name)
def test_every_run_is_of_the_present_code(job, real_fingerprint):
    config = json.loads(committed(f'{job.name}/config.json'))
    module = importlib.import_module(job.script)
    args = module.parse_args(job.words)
    assert not runs.difference(config, {'arguments': vars(args)})
    if config['fingerprint']['torch'] != torch.__version__:
        pytest.skip(f'the fingerprint is of torch {config["fingerprint"]["torch"]}')
    present = {'arguments': vars(args), 'fingerprint': runs.fingerprint(module.main, args)}
    assert not runs.difference(config, present)
    for run, digest in config.get('runs', {}).items():
        content = committed(f'{run}/metrics.json').encode()
        assert hashlib.sha256(content).hexdigest() == digest, run
