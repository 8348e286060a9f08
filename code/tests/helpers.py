"""What the tests of several scripts call: what is in a folder, what was said, a run stopped."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

CODE = Path(__file__).resolve().parents[1]
TIMES = ['seconds', 'train_seconds', 'total_seconds']  # the last columns of every log


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


def strike(name: str, count: int, number: int, calls: int = 0) -> None:
    """Have this process get a signal as it writes a file of that name for the count-th time.

    Half of the file is written then; with `calls` all of it, and the project's own code has
    called, and been called and left, so many times since.
    """
    write, seen = Path.write_bytes, []

    def tick(frame: FrameType, *_) -> None:
        seen.extend([0] * frame.f_code.co_filename.startswith(str(CODE)))
        if len(seen) == count + calls:
            sys.setprofile(None)
            os.kill(os.getpid(), number)

    def struck(path: Path, content: bytes) -> int:
        if path.name.startswith(f'{name}.'):
            seen.append(0)
            if len(seen) == count and calls:
                sys.setprofile(tick)
            elif len(seen) == count:
                write(path, content[:len(content) // 2])
                os.kill(os.getpid(), number)
        return write(path, content)

    Path.write_bytes = struck


def serve() -> None:
    """Fork for each line of stdin, and return in the child, which has the imports behind it.

    A line is JSON: the words of a command line, code to be run first, and a path to which '.out'
    and '.err' are added for what is printed. The child's process id is written to stdout, the
    signal that stops it if one does, and in the end its exit code.
    """
    for line in sys.stdin:
        sys.argv, first, printed = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(180)  # a script that hangs would outlive its test
            for number, end in ((1, '.out'), (2, '.err')):
                os.dup2(os.open(printed + end, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            exec(first, {'strike': strike, 'signal': signal})
            return
        print(child, flush=True)
        status = os.waitpid(child, os.WUNTRACED)[1]
        if os.WIFSTOPPED(status):
            print(int(os.WSTOPSIG(status)), flush=True)
            status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()
