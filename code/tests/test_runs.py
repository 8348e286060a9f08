"""A run: its folder, exact resumption, what may replace it, and whether the code is the same."""

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import a3_vae
import runs
from command_line import ROOT, Parser, RunError, number, whole_number
from datasets import digits
from helpers import contents, stamps

CPU = torch.device('cpu')
SOURCE = {'dataset': 'mnist', 'description': 'nothing', 'sha256': {'a file': 'its digest'}}


def parse(*words: object) -> argparse.Namespace:
    parser = Parser('a script of these tests')
    parser.add_argument('--epochs', type=whole_number(1), default=4)
    parser.add_argument('--lr', type=number(0), default=1e-3)
    parser.add_shared_arguments()
    args = parser.parse_args([*map(str, words)])
    args.name = parser.run_name('a_run', args)
    return args


def make_run(args: argparse.Namespace, dataset: str = 'mnist') -> runs.Run:
    runs.start(args)
    return runs.Run(main, args, SOURCE | {'dataset': dataset}, CPU,
                    {'model': nn.Linear(2, 2, bias=False)})


def main(args: argparse.Namespace, until: int = 1000) -> None:
    """A random walk of the weights, cut off after epoch `until`."""
    run = make_run(args)
    weight = run.parts['model'].weight
    if not run.begin():
        return
    for epoch in run.epochs():
        with torch.no_grad():
            weight.copy_(args.lr * torch.randn(2, 2) + (0 if epoch == 0 else weight))
        run.end_epoch({'epoch': epoch, 'loss_nats': weight.sum().item(), 'seconds': float(epoch)})
        if epoch == until:
            return
    run.finish({'final_nats': weight.sum().item()})


@pytest.fixture
def train(tmp_path) -> Callable[..., Path]:
    """Start `main` in a results folder, with these words; returns the run's folder."""
    def start(*words: object, results: Path = tmp_path, until: int = 1000) -> Path:
        main(parse('--results_dir', results, '--run', 'a_run', *words), until)
        return results / 'a_run'
    return start


@pytest.fixture
def straight(train, tmp_path) -> Path:
    """The folder of a run that nothing disturbed."""
    return train(results=tmp_path / 'straight')


@contextmanager
def refused(reason: str, status: int = 2) -> Iterator[None]:
    try:
        yield
    except RunError as error:  # not pytest.raises, which keeps the run, which holds its folder
        assert error.status == status and re.search(reason, str(error)) and '\n' not in str(error)
    else:
        pytest.fail(f'nothing was said that matches {reason}')


# --- hardware and randomness ---------------------------------------------------------------------


@pytest.mark.parametrize('words, fast, chosen, epochs', [
    ((), True, 'bf16', 4), (('--dry_run',), False, 'fp32', 2),
    (('--precision', 'fp32'), True, 'fp32', 4), (('--precision', 'bf16'), False, 'bf16', 4)])
def test_float32_is_no_tf32_and_auto_is_what_the_device_is_fast_in(monkeypatch, words, fast,
                                                                  chosen, epochs):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    monkeypatch.setattr(runs, 'has_fast_bf16', lambda device: fast)
    args = parse('--device', 'cpu', *words)
    assert runs.start(args) == (CPU, chosen == 'bf16')
    assert args.precision == chosen and args.epochs == epochs
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_hardware_that_is_fast_in_bfloat16_is_known(monkeypatch):
    for kind, found, fast in (
            ('cpu', {'cpu_name': 'Intel', 'avx512_bf16': True}, False), ('cuda', (7, 5), False),
            ('cpu', {'cpu_name': 'Intel', 'amx_bf16': True}, True), ('cuda', (8, 0), True),
            ('cpu', {'cpu_name': 'AMD', 'avx512_bf16': True}, True), ('cpu', {}, False)):
        for module, name in ((torch.cpu, 'get_capabilities'),
                             (torch.cuda, 'get_device_capability')):
            monkeypatch.setattr(module, name, lambda *_, found=found: found, raising=False)
        assert runs.has_fast_bf16(torch.device(kind)) == fast


def test_a_device_that_is_there_is_taken_and_any_other_is_one_line():
    assert runs.pick_device('cpu') == CPU
    assert torch.zeros(1, device=runs.pick_device('auto')).item() == 0
    for name in ('nonsense', 'cuda:99', 'cpu:-1', '', 'hpu', 'meta'):
        with refused(f'^--device {name}: .'):
            runs.pick_device(name)


def test_each_seed_and_stream_has_numbers_of_its_own():
    keys = [(1, 11), (11, 1), (1, 1), (11, 11), (111, 0), (0, 111), (1, 'weights'), (1, 'samples'),
            (1, '25 samples'), (2, 'weights'), (0, 0), (0, '\x01'), (2**32, ''), (2**40, 1)]

    def draw(seed: int, stream: int | str) -> tuple[float, ...]:
        runs.seed_all(seed, stream)
        return tuple(torch.randn(4).tolist())
    assert len({draw(*key) for key in keys}) == len(keys) and draw(*keys[0]) == draw(*keys[0])
    assert len({torch.randn(1).item() for _ in make_run(parse()).epochs()}) == 5


# --- the folder ----------------------------------------------------------------------------------


def test_a_folder_is_named_by_arguments_and_digits_or_as_asked_but_inside_the_results():
    def folder(*words: object, dataset: str = 'digits') -> Path:
        return make_run(parse('--results_dir', 'results', *words), dataset).folder
    assert folder('--lr', 1) == Path('results', 'a_run_lr1.0_digits')
    assert folder('--lr', 1, dataset='mnist') == Path('results', 'a_run_lr1.0')
    assert folder('--lr', 1, '--run', 'mine') == Path('results', 'mine')
    for name in ('', '..', 'a/b', '/tmp', 'a/', '.hidden'):
        with refused('--run: expected the name of a folder'):
            folder(f'--run={name}')


def test_a_run_leaves_config_log_checkpoint_and_metrics(train, capsys):
    folder = train('--data_dir', ROOT / 'data', '--seed', 7)
    assert set(contents(folder)) == {'config.json', 'log.csv', 'checkpoint.pt', 'metrics.json'}
    config, metrics = (runs.read_json(folder / name) for name in ('config.json', 'metrics.json'))
    assert config['script'] == 'test_runs' and config['arguments']['data_dir'] == 'data'
    assert {'versions', 'device', 'hardware', 'fingerprint'} <= set(config)
    assert (metrics['seed'], metrics['epochs'], metrics['data']) == (7, 4, 'nothing')
    assert metrics['train_minutes'] == pytest.approx((0 + 1 + 2 + 3 + 4) / 60, rel=1e-5)
    assert 50 < metrics['peak_memory_mb'] < 1e6  # of this process
    said, log = capsys.readouterr().out, (folder / 'log.csv').read_text().splitlines()
    assert [line.split(',')[0] for line in log] == ['epoch', '0', '1', '2', '3', '4']
    assert all(text in said for text in ('new run on cpu, nothing', 'epoch 0/4  loss_nats',
                                         'final_nats', 'checkpoint.pt, config.json, log.csv'))


def test_a_new_run_removes_what_an_earlier_one_left_and_nothing_else(train, straight):
    for name in ('samples_epoch77.png', 'curve.pdf', 'half.png.9.tmp', 'notes.txt'):
        (straight / name).write_text('left')
    train('--overwrite', results=straight.parent, until=0)
    assert set(contents(straight)) == {'config.json', 'log.csv', 'checkpoint.pt', 'notes.txt'}


@pytest.mark.parametrize('config', ['{"name": "a project of the user"}', '[]', 'no JSON',
                                    '{"script": "a3_other"}'])
@pytest.mark.parametrize('words', [(), ('--overwrite',)])
def test_a_folder_of_something_else_is_left_alone(train, tmp_path, config, words):
    folder = tmp_path / 'a_run'
    folder.mkdir()
    for name in ('config.json', 'holiday.png', 'draft.tmp'):
        (folder / name).write_text(config)
    before = stamps(folder)
    with refused('holds files of (something else|a3_other): choose another --run'):
        train(*words)
    assert stamps(folder) == before


def test_a_folder_in_use_is_refused_to_other_runs_but_may_be_read(train, tmp_path):
    args = parse('--results_dir', tmp_path, '--run', 'a_run', '--resume')
    before, holder = stamps(train()), make_run(args)
    holder.begin()
    for words in (('--resume',), ('--overwrite',), ()):
        with refused('a_run is in use by another process'):
            train(*words)
    make_run(args).load()
    assert stamps(tmp_path / 'a_run') == before
    del holder
    train('--resume')


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_run_that_diverges_ends_with_status_1_and_keeps_its_checkpoint(train, tmp_path, value):
    folder = train(until=1)
    run = make_run(parse('--results_dir', tmp_path, '--run', 'a_run', '--resume'))
    run.begin()
    before = contents(folder)
    with refused(f'loss_nats is {value} after epoch 2; .* is of epoch 1$', status=1):
        run.end_epoch({'epoch': 2, 'loss_nats': value, 'seconds': 1.})
    with refused(f'final_nats is {value} at the end', status=1):
        run.finish({'final_nats': value})
    assert contents(folder) == before


def test_numbers_that_are_finite_have_six_digits():
    row = {'a': 1 / 3, 'b': 12345678, 'c': None, 'd': 'text', 'e': 12345678.}
    assert runs.finite(row, '') == row | {'a': 0.333333, 'e': 12345700.}


# --- stopped, resumed, replaced ------------------------------------------------------------------


@pytest.mark.parametrize('epoch', [0, 2, 4])
def test_a_stopped_run_resumed_ends_as_one_never_stopped(train, straight, read_run, epoch):
    train(until=epoch)
    torch.manual_seed(99)  # another process has another state
    assert read_run(train('--resume')) == read_run(straight)


LR = 'lr was 0.001, is now 0.5'


@pytest.mark.parametrize('state, words, outcome', [
    ('finished', '', 'finished already'), ('finished', '--resume', 'finished already'),
    ('finished', '--overwrite', 'new run'), ('finished', '--lr 0.5 --overwrite', 'new run'),
    ('finished', '--lr 0.5', RunError(f'{LR}; --overwrite .* --resume ')),
    ('finished', '--lr 0.5 --resume', RunError(LR)),
    ('cut off', '', RunError('cut off: --resume .*--overwrite ')),
    ('cut off', '--resume', 'going on after epoch 1'), ('cut off', '--overwrite', 'new run'),
    ('cut off', '--lr 0.5', RunError(f'{LR}; --overwrite .* --resume ')),
    ('cut off', '--epochs 9 --resume', RunError('epochs was 4, is now 9')),
    ('finished without weights', '', 'new run'),
    ('finished without weights', '--lr 0.5', 'new run'),
    ('finished without weights', '--resume', 'finished already'),
    ('finished without weights', '--lr 0.5 --resume', RunError(LR)),
    ('cut off without weights', '', 'new run'),
    ('cut off without weights', '--resume', 'no checkpoint to resume from'),
    ('nothing', '--resume', 'no checkpoint to resume from')])
def test_nothing_that_was_trained_is_replaced_unasked(train, tmp_path, capsys, read_run, state,
                                                      words, outcome):
    folder = tmp_path / 'a_run'
    if state != 'nothing':
        train(until=1 if state.startswith('cut off') else 1000)
    if state.endswith('without weights'):
        (folder / 'checkpoint.pt').unlink()
    before = stamps(folder) if folder.is_dir() else {}
    capsys.readouterr()
    if isinstance(outcome, RunError):
        with refused(str(outcome)):
            train(*words.split())
    else:
        train(*words.split())
        assert outcome in capsys.readouterr().out
    if isinstance(outcome, RunError) or outcome == 'finished already':
        assert stamps(folder) == before
    else:
        anew = [word for word in words.split() if word not in ('--resume', '--overwrite')]
        assert read_run(folder) == read_run(train(*anew, results=tmp_path / 'elsewhere'))


def test_weights_without_a_config_are_never_resumed(train, straight):
    (straight / 'config.json').unlink()
    for words in ((), ('--resume',)):
        with refused('config.json is not the config of a run'):
            train(*words, results=straight.parent)
    run = make_run(parse('--results_dir', straight.parent, '--run', 'a_run', '--overwrite'))
    run.begin()  # and is killed before its first epoch
    assert 'checkpoint.pt' not in contents(straight)


# --- whether two runs are the same ---------------------------------------------------------------


def config_of(torch: str = '2.0', device: str = 'cpu', digest: str = 'x', nats: float = 100.,
              zero: float = 0., more: dict | None = None, **arguments) -> dict:
    numbers = {'nats': nats, 'zero': zero} | (more or {})
    return {'arguments': {'lr': 0.1, 'run': 'a'} | arguments, 'device': device,
            'data': {'sha256': {'a file': digest}},
            'fingerprint': {'torch': torch, 'numbers': numbers}}


@pytest.mark.parametrize('before, now, found', [
    ({}, {'run': 'b', 'resume': True}, ''), ({}, {'lr': 0.2}, 'lr was 0.1, is now 0.2'),
    ({}, {'lr': None}, ''), ({}, {'lr': 'auto'}, ''), ({}, {'new': 3}, 'new was None, is now 3'),
    ({}, {'device': 'cuda'}, 'device was cpu, is now cuda'), ({}, {'device': None}, ''),
    ({}, {'digest': 'y'}, 'a file was x, is now y'), ({}, {'nats': 100.04}, ''),
    ({}, {'nats': 100.051}, 'the code has changed: in a dry run nats was 100.0, is now 100.051'),
    ({}, {'nats': 99.9}, 'code has changed'), ({}, {'nats': 99.9, 'torch': '2.1'}, ''),
    ({}, {'zero': 5e-7}, ''), ({}, {'zero': 2e-6}, 'code has changed'),
    ({}, {'more': {'new': 1.}}, 'in a dry run new was None, is now 1.0'),
    ({'more': {'old': 1.}}, {}, 'in a dry run old was 1.0, is now None')])
def test_what_two_runs_differ_in(before, now, found):
    said = runs.difference(config_of(**before), config_of(**now))
    assert found in said and bool(found) == bool(said)


def test_what_a_config_lacks_is_a_difference_only_if_it_is_the_older_one():
    config = config_of()
    assert runs.difference(config, {'arguments': config['arguments']}) == ''
    assert runs.difference(config, config | {'fingerprint': {}}) == ''
    assert all('another kind' in runs.difference(other, config)
               for other in (config | {'fingerprint': {}}, {}, [], None))


def test_a_finished_run_of_code_that_did_something_else_is_not_mistaken(train, monkeypatch):
    calls = []
    monkeypatch.setattr(runs, 'fingerprint', lambda main, args: calls.append(main) or {
        'torch': torch.__version__, 'numbers': {'nats': float(len(calls))}})
    before = stamps(train())
    with refused(r'nats was 1\.0, is now 2\.0; --overwrite .* --resume '):
        train()
    with refused(r'the code has changed: in a dry run nats was 1\.0, is now 3\.0;'):
        train('--resume')
    assert stamps(train('--dry_run', '--run', 'dry').with_name('a_run')) == before
    train('--overwrite')
    assert calls == [main] * 4  # none of the dry run


def test_a_fingerprint_is_what_the_code_does_and_leaves_nothing(tmp_path, monkeypatch, capsys,
                                                                real_fingerprint):
    monkeypatch.setattr(digits, 'SIZES', (600, 200, 100))
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))

    def numbers(threads: int, *words: str) -> dict[str, float]:
        args = a3_vae.parse_args(['--hidden_dim=16', '--n_layers=1', '--batch_size=50', '--resume',
                                  f'--results_dir={tmp_path / "results"}', '--dataset=mnist',
                                  f'--data_dir={tmp_path}', *words])
        before, inside = dict(vars(args)), []
        torch.set_num_threads(threads)
        made = runs.fingerprint(lambda args: (inside.append(torch.get_num_threads()),
                                              a3_vae.main(args)), args)
        assert torch.get_num_threads() == threads and inside == [1] and vars(args) == before
        assert made['torch'] == torch.__version__ and capsys.readouterr() == ('', '')
        assert not list(tmp_path.glob('a3_*')) and not (tmp_path / 'results').exists()
        return made['numbers']
    first = numbers(1)
    torch.manual_seed(99)
    assert numbers(2, '--run=mine', '--precision=bf16') == first
    assert {'epoch0_val_neg_elbo_nats', 'epoch2_train_neg_elbo_nats', 'test_nll_nats',
            'samples_epoch01_means', 'parameters'} <= set(first)
    assert not [name for name in first if re.search('seconds|minutes|memory', name)]
    other = numbers(1, '--lr=0.0016')
    assert runs.difference(config_of(more=first), config_of(more=other))


def test_a_fingerprint_changes_no_run_and_is_not_that_of_the_classifier(
        train, straight, read_run, real_fingerprint):
    def with_classifier(args: argparse.Namespace) -> None:
        folder = args.results_dir / 'classifier_digits'
        main(args)
        folder.mkdir()
        (folder / 'metrics.json').write_text('{"epochs": 1}')
    made = runs.fingerprint(with_classifier, parse('--seed', 7, '--epochs', 9, '--sample', 3))
    assert made['numbers']['epochs'] == 2 and 'epoch2_loss_nats' in made['numbers']
    left, right = read_run(train()), read_run(straight)
    assert left.pop('config.json')['fingerprint']['numbers'] and right.pop('config.json')
    assert left == right


# --- checkpoints ---------------------------------------------------------------------------------


def make(args: argparse.Namespace) -> nn.Module:
    return nn.Linear(2, 2, bias=args.lr > 0.1)


class Payload:
    """When it is unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ('it_ran',)


def changed(**changes) -> Callable[[Path], None]:
    return lambda path: torch.save(torch.load(path, weights_only=True) | changes, path)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)['parts']['model']['weight'].numpy().tobytes()
    content[content.index(weights) + 1] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize('breakage, reason', [
    (Path.unlink, 'train this run first'), (lambda path: path.write_bytes(b''), 'damaged'),
    (lambda path: path.write_bytes(path.read_bytes()[:-99]), 'damaged'),
    (flip_a_bit, 'damaged.*checksums'), (lambda path: torch.save([], path), 'damaged'),
    (changed(format=1), 'has format 1, this code reads format 2'), (changed(parts={}), 'damaged'),
    (changed(script='a3_other'), 'belongs to a3_other.py, not to test_runs.py'),
    (changed(parts={'model': nn.Linear(2, 3, bias=False).state_dict()}), 'another model'),
    (changed(parts={'model': nn.Linear(2, 2).state_dict()}), 'another model'),
    (changed(rows=Payload()), 'more than tensors and numbers')])
def test_a_checkpoint_that_does_not_fit_is_one_line_and_never_run_as_code(
        straight, tmp_path, monkeypatch, breakage, reason):
    monkeypatch.chdir(tmp_path)
    breakage(straight / 'checkpoint.pt')
    with refused(f"{straight / 'checkpoint.pt'} .*{reason}"):
        make_run(parse('--results_dir', straight.parent, '--run', 'a_run')).load('lr')
    assert not Path('it_ran').exists()


def test_weights_of_other_arguments_are_not_loaded(straight):
    run = make_run(parse('--results_dir', straight.parent, '--run', 'a_run', '--lr', 1))
    run.load('epochs')
    with refused(r'is another run: lr was 0\.001, is now 1\.0'):
        run.load('epochs', 'lr')


def test_a_trained_network_is_that_of_the_checkpoint_in_evaluation_mode(straight):
    network = runs.load_trained(straight, 'test_runs', 'model', make)
    saved = torch.load(straight / 'checkpoint.pt', weights_only=True)['parts']['model']['weight']
    assert torch.equal(network.weight, saved) and not network.training


@pytest.mark.parametrize('config, script, part, reason', [
    ('', 'test_runs', 'model', 'config.json is not the config of test_runs.py'),
    ('{"arguments": {}}', 'test_runs', 'model', 'config.json is not the config'),
    ('{"arguments": {"lr": 1}}', 'test_runs', 'model', 'checkpoint.pt is damaged or of another'),
    ('{"arguments": {"lr": 0}}', 'a3_vae', 'model', 'checkpoint.pt belongs to test_runs.py, not'),
    ('{"arguments": {"lr": 0}}', 'test_runs', 'averaged', 'checkpoint.pt is damaged')])
def test_a_network_that_is_not_there_is_one_line(straight, config, script, part, reason):
    (straight / 'config.json').write_text(config)
    with refused(f'{straight}/{reason}'):
        runs.load_trained(straight, script, part, make)
