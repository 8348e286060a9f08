"""What the tests of several scripts call: what is in a folder, what was said, a run stopped."""

import csv
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CODE = Path(__file__).resolve().parents[1]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}


def assert_one_line(done: subprocess.CompletedProcess, words: str) -> None:
    """The script ended with status 2 and one line on stderr that matches `words`."""
    name = Path(done.args[0]).name
    assert done.returncode == 2 and re.fullmatch(f'{name}: error: .*{words}.*\n', done.stderr)


def wait_for_epoch(process: subprocess.Popen, folder: Path, epoch: int) -> None:
    """Return as soon as the log has the epoch, with the run still going on."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (folder / 'log.csv').is_file() and (folder / 'log.csv').read_text().count(
                '\n') >= epoch + 2:
            return
        time.sleep(0.005)
    process.kill()
    pytest.fail(f'no epoch {epoch} in the log: {process.communicate()}')


def stop_twice(start_script: Callable, folder: Path, *words: object) -> list[str]:
    """Kill a run, resume it and interrupt it. Returns the words that it says to go on with."""
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
    _, command = stderr.strip().split('go on with: python ')
    return shlex.split(command)
