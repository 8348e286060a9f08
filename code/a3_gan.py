r"""Generative adversarial network on MNIST, after Goodfellow et al., Generative Adversarial Nets
(NeurIPS 2014, arXiv:1406.2661), with the non-saturating loss of the generator (section 3).

    z ~ N(0, I)    G(z) an image in [−1, 1]^784    D(x) = sigmoid(logit(x)), "x is real"

    L_D = −E_x log D(x) − E_z log(1 − D(G(z)))    L_G = −E_z log D(G(z))

D and G take turns, one step each a batch. To the recipe of the assignment's template this adds a
convolution next to the image in both networks, a running average of the generator's weights (the
samples are from it), a penalty on the discriminator's gradient, small moves of real and generated
images alike, and Adam with shorter averages and a higher learning rate that falls to 0: flags all,
and `ablations_gan.csv` says what most buy. A digit classifier (`measures.py`) judges the samples,
against validation images every tenth of the run, and against test images once, at the end.

    python code/a3_gan.py
    python code/a3_gan.py --arch mlp --n_epochs 100 --batch_size 64 --lr 2e-4 --beta1 0.9 \
        --beta2 0.999 --schedule constant --penalty 0 --max_shift 0 --average 0 \
        --precision fp32 --run gan_template

Measured on MNIST, seed 42, two cores of an AMD EPYC, 10,000 samples against the test images:
`gan`: val_frechet 11.1, frechet 8.3, inception_score 9.29, class_kl 0.0010, precision 0.90, recall
0.87, coverage 0.89, train_minutes 10.7, frechet_floor 5.1; `gan_template`: val_frechet 78.8,
frechet 69.0, inception_score 8.49, class_kl 0.0156, precision 0.90, recall 0.65, coverage 0.76.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import figures
import measures
import runs
from datasets.mnist import mnist

PIXELS = 28 * 28
MAPS = 16  # of 14 × 14, where `conv` networks meet the image
EVAL_BATCH = 1000
N_JUDGED = 10_000  # samples that a measure rests on
N_STATISTICS = 5  # batches of EVAL_BATCH draws that batch statistics rest on
PENALTY_EVERY = 8  # batches from one gradient penalty to the next, which counts as many times
PINNED = 1e-3  # with a mean output this close to 0 or 1, D is certain: the balance is lost


# --- mathematics ---------------------------------------------------------------------------------


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """L_D = −E log D(x) − E log(1 − D(G(z))), in nats; log 4 where D is ½ everywhere.

    Shapes: logits of D, (B, 1) each, to a scalar (paper, equation 1).
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """L_G = −E log D(G(z)), in nats; log 2 where D is ½ everywhere.

    Its gradient in the logit is −(1 − D(G(z))): it stays where D is sure of a fake, while that of
    E log(1 − D(G(z))), −D(G(z)), vanishes there (paper, section 3). Shape: (B, 1) to a scalar.
    """
    return F.softplus(-fake_logits).mean()


def gradient_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """E ‖∇_x logit(x)‖², to be differentiated once more. Shape: (B, 784) to a scalar.

    On real images and times γ/2 this is R₁ of Mescheder et al., Which Training Methods for GANs
    do actually Converge? (ICML 2018), equation 9.
    """
    images = images.detach().requires_grad_()
    [gradient] = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradient.square().sum(1).mean()


def spherical_path(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """From start to end along the arc between their directions, the norm changing evenly.

    A standard normal vector of D dimensions has a norm near √D. The arc stays there, where the
    prior has its mass; a straight line cuts inside that shell, to a norm near √(D/2) in the middle
    (White, Sampling Generative Networks, 2016, arXiv:1609.04468, section 2.1).

    Shapes: (D,) and (D,) to (steps + 2, D), both ends included.
    """
    t = torch.linspace(0, 1, steps + 2, dtype=start.dtype, device=start.device)[:, None]
    norms = start.norm(), end.norm()
    a, b = start / norms[0], end / norms[1]
    if (a + b).norm() < 1e-6:  # opposite, as only one dimension makes likely: there is no arc
        return torch.lerp(start, end, t)
    angle = torch.atan2((a - b).norm(), (a + b).norm()) * 2  # exact for small angles too
    # sin(tθ) / sin θ by sinc, which is t where θ is 0.
    weight_a = (1 - t) * torch.sinc((1 - t) * angle / math.pi) / torch.sinc(angle / math.pi)
    weight_b = t * torch.sinc(t * angle / math.pi) / torch.sinc(angle / math.pi)
    return (weight_a * a + weight_b * b) * torch.lerp(norms[0], norms[1], t)


# --- model ---------------------------------------------------------------------------------------


class Generator(nn.Module):
    """Noise to images.

    `mlp` is the template's layout, 100 → 128 → 256 → 512 → 1024 → 784. `conv` ends in 16 maps of
    14 × 14 and a transposed convolution instead: neighbouring pixels come from the same features,
    which a fully connected layer has to learn for each pixel anew, and leaves as speckle.
    """

    def __init__(self, latent_dim: int = 100, arch: str = 'conv'):
        super().__init__()
        self.latent_dim = latent_dim
        layers = [nn.Linear(latent_dim, 128), nn.LeakyReLU(0.2)]
        for n_in, n_out in ((128, 256), (256, 512)) + ((512, 1024),) * (arch == 'mlp'):
            layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.LeakyReLU(0.2)]
        if arch == 'mlp':
            layers += [nn.Linear(1024, PIXELS)]
        else:
            layers += [nn.Linear(512, MAPS * 14 * 14), nn.Unflatten(1, (MAPS, 14, 14)),
                       nn.BatchNorm2d(MAPS), nn.LeakyReLU(0.2),
                       nn.ConvTranspose2d(MAPS, 1, kernel_size=4, stride=2, padding=1),
                       nn.Flatten()]
        self.net = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent_dim) to images, (B, 784) in [−1, 1], in z's precision also under autocast."""
        return self.net(z).to(z.dtype).tanh()


class Discriminator(nn.Module):
    """Images to the logit of "real", whose sigmoid is D(x).

    `mlp` is the template's layout, 784 → 512 → 256 → 1; `conv` looks at the image through 16
    filters of 4 × 4 pixels first.
    """

    def __init__(self, arch: str = 'conv'):
        super().__init__()
        n_in, layers = PIXELS, []
        if arch == 'conv':
            n_in, layers = MAPS * 14 * 14, [
                nn.Unflatten(1, (1, 28, 28)),
                nn.Conv2d(1, MAPS, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2),
                nn.Flatten()]
        self.net = nn.Sequential(*layers, nn.Linear(n_in, 512), nn.LeakyReLU(0.2),
                                 nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1))

    def forward(self, img: Tensor) -> Tensor:
        """Images (B, 784) in [−1, 1] to the logit, (B, 1), in the images' precision."""
        return self.net(img).to(img.dtype)


# --- training ------------------------------------------------------------------------------------


def update_discriminator(discriminator: Discriminator, optimizer_D: torch.optim.Optimizer,
                         images: Tensor, fakes: Tensor, penalty: float = 0.,
                         bf16: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One step down L_D + γ/2 E ‖∇_x logit(x)‖²; the generator takes no part.

    Args:
        images, fakes: real and generated, (B, 784) in [−1, 1].
        penalty: γ; where 0 nothing is penalised.
        bf16: whether the network computes in bfloat16 (losses and penalty never do).

    Returns:
        L_D in nats, the means of D(x) and of D(G(z)), and E ‖∇_x logit(x)‖² where computed.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits = discriminator(torch.cat([images, fakes.detach()]))  # D has no batch statistics
    real_logits, fake_logits = logits.split([len(images), len(fakes)])
    loss = discriminator_loss(real_logits, fake_logits)
    r1 = gradient_penalty(discriminator, images) if penalty else None
    optimizer_D.zero_grad()
    (loss if r1 is None else loss + penalty / 2 * r1).backward()
    optimizer_D.step()
    return (loss.detach(), real_logits.detach().sigmoid().mean(),
            fake_logits.detach().sigmoid().mean(), None if r1 is None else r1.detach())


def update_generator(discriminator: Discriminator, optimizer_G: torch.optim.Optimizer,
                     fakes: Tensor, bf16: bool = False) -> Tensor:
    """One step down L_G, through D, which stays as it is. Returns L_G in nats.

    Args:
        fakes: the generator's images (B, 784), with the graph that made them.
        bf16: as above.
    """
    discriminator.requires_grad_(False)
    with torch.autocast(fakes.device.type, torch.bfloat16, enabled=bf16):
        logits = discriminator(fakes)
    loss = generator_loss(logits)
    optimizer_G.zero_grad()
    loss.backward()
    optimizer_G.step()
    discriminator.requires_grad_(True)
    return loss.detach()


def moved(images: Tensor, shift: tuple[int, int]) -> Tensor:
    """All images (B, 784), so many pixels down and to the right; a side's pixels enter opposite.

    Real and generated images are moved alike, so D overfits later. Where moves by −m … m pixels
    are equally likely and 2m + 1 shares no factor with 28, the distribution of images follows from
    that of moved images, so G gains nothing by imitating the moves (Karras et al., Training
    Generative Adversarial Networks with Limited Data, NeurIPS 2020, section 2.2).
    """
    return images.view(-1, 28, 28).roll(shift, (1, 2)).view(-1, PIXELS)


def train(dataloader: Iterable[Tensor], discriminator: Discriminator, generator: Generator,
          optimizer_G: torch.optim.Optimizer, optimizer_D: torch.optim.Optimizer,
          averaged: AveragedModel | None = None, penalty: float = 0., max_shift: int = 0,
          bf16: bool = False, schedules: Iterable[torch.optim.lr_scheduler.LRScheduler] = ()
          ) -> dict[str, float | None]:
    """One pass over the data: for each batch one update of D, then one of G.

    Args:
        dataloader: batches of images, (B, 784) in [−1, 1].
        averaged: the running average of the generator, updated after each batch.
        penalty: γ of the gradient penalty, which is computed for the first of every PENALTY_EVERY
            batches and counts as many times (Karras et al., Analyzing and Improving the Image
            Quality of StyleGAN, CVPR 2020, section 3.1).
        max_shift: pixels by which the images that D sees are moved at most, batch by batch.
        bf16: whether the networks compute in bfloat16.
        schedules: of the learning rates, stepped after each batch.

    Returns:
        Averages over the batches, as the log names them: the losses in nats, without the penalty,
        the means of D(x) and D(G(z)), and E ‖∇_x logit(x)‖² as `r1` (None where not computed).
    """
    discriminator.train()
    generator.train()
    totals, r1_total, r1_count, n = 0., 0., 0, 0
    for n, images in enumerate(dataloader, start=1):
        z = torch.randn(len(images), generator.latent_dim, device=images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            fakes = generator(z)
        if max_shift:
            shift = tuple(torch.randint(-max_shift, max_shift + 1, (2,)).tolist())
            images, fakes = moved(images, shift), moved(fakes, shift)

        # D: minimise −log D(x) − log(1 − D(G(z)))
        weight = penalty * PENALTY_EVERY if (n - 1) % PENALTY_EVERY == 0 else 0.
        loss_D, d_real, d_fake, r1 = update_discriminator(
            discriminator, optimizer_D, images, fakes, weight, bf16)

        # G: minimise −log D(G(z)), of the same images and the new D
        loss_G = update_generator(discriminator, optimizer_G, fakes, bf16)

        if averaged is not None:
            averaged.update_parameters(generator)
        for schedule in schedules:
            schedule.step()
        totals = totals + torch.stack([loss_D, loss_G, d_real, d_fake])  # stays on the device
        if r1 is not None:
            r1_total, r1_count = r1_total + r1, r1_count + 1
    names = ('discriminator_loss_nats', 'generator_loss_nats', 'd_real', 'd_fake')
    return dict(zip(names, (totals / n).tolist(), strict=True)) | {
        'r1': float(r1_total / r1_count) if r1_count else None}


def average(generator: Generator, decay: float) -> AveragedModel:
    """A copy of the generator that follows it: w ← β w + (1 − β) w_G, β rising to `decay`.

    Yazıcı et al., The Unusual Effectiveness of Averaging in GAN Training (ICLR 2019).
    """
    def follow(copies: list[Tensor], weights: list[Tensor], n: Tensor) -> None:
        step = int(n)
        beta = min(decay, (1 + step) / (10 + step))  # the first weights are soon forgotten
        torch._foreach_lerp_(copies, weights, 1 - beta)
    return AveragedModel(generator, multi_avg_fn=follow)


@torch.no_grad()
def sample(averaged: AveragedModel, z: Tensor) -> Tensor:
    """Images (N, 784) in [0, 1] of noise (N, latent_dim), each from its own row of noise alone.

    The averaged weights get batch statistics of their own first, over the same N_STATISTICS
    batches of noise each time: those met in training belong to other weights.
    """
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(N_STATISTICS, EVAL_BATCH, z.shape[1], generator=draws).to(z.device)
    update_bn(noise, averaged)
    averaged.eval()
    return torch.cat([(averaged(rows) + 1) / 2 for rows in z.split(EVAL_BATCH)])


def learning_rate(progress: float) -> float:
    """As a factor: linear from 0 to 1 over the first fiftieth, then linear to 0."""
    return min(50 * progress, (1 - progress) / 0.98)


def warn(row: dict) -> None:
    """Say in one line each that the epoch has diverged, or that the generator has collapsed."""
    epoch, d_real, d_fake = row['epoch'], row['d_real'], row['d_fake']
    if epoch > 0 and not PINNED <= min(d_real, d_fake) <= max(d_real, d_fake) <= 1 - PINNED:
        print(f'WARNING: epoch {epoch} has diverged: the discriminator is pinned, with a mean '
              f'D(x) of {d_real:.4f} and D(G(z)) of {d_fake:.4f}', file=sys.stderr)
    if epoch > 0 and row['class_share_min'] == 0:
        print(f'WARNING: epoch {epoch} has collapsed: a class is missing from the samples',
              file=sys.stderr)


# --- figures -------------------------------------------------------------------------------------


def save_loss_plot(rows: list[dict], filename: Path) -> None:
    """Both losses, and the discriminator's mean outputs, over the epochs of the log.

    Each with its value at the equilibrium, where D is ½ everywhere (paper, theorem 1).
    """
    def curve(name: str) -> list[float]:
        return [row[name] for row in rows[1:]]
    panels = [{'ylabel': 'loss, nats',
               'curves': {'discriminator': curve('discriminator_loss_nats'),
                          'generator': curve('generator_loss_nats')},
               'references': {'log 4': math.log(4), 'log 2': math.log(2)}},
              {'ylabel': 'mean output of D',
               'curves': {'D(x)': curve('d_real'), 'D(G(z))': curve('d_fake')},
               'references': {'½': 0.5}}]
    figures.save_curves(filename, [row['epoch'] for row in rows[1:]], panels)


def save_images(filename: Path, images: Tensor, columns: int) -> None:
    """Rows of 784 pixels in [0, 1], as a grid of images; NaN, which ends a run, is black."""
    images = images.nan_to_num().view(-1, 28, 28)
    figures.save_grid(filename, images.cpu().numpy(), columns)


def save_interpolations(averaged: AveragedModel, classifier: measures.DigitClassifier, z: Tensor,
                        run: runs.Run) -> list[int]:
    """Rows of nine images, from a sample of one class to one of another, by `spherical_path`.

    The ends are the samples that the classifier is surest of, of each class that occurs; ten
    classes give five rows. The first row is a figure of its own. Beside them, as CSV, the class
    of every image as the classifier sees it. Where all samples are of one class, so are the ends.

    Returns:
        The classes at both ends of the first row.
    """
    log_probs = classifier.look_at(sample(averaged, z))[1]
    top = log_probs.max(1)
    surest = [z[(top.values - 1e9 * (top.indices != c)).argmax()] for c in top.indices.unique()]
    if len(surest) == 1:  # collapsed to one class: there is no other to go to
        surest.append(z[top.values.argmin()])
    paths = torch.stack([spherical_path(start, end, steps=7)
                         for start, end in zip(surest[::2], surest[1::2], strict=False)])
    images = sample(averaged, paths.flatten(0, 1))  # row by row
    save_images(run.path('interpolation.png'), images[:9], columns=9)
    save_images(run.path('interpolations.png'), images, columns=9)
    classes = classifier.look_at(images)[1].argmax(1).tolist()
    runs.write_csv(run.path('interpolations.csv'), [
        {'row': i // 9, 'step': i % 9, 'classified_as': c} for i, c in enumerate(classes)])
    return [classes[0], classes[8]]


# --- the run -------------------------------------------------------------------------------------


def build_parser() -> runs.Parser:
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add('--n_epochs', '--epochs', type=runs.whole_number(1), default=50, dest='epochs',
        help='default: 50')
    add('--batch_size', type=runs.whole_number(2), default=128, help='default: 128')
    add('--lr', type=runs.number(0), default=3e-3, help='at its highest (default: 3e-3)')
    add('--latent_dim', type=runs.whole_number(1), default=100, help='default: 100')
    add('--save_interval', type=runs.whole_number(1), default=500,
        help='batches from one look at the training, samples_latest.png, to the next '
             '(default: 500)')
    add('--arch', choices=('conv', 'mlp'), default='conv',
        help='of both networks: one convolution next to the image, or none (default: conv)')
    add('--beta1', type=runs.number(0, 0.9999), default=0.5, help="Adam's (default: 0.5)")
    add('--beta2', type=runs.number(0, 0.9999), default=0.99, help="Adam's (default: 0.99)")
    add('--schedule', choices=('linear', 'constant'), default='linear',
        help='of the learning rate: up over the first fiftieth, then down to 0; or constant')
    add('--penalty', type=runs.number(0), default=0.5,
        help="weight γ of the penalty on the discriminator's gradient (default: 0.5)")
    add('--max_shift', type=runs.whole_number(0), choices=(0, 1, 2), default=1,
        help='pixels by which real and generated images are moved alike, at most (default: 1)')
    add('--average', type=runs.number(0, 0.9999), default=0.999,
        help='decay of the running average of the generator, which the samples are from; 0 for '
             'none (default: 0.999)')
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
    real, val, test = mnist(args.data_dir, args.batch_size, download, args.dataset, device)
    name = runs.run_name('gan', build_parser(), args, (), real.source)
    args.precision = 'bf16' if bf16 else 'fp32'
    n_judged = N_JUDGED
    if args.dry_run:
        args.epochs, n_judged = 2, 500
        real, val, test = real.head(3 * args.batch_size), val.head(500), test.head(500)

    runs.seed_all(args.seed, 'weights')
    generator = Generator(args.latent_dim, args.arch).to(device)
    discriminator = Discriminator(args.arch).to(device)
    averaged = average(generator, args.average)
    optimizer_G, optimizer_D = (
        torch.optim.Adam(network.parameters(), args.lr, (args.beta1, args.beta2), fused=True)
        for network in (generator, discriminator))
    steps = args.epochs * len(real)

    def factor(step: int) -> float:
        return 1. if args.schedule == 'constant' else learning_rate((step + 1) / (steps + 1))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
                 for optimizer in (optimizer_G, optimizer_D)]
    classifier_folder = 'classifier' + '_digits' * (real.source['dataset'] == 'digits')
    if name == classifier_folder:
        raise runs.RunError(f'--run: {name} is the folder of the digit classifier')
    run = runs.Run(__file__, args, name, real.source, device, {
        'generator': generator, 'discriminator': discriminator, 'averaged': averaged,
        'optimizer_G': optimizer_G, 'optimizer_D': optimizer_D,
        'schedule_G': schedules[0], 'schedule_D': schedules[1]})

    def noise(n: int, purpose: str) -> Tensor:
        """The same standard normal noise, (n, latent_dim), whenever it is for that purpose."""
        with torch.random.fork_rng([device] if device.type == 'cuda' else []):
            runs.seed_all(args.seed, purpose)
            return torch.randn(n, args.latent_dim, device=device)

    if args.sample:
        run.load('latent_dim', 'arch')
        save_images(run.path('sample.png'), sample(averaged, noise(args.sample, 'samples')),
                    columns=math.ceil(math.sqrt(args.sample)))
        print(run.path('sample.png'))
        return

    if not run.begin(len(real)):
        return
    classifier = measures.load_classifier(run.folder.with_name(classifier_folder), real, val)
    val_judge = measures.Judge(classifier, val.images / 255, val.labels)
    few = noise(25, 'samples')

    def watched(epoch: int) -> Iterator[Tensor]:
        """The epoch's batches, in [−1, 1], with a look at the training each save_interval."""
        batches = run.track(images / 127.5 - 1 for images, _ in real)
        for n, images in enumerate(batches, start=(epoch - 1) * len(real) + 1):
            if len(images) > 1:  # batch statistics need two
                yield images
            if n % args.save_interval == 0:
                save_images(run.path('samples_latest.png'), sample(averaged, few), columns=5)

    # Two early ones, halfway and the end: 2, 8, 100 and 200 of 200 epochs.
    snapshots = {0} | {max(1, round(share * args.epochs)) for share in (0.01, 0.04, 0.5, 1)}
    checks = {round(tenth * args.epochs / 10) for tenth in range(11)}
    for epoch in run.epochs():
        start = time.perf_counter()
        row = {'epoch': epoch, 'discriminator_loss_nats': None, 'generator_loss_nats': None,
               'd_real': None, 'd_fake': None, 'r1': None,
               'val_frechet': None, 'class_share_min': None}
        if epoch > 0:
            row |= train(watched(epoch), discriminator, generator, optimizer_G, optimizer_D,
                         averaged, args.penalty, args.max_shift, bf16, schedules)
        if epoch in checks:
            glance = val_judge.glance(sample(averaged, noise(n_judged, 'judged in training')))
            row |= {'val_frechet': glance['frechet'],
                    'class_share_min': glance['class_share_min']}
        row['seconds'] = time.perf_counter() - start
        if epoch in snapshots:
            save_images(run.path(f'samples_epoch{epoch:03d}.png'), sample(averaged, few),
                        columns=5)
        run.end_epoch(row)
        warn(row)

    save_loss_plot(run.rows, run.path('losses.pdf'))
    start = time.perf_counter()
    classes = save_interpolations(averaged, classifier, noise(1000, 'interpolated'), run)
    test_judge = measures.Judge(classifier, test.images / 255, test.labels)
    floor = test_judge.measure(val.images / 255)  # neither network was fitted to these
    run.path('samples_latest.png').unlink(missing_ok=True)  # the last one is samples_epoch…
    run.finish({
        'val_frechet': run.rows[-1]['val_frechet'],
        **test_judge.measure(sample(averaged, noise(n_judged, 'judged'))),
        **{f'{name}_floor': value for name, value in floor.items()},
        'classifier_sha256': measures.fingerprint(classifier),
        'interpolation_from_class': classes[0], 'interpolation_to_class': classes[1],
        'parameters': sum(weight.numel() for network in (generator, discriminator)
                          for weight in network.parameters()),
        'test_minutes': (time.perf_counter() - start) / 60,
    })


if __name__ == '__main__':
    runs.launch(main, parse_args())
