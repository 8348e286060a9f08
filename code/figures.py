"""One look for every curve and every grid of images. Nothing here knows a model.

Curves are vector PDF, 5.5 in wide (the report's text width), with the plotted numbers beside them
as CSV. Grids are lossless PNG in which each pixel of an image is a square of whole pixels, so the
file holds the numbers itself.
"""

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave

from runs import write_atomic, write_csv

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')  # Okabe and Ito
DASHES = ('-', '--', '-.', ':', (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1)))
STYLE = {'pdf.fonttype': 42,  # embedded TrueType: no Type 3
         'font.family': 'serif', 'mathtext.fontset': 'dejavuserif', 'font.size': 8,
         'axes.titlesize': 8, 'axes.labelsize': 8, 'legend.fontsize': 8, 'legend.frameon': False,
         'xtick.labelsize': 8, 'ytick.labelsize': 8, 'lines.linewidth': 1.2,
         'axes.linewidth': 0.6, 'axes.spines.top': False, 'axes.spines.right': False,
         'axes.grid': True, 'grid.linewidth': 0.4, 'grid.color': '0.9'}


def save_curves(filename: Path | str, x: list[float], panels: list[dict],
                xlabel: str = 'epoch') -> None:
    """Curves over a common x, panel beside panel, as PDF; and their numbers as CSV beside it.

    Args:
        filename: of the PDF.
        x: the abscissa of every curve.
        panels: each with `ylabel`, with `curves` ({label: values}) and, where wanted, `references`
            ({label: height} of horizontal lines) and `start` (the first x that is shown).
        xlabel: with its unit, if it has one.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 2.1), layout='constrained')
        for i, (axes, panel) in enumerate(zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                              panels, strict=True)):
            shown = [j for j, value in enumerate(x) if value >= panel.get('start', -np.inf)]
            for (label, y), colour, dash in zip(panel['curves'].items(), COLOURS, DASHES,
                                                strict=False):
                axes.plot([x[j] for j in shown], [y[j] for j in shown], color=colour,
                          linestyle=dash, label=label, marker='.' if len(shown) < 4 else None)
            references = sorted(panel.get('references', {}).items(), key=lambda item: item[1])
            for _, height in references:
                axes.axhline(height, color='0.4', linewidth=0.8, linestyle=':')
            line = 0.09 * np.ptp(axes.get_ylim())  # the height of a line of type
            place = -np.inf
            for label, height in references:  # beside the axes: no curve is there
                place = max(height, place + line)
                axes.annotate(label, (1.01, place), xycoords=('axes fraction', 'data'),
                              va='center', color='0.3', annotation_clip=False)
            axes.set_xlabel(xlabel)
            axes.set_ylabel(panel['ylabel'])
            axes.xaxis.get_major_locator().set_params(integer=True)
            if i == 0 or panel['curves'].keys() != panels[0]['curves'].keys():
                axes.legend()
        content = io.BytesIO()
        figure.savefig(content, format='pdf', metadata={'CreationDate': None})
    write_atomic(filename, content.getvalue())
    curves = {label: y for panel in panels for label, y in panel['curves'].items()}
    write_csv(Path(filename).with_suffix('.csv'),
              [{xlabel: value, **{label: y[i] for label, y in curves.items()}}
               for i, value in enumerate(x)])


def save_grid(filename: Path | str, images: np.ndarray, columns: int, scale: int = 3,
              gap: int = 1) -> None:
    """Images side by side as PNG, row by row, white on black, with light lines between them.

    Args:
        filename: of the PNG.
        images: (N, H, W), grey values in [0, 1]; the last row may be short.
        columns: images in a row.
        scale: pixels of the file along one pixel of an image.
        gap: pixels of an image between two images.
    """
    N, H, W = images.shape
    rows = -(-N // columns)
    grid = np.full((rows * (H + gap) - gap, columns * (W + gap) - gap), 0.75, dtype=np.float32)
    for i, image in enumerate(images):
        top, left = i // columns * (H + gap), i % columns * (W + gap)
        grid[top:top + H, left:left + W] = image
    content = io.BytesIO()
    grey = (grid.clip(0, 1) * 255).round().astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
    # As colours: matplotlib's own grey scale would round some of the 256 greys down.
    imsave(content, np.stack([grey] * 3, axis=-1), format='png', pil_kwargs={'optimize': True})
    write_atomic(filename, content.getvalue())
