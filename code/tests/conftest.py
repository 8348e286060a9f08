"""What the tests share: one thread, scripts started as a user starts them, runs to compare."""

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import command_line
import runs
from datasets import digits
from helpers import CODE, read_csv

FEWER_DIGITS = 600, 200, 100  # of the shipped ones: the same path in a fifth of the time

torch.set_num_threads(1)
computed_fingerprint = runs.fingerprint
runs.fingerprint = lambda main, args: {}  # it takes seconds: a test that is about it asks for it


@pytest.fixture
def real_fingerprint(monkeypatch) -> None:
    """`runs.fingerprint` as users have it, for the length of one test."""
    monkeypatch.setattr(runs, 'fingerprint', computed_fingerprint)


@pytest.fixture(scope='session')
def run_script() -> Callable[..., subprocess.CompletedProcess]:
    """Start `python code/<script>` with these words, wait for the end; options as in `Popen`."""
    def run(script: str, *words: object, **options) -> subprocess.CompletedProcess:
        done = subprocess.run([sys.executable, CODE / script, *map(str, words)], text=True,
                              capture_output=True, timeout=180, **options)
        return subprocess.CompletedProcess((script, *words), done.returncode, done.stdout,
                                           done.stderr)
    return run


@pytest.fixture
def run_here(monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess]:
    """`run_script` on fewer digits in this process, for what needs none of its own: it is fast."""
    monkeypatch.setattr(digits, 'SIZES', FEWER_DIGITS)

    def run(script: str, *words: object) -> subprocess.CompletedProcess:
        module = importlib.import_module(Path(script).stem)
        monkeypatch.setattr(sys, 'argv', [script, *map(str, words)])
        status = 0
        try:
            command_line.launch(module.main, module.parse_args())
        except SystemExit as end:
            status = end.code
        return subprocess.CompletedProcess((script, *words), status, *capsys.readouterr())
    return run


@pytest.fixture
def copied(finished: tuple, tmp_path: Path) -> Path:
    """A copy of the folder of the module's finished run, alone in its results folder."""
    return Path(shutil.copytree(finished[0], tmp_path / 'results' / finished[0].name))


@pytest.fixture(scope='session')
def read_run() -> Callable[[Path], dict]:
    """What is in a run's folder, by file, but for times, memory and paths: what a seed decides.

    Tensors and figures as digests, so that a difference can be read.
    """
    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return list(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest()
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()
                    if not str(key).endswith(runs.TIMES)}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    def read_file(path: Path) -> Any:
        if path.suffix == '.pt':
            return plain(torch.load(path, weights_only=True))
        if path.suffix == '.json':
            return plain(json.loads(path.read_text()))
        if path.name == 'log.csv':
            return plain(read_csv(path))
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def read(folder: Path) -> dict:
        left = {path.name: read_file(path) for path in folder.iterdir()}
        for name in ('results_dir', 'run', 'resume', 'overwrite'):
            left['config.json']['arguments'].pop(name, None)
        return left
    return read
