"""What the tests of several scripts call: what is in a folder, and what was said."""

import re
import subprocess
from pathlib import Path

from files import read_csv  # noqa: F401 - for the tests that read a run's folder

CODE = Path(__file__).resolve().parents[1]
TIMES = ['seconds']  # the last columns of every log


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}


def assert_one_line(done: subprocess.CompletedProcess, words: str) -> None:
    """The script ended with status 2 and one line on stderr that matches `words`."""
    name = Path(done.args[0]).name
    assert done.returncode == 2 and re.fullmatch(f'{name}: error: .*{words}.*\n', done.stderr)
