"""The figures that the report refers to, one function for each, with their numbers as CSV.

The first four reproduce figures of Zhang's lecture on VAEs; the fifth measures what the lecture
says about naive Monte Carlo. Formulas are always those of the scripts.

    python code/a3_evidence.py
    python code/a3_evidence.py --only monte_carlo kl_map
"""

import argparse
import copy
import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from torch import Tensor, nn
from torch.func import grad, vmap

import a3_ae
import a3_gan
import a3_nf
import a3_vae
import measures
import runs
from a3_vae import gaussian_kl
from command_line import Parser, RunError, launch
from datasets import bmnist
from datasets.common import Loader
from datasets.mnist import mnist
from experiments import AUTOENCODERS, FLOWS, LATENT_SIZES, MONTE_CARLO, TEMPLATE_GAN, find
from figures import COLOURS, pdf_figure
from files import atomic, write_csv, write_json
from marginal_likelihood import (ROWS, bernoulli_log_likelihoods, gaussian_log_density,
                                 importance_log_weights, importance_sampled_log_px,
                                 log_px_on_lattice, prior_log_density)

TABLE = ('val_neg_elbo_nats', 'test_neg_elbo_nats', 'test_reconstruction_nats', 'test_kl_nats',
         'test_nll_nats')
CLASS_COLOURS = np.array(['#3f90da', '#ffa90e', '#bd1f01', '#94a4a2', '#832db6', '#a96b59',
                          '#e76300', '#b9ac70', '#000000', '#92dadd'])  # Petroff, 2021; 8 darker
HALO = [withStroke(linewidth=1.5, foreground='white')]  # around letters on colours
EXAMPLES = {'small': (0.1, 0.9), 'large': (5., 0.01)}  # μ and σ² of question 1.5


class Material(NamedTuple):
    """What the figures are made from, and the folder of their numbers."""
    folder: Path
    models: dict[str, nn.Module]  # by the name of the run, like their metrics
    metrics: dict[str, dict]
    train: Loader  # grey images with labels
    val: Loader
    test: Loader
    train_bits: Tensor  # the images of `train`, binarised, (N, 784)
    test_bits: Tensor
    n_decoded: int = 10_000  # generated images for a Fréchet distance
    n_images: int = 200  # images whose log p(x) is estimated
    n_naive: int = 2 ** 20  # samples of the prior; a power of two
    n_importance: int = 2 ** 12  # samples of q(z|x) for each image; a power of two
    steps: int = 300  # training steps of the mixture


def show_images(axes: matplotlib.axes.Axes, images: Tensor, columns: int, names=()) -> None:
    """Show images, (N, 784) in [0, 1], in rows of `columns`, with a name before each row."""
    grid = F.pad(images.view(-1, columns, 28, 28), (1, 1, 1, 1), value=0.75).transpose(1, 2)
    grid = grid.reshape(-1, columns * 30).cpu().numpy()
    axes.imshow(grid, cmap='gray', vmin=0, vmax=1, interpolation='none')
    axes.set(xticks=[], yticks=[30 * row + 14.5 for row in range(len(names))], yticklabels=names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)


def write_columns(filename: Path, **columns: Tensor | list | range) -> None:
    """Write columns, each with the same number of values, as CSV."""
    rows = zip(*(torch.as_tensor(values).flatten().tolist() for values in columns.values()),
               strict=True)
    write_csv(filename, [dict(zip(columns, row, strict=True)) for row in rows])


def write_rows(filename: Path, rows: list[dict], key: str, prefix: str = '') -> dict[str, float]:
    """Write rows as CSV; return their values as metrics, whose names start with column `key`."""
    write_csv(filename, rows)
    return {f'{prefix}{row[key]}_{name}': value for row in rows for name, value in row.items()
            if name != key}


def decodings(m: Material, figure: Figure) -> dict[str, float]:
    """Decode the same twelve z ~ N(0, I) with AE, DAE and VAE (question 1.1).

    The numbers: the Fréchet distance of such images to the test images, the same with z from a
    Gaussian fitted to the training codes, the reconstruction term of test images at their mean
    codes, and how far the codes of test images, with a VAE's noise, are from N(0, I); and how
    often the classifier is unsure of the VAE's images (`unsure_shares`).
    """
    noise = {zdim: torch.randn(m.n_decoded, zdim, device=m.test.images.device)
             for zdim in (2, 20)}  # before the classifier, whose training seeds the generator
    classifier = measures.load_classifier(m.folder.parent, m.train, m.val)
    judge = measures.Judge(classifier, m.test.images / 255, m.test.labels)
    rows, shown = [], []
    for run in AUTOENCODERS:
        model, moments = m.models[run], []
        for bits in (m.train_bits, m.test_bits):
            mean, std = model.encoder(bits)
            variance = (std.square().mean(0) if isinstance(model, a3_vae.VAE)
                        else torch.full_like(std[0], 1e-6))  # for a positive definite covariance
            moments.append((mean.mean(0), mean.T.cov() + variance.diag()))
        reconstruction = model.decoder.log_likelihood(m.test_bits, model.encoder(m.test_bits)[0])
        (train_mean, train_cov), (mean, cov) = moments
        z, std = noise[model.z_dim], cov.diag().sqrt()
        images = model.decoder(z)
        fitted = model.decoder(train_mean + z @ torch.linalg.cholesky(train_cov).T)
        shown.append(images[:12])
        rows.append({'model': run, 'frechet': judge.glance(images)['frechet'],
                     'frechet_fitted': judge.glance(fitted)['frechet'],
                     'reconstruction_nats': -float(reconstruction.mean()),
                     'code_std': float(std.mean()), 'code_kl_nats': float(gaussian_kl(mean, std))})
    show_images(figure.subplots(), torch.cat(shown[3:]), 12, ['AE', 'DAE', 'VAE'])
    unsure = unsure_shares(m.models['vae_z20'], classifier, noise[20][:m.n_decoded // 5],
                           m.train_bits, m.test_bits)
    return write_rows(m.folder / 'decodings.csv', rows, 'model') | unsure | {
        'frechet_floor': judge.glance(m.val.images / 255)['frechet']}


def unsure_shares(vae: a3_vae.VAE, classifier: measures.DigitClassifier, z: Tensor,
                  train_bits: Tensor, test_bits: Tensor) -> dict[str, float]:
    """How often the classifier gives no class 90 %, when it sees decoded z ~ p(z), (L, D).

    The shares are those of two quarters of the z: what the codes of the training images, (N, 784),
    cover least, by 1/N Σ_n q(z|x_n) / p(z), and what they cover best. And of test images, decoded
    from their mean codes.
    """
    posteriors = vae.encoder(train_bits)
    covered = torch.cat([gaussian_log_density(rows[:, None], *posteriors).logsumexp(1)  # + log N
                         - prior_log_density(rows) for rows in z.split(20)])
    unsure, unsure_of_test = (
        (classifier.look_at(vae.decoder(codes))[1].exp().amax(1) < 0.9).float()
        for codes in (z, vae.encoder(test_bits)[0]))
    least, *_, best = unsure[covered.argsort()].chunk(4)
    return {'unsure_share_least_covered': float(least.mean()),
            'unsure_share_best_covered': float(best.mean()),
            'unsure_share_of_test': float(unsure_of_test.mean())}


def nearest_neighbours(train_z: Tensor, train_y: Tensor, z: Tensor, k: int = 10) -> Tensor:
    """The most frequent class of the k nearest training codes: (N, D), (N,), (M, D) to (M,)."""
    half = train_z.square().sum(1) / 2  # ‖a − b‖² is least where ‖b‖²/2 − a·b is
    near = torch.cat([torch.addmm(half, rows, train_z.T, alpha=-1).topk(k, largest=False).indices
                      for rows in z.split(measures.ROWS)])
    return F.one_hot(train_y[near], measures.N_CLASSES).sum(1).argmax(1)


@torch.no_grad()
def latents(flow: a3_nf.Model, images: Tensor, noisy: bool) -> Tensor:
    """The latents of x + u, (N, 784), with u ~ U[0, 1) or u = ½, and x from 0 to 255."""
    return torch.cat([flow.encode(flow.dequantize(rows.float()) if noisy else rows + 0.5)[0]
                      for rows in images.split(a3_nf.EVAL_BATCH)])


def codes(m: Material, figure: Figure) -> dict[str, float]:
    """Show the two-dimensional mean codes of the test images, by class, and the prior as circles.

    The numbers: how accurately the nearest training codes predict the class; also with the latents
    of flows as codes, with dequantisation and without its noise.
    """
    probes, y = [], m.test.labels
    for name in AUTOENCODERS + FLOWS + [f'{run}_without_noise' for run in FLOWS]:
        run = name.removesuffix('_without_noise')
        train_z, z = (
            [latents(m.models[run], loader.images, name == run) for loader in (m.train, m.test)]
            if run in FLOWS else
            [m.models[run].encoder(bits)[0] for bits in (m.train_bits, m.test_bits)])
        found = nearest_neighbours(train_z, m.train.labels, z)
        probes.append({'model': name, 'knn_accuracy': float((found == y).float().mean())})
    labels = y.cpu()
    columns = {'class': labels}
    angle, radius = torch.linspace(0, 2 * math.pi, 181)[:, None], torch.arange(1, 4)
    for axes, run in zip(figure.subplots(1, 3), AUTOENCODERS[:3], strict=True):
        z = m.models[run].encoder(m.test_bits)[0].cpu()
        columns[f'{run}_1'], columns[f'{run}_2'] = z.T.double().round(decimals=2)
        axes.scatter(*z.T, s=0.8, c=CLASS_COLOURS[labels], linewidths=0, rasterized=True)
        axes.plot(radius * angle.cos(), radius * angle.sin(), 'k-', linewidth=0.5, zorder=5)
        low, high = z.quantile(torch.tensor([0.005, 0.995]), dim=0)
        middle, side, medians = (low + high) / 2, 1.1 * (high - low).max(), []
        for label in labels.unique().tolist():
            axes.plot([], [], 'o', color=CLASS_COLOURS[label], label=label)
            median = z[labels == label].median(0).values
            if all((median - other).norm() > 0.1 * side for other in medians):
                medians.append(median)
                axes.annotate(label, median, ha='center', va='center', weight='bold',
                              path_effects=HALO)
        axes.axis(torch.stack([middle - side / 2, middle + side / 2], dim=1).flatten().tolist())
        axes.set(title=run.removesuffix('_z2').upper(), xlabel='$z_1$', box_aspect=1)
        axes.set_ylabel('$z_2$', labelpad=0)
        axes.grid(False)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=10,
                  handletextpad=0)
    write_columns(m.folder / 'codes.csv', **columns)
    return write_rows(m.folder / 'codes_probes.csv', probes, 'model')


def kl_by_dimension(model: a3_vae.VAE, images: Tensor) -> Tensor:
    """KL(q(z_d|x) ‖ p(z_d)) averaged over the images, in nats: (N, 784) to (D,)."""
    mean, std = model.encoder(images)
    return gaussian_kl(mean[..., None], std[..., None]).mean(0)


def latent_sizes(m: Material, figure: Figure) -> dict[str, float]:
    """Decode 49 z ~ N(0, I) for each latent size, and tabulate the metrics of these runs."""
    rows = []
    for axes, run in zip(figure.subplots(1, 4), LATENT_SIZES, strict=True):
        model = m.models[run]
        z = torch.randn(49, model.z_dim, device=m.test_bits.device)
        show_images(axes, model.decoder(z), columns=7)
        axes.set_title(f'{model.z_dim} latent dimensions')
        in_use = int((kl_by_dimension(model, m.test_bits) > 0.1).sum())  # 0.1 nats
        rows.append({'zdim': model.z_dim} | {name: m.metrics[run][name] for name in TABLE}
                    | {'dims_in_use': in_use})
    write_csv(m.folder / 'latent_sizes.csv', rows)
    return {f'z{row["zdim"]}_dims_in_use': row['dims_in_use'] for row in rows}


def traversals(m: Material, figure: Figure) -> dict[str, float]:
    """Walk along each latent axis from the code of a 3, axes with the largest average KL first."""
    model = m.models['vae_z10']
    kl, order = kl_by_dimension(model, m.test_bits).sort(descending=True)
    start = model.encoder(m.test_bits[m.test.labels == 3][:1])[0]
    z = start.repeat(len(order), 11, 1)  # (axes, values, D)
    z[range(len(order)), :, order] = torch.linspace(-3, 3, 11, device=z.device)
    images, bars = figure.subplots(1, 2, width_ratios=(1.2, 1))
    show_images(images, model.decoder(z.flatten(0, 1)), 11, [f'$z_{{{axis + 1}}}$'
                                                             for axis in order.tolist()])
    images.set_xticks([30 * i + 14.5 for i in (0, 5, 10)], ['−3', '0', '3'])
    images.set_xlabel('value of that dimension')
    bars.barh(range(len(kl)), kl.tolist(), 0.6, color=COLOURS[0])
    bars.set(axisbelow=True, xlabel='KL, nats', ylim=(len(kl) - 0.5, -0.5), yticks=[])
    write_columns(m.folder / 'traversals.csv', dimension=order + 1, kl_nats=kl,
                  start=start[0, order])
    return {'kl_max_nats': float(kl[0]), 'kl_min_nats': float(kl[-1])}


def naive_log_weights(model: a3_vae.VAE, x: Tensor, n: int) -> Tensor:
    """log p(x|z_l) with the same n samples z_l ~ p(z) for each image: (B, 784) to (n, B)."""
    z = torch.randn(n, model.z_dim, dtype=x.dtype, device=x.device)
    return torch.cat([bernoulli_log_likelihoods(model, x, rows) for rows in z.split(ROWS)])


def block_estimates(log_w: Tensor) -> list[dict]:
    """log p(x) ≈ log 1/L Σ_l w_l in nats, averaged over the images, with L = 1, 2, 4, … samples.

    Each block of L rows of log_w, (2^n, B), is a repetition: their mean, and the 0.1 and 0.9
    quantiles of four or more.
    """
    rows = []
    for L in (2 ** i for i in range(len(log_w).bit_length())):
        repeated = log_w.mean(1) - math.log(L)  # log_w: of the sum of each block's weights
        low, high = (repeated.quantile(torch.tensor([0.1, 0.9]).to(repeated)).tolist()
                     if len(repeated) >= 4 else (None, None))
        rows.append({'samples': L, 'mean': float(repeated.mean()), 'low': low, 'high': high})
        log_w = torch.logaddexp(log_w[::2], log_w[1::2])
    return rows


def needed_log10(rows: list[dict], goal: float) -> float | None:
    """log₁₀ of the samples, interpolated, with which the mean first reaches the goal, in nats."""
    for before, row in zip(rows[:1] + rows, rows, strict=False):
        if row['mean'] >= goal:
            return float(np.interp(goal, [before['mean'], row['mean']],
                                   np.log10([before['samples'], row['samples']])))
    return None


def monte_carlo(m: Material, figure: Figure) -> dict[str, float]:
    """How many nats below log p(x) naive and importance sampling end (question 1.4).

    With two latent dimensions log p(x) is known, by integration. Elsewhere the largest of three
    averages stands for it, each in expectation a lower bound: of those two, and of importance
    sampling as in `a3_vae.py`. The number of samples with which naive sampling comes within one
    nat is shown beside exp KL(q(z|x) ‖ p(z)) (Chatterjee and Diaconis, The Sample Size Required
    in Importance Sampling, Annals of Applied Probability 2018, theorem 1.1, where q is the
    posterior).
    """
    x = m.test_bits[::len(m.test_bits) // m.n_images][:m.n_images]
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1.15))
    curves, needed = [], []
    for run in MONTE_CARLO:
        model = m.models[run]
        log_weights = {'naive': naive_log_weights(model, x, m.n_naive),
                       'importance': importance_log_weights(model, x, m.n_importance)}
        estimates = {name: block_estimates(log_w) for name, log_w in log_weights.items()}
        reference = (float(log_px_on_lattice(model, x).mean()) if model.z_dim == 2 else max(
            float(importance_sampled_log_px(model, x, m.n_importance).mean()),
            *(rows[-1]['mean'] for rows in estimates.values())))
        kl = gaussian_kl(*model.encoder(x))
        exp_kl, low, high = (float(nats) / math.log(10) for nats in (
            kl.mean(), kl.quantile(0.1), kl.quantile(0.9)))  # powers of ten
        needed.append({
            'zdim': model.z_dim, 'reference_nats': reference,
            'naive_gap_nats': reference - estimates['naive'][-1]['mean'],
            'importance_gap_nats': reference - estimates['importance'][-1]['mean'],
            'exp_kl_log10': exp_kl, 'exp_kl_low_log10': low, 'exp_kl_high_log10': high,
            'needed_log10': needed_log10(estimates['naive'], reference - 1)})
        curves += [{'zdim': model.z_dim, 'estimator': name} | row
                   for name, rows in estimates.items() for row in rows]
        if run not in LATENT_SIZES:
            continue
        i = LATENT_SIZES.index(run)
        axes = figure.add_subplot(grid[i // 2, i % 2])
        for name, rows in estimates.items():
            L, mean, low, high = np.array([list(row.values()) for row in rows], dtype=float).T
            [line] = axes.loglog(L, reference - mean, label=name)
            axes.fill_between(L, reference - high, reference - low, color=line.get_color(),
                              alpha=0.25, linewidth=0)
        axes.axhline(1, color='0.4', linewidth=0.8, linestyle=':')
        axes.set(title=f'{model.z_dim} latent dimensions', xlim=(0.7, m.n_naive), ylim=(0.2, 1000),
                 xlabel='samples' * (i > 1), ylabel='nats below reference' * (i % 2 == 0))
    axes.legend(loc='center right', bbox_to_anchor=(1, 0.4))

    axes = figure.add_subplot(grid[:, 2])
    zdim, low, exp_kl, high, log10 = (
        np.array([row[name] for row in needed], dtype=float) for name in (
            'zdim', 'exp_kl_low_log10', 'exp_kl_log10', 'exp_kl_high_log10', 'needed_log10'))
    axes.errorbar(zdim, exp_kl, (exp_kl - low, high - exp_kl), color=COLOURS[4], linestyle='--',
                  label='exp KL(q ‖ p)')
    axes.plot(zdim, log10, 'o', color=COLOURS[0], markersize=4, label='measured')
    axes.yaxis.set_major_formatter(lambda power, _: f'$10^{{{power:g}}}$')
    axes.set(title='naive: to within one nat', xlabel='latent dimensions', ylabel='samples needed')
    axes.set_xticks(zdim, [f'{d:g}' if d in (2, 5, 10, 20) else '' for d in zdim])
    axes.legend(loc='lower right')
    write_csv(m.folder / 'monte_carlo.csv', curves)
    return write_rows(m.folder / 'monte_carlo_needed.csv', needed, 'zdim', prefix='z')


def kl_map(m: Material, figure: Figure) -> dict[str, float]:
    """KL(N(μ, σ²) ‖ N(0, 1)) in nats over μ and σ², with two examples, and their densities."""
    mu, var = torch.meshgrid(torch.linspace(-6, 6, 61, dtype=torch.float64),
                             torch.logspace(-3, 1, 61, dtype=torch.float64), indexing='xy')
    kl, levels = gaussian_kl(mu[..., None], var.sqrt()[..., None]), (0.1, 1, 4, 10)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    left.contourf(mu, var, kl, (0, *levels, 100),
                  colors=matplotlib.colormaps['Blues'](np.linspace(0, 0.5, 5)))
    lines = left.contour(mu, var, kl, levels, colors='0.25', linewidths=0.6)
    left.clabel(lines, fmt='%g', manual=[(0, 1.8), *((math.sqrt(2 * level), 1)
                                                     for level in levels[1:])])
    x, metrics = torch.linspace(-4, 6, 1001)[:, None], {}
    right.plot(x, gaussian_log_density(x, torch.zeros(1), torch.ones(1)).exp(), label='N(0, 1)')
    for name, (mean, variance) in EXAMPLES.items():
        q = torch.tensor([[mean], [math.sqrt(variance)]])
        nats = float(gaussian_kl(*q))
        metrics |= {f'{name}_mean': mean, f'{name}_variance': variance, f'{name}_nats': nats}
        [line] = right.plot(x, gaussian_log_density(x, *q).exp(), label=f'N({mean:g}, {variance})')
        left.plot(mean, variance, 'o', color=line.get_color(), markeredgecolor='white')
        left.annotate(f'{nats:.3g}', (mean, variance), (0, -6), textcoords='offset points',
                      ha='center', va='top', weight='bold', path_effects=HALO)
    left.set(xlabel='μ', ylabel='σ²', yscale='log', title='KL(N(μ, σ²) ‖ N(0, 1)), nats')
    left.grid(False)
    right.set(xlabel='z', ylabel='density')
    right.legend(loc='upper left')
    write_columns(m.folder / 'kl_map.csv', mean=mu.T, variance=var.T, kl_nats=kl.T)
    return metrics


def saturating_loss(fake_logits: Tensor) -> Tensor:
    """E log(1 − D(G(z))), in nats: what D maximises, if real images add nothing to it."""
    sure = torch.tensor(math.inf)  # D's logit of a real image
    return -a3_gan.discriminator_loss(sure, fake_logits)


GENERATOR_LOSSES = {'non_saturating': a3_gan.generator_loss, 'saturating': saturating_loss}
GENERATOR_LABELS = '−log D(G(z))', 'log(1 − D(G(z)))'


def gan_gradients(m: Material, figure: Figure) -> dict[str, float]:
    """−log D(G(z)) and log(1 − D(G(z))), in nats, and their derivatives in D's logit of G(z)."""
    logits = torch.linspace(-10, 10, 201, dtype=torch.float64)
    columns = {}
    for name, loss in GENERATOR_LOSSES.items():
        columns[f'{name}_loss_nats'] = vmap(loss)(logits)
        columns[f'{name}_gradient'] = vmap(grad(loss))(logits)
    left, right = figure.subplots(1, 2)
    for axes, kind, ylabel in ((left, 'loss_nats', 'loss, nats'),
                               (right, 'gradient', 'its derivative')):
        axes.axvspan(-10, math.log(0.01 / 0.99), color='0.93', linewidth=0)
        for name, label in zip(GENERATOR_LOSSES, GENERATOR_LABELS, strict=True):
            axes.plot(logits, columns[f'{name}_{kind}'], label=label)
        axes.set(xlabel='logit of D(G(z))', ylabel=ylabel, xlim=(-10, 10))
    left.legend(loc='lower left')
    right.text(-7.3, -0.5, 'D(G(z))\n< 0.01', ha='center', va='center')
    write_columns(m.folder / 'gan_gradients.csv', logit=logits, **columns)
    columns['logit'] = logits
    return {f'early_{name}': float(values[50]) for name, values in columns.items()}


def first_epoch(images: Tensor, loss: str, seed: int
                ) -> tuple[a3_gan.Generator, a3_gan.Generator, dict[str, list[float]]]:
    """The template's GAN for an epoch, with G trained by plain gradient descent on that loss: G
    before and after, and for each batch the mean D(G(z)), and the norm of the saturating loss's
    gradient in the weights of G, divided by that of the other loss, for the same weights and
    images."""
    args, curves = a3_gan.parse_args(TEMPLATE_GAN.split()), {'d_fake': [], 'gradient_ratio': []}
    torch.manual_seed(seed)
    generator, discriminator = (net.to(images.device) for net in a3_gan.make_model(args))
    untrained = copy.deepcopy(generator)
    optimizer_G = torch.optim.SGD(generator.parameters(), lr=0.01)  # Adam rescales gradients
    optimizer_D = torch.optim.Adam(discriminator.parameters(), args.lr, (args.beta1, args.beta2))
    weights = list(generator.parameters())
    for batch in images[torch.randperm(len(images))].split(args.batch_size):
        fakes = generator(torch.randn(len(batch), args.latent_dim, device=images.device))
        optimizer_D.zero_grad()
        a3_gan.discriminator_loss(discriminator(batch / 127.5 - 1),
                                  discriminator(fakes.detach())).backward()
        optimizer_D.step()
        logits = discriminator(fakes)
        gradients = {each: torch.autograd.grad(loss_G(logits), weights, retain_graph=True)
                     for each, loss_G in GENERATOR_LOSSES.items()}
        for weight, gradient in zip(weights, gradients[loss], strict=True):
            weight.grad = gradient
        optimizer_G.step()
        norms = {each: nn.utils.get_total_norm(found) for each, found in gradients.items()}
        curves['d_fake'].append(float(logits.detach().sigmoid().mean()))
        curves['gradient_ratio'].append(float(norms['saturating'] / norms['non_saturating']))
    return untrained, generator, curves


def gan_early(m: Material, figure: Figure) -> dict[str, float]:
    """Three first epochs (`first_epoch`) of the template's GAN with each loss of G; those of the
    same seed start from the same weights and see the same images. The numbers: medians over the
    last 100 steps of the three, and of the Fréchet distances of samples to validation images, also
    of untrained generators."""
    classifier = measures.load_classifier(m.folder.parent, m.train, m.val)
    judge = measures.Judge(classifier, m.val.images / 255, m.val.labels)
    z = torch.randn(m.n_decoded, 100, device=m.train.images.device)
    columns, medians, all_axes = {}, {}, figure.subplots(1, 2)
    for name, label, colour in zip(GENERATOR_LOSSES, GENERATOR_LABELS, COLOURS[:2], strict=True):
        distances = {'untrained': [], name: []}
        for seed, dash in enumerate(('-', '--', ':')):
            untrained, generator, curves = first_epoch(m.train.images, name, seed)
            distances['untrained'].append(judge.glance(a3_gan.sample(untrained, z))['frechet'])
            distances[name].append(judge.glance(a3_gan.sample(generator, z))['frechet'])
            columns |= {f'{name}_{kind}_{seed}': values for kind, values in curves.items()}
            for axes, values in zip(all_axes, curves.values(), strict=True):
                axes.plot(values, dash, color=colour, linewidth=0.8, label=label * (seed == 0))
        for kind in ('d_fake', 'gradient_ratio'):
            last = [columns[f'{name}_{kind}_{each}'][-100:] for each in range(3)]
            medians[f'{name}_{kind}_median'] = statistics.median(sum(last, []))
        medians |= {f'{each}_frechet_median': statistics.median(found)
                    for each, found in distances.items()}
    for axes, ylabel in zip(all_axes, ('mean D(G(z))', 'ratio of gradients'), strict=True):
        axes.set(xlabel='step', ylabel=ylabel, yscale='log')
    all_axes[0].legend(loc='center right', title='G minimises')
    write_columns(m.folder / 'gan_early.csv', step=range(len(curves['d_fake'])), **columns)
    return medians


def mixture_log_density(x: Tensor, weights: Tensor) -> Tensor:
    """log Σ_k π_k N(x; μ_k, diag σ_k²) in nats: (..., 2) and μ, log σ, logit π (K, 5) to (...)."""
    mean, log_std, logit = weights.split([2, 2, 1], dim=1)
    log_part = gaussian_log_density(x[..., None, :], mean, log_std.exp())  # (..., K)
    return (log_part + logit[:, 0].log_softmax(0)).logsumexp(-1)


def dequantisation(m: Material, figure: Figure) -> dict[str, float]:
    """Fit a mixture of 16 Gaussians to pairs x of integers, as they are and with noise added.

    The log-density of x grows without bound. That of x + u, u ~ U[0, 1)², is a lower bound on the
    log-probability that the model gives x, so that on average it stays below −H (Theis et al., A
    Note on the Evaluation of Generative Models, ICLR 2016, section 3.1). All in nats.
    """
    lattice = torch.tensor([[0, 0, 1, 2], [0, 1, 4, 1], [1, 4, 1, 0], [2, 1, 0, 0]])  # 18 P
    points, mass = lattice.nonzero().float(), lattice[lattice > 0] / 18
    bound = float(torch.special.xlogy(mass, mass).sum())  # −H(P)
    start = torch.cat([4 * torch.rand(16, 2), torch.zeros(16, 3)], dim=1)
    sides = torch.linspace(-0.5, 4.5, 401)
    left, *maps = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    titles = {'dequantised_nats': 'integers + noise', 'integers_nats': 'integers'}
    curves = {name: [] for name in titles}
    for axes, (name, title) in zip(maps, titles.items(), strict=True):
        weights = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([weights], lr=0.01, maximize=True)
        for _ in range(m.steps):
            u = torch.rand(256, 2) if name == 'dequantised_nats' else torch.zeros(1, 2)
            average = mixture_log_density(points[:, None] + u, weights).mean(1) @ mass
            curves[name].append(average.item())
            optimizer.zero_grad()
            average.backward()
            optimizer.step()
        left.plot(curves[name], label=title)
        density = mixture_log_density(torch.cartesian_prod(sides, sides), weights.detach()).exp()
        axes.imshow(density.view(401, 401).T.numpy(), origin='lower', extent=(-0.5, 4.5) * 2,
                    cmap='Blues', vmin=0, vmax=0.3, interpolation='none')
        axes.plot(*points.T, '+', markersize=3, markeredgewidth=0.5, color='0.4')
        axes.set(title=title, xlabel='$x_1$', ylabel='$x_2$', xticks=range(5), yticks=range(5))
        axes.grid(False)
    left.axhline(bound, color='0.4', linewidth=0.8, linestyle=':')
    left.annotate('−H(data)', (m.steps, bound), ha='right', va='bottom', color='0.3')
    left.set(xlabel='step', ylabel='log-density, nats')
    left.legend(loc='upper left')
    write_columns(m.folder / 'dequantisation.csv', step=range(m.steps), **curves)
    return {'bound_nats': bound} | {name: curve[-1] for name, curve in curves.items()}


def flow_order(m: Material, figure: Figure) -> dict[str, float]:
    """In which order the autoregressive flow draws pixels, and what it sees when it draws one.

    The second is not read off the code: each pixel of an image is changed in turn, and what the
    latent of the drawn pixel notices, under random weights, it sees.
    """
    flow = a3_nf.AutoregressiveFlow(n_hidden=8).double().requires_grad_(False)
    for weight in flow.parameters():
        nn.init.normal_(weight, std=0.3)
    raster = torch.arange(784.).view(1, 1, 28, 28)
    cells = F.pixel_unshuffle(raster, a3_nf.CELL)[0, flow.order].flatten(1).long()  # (16, 49)
    sequence = torch.cat([cells[scale.first:scale.stop].T.flatten() for scale in flow.scales])
    position, in_plan = sequence.argsort(), torch.zeros(784)
    in_plan[cells[:flow.scales[0].stop].flatten()] = 1
    z = torch.cat([torch.zeros(1, 784), 3 * torch.eye(784)]).double()  # one pixel is brighter
    latents = torch.cat([flow(rows, rows.new_zeros(len(rows)))[0] for rows in z.split(157)])
    drawn = {'plan': cells[2, 24], 'detail': cells[9, 24]}  # of the cell in the middle
    sees = {name: ((latents[1:, pixel] - latents[0, pixel]).abs() > 1e-12).float()
            for name, pixel in drawn.items()}
    for name, pixel in drawn.items():
        sees[name][pixel] = 0

    axes = figure.subplots(1, 3)
    blue, orange, red = (torch.tensor(to_rgb(COLOURS[i])) for i in (0, 4, 1))
    colour = torch.where(in_plan[:, None] > 0, blue, orange)
    age = torch.where(in_plan > 0, position / 196, (position - 196) / 588)[:, None]
    images = {'order: light to dark': 1 - (0.25 + 0.75 * age) * (1 - colour)}
    for name, pixel in drawn.items():
        images[f'what a pixel of the {name} sees'] = image = torch.where(
            sees[name][:, None] > 0, colour, torch.tensor(0.93))
        image[pixel] = red
    for panel, (title, image) in zip(axes, images.items(), strict=True):
        panel.imshow(image.view(28, 28, 3).numpy(), extent=(0, 28, 28, 0), interpolation='none')
        panel.set(title=title, xticks=range(0, 29, 4), yticks=range(0, 29, 4))
        panel.tick_params(length=0, labelbottom=False, labelleft=False)
        panel.grid(color='white', linewidth=0.8)
    names = {'plan': blue, 'detail': orange, 'the pixel drawn': red}
    figure.legend(handles=[Patch(color=tuple(rgb.tolist()), label=name)
                           for name, rgb in names.items()], ncols=3, loc='outside lower center')
    with atomic(m.folder / 'flow_order.png') as file:  # for the README
        figure.savefig(file, format='png', dpi=200, metadata={'Software': None})
    write_columns(m.folder / 'flow_order.csv', pixel=range(784), position=position,
                  in_plan=in_plan, **{f'{name}_pixel_sees': seen for name, seen in sees.items()})
    return {f'{name}_pixel_sees': int(seen.sum()) for name, seen in sees.items()}


# By name: the function, the height in inches, and the runs whose models it needs.
FIGURES = {draw.__name__: (draw, height, needed) for draw, height, needed in (
    (decodings, 1.35, AUTOENCODERS), (codes, 2.4, AUTOENCODERS + FLOWS),
    (latent_sizes, 1.55, LATENT_SIZES), (traversals, 2.3, ['vae_z10']),
    (monte_carlo, 3.1, MONTE_CARLO), (kl_map, 1.7, []), (gan_gradients, 1.5, []),
    (gan_early, 1.5, []), (dequantisation, 1.7, []), (flow_order, 2.1, []))}


def load(name: str, args: argparse.Namespace) -> tuple[nn.Module, bytes]:
    """The model of a run and its metrics.json; in a dry run, an untrained one and zeros.

    Raises RunError, with the command that makes it, if the run is unfinished or lost its weights.
    """
    job = find(name)
    script = {'a3_vae': a3_vae, 'a3_ae': a3_ae, 'a3_nf': a3_nf}[job.script]
    if args.dry_run:
        runs.seed_all(args.seed, name)
        width = '--n_hidden' if script is a3_nf else '--hidden_dim'
        small = script.parse_args([*job.words, width, '16'])
        return script.make_model(small).eval(), json.dumps(dict.fromkeys(TABLE, 0.)).encode()
    suffix = '_digits' * (args.dataset == 'digits')
    folder = args.results_dir / (name + suffix)
    if not job._replace(name=folder.name).has_weights(args.results_dir):
        raise RunError(f'{folder} is missing, unfinished or without its weights; make it with: '
                       f'python code/{job.command}' + ' --dataset digits' * bool(suffix))
    return (runs.load_trained(folder, job.script, 'model', script.make_model),
            (folder / 'metrics.json').read_bytes())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--only', nargs='+', choices=tuple(FIGURES), metavar='NAME',
                        help=f'make these figures (default: all): {", ".join(FIGURES)}')
    parser.add_shared_arguments(trains=False)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = runs.pick_device(args.device)
    names, suffix = args.only or list(FIGURES), '_digits' * (args.dataset == 'digits')
    loaded = {run: load(run, args) for run in dict.fromkeys(
        run for name in names for run in FIGURES[name][2])}  # before any work
    models = {run: model.to(device).requires_grad_(False) for run, (model, _) in loaded.items()}
    dataset = args.dataset or (None if args.dry_run else 'mnist')
    loaders, few = mnist(args.data_dir, 1000, not args.dry_run, dataset, device), {}
    if args.dry_run:
        loaders = [loader.head(500) for loader in loaders]
        few = {'n_decoded': 200, 'n_images': 4, 'n_naive': 64, 'n_importance': 16, 'steps': 20}
    random = np.random.RandomState(bmnist.SEED)  # here, since the distributed bits have no labels
    bits = [torch.from_numpy(bmnist.binarise(loader.images.cpu().numpy(), random)).to(device)
            for loader in loaders]
    folder = args.results_dir / f'evidence{suffix}'
    folder.mkdir(parents=True, exist_ok=True)
    trained = {run: json.loads(text) for run, (_, text) in loaded.items()}
    material = Material(folder, models, trained, *loaders, bits[0].float(), bits[2].float(), **few)
    metrics, made, digests = {}, {}, {}
    if not args.only:
        (folder / 'metrics.json').unlink(missing_ok=True)
    elif (folder / 'metrics.json').is_file():  # the other figures stay
        metrics, before = (runs.read_json(folder / f'{name}.json') for name in ('metrics',
                                                                                'config'))
        digests, args.only = before['runs'], before['arguments']['only']
    if not args.dry_run:
        digests |= {run + suffix: hashlib.sha256(text).hexdigest()
                    for run, (_, text) in loaded.items()}
    for name in names:
        draw, height, _ = FIGURES[name]
        runs.seed_all(args.seed, name)  # the same whichever other figures are made
        with pdf_figure(folder / f'{name}.pdf', height) as figure:
            numbers = draw(material, figure)
        made |= runs.finite({f'{name}_{key}': value for key, value in numbers.items()},
                            f'in {folder}')
        print(folder / f'{name}.pdf', flush=True)
    metrics = {name: value for name, value in metrics.items()  # but what is no longer measured
               if name in made or not name.startswith(tuple(f'{each}_' for each in names))} | made
    config = runs.describe(main, args, loaders[0].source, device) | {'runs': digests}
    if not args.dry_run:
        config['fingerprint'] = runs.fingerprint(main, args)
    write_json(folder / 'config.json', config)
    write_json(folder / 'metrics.json', metrics)
    runs.report(folder, metrics)


if __name__ == '__main__':
    launch(main, parse_args())
