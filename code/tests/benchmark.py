"""How fast the scripts train: ratios within one run on one machine, never absolute promises.

For the networks of the assignment's template, and for the default ones, a few dozen batches are
trained in turn by the script's own loop, and by the same loop in float32 with a plain Adam, fed by
torchvision's MNIST and a `DataLoader` with four workers. Then the bare matrix products and
convolutions of such a step are computed alone, forward and backward, with the same shapes, strides
and precision. Their time is the floor, and floor / step the share of it that is reached.

    python code/tests/benchmark.py [--data_dir DIR] [--rounds 5] [vae gan nf]
"""

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

CODE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CODE))

import a3_gan  # noqa: E402
import a3_nf  # noqa: E402
import a3_vae  # noqa: E402
import runs  # noqa: E402
from command_line import ROOT, whole_number  # noqa: E402
from datasets.common import Loader  # noqa: E402
from datasets.mnist import mnist  # noqa: E402

BATCHES = 40
RECORDED = 8  # a round of the GAN's penalty, which is not in every batch
Train = Callable[[Iterable], object]  # over batches of images in [0, 1], (B, 784)


# --- what is timed -------------------------------------------------------------------------------


def adam(model: nn.Module, fused: bool) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), 1e-4, fused=fused)


def train_vae(bf16: bool, fused: bool, template: bool) -> Train:
    model = (a3_vae.VAE(500, 20, n_layers=1, skip=False) if template else
             a3_vae.make_model(a3_vae.parse_args([])))
    optimizer, share = adam(model, fused), 0. if template else 0.8

    def train(batches: Iterable) -> None:
        binary = (images.round() for images in batches)
        a3_vae.epoch_iter(model.train(), a3_vae.prepared(binary, share), optimizer, bf16=bf16)
    return train


def train_gan(bf16: bool, fused: bool, template: bool) -> Train:
    arch = 'mlp' if template else 'conv'
    generator, discriminator = a3_gan.Generator(arch=arch), a3_gan.Discriminator(arch)
    optimizers = adam(generator, fused), adam(discriminator, fused)
    options = {} if template else {'averaged': copy.deepcopy(generator), 'decay': 0.999,
                                   'penalty': 0.5}

    def train(batches: Iterable) -> None:
        a3_gan.train((images * 2 - 1 for images in batches), discriminator, generator, *optimizers,
                     bf16=bf16, **options)
    return train


def train_nf(bf16: bool, fused: bool, template: bool) -> Train:
    model = a3_nf.Model([784], None if template else a3_nf.AutoregressiveFlow())
    optimizers = [adam(model, fused)] if template else a3_nf.make_optimizers(model, 1e-4)
    shift = 0 if template else 1

    def train(batches: Iterable) -> None:
        grey = (((images * 255).round(), None) for images in batches)
        a3_nf.epoch_iter(model.train(), a3_nf.moved(grey, shift), *optimizers, bf16=bf16)
    return train


# By name: what trains, and the batch size of the template's networks and of the default ones.
CASES = {'vae': (train_vae, 128, 256), 'gan': (train_gan, 64, 128), 'nf': (train_nf, 256, 128)}


class FromTensors(MNIST):
    """torchvision's MNIST, item by item as it is, of images that are in memory already."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.data, self.targets = images.view(-1, 28, 28), labels
        self.transform, self.target_transform = ToTensor(), None


class Recorder(TorchDispatchMode):
    """Keeps every matrix product and convolution that is computed under it."""

    OPS = ('mm', 'addmm', 'bmm', 'baddbmm', 'convolution', 'convolution_backward')

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, list]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.OPS:
            self.calls.append((func, [like(arg) for arg in args]))
        return func(*args, **(kwargs or {}))


def like(arg: object) -> object:
    """Other numbers in a tensor of the same shape, strides and precision; what is none, as is."""
    if not isinstance(arg, torch.Tensor):
        return arg
    last = sum((size - 1) * step for size, step in zip(arg.shape, arg.stride(), strict=True))
    return torch.randn(last + 1).to(arg.dtype).as_strided(arg.shape, arg.stride())


def floor_of(train: Train, batch: torch.Tensor) -> Callable[[], None]:
    """A function that computes nothing but the products and convolutions of RECORDED steps."""
    with Recorder() as recorder:
        train([batch] * RECORDED)

    def replay() -> None:
        for func, args in recorder.calls:
            func(*args)
    return replay


# --- measurements --------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(name: str, template: bool, loader: Loader, rounds: int, bf16: bool) -> None:
    """Print the ratios of one script, of the template's networks or of the default ones."""
    make, *sizes = CASES[name]
    B = sizes[0 if template else 1]
    n = B * BATCHES
    loader = Loader(loader.images[:n], None, B, shuffle=True, source={})
    ours, in_fp32 = make(bf16, True, template), make(False, True, template)
    batch = loader.images[:B] / 255
    works = {'step': lambda: ours(images / 255 for images in loader)}
    floors = {'fp32': floor_of(in_fp32, batch)} | ({'bf16': floor_of(ours, batch)} if bf16 else {})
    for kind, floor in floors.items():
        works[kind] = lambda floor=floor: [floor() for _ in range(BATCHES // RECORDED)]
    if template:
        plain = make(False, False, template)
        feed = DataLoader(FromTensors(loader.images, torch.zeros(n)), B, shuffle=True,
                          num_workers=4, persistent_workers=True)  # their start is not counted
        works['DataLoader'] = lambda: plain(images.flatten(1) for images, _ in feed)
    for work in works.values():
        work()
    times = {kind: [] for kind in works}
    for _ in range(rounds):
        for kind, work in works.items():
            times[kind].append(seconds(work))
    median = {kind: statistics.median(values) for kind, values in times.items()}
    shares = [f'{median[kind] / median["step"]:.2f} of the {kind} floor' for kind in floors]
    over = f'{median["DataLoader"] / median["step"]:.1f} x DataLoader, ' if template else ''
    print(f'{name:4}{"template" if template else "default":9}{n / median["step"]:9,.0f} images/s, '
          f'{over}{", ".join(shares)}', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('script', nargs='*', choices=[*CASES, []], help='all if none is named')
    parser.add_argument('--data_dir', type=Path, default=ROOT / 'data')
    parser.add_argument('--rounds', type=whole_number(1), default=5)
    args = parser.parse_args()
    names = args.script or list(CASES)
    warnings.filterwarnings('ignore', 'This DataLoader will create 4')  # as the template does
    loader, *_ = mnist(args.data_dir, 128, download=False)
    bf16 = runs.has_fast_bf16(torch.device('cpu'))
    print(runs.hardware(torch.device('cpu')))
    for name in names:
        for template in (True, False):
            compare(name, template, loader, args.rounds, bf16)


if __name__ == '__main__':
    main()
