"""How strong are the tests? Plant faults in the code, one at a time, and see which tests fail.

A fault is one small change: another operator or number, two arguments swapped, True for False. 60
are drawn from the mathematics and training loops of the MATHS files, 30 from all other code. Each
is planted in a copy of the project, in which the tests named after the module run, and then those
that mention it, until one fails. That takes about half an hour. A fault that survives is a hole in
the tests, or changes nothing that matters: then it belongs in EQUIVALENT, with the reason.

    python code/tests/plant_faults.py [--seed 0] [--only N [N ...]]
"""

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise, repeat
from pathlib import Path
from random import Random
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / 'code' / 'tests'
MATHS = [ROOT / 'code' / f'{name}.py' for name in ('a3_gan', 'a3_nf', 'a3_vae', 'measures')]
NOT_MATHS = ('parse_args', 'main')  # functions of those files
PATIENCE = 300  # seconds for the tests of one fault, which it fails by taking longer
# Words in the names of a module's test files, where they are not the module's own name.
NAMES = {'experiments': 'results', 'measured': 'report', 'submission': 'report',
         **dict.fromkeys(('common', 'mnist', 'bmnist', 'digits'), 'data')}
EQUIVALENT = {  # for each reason, how the faults that it excuses begin as they are printed
    'only how a figure looks': (
        'code/a3_evidence.py: pha=0.25, linewidth=0',
        'code/a3_evidence.py: np.linspace(0, 0.5, 5)', "code/figures.py: 'xtick.labelsize': 8",
        "code/a3_evidence.py: or='0.4', linewidth=0.8", "code/figures.py: '-.', ':', (0, (3, 1,",
        'code/a3_evidence.py: xes.scatter(*z.T, s=0.8'),
    'the pool gets one task': ('code/datasets/common.py: ing.pool.ThreadPool(1)',),
    'larger numbers are refused by their value': ('code/command_line.py: l() and len(text) < 20',),
    'any small dry run will do': ('code/a3_compare.py: n, args.only = 200',)}
OPERATORS = {  # by type: how it is written, and what is planted instead
    ast.Add: ('+', '-'), ast.Sub: ('-', '+'), ast.Mult: ('*', '/'), ast.Div: ('/', '*'),
    ast.FloorDiv: ('//', '/'), ast.Mod: ('%', '//'), ast.Pow: ('**', '*'), ast.MatMult: ('@', '*'),
    ast.Lt: ('<', '<='), ast.LtE: ('<=', '<'), ast.Gt: ('>', '>='), ast.GtE: ('>=', '>'),
    ast.Eq: ('==', '!='), ast.NotEq: ('!=', '=='), ast.Is: ('is', 'is not'),
    ast.IsNot: ('is not', 'is'), ast.In: ('in', 'not in'), ast.NotIn: ('not in', 'in'),
    ast.And: ('and', 'or'), ast.Or: ('or', 'and')}


class Fault(NamedTuple):
    """The bytes from `start` to `end` of a file are to be `new`; `source` is the whole file."""
    path: Path
    start: int
    end: int
    new: bytes
    source: bytes

    def __str__(self) -> str:
        """The file, and 'old -> new' of the change with up to 20 characters on both sides."""
        left = self.source[:self.start].decode().split('\n')[-1][-20:]
        right = self.source[self.end:].decode().split('\n')[0][:20]
        old, new = (' '.join(f'{left}{middle.decode()}{right}'.split())
                    for middle in (self.source[self.start:self.end], self.new))
        return f'{self.path.relative_to(ROOT)}: {old} -> {new}'


def faults_of(path: Path, left_out: tuple[str, ...] = ()) -> Iterator[Fault]:
    """All faults that can be planted in the file, outside the functions left out."""
    source = path.read_bytes()
    line_starts = [0, *(match.end() for match in re.finditer(b'\n', source))]

    def span(node: ast.AST) -> tuple[int, int]:
        return (line_starts[node.lineno - 1] + node.col_offset,
                line_starts[node.end_lineno - 1] + node.end_col_offset)

    def changes(node: ast.AST) -> Iterator[tuple[int, int, bytes]]:
        operations = []
        match node:
            case ast.BinOp(left=left, op=sign, right=right):
                if sign.__class__ in OPERATORS and not is_text(left) and not is_text(right):
                    operations = [(left, sign, right)]
            case ast.Compare(left=left, ops=signs, comparators=others):
                operations = zip([left, *others], signs, others, strict=False)
            case ast.BoolOp(op=sign, values=values):
                operations = zip(values, repeat(sign), values[1:], strict=False)
            case ast.UnaryOp(op=ast.USub() | ast.Not()):
                start, _ = span(node)
                yield start, re.compile(rb'(-|not)\s*').match(source, start).end(), b''
            case ast.Constant(value=bool(value)):
                yield *span(node), str(not value).encode()
            case ast.Constant(value=int(value) | float(value)):
                new = 2 * value if value and isinstance(value, float) else value + 1
                yield *span(node), repr(new).encode()
            case ast.Call(func=func, args=args) if ast.unparse(func) not in ('min', 'max'):
                for (start, a), (b, end) in pairwise(map(span, args)):
                    if b'*' not in (source[start:start + 1], source[b:b + 1]):
                        yield start, end, source[b:end] + source[a:b] + source[start:a]
        for first, sign, second in operations:
            old, new = OPERATORS[type(sign)]
            (_, start), (end, _) = span(first), span(second)
            gap = re.sub(b'#.*', lambda comment: b' ' * len(comment[0]), source[start:end])
            found = re.search(re.escape(old).replace(r'\ ', r'\s+').encode(), gap)
            yield start + found.start(), start + found.end(), new.encode()

    def walk(node: ast.AST) -> Iterator[Fault]:
        yield from (Fault(path, *change, source) for change in changes(node)
                    if source[change[0]:change[1]] != change[2])
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if (isinstance(child, ast.AST) and field not in ('annotation', 'returns')
                        and not is_left_out(child, left_out)):
                    yield from walk(child)
    return walk(ast.parse(source))


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, 'value', None), str)


def is_left_out(node: ast.AST, functions: tuple[str, ...]) -> bool:
    """Whether it is text for the user, the start of a script, or one of these functions."""
    match node:
        case (ast.JoinedStr() | ast.keyword(arg='help' | 'description' | 'metavar')
              | ast.If(test=ast.Compare(left=ast.Name(id='__name__')))):
            return True
    return isinstance(node, ast.FunctionDef) and node.name in functions


def draw(seed: int) -> list[Fault]:
    """The same faults for the same code and seed, in their order in the files."""
    rest = sorted({*ROOT.glob('code/**/*.py'), *ROOT.glob('report/*.py')} - {*MATHS})
    maths = sorted(fault for path in MATHS for fault in faults_of(path, NOT_MATHS))
    others = sorted(fault for path in rest if TESTS not in path.parents
                    for fault in faults_of(path))
    random = Random(seed)
    return sorted(random.sample(maths, 60)) + sorted(random.sample(others, 30))


def tests_of(path: Path) -> list[str]:
    """The test files named after the module, then the others that mention it."""
    word = NAMES.get(path.stem, path.stem.removeprefix('a3_'))
    files = sorted(TESTS.glob('test_*.py'), key=lambda test: test.stem != f'test_{word}')
    return [str(test.relative_to(ROOT)) for test in files if test.stem == f'test_{word}'
            or re.search(rf'\b{path.stem}\b', test.read_text(encoding='utf-8'))]


def noticing(fault: Fault) -> str | None:
    """The first test to fail in a copy of the project with the fault; None if all pass."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = Path(folder, 'project')
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.*', '__pycache__', '*.pt'))
        (copy / fault.path.relative_to(ROOT)).write_bytes(
            fault.source[:fault.start] + fault.new + fault.source[fault.end:])
        words = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider',
                 '-c', 'code/pytest.ini', *tests_of(fault.path)]
        with subprocess.Popen(words, cwd=copy, env=os.environ | {'OMP_NUM_THREADS': '1'},
                              text=True, start_new_session=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT) as process:
            try:
                output, _ = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return f'tests that take more than {PATIENCE} s'
    named = re.search(r'^(?:FAILED|ERROR) ([^\s\[]+)', output, re.M)
    return named[1] if named else f'exit status {process.returncode}' * bool(process.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0, help='seed of the draw (default: 0)')
    parser.add_argument('--only', type=int, nargs='+', metavar='N', help='numbers of faults')
    args = parser.parse_args()
    noticed = judged = 0
    for n, fault in enumerate(draw(args.seed), start=1):
        if args.only and n not in args.only:
            continue
        for reason, beginnings in EQUIVALENT.items():
            if str(fault).startswith(beginnings):
                print(f'{n:2}  {fault}  EQUIVALENT: {reason}', flush=True)
                break
        else:
            test = noticing(fault)
            noticed, judged = noticed + bool(test), judged + 1
            print(f'{n:2}  {fault}  ' + (f'noticed by {test}' if test else 'SURVIVED'), flush=True)
    print(f'{noticed} of {judged} noticed')


if __name__ == '__main__':
    main()
