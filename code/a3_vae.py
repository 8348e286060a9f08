"""Variational autoencoder on binarised MNIST, after Kingma and Welling, Auto-Encoding Variational
Bayes (ICLR 2014, arXiv:1312.6114), with fully connected networks only.

    z ~ N(0, I)    x_m ~ Bernoulli(f(z)_m)    q(z|x) = N(μ(x), diag σ²(x))

    log p(x) ≥ ELBO(x) = E_q(z|x)[log p(x|z)] − KL(q(z|x) ‖ p(z))

Training maximises the bound with one reparametrised sample, z = μ + σ ⊙ ε, ε ~ N(0, I), and the KL
divergence in closed form. Until the last fifth of the epochs a random share of the training images
is turned, scaled, sheared and moved a little, against overfitting; the images that the curves and
the final figures rest on never are. At the end log p(x) itself is estimated by importance
sampling, or integrated if there are two latent dimensions and the images are binary. With
`--likelihood logistic` they are grey, and a pixel is a number from a logistic density, rounded to
one of 256 levels: a probability, whose bound can be compared with a flow's in bits per dimension.

    python code/a3_vae.py [--zdim 2] [--likelihood logistic]

Measured on static binarised MNIST (the last on grey MNIST), seed 42, 40 epochs and 1,000
importance samples (`--zdim 2`: 80, and integration), on two cores of an AMD EPYC: `vae_z20`:
val_neg_elbo_nats 89.7, test_neg_elbo_nats 89.1, test_nll_nats 85.9, train_minutes 3.4; `vae_z2`:
val_neg_elbo_nats 134.3, test_neg_elbo_nats 133.6, test_nll_nats 128.8, train_minutes 4.9;
`vae_logistic_z20`: val_neg_elbo_bpd 1.417, test_neg_elbo_bpd 1.420, test_nll_bpd 1.399,
train_minutes 6.4.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import figures
import processes
import runs
from command_line import Parser, launch, number, whole_number
from datasets.bmnist import bmnist
from datasets.mnist import mnist
from marginal_likelihood import importance_sampled_log_px, log_px_on_lattice

PIXELS = 28 * 28
# Defaults for binary images with 5 latent dimensions or more, with fewer, and for grey images.
MANY = dict(hidden_dim=320, n_layers=8, skip='yes', augment=0.8, lr=3.5e-3, weight_decay=0.14,
            epochs=40)
FEW = dict(hidden_dim=512, n_layers=3, skip='no', augment=0.6, lr=2.2e-3, weight_decay=0.,
           epochs=80)
GREY = dict(hidden_dim=384, n_layers=10, skip='yes', augment=0.5, lr=2.8e-3, weight_decay=0.1,
            epochs=40)
EVAL_BATCH = 1000
MAX_GRAD_NORM = 200.0  # largest norm of the gradient: a spike can undo epochs
LOG_SCALE = (-7., 2.)  # bounds of log s, where grey levels are e^−5.5 apart


# --- mathematics ---------------------------------------------------------------------------------


def bernoulli_log_likelihood(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x|z) = Σ_m x_m log f_m + (1 − x_m) log(1 − f_m), f = sigmoid(logits), in nats.

    Computed from logits a as Σ_m (x_m − ½) a_m − ½|a_m| + log sigmoid |a_m|, which cannot
    overflow, in a fraction of the time of a log1p. Shapes: x and logits (..., M), broadcast, to
    (...).
    """
    size = logits.abs()
    return torch.addcmul(size.sigmoid().log() - 0.5 * size, x - 0.5, logits).sum(-1)


def discretised_logistic_log_likelihood(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """log p(x|z) of whole grey values k = 255 x, in nats: rounded numbers from a logistic density.

    With F(t) = sigmoid((t − μ)/s), log p = Σ_m log[F(k_m + ½) − F(k_m − ½)], where 0 and 255 have
    the tails as well (Salimans et al., PixelCNN++, ICLR 2017, section 2.1). Computed as the sum of
    log F(k + ½), log[1 − F(k − ½)] and log(1 − exp(−1/s)), none of which is lost to rounding.
    Shapes: x, mean and scale, which are k, μ and s divided by 255, each (..., M), to (...).
    """
    lower, upper = (x - 0.5 / 255 - mean) / scale, (x + 0.5 / 255 - mean) / scale
    # As numbers, which is faster than torch.where.
    black, white = (x < 0.5 / 255).to(upper), (x > 254.5 / 255).to(upper)
    between = (-(-1 / 255 / scale).expm1()).log()
    return ((1 - white) * F.logsigmoid(upper) + (1 - black) * F.logsigmoid(-lower)
            + (1 - black - white) * between).sum(-1)


def gaussian_kl(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) = ½ Σ_d (σ_d² + μ_d² − 1 − log σ_d²), in nats (paper, appendix B).

    Shapes: mean and std (..., D) to (...).
    """
    return 0.5 * (std.square() + mean.square() - 1 - 2 * std.log()).sum(-1)


def manifold_grid(steps: int) -> Tensor:
    """Φ⁻¹ of an even grid over the unit square: equal prior mass between neighbours (figure 4b).

    Returns (steps², 2), row by row from the top; the coordinates grow to the right and upwards.
    """
    ticks = torch.special.ndtri((torch.arange(steps, dtype=torch.float64) + 0.5) / steps).float()
    return torch.cartesian_prod(ticks.flip(0), ticks).flip(1)


# --- model ---------------------------------------------------------------------------------------


class FullyConnected(nn.Module):
    """`n_layers` hidden layers, h ← SiLU(W h + b), all but the first added to h with `skip`, and a
    linear map."""

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

    def __init__(self, hidden_dim: int, z_dim: int, n_layers: int, skip: bool):
        super().__init__()
        self.net = FullyConnected(PIXELS, hidden_dim, 2 * z_dim, n_layers, skip)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 784) in [0, 1] to mean and std, each (B, z_dim)."""
        mean, log_var = self.net(2 * input - 1).chunk(2, dim=-1)
        return mean, (0.5 * log_var.clamp(-14, 14)).exp()


class Decoder(nn.Module):
    """p(x|z): codes to the means of 784 Bernoulli pixels, at first about ½."""

    n_out = PIXELS

    def __init__(self, hidden_dim: int, z_dim: int, n_layers: int, skip: bool):
        super().__init__()
        self.net = FullyConnected(z_dim, hidden_dim, self.n_out, n_layers, skip)
        nn.init.normal_(self.net.last.weight, std=0.01)

    def forward(self, input: Tensor) -> Tensor:
        """(..., z_dim) to the means, (..., 784) in (0, 1)."""
        return self.net(input).sigmoid()

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) in nats. Shapes: (..., 784) and (..., z_dim), broadcast, to (...)."""
        return bernoulli_log_likelihood(x, self.net(z))

    def sample(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x ~ p(x|z) and its mean: (..., z_dim) to two of (..., 784), in [0, 1]."""
        means = self(z)
        return torch.bernoulli(means), means


class LogisticDecoder(Decoder):
    """p(x|z): codes to 784 pixels of logistic densities, rounded to one of 256 grey levels."""

    n_out = 2 * PIXELS

    def mean_and_scale(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """(..., z_dim) to μ and s before rounding, two of (..., 784); 0 is black, 1 is white."""
        mean, log_scale = self.net(input).chunk(2, dim=-1)
        return mean, log_scale.clamp(*LOG_SCALE).exp()

    def forward(self, input: Tensor) -> Tensor:
        """(..., z_dim) to the means after rounding, 255 − Σ_k<255 F(k + ½), over 255."""
        mean, scale = self.mean_and_scale(input)
        return sum(((mean - (k + 0.5) / 255) / scale).sigmoid() for k in range(255)) / 255

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Like a Decoder's, of grey values divided by 255."""
        return discretised_logistic_log_likelihood(x, *self.mean_and_scale(z))

    def sample(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Like a Decoder's."""
        mean, scale = self.mean_and_scale(z)
        draws = mean + scale * torch.rand_like(mean).logit()
        return (255 * draws).round().clamp(0, 255) / 255, self(z)


class VAE(nn.Module):
    """Encoder, prior and decoder: the lower bound, and samples."""

    def __init__(self, hidden_dim: int = 320, z_dim: int = 20, n_layers: int = 8,
                 skip: bool = True, likelihood: str = 'bernoulli'):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder(hidden_dim, z_dim, n_layers, skip)
        self.decoder = {'bernoulli': Decoder, 'logistic': LogisticDecoder}[likelihood](
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


# --- training ------------------------------------------------------------------------------------


def augment(images: Tensor, share: float) -> Tensor:
    """A share of the images, turned, scaled, sheared and moved a little; only black is new.

    Standard deviations: 5°, 5 %, 5 % and half a pixel. Shape (B, 784).
    """
    B, device = len(images), images.device
    noise = torch.randn(6, B, device=device) * (torch.rand(B, device=device) < share)
    angle, shear, wide, high, dx, dy = noise.view(6, B, 1, 1)
    angle, shear, sx, sy = angle * math.radians(5), shear * 0.05, 1 + wide * 0.05, 1 + high * 0.05
    x = (torch.arange(28, device=device) + 0.5) / 14 - 1  # centres of pixels
    y = x.view(28, 1)
    grid = torch.stack([sx * angle.cos() * x + (shear - angle.sin()) * y + dx / 28,
                        angle.sin() * x + sy * angle.cos() * y + dy / 28], -1)
    return F.grid_sample(images.view(B, 1, 28, 28), grid, mode='nearest',
                         align_corners=False).view(B, PIXELS)


def augmented_share(args: argparse.Namespace, epoch: int) -> float:
    """The share of the training images that is augmented in an epoch: none in the last fifth."""
    return args.augment if 0 < epoch <= 0.8 * args.epochs else 0.


def prepared(data: Iterable, share: float = 0.) -> Iterator[Tensor]:
    """The batches as the model takes them, (B, 784) in [0, 1], a share of each augmented.

    Binary images are ready; grey values 0 to 255 come with their labels.
    """
    for batch in data:
        images = batch if isinstance(batch, Tensor) else batch[0] / 255
        yield augment(images, share) if share else images


def learning_rate(progress: float) -> float:
    """A factor: linear from 0 to 1 over the first tenth of the run, then half a cosine to 0."""
    return min(10 * progress, 0.5 + 0.5 * math.cos(math.pi * (progress - 0.1) / 0.9))


def epoch_iter(model: nn.Module, data: Iterable[Tensor],
               optimizer: Optimizer | None = None, schedule: LRScheduler | None = None,
               bf16: bool = False) -> float:
    """One pass over batches of images, (B, 784) in [0, 1], with updates in training mode.

    In that mode each batch is one step of the optimizer, with a gradient whose norm is at most
    MAX_GRAD_NORM, and then one of the schedule. With `bf16` the networks compute in bfloat16, the
    losses never. Returns the average of `model(images)`, all images weighted alike, in nats.
    """
    total, count = 0.0, 0
    for images in data:
        with (torch.set_grad_enabled(model.training),
              torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)):
            neg_elbo = model(images)
        if model.training:
            optimizer.zero_grad()
            neg_elbo.backward()
            processes.average_gradients(model.parameters(), len(images))
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            if schedule is not None:
                schedule.step()
        total = total + neg_elbo.detach() * len(images)  # stays on the device: nothing waits
        count += len(images)
    if model.training:
        total, count = processes.add_up(total, count)
    return float(total / count)


def run_epoch(model: nn.Module, data: tuple[Iterable[Tensor], Iterable[Tensor]],
              optimizer: Optimizer | None, schedule: LRScheduler | None = None,
              bf16: bool = False) -> tuple[float | None, float | None]:
    """Train on the first data set, then evaluate on the second: `epoch_iter` of each, in nats.

    Without an optimizer there is no training, and the first number is None. Of several processes
    only the first evaluates; for others the second number is None.
    """
    train, val = data
    running = epoch_iter(model.train(), train, optimizer, schedule, bf16) if optimizer else None
    return running, None if processes.rank() else epoch_iter(model.eval(), val, bf16=bf16)


@torch.no_grad()
def final_estimates(model: VAE, val: Iterable[Tensor], test: Iterable[Tensor],
                    args: argparse.Namespace) -> dict[str, float]:
    """The metrics of the trained model: in float32, but for log p(x) by importance sampling, for
    which the networks use `args.precision`.

    `val` and `test` are batches of images, (B, 784) in [0, 1].
    """
    start = time.perf_counter()
    runs.seed_all(args.seed, 'test')
    val_neg_elbo = epoch_iter(model, val)
    totals, count = torch.zeros(3, dtype=torch.float64), 0
    integrate = model.z_dim == 2 and args.likelihood == 'bernoulli'
    for images in test:
        log_likelihood, kl = model.elbo_terms(images)
        log_px = (log_px_on_lattice(model, images) if integrate else
                  importance_sampled_log_px(model, images, args.iw_samples,
                                            bf16=args.precision == 'bf16'))
        totals += torch.stack([-log_likelihood.sum(), kl.sum(), -log_px.sum()]).cpu()
        count += len(images)
    reconstruction, kl, nll = (totals / count).tolist()
    metrics = {'val_neg_elbo_nats': val_neg_elbo, 'test_neg_elbo_nats': reconstruction + kl,
               'test_reconstruction_nats': reconstruction, 'test_kl_nats': kl,
               'test_nll_nats': nll} | ({} if integrate else {'iw_samples': args.iw_samples})
    if args.likelihood == 'logistic':
        metrics |= {f'{name}_bpd': metrics[f'{name}_nats'] / (PIXELS * math.log(2))
                    for name in ('val_neg_elbo', 'test_neg_elbo', 'test_nll')}
    return metrics | {'parameters': sum(weight.numel() for weight in model.parameters()),
                      'test_minutes': (time.perf_counter() - start) / 60}


# --- figures -------------------------------------------------------------------------------------


def save_elbo_plot(train_curve: list[float], val_curve: list[float], filename: Path,
                   references: dict[str, float] | None = None,
                   ylabel: str = 'lower bound, nats') -> None:
    """The lower bound (not its negative), or what `ylabel` says, from the untrained network on."""
    panel = {'ylabel': ylabel, 'curves': {'training': train_curve, 'validation': val_curve}}
    start = max(1, len(val_curve) // 10)
    figures.save_curves(filename, list(range(len(val_curve))), [
        panel | {'references': references or {}}, panel | {'start': start}])


@torch.no_grad()
def save_snapshot(model: VAE, run: runs.Run, epoch: int) -> None:
    """25 samples from the same noise each time; with two latent dimensions the manifold too,
    before, halfway and at the end."""
    runs.seed_all(run.args.seed, 'samples')
    for kind, images in zip(('draws', 'means'), model.sample(25), strict=True):
        figures.save_grid(run.path(f'samples_epoch{epoch:02d}_{kind}.png'), images)
    if model.z_dim == 2 and epoch in (0, round(run.args.epochs / 2), run.args.epochs):
        means = model.decoder(manifold_grid(20).to(run.device))
        figures.save_grid(run.path(f'manifold_epoch{epoch:02d}.png'), means, scale=2, gap=0)


@torch.no_grad()
def save_reconstructions(model: nn.Module, images: Tensor, run: runs.Run,
                         hide: Callable[[Tensor], Tensor] | None = None) -> None:
    """Ten of the images, (N, 784) in [0, 1], and their reconstructions: the mean images of their
    mean codes. If `hide` is given, it changes what the encoder sees, which is drawn in between.
    """
    rows = [images[::max(1, len(images) // 10)][:10]]  # the distributed test file is sorted
    rows += [hide(rows[0])] if hide else []
    rows += [model.decoder(model.encoder(rows[-1])[0])]
    figures.save_grid(run.path('reconstructions.png'), torch.cat(rows), len(rows[0]))


# --- the run -------------------------------------------------------------------------------------


def add_training_arguments(parser: Parser, grey: bool = False) -> None:
    """Add the flags of networks and training. The caller sets the defaults, but for --batch_size:
    by --zdim and, if the script has such a flag (`grey`), by --likelihood."""
    for name, options, help in (
            ('epochs', {'type': whole_number(1)}, 'passes over the training images'),
            ('hidden_dim', {'type': whole_number(1)}, 'units of each hidden layer'),
            ('n_layers', {'type': whole_number(1, 1000)}, 'hidden layers of each network'),
            ('skip', {'choices': ('yes', 'no')}, 'residual connections in the networks'),
            ('augment', {'type': number(0, 1)}, 'share of the training images turned, scaled, '
             'sheared and moved a little, until the last fifth of the epochs'),
            ('lr', {'type': number(0)}, 'highest learning rate'),
            ('weight_decay', {'type': number(0, 1)}, 'weight decay of AdamW')):
        parser.add_argument(f'--{name}', **options, help=(
            f'{help} (default: {MANY[name]}; {FEW[name]} with --zdim below 5'
            + f'; always {GREY[name]} with --likelihood logistic' * grey + ')'))
    parser.add_argument('--batch_size', type=whole_number(1), default=256, help='images in a step')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--zdim', type=whole_number(1), default=20, help='number of latent dimensions')
    add('--likelihood', choices=('bernoulli', 'logistic'), default='bernoulli',
        help='bernoulli trains on binarised MNIST, logistic on grey MNIST')
    add_training_arguments(parser, grey=True)
    add('--iw_samples', type=whole_number(1), default=1000,
        help='importance samples for log p(x) of each test image; with two latent dimensions and '
             'bernoulli it is integrated instead')
    parser.add_shared_arguments()
    first = parser.parse_args(argv)  # for what decides the defaults
    grey = first.likelihood == 'logistic'
    parser.set_defaults(**(GREY if grey else FEW if first.zdim < 5 else MANY))
    args = parser.parse_args(argv)
    args.name = parser.run_name(f'vae_{"logistic_" * grey}z{args.zdim}', args, 'zdim',
                                'likelihood')
    return args


def make_model(args: argparse.Namespace) -> VAE:
    """The untrained VAE that these arguments ask for."""
    return VAE(args.hidden_dim, args.zdim, args.n_layers, args.skip == 'yes', args.likelihood)


def main(args: argparse.Namespace) -> None:
    device, bf16 = runs.start(args)  # which also resolves args.precision
    grey = args.likelihood == 'logistic'
    train, val, test = runs.load_data(mnist if grey else bmnist, args, device)
    # For the curve of the training images: the first 10,000 of them, unshuffled and unchanged.
    curve_train, val, test = (loader.head(10_000, EVAL_BATCH) for loader in (train, val, test))
    args.iw_samples = 5 if args.dry_run else args.iw_samples

    runs.seed_all(args.seed, 'weights')
    model = make_model(args).to(device)
    optimizer = AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    steps = args.epochs * len(train)
    schedule = LambdaLR(optimizer, lambda step: learning_rate((step + 1) / (steps + 1)))
    run = runs.Run(main, args, train.source, device,
                   {'model': model, 'optimizer': optimizer, 'schedule': schedule})

    if args.sample:
        run.load('zdim', 'hidden_dim', 'n_layers', 'skip', 'likelihood')
        runs.seed_all(args.seed, f'{args.sample} samples')
        for kind, images in zip(('draws', 'means'), model.sample(args.sample), strict=True):
            figures.save_grid(run.path(f'sample_{kind}.png'), images)
            print(run.path(f'sample_{kind}.png'))
        return
    if not run.begin():  # resumes, or clears the folder; False if this run is finished
        return

    for epoch in run.epochs():  # from 0, the untrained network, each with a seed of its own
        start = time.perf_counter()
        data = prepared(run.track(train), augmented_share(args, epoch)), prepared(val)
        running, val_loss = run_epoch(model, data, optimizer if epoch else None, schedule, bf16)
        if processes.rank():  # it only trains: the first process does all else
            continue
        train_loss = epoch_iter(model, prepared(curve_train), bf16=bf16)
        row = {'epoch': epoch, 'train_neg_elbo_nats': train_loss, 'val_neg_elbo_nats': val_loss,
               'running_neg_elbo_nats': running, 'seconds': time.perf_counter() - start}
        run.check_finite(row)  # before NaN is drawn
        if epoch in {round(quarter * args.epochs / 4) for quarter in range(5)}:
            save_snapshot(model, run, epoch)
        run.end_epoch(row)

    if processes.rank():
        return
    model.eval()  # a run resumed after its last epoch has not been here
    save_reconstructions(model, test.images / (255 if grey else 1), run)
    save_elbo_plot([-row['train_neg_elbo_nats'] for row in run.rows],
                   [-row['val_neg_elbo_nats'] for row in run.rows], run.path('elbo.pdf'),
                   {} if grey else {'784 · log ½': -PIXELS * math.log(2)})
    run.finish(final_estimates(model, prepared(val), prepared(test), args))


if __name__ == '__main__':
    launch(main, parse_args())
