"""The command line that all scripts share: flags, names of runs, and how a script ends."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import command_line
from command_line import Parser, RunError, number, whole_number


def build_parser(trains: bool = True) -> Parser:
    parser = Parser('a script of these tests')
    parser.add_argument('--epochs', type=whole_number(1, 99), default=4)
    parser.add_argument('--n_layers', type=whole_number(1), default=3, help='of the network')
    parser.add_argument('--lr', type=number(0), default=1e-3)
    parser.add_argument('--share', type=number(0, 1), default=0.1)
    parser.add_shared_arguments(trains)
    return parser


def parse(words: str, trains: bool = True) -> argparse.Namespace:
    return build_parser(trains).parse_args(words.split())


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """The one line with which a parser ends the script, with status 2."""
    def refuse(words: str, trains: bool = True) -> str:
        with pytest.raises(SystemExit, match='^2$'):
            parse(words, trains)
        message = capsys.readouterr().err
        assert message.count('\n') == 1
        return message
    return refuse


# --- flags ---------------------------------------------------------------------------------------


def test_dashes_stand_for_underscores_in_flags_and_not_in_values():
    args = parse('--n-layers=5 --data-dir c-d --run=a-b')
    assert (args.n_layers, args.data_dir, args.run) == (5, Path('c-d'), 'a-b')


@pytest.mark.parametrize('word, said', [
    ('--epoch', 'unknown flag --epoch, did you mean --epochs?'),
    ('--n-layer=3', 'unknown flag --n_layer, did you mean --n_layers?'),
    ('--zzz', 'unknown flag --zzz ('), ('stray', 'stray')])
def test_an_unknown_word_is_one_line_that_names_it_and_what_is_close_to_it(refused, word, said):
    message = refused(word)
    assert said in message and ('did you mean' in message) == ('did you mean' in said)


@pytest.mark.parametrize('flag, value', [
    (flag, value) for flag, values in {
        '--epochs': ['0', '-1', '100', '2.', '1e1', 'nan', '', '²', '1' * 20],
        '--lr': ['-1e-9', 'nan', 'inf', '1e999', 'fast', ''], '--share': ['1.1', '-0.1'],
        '--sample': ['0'], '--seed': ['-1', '1000000001'], '--dataset': ['cifar']}.items()
    for value in values])
def test_a_bad_value_is_one_line_that_names_flag_and_value(refused, flag, value):
    message = refused(f'{flag}={value}')
    assert flag in message and repr(value) in message


def test_bounds_are_allowed():
    args = parse('--epochs=99 --lr=0 --share=1 --seed=0 --sample=1')
    assert (args.epochs, args.lr, args.share, args.seed, args.sample) == (99, 0, 1, 0, 1)


@pytest.mark.parametrize('words', ['--sample 3 --dry_run', '--sample 3 --resume',
                                   '--sample 3 --overwrite', '--resume --overwrite'])
def test_flags_that_exclude_each_other_are_one_line_that_names_them(refused, words):
    message = refused(words)
    assert all(word in message for word in words.split() if word[0] == '-')


def test_a_script_that_trains_nothing_lacks_the_flags_of_a_run(refused):
    shared, of_runs = (set(vars(parse('', trains))) for trains in (False, True))
    assert of_runs - shared == {'precision', 'run', 'resume', 'overwrite', 'sample'}
    assert shared > {'seed', 'device', 'data_dir', 'results_dir', 'dataset', 'dry_run'}
    assert 'unknown flag --resume' in refused('--resume', trains=False)


def test_help_ends_with_defaults_that_are_numbers_or_names():
    text = ' '.join(build_parser().format_help().split())
    assert 'of the network (default: 3)' in text and 'their own) (default: 42)' in text
    assert 'None' not in text and 'SUPPRESS' not in text and 'checkpoint (default' not in text


@pytest.mark.parametrize('words, name', [
    ('', 'vae'), ('--lr 0.01', 'vae_lr0.01'), ('--n_layers 2 --seed 43', 'vae_nlayers2_seed43'),
    ('--lr 0.001 --seed 42', 'vae'),  # typed, but the defaults
    ('--share 0.5 --device cpu --data_dir d --resume --dry_run --run a', 'vae')])
def test_a_run_is_named_by_what_is_not_default_and_changes_results(words, name):
    assert build_parser().run_name('vae', parse(words), 'share') == name


# --- endings -------------------------------------------------------------------------------------


@pytest.fixture
def launch(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Launch a function, or one that raises the given error: the exit status, and what is said."""
    monkeypatch.setattr(sys, 'argv', ['a/script.py', '--resume', '--lr', '1', '--overwrite'])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored

    def run(act: Callable | BaseException, words: str = '', trains: bool = True
            ) -> tuple[int, str]:
        def main(args: argparse.Namespace) -> None:
            if isinstance(act, BaseException):
                raise act
            act()
        with pytest.raises(SystemExit) as end:
            command_line.launch(main, parse(words, trains))
        return end.value.code, capsys.readouterr().err
    yield run
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize('error, status, line', [
    (RunError('first,\nsecond'), 2, 'first, second'),
    (RunError('diverged', status=1), 1, 'diverged'),
    (PermissionError(13, 'Permission denied', 'a/b'), 2, "[Errno 13] Permission denied: 'a/b'")])
def test_what_a_user_can_mend_is_one_line(launch, error, status, line):
    assert launch(error) == (status, f'script.py: error: {line}\n')


@pytest.mark.parametrize('number, status, ended', [(signal.SIGINT, 130, 'interrupted'),
                                                   (signal.SIGTERM, 143, 'terminated')])
@pytest.mark.parametrize('words, trains, more', [
    ('', True, '; go on with: python a/script.py --lr 1 --resume'), ('--dry_run', True, ''),
    ('--sample 3', True, ''), ('', False, '')])
def test_a_signal_ends_the_script_with_the_command_that_goes_on_if_there_is_one(
        launch, number, status, ended, words, trains, more):
    said = launch(lambda: os.kill(os.getpid(), number), words, trains)
    assert said == (status, f'\nscript.py: {ended}{more}\n')


@pytest.mark.parametrize('error', [
    MemoryError('of Python'), torch.OutOfMemoryError('CUDA out of memory'),
    RuntimeError('MPS backend out of memory (MPS allocated: 1 GB)'),
    lambda: torch.empty(2 ** 50)])  # which no machine has
def test_memory_that_is_not_there_is_one_line(launch, error):
    status, said = launch(error)
    assert status == 2 and said.count('\n') == 1
    assert said.startswith('script.py: error: not enough memory for these arguments: ')


@pytest.mark.parametrize('error', [ZeroDivisionError(), RuntimeError('the alloc of memory failed'),
                                   ValueError('DefaultCPUAllocator')])
def test_a_fault_of_the_code_is_not_hidden(launch, error):
    with pytest.raises(type(error)):
        launch(error)
