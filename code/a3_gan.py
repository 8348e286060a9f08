r"""Generative adversarial network on MNIST, after Goodfellow et al., Generative Adversarial Nets
(NeurIPS 2014, arXiv:1406.2661), with the non-saturating loss of the generator (section 3).

    z ~ N(0, I)    G(z) an image in [−1, 1]^784    D(x) = sigmoid(logit(x)), "x is real"

    L_D = −E_x log D(x) − E_z log(1 − D(G(z)))    L_G = −E_z log D(G(z))

D and G take turns, one step each per batch. What this script changes in the recipe of the
assignment's template: both networks have two convolutions next to the image and initial weights
after He et al., and the generator no batch normalisation (all by `--arch`); D's gradient at real
and at generated images is penalised; Adam has no momentum, and a higher learning rate, which rises
briefly and then falls to a fifth; samples come from a running average of the generator's weights.
`report/results/ablations_gan.csv` shows what `--arch`, `--penalty` and `--beta1` bring. A digit
classifier (`measures.py`) judges the samples, against validation images after every tenth of the
run, and against test images once, at the end.

    python code/a3_gan.py
    python code/a3_gan.py --arch mlp --n_epochs 100 --batch_size 64 --lr 2e-4 --beta1 0.9 \
        --beta2 0.999 --schedule constant --penalty 0 --average 0 --precision fp32 \
        --run gan_template

Measured on MNIST, seed 42, two cores of an AMD EPYC (the template's run: one of them),
10,000 samples against the test images: `gan`: val_frechet 6.2, frechet 4.5, inception_score 9.51,
class_kl 0.0010, precision 0.92, recall 0.91, coverage 0.92, train_minutes 10.7, frechet_floor 5.1;
`gan_template`: val_frechet 79.6, frechet 69.3, inception_score 8.47, class_kl 0.0141, precision
0.89, recall 0.65, coverage 0.76.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
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
from files import write_csv

PIXELS = 28 * 28
MAPS = 16  # feature maps of 14 × 14 in the `conv` networks; of 7 × 7 there are twice as many
KERNEL = dict(kernel_size=4, stride=2, padding=1)  # of all convolutions
SLOPE = 0.2  # of the leaky ReLUs below 0
EVAL_BATCH = 1000
N_JUDGED = 10_000  # samples that are judged, or as many as there are test images if that is fewer
PENALTY_EVERY = 8  # batches from one pair of penalties to the next, and the factor of their weight
LAST_RATE = 0.2  # of the highest learning rate; at 0, D begins to fit the training images
AVERAGES = 'discriminator_loss_nats', 'generator_loss_nats', 'd_real', 'd_fake'  # in the log
PINNED = 1e-3  # if D's mean output is this close to 0 or 1, the two networks are out of balance


# --- mathematics ---------------------------------------------------------------------------------


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """L_D = −E log D(x) − E log(1 − D(G(z))), in nats, from D's logits, (B, 1) each (paper,
    equation 1); log 4 where D is ½ everywhere."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """L_G = −E log D(G(z)), in nats; log 2 where D is ½ everywhere.

    Its gradient in the logit is −(1 − D(G(z))): it stays where D is sure of a fake, while that of
    E log(1 − D(G(z))), −D(G(z)), vanishes there (paper, section 3). Shape: (B, 1) to a scalar.
    """
    return F.softplus(-fake_logits).mean()


def gradient_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """E ‖∇_x logit(x)‖², to be differentiated once more. Times γ/2 it is, on real images, R₁ of
    Mescheder et al., Which Training Methods for GANs do actually Converge? (ICML 2018), equation
    9; on generated ones R₂, equation 10. Shape: (B, 784) to a scalar."""
    images = images.detach().requires_grad_()
    [gradient] = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradient.square().sum(1).mean()


def spherical_path(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """From start to end along the arc between their directions, the norm changing evenly.

    A standard normal vector of d dimensions has a norm near √d. The arc stays there, where the
    prior has its mass; a straight line cuts inside that shell, to a norm near √(d/2) in the middle
    (White, Sampling Generative Networks, 2016, arXiv:1609.04468, section 2.1). Shapes: (d,) and
    (d,) to (steps + 2, d), both ends included.
    """
    t = torch.linspace(0, 1, steps + 2, dtype=start.dtype, device=start.device)[:, None]
    norms = start.norm(), end.norm()
    a, b = start / norms[0], end / norms[1]
    if (a + b).norm() < 1e-6:  # opposite, as only one dimension makes likely: there is no arc
        return torch.lerp(start, end, t)
    angle = torch.atan2((a - b).norm(), (a + b).norm()) * 2  # exact for small angles too
    # sin(sθ) / sin θ by sinc: also where θ is 0, and this is s.
    weight_a, weight_b = (s * torch.sinc(s * angle / math.pi) / torch.sinc(angle / math.pi)
                          for s in (1 - t, t))
    return (weight_a * a + weight_b * b) * torch.lerp(norms[0], norms[1], t)


# --- model ---------------------------------------------------------------------------------------


def he_initialised(network: nn.Sequential) -> nn.Sequential:
    """The network with biases of 0, and weights that keep the mean square of signals from layer to
    layer, on average and but for padding (He et al., Delving Deep into Rectifiers, ICCV 2015,
    section 2.2). With torch's default weights signals shrink."""
    for layer in network:
        if hasattr(layer, 'weight'):
            transposed = isinstance(layer, nn.ConvTranspose2d)  # weights (inputs, outputs, …)
            nn.init.kaiming_normal_(layer.weight, SLOPE, 'fan_out' if transposed else 'fan_in')
            if transposed:  # for each pixel the stride leaves only a share of these inputs
                layer.weight.data *= math.sqrt(math.prod(layer.stride))
            nn.init.zeros_(layer.bias)
    return network


class Generator(nn.Module):
    """Noise to images: `mlp` is the template's layout, 100 → 128 → 256 → 512 → 1024 → 784, with
    batch normalisation. `conv` has none: 100 → 128 → 256 → 512 → 32 maps of 7 × 7 pixels, and then
    two transposed convolutions, so that neighbouring pixels come from the same features. A fully
    connected layer has to learn that for each pixel anew, and leaves speckle."""

    def __init__(self, latent_dim: int = 100, arch: str = 'conv'):
        super().__init__()
        self.latent_dim = latent_dim
        widths = 128, 256, 512, 1024 if arch == 'mlp' else 2 * MAPS * 7 * 7
        layers = [nn.Linear(latent_dim, widths[0]), nn.LeakyReLU(SLOPE)]
        for n_in, n_out in pairwise(widths):
            normalised = [nn.BatchNorm1d(n_out)] if arch == 'mlp' else []
            layers += [nn.Linear(n_in, n_out), *normalised, nn.LeakyReLU(SLOPE)]
        if arch == 'mlp':
            self.net = nn.Sequential(*layers, nn.Linear(1024, PIXELS))
        else:
            self.net = he_initialised(nn.Sequential(
                *layers, nn.Unflatten(1, (2 * MAPS, 7, 7)),
                nn.ConvTranspose2d(2 * MAPS, MAPS, **KERNEL), nn.LeakyReLU(SLOPE),
                nn.ConvTranspose2d(MAPS, 1, **KERNEL), nn.Flatten()))

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent_dim) to images, (B, 784) in [−1, 1], in z's precision also under autocast."""
        return self.net(z).to(z.dtype).tanh()


class Discriminator(nn.Module):
    """Images to the logit of "real": `mlp` is the template's layout, 784 → 512 → 256 → 1; `conv`
    looks at the image through two convolutions first, to 32 maps of 7 × 7 pixels."""

    def __init__(self, arch: str = 'conv'):
        super().__init__()
        layers, n_in = ([], PIXELS) if arch == 'mlp' else ([
            nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, MAPS, **KERNEL), nn.LeakyReLU(SLOPE),
            nn.Conv2d(MAPS, 2 * MAPS, **KERNEL), nn.LeakyReLU(SLOPE), nn.Flatten(),
        ], 2 * MAPS * 7 * 7)
        self.net = nn.Sequential(*layers, nn.Linear(n_in, 512), nn.LeakyReLU(SLOPE),
                                 nn.Linear(512, 256), nn.LeakyReLU(SLOPE), nn.Linear(256, 1))
        if arch == 'conv':
            he_initialised(self.net)

    def forward(self, img: Tensor) -> Tensor:
        """Images (B, 784) in [−1, 1] to the logit, (B, 1), in the images' precision."""
        return self.net(img).to(img.dtype)


# --- training ------------------------------------------------------------------------------------


def train(dataloader: Iterable[Tensor], discriminator: Discriminator, generator: Generator,
          optimizer_G: torch.optim.Optimizer, optimizer_D: torch.optim.Optimizer,
          averaged: Generator | None = None, decay: float = 0., step: int = 0, penalty: float = 0.,
          bf16: bool = False, schedules: Iterable[torch.optim.lr_scheduler.LRScheduler] = ()
          ) -> dict[str, float | None]:
    """One pass over batches of images, (B, 784) in [−1, 1]: in each, one step of D, then one of G.

    Args:
        averaged, decay, step: the running average of the generator, which follows it after each
            batch, how slowly at most, and the number of batches that it has followed before.
        penalty: γ; for the first of every PENALTY_EVERY batches, D's loss gets γ/2 times both
            gradient penalties, times PENALTY_EVERY (Karras et al., Analyzing and Improving the
            Image Quality of StyleGAN, CVPR 2020, section 3.1).
        bf16: whether the networks and their gradients are computed in bfloat16 (never the losses,
            nor the squared norms in the penalties).
        schedules: the learning rates' schedules, stepped after each batch.

    Returns averages over the images, as the log names them: the losses in nats, without the
    penalties, the means of D(x) and D(G(z)), and E ‖∇_x logit(x)‖² on real images as `r1` and on
    generated ones as `r2`, None if not computed.
    """
    discriminator.train()
    generator.train()
    totals = 0.
    for n, images in enumerate(dataloader):
        autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)
        z = torch.randn(len(images), generator.latent_dim, device=images.device)
        with autocast:
            fakes = generator(z)

        # D: minimise −log D(x) − log(1 − D(G(z))); G takes no part. D has no batch statistics, so
        # it may see real and generated images together.
        with autocast:
            logits = discriminator(torch.cat([images, fakes.detach()]))
        real_logits, fake_logits = logits.chunk(2)
        objective = loss_D = discriminator_loss(real_logits, fake_logits)
        one = torch.ones_like(loss_D)
        r1 = r2 = penalised = 0 * one
        if penalty and n % PENALTY_EVERY == 0:
            with autocast:
                r1, r2 = (gradient_penalty(discriminator, x) for x in (images, fakes))
            objective, penalised = loss_D + penalty / 2 * PENALTY_EVERY * (r1 + r2), one
        optimizer_D.zero_grad()
        objective.backward()
        processes.average_gradients(discriminator.parameters(), len(images))
        optimizer_D.step()

        # G: minimise −log D(G(z)), with the same generated images, through the updated D, which
        # stays as it is
        discriminator.requires_grad_(False)
        with autocast:
            logits = discriminator(fakes)
        loss_G = generator_loss(logits)
        optimizer_G.zero_grad()
        loss_G.backward()
        processes.average_gradients(generator.parameters(), len(images))
        optimizer_G.step()
        discriminator.requires_grad_(True)

        if averaged is not None:
            follow(averaged, generator, decay, step + n)
        for schedule in schedules:
            schedule.step()
        d_real, d_fake = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
        sums = loss_D, loss_G, d_real, d_fake, r1, r2, penalised, one
        totals = totals + len(images) * torch.stack(sums).detach()  # stays on the device
    [totals] = processes.add_up(totals)
    *sums, r1, r2, penalised, count = totals.tolist()
    return {name: total / count for name, total in zip(AVERAGES, sums, strict=True)} | {
        name: total / penalised if penalised else None for name, total in (('r1', r1), ('r2', r2))}


@torch.no_grad()
def follow(averaged: Generator, generator: Generator, decay: float, step: int) -> None:
    """One step of the running average: w ← β w + (1 − β) w_G (Yazıcı et al., The Unusual
    Effectiveness of Averaging in GAN Training, ICLR 2019), a copy at step 0. Statistics of
    batches, if there are any, are copied, as torch's AveragedModel does it."""
    beta = min(decay, (1 + step) / (10 + step)) if step else 0.  # early weights soon count little
    torch._foreach_lerp_(list(averaged.parameters()), list(generator.parameters()), 1 - beta)
    for mean, statistic in zip(averaged.buffers(), generator.buffers(), strict=True):
        mean.copy_(statistic)


@torch.no_grad()
def sample(averaged: Generator, z: Tensor) -> Tensor:
    """Images (N, 784) in [0, 1] from noise (N, latent_dim), each from its own row of noise alone.
    """
    averaged.eval()
    return torch.cat([(averaged(rows) + 1) / 2 for rows in z.split(EVAL_BATCH)])


def noise(args: argparse.Namespace, n: int, purpose: str, device: torch.device) -> Tensor:
    """Standard normal noise, (n, latent_dim): for the same purpose always the same."""
    runs.seed_all(args.seed, purpose)
    return torch.randn(n, args.latent_dim, device=device)


def final_estimates(averaged: Generator, classifier: measures.DigitClassifier, val: Loader,
                    test: Loader, args: argparse.Namespace, run: runs.Run
                    ) -> dict[str, float | str]:
    """The metrics of the trained generator, and of validation images as `…_floor`; and walks."""
    start, device = time.perf_counter(), test.images.device
    z = noise(args, 1000, 'interpolated', device)
    from_class, to_class = save_interpolations(averaged, classifier, z, run)
    judge = measures.Judge(classifier, test.images / 255, test.labels)
    z = noise(args, min(N_JUDGED, len(test.images)), 'judged', device)
    return {**judge.measure(sample(averaged, z)),
            **{f'{name}_floor': value  # neither the GAN nor the classifier was fitted to these
               for name, value in judge.measure(val.images / 255).items()},
            'classifier_sha256': measures.fingerprint(classifier),
            'interpolation_from_class': from_class, 'interpolation_to_class': to_class,
            'test_minutes': (time.perf_counter() - start) / 60}


def learning_rate(progress: float) -> float:
    """A factor: linear from 0 to 1 over the first fiftieth of a run, then to LAST_RATE."""
    return min(50 * progress, 1 - (1 - LAST_RATE) * (progress - 0.02) / 0.98)


def watched(real: Loader, averaged: Generator, z: Tensor, interval: int, epoch: int, run: runs.Run
            ) -> Iterator[Tensor]:
    """The epoch's batches, in [−1, 1]; every `interval` batches, samples of z go into a file."""
    for n, (images, _) in enumerate(run.track(real), start=(epoch - 1) * len(real) + 1):
        if len(images) > 1:  # batch statistics, which `mlp` has, need two
            yield images / 127.5 - 1
        if n % interval == 0 and processes.rank() == 0:
            figures.save_grid(run.path('samples_latest.png'), sample(averaged, z))


def warn(row: dict) -> None:
    """Warn, in a line each, of an epoch that has diverged and of a generator that collapsed."""
    epoch, d_real, d_fake = row['epoch'], row['d_real'], row['d_fake']
    if epoch > 0 and not PINNED <= min(d_real, d_fake) <= max(d_real, d_fake) <= 1 - PINNED:
        print(f'WARNING: epoch {epoch} has diverged: the discriminator is pinned, with a mean '
              f'D(x) of {d_real:.4f} and D(G(z)) of {d_fake:.4f}', file=sys.stderr)
    if epoch > 0 and row['class_share_min'] == 0:
        print(f'WARNING: epoch {epoch} has collapsed: a class is missing from the samples',
              file=sys.stderr)


# --- figures -------------------------------------------------------------------------------------


def save_loss_plot(rows: list[dict], filename: Path, floor: float) -> None:
    """Both losses, and the discriminator's mean outputs, over the epochs of the log, each with its
    value at the equilibrium, where D is ½ everywhere (paper, theorem 1); and the distance of
    samples to validation images, with that of test images, the floor."""
    epochs, loss_D, loss_G, d_real, d_fake, frechet = (
        [row[name] for row in rows[1:]] for name in ('epoch', *AVERAGES, 'val_frechet'))
    figures.save_curves(filename, epochs, [
        {'ylabel': 'loss, nats', 'curves': {'discriminator': loss_D, 'generator': loss_G},
         'references': {'log 4': math.log(4), 'log 2': math.log(2)}},
        {'ylabel': 'mean output of D', 'curves': {'D(x)': d_real, 'D(G(z))': d_fake},
         'references': {'½': 0.5}},
        {'ylabel': 'Fréchet distance', 'curves': {'samples': frechet}, 'start': len(epochs) / 5,
         'references': {'real': floor}}])


def save_interpolations(averaged: Generator, classifier: measures.DigitClassifier, z: Tensor,
                        run: runs.Run) -> list[int]:
    """Rows of nine images, from a sample of one class to one of another, by `spherical_path`.
    Returns the classes at the ends of the first row.

    The ends are the samples that the classifier is surest of, one of each class that occurs. A CSV
    beside them has the class that the classifier gives to each image.
    """
    log_probs = classifier.look_at(sample(averaged, z))[1]
    top = log_probs.max(1)
    surest = [z[(top.values - 1e9 * (top.indices != c)).argmax()] for c in top.indices.unique()]
    if len(surest) == 1:  # collapsed to one class: there is no other to go to
        surest.append(z[top.values.argmin()])
    paths = torch.stack([spherical_path(start, end, steps=7)
                         for start, end in zip(surest[::2], surest[1::2], strict=False)])
    images = sample(averaged, paths.flatten(0, 1))  # row by row
    figures.save_grid(run.path('interpolations.png'), images, columns=9)
    classes = classifier.look_at(images)[1].argmax(1).tolist()
    write_csv(run.path('interpolations.csv'), [
        {'row': i // 9, 'step': i % 9, 'classified_as': c} for i, c in enumerate(classes)])
    return [classes[0], classes[8]]


# --- the run -------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--n_epochs', '--epochs', type=whole_number(1), default=40, dest='epochs')
    add('--batch_size', type=whole_number(2), default=128)
    add('--lr', type=number(0), default=2e-3, help='highest learning rate')
    add('--latent_dim', type=whole_number(1), default=100, help='number of latent dimensions')
    add('--save_interval', type=whole_number(1), default=500,
        help='batches from one update of samples_latest.png to the next')
    add('--arch', choices=('conv', 'mlp'), default='conv',
        help='conv: two convolutions next to the image in both networks, first weights after He; '
             "mlp: the template's, fully connected, with torch's first weights, and with batch "
             'normalisation in the generator (of several processes, each uses the statistics of '
             'its share)')
    add('--beta1', type=number(0, 0.9999), default=0., help='β₁ of Adam')
    add('--beta2', type=number(0, 0.9999), default=0.99, help='β₂ of Adam')
    add('--schedule', choices=('linear', 'constant'), default='linear',
        help='learning rate: up in the first fiftieth of the run and then down to a fifth, or '
             'constant')
    add('--penalty', type=number(0), default=0.5,
        help="weight γ of the penalties on the discriminator's gradient; 0 for none")
    add('--average', type=number(0, 0.9999), default=0.999,
        help='decay of the running average of the generator, which draws the samples; 0 for none')
    parser.add_shared_arguments()
    args = parser.parse_args(argv)
    args.name = parser.run_name('gan', args)
    return args


def make_model(args: argparse.Namespace) -> tuple[Generator, Discriminator]:
    """The two untrained networks that these arguments ask for."""
    return Generator(args.latent_dim, args.arch), Discriminator(args.arch)


def main(args: argparse.Namespace) -> None:
    device, bf16 = runs.start(args)
    real, val, test = runs.load_data(mnist, args, device)

    runs.seed_all(args.seed, 'weights')
    generator, discriminator = (network.to(device) for network in make_model(args))
    averaged = copy.deepcopy(generator)
    optimizer_G, optimizer_D = (
        torch.optim.Adam(network.parameters(), args.lr, (args.beta1, args.beta2), fused=True)
        for network in (generator, discriminator))
    steps, falls = args.epochs * len(real), args.schedule == 'linear'
    schedules = [torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate((step + 1) / (steps + 1)) if falls else 1.)
        for optimizer in (optimizer_G, optimizer_D)]
    run = runs.Run(main, args, real.source, device, {
        'generator': generator, 'discriminator': discriminator, 'averaged': averaged,
        'optimizer_G': optimizer_G, 'optimizer_D': optimizer_D,
        'schedule_G': schedules[0], 'schedule_D': schedules[1]})

    if args.sample:
        run.load('latent_dim', 'arch')
        z = noise(args, args.sample, 'samples', device)
        figures.save_grid(run.path('sample.png'), sample(averaged, z))
        print(run.path('sample.png'))
        return
    if not run.begin():
        return

    if processes.rank() == 0:
        classifier = measures.load_classifier(args.results_dir, real, val)
        val_judge = measures.Judge(classifier, val.images / 255, val.labels)
    few = noise(args, 25, 'samples', device)
    judged = noise(args, min(N_JUDGED, len(val.images)), 'judged in training', device)
    # Two early ones, halfway and the end: 1, 2, 20 and 40 of 40 epochs.
    snapshots = {0} | {max(1, round(share * args.epochs)) for share in (0.01, 0.04, 0.5, 1)}
    checks = {round(tenth * args.epochs / 10) for tenth in range(11)}
    for epoch in run.epochs():
        start = time.perf_counter()
        row = {'epoch': epoch} | dict.fromkeys((*AVERAGES, 'r1', 'r2', 'val_frechet',
                                                'class_share_min'))
        if epoch > 0:
            batches = watched(real, averaged, few, args.save_interval, epoch, run)
            row |= train(batches, discriminator, generator, optimizer_G, optimizer_D, averaged,
                         args.average, (epoch - 1) * len(real), args.penalty, bf16, schedules)
        if processes.rank():  # it only trains: the first process does all else
            continue
        if epoch in checks:
            glance = val_judge.glance(sample(averaged, judged))
            row |= {'val_frechet': glance['frechet'], 'class_share_min': glance['class_share_min']}
        row['seconds'] = time.perf_counter() - start
        if epoch in snapshots:
            figures.save_grid(run.path(f'samples_epoch{epoch:03d}.png'), sample(averaged, few))
        run.end_epoch(row)
        warn(row)

    if processes.rank():
        return
    estimates = final_estimates(averaged, classifier, val, test, args, run)
    save_loss_plot(run.rows, run.path('losses.pdf'), estimates['frechet_floor'])
    run.path('samples_latest.png').unlink(missing_ok=True)  # the last one is samples_epoch…
    weights = [*generator.parameters(), *discriminator.parameters()]
    run.finish({'val_frechet': run.rows[-1]['val_frechet'], **estimates,
                'parameters': sum(map(torch.numel, weights))})


if __name__ == '__main__':
    launch(main, parse_args())
