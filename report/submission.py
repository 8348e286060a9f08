"""Pack what is handed in: `make -C report submission NAME=lastname`."""

import re
import sys
import zipfile
from pathlib import Path

REPORT = Path(__file__).resolve().parent
ROOT = REPORT.parent


def main(name: str) -> None:
    """Write `<name>_assignment3.zip` beside the report: the report, and all code in folders."""
    if not re.fullmatch(r"[^\W_][\w'-]*", name):
        sys.exit(f'submission.py: error: expected a last name as in NAME=lastname, got {name!r}')
    path = REPORT / f'{name}_assignment3.zip'
    code = sorted(ROOT.glob('code/**/*.py'))
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for file in (REPORT / 'report.pdf', *code):
            archive.write(file, file.relative_to(ROOT))
    print(f'{path}: the report and {len(code)} files of code')


if __name__ == '__main__':
    main(sys.argv[1])
