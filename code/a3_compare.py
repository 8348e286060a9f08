r"""The trained models side by side, on the same measures: how good, how varied, how dear?

The VAE with 20 latent dimensions on binarised digits and on grey ones, the GAN and the flow of
this project, and the template's GAN and flow, where other seeds were trained with their mean and
spread. A digit classifier (`measures.py`) judges as many samples of each run as there are test
images; real images, measured alike, are the floor. Besides: do samples copy training images, what
do a model's training and a sample cost, and what can it do that others cannot, tell a likelihood
and find the code of an image?

    python code/a3_compare.py

Reads the finished runs of the three scripts, with their weights, and says which are missing and
how to make them. Writes `report/results/compare/`: a figure of samples, two tables for the report,
and their numbers for each run (`measures.csv`) and each model (`metrics.json`).
"""

import argparse
import hashlib
import io
import json
import math
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import a3_gan
import a3_nf
import a3_vae
import figures
import measures
import runs
from datasets.bmnist import bmnist
from datasets.mnist import mnist

SEED = 42  # of the runs whose folders do not name one
N_SAMPLES = 10_000  # of each run
N_BLOCKS = 10  # that they are drawn in, each of them timed
DECODED = 10  # from one test image that is encoded and decoded to the next
NEAR_COPY = 0.01  # the share of test images that count as copies
ROWS = 500  # in a block of distances, of 60,000 each
SHOWN = 25, 2  # columns and rows of each model's samples in the figure
LIKELIHOODS = 'test_nll_nats', 'test_bpd'  # of binarised images, and of grey ones
COSTS = 'parameters', 'train_minutes', 'images_per_second'  # as of the first run


# --- the models ----------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What the models of one script have in common.

    `part` of the checkpoint is the network that `make` gives for the run's arguments; `sampler`
    takes it and gives a function from a number to so many samples, (N, 784) in [0, 1]; `errors`
    takes it and the same number of images with values 0 to 255 and with 0 and 1, and gives decoded
    minus encoded ones, (N, 784), in units of a pixel's range.
    """
    parse_args: Callable[[list[str]], argparse.Namespace]
    part: str
    make: Callable[[argparse.Namespace], nn.Module]
    sampler: Callable[[nn.Module], Callable[[int], Tensor]]
    errors: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None


class Model(NamedTuple):
    """One line of the tables: its runs, how they are made, and where they tell a likelihood.

    `likelihood` has that of LIKELIHOODS which it tells, and its name in the runs' `metrics.json`.
    """
    name: str
    label: str
    command: str
    seeds: tuple[int, ...] = (SEED,)
    likelihood: dict[str, str] = {}

    def folder(self, seed: int) -> str:
        """The name of the run of that seed."""
        return self.name + f'_seed{seed}' * (seed != SEED)


MODELS = [
    Model('vae_z20', 'VAE', 'a3_vae.py --zdim 20 --iw_samples 1000', (42, 43, 44),
          {'test_nll_nats': 'test_nll_nats'}),
    Model('vae_gaussian_z20', 'VAE, Gaussian', 'a3_vae.py --likelihood gaussian --iw_samples 1000',
          likelihood={'test_bpd': 'test_nll_bpd'}),
    Model('gan', 'GAN', 'a3_gan.py', (42, 43, 44)),
    Model('gan_template', 'GAN, template',
          'a3_gan.py --arch mlp --n_epochs 100 --batch_size 64 --lr 2e-4 --beta1 0.9 '
          '--beta2 0.999 --schedule constant --penalty 0 --max_shift 0 --average 0 '
          '--precision fp32'),
    Model('nf', 'flow', 'a3_nf.py', (42, 43, 44), {'test_bpd': 'test_bpd'}),
    Model('nf_mlp', 'flow, template', 'a3_nf.py --arch mlp', likelihood={'test_bpd': 'test_bpd'}),
]


def vae_sampler(model: a3_vae.VAE) -> Callable[[int], Tensor]:
    """Means of p(x|z): what is drawn from it has independent noise on every pixel."""
    return lambda n: model.sample(n)[1]


def gan_sampler(averaged: AveragedModel) -> Callable[[int], Tensor]:
    """As `a3_gan.sample`, but the batch statistics, the same at each call, are taken once."""
    latent_dim, device = averaged.module.latent_dim, next(averaged.parameters()).device
    a3_gan.sample(averaged, torch.zeros(1, latent_dim, device=device))
    return lambda n: (averaged(torch.randn(n, latent_dim, device=device)) + 1) / 2


def flow_sampler(model: a3_nf.Model) -> Callable[[int], Tensor]:
    """Whole grey values, as the data are, without the noise that made a density of them."""
    return lambda n: model.sample(n).clamp(0, 255).floor() / 255


def vae_errors(model: a3_vae.VAE, grey: Tensor, bits: Tensor) -> Tensor:
    """Of the mean image of the mean code; images are as the model is trained on them."""
    is_grey = isinstance(model.decoder, a3_vae.GaussianDecoder)
    [x] = a3_vae.prepared([(grey, None)] if is_grey else [bits], grey=is_grey)
    return model.decoder(model.encoder(x)[0]) - x


def flow_errors(model: a3_nf.Model, grey: Tensor, bits: Tensor) -> Tensor:
    """Of the inverse, which is rounding; the maps, not the networks, are in float64."""
    precise = torch.float32 if grey.device.type == 'mps' else torch.float64  # mps has no other
    batches = model.dequantize(grey.to(precise)).split(a3_nf.EVAL_BATCH)
    return torch.cat([model.decode(model.encode(x)[0]) - x for x in batches]) / 256


def make_flow(args: argparse.Namespace) -> a3_nf.Model:
    return a3_nf.Model([a3_nf.PIXELS], a3_nf.Flow([a3_nf.PIXELS], args.n_flows, args.n_hidden)
                       if args.arch == 'mlp' else
                       a3_nf.MultiScaleFlow(args.n_hidden, args.n_layers, args.n_embedding,
                                            args.max_ranks))


KINDS = {
    'a3_vae.py': Kind(a3_vae.parse_args, 'model',
                      lambda args: a3_vae.VAE(args.hidden_dim, args.zdim, args.n_layers,
                                              args.skip == 'yes', args.likelihood),
                      vae_sampler, vae_errors),
    'a3_gan.py': Kind(a3_gan.parse_args, 'averaged',
                      lambda args: a3_gan.average(a3_gan.Generator(args.latent_dim, args.arch),
                                                  args.average),
                      gan_sampler),
    'a3_nf.py': Kind(a3_nf.parse_args, 'model', make_flow, flow_sampler, flow_errors),
}


# --- measures ------------------------------------------------------------------------------------


@torch.no_grad()
def draw(sampler: Callable[[int], Tensor], n: int) -> tuple[Tensor, float]:
    """n samples, of 8 bits as the data are, and how many images a second it took, as a median.

    Returns (n, 784) in [0, 1].
    """
    blocks, rates = [], []
    for _ in range(N_BLOCKS):
        start = time.perf_counter()
        block = sampler(n // N_BLOCKS)
        blocks.append((255 * block).round().cpu() / 255)  # .cpu() waits for the device
        rates.append(len(block) / (time.perf_counter() - start))
    return torch.cat(blocks).to(block.device), statistics.median(rates)


def nearest_distances(images: Tensor, others: Tensor) -> Tensor:
    """The Euclidean distance of each image to the nearest of the others, exactly 0 to a copy.

    Shapes: (N, D) and (M, D) to (N,).
    """
    # ‖a − b‖² is least where a·b − ‖b‖²/2 is greatest. That it is found by products, with their
    # rounding, does not blur its distance.
    half = others.square().sum(1) / 2
    nearest = torch.cat([torch.addmm(-half, rows, others.T).argmax(1)
                         for rows in images.split(ROWS)])
    return torch.cat([(rows - others[index]).norm(dim=1) for rows, index in
                      zip(images.split(ROWS), nearest.split(ROWS), strict=True)])


def copy_measures(images: Tensor, train: Tensor, val: Tensor, threshold: float | None = None
                  ) -> tuple[dict[str, float], float]:
    """Are these images copies of training images? How near they are says little: blur is near to
    everything.

    So, after Meehan et al., A Non-Parametric Test to Detect Data-Copying in Generative Models
    (AISTATS 2020), training images are held against others that no model was fitted to, the
    validation images. A near copy's distance to the nearest training image is, divided by that to
    the nearest validation image, below the threshold. This is set by test images, of which a share
    NEAR_COPY is below it; a model that copies has more.

    Args:
        images, train, val: (N, 784) in [0, 1] each.
        threshold: of the ratio; where None the one that these images set.

    Returns:
        The median distance to a training image and the share of near copies, and the threshold.
    """
    to_train, to_val = (nearest_distances(images, real) for real in (train, val))
    ratios = to_train / to_val.clamp(min=1 / 255)  # one grey level in one pixel
    if threshold is None:
        threshold = float(np.quantile(ratios.cpu().numpy(), NEAR_COPY))
    return {'nearest_train_median': float(to_train.median()),
            'near_copy_share': float((ratios < threshold).float().mean())}, threshold


def summarise(rows: list[dict]) -> dict[str, float]:
    """Of a model's runs the mean of each measure and, where there are several, the sample standard
    deviation as `…_spread`; of what a run costs that of the first. Absent measures are left out.
    """
    summary = {}
    for name, first in rows[0].items():
        if isinstance(first, int | float):
            values = [first] if name in COSTS else [row[name] for row in rows]
            summary[name] = statistics.mean(values)
            if len(values) > 1:
                summary[f'{name}_spread'] = statistics.stdev(values)
    return summary


# --- tables and figure ---------------------------------------------------------------------------

# Of a column the measure, the two lines of its head, and the factor that the unit makes.
QUALITY = [('frechet', r"Fr\'echet", '', 1), ('inception_score', 'inception', '', 1),
           ('class_kl', 'class KL', r'$10^{-3}$', 1e3), ('precision', 'precision', r'\%', 100),
           ('recall', 'recall', r'\%', 100), ('density', 'density', '', 1),
           ('coverage', 'coverage', r'\%', 100)]
FURTHER = [('nearest_train_median', 'nearest', '', 1), ('near_copy_share', 'copies', r'\%', 100),
           ('test_nll_nats', r'$-\log p$', 'nats', 1), ('test_bpd', r'$-\log p$', 'bits/dim', 1),
           ('reconstruction_rms', 'decoding', 'rms', 1), ('parameters', 'weights', '$10^6$', 1e-6),
           ('train_minutes', 'training', 'min', 1), ('images_per_second', 'sampling', '1/s', 1)]
NOTE = r"""
{n:,} samples of each run, from noise of seed {seed}; of VAEs the means of $p(x|z)$. Mean $\pm$
standard deviation of runs with seeds {seeds}; where there is no $\pm$, one run with seed {first}.
"""
QUALITY_NOTE = NOTE.rstrip() + r"""
Held against {test:,} test images; real digits are {val:,} validation images. Class KL in nats, of
the shares of the classes from those of test images.
"""
FURTHER_NOTE = NOTE.rstrip() + r"""
Nearest: median Euclidean distance to one of {train:,} training images, pixels in $[0, 1]$; real
digits are {test:,} test images. What is blurred is near to everything, so copies: samples whose
distance to a training image, divided by that to one of {val:,} validation images, is less than of
all but {share:g}\,\% of test images. Of test images, $-\log p$ in nats where binarised and in bits
per dimension where grey: the two do not compare. Decoding: root mean square error of a pixel of
{decoded:,} test images, encoded and decoded, binarised where the model is trained on such. Weights
of all networks in training; minutes of the first run, and its samples a second, {block:,} at a
time ({device}).
"""


def formatted(mean: float | None, spread: float | None = None) -> str:
    """A number as TeX, or a dash: with a spread to the latter's first digit, or second where the
    first is 1, and to four decimals at most; without one to three digits and two decimals at most.
    """
    if mean is None:
        return '--'
    if 0 < abs(mean) < 1e-4:
        digits, exponent = f'{mean:.0e}'.split('e')
        return rf'${digits} \cdot 10^{{{int(exponent)}}}$'
    if spread is None:
        decimals = min(2, 2 - int(f'{mean:.2e}'.split('e')[1]))
        return f'{round(mean, decimals):,.{max(0, decimals)}f}'
    digit, exponent = f'{spread:.0e}'.split('e')
    decimals = min(4, max(0, (digit == '1') - int(exponent)))
    return rf'${mean:.{decimals}f}\,{{\scriptstyle\pm {spread:.{decimals}f}}}$'


def table(columns: list[tuple], lines: dict[str, dict], note: str) -> str:
    """A booktabs tabular, and a note below it, to be input in a table of the report.

    Args:
        columns: as QUALITY.
        lines: for each label the measures by name, some of them with `…_spread`.
    """
    heads = [' & '.join(['', *(column[i] for column in columns)]).strip() for i in (1, 2)]
    cells = {label: [formatted(*(None if values.get(key) is None else factor * values[key]
                                 for key in (name, f'{name}_spread')))
                     for name, _, _, factor in columns] for label, values in lines.items()}
    first, *others = (' & '.join([label, *row]) + r' \\' for label, row in cells.items())
    return '\n'.join([
        r'{\footnotesize\setlength{\tabcolsep}{2.5pt}%',
        rf'\begin{{tabular}}{{@{{}}l{"r" * len(columns)}@{{}}}}', r'\toprule',
        *(rf'{head} \\' for head in heads), r'\midrule', first, r'\midrule', *others,
        r'\bottomrule', r'\end{tabular}\par\smallskip',
        rf'\parbox{{\linewidth}}{{\raggedright {note.strip()}}}}}', ''])


def save_samples(filename: Path, samples: dict[str, Tensor]) -> None:
    """For each label its first images, under each other, as PNG of the report's text width.

    Args:
        samples: for each label images, (N, 784) in [0, 1], as many as SHOWN says or more.
    """
    columns, rows = SHOWN
    dpi, scale, margin, gap = 300, 2, 200, 16  # pixels of the file: of an image's pixel, in all
    strips = []
    for images in samples.values():
        cells = images[:columns * rows].cpu().numpy().reshape(-1, 28, 28)
        cells = np.pad(cells, [(0, 0), (0, 1), (0, 1)], constant_values=0.75)  # light lines
        grid = cells.reshape(rows, columns, 29, 29).swapaxes(1, 2).reshape(rows * 29, -1)
        grey = (255 * grid[:-1, :-1]).round().astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
        strips.append(np.stack([grey] * 3, axis=-1))
    height, width, _ = strips[0].shape
    total = len(strips) * (height + gap) - gap
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=((margin + width) / dpi, total / dpi), dpi=dpi)
        for i, (label, strip) in enumerate(zip(samples, strips, strict=True)):
            bottom = total - i * (height + gap) - height
            figure.figimage(strip, margin, bottom)  # pixel for pixel
            figure.text(0, (bottom + height / 2) / total, label.replace(', ', ',\n'), va='center')
        content = io.BytesIO()
        figure.savefig(content, format='png', metadata={'Software': None})
    runs.write_atomic(filename, content.getvalue())


# --- the comparison ------------------------------------------------------------------------------


def load_all(args: argparse.Namespace, suffix: str) -> dict[str, tuple[nn.Module, bytes]]:
    """The network of every run and its `metrics.json`, by its folder.

    With `--dry_run` an untrained network, and no metrics.

    Args:
        suffix: of the folders, for the data set.

    Raises:
        RunError: in one line, which names every missing run and the command that makes it.
    """
    words = ['--dataset', 'digits'] * bool(suffix)
    for name in ('data_dir', 'results_dir'):
        if getattr(args, name) != build_parser().get_default(name):
            words += [f'--{name}', str(getattr(args, name))]
    commands = {(folder := model.folder(seed) + suffix): shlex.join([
        *model.command.split(), *['--seed', str(seed)] * (seed != SEED), '--run', folder, *words])
        for model in MODELS for seed in model.seeds}
    missing = [folder for folder in commands
               if not all((args.results_dir / folder / name).is_file()
                          for name in ('metrics.json', 'checkpoint.pt'))]
    if missing and not args.dry_run:
        raise runs.RunError(
            f'{args.results_dir}: missing, unfinished or without weights: {", ".join(missing)}; '
            f'make {"it" if len(missing) == 1 else "them"} with: '
            + ' && '.join(f'python code/{commands[folder]}' for folder in missing))
    loaded = {}
    for folder, command in commands.items():
        script, *words = command.split()
        kind, path = KINDS[script], args.results_dir / folder
        if args.dry_run:
            runs.seed_all(args.seed, folder)
            loaded[folder] = kind.make(kind.parse_args(words)).eval(), b'{}'
        else:
            loaded[folder] = (runs.load_trained(path, command, kind.part, kind.make),
                              (path / 'metrics.json').read_bytes())
    return loaded


def build_parser() -> runs.Parser:
    parser = runs.Parser(__doc__)
    parser.add_shared_arguments(trains=False)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = runs.pick_device(args.device)
    train, val, test = mnist(args.data_dir, ROWS, not args.dry_run, args.dataset, device)
    bits = bmnist(args.data_dir, ROWS, not args.dry_run, train.source['dataset'], device)[2]
    suffix = '_digits' * (train.source['dataset'] == 'digits')
    n, parent = N_SAMPLES, args.results_dir
    if args.dry_run:
        n, parent = 200, Path(tempfile.mkdtemp(prefix='a3_'))
        train, val, test, bits = (loader.head(200) for loader in (train, val, test, bits))
    loaded = load_all(args, suffix)
    folder = parent / f'compare{suffix}'
    print(f'{folder}: {"dry run" if args.dry_run else "comparison"} on {device}, '
          f'{train.source["description"]}')

    classifier = measures.load_classifier(parent / f'classifier{suffix}', train, val)
    real_train, real_val, real_test = (loader.images / 255 for loader in (train, val, test))
    judge = measures.Judge(classifier, real_test, test.labels)
    floor_copies, threshold = copy_measures(real_test, real_train, real_val)
    decoded = test.images[::DECODED].float(), bits.images[::DECODED].float()
    floor = {'run': 'floor', **judge.measure(real_val), **floor_copies,
             **dict.fromkeys(('reconstruction_rms', *LIKELIHOODS, *COSTS))}
    rows, summaries, samples = [floor], {'real digits': floor}, {'real digits': real_test}
    for model in MODELS:
        kind = KINDS[model.command.split()[0]]
        for seed in model.seeds:
            name = model.folder(seed) + suffix
            network, trained = loaded[name][0].to(device), json.loads(loaded[name][1])
            runs.seed_all(args.seed, f'compared {name}')
            images, rate = draw(kind.sampler(network), n)
            samples.setdefault(model.label, images)
            rms = None
            if kind.errors is not None:
                with torch.no_grad():
                    rms = float(kind.errors(network, *decoded).square().mean().sqrt())
            row = {'run': name, **judge.measure(images),
                   **copy_measures(images, real_train, real_val, threshold)[0],
                   'reconstruction_rms': rms,
                   **{key: trained.get(model.likelihood.get(key)) for key in LIKELIHOODS},
                   **{key: trained.get(key) for key in COSTS}, 'images_per_second': rate}
            for key, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise runs.RunError(f'{name}: {key} is {value}', status=1)
            rows.append(row)
            print(f'{name}  ' + '  '.join(f'{key} {value:.4g}' for key, value in row.items()
                                          if isinstance(value, float)), flush=True)
        summaries[model.label] = summarise(rows[-len(model.seeds):])

    seeds = max((model.seeds for model in MODELS), key=len)
    numbers = {'n': n, 'seed': args.seed, 'train': len(train.images), 'val': len(val.images),
               'test': len(test.images), 'decoded': len(decoded[0]), 'block': n // N_BLOCKS,
               'share': 100 * NEAR_COPY, 'first': SEED, 'seeds': ', '.join(map(str, seeds)),
               'device': f'{device.type}, {torch.get_num_threads()} threads'}
    digests = {name: hashlib.sha256(content).hexdigest() for name, (_, content) in loaded.items()}
    source = train.source | {'sha256': train.source['sha256'] | bits.source['sha256']}
    config = runs.describe(__file__, args, source, device) | {'runs': digests}
    metrics = {'seed': args.seed, 'samples': n, 'near_copy_ratio': threshold,
               'classifier_sha256': measures.fingerprint(classifier),
               **{f'floor_{key}': value for key, value in summarise([floor]).items()},
               **{f'{model.name}_{key}': value for model in MODELS
                  for key, value in summaries[model.label].items()}}

    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'metrics.json').unlink(missing_ok=True)  # until the rest is there
    runs.write_atomic(folder / 'config.json', json.dumps(config, indent=2) + '\n')
    runs.write_csv(folder / 'measures.csv', rows)
    for name, columns, note in (('table_quality.tex', QUALITY, QUALITY_NOTE),
                                ('table_further.tex', FURTHER, FURTHER_NOTE)):
        runs.write_atomic(folder / name, table(columns, summaries, note.format(**numbers)))
    save_samples(folder / 'samples.png', samples)
    runs.write_atomic(folder / 'metrics.json', json.dumps(
        {key: float(f'{value:.6g}') if isinstance(value, float) else value
         for key, value in metrics.items()}, indent=2) + '\n')
    print(f'files in {folder}: ' + ', '.join(sorted(path.name for path in folder.iterdir())))


if __name__ == '__main__':
    runs.launch(main, parse_args())
