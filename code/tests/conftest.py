"""What the tests share: one thread, scripts started as a user starts them, runs to compare."""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from datasets import digits
from helpers import CODE, read_csv

# The script as it is, on fewer of the shipped digits: the same path in a fifth of the time.
FEWER_DIGITS = (600, 200, 100)
ON_FEWER_DIGITS = f"""
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
from datasets import digits
digits.SIZES = {FEWER_DIGITS}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""

torch.set_num_threads(1)


@pytest.fixture(scope='session')
def start_script() -> Callable[..., subprocess.Popen]:
    """Start `script` with the words of its command line, in a process of its own.

    `fewer_digits` keeps a run short; without it the script starts as `python code/<script>`.
    `environment` comes on top of this process's own; other options are those of Popen.
    """
    def start(script: str, *words: object, fewer_digits: bool = False,
              environment: dict[str, str] | None = None, **options) -> subprocess.Popen:
        python = [sys.executable, '-c', ON_FEWER_DIGITS] if fewer_digits else [sys.executable]
        threads = {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(CODE), 'PYTHONIOENCODING': 'utf-8'}
        return subprocess.Popen([*python, str(CODE / script), *map(str, words)],
                                env={**os.environ, **threads, **(environment or {})}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    return start


@pytest.fixture(scope='session')
def run_script(start_script: Callable) -> Callable[..., subprocess.CompletedProcess]:
    """`start_script`, and wait for the end."""
    def run(*words: object, **options) -> subprocess.CompletedProcess:
        with start_script(*words, **options) as process:
            try:
                stdout, stderr = process.communicate(timeout=180)
            finally:
                process.kill()  # a script that hangs would outlive its test
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)
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
            runs.launch(module.main, module.parse_args())
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
    def is_decided(name: str) -> bool:
        return not name.endswith(('seconds', 'minutes', 'memory_mb'))

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return list(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest()
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items() if is_decided(str(key))}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    def read_file(path: Path) -> Any:
        if path.suffix == '.pt':
            return plain(torch.load(path, weights_only=True))
        if path.name == 'metrics.json':
            return plain(json.loads(path.read_text()))
        if path.name == 'log.csv':
            return plain(read_csv(path))
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def read(folder: Path) -> dict:
        config = json.loads((folder / 'config.json').read_text())
        config['arguments'] = {name: value for name, value in config['arguments'].items()
                               if name not in ('results_dir', 'run', 'resume')}
        others = {path.name: read_file(path) for path in folder.iterdir()
                  if path.name != 'config.json'}
        return others | {'config.json': config}
    return read
