r"""Normalizing flows on MNIST, after Dinh et al., Density Estimation using Real NVP (ICLR 2017,
arXiv:1605.08803): an invertible map f from images to latents, whose density is known.

    z = f(x)    log p(x) = log N(z; 0, I) + log |det ∂f/∂x|

f must be a bijection, differentiable both ways but for borders of volume 0. Pixels are whole
numbers, 0 to 255, so the probability of an image is the density's integral over a unit cube,
P(x) = E_u p(x + u), u ~ U[0, 1)^784. By Jensen's inequality log P(x) ≥ E_u log p(x + u) (Theis et
al., A Note on the Evaluation of Generative Models, ICLR 2016, section 3.1). Training maximises the
right-hand side; what is reported is −log p(x + u) / (784 log 2), in bits per dimension.

The flow of the assignment, `--arch mlp`, alternates affine couplings of the two colours of a
checkerboard. The default, `autoregressive`, maps one pixel after the other to its latent, by a
piecewise-linear distribution function (Müller et al., Neural Importance Sampling, ACM ToG 2019)
that depends on the pixels before it: first a plan, every second pixel in both directions, which
decides what digit it is, then the detail. Causal transformers look at cells of 4 × 4 pixels (Zhai
et al., Normalizing Flows are Capable Generative Models, ICML 2025, look at patches). The functions
have corners at whole pixel values, so that no density leaks from the black background into the
greys. The density is then constant over each image's unit cube, where Jensen's inequality loses
nothing: the flow is also a discrete autoregressive model.

    python code/a3_nf.py
    python code/a3_nf.py --arch mlp

Measured on MNIST, seed 42, two cores of an AMD EPYC: `nf`: val_bpd 0.953, test_bpd 0.941, frechet
17.5, train_minutes 24.5; `nf_mlp`: val_bpd 1.641, test_bpd 1.632, train_minutes 18.2.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import figures
import measures
import processes
import runs
from command_line import Parser, launch, number, whole_number
from datasets.common import Loader
from datasets.mnist import mnist

PIXELS = 28 * 28
ALPHA = 1e-3  # pixels stay half of it away from 0 and 1, which keeps the logits of black bounded
CELL, CELLS = 4, 49  # the autoregressive flow sees an image as 7 × 7 cells of 4 × 4 pixels
ORDER = (0, 10, 2, 8, 5, 15, 7, 13, 1, 11, 3, 9, 4, 14, 6, 12)  # a cell, evenly filled
KNOTS = (0, 1, *range(8, 249, 8), *range(251, 257))  # bins of values; 0 and 251 … 255 have theirs
HEADS, VECTOR = 4, 8  # of attention; numbers that stand for a pixel's value in the networks
DETAIL = 64, 1, 64  # width, layers and hidden units of each pixel in the network of the detail
EVAL_BATCH, SAMPLE_BATCH = 250, 500
COOL = 0.7  # the temperature at which samples are drawn and judged beside 1
MAX_GRAD_NORM = 1.0  # largest norm of the gradient of the bits per dimension
DEFAULTS = {  # of the arguments that depend on the architecture
    'autoregressive': dict(epochs=9, n_hidden=128, n_layers=4, plan=4, max_shift=1,
                           batch_size=128, lr=1e-2),
    'mlp': dict(epochs=40, n_hidden=1024, n_flows=4, max_shift=0, batch_size=256, lr=1e-3)}
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


def to_latent(z: Tensor, log_p: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Φ⁻¹(C(σ(z))), C the piecewise-linear distribution function of a histogram, and log |slope|.

    The latent is standard normal if σ(z) has the histogram's density. It passes no gradient on to
    log_p: its own log-prior and the −log_prior in the slope cancel in log p(x). Shapes: z any;
    log_p, log-probabilities of K bins, z's and (K,); edges (K + 1,), rising, around σ(z).
    """
    u, widths = torch.sigmoid(z).contiguous(), edges.diff()
    k = torch.searchsorted(edges[1:-1], u.detach(), right=True)  # the bin
    log_p_k = log_p.gather(-1, k[..., None])[..., 0]
    cdf_right = log_p.detach().exp().cumsum(-1).gather(-1, k[..., None])[..., 0]
    cdf_u = cdf_right - log_p_k.detach().exp() * (1 - (u - edges[k]) / widths[k])
    latent = normal_quantile(inside(cdf_u))
    log_slope = log_p_k - widths.log()[k] - F.softplus(z) - F.softplus(-z) - log_prior(latent)
    return latent, log_slope


def from_latent(latent: Tensor, log_p: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `to_latent` in z, and its log |slope|; arguments and shapes as there."""
    cdf_u, cdf_right, widths = torch.special.ndtr(latent), log_p.exp().cumsum(-1), edges.diff()
    k = (cdf_right[..., :-1] <= cdf_u[..., None]).sum(-1)
    log_p_k = log_p.gather(-1, k[..., None])[..., 0]
    cdf_right = cdf_right.gather(-1, k[..., None])[..., 0]
    part = 1 - ((cdf_right - cdf_u) / inside(log_p_k.exp())).clamp(0, 1)
    z = torch.logit(inside(edges[k] + widths[k] * part))
    log_slope = widths.log()[k] - log_p_k + F.softplus(z) + F.softplus(-z) + log_prior(latent)
    return z, log_slope


def between_knots(convert: Callable, z: Tensor, log_p: Tensor) -> list[Tensor]:
    """`to_latent` or `from_latent` with edges at KNOTS, in float64 where no gradient is kept, so
    that inversion seldom moves a pixel past a whole value; mps has no float64."""
    wide = z if torch.is_grad_enabled() or z.device.type == 'mps' else z.double()
    edges = (1 - ALPHA) / 256 * torch.tensor(KNOTS).to(wide) + ALPHA / 2
    return [part.to(z.dtype) for part in convert(wide, log_p.to(wide), edges)]


def normal_quantile(u: Tensor) -> Tensor:
    """Φ⁻¹(u) of each element in (0, 1): √2 erf⁻¹(2u − 1) where torch has no ndtri, on mps."""
    return (math.sqrt(2) * torch.erfinv(2 * u - 1) if u.device.type == 'mps'
            else torch.special.ndtri(u))


def inside(u: Tensor) -> Tensor:
    """u kept away from 0 and 1 by what rounding can do."""
    eps = torch.finfo(u.dtype).eps / 2
    return u.clamp(eps, 1 - eps)


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


class Layer(nn.Module):
    """A layer of a causal transformer: each cell gathers from itself and the cells before it, then
    is transformed alone (Vaswani et al., Attention Is All You Need, NeurIPS 2017, equation 1)."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        later = torch.full((CELLS, CELLS), -math.inf).triu(1)
        self.register_buffer('later', later, persistent=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, past: dict) -> Tensor:
        """(B, t, width) to the same, for the t cells after those whose keys and values are in
        `past` already, under this layer."""
        B, t, width = x.shape
        heads = self.qkv(self.norms[0](x)).view(B, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        query, new = heads[0], heads[1:]  # (B, HEADS, t, width / HEADS) for each of three
        past[self] = torch.cat([past[self], new], dim=3) if self in past else new
        keys, values = past[self]
        n = keys.shape[2]
        scores = query * (width / HEADS) ** -0.5 @ keys.transpose(2, 3) + self.later[n - t:n, :n]
        found = scores.softmax(-1).to(values.dtype) @ values
        x = x + self.out(found.transpose(1, 2).reshape(B, t, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Scale(nn.Module):
    """Histograms of pixels first … stop − 1 of every cell. For each cell a convolution looks at
    the 3 × 3 around, of pixels first … stop − 1 at those in earlier cells; a transformer gathers
    what it found here and for the cells before, and a masked linear map sees the cell itself."""

    def __init__(self, first: int, stop: int, width: int, n_layers: int, n_hidden: int):
        super().__init__()
        self.first, self.stop, n = first, stop, stop - first
        self.look = nn.Linear(stop * VECTOR * 9, width)
        self.place = nn.Parameter(0.02 * torch.randn(CELLS, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(n_layers))
        self.norm, self.cell = nn.LayerNorm(width), nn.Linear(width, n * n_hidden)
        self.within = nn.Linear(n * VECTOR, n * n_hidden, bias=False)
        self.last = nn.Parameter(torch.zeros(n, n_hidden, len(KNOTS) - 1))
        self.bias = nn.Parameter((torch.tensor(KNOTS).diff() / 256).log().repeat(n, 1, 1))
        # Of its own scale a cell sees, of the nine cells around, the first four: those before it.
        pixel = torch.arange(stop).repeat_interleave(VECTOR)
        around = (pixel[:, None] < first) | (torch.arange(9) < 4)
        before = pixel[first * VECTOR:] < pixel[::VECTOR][first:].repeat_interleave(
            n_hidden)[:, None]
        self.register_buffer('around', around.flatten(), persistent=False)
        self.register_buffer('before', before, persistent=False)

    def context(self, seen: Tensor, past: dict, t: int | None = None) -> Tensor:
        """What is known outside each cell, (B, 49, n · n_hidden), from the vectors of all pixels,
        (B, 49, 16, VECTOR); or outside cell t, (B, 1, …), where `past` is of the cells before."""
        grid = seen[:, :, :self.stop].flatten(2).unflatten(1, (7, 7)).movedim(-1, 1)
        grid, cells = F.pad(grid, (1, 1, 1, 1)), slice(None)
        if t is not None:
            row, column = divmod(t, 7)
            grid, cells = grid[:, :, row:row + 3, column:column + 3], slice(t, t + 1)
        kernel = (self.look.weight * self.around).view(-1, self.stop * VECTOR, 3, 3)
        x = F.conv2d(grid, kernel, self.look.bias).flatten(2).transpose(1, 2) + self.place[cells]
        for layer in self.layers:
            x = layer(x, past)
        return self.cell(self.norm(x))

    def forward(self, context: Tensor, seen: Tensor) -> Tensor:
        """Logits of the bins, (n, B · t, K), given `context` and the vectors of t cells."""
        own = seen[:, :, self.first:self.stop].flatten(2)
        h = F.gelu(context + F.linear(own, self.within.weight * self.before))
        h = h.view(-1, *self.last.shape[:2]).transpose(0, 1)
        return h @ self.last + self.bias  # the sum in float32, also under autocast


class AutoregressiveFlow(nn.Module):
    """From images to latents and back by histograms that depend on earlier pixels only, a masked
    autoregressive flow (Papamakarios et al., NeurIPS 2017) with histograms for its Gaussians.

    First comes the plan: the first `plan` pixels of each cell (4 make a lattice of every second
    pixel), cell after cell in reading order, in a cell one by one; then all others, the detail, in
    the same order. Towards latents all pixels are mapped at once, back to images one by one.
    """

    def __init__(self, n_hidden: int = 128, n_layers: int = 4, plan: int = 4):
        super().__init__()
        self.z_shape = (PIXELS,)
        self.register_buffer('order', torch.tensor(ORDER), persistent=False)
        self.embedding = nn.Embedding(256, VECTOR)
        self.embedding.weight.data[:, 0] = torch.linspace(-2, 2, 256)  # neighbours are similar
        scales = (0, plan, n_hidden, n_layers, n_hidden), (plan, CELL ** 2, *DETAIL)
        self.scales = nn.ModuleList(Scale(*scale) for scale in scales if scale[0] < scale[1])

    def embed(self, z: Tensor) -> Tensor:
        """What the networks see of logits of any shape: vectors, (…, VECTOR), that stand for the
        pixels' values, floored. No gradient passes to z."""
        share = (torch.sigmoid(z.detach()) - ALPHA / 2) / (1 - ALPHA)
        return self.embedding((share * 256).clamp(0, 255).long())

    def forward(self, z: Tensor, ldj: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """z (B, 784) to z' and ldj + log |det ∂z'/∂z|, (B,); back again with `reverse`, where no
        gradient is kept."""
        cells = F.pixel_unshuffle(z.view(-1, 1, 28, 28), CELL)[:, self.order].flatten(2)
        cells, log_slope = (self.invert if reverse else self.map)(cells.transpose(0, 1))
        cells = cells.transpose(0, 1)[:, self.order.argsort()].unflatten(2, (7, 7))
        return F.pixel_shuffle(cells, CELL).flatten(1), ldj + log_slope.sum((0, 2))

    def map(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (16, B, 49) to latents, and the log |slope| of each: the diagonal's logarithm."""
        seen = self.embed(z.permute(1, 2, 0))  # (B, 49, 16, VECTOR)
        logits = torch.cat([scale(scale.context(seen, {}), seen) for scale in self.scales])
        log_p = logits.to(z.dtype).log_softmax(-1).unflatten(1, z.shape[1:])
        return between_knots(to_latent, z, log_p)

    @torch.no_grad()
    def invert(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `map`: one pixel after the other, each given those that are there."""
        z, log_slope = torch.zeros(2, *latents.shape).to(latents)
        seen = self.embed(z.permute(1, 2, 0))
        for scale in self.scales:
            past = {}
            for t in range(CELLS):
                context = scale.context(seen, past, t)
                for k in range(scale.first, scale.stop):
                    logits = scale(context, seen[:, t:t + 1])[k - scale.first]
                    log_p = logits.to(z.dtype).log_softmax(-1)
                    value, log_slope[k, :, t] = between_knots(
                        from_latent, latents[k, :, t], log_p)
                    z[k, :, t], seen[:, t, k] = value, self.embed(value)
        return z, log_slope


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
        """z in [0, 256) to logit((1 − α) z / 256 + α / 2), or with `reverse` back; there log |det|
        is Σ [log((1 − α) / 256) − log s − log(1 − s)], s = σ(logit). Shapes: (B, D), (B,)."""
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
        return self.logit_normalize(*self.flow(z, z.new_zeros(len(z)), True), reverse=True)[0]

    def forward(self, input: Tensor) -> Tensor:
        """Images (B, 784) of whole numbers, 0 to 255, to log p(x + u), (B,), in nats."""
        z, ldj = self.encode(self.dequantize(input))
        return log_prior(z).flatten(1).sum(1) + ldj

    @torch.no_grad()
    def sample(self, n_samples: int, temperature: float = 1.) -> Tensor:
        """Dequantised images, (n_samples, 784), of z ~ N(0, temperature² I)."""
        size = n_samples, *self.flow.z_shape
        z = temperature * sample_prior(size, next(self.parameters()).device)
        return torch.cat([self.decode(rows) for rows in z.split(SAMPLE_BATCH)])


# --- training ------------------------------------------------------------------------------------


def epoch_iter(model: Model, data: Batches, *optimizers: torch.optim.Optimizer,
               schedules: Iterable[torch.optim.lr_scheduler.LRScheduler] = (),
               bf16: bool = False) -> float:
    """One pass over the data, with updates if the model is in training mode; returns the bits per
    dimension of all images. With `bf16` networks compute in bfloat16, maps and densities never."""
    total, count = 0.0, 0
    for images, _ in data:
        with (torch.set_grad_enabled(model.training),
              torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)):
            bpd = bits_per_dim(model(images)).mean()
        if model.training:
            model.zero_grad()
            bpd.backward()
            processes.average_gradients(model.parameters(), len(images))
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            for stepped in (*optimizers, *schedules):
                stepped.step()
        total = total + bpd.detach() * len(images)  # stays on the device: nothing waits
        count += len(images)
    if model.training:
        total, count = processes.add_up(total, count)
    return float(total / count)


def moved(data: Batches, max_shift: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, each rolled as a whole, by at most max_shift pixels in both directions."""
    for images, labels in data:
        shift = tuple(torch.randint(-max_shift, max_shift + 1, (2,)).tolist())
        yield images.view(-1, 28, 28).roll(shift, (1, 2)).view(-1, PIXELS), labels


def evaluated(loader: Loader, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the loader, to be dequantised with the same noise each time."""
    runs.seed_all(seed, 'dequantised')
    yield from loader


def run_epoch(model: Model, data: tuple[Batches, Batches], *optimizers: torch.optim.Optimizer,
              **options) -> tuple[float | None, float | None]:
    """Train on the first data set, then evaluate on the second: `epoch_iter` of each. Without
    optimizers there is no training, and processes other than the first do not evaluate: None."""
    running = epoch_iter(model.train(), data[0], *optimizers, **options) if optimizers else None
    return running, None if processes.rank() else epoch_iter(
        model.eval(), data[1], bf16=options.get('bf16', False))


@torch.no_grad()
def importance_weighted_bpd(model: Model, data: Batches, draws: int) -> float:
    """−log₂(1/K Σ_k p(x + u_k)) / 784, u_k ~ U[0, 1)^784, averaged over images: in expectation it
    does not rise with K, down to −log₂ P(x) / 784 (Hoogeboom et al., AABI 2021)."""
    total, count = 0.0, 0
    for images, _ in data:
        log_px = torch.stack([model(images) for _ in range(draws)]).logsumexp(0) - math.log(draws)
        total, count = total + bits_per_dim(log_px).sum(), count + len(images)
    return float(total / count)


@torch.no_grad()
def roundtrip_errors(model: Model, data: Batches, dtype: torch.dtype) -> Tensor:
    """decode(encode(x + u)) − (x + u) of each pixel, in grey levels, (N, 784), u ~ U[0, 1)^784. In
    float32 rounding may move a pixel past a whole value, which changes what networks see."""
    model = copy.deepcopy(model).to(dtype)
    dequantized = (model.dequantize(images.to(dtype)) for images, _ in data)
    return torch.cat([model.decode(model.encode(x)[0]) - x for x in dequantized])


@torch.no_grad()
def final_estimates(model: Model, classifier: measures.DigitClassifier, val: Loader, test: Loader,
                    seed: int) -> dict[str, float | str]:
    """The metrics of the trained model, its networks in float32."""
    start, device = time.perf_counter(), test.images.device
    runs.seed_all(seed, 'judged')
    samples, cool = (model.sample(len(test.images), temperature).floor().clamp(0, 255) / 255
                     for temperature in (1., COOL))
    sample_start = time.perf_counter()  # later, since the first call is slower
    model.sample(100).cpu()  # waits for the device
    sample_seconds = time.perf_counter() - sample_start
    on_val, on_test = (measures.Judge(classifier, real.images / 255, real.labels)
                       for real in (val, test))
    bpd = {'val_bpd': epoch_iter(model, evaluated(val, seed)), 'test_bpd': epoch_iter(model, test)}
    if isinstance(model.flow, Flow):  # the other's density is constant where the noise falls
        bpd |= {'test_bpd_iw': importance_weighted_bpd(model, test, 8), 'iw_draws': 8}
    errors = [roundtrip_errors(model, test.head(1000), dtype).abs().amax(1) for dtype in (
        torch.float32 if device.type == 'mps' else torch.float64, torch.float32)]
    return bpd | {
        'val_frechet': on_val.glance(samples)['frechet'],
        'frechet_cool': on_test.glance(cool)['frechet'],
        'frechet_floor': on_test.glance(val.images / 255)['frechet'],
        **on_test.measure(samples),
        'classifier_sha256': measures.fingerprint(classifier),
        'roundtrip_max_error': float(errors[0].max()),
        'roundtrip_share_off_float32': float((errors[1] > 0.5).float().mean()),
        'sample_seconds_per_100': sample_seconds,
        'parameters': sum(map(torch.numel, model.parameters())),
        'test_minutes': (time.perf_counter() - start) / 60}


def learning_rate(progress: float) -> float:
    """A factor: linear from 0 to 1 over the first hundredth of the run, then linear to 0."""
    return min(100 * progress, (1 - progress) / 0.99)


# --- figures -------------------------------------------------------------------------------------


def save_bpd_plot(train_curve: list[float], val_curve: list[float], filename: Path) -> None:
    """Bits per dimension over epochs, beside the mark that the assignment sets."""
    curves, asked = {'training': train_curve, 'validation': val_curve}, {'1.85': 1.85}
    panel = {'ylabel': 'bits per dimension', 'curves': curves, 'references': asked}
    figures.save_curves(filename, list(range(len(val_curve))), [panel, panel | {
        'start': max(1, len(val_curve) // 10),
        'references': asked if val_curve[-1] > 1.2 else {}}])


def save_images(filename: Path, images: Tensor, columns: int | None = None) -> None:
    """Rows of 784 dequantised pixels, 0 to 256, as a grid of images of whole grey values."""
    figures.save_grid(filename, images.clamp(0, 255).floor() / 255, columns)


def save_snapshot(model: Model, run: runs.Run, epoch: int) -> None:
    """25 samples from the same noise each time, at two temperatures."""
    model.eval()
    for temperature, kind in ((1., 'samples'), (COOL, 'cool')):
        runs.seed_all(run.args.seed, 'samples')
        save_images(run.path(f'{kind}_epoch{epoch:02d}.png'), model.sample(25, temperature))


@torch.no_grad()
def save_interpolations(model: Model, images: Tensor, labels: Tensor, run: runs.Run) -> None:
    """Five rows of nine, from the first image of a class to that of the next: between latents a
    and b lie ((1 − t) a + t b) / √((1 − t)² + t²), as normal as independent a and b are."""
    first = torch.stack([(labels == c).nonzero()[0, 0] for c in labels.unique()])
    z, _ = model.encode(model.dequantize(images[first].float()))
    t = torch.linspace(0, 1, 9, device=z.device)[:, None]
    rows = [((1 - t) * a + t * b) / ((1 - t).square() + t.square()).sqrt()
            for a, b in zip(z[::2], z[1::2], strict=False)]
    save_images(run.path('interpolations.png'), model.decode(torch.cat(rows)), columns=9)


# --- the run -------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--epochs', type=whole_number(1), help='default: 9, with mlp 40')
    add('--arch', choices=('autoregressive', 'mlp'), default='autoregressive',
        help="a flow from pixel to pixel, or the template's")
    add('--n_hidden', type=whole_number(1),
        help="width of the plan's network, a multiple of 4, or with mlp of each coupling's "
             '(default: 128, with mlp 1024)')
    add('--n_flows', type=whole_number(1, 1000), help='mlp: pairs of couplings (default: 4)')
    add('--n_layers', type=whole_number(0, 1000),
        help="autoregressive: layers of the plan's transformer (default: 4)")
    add('--plan', type=whole_number(0, CELL ** 2),
        help='autoregressive: pixels of each cell of 16 that come first, or 0 (default: 4)')
    add('--max_shift', type=whole_number(0), choices=(0, 1, 2),
        help='most pixels by which images are moved, until the last fifth of the epochs (default: '
             '1, with mlp 0)')
    add('--batch_size', type=whole_number(1), help='default: 128, with mlp 256')
    add('--lr', type=number(0, 1e30), help='highest learning rate (default: 1e-2, with mlp 1e-3)')
    add('--temperature', type=number(0), default=1.,
        help='what --sample multiplies the latents by: below 1, pixels are nearer their medians')
    parser.add_shared_arguments()
    arch = parser.parse_args(argv).arch
    parser.set_defaults(**DEFAULTS[arch])
    args = parser.parse_args(argv)
    for name in ('n_flows', 'n_layers', 'plan'):
        if getattr(args, name) is not None and name not in DEFAULTS[arch]:
            parser.error(f'--{name} has no meaning with --arch {arch}')
    if args.plan == 0 and (args.n_hidden, args.n_layers) != (128, 4):
        parser.error('--n_hidden and --n_layers have no meaning with --plan 0')
    if arch == 'autoregressive' and args.n_hidden % HEADS:
        parser.error(f'--n_hidden {args.n_hidden} is not a multiple of {HEADS}')
    if args.temperature != 1 and not args.sample:
        parser.error('--temperature has no meaning without --sample')
    args.name = parser.run_name('nf_mlp' if arch == 'mlp' else 'nf', args, 'arch')
    return args


def make_model(args: argparse.Namespace) -> Model:
    """The untrained flow that these arguments ask for."""
    flow = (Flow([PIXELS], args.n_flows, args.n_hidden) if args.arch == 'mlp' else
            AutoregressiveFlow(args.n_hidden, args.n_layers, args.plan))
    return Model([PIXELS], flow)


def make_optimizers(model: Model, lr: float) -> list[torch.optim.Optimizer]:
    """Adam; for linear layers of an autoregressive flow Muon (Jordan et al., Muon: An Optimizer
    for Hidden Layers in Neural Networks, 2024), whose updates have singular values near 1."""
    matrices = [layer.weight for layer in model.flow.modules() if isinstance(layer, nn.Linear)
                and isinstance(model.flow, AutoregressiveFlow)]
    others = [weight for weight in model.parameters() if weight not in set(matrices)]
    optimizers = [torch.optim.Adam(others, lr, (0.9, 0.99), fused=True)]
    if matrices:
        optimizers += [torch.optim.Muon(matrices, lr, 0, adjust_lr_fn='match_rms_adamw')]
    return optimizers


def main(args: argparse.Namespace) -> None:
    device, bf16 = runs.start(args)
    train, val, test = runs.load_data(mnist, args, device)
    curve_train, val, test = (loader.head(10_000, EVAL_BATCH) for loader in (train, val, test))

    runs.seed_all(args.seed, 'weights')
    model = make_model(args).to(device)
    optimizers, steps = make_optimizers(model, args.lr), args.epochs * len(train)
    schedules = [torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate((step + 1) / (steps + 1)))
        for optimizer in optimizers]
    parts = {f'optimizer{i}': optimizer for i, optimizer in enumerate(optimizers)}
    parts |= {f'schedule{i}': schedule for i, schedule in enumerate(schedules)}
    run = runs.Run(main, args, train.source, device, {'model': model} | parts)

    if args.sample:
        run.load('arch', 'n_hidden', 'n_layers', 'plan', 'n_flows')
        model.eval()
        runs.seed_all(args.seed, f'{args.sample} samples')
        save_images(run.path('sample.png'), model.sample(args.sample, args.temperature))
        print(run.path('sample.png'))
        return
    if not run.begin():
        return
    if processes.rank() == 0:
        classifier = measures.load_classifier(args.results_dir, train, val)

    snapshots = {0, 1} | {round(share * args.epochs) for share in (0.325, 0.5, 0.65, 1)}
    for epoch in run.epochs():
        start = time.perf_counter()
        shift = args.max_shift if 0 < epoch <= 0.8 * args.epochs else 0
        data = moved(run.track(train), shift), evaluated(val, args.seed)
        running, val_bpd = run_epoch(model, data, *(optimizers if epoch else ()),
                                     schedules=schedules, bf16=bf16)
        if processes.rank():  # it only trains: the first process does all else
            continue
        train_bpd = epoch_iter(model, evaluated(curve_train, args.seed), bf16=bf16)
        row = {'epoch': epoch, 'train_bpd': train_bpd, 'val_bpd': val_bpd,
               'running_bpd': running, 'seconds': time.perf_counter() - start}
        run.check_finite(row)  # before NaN is drawn
        if epoch in snapshots:
            save_snapshot(model, run, epoch)
        run.end_epoch(row)

    if processes.rank():
        return
    model.eval()  # a run resumed after its last epoch has not been here
    save_bpd_plot([row['train_bpd'] for row in run.rows], [row['val_bpd'] for row in run.rows],
                  run.path('bpd.pdf'))
    runs.seed_all(args.seed, 'test')
    save_interpolations(model, test.images, test.labels, run)
    run.finish(final_estimates(model, classifier, val, test, args.seed))


if __name__ == '__main__':
    launch(main, parse_args())
