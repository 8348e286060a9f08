"""Autoencoders on binarised MNIST, of the VAE's own encoder and decoder: what a VAE adds to them.

    ae     z = μ(x)                                          minimise −log p(x|z)
    dae    z = μ(x̃), x̃ = x with a share of its pixels at 0    minimise −log p(x|z), of the whole x

The second is the denoising autoencoder of Vincent et al., Extracting and Composing Robust Features
with Denoising Autoencoders (ICML 2008). Nothing in either loss says where the codes are to lie, so
there is no distribution to draw z from, and no likelihood of an image. What their decoders make
of z ~ N(0, I), as if they were VAEs, is drawn all the same, beside reconstructions. All but the
model is the VAE's: the networks, the loop that trains them, the schedule, the data.

    python code/a3_ae.py --model ae
    python code/a3_ae.py --model dae

Measured on static binarised MNIST, 40 epochs, seed 42, one core of an AMD EPYC: `ae_z20`:
val_reconstruction_nats 64.5, test_reconstruction_nats 63.9; `dae_z20`: val_reconstruction_nats
71.9, test_reconstruction_nats 71.5; `ae_z2`: test_reconstruction_nats 126.1; `dae_z2`:
test_reconstruction_nats 129.2.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import figures
import runs
from a3_vae import (
    EVAL_BATCH,
    Decoder,
    Encoder,
    bernoulli_log_likelihood,
    epoch_iter,
    learning_rate,
    run_epoch,
    save_images,
)
from datasets.bmnist import bmnist

# --- model ---------------------------------------------------------------------------------------


def corrupt(images: Tensor, share: float) -> Tensor:
    """Each pixel is set to 0 with that probability (Vincent et al., section 2.3). Any shape."""
    return images * (torch.rand_like(images) >= share)


class AutoEncoder(nn.Module):
    """The VAE's encoder, of which only the mean is used, and the VAE's decoder.

    Args:
        share: of the pixels, hidden from the encoder in training; 0: a plain autoencoder.
    """

    def __init__(self, hidden_dim: int = 500, z_dim: int = 20, share: float = 0.):
        super().__init__()
        self.z_dim, self.share = z_dim, share
        skip = z_dim >= 5  # as in the VAE
        self.encoder = Encoder(hidden_dim, z_dim, skip=skip)
        self.decoder = Decoder(hidden_dim, z_dim, skip=skip)

    def forward(self, input: Tensor) -> Tensor:
        """(B, 784) in [0, 1] to the average −log p(x|z), in nats."""
        seen = corrupt(input, self.share) if self.training else input
        code, _ = self.encoder(seen)
        return -bernoulli_log_likelihood(input, self.decoder.logits(code)).mean()


# --- figures -------------------------------------------------------------------------------------


def save_loss_plot(train_curve: list[float], val_curve: list[float], filename: Path) -> None:
    """−log p(x|z) over epochs, from the untrained network on; in nats."""
    curves = {'training': train_curve, 'validation': val_curve}
    start = max(1, len(val_curve) // 10)
    panels = [{'ylabel': 'reconstruction error, nats', 'curves': curves},
              {'ylabel': f'the same, from epoch {start}', 'curves': curves, 'start': start}]
    figures.save_curves(filename, list(range(len(val_curve))), panels)


@torch.no_grad()
def decodings(model: AutoEncoder, n: int) -> Tensor:
    """Decoder means, (n, 784), of z ~ N(0, I), for which nothing has prepared the decoder."""
    return model.decoder(torch.randn(n, model.z_dim, device=next(model.parameters()).device))


# --- the run -------------------------------------------------------------------------------------


def build_parser() -> runs.Parser:
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add('--epochs', type=runs.whole_number(1), default=40, help='default: 40')
    add('--model', choices=('ae', 'dae'), default='ae', help='plain or denoising (default: ae)')
    add('--zdim', type=runs.whole_number(1), default=20, help='size of the code (default: 20)')
    add('--share', type=runs.number(0, 1), default=0.3,
        help='dae: of the pixels, set to 0 before the encoder sees them (default: 0.3)')
    add('--hidden_dim', type=runs.whole_number(1), default=512, help='default: 512')
    add('--batch_size', type=runs.whole_number(1), default=128, help='default: 128')
    add('--lr', type=runs.number(0), default=1.5e-3, help='peak of the cycle (default: 1.5e-3)')
    add('--precision', choices=('auto', 'bf16', 'fp32'), default='auto',
        help='of the networks in training; auto: bf16 where the hardware has it')
    parser.add_shared_arguments()
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.model == 'ae' and args.share != parser.get_default('share'):
        parser.error('--share has no meaning with --model ae')
    return args


def main(args: argparse.Namespace) -> None:
    device = runs.pick_device(args.device)
    bf16 = args.precision == 'bf16' or args.precision == 'auto' and runs.has_fast_bf16(device)
    download = not (args.dry_run or args.sample)
    train, val, test = bmnist(args.data_dir, args.batch_size, download, args.dataset, device)
    name = runs.run_name(f'{args.model}_z{args.zdim}', build_parser(), args, ('model', 'zdim'),
                         train.source)
    args.precision = 'bf16' if bf16 else 'fp32'
    if args.dry_run:
        args.epochs = 2
        train, val, test = (loader.head(3 * args.batch_size) for loader in (train, val, test))
    curve_train, val, test = (loader.head(10_000, EVAL_BATCH) for loader in (train, val, test))

    runs.seed_all(args.seed, 'weights')
    model = AutoEncoder(args.hidden_dim, args.zdim,
                        args.share if args.model == 'dae' else 0.).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    steps = args.epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate((step + 1) / (steps + 1)))
    run = runs.Run(__file__, args, name, train.source, device,
                   {'model': model, 'optimizer': optimizer, 'schedule': schedule})

    if args.sample:
        run.load('model', 'zdim', 'hidden_dim')
        model.eval()
        runs.seed_all(args.seed, f'{args.sample} samples')
        save_images(run.path('sample.png'), decodings(model, args.sample),
                    columns=math.ceil(math.sqrt(args.sample)))
        print(run.path('sample.png'))
        return

    if not run.begin(len(train)):
        return
    for epoch in run.epochs():
        start = time.perf_counter()
        if epoch == 0:
            running, val_error = None, epoch_iter(model.eval(), val, bf16=bf16)
        else:
            running, val_error = run_epoch(model, (run.track(train), val), optimizer,
                                           schedule=schedule, bf16=bf16)
        train_error = epoch_iter(model, curve_train, bf16=bf16)
        run.end_epoch({'epoch': epoch, 'train_reconstruction_nats': train_error,
                       'val_reconstruction_nats': val_error,
                       'running_reconstruction_nats': running,
                       'seconds': time.perf_counter() - start})

    model.eval()  # a run resumed after its last epoch has not been here
    runs.seed_all(args.seed, 'samples')
    save_images(run.path('decodings.png'), decodings(model, 25), columns=5)
    images = test.images[::max(1, len(test.images) // 10)][:10].float()
    seen = corrupt(images, model.share)
    with torch.no_grad():
        reconstructions = model.decoder(model.encoder(seen)[0])
    rows = [images, reconstructions] if args.model == 'ae' else [images, seen, reconstructions]
    save_images(run.path('reconstructions.png'), torch.cat(rows), columns=len(images))
    save_loss_plot([row['train_reconstruction_nats'] for row in run.rows],
                   [row['val_reconstruction_nats'] for row in run.rows], run.path('loss.pdf'))
    start = time.perf_counter()
    run.finish({
        'val_reconstruction_nats': epoch_iter(model, val),  # in float32 from here on
        'test_reconstruction_nats': epoch_iter(model, test),
        'parameters': sum(parameter.numel() for parameter in model.parameters()),
        'test_minutes': (time.perf_counter() - start) / 60,
    })


if __name__ == '__main__':
    runs.launch(main, parse_args())
