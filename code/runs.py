"""One run of one script: its folder, its checkpoint, and how to continue it exactly.

The folder `report/results/<run>/` holds `config.json`, `log.csv`, `checkpoint.pt`, figures and,
once the run has ended, `metrics.json`. All of them are whole whenever the run is stopped. Random
numbers are seeded for each epoch from (seed, epoch), so that a run which was stopped and resumed
ends with the same weights, figures and log (but for times) as one that was not: bit for bit on the
same CPU with the same versions (some operations on GPUs add in no fixed order).

`config.json` also has a fingerprint of what the code does, as opposed to what its text is: the
numbers of a dry run. If they are the same, a finished run counts as one of the present code.
"""

import argparse
import contextlib
import ctypes
import inspect
import io
import json
import math
import os
import pickle
import platform
import sys
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.image import imread
from tqdm import tqdm

import processes
from command_line import NEUTRAL, ROOT, RunError
from datasets.common import Loader
from files import atomic, read_csv, write_csv, write_json

CHECKPOINT_FORMAT = 2
OWN_FILES = ('.json', '.csv', '.pt', '.png', '.pdf')  # what a run leaves in its folder
TIMES = ('seconds', 'minutes', 'seconds_per_100', 'memory_mb')  # the ends of names of costs
# Parts of the names of numbers that a fingerprint leaves out: costs, rounding errors, random bits,
# and measures by a classifier whose training is rounded differently on different processors.
UNSTABLE = (*TIMES, 'per_second', 'roundtrip', 'rms', '_draws', 'frechet', 'inception', 'class_',
            'accuracy', 'precision', 'recall', 'density', 'coverage')
Main = Callable[[argparse.Namespace], None]


# --- hardware and randomness ---------------------------------------------------------------------


def start(args: argparse.Namespace) -> tuple[torch.device, bool]:
    """The device, and whether the networks are to compute in bfloat16. Raises RunError.

    Resolves `args.precision`, cuts a dry run to two epochs, has GPUs compute float32 as such, not
    as TF32, and joins the other processes of the run.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        device = pick_device(processes.own_device(args.device))
    except ValueError as error:
        raise RunError(f'--device {args.device}: {error}') from None
    processes.join(device)
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:  # glibc keeps what is freed: fresh pages for every step cost a tenth of the time
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD: more it does not take
    if args.precision == 'auto':
        args.precision = 'bf16' if has_fast_bf16(device) else 'fp32'
    if args.dry_run:
        args.epochs = 2
    return device, args.precision == 'bf16'


def pick_device(name: str) -> torch.device:
    """The device with that name; `auto` is cuda, then mps, then cpu. Raises RunError."""
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
    """Whether the device multiplies matrices faster in bfloat16 than in float32."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = getattr(torch.cpu, 'get_capabilities', dict)() if device.type == 'cpu' else {}
    # With AVX-512 alone an AMD EPYC takes half as long as in float32, an Intel Xeon twice as long.
    intel = 'Intel' in str(features.get('cpu_name'))
    return bool(features.get('amx_bf16') or features.get('avx512_bf16') and not intel)


def hardware(device: torch.device) -> str:
    """The processor's name and the number of threads, or the accelerator's name."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next(line for line in lines if line.startswith('model name')).split(': ')[1]
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f'{name}, {torch.get_num_threads()} threads'


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """The most memory that this process has held, in MB (10⁶ bytes), and that on its GPU."""
    gpu = ({'peak_gpu_memory_mb': torch.cuda.max_memory_allocated(device) / 1e6}
           if device.type == 'cuda' else {})
    try:
        import resource
    except ImportError:  # Windows
        return {'peak_memory_mb': None, **gpu}
    unit = 1 if sys.platform == 'darwin' else 1024
    return {'peak_memory_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6,
            **gpu}


def seed_all(seed: int, stream: int | str) -> None:
    """Seed torch's generators from (seed, stream): an epoch, or the name of what is drawn."""
    words = list(str(stream).encode())
    state = np.random.SeedSequence([seed, len(words), *words]).generate_state(2)
    torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def load_data(dataset: Callable[..., tuple[Loader, ...]], args: argparse.Namespace,
              device: torch.device) -> tuple[Loader, ...]:
    """The train, validation and test loaders of `dataset`, which is `bmnist` or `mnist`.

    A dry run gets three batches to train on and 100 images to evaluate. Neither a dry run nor
    `--sample` downloads anything. Of several processes each gets all images, and its part of the
    batches to train on. Raises DataError, or RunError if a batch is too small for that.
    """
    def load() -> tuple[Loader, ...]:
        if args.batch_size < 2 * processes.SIZE > 2:
            raise RunError(f'--batch_size {args.batch_size} is less than two images for each of '
                           f'{processes.SIZE} processes')
        return dataset(args.data_dir, args.batch_size, not (args.dry_run or args.sample),
                       args.dataset, device)
    train, val, test = processes.first(load)
    if args.dry_run:
        train, val, test = train.head(3 * args.batch_size), val.head(100), test.head(100)
    train.part = processes.rank(), processes.size()
    return train, val, test


# --- what a run is -------------------------------------------------------------------------------


def describe(main: Main, args: argparse.Namespace, source: dict, device: torch.device) -> dict:
    """The content of `config.json`: script, arguments, data, and where it ran."""
    def portable(value: Any) -> Any:  # paths in and beside the project, as seen from its root
        if not isinstance(value, Path):
            return value
        value = value.absolute()
        return os.path.relpath(value, ROOT) if value.is_relative_to(ROOT.parent) else str(value)
    return {
        'script': Path(inspect.getfile(main)).stem,
        'arguments': {name: portable(value) for name, value in vars(args).items()},
        'data': source, 'device': str(device), 'hardware': hardware(device),
        'processes': processes.size(),
        'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                     'numpy': np.__version__},
    }


def fingerprint(main: Main, args: argparse.Namespace) -> dict:
    """What the code does with these arguments: the torch version and the numbers of a dry run.

    It runs on the shipped digits, on one thread of the processor, in float32: losses epoch by
    epoch, final measures, and the mean brightness of the sample grids. These change with most
    changes to model, loss, optimiser, schedule or sampling, and with no change of words. They do
    not see bfloat16, the readers of MNIST, and code that only draws.
    """
    threads, silence = torch.get_num_threads(), io.StringIO()
    with (tempfile.TemporaryDirectory(prefix='a3_') as results_dir,
          contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence)):
        args = argparse.Namespace(**vars(args) | {
            'run': 'dry', 'results_dir': Path(results_dir), 'dataset': 'digits', 'device': 'cpu',
            'precision': 'fp32', 'dry_run': True, 'resume': False, 'sample': None, 'only': None})
        torch.set_num_threads(1)
        try:
            main(args)
        except RunError:  # the dry run diverged: the run itself will say so better
            return {'torch': torch.__version__, 'numbers': {}}
        finally:
            torch.set_num_threads(threads)
        [folder] = (path.parent for path in Path(results_dir).glob('*/metrics.json')
                    if path.parent.name != 'classifier_digits')
        numbers = {name: value for name, value in read_json(folder / 'metrics.json').items()
                   if isinstance(value, int | float)}
        if (folder / 'log.csv').is_file():
            numbers |= {f'epoch{row["epoch"]}_{name}': float(value) for row in read_csv(
                folder / 'log.csv') for name, value in row.items() if value and name != 'epoch'}
        numbers |= {path.stem: float(f'{imread(path)[..., 0].mean():.6g}')
                    for path in sorted(folder.glob('*samples_epoch*.png'))}
    return {'torch': torch.__version__, 'numbers': {
        name: value for name, value in numbers.items()
        if not any(part in name for part in UNSTABLE)}}


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError or ValueError."""
    return json.loads(path.read_text(encoding='utf-8'))


def difference(before: dict, now: dict, *names: str) -> str:
    """The first difference between two runs that changes results, in words; '' if there is none.

    Args:
        before, now: their `config.json`. What `now` lacks, or leaves to be chosen (None, auto), is
            not compared, but for the number of processes, which is 1 unless it is there; nor are
            the fingerprints of different torch versions.
        names: the arguments to compare, if not everything.
    """
    def comparable(config: dict) -> dict:
        arguments = {name: value for name, value in config['arguments'].items()
                     if name not in NEUTRAL and value not in (None, 'auto')}
        return arguments | {'device': config.get('device'), 'processes': config.get(
            'processes', 1)} | config.get('data', {}).get('sha256', {})
    try:
        was, is_now = comparable(before), comparable(now)
        for name in names or is_now:
            if is_now.get(name) is not None and was.get(name) != is_now[name]:
                return f'{name} was {was.get(name)}, is now {is_now[name]}'
        then, present = before.get('fingerprint', {}), now.get('fingerprint', {})
        if names or not present or then and then['torch'] != present['torch']:
            return ''
        for name in present['numbers'] | then['numbers']:
            old, new = then['numbers'].get(name), present['numbers'].get(name)
            # Processors round differently, and the GAN amplifies that to 2e-4.
            if None in (old, new) or not math.isclose(old, new, rel_tol=5e-4, abs_tol=1e-6):
                return f'the code has changed: in a dry run {name} was {old}, is now {new}'
    except (AttributeError, KeyError, TypeError):
        return 'it has another kind of config.json'
    return ''


# --- weights -------------------------------------------------------------------------------------


def save_tensors(path: Path, content: dict) -> None:
    """Write tensors and plain Python values, whole or not at all."""
    packed = io.BytesIO()  # torch would hide why it cannot write to a file
    torch.save(content, packed)
    with atomic(path) as file:
        file.write(packed.getbuffer())


def load_checkpoint(path: Path, script: str, parts: dict[str, Any]) -> list[dict]:
    """Read a checkpoint into `parts`, some or all of those that it has; returns the log's rows.

    Raises RunError, in one line, if it is no whole checkpoint of that script and these parts.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch leaves the checksums unread
            if archive.testzip():
                raise ValueError('its checksums do not fit')
        saved = torch.load(path, map_location='cpu', weights_only=True)
        if saved['format'] != CHECKPOINT_FORMAT:
            raise RunError(f'{path} has format {saved["format"]}, '
                           f'this code reads format {CHECKPOINT_FORMAT}')
        if saved['script'] != script:
            raise RunError(f'{path} belongs to {saved["script"]}.py, not to {script}.py')
        for name, part in parts.items():
            part.load_state_dict(saved['parts'][name])
        return saved['rows']
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError,
            AttributeError, AssertionError, zipfile.BadZipFile, zlib.error) as error:
        reason = ('it holds more than tensors and numbers'
                  if isinstance(error, pickle.UnpicklingError)
                  else ' '.join(str(error).split()) or type(error).__name__)
        raise RunError(f'{path} is damaged or of another model: {reason}') from None


def load_trained(folder: Path, script: str, part: str, make: Callable) -> torch.nn.Module:
    """The trained network of a finished run, in evaluation mode.

    Args:
        folder, script: the run's folder, and the script that made it, such as `a3_vae`.
        part: the network's name in the checkpoint, such as `model`.
        make: makes the untrained network from the run's arguments.

    Raises RunError, in one line, if the config or the checkpoint is not of that script.
    """
    try:
        arguments = read_json(folder / 'config.json')['arguments']
        network = make(argparse.Namespace(**arguments))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise RunError(f'{folder / "config.json"} is not the config of {script}.py: '
                       f'{error}') from None
    load_checkpoint(folder / 'checkpoint.pt', script, {part: network})
    return network.eval()


def finite(metrics: dict, where: str) -> dict:
    """The metrics, floats to six significant digits; raises RunError (status 1) on inf and NaN."""
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f'{name} is {value} {where}', status=1)
    return {name: float(f'{value:.6g}') if isinstance(value, float) else value
            for name, value in metrics.items()}


# --- the run -------------------------------------------------------------------------------------


class Run:
    """The folder of one run, and how far the run has come.

    Args:
        main: the script's `main`.
        args: its arguments. `name` is the folder's, unless `--run` gave one; runs on the shipped
            digits add `_digits` to it.
        source: what the data set is, as JSON can hold it.
        device: the device that the run computes on.
        parts: whatever has `state_dict` and `load_state_dict`, by name: the checkpoint's content.
    """

    def __init__(self, main: Main, args: argparse.Namespace, source: dict, device: torch.device,
                 parts: dict[str, Any]):
        name = args.name + '_digits' * (source['dataset'] == 'digits')
        name = name if args.run is None else args.run
        if not name or name.startswith('.') or Path(name).name != name:
            raise RunError(f'--run: expected the name of a folder, got {name!r}')
        if name.startswith('classifier'):
            raise RunError(f'--run: {name} is the folder of the digit classifier')
        self.main, self.args, self.device, self.parts = main, args, device, parts
        self.folder: Path = args.results_dir / name
        self.rows: list[dict] = []
        self.config = describe(main, args, source, device)

    def path(self, name: str) -> Path:
        """The path of a file of this run."""
        return self.folder / name

    def load(self, *names: str) -> None:
        """Read the checkpoint into `parts` and `rows`.

        Raises RunError if it does not fit, or an argument of these names is not what it was.
        """
        if not self.path('checkpoint.pt').is_file():
            raise RunError(f'{self.path("checkpoint.pt")} does not exist: train this run first')
        if names:
            self.refuse_difference(*names)
        self.rows = load_checkpoint(self.path('checkpoint.pt'), self.config['script'], self.parts)

    def refuse_difference(self, *names: str) -> None:
        """Raise RunError if the folder's run differs from this one, in `names` or in anything."""
        try:
            before = read_json(self.path('config.json'))
        except (OSError, ValueError) as error:
            raise RunError(f'{self.path("config.json")} is not the config of a run: '
                           f'{error}') from None
        found = difference(before, self.config, *names)
        if found:
            raise RunError(f'{self.folder} is another run: {found}' + (
                '; --overwrite replaces it, --resume needs the same arguments and code'
                if not names else ''))

    def begin(self) -> bool:
        """Make the folder, or with `--resume` continue from its checkpoint.

        Returns False if this very run has finished already, so that there is nothing to do. Raises
        RunError rather than lose a checkpoint or mix two runs. Of several processes, the others
        begin where the first does.
        """
        begun = processes.first(lambda: self.make_ready() and (self.rows, {
            name: part.state_dict() for name, part in self.parts.items()}))
        if begun and processes.rank():
            self.rows, states = begun
            for name, part in self.parts.items():
                part.load_state_dict(states[name])
        return bool(begun)

    def make_ready(self) -> bool:
        """What `begin` does in the first process."""
        args, finished = self.args, self.path('metrics.json').is_file()
        weights = self.path('checkpoint.pt').is_file()
        goes_on = not args.overwrite and (weights or finished and args.resume)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hold()
        if goes_on:
            self.refuse_difference()  # at once, since the fingerprint takes seconds
        if not args.dry_run:
            self.config['fingerprint'] = fingerprint(self.main, args)
        if goes_on:
            self.refuse_difference()
            if finished:
                print(f'{self.folder} is finished already ({args.epochs} epochs): '
                      'nothing was changed')
                made_with = read_json(self.path('config.json')).get('fingerprint', {}).get('torch')
                if made_with not in (None, torch.__version__):
                    print(f'Its code was not compared with the present code: its fingerprint is '
                          f'from torch {made_with}, this is {torch.__version__}')
                return False
            if not args.resume:
                raise RunError(f'{self.folder} holds a run that was cut off: --resume continues '
                               'it, --overwrite begins anew')
            self.load()
            print(f'{self.folder}: going on after epoch {self.rows[-1]["epoch"]}')
        else:
            if args.resume:
                print(f'{self.folder}: no checkpoint to resume from, starting anew')
            self.clear()
            print(f'{self.folder}: {"dry run" if args.dry_run else "new run"} '
                  f'on {self.config["device"]}, {self.config["data"]["description"]}')
        for path in self.folder.glob('*.tmp'):  # left by a run that was killed while writing
            path.unlink()
        write_json(self.path('config.json'), self.config)
        return True

    def hold(self) -> None:
        """Keep other runs out of the folder until this process ends. Raises RunError if one is in.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return
        lock = os.open(self.folder, os.O_RDONLY)
        weakref.finalize(self, os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f'{self.folder} is in use by another process') from None
        except OSError:
            pass  # a file system without locks

    def clear(self) -> None:
        """Remove what an earlier run left here, so that its figures do not pass for this one's."""
        path = self.path('config.json')
        if path.is_file():
            try:
                script = read_json(path)['script']
            except (ValueError, KeyError, TypeError):
                script = 'something else'
            if script != self.config['script']:
                raise RunError(f'{self.folder} holds files of {script}: choose another --run')
            for path in self.folder.iterdir():
                if path.suffix in OWN_FILES and path.is_file():
                    path.unlink()
        for name in ('metrics.json', 'checkpoint.pt'):  # where there was no config.json
            self.path(name).unlink(missing_ok=True)

    def epochs(self) -> Iterator[int]:
        """The epochs yet to be run, 0 (the untrained network) to `--epochs`, each seeded anew."""
        for epoch in range(len(self.rows), self.args.epochs + 1):
            seed_all(self.args.seed, epoch)
            yield epoch

    def track(self, batches: Iterable) -> Iterator:
        """The batches of an epoch to train on, with a progress bar on a terminal."""
        yield from tqdm(batches, f'epoch {len(self.rows)}', unit='batch', leave=False,
                        disable=processes.rank() > 0 or None)

    def check_finite(self, row: dict) -> None:
        """Raise RunError, with exit status 1, if a number in the epoch's row is not finite."""
        kept = (f'{self.path("checkpoint.pt")} is of epoch {row["epoch"] - 1}' if self.rows
                else 'there is no checkpoint yet')
        finite(row, f'after epoch {row["epoch"]}; {kept}')

    def end_epoch(self, row: dict) -> None:
        """Add the epoch's row to the log, and write a checkpoint. It has `epoch` and `seconds`."""
        self.check_finite(row)
        self.rows.append(row)
        write_csv(self.path('log.csv'), self.rows)  # first: what the checkpoint has is not redone
        save_tensors(self.path('checkpoint.pt'), {
            'format': CHECKPOINT_FORMAT, 'script': self.config['script'], 'rows': self.rows,
            'parts': {name: part.state_dict() for name, part in self.parts.items()}})
        print(f'epoch {row["epoch"]}/{self.args.epochs}  ' + '  '.join(
            f'{name} {value:.4g}' for name, value in row.items()
            if name != 'epoch' and value is not None), flush=True)

    def finish(self, metrics: dict) -> None:
        """Write `metrics.json`, which says that the run has ended, and print it with all files."""
        metrics = finite(metrics | {
            'data': self.config['data']['description'], 'seed': self.args.seed,
            'epochs': self.args.epochs,
            'train_minutes': sum(row['seconds'] for row in self.rows) / 60,
            **peak_memory(self.device)},
            f'at the end of the run; {self.path("checkpoint.pt")} is of its last epoch')
        write_json(self.path('metrics.json'), metrics)
        report(self.folder, metrics)


def report(folder: Path, metrics: dict) -> None:
    """Print the metrics, one a line, and the names of the folder's files."""
    width = max(map(len, metrics))
    print('\n'.join(f'  {name:{width}}  {value}' for name, value in metrics.items()))
    print(f'files in {folder}: ' + ', '.join(sorted(path.name for path in folder.iterdir())))
