"""The figures: exact pixels, embedded fonts, the numbers beside the curves, the same bytes."""

import contextlib
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import figures


@pytest.mark.parametrize('N, columns, scale, gap', [(6, 3, 1, 0), (5, None, 3, 1), (1, 1, 2, 1),
                                                    (2, 5, 1, 0), (3, 2, 1, 2)])
def test_a_grid_is_pixel_exact(tmp_path, N, columns, scale, gap):
    grey = np.random.default_rng(0).integers(0, 256, (N, 28, 28))
    grey[0].flat[:256] = range(256)
    images = torch.tensor(grey / 255 - 0.0015).view(N, 784)  # to be rounded, and at 0 clipped
    images[images > 0.998] = 1.2
    images[0, 0] = math.nan
    figures.save_grid(tmp_path / 'grid.png', images, columns, scale, gap)
    read = (matplotlib.image.imread(tmp_path / 'grid.png') * 255).round().astype(int)
    assert (read[..., :3] == read[..., :1]).all()
    columns = columns or 3  # the smallest square that they fit into
    rows, step = math.ceil(N / columns), 28 + gap
    expected = np.full((rows * step - gap, columns * step - gap), 191)  # lines: 0.75
    for i, image in enumerate(grey):
        top, left = i // columns * step, i % columns * step
        expected[top:top + 28, left:left + 28] = image
    np.testing.assert_array_equal(read[..., 0], np.kron(expected, np.ones((scale, scale))))


def save_example(path: Path) -> None:
    figures.save_curves(path, [0, 1, 2, 3, 4], [
        {'ylabel': 'bound, nats', 'references': {'high': 2.51, 'low': 2.5},
         'curves': {'training': [1., 1 / 3, 2., 1., 1.], 'validation': [3., 2., 1., 1., 1.]}},
        {'ylabel': 'from step 1', 'start': 1,
         'curves': {'training': [1., 1 / 3, 2., 1., 1.], 'validation': [3., 2., 1., 1., 1.]}},
        {'ylabel': 'from step 3', 'curves': {'rate': [5., 4., 3., 2., 1.]}, 'start': 3}], 'step')


def test_curves_are_a_vector_pdf_with_embedded_fonts_and_their_numbers_beside_it(tmp_path):
    save_example(tmp_path / 'a.pdf')
    content = (tmp_path / 'a.pdf').read_bytes()
    assert content.startswith(b'%PDF') and b'/FontFile2' in content and b'/Type3' not in content
    assert b'/Subtype /Image' not in content
    assert b'/MediaBox [ 0 0 396 129.6 ' in content  # 5.5 in by 1.8 in, at 72 points an inch
    assert (tmp_path / 'a.csv').read_text() == (
        'step,training,validation,rate\n0,1,3,5\n1,0.333333,2,4\n2,2,1,3\n3,1,1,2\n4,1,1,1\n')


def test_panels_show_curves_from_their_start_with_references_that_do_not_overlap(monkeypatch):
    figure = Figure()
    monkeypatch.setattr(figures, 'write_csv', lambda *_: None)
    monkeypatch.setattr(figures, 'pdf_figure', lambda *_: contextlib.nullcontext(figure))
    save_example(Path('a.pdf'))
    first, second, third = figure.axes
    assert [len(axes.lines) for axes in figure.axes] == [4, 2, 1]  # two of the first: references
    assert [list(axes.lines[0].get_xdata()) for axes in figure.axes] == [
        [0, 1, 2, 3, 4], [1, 2, 3, 4], [3, 4]]
    assert list(second.lines[1].get_ydata()) == [2, 1, 1, 1]
    assert [axes.lines[0].get_marker() for axes in figure.axes] == ['None', 'None', '.']
    assert [line.get_color() for line in second.lines] == list(figures.COLOURS[:2])
    assert [line.get_linestyle() for line in second.lines] == list(figures.DASHES[:2])
    assert [axes.get_legend() is not None for axes in figure.axes] == [True, False, True]
    assert [axes.get_ylabel() for axes in figure.axes][2] == 'from step 3'
    assert third.get_xlabel() == 'step'
    assert [list(line.get_ydata()) for line in first.lines[2:]] == [[2.5] * 2, [2.51] * 2]
    (low, low_height), (high, high_height) = ((text.get_text(), text.xy[1])
                                              for text in first.texts)
    assert (low, high, low_height) == ('low', 'high', 2.5) and 2.6 < high_height < 2.9
    assert {text.xycoords for text in first.texts} == {('axes fraction', 'data')}


@pytest.mark.parametrize('save', [
    lambda path: save_example(path.with_suffix('.pdf')),
    lambda path: figures.save_grid(path.with_suffix('.png'), torch.eye(28).view(1, 784))],
    ids=['curves', 'grid'])
def test_a_figure_is_the_same_bytes_each_time_and_carries_no_date(tmp_path, monkeypatch, save):
    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save(tmp_path / 'a')
    first = contents()
    monkeypatch.setenv('SOURCE_DATE_EPOCH', '1000000000')  # matplotlib's clock, years earlier
    save(tmp_path / 'a')
    assert contents() == first and b'CreationDate' not in b''.join(first.values())
