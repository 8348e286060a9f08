"""The look of every curve and every grid of images, whichever model they show."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from files import atomic, write_csv

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')  # Okabe and Ito
DASHES = ('-', '--', '-.', ':', (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1)))
STYLE = {'pdf.fonttype': 42,  # embedded TrueType: no Type 3
         'font.family': 'STIXGeneral', 'mathtext.fontset': 'stix', 'font.size': 8,
         'axes.titlesize': 8, 'axes.labelsize': 8, 'legend.fontsize': 8, 'legend.frameon': False,
         'xtick.labelsize': 8, 'ytick.labelsize': 8, 'lines.linewidth': 1.2,
         'axes.linewidth': 0.6, 'axes.spines.top': False, 'axes.spines.right': False,
         'axes.grid': True, 'grid.linewidth': 0.4, 'grid.color': '0.9',
         'axes.prop_cycle': matplotlib.cycler(color=COLOURS, linestyle=DASHES)}


@contextmanager
def pdf_figure(filename: Path | str, height: float) -> Iterator[Figure]:
    """A figure as wide as the report's text, `height` inches high, saved when the block ends."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5, height), layout='constrained')
        yield figure
        with atomic(filename) as file:
            figure.savefig(file, format='pdf', dpi=300, metadata={'CreationDate': None})


def save_curves(filename: Path | str, x: list[float], panels: list[dict],
                xlabel: str = 'epoch') -> None:
    """Save curves over ascending x, in panels side by side, as PDF, and their numbers as CSV.

    Each panel has `ylabel` and `curves` ({label: values, None where there is none}), and may have
    `references` ({label: height} of horizontal lines) and `start` (the first x to show).
    """
    with pdf_figure(filename, 1.8) as figure:
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(all_axes, panels, strict=True):
            first = bisect_left(x, panel.get('start', -math.inf))
            for (label, y), colour, dash in zip(panel['curves'].items(), COLOURS, DASHES,
                                                strict=False):
                points = [(a, b) for a, b in zip(x[first:], y[first:], strict=True)
                          if b is not None]
                few = len(points) < max(4, len(x) - first)
                axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, label=label,
                          marker='.' if few else None)
            references = sorted(panel.get('references', {}).items(), key=lambda item: item[1])
            for _, height in references:
                axes.axhline(height, color='0.4', linewidth=0.8, linestyle=':')
            line_height, place = 0.09 * np.ptp(axes.get_ylim()), -math.inf
            for label, height in references:  # to the right of the axes, without overlap
                place = max(height, place + line_height)
                axes.annotate(label, (1.01, place), xycoords=('axes fraction', 'data'),
                              va='center', color='0.3', annotation_clip=False)
            axes.set(xlabel=xlabel, ylabel=panel['ylabel'])
            axes.xaxis.get_major_locator().set_params(integer=True)
            if panel is panels[0] or panel['curves'].keys() != panels[0]['curves'].keys():
                axes.legend()
    columns = {xlabel: x} | {label: y for panel in panels for label, y in panel['curves'].items()}
    rows = zip(*columns.values(), strict=True)
    write_csv(Path(filename).with_suffix('.csv'),
              [dict(zip(columns, row, strict=True)) for row in rows])


def save_grid(filename: Path | str, images: Tensor, columns: int | None = None, scale: int = 3,
              gap: int = 1) -> None:
    """Save images (N, 784) in [0, 1], row by row, as PNG, with grey lines between them.

    Each pixel becomes a square of `scale` × `scale` pixels, so that the file holds the exact
    numbers; a line is `gap` of these squares wide. The grid is square unless `columns` says how
    wide; its last row may be short. NaN is black.
    """
    images = images.nan_to_num().view(-1, 28, 28).cpu().numpy()
    columns, step = columns or math.ceil(math.sqrt(len(images))), 28 + gap
    rows = math.ceil(len(images) / columns)
    grid = np.full((rows * step - gap, columns * step - gap), 0.75, dtype=np.float32)
    for i, image in enumerate(images):
        top, left = i // columns * step, i % columns * step
        grid[top:top + 28, left:left + 28] = image
    grey = (grid.clip(0, 1) * 255).round().astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
    with atomic(filename) as file:  # as RGB, since matplotlib's grey scale does not keep all greys
        imsave(file, np.stack([grey] * 3, axis=-1), format='png', pil_kwargs={'optimize': True})
