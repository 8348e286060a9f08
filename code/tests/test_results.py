"""`make -C report results`: what is finished is skipped, what was cut off goes on."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import runs
from helpers import CODE

SPEC = importlib.util.spec_from_file_location('results', CODE.parent / 'report' / 'results.py')
results = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(results)
ALL_JOBS = results.MAIN + results.FIGURES + [job for table in results.ABLATIONS
                                             for job in results.ablation_jobs(table)]
JOB = results.Job('flow', 'a3_nf.py --arch mlp --epochs 3', 1)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Of a run of JOB, as the script's own code leaves it before it trains."""
    monkeypatch.setattr(results, 'REPORT', tmp_path)
    args = importlib.import_module('a3_nf').parse_args(JOB.command.split()[1:])
    args.n_hidden, args.lr, args.precision = 1024, 1e-3, 'fp32'  # chosen by the script
    run = runs.Run(str(CODE / 'a3_nf.py'), args, JOB.folder, {'sha256': {}},
                   torch.device('cpu'), {})
    folder = tmp_path / 'results' / JOB.folder
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(run.config))
    return folder


@pytest.mark.parametrize('job', ALL_JOBS, ids=lambda job: job.folder)
def test_every_command_is_one_of_its_script(job):
    script, *words = job.command.split()
    importlib.import_module(script.removesuffix('.py')).parse_args(words)
    assert job.minutes > 0 and sum(job.folder == other.folder for other in ALL_JOBS) == 1


def test_a_run_is_to_train_then_to_go_on_then_finished(folder):
    assert results.finished(JOB) is False
    (folder / 'metrics.json').write_text('{}')
    assert results.finished(JOB) is True
    (folder / 'config.json').unlink()
    assert results.finished(JOB) is None


@pytest.mark.parametrize('command', ['a3_nf.py --arch mlp', 'a3_nf.py --epochs 3',
                                     'a3_nf.py --arch mlp --epochs 3 --lr 0.1',
                                     'a3_nf.py --arch mlp --epochs 3 --precision bf16'])
def test_a_run_with_other_arguments_is_to_train(folder, command):
    (folder / 'metrics.json').write_text('{}')
    assert results.finished(JOB._replace(command=command)) is None


@pytest.mark.parametrize('text', ['', '[]', '{"arguments": {}}', '{"script_sha256": "0"}', '\0'])
def test_a_config_that_is_none_is_of_a_run_to_train(folder, text):
    (folder / 'config.json').write_text(text)
    assert results.finished(JOB) is None


def test_another_code_is_another_run_and_another_docstring_is_not(folder, tmp_path, monkeypatch):
    code = tmp_path / 'code'
    code.mkdir()
    monkeypatch.setattr(results, 'CODE', code)
    text = (CODE / 'a3_nf.py').read_text()
    (code / 'a3_nf.py').write_text(text.replace('Measured on MNIST', 'Not\n\nmeasured', 1))
    assert results.finished(JOB) is False
    (code / 'a3_nf.py').write_text(text.replace('PIXELS = 28', 'PIXELS = 2 * 14', 1))
    assert results.finished(JOB) is None


def test_a_cut_off_run_is_resumed_and_a_failure_is_passed_on(folder, monkeypatch):
    started = []

    def start(command: list[str]) -> subprocess.CompletedProcess:
        started.append(command)
        return subprocess.CompletedProcess(command, 0 if len(started) == 1 else -9)
    monkeypatch.setattr(subprocess, 'run', start)
    results.train(JOB, 'some data')
    assert {'--resume', '--arch', 'some data'} <= set(started[0])
    (folder / 'config.json').unlink()
    with pytest.raises(SystemExit, match='^137$'):
        results.train(JOB, None)
    assert not {'--resume', '--data_dir'} & set(started[1])


def test_figures_of_several_runs_are_made_again_where_one_of_these_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(results, 'REPORT', tmp_path)
    job, commands = results.FIGURES[0], []
    for name in ('vae', job.folder):
        (tmp_path / 'results' / name).mkdir(parents=True)
        (tmp_path / 'results' / name / 'metrics.json').write_text('{}')
    script, *words = job.command.split()
    args = importlib.import_module(script.removesuffix('.py')).parse_args(words)
    config = runs.describe(str(CODE / script), args, {'sha256': {}}, torch.device('cpu'))
    path = tmp_path / 'results' / job.folder / 'config.json'
    path.write_text(json.dumps(config | {'runs': {'vae': results.sha256('vae')}}))
    assert results.finished(job) is True
    (tmp_path / 'results' / 'vae' / 'metrics.json').write_text('{"other": 1}')
    assert results.finished(job) is None
    monkeypatch.setattr(subprocess, 'run', lambda command: commands.append(command)
                        or subprocess.CompletedProcess(command, 0))
    results.train(job, None)
    assert not {'--run', '--resume'} & set(commands[0])  # these scripts have neither


def test_a_table_of_ablations_is_made_of_the_runs_last_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(results, 'REPORT', tmp_path)
    for n, job in enumerate(results.ablation_jobs('nf')):
        folder = tmp_path / 'results' / job.folder
        folder.mkdir(parents=True)
        (folder / 'log.csv').write_text(f'epoch,val_bpd,train_bpd\n0,8,8\n1,{n}.5,{n}.25\n')
        (folder / 'metrics.json').write_text(f'{{"train_minutes": {n}, "parameters": 7, '
                                             '"seed": 42, "other": 1}')
    results.gather('nf')
    head, first, second, *_ = (tmp_path / 'results' / 'ablations_nf.csv').read_text().splitlines()
    assert head == 'setting,val_bpd,train_bpd,train_minutes,parameters,seed'
    assert first == '--epochs 3,0.5,0.25,0,7,42'
    assert second == '--epochs 3 --n_embedding 0,1.5,1.25,1,7,42'


@pytest.mark.parametrize('words, status, said', [(['--plan'], 0, 'runs to do, about'),
                                                 (['no_such_run'], 2, 'no such run: no_such_run')])
def test_the_plan_is_told_and_a_typo_too(words, status, said):
    done = subprocess.run([sys.executable, CODE.parent / 'report' / 'results.py', *words],
                          capture_output=True, text=True)
    assert done.returncode == status and said in done.stdout + done.stderr
