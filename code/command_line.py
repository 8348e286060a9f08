"""The command line of every script: its flags, its one-line errors, its exit status.

Exit status: 0 when all went well, 1 when training diverged or another process of it ended, 2 for
anything that the user can mend, 130 after Ctrl-C and 143 after SIGTERM.
"""

import argparse
import difflib
import io
import math
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import processes

ROOT = Path(__file__).resolve().parent.parent  # the project's folder, where default paths start
# Arguments that do not change what a run computes (config.json names the device that was used).
NEUTRAL = ('device', 'data_dir', 'results_dir', 'run', 'name', 'dataset', 'resume', 'overwrite',
           'dry_run', 'sample', 'save_interval', 'temperature')


class RunError(Exception):
    """Something that a run cannot go on with, in one line, and the exit status to end with."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and with dashes accepted for underscores in flags."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_argument(self, *names: str, help: str = '', **options) -> argparse.Action:
        """Like argparse's, but the help ends with the default if that is a number or a name."""
        default = options.get('default', argparse.SUPPRESS)
        if isinstance(default, int | float | str) and default != argparse.SUPPRESS:
            help = f'{help} (default: {default})'.lstrip()
        return super().add_argument(*names, help=help, **options)

    def add_shared_arguments(self, trains: bool = True) -> None:
        """Add the flags that all scripts share, and those of the scripts that train a model."""
        add = self.add_argument
        if trains:
            add('--precision', choices=('auto', 'bf16', 'fp32'), default='auto',
                help='precision in training, and of the networks that estimate log p(x); auto is '
                     'bf16 where that is faster')
        add('--seed', type=whole_number(0), default=42,
            help="seed of the run's random numbers (the data sets have their own)")
        add('--device', default='auto',
            help='cpu, cuda, cuda:1, mps, or auto for the first there is of cuda, mps and cpu; '
                 'several processes take a GPU each')
        add('--data_dir', type=Path, default=ROOT / 'data',
            help="folder of MNIST, downloaded if missing (default: the project's data/)")
        add('--results_dir', type=Path, default=ROOT / 'report' / 'results',
            help="folder of all runs (default: the project's report/results/)")
        add('--dataset', choices=('mnist', 'digits'),
            help='default: mnist, or where it cannot be had, the digits shipped with the project')
        add('--dry_run', action='store_true',
            help='two epochs of a few batches, offline, into a temporary folder that stays')
        if trains:
            add('--run', metavar='NAME',
                help="the run's folder (default: named by what is changed, as vae_z20_seed43)")
            add('--resume', action='store_true', help='continue the run from its checkpoint')
            add('--overwrite', action='store_true',
                help='train anew, and delete the checkpoint of the run that is there')
            add('--sample', type=whole_number(1), metavar='N',
                help="draw N samples from the run's checkpoint, and stop")

    def parse_args(self, args: list[str] | None = None, namespace: Any = None):
        """The arguments; exits with status 2 and one line if they are wrong."""
        if processes.rank():
            sys.stdout = io.StringIO()  # the first process says it all
        if hasattr(sys.stdout, 'reconfigure'):
            sys.stdout.reconfigure(errors='replace')  # for terminals that cannot print Greek
        words = sys.argv[1:] if args is None else args
        parsed = super().parse_args([underscored(word) for word in words], namespace)
        if getattr(parsed, 'sample', None) and (parsed.dry_run or parsed.resume
                                                or parsed.overwrite):
            self.error('--sample only draws: leave out --dry_run, --resume and --overwrite')
        if getattr(parsed, 'resume', False) and parsed.overwrite:
            self.error('--resume and --overwrite exclude each other')
        return parsed

    def error(self, message: str):
        """Exit with status 2 and one line, which suggests a flag for one that is unknown."""
        if message.startswith('unrecognized arguments: --'):
            flag = message.split()[2].partition('=')[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            message = f'unknown flag {flag}' + (f', did you mean {close[0]}?' if close else '')
        processes.let_the_first_speak()
        self.exit(2, f'{self.prog}: error: {message} (--help lists the flags)\n')

    def run_name(self, prefix: str, args: argparse.Namespace, *implied: str) -> str:
        """A run's name: the prefix, and each argument that is not at its default.

        Args:
            prefix: such as `vae_z20`.
            implied: the arguments that the prefix names already.
        """
        changed = [f'{name.replace("_", "")}{value}' for name, value in vars(args).items()
                   if name not in NEUTRAL + implied and value != self.get_default(name)]
        return '_'.join([prefix, *changed])


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


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run `main(args)`, a dry run in a temporary folder; end what fails as this module promises.
    """
    status = 1
    try:
        status = exit_status(main, args)
    finally:
        processes.leave(status)
    if status:
        sys.exit(status)


def exit_status(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `main(args)`; say in one line what ended it before its end."""
    script = Path(sys.argv[0]).name
    trains = getattr(args, 'sample', True) is None

    def terminate(*_) -> None:
        raise KeyboardInterrupt('terminated')

    def complain(error: Exception | str) -> None:
        processes.let_the_first_speak()
        print(f'{script}: error: {" ".join(str(error).split())}', file=sys.stderr)

    signal.signal(signal.SIGTERM, terminate)
    try:
        if processes.size() > 1 and not trains:
            raise RunError('this trains nothing: start it with python, in one process')
        if args.dry_run and processes.rank() == 0:
            args.results_dir = Path(tempfile.mkdtemp(prefix='a3_'))
        main(args)
        return 0
    except (KeyboardInterrupt, processes.Lost) as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, while this is printed
        ended = str(stop) or 'interrupted'  # Ctrl-C says nothing
        status = (1 if isinstance(stop, processes.Lost) else
                  143 if ended == 'terminated' else 130)
        words = [word for word in sys.argv if word not in ('--resume', '--overwrite')]
        goes_on = (f'; go on with: {processes.launcher()} {shlex.join(words)} --resume'
                   if trains and not args.dry_run else '')
        if processes.rank() == 0:
            print(f'\n{script}: {ended}{goes_on}', file=sys.stderr)
        return status
    except (RunError, OSError) as error:
        complain(error)
        return getattr(error, 'status', 2)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError)
                or 'DefaultCPUAllocator' in str(error)
                or 'MPS backend out of memory' in str(error)):
            raise
        complain(f'not enough memory for these arguments: {error}')
        return 2
