"""Autoencoders on binarised MNIST, with the VAE's own encoder and decoder, to compare with a VAE.

    ae     z = μ(x)                                          minimise −log p(x|z)
    dae    z = μ(x̃), x̃ = x with a share of its pixels at 0    minimise −log p(x|z), of the whole x

The second is the denoising autoencoder of Vincent et al., Extracting and Composing Robust Features
with Denoising Autoencoders (ICML 2008). Neither loss says anything about where the codes lie, so
there is no distribution to draw z from, and no likelihood of an image. The figures still show what
the decoders make of z ~ N(0, I), as if they were VAEs, beside reconstructions. Everything but the
loss is as in `a3_vae.py`: data, augmentation, networks, optimizer, schedule and their defaults.

    python code/a3_ae.py --model ae
    python code/a3_ae.py --model dae

Measured on static binarised MNIST, 40 epochs (`--zdim 2`: 80), seed 42, on one core of an AMD
EPYC: `ae_z20`: val_reconstruction_nats 50.5, test_reconstruction_nats 50.1; `dae_z20`:
val_reconstruction_nats 65.7, test_reconstruction_nats 65.1; `ae_z2`: test_reconstruction_nats
125.4; `dae_z2`: test_reconstruction_nats 129.3.
"""

import argparse
import time

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import a3_vae
import figures
import processes
import runs
from a3_vae import (EVAL_BATCH, augmented_share, epoch_iter, learning_rate, prepared, run_epoch,
                    save_elbo_plot, save_reconstructions)
from command_line import Parser, launch, number, whole_number
from datasets.bmnist import bmnist

# --- model ---------------------------------------------------------------------------------------


def corrupt(images: Tensor, share: float) -> Tensor:
    """Each pixel is set to 0 with that probability (after Vincent et al.). Any shape."""
    return images * (torch.rand_like(images) >= share)


class AutoEncoder(nn.Module):
    """A VAE's untrained encoder, used for its mean alone, and its decoder.

    In training a `share` of the pixels is hidden from the encoder, none in a plain autoencoder.
    """

    def __init__(self, vae: a3_vae.VAE, share: float = 0.):
        super().__init__()
        self.z_dim, self.share = vae.z_dim, share
        self.encoder, self.decoder = vae.encoder, vae.decoder

    def forward(self, input: Tensor) -> Tensor:
        """(B, 784) in [0, 1] to the average −log p(x|z), in nats."""
        code, _ = self.encoder(corrupt(input, self.share) if self.training else input)
        return -self.decoder.log_likelihood(input, code).mean()


# --- figures -------------------------------------------------------------------------------------


@torch.no_grad()
def decodings(model: AutoEncoder, n: int) -> Tensor:
    """Decoder means, (n, 784), for z ~ N(0, I), which the decoder was not trained for."""
    return model.decoder(torch.randn(n, model.z_dim, device=next(model.parameters()).device))


# --- the run -------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--model', choices=('ae', 'dae'), default='ae', help='plain or denoising autoencoder')
    add('--zdim', type=whole_number(1), default=20, help='size of the code')
    add('--share', type=number(0, 1), default=0.3,
        help='dae: share of the pixels that the encoder sees as 0')
    a3_vae.add_training_arguments(parser)
    parser.add_shared_arguments()
    parser.set_defaults(**(a3_vae.FEW if parser.parse_args(argv).zdim < 5 else a3_vae.MANY))
    args = parser.parse_args(argv)
    if args.model == 'ae' and args.share != parser.get_default('share'):
        parser.error('--share has no meaning with --model ae')
    args.name = parser.run_name(f'{args.model}_z{args.zdim}', args, 'model', 'zdim')
    return args


def make_model(args: argparse.Namespace) -> AutoEncoder:
    """The untrained autoencoder that these arguments ask for."""
    vae = a3_vae.VAE(args.hidden_dim, args.zdim, args.n_layers, args.skip == 'yes')
    return AutoEncoder(vae, args.share if args.model == 'dae' else 0.)


def main(args: argparse.Namespace) -> None:
    device, bf16 = runs.start(args)
    train, val, test = runs.load_data(bmnist, args, device)
    curve_train, val, test = (loader.head(10_000, EVAL_BATCH) for loader in (train, val, test))

    runs.seed_all(args.seed, 'weights')
    model = make_model(args).to(device)
    optimizer = AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    steps = args.epochs * len(train)
    schedule = LambdaLR(optimizer, lambda step: learning_rate((step + 1) / (steps + 1)))
    run = runs.Run(main, args, train.source, device,
                   {'model': model, 'optimizer': optimizer, 'schedule': schedule})

    if args.sample:
        run.load('model', 'zdim', 'hidden_dim', 'n_layers', 'skip')
        runs.seed_all(args.seed, f'{args.sample} samples')
        figures.save_grid(run.path('sample.png'), decodings(model, args.sample))
        print(run.path('sample.png'))
        return
    if not run.begin():
        return

    for epoch in run.epochs():
        start = time.perf_counter()
        data = prepared(run.track(train), augmented_share(args, epoch)), val
        running, val_loss = run_epoch(model, data, optimizer if epoch else None, schedule, bf16)
        if processes.rank():
            continue
        train_loss = epoch_iter(model, curve_train, bf16=bf16)
        run.end_epoch({'epoch': epoch, 'train_reconstruction_nats': train_loss,
                       'val_reconstruction_nats': val_loss, 'running_reconstruction_nats': running,
                       'seconds': time.perf_counter() - start})

    if processes.rank():
        return
    model.eval()  # a run resumed after its last epoch has not been here
    runs.seed_all(args.seed, 'samples')
    figures.save_grid(run.path('decodings.png'), decodings(model, 25))
    hide = (lambda images: corrupt(images, model.share)) if args.model == 'dae' else None
    save_reconstructions(model, test.images.float(), run, hide)
    save_elbo_plot([row['train_reconstruction_nats'] for row in run.rows],
                   [row['val_reconstruction_nats'] for row in run.rows], run.path('loss.pdf'),
                   ylabel='reconstruction error, nats')
    start = time.perf_counter()
    run.finish({'val_reconstruction_nats': epoch_iter(model, val),  # in float32 from here on
                'test_reconstruction_nats': epoch_iter(model, test),
                'parameters': sum(weight.numel() for weight in model.parameters()),
                'test_minutes': (time.perf_counter() - start) / 60})


if __name__ == '__main__':
    launch(main, parse_args())
