"""The command line, the run's folder and the figures: nothing half written, nothing mistaken."""

import argparse
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

import figures
import runs

SOURCE = {'dataset': 'mnist', 'description': 'nothing', 'sha256': {'a file': 'its digest'}}


def build_parser() -> runs.Parser:
    parser = runs.Parser('a script of these tests')
    parser.add_argument('--epochs', type=runs.whole_number(1), default=4)
    parser.add_argument('--n_layers', type=runs.whole_number(1), default=3)
    parser.add_argument('--lr', type=runs.number(0), default=1e-3)
    parser.add_argument('--share', type=runs.number(0, 1), default=0.1)
    parser.add_argument('--told', type=runs.whole_number(1), default=20)
    parser.add_shared_arguments()
    return parser


def make_run(folder: Path, *words: str, script: str = __file__, source: dict = SOURCE,
             part: nn.Module | None = None) -> runs.Run:
    args = build_parser().parse_args(['--results_dir', str(folder), *words])
    return runs.Run(script, args, 'a_run', source, torch.device('cpu'),
                    {'model': part or nn.Linear(2, 2, bias=False)})


def train(run: runs.Run, until: int = 1000) -> None:
    """A random walk of the weights, stopped after epoch `until`."""
    weight = run.parts['model'].weight
    if run.begin(batches=1):
        for epoch in run.epochs():
            with torch.no_grad():
                weight.copy_(torch.randn(2, 2) + (0 if epoch == 0 else weight))
            run.end_epoch({'epoch': epoch, 'loss_nats': weight.sum().item(),
                           'seconds': float(epoch)})
            if epoch == until:
                return
        run.finish({'final_nats': weight.sum().item()})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('content, read', [('π\n', Path.read_text), (b'\0\xff', Path.read_bytes),
                                           (memoryview(b'\0\xff'), Path.read_bytes)])
def test_write_atomic_replaces_the_content(tmp_path, content, read):
    path = tmp_path / 'file'
    path.write_text('much longer, and older')
    runs.write_atomic(path, content)
    assert read(path) == content and os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('step', ['write_bytes', 'replace'])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    def disk_full(path, *_):
        Path(path).write_text('half')
        raise OSError(28, 'No space left on device')
    (tmp_path / 'file').write_text('old')
    monkeypatch.setattr(*((Path, step) if step == 'write_bytes' else (os, step)), disk_full)
    with pytest.raises(OSError, match='No space left'):
        runs.write_atomic(tmp_path / 'file', b'new')
    assert contents(tmp_path) == {'file': b'old'}


def test_write_csv_has_a_header_empty_cells_and_six_digits(tmp_path):
    runs.write_csv(tmp_path / 'a.csv', [{'epoch': 0, 'nats': None, 'seconds': 1 / 3},
                                        {'epoch': 1, 'nats': 123456.789, 'seconds': 2e-9}])
    assert (tmp_path / 'a.csv').read_text() == ('epoch,nats,seconds\n0,,0.333333\n'
                                                '1,123457,2e-09\n')


SCRIPT = '''"""Docstring."""


def double(x):  # of anything
    """Twice x."""
    return x * 2, 'a # in a string'
'''


@pytest.mark.parametrize('old, new, same', [
    ('Docstring.', 'Another.\n\nLonger.', True), ('of anything', 'of numbers', True),
    ('Twice', 'Two times', True), ('\n\n\n', '\n', True), ('x * 2', '2 * x', False),
    ('a # in', 'b # in', False), ('# in a', '# in the', False)])
def test_the_digest_of_a_script_is_of_its_code_and_not_of_its_prose(tmp_path, old, new, same):
    (tmp_path / 'a.py').write_text(SCRIPT)
    (tmp_path / 'b.py').write_text(SCRIPT.replace(old, new))
    digests = [runs.script_digest(tmp_path / name) for name in ('a.py', 'b.py')]
    assert (digests[0] == digests[1]) == same


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize('words', [['--n_layers', '5'], ['--n-layers', '5'], ['--n-layers=5']])
def test_dashes_stand_for_underscores_in_flags(words):
    assert build_parser().parse_args(words).n_layers == 5


def test_dashes_in_values_stay():
    args = build_parser().parse_args(['--run=a-b', '--data-dir', 'c-d'])
    assert args.run == 'a-b' and args.data_dir == Path('c-d')


@pytest.mark.parametrize('word, suggestion', [
    ('--epoch', '--epochs'), ('--n-layer=3', '--n_layers'), ('--dryrun', '--dry_run'),
    ('--zzz', None), ('stray', None)])
def test_an_unknown_word_is_one_line_with_a_suggestion(capsys, word, suggestion):
    with pytest.raises(SystemExit, match='^2$'):
        build_parser().parse_args([word])
    message = capsys.readouterr().err
    assert message.count('\n') == 1 and word.partition('=')[0].replace('-', '_')[2:] in message
    assert ('did you mean' in message) == (suggestion is not None)
    assert suggestion is None or f'did you mean {suggestion}?' in message


BAD_VALUES = [(flag, value)
              for flag, values in {
                  '--seed': ['-1', '1.5', 'one', '', '1e3'], '--epochs': ['0', '-3', '2.', 'nan'],
                  '--sample': ['0', '-1', 'x'], '--lr': ['-1', 'nan', 'inf', 'fast', ''],
                  '--share': ['1.1', '-0.1', '2'], '--dataset': ['cifar', '']}.items()
              for value in values]


@pytest.mark.parametrize('flag, value', BAD_VALUES)
def test_a_bad_value_is_one_line_that_names_flag_and_value(capsys, flag, value):
    with pytest.raises(SystemExit, match='^2$'):
        build_parser().parse_args([f'{flag}={value}'])
    message = capsys.readouterr().err
    assert message.count('\n') == 1 and flag in message and repr(value) in message


@pytest.mark.parametrize('words, name', [
    ([], 'vae'),
    (['--lr', '0.01'], 'vae_lr0.01'),
    (['--n_layers', '2', '--seed', '43'], 'vae_nlayers2_seed43'),
    (['--lr', '0.001', '--seed', '42'], 'vae'),  # typed, but the defaults
    (['--told', '7', '--device', 'cpu', '--data_dir', 'd', '--resume'], 'vae'),
    (['--lr', '0.01', '--run', 'my run'], 'my run')])
def test_the_folder_is_named_by_what_is_not_default(words, name):
    args = build_parser().parse_args(words)
    assert runs.run_name('vae', build_parser(), args, ('told',), SOURCE) == name


@pytest.mark.parametrize('words, name', [([], 'vae_digits'),
                                         (['--seed', '1'], 'vae_seed1_digits'),
                                         (['--run', 'mine'], 'mine')])
def test_a_run_on_the_shipped_digits_says_so(words, name):
    args = build_parser().parse_args(words)
    source = SOURCE | {'dataset': 'digits'}
    assert runs.run_name('vae', build_parser(), args, ('told',), source) == name


@pytest.mark.parametrize('name', ['', '.', '..', '../up', 'a/b', '/tmp', 'a/', '.hidden'])
def test_run_cannot_leave_the_results_folder(tmp_path, name):
    args = build_parser().parse_args(['--results_dir', str(tmp_path)])
    with pytest.raises(runs.RunError, match='--run'):
        runs.Run(__file__, args, name, SOURCE, torch.device('cpu'), {})


def parser_of_what_trains_nothing() -> runs.Parser:
    parser = runs.Parser('a script of these tests')
    parser.add_shared_arguments(trains=False)
    return parser


def test_a_script_that_trains_nothing_has_the_shared_flags_but_those_of_a_run(capsys):
    shared, of_runs = (set(vars(parser.parse_args([]))) for parser in
                       (parser_of_what_trains_nothing(), build_parser()))
    assert shared == {'seed', 'device', 'data_dir', 'results_dir', 'dataset', 'dry_run'}
    assert of_runs >= shared | {'run', 'resume', 'sample'}
    for words in (['--resume'], ['--run', 'a'], ['--sample', '3']):
        with pytest.raises(SystemExit, match='^2$'):
            parser_of_what_trains_nothing().parse_args(words)
        message = capsys.readouterr().err
        assert message.count('\n') == 1 and f'unknown flag {words[0]}' in message


# --- seeds, devices, endings ---------------------------------------------------------------------


def test_each_seed_and_stream_has_numbers_of_its_own():
    keys = [(1, 11), (11, 1), (1, 1), (11, 11), (111, 0), (0, 111), (1, 'weights'), (1, 'samples'),
            (1, '25 samples'), (2, 'weights'), (0, 0), (0, ''), (0, '0 '), (2**32, 0), (2**40, 1)]
    draws = set()
    for seed, stream in keys:
        runs.seed_all(seed, stream)
        first = torch.randn(4)
        runs.seed_all(seed, stream)
        assert torch.equal(first, torch.randn(4))
        draws.add(tuple(first.tolist()))
    assert len(draws) == len(keys)


@pytest.mark.parametrize('name', ['nonsense', 'cuda:99', 'cpu:-1', '', 'hpu', 'meta'])
def test_a_device_that_cannot_compute_is_one_line(name):
    with pytest.raises(runs.RunError, match='^--device [^\n]*$') as caught:
        runs.pick_device(name)
    assert caught.value.status == 2


def test_a_device_that_is_there_is_taken():
    assert runs.pick_device('cpu') == torch.device('cpu')
    assert torch.zeros(1, device=runs.pick_device('auto')).item() == 0


@pytest.mark.parametrize('error, status, line', [
    (runs.RunError('first,\nsecond'), 2, 'error: first, second\n'),
    (runs.RunError('diverged', status=1), 1, 'error: diverged\n'),
    (PermissionError(13, 'Permission denied', 'a/b'), 2, "Permission denied: 'a/b'\n"),
    (KeyboardInterrupt(), 130, 'go on with: python script.py --lr 1 --resume\n')])
def test_launch_tells_what_a_user_can_mend_in_one_line(capsys, monkeypatch, error, status, line):
    def main(args: argparse.Namespace) -> None:
        raise error
    monkeypatch.setattr('sys.argv', ['script.py', '--resume', '--lr', '1'])
    with pytest.raises(SystemExit, match=f'^{status}$'):
        runs.launch(main, argparse.Namespace(dry_run=False, sample=None))
    message = capsys.readouterr().err
    assert message.endswith(line) and message.lstrip('\n').count('\n') == 1


@pytest.mark.parametrize('error, status, line', [
    (KeyboardInterrupt, 130, '\nscript.py: interrupted\n'),
    (runs.Terminated, 143, '\nscript.py: terminated\n')])
@pytest.mark.parametrize('parser, words', [
    (parser_of_what_trains_nothing, []), (build_parser, ['--dry_run']),
    (build_parser, ['--sample', '3'])])
def test_what_cannot_be_resumed_ends_without_a_word_of_it(capsys, monkeypatch, parser, words,
                                                          error, status, line):
    def main(args: argparse.Namespace) -> None:
        raise error
    monkeypatch.setattr('sys.argv', ['script.py', '--seed', '1'])
    with pytest.raises(SystemExit, match=f'^{status}$'):
        runs.launch(main, parser().parse_args(words))
    assert capsys.readouterr().err == line


def test_launch_hides_no_fault_of_the_code(monkeypatch):
    monkeypatch.setattr('sys.argv', ['script.py'])
    with pytest.raises(ZeroDivisionError):
        runs.launch(lambda args: 1 / 0, argparse.Namespace())


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def straight(tmp_path) -> Path:
    """The folder of a run that nothing disturbed."""
    train(make_run(tmp_path / 'straight'))
    return tmp_path / 'straight' / 'a_run'


def test_a_run_leaves_config_log_checkpoint_and_metrics(straight):
    assert set(contents(straight)) == {'config.json', 'log.csv', 'checkpoint.pt', 'metrics.json'}
    config = json.loads((straight / 'config.json').read_text())
    assert config['arguments']['seed'] == 42 and config['data'] == SOURCE
    assert {'versions', 'device', 'hardware', 'script_sha256'} <= set(config)
    metrics = json.loads((straight / 'metrics.json').read_text())
    assert metrics['seed'] == 42 and metrics['epochs'] == 4 and metrics['peak_memory_mb'] > 1
    assert metrics['train_minutes'] == pytest.approx((0 + 1 + 2 + 3 + 4) / 60, rel=1e-5)
    log = (straight / 'log.csv').read_text().splitlines()
    assert log[0] == 'epoch,loss_nats,seconds,train_seconds,total_seconds'
    assert [line.split(',')[0] for line in log[1:]] == ['0', '1', '2', '3', '4']


@pytest.mark.parametrize('epoch', [0, 2, 4])
def test_a_stopped_run_resumed_ends_as_one_never_stopped(tmp_path, straight, read_run, epoch):
    train(make_run(tmp_path), until=epoch)
    torch.manual_seed(99)  # another process has another state
    train(make_run(tmp_path, '--resume'))
    assert read_run(tmp_path / 'a_run') == read_run(straight)


@pytest.mark.parametrize('file', ['checkpoint.pt', 'log.csv'])
@pytest.mark.parametrize('epoch', [1, 4])
def test_a_stop_between_the_files_of_an_epoch_is_mended(tmp_path, straight, monkeypatch, read_run,
                                                        file, epoch):
    write, written = runs.write_atomic, []

    def stop(path, content):
        written.append(Path(path).name)
        if written.count(file) == epoch + 1 and written[-1] == file:
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(runs, 'write_atomic', stop)
        with pytest.raises(KeyboardInterrupt):
            train(make_run(tmp_path))
    train(make_run(tmp_path, '--resume'))
    assert read_run(tmp_path / 'a_run') == read_run(straight)


def test_resuming_nothing_is_a_new_run(tmp_path, straight, read_run):
    train(make_run(tmp_path, '--resume'))
    assert read_run(tmp_path / 'a_run') == read_run(straight)


@pytest.mark.parametrize('lost', [None, 'checkpoint.pt'])  # results are committed without it
def test_resuming_a_finished_run_says_so_and_changes_nothing(capsys, straight, lost):
    if lost:
        (straight / lost).unlink()
    before = contents(straight)
    capsys.readouterr()
    train(make_run(straight.parent, '--resume'))
    assert 'finished' in capsys.readouterr().out
    assert contents(straight) == before


def test_a_new_run_removes_what_an_earlier_one_left_and_nothing_else(straight):
    for name in ('samples_epoch77.png', 'curve.pdf', 'notes.txt'):
        (straight / name).write_text('left')
    train(make_run(straight.parent), until=0)
    assert set(contents(straight)) == {'config.json', 'log.csv', 'checkpoint.pt', 'notes.txt'}


@pytest.mark.parametrize('lost', [None, 'config.json'])  # some results are committed without it
def test_an_unfinished_run_has_no_metrics(straight, lost):
    if lost:
        (straight / lost).unlink()
    train(make_run(straight.parent), until=1)
    assert not (straight / 'metrics.json').exists()


def test_a_dry_run_writes_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    run = make_run(tmp_path / 'results', '--dry_run')
    train(run)
    assert run.path('metrics.json').is_file() and not (tmp_path / 'results').exists()


@pytest.mark.parametrize('words, source, name', [
    (['--lr', '0.5'], SOURCE, 'lr was 0.001, is now 0.5'),
    (['--seed', '7'], SOURCE, 'seed was 42, is now 7'),
    (['--epochs', '9'], SOURCE, 'epochs was 4, is now 9'),
    ([], SOURCE | {'sha256': {'a file': 'of another'}}, 'a file was')])
def test_resuming_with_a_difference_is_refused_and_named(tmp_path, words, source, name):
    train(make_run(tmp_path), until=1)
    before = contents(tmp_path / 'a_run')
    with pytest.raises(runs.RunError, match=name) as caught:
        train(make_run(tmp_path, '--resume', *words, source=source))
    assert caught.value.status == 2 and contents(tmp_path / 'a_run') == before


def test_where_files_are_is_no_difference(tmp_path):
    train(make_run(tmp_path), until=1)
    train(make_run(tmp_path, '--resume', '--data_dir', 'elsewhere', '--device', 'cpu'))
    assert (tmp_path / 'a_run' / 'metrics.json').is_file()


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_run_that_diverges_ends_with_status_1_and_its_last_checkpoint(tmp_path, value):
    run = make_run(tmp_path)
    train(run, until=1)
    before = contents(tmp_path / 'a_run')
    with pytest.raises(runs.RunError, match='loss_nats is .* after epoch 2') as caught:
        run.end_epoch({'epoch': 2, 'loss_nats': value, 'seconds': 1.})
    assert caught.value.status == 1 and contents(tmp_path / 'a_run') == before


# --- checkpoints that do not fit -----------------------------------------------------------------


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def assert_refused(run: runs.Run, reason: str) -> None:
    with pytest.raises(runs.RunError, match=reason) as caught:
        run.load()
    message = str(caught.value)
    assert str(run.path('checkpoint.pt')) in message and '\n' not in message


def test_a_run_without_a_checkpoint_cannot_be_loaded(tmp_path):
    assert_refused(make_run(tmp_path), 'train this run first')


@pytest.mark.parametrize('share', [0., 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(straight, share):
    path = straight / 'checkpoint.pt'
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    assert_refused(make_run(straight.parent), 'damaged')


@pytest.mark.parametrize('key, value, reason', [
    ('format', 999, 'format 999'), ('script', 'a3_other', 'a3_other.py'),
    ('parts', {}, 'damaged'), ('rows', None, 'damaged')])
def test_a_checkpoint_of_another_kind_is_refused(straight, key, value, reason):
    saved = torch.load(straight / 'checkpoint.pt', weights_only=True)
    saved = saved | {key: value} if value is not None else saved.keys() - {key}
    torch.save(saved, straight / 'checkpoint.pt')
    assert_refused(make_run(straight.parent), reason)


@pytest.mark.parametrize('part', [nn.Linear(2, 3, bias=False), nn.Linear(2, 2), nn.LayerNorm(2)])
def test_a_checkpoint_of_another_model_is_refused(straight, part):
    assert_refused(make_run(straight.parent, part=part), 'another model')


@pytest.mark.parametrize('dump', [pickle.dumps, None], ids=['pickle', 'torch.save'])
def test_a_checkpoint_is_never_run_as_code(tmp_path, straight, dump):
    path, payload = straight / 'checkpoint.pt', {'format': Payload(tmp_path / 'it_ran')}
    if dump:
        path.write_bytes(dump(payload, protocol=2))
    else:
        torch.save(payload, path)
    assert_refused(make_run(straight.parent), 'damaged')
    assert not (tmp_path / 'it_ran').exists()


# --- the network of a finished run ---------------------------------------------------------------

COMMAND = 'test_runs.py --n_layers 2'


def make_network(args: argparse.Namespace) -> nn.Module:
    return nn.Linear(2, args.n_layers, bias=False)


def assert_not_loaded(folder: Path, reason: str, command: str = COMMAND, part: str = 'model',
                      make: Callable = make_network) -> None:
    with pytest.raises(runs.RunError, match=reason) as caught:
        runs.load_trained(folder, command, part, make)
    message = str(caught.value)
    assert str(folder) in message and '\n' not in message and caught.value.status == 2


@pytest.fixture
def trained(tmp_path) -> Path:
    """The folder of a finished run with an argument that is not at its default."""
    run = make_run(tmp_path, '--n_layers', '2')
    run.parts['optimizer'] = torch.optim.SGD(run.parts['model'].parameters(), lr=1.)
    train(run)
    return tmp_path / 'a_run'


def test_a_trained_network_is_that_of_the_checkpoint_in_evaluation_mode(trained):
    before = contents(trained)
    network = runs.load_trained(trained, COMMAND, 'model', make_network)
    parts = torch.load(trained / 'checkpoint.pt', weights_only=True)['parts']
    assert torch.equal(network.weight, parts['model']['weight']) and 'optimizer' in parts
    assert not network.training and contents(trained) == before


@pytest.mark.parametrize('missing', ['metrics.json', 'checkpoint.pt', 'the folder'])
def test_a_run_that_is_missing_or_unfinished_is_named_with_the_command_that_makes_it(
        trained, missing):
    if missing == 'the folder':
        trained = trained / missing
    else:
        (trained / missing).unlink()
    assert_not_loaded(trained, r'make it with: python code/test_runs\.py --n_layers 2$')


def test_the_network_of_another_script_is_refused(trained):
    assert_not_loaded(trained, r'is of test_runs\.py, not of a3_vae\.py', 'a3_vae.py --zdim 2')


@pytest.mark.parametrize('share', [0., 0.5, 0.99])
def test_the_network_of_a_truncated_checkpoint_is_refused(trained, share):
    path = trained / 'checkpoint.pt'
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    assert_not_loaded(trained, 'checkpoint.pt is damaged')


@pytest.mark.parametrize('part, make', [
    ('model', lambda args: nn.Linear(2, args.n_layers + 1, bias=False)),
    ('model', lambda args: nn.Linear(2, args.n_layers)), ('averaged', make_network)])
def test_a_network_of_another_shape_or_name_is_refused(trained, part, make):
    assert_not_loaded(trained, 'checkpoint.pt is damaged or of another model', part=part,
                      make=make)


@pytest.mark.parametrize('config', [None, '', '[]', '{"arguments": {}}', '{"arguments": [3]}',
                                    '{"arguments": {"n_layers": null}}', '{"other": 3}', b'\xff'])
def test_a_config_without_what_the_network_is_made_of_is_refused(trained, config):
    path = trained / 'config.json'
    if config is None:
        path.unlink()
    else:
        path.write_bytes(config if isinstance(config, bytes) else config.encode())
    assert_not_loaded(trained, r'config\.json is not the config of test_runs\.py')


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize('N, columns, scale, gap', [(6, 3, 1, 0), (5, 3, 3, 1), (1, 1, 2, 1),
                                                    (2, 5, 1, 0), (3, 2, 1, 2)])
def test_a_grid_is_pixel_exact(tmp_path, N, columns, scale, gap):
    H, W = 16, 20
    grey = np.random.default_rng(0).integers(0, 256, (N, H, W))
    grey[0].flat[:256] = range(256)
    figures.save_grid(tmp_path / 'grid.png', (grey / 255).astype(np.float32), columns, scale, gap)
    read = (matplotlib.image.imread(tmp_path / 'grid.png') * 255).round().astype(int)
    if read.ndim == 3:  # red, green, blue, and perhaps opacity
        assert (read[..., :3] == read[..., :1]).all()
        read = read[..., 0]
    rows = math.ceil(N / columns)
    assert read.shape == ((rows * (H + gap) - gap) * scale, (columns * (W + gap) - gap) * scale)
    between = np.ones(read.shape, dtype=bool)
    for i, image in enumerate(grey):
        top, left = i // columns * (H + gap) * scale, i % columns * (W + gap) * scale
        here = np.s_[top:top + H * scale, left:left + W * scale]
        assert (read[here] == image.repeat(scale, 0).repeat(scale, 1)).all()
        between[here] = False
    assert len(np.unique(read[between])) <= 1


def save_example(path: Path) -> None:
    figures.save_curves(path, [0, 1, 2], [
        {'ylabel': 'bound, nats', 'references': {'784 · log ½': 2.5},
         'curves': {'training': [1., 1 / 3, 2.], 'validation': [3., 2., 1.]}},
        {'ylabel': 'the same', 'curves': {'training': [1., 1 / 3, 2.]}, 'start': 1}])


def test_curves_are_vector_pdf_of_the_width_of_the_text_with_embedded_outlines(tmp_path):
    save_example(tmp_path / 'a.pdf')
    content = (tmp_path / 'a.pdf').read_bytes()
    assert content.startswith(b'%PDF') and b'/FontFile2' in content and b'/Type3' not in content
    assert b'/Subtype /Image' not in content
    assert b'/MediaBox [ 0 0 396 ' in content  # 5.5 in of 72 points


def test_curves_stand_beside_the_numbers_that_they_show(tmp_path):
    save_example(tmp_path / 'a.pdf')
    assert (tmp_path / 'a.csv').read_text() == ('epoch,training,validation\n0,1,3\n'
                                                '1,0.333333,2\n2,2,1\n')


@pytest.mark.parametrize('save', [
    lambda path: save_example(path.with_suffix('.pdf')),
    lambda path: figures.save_grid(path.with_suffix('.png'), np.eye(6).reshape(1, 6, 6), 1)],
    ids=['curves', 'grid'])
def test_a_figure_is_the_same_bytes_each_time_and_carries_no_date(tmp_path, monkeypatch,
                                                                  save: Callable):
    save(tmp_path / 'a')
    first = contents(tmp_path)
    monkeypatch.setenv('SOURCE_DATE_EPOCH', '1000000000')  # matplotlib's clock, years earlier
    save(tmp_path / 'a')
    assert contents(tmp_path) == first
    assert not any(b'CreationDate' in content for content in first.values())


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    folder = tmp_path / 'a_run'
    folder.mkdir()
    (folder / 'config.json').write_text('{"name": "a project of the user"}')
    (folder / 'holiday.png').write_bytes(b'a picture')
    before = contents(folder)
    with pytest.raises(runs.RunError, match='something else'):
        train(make_run(tmp_path))
    assert contents(folder) == before


def test_resuming_where_nothing_is_starts_anew_and_says_so(tmp_path, capsys):
    train(make_run(tmp_path, '--resume'))
    assert 'no checkpoint to resume from' in capsys.readouterr().out
    assert 'metrics.json' in contents(tmp_path / 'a_run')


@pytest.mark.parametrize('other', ['--dry_run', '--resume'])
def test_sampling_goes_alone(capsys, other):
    with pytest.raises(SystemExit, match='^2$'):
        build_parser().parse_args(['--sample', '3', other])
    assert capsys.readouterr().err.count('\n') == 1
