"""`a3_compare.py`: nearest images, near copies, tables, the whole path on tiny trained runs."""

import hashlib
import importlib.util
import itertools
import json
import math
import re
import shutil
import socket
import statistics
import time
from pathlib import Path

import matplotlib.image
import pytest
import torch
from scipy.spatial import cKDTree

import a3_compare
import a3_gan
import a3_nf
import a3_vae
import measures
import runs
from conftest import FEWER_DIGITS
from datasets import digits
from datasets.bmnist import bmnist
from datasets.mnist import mnist
from helpers import CODE, assert_one_line, read_csv, stamps

FILES = ['config.json', 'measures.csv', 'metrics.json', 'samples.png', 'table_further.tex',
         'table_quality.tex']
PROXIES = ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY')
TEX = {rf'\{name}' for name in (
    'footnotesize', 'setlength', 'tabcolsep', 'begin', 'end', 'toprule', 'midrule', 'bottomrule',
    'par', 'smallskip', 'parbox', 'linewidth', 'raggedright', 'log', 'pm', 'scriptstyle', 'cdot')}
N = 100  # samples of each tiny run
VAE, GAUSSIAN, GAN, _, FLOW, _ = a3_compare.MODELS
TINY_VAE = 'a3_vae.py --zdim 3 --hidden_dim 16 --n_layers 1 --epochs 1 --iw_samples 2'
MODELS = [
    VAE._replace(name='one', command=TINY_VAE, seeds=(42, 43)),
    GAUSSIAN._replace(name='grey', command=f'{TINY_VAE} --likelihood gaussian'),
    GAN._replace(name='two', command='a3_gan.py --latent_dim 8 --batch_size 50 --epochs 1',
                 seeds=(42,)),
    FLOW._replace(name='three', command='a3_nf.py --n_hidden 4 --n_embedding 2 --epochs 1',
                  seeds=(42,)),
]
TINY = ((a3_compare, 'MODELS', MODELS), (a3_compare, 'N_SAMPLES', N), (a3_gan, 'N_JUDGED', N),
        (a3_gan, 'EVAL_BATCH', 50))
RUNS = ['one_digits', 'one_seed43_digits', 'grey_digits', 'two_digits', 'three_digits']


# --- nearest images and near copies --------------------------------------------------------------


def test_nearest_distances_are_those_of_a_search_tree_and_0_to_a_copy(monkeypatch):
    monkeypatch.setattr(a3_compare, 'ROWS', 7)  # the last block is smaller
    torch.manual_seed(1)
    images, others = torch.rand(40, 30), torch.rand(60, 30)
    images[::9] = others[:5]
    found = a3_compare.nearest_distances(images, others)
    expected, _ = cKDTree(others.double().numpy()).query(images.double().numpy())
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=0)
    assert (found == 0).tolist() == [i % 9 == 0 for i in range(40)]


def test_copies_of_one_grey_level_apart_are_told_apart():
    others = torch.randint(0, 256, (300, 784), generator=torch.Generator().manual_seed(2)) / 255
    images = others[:50].clone()
    images[:, 0] += 1 / 255
    distances = a3_compare.nearest_distances(images, others)
    torch.testing.assert_close(distances, torch.full((50,), 1 / 255), rtol=1e-4, atol=0)


@pytest.fixture(scope='module')
def real() -> dict[str, torch.Tensor]:
    """Three sets from one distribution, and a fourth that nobody has seen."""
    torch.manual_seed(3)
    return {name: torch.rand(size, 20).square() for name, size in
            (('train', 3000), ('val', 1000), ('test', 2000), ('new', 2000))}


@pytest.fixture(scope='module')
def floor(real) -> tuple[dict[str, float], float]:
    return a3_compare.copy_measures(real['test'], real['train'], real['val'])


@pytest.fixture(scope='module')
def copied(real, floor):
    """The measures of images, by the threshold that the test images set."""
    return lambda images: a3_compare.copy_measures(images, real['train'], real['val'], floor[1])[0]


def test_test_images_set_the_floor(real, floor, copied):
    assert floor[0] == copied(real['test'])
    assert floor[0]['near_copy_share'] == pytest.approx(a3_compare.NEAR_COPY, abs=1e-3)
    to_train, _ = cKDTree(real['train'].numpy()).query(real['test'].numpy())
    assert floor[0]['nearest_train_median'] == pytest.approx(sorted(to_train)[999], rel=1e-5)


def test_new_images_are_no_copies_and_copies_are(real, copied):
    assert copied(real['new'])['near_copy_share'] < 0.025
    assert copied(real['train'][:500]) == {'nearest_train_median': 0, 'near_copy_share': 1}
    noise = 0.01 * torch.randn(1000, 20, generator=torch.Generator().manual_seed(4))
    mixed = torch.cat([real['new'][:1000], real['train'][:1000] + noise])
    assert copied(mixed)['near_copy_share'] == pytest.approx(0.5, abs=0.02)


def test_copies_of_validation_images_are_none(real, copied):
    assert copied(real['val'][:500])['near_copy_share'] == 0


def test_an_image_in_both_sets_is_a_copy(real, floor):
    both = torch.cat([real['val'], real['train'][:1]])
    found, _ = a3_compare.copy_measures(real['train'][:1], real['train'], both, floor[1])
    assert found['near_copy_share'] == 1


def test_blur_brings_images_near_but_makes_no_copies(real, floor, copied):
    found = copied(0.3 * real['new'] + 0.7 * real['train'].mean(0))
    assert found['nearest_train_median'] < 0.9 * floor[0]['nearest_train_median']
    assert found['near_copy_share'] < 0.025


# --- samples -------------------------------------------------------------------------------------


def test_samples_are_of_8_bits_and_the_rate_is_that_of_the_median_block(monkeypatch):
    ticks = iter([0, 1] * 4 + [0, 100] + [0, 2] * 5)
    monkeypatch.setattr(time, 'perf_counter', lambda: next(ticks))
    asked = []

    def sampler(n: int) -> torch.Tensor:
        asked.append(n)
        return torch.rand(n, 784)
    images, rate = a3_compare.draw(sampler, 200)
    assert asked == [20] * 10 and images.shape == (200, 784)
    assert rate == 10  # blocks of 20 take 1, 2 or 100
    levels = 255 * images
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert len(levels.round().unique()) == 256


def test_the_vae_is_sampled_by_its_means():
    model = a3_vae.VAE(16, 3, 1).eval()
    torch.manual_seed(5)
    images = a3_compare.vae_sampler(model)(6)
    torch.manual_seed(5)
    assert (images == model.sample(6)[1]).all() and images.unique().numel() > 2


def test_the_gan_is_sampled_as_its_script_does():
    torch.manual_seed(6)
    averaged = a3_gan.average(a3_gan.Generator(8), 0.9)
    sampler = a3_compare.gan_sampler(averaged.eval())
    torch.manual_seed(7)
    images = sampler(6).detach()
    torch.manual_seed(7)
    assert (images == a3_gan.sample(averaged, torch.randn(6, 8))).all()


def test_the_flow_is_sampled_at_whole_grey_values():
    torch.manual_seed(8)
    model = a3_nf.Model([784], a3_nf.MultiScaleFlow(4, 1, 2))  # at first uniform
    images = a3_compare.flow_sampler(model)(50)
    assert images.unique().numel() == 256 and (images.min(), images.max()) == (0, 1)


@pytest.mark.parametrize('likelihood', ['bernoulli', 'gaussian'])
def test_the_vae_decodes_what_it_was_trained_on(likelihood):
    torch.manual_seed(9)
    model = a3_vae.VAE(16, 3, 1, likelihood=likelihood)
    grey = torch.randint(0, 256, (5, 784)).float()
    bits = (grey > 128).float()
    with torch.no_grad():
        errors = a3_compare.vae_errors(model, grey, bits)
        x = bits if likelihood == 'bernoulli' else (grey + 0.5) / 256
        expected = model.decoder(model.encoder(x)[0]) - x
    torch.testing.assert_close(errors, expected, rtol=0, atol=0 if x is bits else 0.01)


def test_the_flow_decodes_exactly():
    torch.manual_seed(10)
    model = a3_nf.Model([784], a3_nf.MultiScaleFlow(4, 1, 2))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        errors = a3_compare.flow_errors(model, torch.randint(0, 256, (300, 784)).float(), None)
    assert errors.shape == (300, 784) and 0 < errors.abs().max() < 1e-9


# --- tables --------------------------------------------------------------------------------------


def test_runs_are_summarised_by_mean_and_sample_standard_deviation():
    rows = [{'run': name, 'frechet': value, 'test_bpd': None, 'train_minutes': minutes,
             'parameters': 10} for name, value, minutes in (('a', 1., 5.), ('b', 2., 7.),
                                                            ('c', 6., 9.))]
    assert a3_compare.summarise(rows) == {'frechet': 3., 'frechet_spread': math.sqrt(7),
                                          'train_minutes': 5., 'parameters': 10}
    assert a3_compare.summarise(rows[1:2]) == {'frechet': 2., 'train_minutes': 7.,
                                               'parameters': 10}


@pytest.mark.parametrize('mean, spread, text', [
    (8.2649, 0.4321, r'8.3 \pm 0.4'), (8.2649, 0.1234, r'8.26 \pm 0.12'),
    (8.2649, 0.0996, r'8.26 \pm 0.10'), (8.2649, 0.096, r'8.26 \pm 0.10'),
    (8.2649, 0.094, r'8.26 \pm 0.09'), (0.89712, 0.00351, r'0.897 \pm 0.004'),
    (164.21, 14.4, r'164 \pm 14'), (164.21, 3.9, r'164 \pm 4'), (164.21, 230., r'164 \pm 230'),
    (87.2, 0., r'87 \pm 0'), (0.5, 0.0195, r'0.50 \pm 0.02'), (0.5, 0.01949, r'0.50 \pm 0.02'),
    (0.5, 0.0149, r'0.500 \pm 0.015'),
    (0.147171, 0.000101, r'0.1472 \pm 0.0001'), (1., 1e-8, r'1.0000 \pm 0.0000')])
def test_a_spread_decides_the_digits(mean, spread, text):
    mean_text, _, spread_text = text.partition(' ')
    assert a3_compare.formatted(mean, spread) == (
        rf'${mean_text}\,{{\scriptstyle{spread_text}}}$')


@pytest.mark.parametrize('mean, text', [
    (None, '--'), (0.0, '0.00'), (5.0712, '5.07'), (64.96, '65.0'), (99.96, '100'),
    (0.99408, '0.99'), (0.475212, '0.48'), (0.0012345, '0.00'), (9.996, '10.0'), (999.6, '1,000'),
    (31234., '31,200'), (8.04e-8, r'$8 \cdot 10^{-8}$'), (2.6e-13, r'$3 \cdot 10^{-13}$')])
def test_without_a_spread_there_are_three_digits(mean, text):
    assert a3_compare.formatted(mean) == text


def assert_is_tex(text: str, n_columns: int, labels: list[str]) -> None:
    """A booktabs tabular of those columns and rows, and a note, that TeX can read."""
    begin, *head = re.findall(r'^\\begin\{tabular\}\{@\{\}(l)(r+)@\{\}\}$', text, re.M)[0]
    assert begin == 'l' and len(head[0]) == n_columns
    rows = [line[:-3] for line in text.splitlines() if line.endswith(r' \\')]
    assert [row.count('&') for row in rows] == [n_columns] * len(rows)
    assert [row.partition(' & ')[0] for row in rows[2:]] == labels
    depths = list(itertools.accumulate((character == '{') - (character == '}')
                                       for character in re.sub(r'\\[{}]', '', text)))
    assert min(depths) == depths[-1] == 0
    assert text.isascii() and re.sub(r'\\%', '', text).count('%') == 1  # after the tab's width
    assert not set('#~') & set(text) and text.count('$') % 2 == 0
    assert set(re.findall(r'\\[A-Za-z]+', text)) <= TEX
    outside_math = re.sub(r'\$[^$]*\$', '', text)
    assert not set('^_') & set(outside_math)


def test_a_table_is_tex_with_all_or_no_measures():
    full = {key: 12.34 for name, *_ in a3_compare.QUALITY for key in (name, f'{name}_spread')}
    lines = {'real digits': {}, 'VAE': full, 'GAN': {'frechet': 1e-9}}
    text = a3_compare.table(a3_compare.QUALITY, lines, 'A note of 3\\,\\%.')
    assert_is_tex(text, 7, list(lines))
    assert r'real digits & -- & -- & -- & -- & -- & -- & -- \\' in text
    assert r'VAE & $12\,{\scriptstyle\pm 12}$ & ' in text  # and in thousandths and per cent
    assert r' & $12340\,{\scriptstyle\pm 12340}$ & $1234\,{\scriptstyle\pm 1234}$ & ' in text


# --- the runs ------------------------------------------------------------------------------------


def test_every_run_is_made_by_make_results_with_the_same_command():
    spec = importlib.util.spec_from_file_location('results', CODE.parent / 'report/results.py')
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    jobs = {job.folder: job.command.split() for job in results.MAIN}
    for model in a3_compare.MODELS:
        for seed in model.seeds:
            parse = a3_compare.KINDS[model.command.split()[0]].parse_args
            words = [*model.command.split()[1:], '--seed', str(seed)]
            assert parse(words) == parse(jobs[model.folder(seed)][1:]), model.folder(seed)


def test_all_that_is_missing_is_one_line_with_the_commands(tmp_path, run_here):
    done = run_here('a3_compare.py', '--dataset', 'digits', '--results_dir', tmp_path / 'none')
    assert_one_line(done, 'missing, unfinished or without weights: vae_z20_digits, '
                    'vae_z20_seed43_digits, vae_z20_seed44_digits, vae_gaussian_z20_digits, .*, '
                    'nf_mlp_digits; make them with: python code/a3_vae.py')
    commands = done.stderr.strip().split('make them with: ')[1].split(' && ')
    assert len(commands) == 12 and commands[2] == (
        'python code/a3_vae.py --zdim 20 --iw_samples 1000 --seed 44 --run vae_z20_seed44_digits '
        f'--dataset digits --results_dir {tmp_path / "none"}')
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> tuple[Path, dict[str, tuple[int, int]]]:
    """The folder of a comparison of tiny trained runs, and what the runs' folders held before."""
    results = tmp_path_factory.mktemp('results')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'SIZES', FEWER_DIGITS)
        for where, name, value in TINY:
            patch.setattr(where, name, value)
        for model in MODELS:
            kind = a3_compare.KINDS[model.command.split()[0]]
            module = importlib.import_module(model.command.split('.')[0])
            for seed in model.seeds:
                module.main(kind.parse_args([
                    *model.command.split()[1:], '--seed', str(seed), '--dataset', 'digits',
                    '--run', model.folder(seed) + '_digits', '--results_dir', str(results)]))
        before = {name: stamps(results / name) for name in (*RUNS, 'classifier_digits')}
        a3_compare.main(a3_compare.parse_args(['--dataset', 'digits', '--results_dir',
                                               str(results)]))
    return results / 'compare_digits', before


@pytest.fixture
def compare(run_here, monkeypatch):
    """`a3_compare.py` on the tiny runs of a results folder."""
    for where, name, value in TINY:
        monkeypatch.setattr(where, name, value)
    return lambda results, *words: run_here('a3_compare.py', '--dataset', 'digits',
                                            '--results_dir', results, *words)


def test_a_comparison_leaves_these_files_and_the_runs_as_they_were(finished):
    folder, before = finished
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert {path.name for path in folder.parent.iterdir()} == {*before, folder.name}
    assert {name: stamps(folder.parent / name) for name in before} == before


def test_every_run_has_a_row_with_every_measure_that_it_can_have(finished):
    folder, _ = finished
    rows = {row['run']: row for row in read_csv(folder / 'measures.csv')}
    assert list(rows) == ['floor', *RUNS]
    codes = {'reconstruction_rms'}
    costs = {'parameters', 'train_minutes', 'images_per_second'}
    absent = {'floor': {'test_nll_nats', 'test_bpd'} | codes | costs, 'one_digits': {'test_bpd'},
              'one_seed43_digits': {'test_bpd'}, 'grey_digits': {'test_nll_nats'},
              'two_digits': {'test_nll_nats', 'test_bpd'} | codes,
              'three_digits': {'test_nll_nats'}}
    assert {name: {key for key in row if row[key] == ''} for name, row in rows.items()} == absent
    for name in RUNS:
        of_run = json.loads((folder.parent / name / 'metrics.json').read_text())
        row = {key: float(value) for key, value in rows[name].items() if key != 'run' and value}
        assert row['parameters'] == of_run['parameters']
        assert row['train_minutes'] == of_run['train_minutes']
        assert row.get('test_bpd') == of_run.get('test_nll_bpd', of_run.get('test_bpd'))
        assert row.get('test_nll_nats', 0) == (of_run['test_nll_nats'] if 'one' in name else 0)


def test_measures_are_in_their_ranges_and_real_images_do_better(finished):
    floor, *rows = ({key: float(value) for key, value in row.items() if key != 'run' and value}
                    for row in read_csv(finished[0] / 'measures.csv'))
    for row in rows:
        assert row['frechet'] > floor['frechet'] > 0 and row['images_per_second'] > 0
        assert 1 <= row['inception_score'] < floor['inception_score'] <= 10
        assert all(0 <= row[name] <= 1 for name in
                   ('precision', 'recall', 'coverage', 'near_copy_share', 'class_share_max'))
        assert row['coverage'] < floor['coverage'] and row['nearest_train_median'] > 0
    assert all(0.05 < row['reconstruction_rms'] < 1 for row in rows[:3])
    assert 0 <= rows[-1]['reconstruction_rms'] < 1e-6


def test_the_floor_and_a_run_are_measured_as_by_hand(finished, monkeypatch):
    monkeypatch.setattr(digits, 'SIZES', FEWER_DIGITS)
    folder, _ = finished
    train, val, test = mnist(dataset='digits')
    rows = {row['run']: row for row in read_csv(folder / 'measures.csv')}
    classifier = measures.load_classifier(folder.with_name('classifier_digits'), train, val)
    judge = measures.Judge(classifier, test.images / 255, test.labels)
    network = runs.load_trained(folder.with_name('three_digits'), 'a3_nf.py', 'model',
                                a3_compare.make_flow)
    runs.seed_all(42, 'compared three_digits')
    with torch.no_grad():
        images = torch.cat([network.sample(10).floor() / 255 for _ in range(10)])
    for name, those in (('floor', val.images / 255), ('three_digits', images)):
        for measure, value in judge.measure(those).items():
            assert float(rows[name][measure]) == pytest.approx(value, rel=1e-5, abs=1e-9)
    for name, those in (('floor', test.images / 255), ('three_digits', images)):
        to_train, _ = cKDTree(train.images.numpy() / 255).query(those.numpy())
        assert float(rows[name]['nearest_train_median']) == pytest.approx(
            sorted(to_train)[N // 2 - 1], rel=1e-5)
    assert float(rows['floor']['near_copy_share']) == pytest.approx(0.01)
    network = runs.load_trained(folder.with_name('one_digits'), 'a3_vae.py', 'model',
                                a3_compare.KINDS['a3_vae.py'].make)
    with torch.no_grad():
        bits = bmnist(dataset='digits')[2].images[::10].float()
        errors = network.decoder(network.encoder(bits)[0]) - bits
    assert float(rows['one_digits']['reconstruction_rms']) == pytest.approx(
        float(errors.square().mean().sqrt()), rel=1e-5)


def test_metrics_are_means_and_spreads_of_the_rows(finished):
    folder, _ = finished
    metrics = json.loads((folder / 'metrics.json').read_text())
    rows = {row['run']: row for row in read_csv(folder / 'measures.csv')}
    expected = {f'floor_{key}': float(value) for key, value in rows['floor'].items()
                if key != 'run' and value}
    for model in MODELS:
        of_model = [rows[model.folder(seed) + '_digits'] for seed in model.seeds]
        for key in of_model[0]:
            if key == 'run' or not of_model[0][key]:
                continue
            values = [float(row[key]) for row in of_model]
            if key in ('parameters', 'train_minutes', 'images_per_second'):
                expected[f'{model.name}_{key}'] = values[0]
            else:
                expected[f'{model.name}_{key}'] = sum(values) / len(values)
                if len(values) > 1:
                    expected[f'{model.name}_{key}_spread'] = statistics.stdev(values)
    others = {'seed': 42, 'samples': N}
    assert {key: metrics.pop(key) for key in others} == others
    assert 0 < metrics.pop('near_copy_ratio') < 1 and len(metrics.pop('classifier_sha256')) == 64
    assert set(metrics) == set(expected)
    for key, value in expected.items():  # the rows have six digits
        mean = expected[key.removesuffix('_spread')]
        assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-5 * abs(mean)), key


def test_the_config_names_the_very_runs(finished):
    folder, _ = finished
    config = json.loads((folder / 'config.json').read_text())
    assert config['script'] == 'a3_compare' and config['arguments']['seed'] == 42
    assert {'digits.npz', 'bits_test'} <= set(config['data']['sha256'])
    assert config['runs'] == {
        name: hashlib.sha256((folder.parent / name / 'metrics.json').read_bytes()).hexdigest()
        for name in RUNS}


def test_tables_are_tex_and_say_what_metrics_say(finished):
    folder, _ = finished
    metrics = json.loads((folder / 'metrics.json').read_text())
    labels = ['real digits', *(model.label for model in MODELS)]
    for name, columns in (('quality', a3_compare.QUALITY), ('further', a3_compare.FURTHER)):
        text = (folder / f'table_{name}.tex').read_text()
        assert_is_tex(text, len(columns), labels)
        cells = {line.split(' & ')[0]: line[:-3].split(' & ')[1:] for line in text.splitlines()
                 if line.split(' & ')[0] in labels}
        for key, row in zip(['floor', *(model.name for model in MODELS)], cells.values(),
                            strict=True):
            for (measure, _, _, factor), cell in zip(columns, row, strict=True):
                mean = metrics.get(f'{key}_{measure}')
                typed = re.match(r'\$?([\d.,]+)( \\cdot 10\^\{(-\d+)\})?', cell)
                assert (mean is None) == (cell == '--')
                assert ('pm' in cell) == (f'{key}_{measure}_spread' in metrics)
                if mean is not None:
                    value = float(typed[1].replace(',', '')) * 10 ** int(typed[3] or 0)
                    spread = metrics.get(f'{key}_{measure}_spread', 0)
                    assert value == pytest.approx(factor * mean, rel=0.06 if typed[2] else 5e-3,
                                                  abs=max(0.6 * factor * spread, 5.1e-3))
    note = (folder / 'table_further.tex').read_text()
    assert '600 training' in note and '100 test' in note and '200 validation' in note


def test_the_figure_is_pixel_for_pixel_what_was_drawn(finished, monkeypatch):
    monkeypatch.setattr(digits, 'SIZES', FEWER_DIGITS)
    folder, _ = finished
    picture = (255 * matplotlib.image.imread(folder / 'samples.png')[:, :, :3]).round()
    assert picture.shape[:2] == (5 * (57 * 2 + 16) - 16, 200 + (25 * 29 - 1) * 2)
    *_, test = mnist(dataset='digits')
    for index, (row, column) in ((0, (0, 0)), (26, (1, 1)), (49, (1, 24))):
        top, left = row * 58, 200 + column * 58
        found = picture[top:top + 56, left:left + 56]
        assert (found[::2, ::2] == found[1::2, 1::2]).all()
        assert (found[::2, ::2, 0] == test.images[index].view(28, 28).numpy()).all()
    for i, name, script in ((1, 'one_digits', 'a3_vae.py'), (4, 'three_digits', 'a3_nf.py')):
        kind = a3_compare.KINDS[script]
        network = runs.load_trained(folder.with_name(name), script, kind.part, kind.make)
        runs.seed_all(42, f'compared {name}')
        with torch.no_grad():
            first = (255 * kind.sampler(network)(10)[0]).round().view(28, 28).numpy()
        assert (picture[i * 130:i * 130 + 56:2, 200:256:2, 0] == first).all()
    assert all(picture[i * 130:i * 130 + 114, :200].min() < 100 for i in range(5))  # labels


def test_the_same_seed_gives_the_same_and_another_seed_others(finished, compare, tmp_path):
    folder, _ = finished
    other = shutil.copytree(folder.parent, tmp_path / 'results')

    def decided(name: str) -> list[dict]:
        return [{key: value for key, value in row.items() if key != 'images_per_second'}
                for row in read_csv(other / name / 'measures.csv')]
    before = decided(folder.name)
    picture = (folder / 'samples.png').read_bytes()
    assert compare(other).returncode == 0
    assert decided(folder.name) == before
    assert (other / folder.name / 'samples.png').read_bytes() == picture
    assert compare(other, '--seed', 1).returncode == 0
    after = decided(folder.name)
    assert before[0] == after[0]  # the floor
    assert all(a['frechet'] != b['frechet'] for a, b in zip(before[1:], after[1:], strict=True))


@pytest.mark.parametrize('name', ['metrics.json', 'checkpoint.pt'])
def test_one_missing_run_is_one_line_and_nothing_is_written(finished, compare, tmp_path, name):
    results = shutil.copytree(finished[0].parent, tmp_path / 'results')
    (results / 'one_seed43_digits' / name).unlink()
    before = {path.name: stamps(path) for path in results.iterdir()}
    done = compare(results)
    assert_one_line(done, 'weights: one_seed43_digits; make it with: python code/a3_vae.py --zdim '
                    '3 .* --seed 43 --run one_seed43_digits --dataset digits --results_dir ')
    assert {path.name: stamps(path) for path in results.iterdir()} == before and not done.stdout


@pytest.mark.parametrize('name, content, reason', [
    ('checkpoint.pt', b'PK', 'is damaged or of another model'),
    ('config.json', b'{}', 'is not the config of a3_nf.py')])
def test_a_damaged_run_is_one_line(finished, compare, tmp_path, name, content, reason):
    results = shutil.copytree(finished[0].parent, tmp_path / 'results')
    (results / 'three_digits' / name).write_bytes(content)
    before = stamps(results / finished[0].name)
    assert_one_line(compare(results), f'three_digits/{name} {reason}')
    assert stamps(results / finished[0].name) == before


def test_samples_that_are_no_numbers_end_with_status_1(finished, compare, monkeypatch, tmp_path):
    results = shutil.copytree(finished[0].parent, tmp_path / 'results')
    before = stamps(results / finished[0].name)
    kind = a3_compare.KINDS['a3_nf.py']._replace(
        sampler=lambda model: lambda n: torch.full((n, 784), math.nan))
    monkeypatch.setitem(a3_compare.KINDS, 'a3_nf.py', kind)
    done = compare(results)
    assert done.returncode == 1 and re.fullmatch(
        r'a3_compare.py: error: three_digits: frechet is nan\n', done.stderr)
    assert stamps(results / finished[0].name) == before


def test_a_dry_run_is_offline_and_leaves_the_results_alone(tmp_path, run_script):
    here, temporary = tmp_path / 'here', tmp_path / 'temporary'
    here.mkdir(), temporary.mkdir()
    with socket.create_server(('127.0.0.1', 0)) as server:  # whoever wants the network comes here
        proxy = f'http://127.0.0.1:{server.getsockname()[1]}'
        done = run_script('a3_compare.py', '--dry_run', '--data_dir', 'empty', '--results_dir',
                          'results', cwd=here, fewer_digits=True,
                          environment={name: proxy for name in PROXIES}
                          | {'TMPDIR': str(temporary)})
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert done.returncode == 0, done.stderr
    assert [line.split(':')[0] for line in done.stderr.splitlines()] == ['WARNING'] * 2
    assert not any(here.iterdir())
    [folder] = temporary.glob('a3_*/compare_digits')
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert done.stdout.splitlines()[-1] == f'files in {folder}: ' + ', '.join(FILES)
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))
    assert {'vae_z20_frechet_spread', 'nf_mlp_frechet', 'floor_coverage'} <= set(metrics)
    assert_is_tex((folder / 'table_quality.tex').read_text(), 7,
                  ['real digits', *(model.label for model in a3_compare.MODELS)])
