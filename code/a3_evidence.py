"""The figures that the report's answers point at, a function a figure, of trained models or of a
formula alone; each with the numbers that it shows beside it, as CSV.

The formulas are those of the scripts, imported from them. The first four figures reproduce those
of Zhang's lecture on VAEs, the fifth measures what it says of naive Monte Carlo.

    python code/a3_evidence.py
    python code/a3_evidence.py --only monte_carlo kl_map
"""

import argparse
import hashlib
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import a3_ae
import a3_gan
import a3_vae
import figures
import measures
import runs
from a3_vae import gaussian_kl, gaussian_log_density
from datasets import bmnist
from datasets.common import Loader
from datasets.mnist import mnist

KINDS = ('ae', 'dae', 'vae')
OF_EACH_KIND = tuple(f'{kind}_z{zdim}' for zdim in (2, 20) for kind in KINDS)
OF_EACH_SIZE = ('vae_z2', 'vae_z5', 'vae_z10', 'vae_z20')
ROWS = 1000  # through a network at once
IN_USE = 0.1  # nats of KL, averaged over the images, from which a latent dimension is in use
TABLE = {'val_neg_elbo_nats': r'val.\ $-$ELBO', 'test_neg_elbo_nats': r'test $-$ELBO',
         'test_reconstruction_nats': 'reconstruction', 'test_kl_nats': 'KL',
         'test_nll_nats': r'$-\log p(x)$'}
CLASS_COLOURS = ('#3f90da', '#ffa90e', '#bd1f01', '#94a4a2', '#832db6', '#a96b59', '#e76300',
                 '#b9ac70', '#717581', '#92dadd')  # Petroff, 2021, arXiv:2107.02270
HALO = [patheffects.withStroke(linewidth=1.5, foreground='white')]  # of letters on colours
EXAMPLES = {'small': (0.1, 0.9), 'large': (5., 0.01)}  # μ and σ² of question 1.5
LATTICE = ((0, 0, 1, 2), (0, 1, 4, 1), (1, 4, 1, 0), (2, 1, 0, 0))  # P of integers, times 18


class Material(NamedTuple):
    """What the figures are made of, and where they go."""
    folder: Path
    models: dict[str, nn.Module]  # by the name of the run
    metrics: dict[str, dict]  # of the same runs
    train: Loader  # of grey images and labels, as the next two
    val: Loader
    test: Loader
    train_bits: Tensor  # the same images of 0 and 1, (N, 784)
    test_bits: Tensor
    n_decoded: int = 10_000  # images that a Fréchet distance rests on
    n_images: int = 50  # whose log p(x) is estimated
    n_naive: int = 2 ** 20  # samples of the prior: a power of two, as is the next
    n_importance: int = 2 ** 14  # samples of q(z|x), for each image
    steps: int = 300  # of the training on a lattice


# --- what several figures share ------------------------------------------------------------------


@contextmanager
def pdf_figure(filename: Path, height: float) -> Iterator[Figure]:
    """A figure as wide as the report's text, so many inches high, written when the block ends."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(5.5, height), layout='constrained')
        yield figure
        content = io.BytesIO()
        figure.savefig(content, format='pdf', dpi=300, metadata={'CreationDate': None})
    runs.write_atomic(filename, content.getvalue())


def show_curves(axes: Axes, x: list[float], curves: dict[str, list[float]], **settings) -> None:
    """Curves over a common x, {label: values}, in the house's colours and dashes."""
    for (label, y), colour, dash in zip(curves.items(), figures.COLOURS, figures.DASHES,
                                        strict=False):
        axes.plot(x, y, color=colour, linestyle=dash, label=label)
    axes.set(**settings)


def show_images(axes: Axes, images: Tensor, columns: int, names: list[str] = ()) -> None:
    """Rows of 784 pixels, (N, 784), as rows of so many images, with a name before each row."""
    grid = F.pad(images.view(-1, columns, 28, 28), (1, 1, 1, 1), value=0.75)
    axes.imshow(grid.transpose(1, 2).reshape(-1, columns * 30).cpu().numpy(), cmap='gray', vmin=0,
                vmax=1, interpolation='none')
    axes.set(xticks=[], yticks=[30 * row + 14.5 for row in range(len(names))], yticklabels=names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)


def write_columns(filename: Path, columns: dict[str, list]) -> None:
    """{name: values} as CSV."""
    runs.write_csv(filename, [dict(zip(columns, row, strict=True))
                              for row in zip(*columns.values(), strict=True)])


def kl_by_dimension(model: nn.Module, images: Tensor) -> Tensor:
    """KL(q(z_d|x) ‖ p(z_d)) averaged over the images, (D,), in nats."""
    mean, std = model.encoder(images)
    return gaussian_kl(mean[..., None], std[..., None]).mean(0)


# --- question 1.1: autoencoder, denoising autoencoder, VAE ---------------------------------------


def decodings(m: Material) -> dict[str, float]:
    """What the decoders of AE, DAE and VAE make of the same twelve z ~ N(0, I), z = 20.

    In numbers, also for z = 2: the Fréchet distance of such images to the test images, in the
    features of the digit classifier (`frechet_floor`: of the validation images), and the same with
    z from a Gaussian fitted to the codes of the training images (`frechet_fitted`); how far the
    codes of the test images together are from N(0, I), by their standard deviation, averaged over
    the dimensions, and by the KL divergence of Gaussians fitted to each dimension.
    """
    noise = {zdim: torch.randn(m.n_decoded, zdim, device=m.test.images.device)
             for zdim in (2, 20)}  # before the classifier, whose training would seed anew
    classifier = measures.load_classifier(
        m.folder.with_name(m.folder.name.replace('evidence', 'classifier')), m.train, m.val)
    judge = measures.Judge(classifier, m.test.images / 255, m.test.labels)
    rows, shown = [], []
    for run in OF_EACH_KIND:
        kind, zdim = run.split('_z')
        decoder, z = m.models[run].decoder, noise[int(zdim)]
        images = decoder(z)
        shown.append(images[:12])
        spreads = []  # of all codes together, training and test
        for bits in (m.train_bits, m.test_bits):
            mean, std = m.models[run].encoder(bits)
            within = std.square().mean(0) if kind == 'vae' else torch.full_like(std[0], 1e-6)
            spreads.append((mean.mean(0), mean.T.cov() + within.diag()))
        (mean, cov), (test_mean, test_cov) = spreads
        fitted = decoder(mean + z @ torch.linalg.cholesky(cov).T)
        std = test_cov.diag().sqrt()
        rows.append({'model': run, 'frechet': judge.glance(images)['frechet'],
                     'frechet_fitted': judge.glance(fitted)['frechet'],
                     'code_std': float(std.mean()),
                     'code_kl_nats': float(gaussian_kl(test_mean, std))})
    with pdf_figure(m.folder / 'decodings.pdf', 1.35) as figure:
        show_images(figure.subplots(), torch.cat(shown[3:]), 12, [kind.upper() for kind in KINDS])
    runs.write_csv(m.folder / 'decodings.csv', rows)
    return {f'{row["model"]}_{name}': value for row in rows for name, value in row.items()
            if name != 'model'} | {'frechet_floor': judge.glance(m.val.images / 255)['frechet']}


def nearest_neighbours(train_z: Tensor, train_y: Tensor, z: Tensor, k: int = 10) -> Tensor:
    """The most frequent class of the k nearest training codes: (N, D), (N,), (M, D) to (M,)."""
    near = [measures.distances(rows, train_z).topk(k, largest=False).indices
            for rows in z.split(ROWS)]
    return F.one_hot(train_y[torch.cat(near)], measures.N_CLASSES).sum(1).argmax(1)


def linear_probe(train_z: Tensor, train_y: Tensor, z: Tensor) -> Tensor:
    """Classes by multinomial logistic regression on standardised codes, fitted by L-BFGS.

    Shapes: (N, D), (N,), (M, D) to (M,).
    """
    mean, std = train_z.mean(0), train_z.std(0) + 1e-6
    inputs, head = (train_z - mean) / std, nn.Linear(len(std), measures.N_CLASSES).to(train_z)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn='strong_wolfe')

    def loss() -> Tensor:
        optimizer.zero_grad()
        nats = F.cross_entropy(head(inputs), train_y)
        nats.backward()
        return nats
    optimizer.step(loss)
    return head((z - mean) / std).argmax(1)


def codes(m: Material) -> dict[str, float]:
    """Codes of the test images, z = 2, in the colours of their classes, whose digits are at their
    medians where there is room.

    Of a VAE the means of q(z|x). Circles: 1, 2 and 3 standard deviations of the prior. In numbers,
    also for z = 20: the share of test images whose class is told by the 10 nearest codes of
    training images, and by a linear probe. After the lecture's "Data Distribution in Latent
    Space"; here one code in a hundred or so lies outside its panel.
    """
    classes = m.test.labels.cpu()
    shown, probes = {'class': classes.tolist()}, []
    with pdf_figure(m.folder / 'codes.pdf', 2.4) as figure:
        panels = iter(figure.subplots(1, len(KINDS)))
        for run in OF_EACH_KIND:
            train_z, test_z = (m.models[run].encoder(bits)[0]
                               for bits in (m.train_bits, m.test_bits))
            told = {name: (tell(train_z, m.train.labels, test_z) == m.test.labels).float().mean()
                    for name, tell in (('knn', nearest_neighbours), ('linear', linear_probe))}
            probes.append({'model': run} | {f'{name}_accuracy': float(share)
                                            for name, share in told.items()})
            if not run.endswith('_z2'):
                continue
            axes, z = next(panels), test_z.cpu()
            axes.scatter(*z.T, s=0.8, linewidths=0, rasterized=True,
                         c=[CLASS_COLOURS[c] for c in classes])
            angle = torch.linspace(0, 2 * math.pi, 181)
            for radius in (1, 2, 3):
                axes.plot(radius * angle.cos(), radius * angle.sin(), 'k', linewidth=0.5)
            low, high = z.quantile(0.005, dim=0), z.quantile(0.995, dim=0)
            side, named = 1.1 * (high - low).max(), []
            corners = ((low + high) / 2 + torch.tensor([[-0.5], [0.5]]) * side).numpy()
            for c in classes.unique().tolist():
                axes.plot([], [], 'o', color=CLASS_COLOURS[c], label=c)
                middle = z[classes == c].median(0).values
                if all((middle - other).norm() > 0.1 * side for other in named):
                    named.append(middle)
                    axes.annotate(c, middle, ha='center', va='center', weight='bold',
                                  path_effects=HALO)
            axes.set(title=run.removesuffix('_z2').upper(), xlabel='$z_1$', xlim=corners[:, 0],
                     ylim=corners[:, 1], box_aspect=1)
            axes.set_ylabel('$z_2$', labelpad=0)
            axes.grid(False)
            shown |= {f'{run}_{d + 1}': [round(value, 2) for value in z[:, d].tolist()]
                      for d in range(2)}  # as fine as the eye
        figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=10,
                      handletextpad=0)
    write_columns(m.folder / 'codes.csv', shown)
    runs.write_csv(m.folder / 'codes_probes.csv', probes)
    return {f'{row["model"]}_{name}': value for row in probes for name, value in row.items()
            if name != 'model'}


# --- samples by latent size, and what each dimension does ----------------------------------------


def latent_sizes(m: Material) -> dict[str, float]:
    """Decoder means of 49 z ~ N(0, I) for each latent size, after the lecture's "Example
    Generation"; and a table, as CSV and LaTeX, of the runs' figures and of the dimensions in use.
    """
    rows = []
    with pdf_figure(m.folder / 'latent_sizes.pdf', 1.55) as figure:
        for axes, run in zip(figure.subplots(1, 4), OF_EACH_SIZE, strict=True):
            model = m.models[run]
            z = torch.randn(49, model.z_dim, device=m.test_bits.device)
            show_images(axes, model.decoder(z), columns=7)
            axes.set_title(f'{model.z_dim} latent dimensions')
            rows.append({'zdim': model.z_dim} | {name: m.metrics[run][name] for name in TABLE} | {
                'dims_in_use': int((kl_by_dimension(model, m.test_bits) > IN_USE).sum())})
    runs.write_csv(m.folder / 'latent_sizes.csv', rows)
    cells = [['$J$', *TABLE.values(), 'in use']] + [
        [f'{value:.1f}' if isinstance(value, float) else f'{value}' for value in row.values()]
        for row in rows]
    head, *body = (' & '.join(row) + r' \\' for row in cells)
    runs.write_atomic(m.folder / 'latent_sizes.tex', '\n'.join([
        r'\begin{tabular}{rrrrrrr}', r'\toprule', head, r'\midrule', *body, r'\bottomrule',
        r'\end{tabular}', '']))
    return {f'z{row["zdim"]}_dims_in_use': row['dims_in_use'] for row in rows}


def traversals(m: Material) -> dict[str, float]:
    """Walks along each latent axis of `vae_z10`, from −3 to 3, from the code of the first 3 of the
    test images: the axis with the largest average KL divergence first, and that divergence."""
    model = m.models['vae_z10']
    kl, order = kl_by_dimension(model, m.test_bits).sort(descending=True)
    start = model.encoder(m.test_bits[m.test.labels == 3][:1])[0]
    values = torch.linspace(-3, 3, 11)
    z = start.repeat(len(order), len(values), 1)  # (axes, values, D)
    for row, axis in zip(z, order, strict=True):
        row[:, axis] = values
    with pdf_figure(m.folder / 'traversals.pdf', 3.3) as figure:
        images, bars = figure.subplots(1, 2, width_ratios=(1.9, 1))
        show_images(images, model.decoder(z.flatten(0, 1)), len(values),
                    [f'$z_{{{axis + 1}}}$' for axis in order.tolist()])
        images.set_xticks([30 * i + 14.5 for i in range(0, len(values), 5)], ['−3', '0', '3'])
        images.set_xlabel('value of that dimension')
        bars.barh(range(len(kl)), kl.tolist(), 0.6, color=figures.COLOURS[0])
        bars.set(axisbelow=True, xlabel='KL, nats', ylim=(len(kl) - 0.5, -0.5), yticks=[])
    write_columns(m.folder / 'traversals.csv', {
        'dimension': [axis + 1 for axis in order.tolist()], 'kl_nats': kl.tolist(),
        'start': start[0, order].tolist()})
    return {'kl_max_nats': float(kl[0]), 'kl_min_nats': float(kl[-1])}


# --- question 1.4: what naive Monte Carlo costs --------------------------------------------------


def naive_log_weights(model: a3_vae.VAE, x: Tensor, n: int) -> Tensor:
    """log p(x|z_l) of the same n samples z_l ~ p(z) for each image: (B, 784) to (n, B).

    Σ_m x_m a_m − log(1 + exp a_m), a the logits: a product of matrices, so that one decoding
    serves all images.
    """
    z = torch.randn(n, model.z_dim, dtype=x.dtype, device=x.device)
    return torch.cat([a @ x.T - F.softplus(a).sum(1, keepdim=True)
                      for a in map(model.decoder.logits, z.split(a3_vae.IW_ROWS))])


def importance_log_weights(model: a3_vae.VAE, x: Tensor, n: int) -> Tensor:
    """log p(x|z_l) p(z_l) / q(z_l|x), z_l ~ q(z|x), n for each image: (B, 784) to (n, B)."""
    mean, std = model.encoder(x)
    z = mean + std * torch.randn(n, *mean.shape, dtype=x.dtype, device=x.device)
    prior = torch.zeros_like(mean), torch.ones_like(std)
    return torch.cat([model.decoder.log_likelihood(x, rows) + gaussian_log_density(rows, *prior)
                      - gaussian_log_density(rows, mean, std)
                      for rows in z.split(max(1, a3_vae.IW_ROWS // len(x)))])


def block_estimates(log_w: Tensor) -> list[dict]:
    """log p(x) ≈ log 1/L Σ_l w_l with L = 1, 2, 4, … samples, averaged over the images.

    Each block of L rows in turn is one repetition; of all, their mean and, of four or more, the
    bounds of the middle four fifths. Shape: (2^n, B), to n + 1 rows.
    """
    rows, L = [], 1
    while True:
        repeated = log_w.mean(1) - math.log(L)  # log_w: of the sum of each block's weights
        low, high = (repeated.quantile(torch.tensor([0.1, 0.9]).to(repeated)).tolist()
                     if len(repeated) >= 4 else (None, None))
        rows.append({'samples': L, 'mean': float(repeated.mean()), 'low': low, 'high': high})
        if len(log_w) == 1:
            return rows
        log_w, L = torch.logaddexp(log_w[::2], log_w[1::2]), 2 * L


def needed_log10(rows: list[dict], goal: float) -> float | None:
    """log₁₀ of the samples at which the mean estimate first is at the goal, in nats.

    Linear in the logarithm of the samples between two rows; None where it never gets there.
    """
    at, means = [math.log10(row['samples']) for row in rows], [row['mean'] for row in rows]
    end = next((i for i, mean in enumerate(means) if mean >= goal), None)
    if not end:
        return None if end is None else at[0]
    share = (goal - means[end - 1]) / (means[end] - means[end - 1])
    return at[end - 1] + share * (at[end] - at[end - 1])


def monte_carlo(m: Material) -> dict[str, float]:
    """How far below log p(x), averaged over test images, naive and importance sampling end.

    Left: log p(x) minus the estimate, over the samples, with the middle four fifths of the
    repetitions. Both are lower bounds in expectation, so that for log p(x) stands, image by image,
    the larger of the two from the most samples. Right: the samples of the prior with which naive
    Monte Carlo is within one nat; where the most drawn do not do, exp KL(q(z|x) ‖ p(z)) instead,
    KL averaged over the images. With the posterior for q, that many are needed, and enough:
    Chatterjee and Diaconis, The Sample Size Required in Importance Sampling (Annals of Applied
    Probability 2018), theorem 1.1. Whiskers: the middle four fifths of the images' own KL.
    """
    x = m.test_bits[::len(m.test_bits) // m.n_images][:m.n_images]
    curves, needed = [], []
    for run in OF_EACH_SIZE:
        model = m.models[run]
        weights = {'naive': naive_log_weights(model, x, m.n_naive),
                   'importance': importance_log_weights(model, x, m.n_importance)}
        best = torch.stack([log_w.logsumexp(0) - math.log(len(log_w))
                            for log_w in weights.values()]).amax(0)  # (images,)
        reference = float(best.mean())
        both = {name: block_estimates(log_w) for name, log_w in weights.items()}
        curves += [{'zdim': model.z_dim, 'estimator': name} | row
                   for name, rows in both.items() for row in rows]
        kl = gaussian_kl(*model.encoder(x))
        low, exp_kl, high = (float(value) / math.log(10) for value in (
            kl.quantile(0.1), kl.mean(), kl.quantile(0.9)))  # exp KL as a power of ten
        measured = needed_log10(both['naive'], reference - 1)
        needed.append({
            'zdim': model.z_dim, 'reference_nats': reference,
            'naive_gap_nats': reference - both['naive'][-1]['mean'],
            'importance_gap_nats': reference - both['importance'][-1]['mean'],
            'exp_kl_log10': exp_kl, 'exp_kl_low_log10': low, 'exp_kl_high_log10': high,
            'needed_log10': exp_kl if measured is None else measured,
            'extrapolated': measured is None})
    runs.write_csv(m.folder / 'monte_carlo.csv', curves)
    runs.write_csv(m.folder / 'monte_carlo_needed.csv', needed)

    with pdf_figure(m.folder / 'monte_carlo.pdf', 3.3) as figure:
        grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1.15))
        for i, row in enumerate(needed):
            axes = figure.add_subplot(grid[i // 2, i % 2])
            for name, colour, dash in zip(('naive', 'importance'), figures.COLOURS, figures.DASHES,
                                          strict=False):
                L, mean, low, high = np.array([
                    (curve['samples'], curve['mean'], curve['low'], curve['high'])
                    for curve in curves if curve['estimator'] == name
                    and curve['zdim'] == row['zdim']], dtype=float).T  # None becomes NaN
                axes.plot(L, row['reference_nats'] - mean, color=colour, linestyle=dash,
                          label=name)
                axes.fill_between(L, row['reference_nats'] - high, row['reference_nats'] - low,
                                  color=colour, alpha=0.25, linewidth=0)
            axes.axhline(1, color='0.4', linewidth=0.8, linestyle=':')
            axes.set(xscale='log', yscale='log', ylim=(0.2, 1000), xlim=(0.7, m.n_naive),
                     title=f'{row["zdim"]} latent dimensions', xlabel='samples' * (i > 1),
                     ylabel='nats below log p(x)' * (i % 2 == 0))
        axes.legend(loc='center right', bbox_to_anchor=(1, 0.4))
        axes = figure.add_subplot(grid[:, 2])
        zdims, exp_kl, low, high = (np.array([row[name] for row in needed]) for name in (
            'zdim', 'exp_kl_log10', 'exp_kl_low_log10', 'exp_kl_high_log10'))
        axes.errorbar(zdims, exp_kl, (exp_kl - low, high - exp_kl), color=figures.COLOURS[4],
                      linestyle='--', label='exp KL(q ‖ p)')
        for label, extrapolated in (('measured', False), ('extrapolated', True)):
            points = [(row['zdim'], row['needed_log10']) for row in needed
                      if row['extrapolated'] is extrapolated]
            axes.plot(*np.array(points).reshape(-1, 2).T, 'o', color=figures.COLOURS[0],
                      label=label, markerfacecolor='white' if extrapolated else None)
        axes.yaxis.set_major_formatter(lambda power, _: f'$10^{{{power:g}}}$')
        axes.set(title='naive, within one nat', xlabel='latent dimensions', xticks=zdims,
                 ylabel='samples needed')
        axes.legend(loc='lower right')
    return {f'z{row["zdim"]}_{name}': value for row in needed for name, value in row.items()
            if name != 'zdim'}


# --- question 1.5: the KL divergence of univariate Gaussians -------------------------------------


def kl_map(m: Material) -> dict[str, float]:
    """KL(N(μ, σ²) ‖ N(0, 1)) in nats over μ and σ², with two examples; and their densities."""
    mu = torch.linspace(-6, 6, 61, dtype=torch.float64)
    var = torch.logspace(-3, 1, 61, dtype=torch.float64)
    kl = gaussian_kl(mu.view(-1, 1, 1), var.sqrt().view(-1, 1))  # (μ, σ²)
    x, metrics = torch.linspace(-4, 6, 1001), {}
    densities = {'N(0, 1)': gaussian_log_density(x[:, None], *torch.tensor([[0.], [1.]])).exp()}
    with pdf_figure(m.folder / 'kl_map.pdf', 2.2) as figure:
        axes, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
        levels = (0.1, 1, 4, 10)
        axes.contourf(mu, var, kl.T, (0, *levels, 100),
                      colors=matplotlib.colormaps['Blues'](np.linspace(0, 0.5, 5)))
        lines = axes.contour(mu, var, kl.T, levels, colors='0.25', linewidths=0.6)
        axes.clabel(lines, fmt='%g', manual=[(0, 1.8), *((-math.sqrt(2 * level), 1)
                                                         for level in levels[1:])])
        for (name, (mean, variance)), colour in zip(EXAMPLES.items(), figures.COLOURS[1:],
                                                    strict=False):
            q = torch.tensor([[mean], [math.sqrt(variance)]])
            metrics |= {f'{name}_mean': mean, f'{name}_variance': variance,
                        f'{name}_nats': float(gaussian_kl(*q))}
            densities[f'N({mean:g}, {variance:g})'] = gaussian_log_density(x[:, None], *q).exp()
            axes.plot(mean, variance, 'o', color=colour, markeredgecolor='white')
            axes.annotate(f'{metrics[f"{name}_nats"]:.3g}', (mean, variance), (0, -11),
                          ha='center', textcoords='offset points', weight='bold',
                          path_effects=HALO)
        axes.set(xlabel='μ', ylabel='σ²', yscale='log', title='KL(N(μ, σ²) ‖ N(0, 1)), nats')
        axes.grid(False)
        show_curves(right, x, densities, xlabel='z', ylabel='density')
        right.legend(loc='upper left')
    write_columns(m.folder / 'kl_map.csv', {
        'mean': mu.repeat_interleave(len(var)).tolist(), 'variance': var.repeat(len(mu)).tolist(),
        'kl_nats': kl.flatten().tolist()})
    return metrics


# --- question 2.4: two losses of the generator ---------------------------------------------------


def gan_gradients(m: Material) -> dict[str, float]:
    """log(1 − D(G(z))) and −log D(G(z)), and by autograd their gradients in D's logit of G(z).

    Shaded: D(G(z)) < 0.01, as early in training, when D tells with ease what is generated. There
    the gradient of the first vanishes, and that of the second is near −1.
    """
    logits = torch.linspace(-10, 10, 201, dtype=torch.float64, requires_grad=True)
    sure = torch.tensor([math.inf])  # logits of real images: nothing but fakes adds to L_D
    losses = {
        '−log D(G(z))': torch.stack([a3_gan.generator_loss(a) for a in logits]),
        'log(1 − D(G(z)))': torch.stack([-a3_gan.discriminator_loss(sure, a) for a in logits])}
    gradients = {name: torch.autograd.grad(loss.sum(), logits)[0] for name, loss in losses.items()}
    losses, x = {name: loss.detach() for name, loss in losses.items()}, logits.detach()
    with pdf_figure(m.folder / 'gan_gradients.pdf', 1.9) as figure:
        left, right = figure.subplots(1, 2)
        for axes, curves, ylabel in ((left, losses, 'loss, nats'),
                                     (right, gradients, 'its derivative')):
            axes.axvspan(-10, math.log(0.01 / 0.99), color='0.93', linewidth=0)
            show_curves(axes, x, curves, xlabel='logit of D(G(z))', ylabel=ylabel, xlim=(-10, 10))
        left.legend(loc='lower left')
        right.text(-7.3, -0.5, 'early:\nD(G(z))\n< 0.01', ha='center', va='center')
    columns = {f'{name}_{kind}': values.tolist() for kind, curves in (
        ('loss_nats', losses), ('gradient', gradients)) for name, values in zip(
        ('non_saturating', 'saturating'), curves.values(), strict=True)}
    write_columns(m.folder / 'gan_gradients.csv', {'logit': x.tolist()} | columns)
    return {f'early_{name}': values[50] for name, values in columns.items()} | {
        'early_logit': float(x[50])}


# --- question 3.4: densities of discrete data ----------------------------------------------------


def mixture_log_density(x: Tensor, weights: Tensor) -> Tensor:
    """log Σ_k π_k N(x; μ_k, diag σ_k²) in nats: (N, 2) and (K, 5) to (N,).

    The weights are means, logarithms of standard deviations, and the logit of π_k.
    """
    mean, log_std, logit = weights.split([2, 2, 1], dim=1)
    log_part = gaussian_log_density(x[:, None], mean, log_std.exp())  # (N, K)
    return (log_part + logit[:, 0].log_softmax(0)).logsumexp(1)


def dequantisation(m: Material) -> dict[str, float]:
    """A mixture of 16 Gaussians fitted to integers, as they are and with noise added.

    Ten points of a 4 × 4 lattice have the probabilities P = LATTICE / 18. Adam maximises the
    expected log-density of x, or of x + u with 256 fresh u ~ U[0, 1)² each step. The first
    grows without bound, as Gaussians shrink onto the points. The second bounds the log-probability
    that the model gives the integers, ∫ p(x + u) du, from below, so on average it stays below
    −H(P) (Theis et al., A Note on the Evaluation of Generative Models, ICLR 2016, section 3.1).
    """
    mass = torch.tensor(LATTICE).flatten() / 18
    points = torch.cartesian_prod(torch.arange(4.), torch.arange(4.))[mass > 0]
    mass = mass[mass > 0]
    bound = float(torch.special.xlogy(mass, mass).sum())  # −H(P)
    start = torch.cat([4 * torch.rand(16, 2), torch.zeros(16, 3)], dim=1)
    curves, fitted = {'integers + noise': [], 'integers': []}, []
    for name, curve in curves.items():
        weights = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([weights], lr=0.01)
        for _ in range(m.steps):
            u = torch.zeros(1, 2) if name == 'integers' else torch.rand(256, 2)
            log_density = mixture_log_density((points[:, None] + u).flatten(0, 1), weights)
            average = log_density.view(len(points), -1).mean(1) @ mass
            curve.append(float(average.detach()))
            optimizer.zero_grad()
            (-average).backward()
            optimizer.step()
        fitted.append(weights.detach())
    with pdf_figure(m.folder / 'dequantisation.pdf', 1.9) as figure:
        left, *maps = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
        show_curves(left, range(m.steps), curves, xlabel='step', ylabel='log-density, nats')
        left.axhline(bound, color='0.4', linewidth=0.8, linestyle=':')
        left.annotate('−H(data)', (m.steps, bound), ha='right', va='bottom', color='0.3')
        left.legend(loc='upper left')
        sides = torch.linspace(-0.5, 4.5, 401)
        for axes, name, weights in zip(maps, curves, fitted, strict=True):
            density = mixture_log_density(torch.cartesian_prod(sides, sides), weights).exp()
            axes.imshow(density.view(401, 401).T.numpy(), origin='lower', extent=(-0.5, 4.5) * 2,
                        cmap='Blues', vmin=0, vmax=0.3, interpolation='none')
            axes.plot(*points.T, '+', markersize=3, markeredgewidth=0.5, color='0.4')
            axes.set(title=name, xlabel='$x_1$', ylabel='$x_2$', xticks=range(5), yticks=range(5))
            axes.grid(False)
    write_columns(m.folder / 'dequantisation.csv', {
        'step': range(m.steps), 'dequantised_nats': curves['integers + noise'],
        'integers_nats': curves['integers']})
    return {'bound_nats': bound, 'dequantised_nats': curves['integers + noise'][-1],
            'integers_nats': curves['integers'][-1]}


# --- the run -------------------------------------------------------------------------------------

FIGURES: dict[str, tuple[Callable[[Material], dict], tuple[str, ...]]] = {  # and the runs it needs
    'decodings': (decodings, OF_EACH_KIND),
    'codes': (codes, OF_EACH_KIND),
    'latent_sizes': (latent_sizes, OF_EACH_SIZE),
    'traversals': (traversals, ('vae_z10',)),
    'monte_carlo': (monte_carlo, OF_EACH_SIZE),
    'kl_map': (kl_map, ()),
    'gan_gradients': (gan_gradients, ()),
    'dequantisation': (dequantisation, ()),
}


def load(run: str, args: argparse.Namespace) -> tuple[nn.Module, dict, dict[str, str]]:
    """The model of a run, its metrics, and {folder: sha256 of their file}. Raises RunError.

    In a dry run a small untrained model, with metrics of 0.
    """
    kind, zdim = run.split('_z')

    def make(a: argparse.Namespace) -> nn.Module:
        return (a3_vae.VAE(a.hidden_dim, a.zdim, a.n_layers, a.skip == 'yes', a.likelihood)
                if kind == 'vae' else a3_ae.AutoEncoder(a.hidden_dim, a.zdim, a.share))
    if args.dry_run:
        runs.seed_all(args.seed, run)
        a = argparse.Namespace(hidden_dim=16, zdim=int(zdim), n_layers=1, skip='no', share=0.,
                               likelihood='bernoulli')
        return make(a).eval().requires_grad_(False), dict.fromkeys(TABLE, 0.), {}
    digits = args.dataset == 'digits'
    command = (f'a3_vae.py --zdim {zdim} --iw_samples 1000' if kind == 'vae' else
               f'a3_ae.py --model {kind} --zdim {zdim}') + ' --dataset digits' * digits
    folder = args.results_dir / (run + '_digits' * digits)
    model = runs.load_trained(folder, command, 'model', make)
    content = (folder / 'metrics.json').read_bytes()
    digest = {folder.name: hashlib.sha256(content).hexdigest()}
    return model.requires_grad_(False), json.loads(content), digest


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = runs.Parser(__doc__)
    parser.add_argument('--only', nargs='+', choices=tuple(FIGURES), metavar='NAME',
                        help=f'of the figures to make (default: all): {", ".join(FIGURES)}')
    parser.add_shared_arguments(trains=False)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = runs.pick_device(args.device)
    names = args.only or list(FIGURES)
    loaded = {run: load(run, args) for run in dict.fromkeys(
        run for name in names for run in FIGURES[name][1])}  # before any work
    loaders = mnist(args.data_dir, ROWS, not args.dry_run,
                    args.dataset or (None if args.dry_run else 'mnist'), device)
    few = {}
    if args.dry_run:
        loaders = [loader.head(500) for loader in loaders]
        few = {'n_decoded': 200, 'n_images': 4, 'n_naive': 64, 'n_importance': 16, 'steps': 20}
    random = np.random.RandomState(bmnist.SEED)  # here, since the distributed bits have no labels
    bits = [torch.from_numpy(bmnist.binarise(loader.images.cpu().numpy(), random)).float()
            for loader in loaders]
    parent = Path(tempfile.mkdtemp(prefix='a3_')) if args.dry_run else args.results_dir
    folder = parent / ('evidence' + '_digits' * (args.dataset == 'digits'))
    folder.mkdir(parents=True, exist_ok=True)
    material = Material(folder, {run: model.to(device) for run, (model, _, _) in loaded.items()},
                        {run: metrics for run, (_, metrics, _) in loaded.items()}, *loaders,
                        bits[0].to(device), bits[2].to(device), **few)
    config = runs.describe(__file__, args, loaders[0].source, device)
    config['runs'], metrics = {}, {}
    if args.only and (folder / 'metrics.json').is_file():  # the other figures' stay
        metrics = json.loads((folder / 'metrics.json').read_text())
        config['runs'] = json.loads((folder / 'config.json').read_text())['runs']
    else:
        (folder / 'metrics.json').unlink(missing_ok=True)
    for _, _, digest in loaded.values():
        config['runs'] |= digest
    for name in names:
        start = time.perf_counter()
        runs.seed_all(args.seed, name)  # alike whatever else is made
        for key, value in FIGURES[name][0](material).items():
            if not math.isfinite(value):
                raise runs.RunError(f'{name}_{key} is {value}', status=1)
            metrics[f'{name}_{key}'] = float(f'{value:.6g}') if isinstance(value, float) else value
        print(f'{name}: {time.perf_counter() - start:.0f} s', flush=True)
    runs.write_atomic(folder / 'config.json', json.dumps(config, indent=2) + '\n')
    runs.write_atomic(folder / 'metrics.json', json.dumps(metrics, indent=2) + '\n')
    width = max(map(len, metrics))
    print('\n'.join(f'  {name:{width}}  {value}' for name, value in metrics.items()))
    print(f'files in {folder}: ' + ', '.join(sorted(path.name for path in folder.iterdir())))


if __name__ == '__main__':
    runs.launch(main, parse_args())
