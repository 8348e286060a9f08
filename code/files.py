"""Files that are whole whenever anything stops the program: JSON, CSV, and whatever else."""

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write to. It takes its name when the block ends, and never if the block fails."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a whole text, in UTF-8."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: Path | str, content: dict) -> None:
    """Write JSON that a person can read."""
    write_text(path, json.dumps(content, indent=2) + '\n')


def write_csv(path: Path | str, rows: list[dict]) -> None:
    """Write rows of the same keys: floats to six significant digits, None as an empty cell."""
    def cell(value: Any) -> str:
        return '' if value is None else f'{value:.6g}' if isinstance(value, float) else str(value)
    lines = [','.join(rows[0])] + [','.join(map(cell, row.values())) for row in rows]
    write_text(path, '\n'.join(lines) + '\n')


def read_csv(path: Path | str) -> list[dict[str, str]]:
    """The rows of a CSV file with a header."""
    with open(path, encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))
