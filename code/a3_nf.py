r"""Normalizing flows on MNIST, after Dinh et al., Density Estimation using Real NVP (ICLR 2017,
arXiv:1605.08803): an invertible map f from images to latents, whose density is known.

    z = f(x)    log p(x) = log N(z; 0, I) + log |det ∂f/∂x|

This asks only that f be invertible, and differentiable almost everywhere. Pixels are whole
numbers, 0 to 255, so the probability of an image is the density's integral over a unit cube,
P(x) = E_u p(x + u), u ~ U[0, 1)^784. By Jensen's inequality log P(x) ≥ E_u log p(x + u) (Theis et
al., A Note on the Evaluation of Generative Models, ICLR 2016, section 3.1). Training maximises the
right-hand side; what is reported is −log p(x + u) / (784 log 2), in bits per dimension.

The flow of the assignment, `--arch mlp`, alternates affine couplings of the two colours of a
checkerboard. The default, `multiscale`, builds an image from a coarse lattice, every eighth pixel,
to finer and finer ones. Each of its eight couplings maps a group of pixels to latents by a
piecewise-linear distribution function (Müller et al., Neural Importance Sampling, ACM ToG 2019)
whose slopes a small convolutional network computes from the coarser pixels, and whose corners are
at whole pixel values, so that no density has to leak from the black background into the greys. The
network looks each pixel value up in a table of learned vectors, which brings more than anything
else that was tried (`report/results/ablations_nf.csv`). The density is then constant over each
value's unit cube, where Jensen's inequality loses nothing: the flow is also a discrete
autoregressive model, group by group.

    python code/a3_nf.py
    python code/a3_nf.py --arch mlp

Measured on MNIST, 40 epochs, seed 42, on two cores of an AMD EPYC: `nf`: val_bpd 1.007, test_bpd
0.994, train_minutes 23.9, sample_seconds_per_100 0.03, parameters 337836; `nf_mlp`: val_bpd 1.641,
test_bpd 1.632, test_bpd_iw 1.590, train_minutes 12.3, parameters 18045056.
"""

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import figures
import runs
from command_line import Parser, launch, number, whole_number
from datasets.common import Loader
from datasets.mnist import mnist

PIXELS = 28 * 28
ALPHA = 1e-3  # pixels stay half of it away from 0 and 1, which keeps the logits of black bounded
CELL = 4  # the multi-scale flow sees an image as 7 × 7 cells of 4 × 4 pixels
KNOTS = (0, 1, *range(8, 249, 8), *range(251, 257))  # bins of values; 0 and 251 … 255 have theirs
EVAL_BATCH = 250
MAX_GRAD_NORM = 1.0  # largest norm of the gradient of the bits per dimension
IW_DRAWS = 8  # draws of the dequantisation noise for the importance-weighted bound
DEFAULTS = {  # for each architecture the arguments that are not typed
    'multiscale': {'n_hidden': 64, 'max_shift': 1, 'batch_size': 128, 'lr': 1.2e-2},
    'mlp': {'n_hidden': 1024, 'max_shift': 0, 'batch_size': 256, 'lr': 1e-3}}
PUBLISHED = {  # test bits per dimension on MNIST, from the table of Chen et al., Residual Flows
    'Real NVP': 1.06, 'Glow': 1.05, 'Residual Flow': 0.97}
Batches = Iterable[tuple[Tensor, Tensor]]  # images, (B, 784), 0 to 255, and their labels


# --- mathematics ---------------------------------------------------------------------------------


def log_prior(x: Tensor) -> Tensor:
    """log N(x; 0, 1) = −½ (x² + log 2π) of each element, in nats. Shape: any, kept."""
    return -0.5 * (x.square() + math.log(2 * math.pi))


def sample_prior(size: tuple[int, ...], device: torch.device | str = 'cpu') -> Tensor:
    """Standard normal latents of that shape."""
    return torch.randn(size, device=device)


def bits_per_dim(log_px: Tensor) -> Tensor:
    """−log p(x) / (784 log 2), of log p(x) in nats. Shape: any, kept."""
    return -log_px / (PIXELS * math.log(2))


def get_mask() -> Tensor:
    """A checkerboard of 28 × 28 pixels, (1, 784), 1 in the corner (the paper's has 0 there)."""
    i = torch.arange(28)
    return ((i[:, None] + i) % 2 == 0).float().view(1, PIXELS)


def dither_matrix(side: int) -> Tensor:
    """Bayer's matrix: the ranks 0 … side² − 1 so placed that the first n are far from each other.
    For side a power of two; M(2n) is [[4M, 4M + 2], [4M + 3, 4M + 1]], where M is M(n)."""
    if side == 1:
        return torch.zeros(1, 1, dtype=torch.int64)
    four = 4 * dither_matrix(side // 2)
    return torch.cat([torch.cat([four, four + 2], 1), torch.cat([four + 3, four + 1], 1)])


def to_latent(z: Tensor, log_p: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Φ⁻¹(C(σ(z))), C the piecewise-linear distribution function of a histogram, and log |slope|.

    The latent is standard normal if σ(z) has the histogram's density. It passes no gradient on to
    log_p: since no later layer changes or sees it, its own log-prior and the −log_prior in the
    slope cancel in log p(x). Shapes: z any; log_p, log-probabilities of K bins, z's and (K,), or
    to be broadcast to it; edges (K + 1,), rising, with σ(z) between the first and the last.
    """
    u, widths = torch.sigmoid(z), edges.diff()
    k = torch.searchsorted(edges[1:-1], u.detach(), right=True)  # the bin
    log_p = log_p.expand(*z.shape, -1)
    log_p_k = log_p.gather(-1, k[..., None])[..., 0]
    cdf_right = log_p.detach().exp().cumsum(-1).gather(-1, k[..., None])[..., 0]
    cdf_u = cdf_right - log_p_k.detach().exp() * (1 - (u - edges[k]) / widths[k])
    latent = normal_quantile(inside(cdf_u))
    log_slope = log_p_k - widths.log()[k] - F.softplus(z) - F.softplus(-z) - log_prior(latent)
    return latent, log_slope


def from_latent(latent: Tensor, log_p: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `to_latent` in z, and its log |slope|; arguments and shapes as there."""
    log_p, widths = log_p.expand(*latent.shape, -1), edges.diff()
    cdf_u, cdf_right = torch.special.ndtr(latent), log_p.exp().cumsum(-1)
    k = (cdf_right[..., :-1] <= cdf_u[..., None]).sum(-1)
    log_p_k = log_p.gather(-1, k[..., None])[..., 0]
    cdf_right = cdf_right.gather(-1, k[..., None])[..., 0]
    part = 1 - ((cdf_right - cdf_u) / inside(log_p_k.exp())).clamp(0, 1)
    z = torch.logit(inside(edges[k] + widths[k] * part))
    log_slope = widths.log()[k] - log_p_k + F.softplus(z) + F.softplus(-z) + log_prior(latent)
    return z, log_slope


def normal_quantile(u: Tensor) -> Tensor:
    """Φ⁻¹(u) of each element in (0, 1): √2 erf⁻¹(2u − 1) where torch has no ndtri, on mps."""
    return (math.sqrt(2) * torch.erfinv(2 * u - 1) if u.device.type == 'mps'
            else torch.special.ndtri(u))


def inside(u: Tensor) -> Tensor:
    """u kept away from 0 and 1 by what rounding can do."""
    eps = torch.finfo(u.dtype).eps / 2
    return u.clamp(eps, 1 - eps)


def path(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """((1 − t) a + t b) / √((1 − t)² + t²): where a and b are independent standard normal vectors,
    so is each point on it. Shapes: (D,) and (D,) to (steps + 2, D), both ends included."""
    t = torch.linspace(0, 1, steps + 2, dtype=start.dtype, device=start.device)[:, None]
    return ((1 - t) * start + t * end) / ((1 - t).square() + t.square()).sqrt()


# --- model ---------------------------------------------------------------------------------------


class Coupling(nn.Module):
    """Affine coupling: the pixels where the mask is 0 are scaled and moved, as the others say.

        z' = m ⊙ z + (1 − m) ⊙ (z ⊙ exp(s(m ⊙ z)) + t(m ⊙ z)),    s = tanh(·)

    Paper, equation 9; the network gets the kept pixels only, and its last layer starts at zero:
    the map starts as the identity. Shape: mask (1, c_in), whose elements are 0 and 1.
    """

    def __init__(self, c_in: int, mask: Tensor, n_hidden: int = 1024):
        super().__init__()
        self.register_buffer('mask', mask)
        self.register_buffer('kept', mask[0].nonzero()[:, 0], persistent=False)
        self.register_buffer('changed', (1 - mask[0]).nonzero()[:, 0], persistent=False)
        self.nn = nn.Sequential(nn.Linear(len(self.kept), n_hidden), nn.ReLU(),
                                nn.Linear(n_hidden, n_hidden), nn.ReLU(),
                                nn.Linear(n_hidden, 2 * len(self.changed)))
        nn.init.zeros_(self.nn[-1].weight)
        nn.init.zeros_(self.nn[-1].bias)

    def forward(self, z: Tensor, ldj: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """z (B, c_in) to z' and ldj + log |det ∂z'/∂z|, (B,); with `reverse`, back again."""
        kept, old = z.index_select(1, self.kept), z.index_select(1, self.changed)
        s, t = self.nn(kept.to(self.nn[0].weight.dtype)).to(z.dtype).chunk(2, dim=1)
        log_scale = s.tanh()  # bounded: no layer can blow the density up by itself
        if reverse:
            new, ldj = (old - t) * (-log_scale).exp(), ldj - log_scale.sum(1)
        else:
            new, ldj = old * log_scale.exp() + t, ldj + log_scale.sum(1)
        return z.index_copy(1, self.changed, new), ldj


class Flow(nn.Module):
    """The template's flow: affine couplings that change the two colours of the board in turn."""

    def __init__(self, shape: Iterable[int], n_flows: int = 4, n_hidden: int = 1024):
        super().__init__()
        self.z_shape, mask = tuple(shape), get_mask()
        self.layers = nn.ModuleList(Coupling(*self.z_shape, m, n_hidden)
                                    for _ in range(n_flows) for m in (mask, 1 - mask))

    def forward(self, z: Tensor, ldj: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """(B, *z_shape) and (B,) through all layers, or back through them in reverse order."""
        for layer in reversed(self.layers) if reverse else self.layers:
            z, ldj = layer(z, ldj, reverse)
        return z, ldj


class HistogramCoupling(nn.Module):
    """Maps the pixels of the ranks first … stop − 1 to their latents, given those of lower rank.
    Ranks, (C, H, W), rise from channel to channel; the network has `n_layers` residual layers."""

    def __init__(self, embedding: nn.Embedding | None, rank: Tensor, first: int, stop: int,
                 n_hidden: int = 64, n_layers: int = 1):
        super().__init__()
        self.embedding = embedding
        target, known = (first <= rank) & (rank < stop), rank < first
        channels = target.any(2).any(1).nonzero()[:, 0].tolist()
        self.channels = slice(channels[0], channels[-1] + 1)
        self.n_known = int(known.any(2).any(1).sum())  # channels of which anything is known
        self.register_buffer('target', target[self.channels].movedim(0, -1), persistent=False)
        self.register_buffer('known', known[self.n_known - 1], persistent=False)
        edges = (1 - ALPHA) / 256 * torch.tensor(KNOTS) + ALPHA / 2
        self.register_buffer('edges', edges, persistent=False)
        self.place = nn.Parameter(torch.zeros(n_hidden, *rank.shape[1:]))  # digits are centred
        if self.n_known:
            n_inputs = self.n_known * (embedding.embedding_dim if embedding else 1)
            self.look = nn.Conv2d(n_inputs, n_hidden, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(n_hidden, 2 * n_hidden, 1),
                          nn.SiLU(), nn.Conv2d(2 * n_hidden, n_hidden, 1))
            for _ in range(n_layers))
        self.last = nn.Conv2d(n_hidden, len(channels) * (len(KNOTS) - 1), 1)
        nn.init.zeros_(self.last.weight)
        self.last.bias = nn.Parameter(edges.diff().log().repeat(len(channels)))  # uniform

    def forward(self, z: Tensor, ldj: Tensor, reverse: bool = False,
                embedded: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor]:
        """z (B, C, H, W) to z' and ldj + log |det ∂z'/∂z|, (B,); with `reverse`, back again. The
        pixels of lower rank are logits; `embedded` is z as `embed` gives it, where at hand."""
        h = self.place[None]
        if self.n_known:
            seen = embedded or embed(self.embedding, z[:, :self.n_known])
            *whole, partly = seen[:self.n_known]
            h = self.look(torch.cat([*whole, partly * self.known], dim=1))
            h = h + self.place.to(h.dtype)
        for layer in self.layers:
            h = h + layer(h)
        logits = self.last(F.silu(h)).movedim(1, -1).unflatten(-1, (-1, len(KNOTS) - 1))
        log_p = logits.to(z.dtype).log_softmax(-1)  # (B or 1, H, W, C', K)
        old = z[:, self.channels].movedim(1, -1).contiguous()  # (B, H, W, C')
        new, log_slope = (from_latent if reverse else to_latent)(old, log_p, self.edges.to(z))
        new = torch.where(self.target, new, old).movedim(-1, 1)
        z = torch.cat([z[:, :self.channels.start], new, z[:, self.channels.stop:]], dim=1)
        return z, ldj + (log_slope * self.target).flatten(1).sum(1)


def embed(embedding: nn.Embedding | None, z: Tensor) -> tuple[Tensor, ...]:
    """What the networks see of logits (B, C, H, W): C tensors (B, D, H, W), vectors of D numbers
    that stand for the pixels' values, floored; without an embedding, D = 1, a share of 256."""
    share = (torch.sigmoid(z.detach()) - ALPHA / 2) / (1 - ALPHA)
    if embedding is None:
        return share.float()[:, :, None].unbind(1)
    values = (share * 256).clamp(0, 255).long()
    return embedding(values).permute(0, 1, 4, 2, 3).unbind(1)


class MultiScaleFlow(nn.Module):
    """Couplings from the finest lattice of pixels to the coarsest, each given all coarser ones.

    An image is taken apart into channels, one for each place in a cell of 4 × 4 pixels. They are
    in the order of Bayer's matrix of ranks, tiled over the image: the first is a lattice of 7 × 7
    pixels, the first four one of 14 × 14, and each channel has four ranks. From images to latents
    the finest pixels go first, while those that they depend on are untouched; back from latents
    each coupling doubles the pixels that are there, or adds `max_ranks` ranks where that is fewer.
    """

    def __init__(self, n_hidden: int = 64, n_layers: int = 1, n_embedding: int = 8,
                 max_ranks: int = 16):
        super().__init__()
        self.z_shape = (PIXELS,)
        rank = F.pixel_unshuffle(dither_matrix(8).repeat(4, 4)[None, :28, :28], CELL)  # (16, 7, 7)
        order = rank[:, 0, 0].argsort()  # of the channels, of four ranks each
        self.register_buffer('order', order, persistent=False)
        self.embedding = nn.Embedding(256, n_embedding) if n_embedding else None
        if n_embedding:
            # In one dimension, neighbours are similar from the start.
            self.embedding.weight.data[:, 0] = torch.linspace(-2, 2, 256)
        bounds = [0, 1]
        while bounds[-1] < 64:
            bounds.append(min(2 * bounds[-1], bounds[-1] + max_ranks, 64))
        layers = [HistogramCoupling(self.embedding, rank[order], *ranks, n_hidden, n_layers)
                  for ranks in pairwise(bounds)]
        self.layers = nn.ModuleList(reversed(layers))
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, ldj: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """(B, 784) and (B,) through all layers, or back through them in reverse order."""
        z = F.pixel_unshuffle(z.view(-1, 1, 28, 28), CELL)[:, self.order]
        embedded = None if reverse else embed(self.embedding, z)  # once: all see untouched pixels
        for layer in reversed(self.layers) if reverse else self.layers:
            z, ldj = layer(z, ldj, reverse, embedded)
        return F.pixel_shuffle(z[:, self.order.argsort()], CELL).flatten(1), ldj


class Model(nn.Module):
    """Images to log p(x), and latents back to images; by default with the template's flow."""

    def __init__(self, shape: Iterable[int], flow: nn.Module | None = None):
        super().__init__()
        self.flow = Flow(shape) if flow is None else flow

    def dequantize(self, z: Tensor) -> Tensor:
        """z + u, u ~ U[0, 1); in float32 the sum may round up to the next whole value."""
        return z + torch.rand_like(z)

    def logit_normalize(self, z: Tensor, logdet: Tensor, reverse: bool = False
                        ) -> tuple[Tensor, Tensor]:
        """z in [0, 256) to logit((1 − α) z / 256 + α / 2), or with `reverse` back.

        log |det| = Σ log (1 − α) / 256 − log s − log(1 − s), s = σ(logit). Shapes: (B, D), (B,).
        """
        constant = z[0].numel() * (math.log1p(-ALPHA) - math.log(256))
        if not reverse:
            s = (1 - ALPHA) / 256 * z + ALPHA / 2
            log_s, log_rest = s.log(), (-s).log1p()
            return log_s - log_rest, logdet + constant - (log_s + log_rest).flatten(1).sum(1)
        log_density = -(F.softplus(z) + F.softplus(-z)).flatten(1).sum(1)  # Σ log s (1 − s)
        z = (torch.sigmoid(z) - ALPHA / 2) * (256 / (1 - ALPHA))
        return z, logdet + log_density - constant

    def encode(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Dequantised images (B, 784), in [0, 256), to latents and log |det|, (B,)."""
        return self.flow(*self.logit_normalize(input, input.new_zeros(len(input))))

    def decode(self, z: Tensor) -> Tensor:
        """Latents to dequantised images, (B, 784) each."""
        logits, ldj = self.flow(z, z.new_zeros(len(z)), reverse=True)
        return self.logit_normalize(logits, ldj, reverse=True)[0]

    def forward(self, input: Tensor) -> Tensor:
        """Images (B, 784) of whole numbers, 0 to 255, to log p(x + u), (B,), in nats."""
        z, ldj = self.encode(self.dequantize(input))
        return log_prior(z).flatten(1).sum(1) + ldj

    @torch.no_grad()
    def sample(self, n_samples: int, temperature: float = 1.) -> Tensor:
        """Dequantised images, (n_samples, 784), of z ~ N(0, temperature² I)."""
        device = next(self.parameters()).device
        return self.decode(temperature * sample_prior((n_samples, *self.flow.z_shape), device))


# --- training ------------------------------------------------------------------------------------


def epoch_iter(model: Model, data: Batches, optimizer: torch.optim.Optimizer | None = None,
               schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
               bf16: bool = False) -> float:
    """One pass over the data, with updates if the model is in training mode; returns the bits per
    dimension, averaged over all images. With `bf16` the networks compute in bfloat16 (the maps and
    densities never do)."""
    total, count = 0.0, 0
    for images, _ in data:
        with (torch.set_grad_enabled(model.training),
              torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)):
            bpd = bits_per_dim(model(images)).mean()
        if model.training:
            optimizer.zero_grad()
            bpd.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            if schedule is not None:
                schedule.step()
        total = total + bpd.detach() * len(images)  # stays on the device: nothing waits
        count += len(images)
    return float(total / count)


def moved(data: Batches, max_shift: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, each rolled by at most max_shift pixels: what leaves a side enters opposite."""
    for images, labels in data:
        shift = tuple(torch.randint(-max_shift, max_shift + 1, (2,)).tolist())
        yield images.view(-1, 28, 28).roll(shift, (1, 2)).view(-1, PIXELS), labels


def evaluated(loader: Loader, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the loader, to be dequantised with the same noise each time."""
    runs.seed_all(seed, 'dequantised')
    yield from loader


def run_epoch(model: Model, data: tuple[Batches, Batches], optimizer: torch.optim.Optimizer,
              **options) -> tuple[float, float]:
    """Train on the first data set, then evaluate on the second: `epoch_iter` of each."""
    train_bpd = epoch_iter(model.train(), data[0], optimizer, **options)
    return train_bpd, epoch_iter(model.eval(), data[1], bf16=options.get('bf16', False))


@torch.no_grad()
def importance_weighted_bpd(model: Model, data: Batches, draws: int) -> float:
    """−log₂(1/K Σ_k p(x + u_k)) / 784, u_k ~ U[0, 1)^784, averaged over the images.

    Its expectation is an upper bound on −log₂ P(x) / 784 that does not rise with K (Hoogeboom et
    al., Learning Discrete Distributions by Dequantization, AABI 2021).
    """
    total, count = 0.0, 0
    for images, _ in data:
        log_px = torch.stack([model(images) for _ in range(draws)]).logsumexp(0) - math.log(draws)
        total, count = total + bits_per_dim(log_px).sum(), count + len(images)
    return float(total / count)


@torch.no_grad()
def roundtrip_errors(model: Model, data: Batches, dtype: torch.dtype) -> Tensor:
    """The largest error of a pixel of decode(encode(x + u)), in grey levels, for each image: (N,).
    The networks compute in float32, all else in `dtype`; if that is float32 too, rounding may move
    a pixel past a whole value, which changes what the networks see of it."""
    dequantized = (model.dequantize(images.to(dtype)) for images, _ in data)
    return torch.cat([(model.decode(model.encode(x)[0]) - x).abs().amax(1) for x in dequantized])


@torch.no_grad()
def final_estimates(model: Model, val: Loader, test: Loader, seed: int) -> dict[str, float]:
    """The metrics of the trained model, its networks in float32."""
    start, device = time.perf_counter(), test.images.device
    model.sample(100).cpu()  # the first call is slower; .cpu() waits for the device
    sample_start = time.perf_counter()
    model.sample(100).cpu()
    sample_seconds = time.perf_counter() - sample_start
    precise = torch.float32 if device.type == 'mps' else torch.float64  # mps has no other
    decoded = test.head(1000)
    return {
        'val_bpd': epoch_iter(model, evaluated(val, seed)),
        'test_bpd': epoch_iter(model, test),
        'test_bpd_iw': importance_weighted_bpd(model, test, IW_DRAWS),
        'iw_draws': IW_DRAWS,
        'roundtrip_max_error': float(roundtrip_errors(model, decoded, precise).max()),
        'roundtrip_share_off_float32':
            float((roundtrip_errors(model, decoded, torch.float32) > 0.5).float().mean()),
        'sample_seconds_per_100': sample_seconds,
        'parameters': sum(map(torch.numel, model.parameters())),
        'test_minutes': (time.perf_counter() - start) / 60}


def learning_rate(progress: float) -> float:
    """A factor: linear from 0 to 1 over the first hundredth of the run, then linear to 0."""
    return min(100 * progress, (1 - progress) / 0.99)


# --- figures -------------------------------------------------------------------------------------


def save_bpd_plot(train_curve: list[float], val_curve: list[float], filename: Path) -> None:
    """Bits per dimension over epochs, from the untrained network on, with published marks."""
    curves, asked = {'training': train_curve, 'validation': val_curve}, {'asked for': 1.85}
    start = max(1, len(val_curve) // 10)
    figures.save_curves(filename, list(range(len(val_curve))), [
        {'ylabel': 'bits per dimension', 'curves': curves, 'references': asked},
        {'ylabel': f'the same, from epoch {start}', 'curves': curves, 'start': start,
         'references': asked if val_curve[-1] > 1.2 else PUBLISHED}])


def save_images(filename: Path, images: Tensor, columns: int) -> None:
    """Rows of 784 dequantised pixels, 0 to 256, as a grid of images of whole grey values."""
    images = images.nan_to_num().clamp(0, 255).floor().view(-1, 28, 28) / 255
    figures.save_grid(filename, images.cpu().numpy(), columns)


def save_snapshot(model: Model, run: runs.Run, epoch: int) -> None:
    """25 samples from the same noise each time, at two temperatures."""
    model.eval()
    for temperature, kind in ((1., 'samples'), (0.7, 'cool')):
        runs.seed_all(run.args.seed, 'samples')
        save_images(run.path(f'{kind}_epoch{epoch:02d}.png'), model.sample(25, temperature), 5)


@torch.no_grad()
def save_interpolations(model: Model, images: Tensor, labels: Tensor, run: runs.Run) -> None:
    """Rows of nine, by `path` in latent space from the first image of a class to that of the next:
    ten classes give five rows. The ends are decoded again too."""
    first = torch.stack([(labels == c).nonzero()[0, 0] for c in labels.unique()])
    z, _ = model.encode(model.dequantize(images[first].float()))
    rows = [path(start, end, steps=7) for start, end in zip(z[::2], z[1::2], strict=False)]
    save_images(run.path('interpolations.png'), model.decode(torch.cat(rows)), columns=9)


# --- the run -------------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--epochs', type=whole_number(1), default=40)
    add('--arch', choices=('multiscale', 'mlp'), default='multiscale',
        help="a flow from coarse to fine, or the template's")
    add('--n_hidden', type=whole_number(1),
        help="units or channels of each coupling's network (default: 64, with mlp 1024)")
    add('--n_flows', type=whole_number(1, 1000), default=4, help='mlp: pairs of couplings')
    add('--n_layers', type=whole_number(0, 1000), default=1,
        help="multiscale: residual layers of each coupling's network")
    add('--n_embedding', type=whole_number(0), default=8,
        help='multiscale: size of the vector for a pixel value, or 0 to use the value itself')
    add('--max_ranks', type=whole_number(1), default=16,
        help='multiscale: most ranks, of 64, that one coupling maps; fewer are slower')
    add('--max_shift', type=whole_number(0), choices=(0, 1, 2),
        help='most pixels by which training images are moved, until the last fifth of the epochs '
             '(default: 1, with mlp 0)')
    add('--batch_size', type=whole_number(1), help='default: 128, with mlp 256')
    add('--lr', type=number(0), help='highest learning rate (default: 1.2e-2, with mlp 1e-3)')
    parser.add_shared_arguments()
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    arch = parser.parse_args(argv).arch
    parser.set_defaults(**DEFAULTS[arch])
    args = parser.parse_args(argv)
    for name in ('n_layers', 'n_embedding', 'max_ranks') if arch == 'mlp' else ('n_flows',):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f'--{name} has no meaning with --arch {arch}')
    args.name = parser.run_name('nf_mlp' if arch == 'mlp' else 'nf', args, 'arch')
    return args


def make_model(args: argparse.Namespace) -> Model:
    """The untrained flow that these arguments ask for."""
    flow = (Flow([PIXELS], args.n_flows, args.n_hidden) if args.arch == 'mlp' else
            MultiScaleFlow(args.n_hidden, args.n_layers, args.n_embedding, args.max_ranks))
    return Model([PIXELS], flow)


def main(args: argparse.Namespace) -> None:
    device, bf16 = runs.start(args)
    train, val, test = runs.load_data(mnist, args, device)
    curve_train, val, test = (loader.head(10_000, EVAL_BATCH) for loader in (train, val, test))

    runs.seed_all(args.seed, 'weights')
    model = make_model(args).to(device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, (0.9, 0.99), fused=True)
    steps = args.epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate((step + 1) / (steps + 1)))
    run = runs.Run(main, args, train.source, device,
                   {'model': model, 'optimizer': optimizer, 'schedule': schedule})

    if args.sample:
        run.load('arch', 'n_hidden', 'n_layers', 'n_embedding', 'max_ranks', 'n_flows')
        model.eval()
        runs.seed_all(args.seed, f'{args.sample} samples')
        columns = math.ceil(math.sqrt(args.sample))
        save_images(run.path('sample.png'), model.sample(args.sample), columns)
        print(run.path('sample.png'))
        return
    if not run.begin(len(train)):
        return

    snapshots = {0, 1} | {round(share * args.epochs) for share in (0.325, 0.5, 0.65, 1)}
    for epoch in run.epochs():
        start = time.perf_counter()
        if epoch == 0:
            running = None
            val_bpd = epoch_iter(model.eval(), evaluated(val, args.seed), bf16=bf16)
        else:
            shift = args.max_shift if epoch <= 0.8 * args.epochs else 0
            data = moved(run.track(train), shift), evaluated(val, args.seed)
            running, val_bpd = run_epoch(model, data, optimizer, schedule=schedule, bf16=bf16)
        train_bpd = epoch_iter(model, evaluated(curve_train, args.seed), bf16=bf16)
        row = {'epoch': epoch, 'train_bpd': train_bpd, 'val_bpd': val_bpd,
               'running_bpd': running, 'seconds': time.perf_counter() - start}
        run.check_finite(row)  # before NaN is drawn
        if epoch in snapshots:
            save_snapshot(model, run, epoch)
        run.end_epoch(row)

    model.eval()  # a run resumed after its last epoch has not been here
    save_bpd_plot([row['train_bpd'] for row in run.rows], [row['val_bpd'] for row in run.rows],
                  run.path('bpd.pdf'))
    runs.seed_all(args.seed, 'test')
    save_interpolations(model, test.images, test.labels, run)
    run.finish(final_estimates(model, val, test, args.seed))


if __name__ == '__main__':
    launch(main, parse_args())
