"""One run of one script: its command line, its folder, its checkpoint. Nothing here knows a model.

A run's folder `report/results/<run>/` holds `config.json`, `log.csv`, `checkpoint.pt`, figures
and, once the run has ended, `metrics.json`. Every file is written under a temporary name and then
renamed: whenever a run is stopped, its files are whole. Randomness is seeded for each epoch from
(seed, epoch), so a run that was stopped and resumed ends with the same weights, log and figures
as one that never was, bit for bit on one machine.
"""

import argparse
import ast
import difflib
import hashlib
import io
import json
import math
import os
import pickle
import platform
import shlex
import signal
import sys
import tempfile
import time
import tokenize
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent  # the project's folder, where default paths start
CHECKPOINT_FORMAT = 1
# Arguments that are not part of what a run is (the device is, as it was picked).
NEUTRAL = ('device', 'data_dir', 'results_dir', 'run', 'dataset', 'resume', 'dry_run', 'sample',
           'save_interval')
OWN_FILES = ('.json', '.csv', '.pt', '.png', '.pdf')  # what a run leaves in its folder


class Terminated(KeyboardInterrupt):
    """SIGTERM: someone else wants the process to end."""


class RunError(Exception):
    """What a run cannot go on with, in one line; `status` is the exit status that it ends with."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


# --- the command line ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and dashes accepted for underscores."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_shared_arguments(self, trains: bool = True) -> None:
        """The flags that all scripts share, and those of the ones that train a model."""
        add = self.add_argument
        add('--seed', type=whole_number(0), default=42, help='of all randomness (default: 42)')
        add('--device', default='auto', help='auto (cuda, then mps, then cpu), cpu, cuda:1, …')
        add('--data_dir', type=Path, default=ROOT / 'data',
            help='where MNIST is, or is downloaded to')
        add('--results_dir', type=Path, default=ROOT / 'report' / 'results',
            help='where the folders of runs are')
        if trains:
            add('--run', metavar='NAME', help='of its folder (default: says what is not default)')
        add('--dataset', choices=('mnist', 'digits'),
            help='default: mnist, or where there is none the digits shipped with the project')
        if trains:
            add('--resume', action='store_true', help="go on from the run's checkpoint")
        add('--dry_run', action='store_true',
            help='the whole path on a few batches, into a temporary folder, offline')
        if trains:
            add('--sample', type=whole_number(1), metavar='N',
                help="draw N samples from the run's checkpoint, and stop")

    def parse_args(self, args: list[str] | None = None, namespace: Any = None):
        if hasattr(sys.stdout, 'reconfigure'):
            sys.stdout.reconfigure(errors='replace')  # a terminal without Greek is no fault
        words = sys.argv[1:] if args is None else args
        parsed = super().parse_args([underscored(word) for word in words], namespace)
        if getattr(parsed, 'sample', None) and (parsed.dry_run or parsed.resume):
            self.error('--sample only draws: leave out --dry_run and --resume')
        return parsed

    def error(self, message: str):
        if message.startswith('unrecognized arguments: --'):
            flag = message.split()[2].partition('=')[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            message = f'unknown flag {flag}' + (f', did you mean {close[0]}?' if close else '')
        self.exit(2, f'{self.prog}: error: {message} (--help lists the flags)\n')


def underscored(word: str) -> str:
    """`--data-dir=a-b` as `--data_dir=a-b`; any other word as it is."""
    flag, equals, value = word.partition('=')
    return '--' + flag[2:].replace('-', '_') + equals + value if word[:2] == '--' else word


def whole_number(least: int, most: int = 10 ** 9) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""
    def parse(text: str) -> int:
        if not (text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(
                f'expected a whole number from {least} to {most:,}, got {text!r}')
        return int(text)
    return parse


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number from `least` to `most`."""
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and math.isfinite(value)):
            bounds = f'≥ {least:g}' + (f' and ≤ {most:g}' if most < math.inf else '')
            raise argparse.ArgumentTypeError(f'expected a number {bounds}, got {text!r}')
        return value
    return parse


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is cuda, then mps, then cpu. Raises RunError."""
    if name == 'auto':
        name = ('cuda' if torch.cuda.is_available() else
                'mps' if torch.backends.mps.is_available() else 'cpu')
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # the device `meta` holds no numbers
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise RunError(f'--device {name}: {str(error).splitlines()[0]}') from None


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices faster in bfloat16 than in float32, by its kind."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = getattr(torch.cpu, 'get_capabilities', dict)() if device.type == 'cpu' else {}
    return bool(features.get('avx512_bf16') or features.get('amx_bf16'))


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """`main(args)`, with what a user can mend told in one line and a fitting exit status."""
    script = Path(sys.argv[0]).name

    def terminate(*_) -> None:
        raise Terminated

    def complain(error: Exception | str) -> None:
        print(f'{script}: error: {" ".join(str(error).split())}', file=sys.stderr)

    signal.signal(signal.SIGTERM, terminate)
    try:
        main(args)
    except KeyboardInterrupt as stop:
        ended, status = ('terminated', 143) if isinstance(stop, Terminated) else ('interrupted',
                                                                                 130)
        words = [word for word in sys.argv if word != '--resume']
        print(f'\n{script}: {ended}' + (
            '' if args.dry_run or getattr(args, 'sample', True) else
            f'; go on with: python {shlex.join(words)} --resume'), file=sys.stderr)
        sys.exit(status)
    except (RunError, OSError) as error:
        complain(error)
        sys.exit(getattr(error, 'status', 2))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and 'alloc' not in str(error):
            raise
        complain(f'not enough memory for these arguments: {error}')
        sys.exit(2)


def seed_all(seed: int, stream: int | str) -> None:
    """Seed torch's generators from (seed, stream): an epoch, or the name of what is drawn."""
    words = list(str(stream).encode())
    state = np.random.SeedSequence([seed, len(words), *words]).generate_state(2)
    torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


# --- the folder ----------------------------------------------------------------------------------


def write_atomic(path: Path | str, content: bytes | memoryview | str) -> None:
    """Write a file whole or not at all: under a temporary name beside it, then renamed."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path | str, rows: list[dict]) -> None:
    """Rows of the same keys as CSV: floats to six significant digits, None as an empty cell."""
    def cell(value: Any) -> str:
        return '' if value is None else f'{value:.6g}' if isinstance(value, float) else str(value)
    lines = [','.join(rows[0])] + [','.join(map(cell, row.values())) for row in rows]
    write_atomic(path, '\n'.join(lines) + '\n')


def run_name(prefix: str, parser: Parser, args: argparse.Namespace, told: tuple[str, ...],
             source: dict) -> str:
    """The run's folder: `--run`, or the prefix and each argument that is not at its default.

    Args:
        prefix: as in `vae_z20`.
        told: arguments that the prefix tells already, or that do not touch training.
        source: of the data set; the shipped digits add `_digits`.
    """
    if args.run is not None:
        return args.run
    words = [prefix] + [f'{name.replace("_", "")}{value}' for name, value in vars(args).items()
                        if name not in NEUTRAL + told and value != parser.get_default(name)]
    return '_'.join(words + ['digits'] * (source['dataset'] == 'digits'))


def script_digest(script: Path | str) -> str:
    """The sha256 of a script's code without comments, docstrings and blank lines, which make no
    result."""
    text = Path(script).read_text(encoding='utf-8')
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if (isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                and ast.get_docstring(node) is not None):
            first, last = node.body[0].lineno - 1, node.body[0].end_lineno
            lines[first:last] = [''] * (last - first)
    code = '\n'.join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()


def from_root(path: Path) -> str:
    """The path as seen from the project's root if it is inside, so that config.json can move."""
    path = path.absolute()
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT.parent) else str(path)


def describe(script: str, args: argparse.Namespace, source: dict, device: torch.device) -> dict:
    """What `config.json` says: the script, its arguments, its data, and where it ran."""
    return {
        'script': Path(script).stem,
        'script_sha256': script_digest(script),
        'arguments': {name: from_root(value) if isinstance(value, Path) else value
                      for name, value in vars(args).items()},
        'data': source, 'device': str(device), 'hardware': hardware(device),
        'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                     'numpy': np.__version__},
    }


def hardware(device: torch.device) -> str:
    """The processor's name and the threads used, or the accelerator's name."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next(line for line in lines if line.startswith('model name')).split(': ')[1]
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f'{name}, {torch.get_num_threads()} threads'


def peak_memory_mb() -> float | None:
    """The most memory that this process has held, in MB (10⁶ bytes); None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def load_checkpoint(path: Path, script: str, parts: dict[str, Any], rows: list[dict]) -> None:
    """Read a checkpoint into `parts` (some or all of them) and `rows`.

    Raises RunError, in one line, where it is no whole checkpoint of that script and these parts.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch leaves the checksums unread
            if archive.testzip():
                raise ValueError('its checksums do not fit')
        saved = torch.load(path, map_location='cpu', weights_only=True)
        if saved['format'] != CHECKPOINT_FORMAT:
            raise RunError(f'{path} is of format {saved["format"]}, '
                           f'this code reads format {CHECKPOINT_FORMAT}')
        if saved['script'] != script:
            raise RunError(f'{path} is of {saved["script"]}.py, not of {script}.py')
        for name, part in parts.items():
            part.load_state_dict(saved['parts'][name])
        rows[:] = saved['rows']
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError,
            AttributeError, AssertionError, zipfile.BadZipFile, zlib.error) as error:
        reason = ('more than tensors and numbers' if isinstance(error, pickle.UnpicklingError)
                  else ' '.join(str(error).split()) or type(error).__name__)
        raise RunError(f'{path} is damaged or of another model: {reason}') from None


def load_trained(folder: Path, command: str, part: str,
                 make: Callable[[argparse.Namespace], torch.nn.Module]) -> torch.nn.Module:
    """The trained network of a finished run, in evaluation mode.

    Args:
        folder: of the run.
        command: that makes the run, as `a3_vae.py --zdim 20`.
        part: of the checkpoint, as `model`.
        make: the untrained network, from the arguments of the run.

    Raises:
        RunError: in one line, where the run is missing or unfinished (then with the command) or
            damaged.
    """
    script = command.split()[0].removesuffix('.py')
    if not all((folder / name).is_file() for name in ('metrics.json', 'checkpoint.pt')):
        raise RunError(f'{folder} is missing, unfinished or without its weights; '
                       f'make it with: python code/{command}')
    try:
        arguments = json.loads((folder / 'config.json').read_text())['arguments']
        network = make(argparse.Namespace(**arguments))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise RunError(f'{folder / "config.json"} is not the config of {script}.py: '
                       f'{error}') from None
    load_checkpoint(folder / 'checkpoint.pt', script, {part: network}, [])
    return network.eval()


class Run:
    """The folder of one run, and how far the run has come.

    Args:
        script: the script's `__file__`.
        args: its arguments; `epochs`, `seed`, `resume`, `dry_run` and `results_dir` are heeded.
        name: of the folder.
        source: what the data set is, as JSON can hold it.
        device: that the run computes on.
        parts: whatever has `state_dict` and `load_state_dict`, by name: the checkpoint's content.
    """

    def __init__(self, script: str, args: argparse.Namespace, name: str, source: dict,
                 device: torch.device, parts: dict[str, Any]):
        if not name or name.startswith('.') or Path(name).name != name:
            raise RunError(f'--run: expected the name of a folder, got {name!r}')
        self.args, self.parts = args, parts
        parent = Path(tempfile.mkdtemp(prefix='a3_')) if args.dry_run else args.results_dir
        self.folder: Path = parent / name
        self.rows: list[dict] = []
        self.config = describe(script, args, source, device)
        self.bar = tqdm(disable=True)
        self.clock = time.perf_counter()  # when the last epoch ended
        self.train_seconds = 0.  # of this epoch's batches

    def path(self, name: str) -> Path:
        """The path of a file of this run."""
        return self.folder / name

    def load(self, *alike: str) -> None:
        """Read the checkpoint into `parts` and `rows`. Raises RunError where it does not fit.

        Args:
            alike: arguments that must be as they were, since no tensor's shape tells them.
        """
        path = self.path('checkpoint.pt')
        if not path.is_file():
            raise RunError(f'{path} does not exist: train this run first')
        if alike:
            self.refuse_differences(*alike)
        load_checkpoint(path, self.config['script'], self.parts, self.rows)

    def begin(self, batches: int) -> bool:
        """Make the folder, or with `--resume` go on from its checkpoint.

        Args:
            batches: in one epoch, for the progress bar.

        Returns:
            False where `--resume` finds a finished run, and there is nothing to do.
        """
        if self.args.resume and self.path('metrics.json').is_file():
            self.refuse_differences()
            print(f'{self.folder} is finished already ({self.args.epochs} epochs): '
                  'nothing was changed')
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hold()
        if self.args.resume and self.path('checkpoint.pt').is_file():
            self.refuse_differences()
            self.load()
            print(f'{self.folder}: going on after epoch {self.rows[-1]["epoch"]}')
        else:
            if self.args.resume:
                print(f'{self.folder}: no checkpoint to resume from, starting anew')
            self.clear()
            print(f'{self.folder}: {"dry run" if self.args.dry_run else "new run"} '
                  f'on {self.config["device"]}, {self.config["data"]["description"]}')
        for path in self.folder.glob('*.tmp'):  # of a run that was killed while writing
            path.unlink()
        write_atomic(self.path('config.json'), json.dumps(self.config, indent=2) + '\n')
        self.bar = tqdm(total=self.args.epochs * batches, disable=not sys.stderr.isatty(),
                        initial=max(0, len(self.rows) - 1) * batches, unit='batch', leave=False)
        return True

    def hold(self) -> None:
        """Keep other runs out of the folder until this process ends, in whatever way.

        Raises RunError where another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return
        path = self.folder.with_name(f'.{self.folder.name}.lock')
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(lock, 20).decode()
                os.close(lock)
                raise RunError(f'{self.folder} is in use by process {holder}') from None
            except OSError:
                pass  # a file system without locks
            if os.fstat(lock).st_nlink:
                break
            os.close(lock)  # its last holder has just removed the file

        def release() -> None:
            path.unlink(missing_ok=True)
            os.close(lock)
        weakref.finalize(self, release)
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())

    def clear(self) -> None:
        """Remove what an earlier run left here: its figures would pass for this one's."""
        path = self.path('config.json')
        if path.is_file():
            try:
                script = json.loads(path.read_text())['script']
            except (ValueError, KeyError, TypeError):
                script = 'something else'
            if script != self.config['script']:
                raise RunError(f'{self.folder} holds files of {script}: choose another --run')
            for path in self.folder.iterdir():
                if path.suffix in OWN_FILES and path.is_file():
                    path.unlink()
        self.path('metrics.json').unlink(missing_ok=True)

    def refuse_differences(self, *only: str) -> None:
        """Raise RunError where the run in the folder had other arguments, device or data.

        Args:
            only: the arguments to compare; all that change a result, if none are named.
        """
        path = self.path('config.json')
        try:
            before, now = (
                {name: value for name, value in config['arguments'].items() if name not in NEUTRAL}
                | {'device': config['device']} | config['data']['sha256']
                for config in (json.loads(path.read_text()), self.config))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f'{path} is not the config of a run: {error}') from None
        for name in only or now | before:
            if before.get(name) != now.get(name):
                raise RunError(f'{self.folder} is another run: {name} was {before.get(name)}, '
                               f'is now {now.get(name)}')

    def epochs(self) -> Iterator[int]:
        """The epochs yet to be run, 0 (the untrained network) to `--epochs`, each seeded anew."""
        for epoch in range(len(self.rows), self.args.epochs + 1):
            seed_all(self.args.seed, epoch)
            yield epoch

    def track(self, batches: Iterable) -> Iterator:
        """The batches of an epoch to train on; the progress bar and a clock see them go by."""
        start = time.perf_counter()
        for batch in batches:
            yield batch
            self.bar.update()
        self.train_seconds = time.perf_counter() - start

    def check_finite(self, row: dict) -> None:
        """Raise RunError, with exit status 1, where a number of the epoch's row is not finite."""
        for name, value in row.items():
            if value is not None and not math.isfinite(value):
                kept = (f'{self.path("checkpoint.pt")} is of epoch {row["epoch"] - 1}'
                        if self.rows else 'there is no checkpoint yet')
                raise RunError(f'{name} is {value} after epoch {row["epoch"]}; {kept}', status=1)

    def end_epoch(self, row: dict) -> None:
        """Write the epoch's row to the log, and a checkpoint.

        The row has `epoch` and `seconds`, of training and evaluation; of them `train_seconds`,
        and `total_seconds` since the last epoch ended, are added here.
        """
        self.check_finite(row)
        self.rows.append(row | {'train_seconds': self.train_seconds,
                                'total_seconds': self.lap()})
        content = io.BytesIO()
        torch.save({'format': CHECKPOINT_FORMAT, 'script': self.config['script'],
                    'rows': self.rows,
                    'parts': {name: part.state_dict() for name, part in self.parts.items()}},
                   content)
        write_csv(self.path('log.csv'), self.rows)  # first: what the checkpoint has is not redone
        write_atomic(self.path('checkpoint.pt'), content.getbuffer())  # a view: no second copy
        figures = [f'{name} {value:.4g}' for name, value in row.items()
                   if name != 'epoch' and value is not None]
        if self.bar.disable:
            print(f'epoch {row["epoch"]}/{self.args.epochs}  ' + '  '.join(figures), flush=True)
        else:
            self.bar.set_postfix_str(', '.join(figures))

    def lap(self) -> float:
        """Seconds since the last call, or since this object was made."""
        last, self.clock = self.clock, time.perf_counter()
        return self.clock - last

    def finish(self, metrics: dict) -> None:
        """Write `metrics.json`, which says that the run has ended, and list the files.

        `other_minutes` are those neither of training batches nor of `test_minutes`.
        """
        self.bar.close()
        seconds, trained, total = (sum(row[name] for row in self.rows)
                                   for name in ('seconds', 'train_seconds', 'total_seconds'))
        other = (total + self.lap() - trained) / 60 - metrics.get('test_minutes', 0)
        common = {'seed': self.args.seed, 'epochs': self.args.epochs,
                  'train_minutes': seconds / 60, 'other_minutes': other,
                  'peak_memory_mb': peak_memory_mb()}
        metrics = {name: float(f'{value:.6g}') if isinstance(value, float) else value
                   for name, value in (metrics | common).items()}
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise RunError(f'{name} is {value} at the end of the run; '
                               f'{self.path("checkpoint.pt")} is of epoch {self.args.epochs}',
                               status=1)
        write_atomic(self.path('metrics.json'), json.dumps(metrics, indent=2) + '\n')
        width = max(map(len, metrics))
        print('\n'.join(f'  {name:{width}}  {value}' for name, value in metrics.items()))
        print(f'files in {self.folder}: '
              + ', '.join(sorted(path.name for path in self.folder.iterdir())))
