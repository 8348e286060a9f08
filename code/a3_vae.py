"""Variational autoencoder on binarised MNIST, after Kingma and Welling, Auto-Encoding Variational
Bayes (ICLR 2014, arXiv:1312.6114), with fully connected networks only.

    z ~ N(0, I)    x_m ~ Bernoulli(f(z)_m)    q(z|x) = N(μ(x), diag σ²(x))

    log p(x) ≥ ELBO(x) = E_q(z|x)[log p(x|z)] − KL(q(z|x) ‖ p(z))

Training maximises the bound with one reparametrised sample, z = μ + σ ⊙ ε, ε ~ N(0, I), and the KL
divergence in closed form. A share of the training images is turned, scaled, sheared and moved a
little until the last fifth of the epochs, against overfitting; validation, test and the curve of
the training images never are. At the end log p(x) itself is estimated by importance sampling.

With `--likelihood gaussian` the images are grey, with uniform noise added to their 256 levels, and
x_m ~ N(f(z)_m, s(z)_m²): a density, whose bound in bits per dimension stands beside a flow's.

    python code/a3_vae.py --zdim 20
    python code/a3_vae.py --zdim 2
    python code/a3_vae.py --likelihood gaussian

Measured on static binarised MNIST, 40 epochs, seed 42, 1,000 importance samples, two cores of an
AMD EPYC: `vae_z20`: val_neg_elbo_nats 91.5, test_neg_elbo_nats 90.9, test_nll_nats 87.1,
train_minutes 2.6; `vae_z2`: val_neg_elbo_nats 135.6, test_neg_elbo_nats 134.8, test_nll_nats
132.6, train_minutes 2.4.
"""

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import figures
import runs
from datasets.bmnist import bmnist
from datasets.mnist import mnist

PIXELS = 28 * 28
EVAL_BATCH = 1000
MAX_GRAD_NORM = 200.0  # of the summed gradient, usually about 100: a spike can undo epochs
LOG_STD = (-8., 2.)  # of a Gaussian pixel in [0, 1]; that of rounding to 1/256 is about −6.8
IW_ROWS = 4096  # decoded at once when log p(x) is estimated: what caches like, about 0.06 GB


# --- mathematics ---------------------------------------------------------------------------------


def bernoulli_log_likelihood(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x|z) = Σ_m x_m log f_m + (1 − x_m) log(1 − f_m), f = sigmoid(logits), in nats.

    Of logits a it is Σ_m x_m a_m − log(1 + exp a_m), whose last term, as max(a, 0) −
    log sigmoid |a|, cannot overflow and takes a fraction of the time of a log1p.
    Shapes: x and logits (..., M), broadcast against each other, to (...).
    """
    return torch.addcmul(logits.abs().sigmoid().log() - logits.relu(), x, logits).sum(-1)


def gaussian_kl(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) = ½ Σ_d (σ_d² + μ_d² − 1 − log σ_d²), in nats (paper, appendix B).

    Shapes: mean and std (..., D) to (...).
    """
    return 0.5 * (std.square() + mean.square() - 1 - 2 * std.log()).sum(-1)


def gaussian_log_density(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(z; μ, diag σ²), in nats. Shapes: each (..., D), broadcast together, to (...)."""
    return -(0.5 * ((z - mean) / std).square() + std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


def manifold_grid(steps: int) -> Tensor:
    """Φ⁻¹ of an even grid over the unit square: equal prior mass between neighbours (figure 4b).

    Returns (steps², 2); the first coordinate grows to the right, the second upwards, row by row
    from the top.
    """
    ticks = torch.special.ndtri((torch.arange(steps, dtype=torch.float64) + 0.5) / steps).float()
    up, right = torch.meshgrid(ticks.flip(0), ticks, indexing='ij')
    return torch.stack([right, up], dim=-1).view(-1, 2)


# --- model ---------------------------------------------------------------------------------------


class FullyConnected(nn.Module):
    """`n_layers` hidden layers and a linear map: h ← SiLU(W h + b), with `skip` added to h."""

    def __init__(self, n_in: int, hidden_dim: int, n_out: int, n_layers: int, skip: bool):
        super().__init__()
        self.skip = skip
        self.first = nn.Linear(n_in, hidden_dim)
        self.hidden = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(n_layers - 1))
        self.last = nn.Linear(hidden_dim, n_out)

    def forward(self, input: Tensor) -> Tensor:
        """(..., n_in) to (..., n_out), in the input's precision also under autocast."""
        h = F.silu(self.first(input))
        for layer in self.hidden:
            h = h + F.silu(layer(h)) if self.skip else F.silu(layer(h))
        return self.last(h).to(input.dtype)


class Encoder(nn.Module):
    """q(z|x): images to the mean and standard deviation of a factored Gaussian."""

    def __init__(self, hidden_dim: int = 500, z_dim: int = 20, n_layers: int = 3,
                 skip: bool = True):
        super().__init__()
        self.net = FullyConnected(PIXELS, hidden_dim, 2 * z_dim, n_layers, skip)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 784) in [0, 1] to mean and std, each (B, z_dim)."""
        mean, log_var = self.net(2 * input - 1).chunk(2, dim=-1)
        return mean, (0.5 * log_var.clamp(-14, 14)).exp()


class Decoder(nn.Module):
    """p(x|z): codes to the means of 784 Bernoulli pixels."""

    n_out = PIXELS

    def __init__(self, hidden_dim: int = 500, z_dim: int = 20, n_layers: int = 3,
                 skip: bool = True):
        super().__init__()
        self.net = FullyConnected(z_dim, hidden_dim, self.n_out, n_layers, skip)
        nn.init.normal_(self.net.last.weight, std=0.01)  # at first about Bernoulli(½)

    def logits(self, input: Tensor) -> Tensor:
        """(..., z_dim) to the logits of the means, (..., 784)."""
        return self.net(input)[..., :PIXELS]  # a GaussianDecoder has more

    def forward(self, input: Tensor) -> Tensor:
        """(..., z_dim) to the means, (..., 784) in (0, 1)."""
        return self.logits(input).sigmoid()

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) in nats. Shapes: (..., 784) and (..., z_dim), broadcast, to (...)."""
        return bernoulli_log_likelihood(x, self.logits(z))

    def sample(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x ~ p(x|z) and its mean: (..., z_dim) to two of (..., 784), in [0, 1]."""
        means = self(z)
        return torch.bernoulli(means), means


class GaussianDecoder(Decoder):
    """p(x|z): codes to the means and standard deviations of 784 Gaussian pixels."""

    n_out = 2 * PIXELS

    def mean_and_std(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """(..., z_dim) to two of (..., 784), of pixels in [0, 1]."""
        logits, log_std = self.net(input).chunk(2, dim=-1)
        return logits.sigmoid(), log_std.clamp(*LOG_STD).exp()

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """The log-density of 256 x, as the grey levels are 1 apart. Shapes as for a Decoder."""
        return gaussian_log_density(x, *self.mean_and_std(z)) - PIXELS * math.log(256)

    def sample(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """As of a Decoder; what falls outside [0, 1] is drawn to its ends."""
        means, std = self.mean_and_std(z)
        return torch.normal(means, std).clamp(0, 1), means


class VAE(nn.Module):
    """Encoder, prior and decoder: the lower bound, samples, and log p(x)."""

    def __init__(self, hidden_dim: int = 500, z_dim: int = 20, n_layers: int = 3,
                 skip: bool = True, likelihood: str = 'bernoulli'):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder(hidden_dim, z_dim, n_layers, skip)
        self.decoder = {'bernoulli': Decoder, 'gaussian': GaussianDecoder}[likelihood](
            hidden_dim, z_dim, n_layers, skip)

    def elbo_terms(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """One-sample estimate of E_q[log p(x|z)], and the exact KL(q ‖ p): each (B,), in nats."""
        mean, std = self.encoder(input)
        z = mean + std * torch.randn_like(std)
        return self.decoder.log_likelihood(input, z), gaussian_kl(mean, std)

    def forward(self, input: Tensor) -> Tensor:
        """(B, 784) to the average negative lower bound, in nats: equation 12 of the assignment."""
        log_likelihood, kl = self.elbo_terms(input)
        return (kl - log_likelihood).mean()

    @torch.no_grad()
    def sample(self, n_samples: int) -> tuple[Tensor, Tensor]:
        """Ancestral samples: z ~ p(z), x ~ p(x|z). Returns (sampled_ims, im_means), (N, 784)."""
        z = torch.randn(n_samples, self.z_dim, device=next(self.parameters()).device)
        return self.decoder.sample(z)

    @torch.no_grad()
    def log_px(self, input: Tensor, n_samples: int) -> Tensor:
        """Importance-sampled log p(x) ≈ log 1/K Σ_k p(x|z_k) p(z_k) / q(z_k|x), z_k ~ q(z|x).

        In expectation a lower bound that rises with K to log p(x) (Burda et al., Importance
        Weighted Autoencoders, ICLR 2016, theorem 1). Shapes: (B, 784) to (B,), in nats.
        """
        mean, std = self.encoder(input)
        B, D = mean.shape
        zero, one = torch.zeros_like(mean), torch.ones_like(std)
        log_sum = torch.full_like(mean[:, 0], -math.inf)
        for start in range(0, n_samples, chunk := max(1, IW_ROWS // B)):
            K = min(chunk, n_samples - start)
            z = mean + std * torch.randn(K, B, D, device=mean.device, dtype=mean.dtype)
            log_w = (self.decoder.log_likelihood(input, z)
                     + gaussian_log_density(z, zero, one) - gaussian_log_density(z, mean, std))
            log_sum = torch.logaddexp(log_sum, log_w.logsumexp(0))  # log_w is (K, B)
        return log_sum - math.log(n_samples)


# --- training ------------------------------------------------------------------------------------


def augment(images: Tensor, share: float) -> Tensor:
    """A share of the images, turned, scaled, sheared and moved a little; no value is new.

    Standard deviations: 5°, 5 %, 5 % and half a pixel. Shape (B, 784).
    """
    B = len(images)
    on = (torch.rand(B, device=images.device) < share).float()
    noise = torch.randn(6, B, device=images.device) * on
    angle, shear = noise[0] * math.radians(5), noise[1] * 0.05
    sx, sy, dx, dy = 1 + noise[2] * 0.05, 1 + noise[3] * 0.05, noise[4] / 28, noise[5] / 28
    middle = (torch.arange(28, device=images.device) + 0.5) / 14 - 1  # of pixels, in (−1, 1)
    y, x = middle.view(28, 1), middle
    cos, sin, sx, sy, shear, dx, dy = (value.view(B, 1, 1) for value in
                                       (angle.cos(), angle.sin(), sx, sy, shear, dx, dy))
    grid = torch.stack([sx * cos * x + (shear - sin) * y + dx, sin * x + sy * cos * y + dy], -1)
    return F.grid_sample(images.view(B, 1, 28, 28), grid, mode='nearest',
                         align_corners=False).view(B, PIXELS)


def prepared(data: Iterable, share: float = 0., grey: bool = False) -> Iterator[Tensor]:
    """The batches as the model takes them, (B, 784) in [0, 1], a share of each augmented.

    Binary images are ready. Grey values 0 to 255, which come with their labels, get uniform noise:
    (x + u) / 256, u ~ U[0, 1), so that a density of them bounds their probability (in float32 the
    sum may round up to the next whole value).
    """
    for batch in data:
        images = batch[0] if grey else batch
        images = augment(images, share) if share else images
        yield (images + torch.rand_like(images)) / 256 if grey else images


def epoch_iter(model: VAE, data: Iterable[Tensor], optimizer: torch.optim.Optimizer | None = None,
               schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
               bf16: bool = False) -> float:
    """One pass over the data, with updates if the model is in training mode.

    Args:
        data: batches of images, (B, 784) in [0, 1].
        optimizer, schedule: stepped after each batch, the gradient's norm at most MAX_GRAD_NORM;
            needed for training only.
        bf16: whether the networks compute in bfloat16 (the losses never do).

    Returns:
        The average negative lower bound, each image with the same weight, in nats.
    """
    total, count = 0.0, 0
    for images in data:
        with (torch.set_grad_enabled(model.training),
              torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)):
            neg_elbo = model(images)
        if model.training:
            optimizer.zero_grad()
            neg_elbo.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            if schedule is not None:
                schedule.step()
        total = total + neg_elbo.detach() * len(images)  # stays on the device: nothing waits
        count += len(images)
    return float(total / count)


def run_epoch(model: VAE, data: tuple[Iterable[Tensor], Iterable[Tensor]],
              optimizer: torch.optim.Optimizer, **options) -> tuple[float, float]:
    """Train on the first data set, then evaluate on the second: `epoch_iter` of each, in nats."""
    traindata, valdata = data
    model.train()
    train_neg_elbo = epoch_iter(model, traindata, optimizer, **options)
    model.eval()
    val_neg_elbo = epoch_iter(model, valdata, bf16=options.get('bf16', False))
    return train_neg_elbo, val_neg_elbo


def learning_rate(progress: float) -> float:
    """One cycle, as a factor: linear from 0 to 1 over the first tenth, then a cosine to 0."""
    return min(10 * progress, 0.5 + 0.5 * math.cos(math.pi * (progress - 0.1) / 0.9))


# --- figures -------------------------------------------------------------------------------------


def save_elbo_plot(train_curve: list[float], val_curve: list[float], filename: Path,
                   references: dict[str, float] | None = None) -> None:
    """The lower bound (not its negative) over epochs, from the untrained network on; in nats."""
    curves = {'training': [-value for value in train_curve],
              'validation': [-value for value in val_curve]}
    start = max(1, len(val_curve) // 10)
    panels = [{'ylabel': 'lower bound on log p(x), nats', 'curves': curves,
               'references': references or {}},
              {'ylabel': f'the same, from epoch {start}', 'curves': curves, 'start': start}]
    figures.save_curves(filename, list(range(len(val_curve))), panels)


def save_images(filename: Path, images: Tensor, columns: int, **options) -> None:
    """Rows of 784 pixels in [0, 1], as a grid of images."""
    figures.save_grid(filename, images.view(-1, 28, 28).cpu().numpy(), columns, **options)


def save_snapshot(model: VAE, run: runs.Run, epoch: int) -> None:
    """25 samples from the same noise each time; with two latent dimensions the manifold too,
    before, halfway and at the end."""
    model.eval()
    runs.seed_all(run.args.seed, 'samples')
    draws, means = model.sample(25)
    save_images(run.path(f'samples_epoch{epoch:02d}_draws.png'), draws, columns=5)
    save_images(run.path(f'samples_epoch{epoch:02d}_means.png'), means, columns=5)
    epochs = run.args.epochs
    if model.z_dim == 2 and epoch in (0, round(epochs / 2), epochs):
        with torch.no_grad():
            means = model.decoder(manifold_grid(20).to(means.device))
        save_images(run.path(f'manifold_epoch{epoch:02d}.png'), means, columns=20, scale=2, gap=0)


# --- the run -------------------------------------------------------------------------------------


def build_parser() -> runs.Parser:
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add('--epochs', type=runs.whole_number(1), default=40, help='default: 40')
    add('--zdim', type=runs.whole_number(1), default=20, help='latent dimensions (default: 20)')
    add('--hidden_dim', type=runs.whole_number(1), default=512, help='default: 512')
    add('--n_layers', type=runs.whole_number(1, 1000), default=3,
        help='hidden layers of each network (default: 3)')
    add('--skip', choices=('yes', 'no'),
        help='connections past each hidden layer (default: yes, but with fewer than 5 latent '
             'dimensions no)')
    add('--augment', type=runs.number(0, 1),
        help='share of the training images changed a little, but for the last fifth of the '
             'epochs (default: 0.8, with fewer than 5 latent dimensions 0.4)')
    add('--likelihood', choices=('bernoulli', 'gaussian'), default='bernoulli',
        help='of the pixels: of binarised MNIST, or of MNIST in grey (default: bernoulli)')
    add('--batch_size', type=runs.whole_number(1), default=128, help='default: 128')
    add('--lr', type=runs.number(0), default=1.5e-3, help='peak of the cycle (default: 1.5e-3)')
    add('--iw_samples', type=runs.whole_number(1), default=100,
        help='importance samples for log p(x) of the test images (default: 100)')
    add('--precision', choices=('auto', 'bf16', 'fp32'), default='auto',
        help='of the networks in training; auto: bf16 where the hardware has it')
    parser.add_shared_arguments()
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = runs.pick_device(args.device)
    bf16 = args.precision == 'bf16' or args.precision == 'auto' and runs.has_fast_bf16(device)
    download = not (args.dry_run or args.sample)
    grey = args.likelihood == 'gaussian'
    train, val, test = (mnist if grey else bmnist)(args.data_dir, args.batch_size, download,
                                                   args.dataset, device)
    prefix = f'vae_gaussian_z{args.zdim}' if grey else f'vae_z{args.zdim}'
    name = runs.run_name(prefix, build_parser(), args, ('zdim', 'likelihood', 'iw_samples'),
                         train.source)
    few = args.zdim < 5  # no room for slant and size as well, and sharper maps are needed
    args.skip = args.skip or ('no' if few else 'yes')
    args.augment = args.augment if args.augment is not None else 0.4 if few else 0.8
    args.precision = 'bf16' if bf16 else 'fp32'
    if args.dry_run:
        args.epochs, args.iw_samples = 2, 5
        train, val, test = (loader.head(3 * args.batch_size) for loader in (train, val, test))
    curve_train, val, test = (loader.head(10_000, EVAL_BATCH) for loader in (train, val, test))

    runs.seed_all(args.seed, 'weights')
    model = VAE(args.hidden_dim, args.zdim, args.n_layers, args.skip == 'yes',
                args.likelihood).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    steps = args.epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate((step + 1) / (steps + 1)))
    run = runs.Run(__file__, args, name, train.source, device,
                   {'model': model, 'optimizer': optimizer, 'schedule': schedule})

    if args.sample:
        run.load('zdim', 'hidden_dim', 'n_layers', 'skip', 'likelihood')
        model.eval()
        runs.seed_all(args.seed, f'{args.sample} samples')
        draws, means = model.sample(args.sample)
        columns = math.ceil(math.sqrt(args.sample))
        for kind, images in (('draws', draws), ('means', means)):
            save_images(run.path(f'sample_{kind}.png'), images, columns)
            print(run.path(f'sample_{kind}.png'))
        return

    if not run.begin(len(train)):
        return
    snapshots = {round(quarter * args.epochs / 4) for quarter in range(5)}
    for epoch in run.epochs():
        start = time.perf_counter()
        if epoch == 0:
            running = None
            val_neg_elbo = epoch_iter(model.eval(), prepared(val, grey=grey), bf16=bf16)
        else:
            share = args.augment if epoch <= 0.8 * args.epochs else 0.0
            data = prepared(run.track(train), share, grey), prepared(val, grey=grey)
            running, val_neg_elbo = run_epoch(model, data, optimizer, schedule=schedule, bf16=bf16)
        train_neg_elbo = epoch_iter(model, prepared(curve_train, grey=grey), bf16=bf16)
        seconds = time.perf_counter() - start
        row = {'epoch': epoch, 'train_neg_elbo_nats': train_neg_elbo,
               'val_neg_elbo_nats': val_neg_elbo, 'running_neg_elbo_nats': running,
               'seconds': seconds}
        run.check_finite(row)  # before NaN is drawn
        if epoch in snapshots:
            save_snapshot(model, run, epoch)
        run.end_epoch(row)

    model.eval()
    with torch.no_grad():
        images = test.images[::max(1, len(test.images) // 10)][:10] / (256 if grey else 1)
        # spread out, since the distributed test images are sorted by class
        reconstructions = model.decoder(model.encoder(images)[0])
    save_images(run.path('reconstructions.png'), torch.cat([images, reconstructions]),
                columns=len(images))
    save_elbo_plot([row['train_neg_elbo_nats'] for row in run.rows],
                   [row['val_neg_elbo_nats'] for row in run.rows], run.path('elbo.pdf'),
                   {} if grey else {'784 · log ½': -PIXELS * math.log(2)})

    start = time.perf_counter()
    runs.seed_all(args.seed, 'test')  # in float32 from here on
    val_neg_elbo = epoch_iter(model, prepared(val, grey=grey))
    totals = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for images in prepared(test, grey=grey):
            log_likelihood, kl = model.elbo_terms(images)
            log_px = model.log_px(images, args.iw_samples)
            totals += torch.stack([-log_likelihood.sum(), kl.sum(), -log_px.sum()]).cpu()
    reconstruction, kl, nll = (totals / len(test.images)).tolist()
    in_bits = {} if not grey else {
        f'test_{name}_bpd': nats / (PIXELS * math.log(2))
        for name, nats in (('neg_elbo', reconstruction + kl), ('nll', nll))}
    run.finish({
        'val_neg_elbo_nats': val_neg_elbo,
        'test_neg_elbo_nats': reconstruction + kl,
        'test_reconstruction_nats': reconstruction,
        'test_kl_nats': kl,
        'test_nll_nats': nll, **in_bits,
        'iw_samples': args.iw_samples,
        'parameters': sum(parameter.numel() for parameter in model.parameters()),
        'test_minutes': (time.perf_counter() - start) / 60,
    })


if __name__ == '__main__':
    runs.launch(main, parse_args())
