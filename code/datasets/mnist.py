"""MNIST: 50,000 training, 10,000 validation and 10,000 test images with their labels."""

import sys
from pathlib import Path

import torch

from datasets import common
from datasets.common import DataError, Loader, Split
from datasets.digits import load_digits

# The sha256 of each file unpacked: gzip files of the same content differ.
FILES = {
    'train-images-idx3-ubyte': 'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db',
    'train-labels-idx1-ubyte': '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5',
    't10k-images-idx3-ubyte': '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7',
    't10k-labels-idx1-ubyte': 'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2',
}
# The addresses that serve the files; the original host, yann.lecun.com, no longer does.
MIRRORS = ['https://ossci-datasets.s3.amazonaws.com/mnist/',
           'https://storage.googleapis.com/cvdf-datasets/mnist/']
N_VALIDATION = 10_000  # the last of the 60,000 training images


def mnist(root: str | Path = './data/', batch_size: int = 128, download: bool = True,
          dataset: str | None = None, device: str | torch.device = 'cpu') -> tuple[Loader, ...]:
    """Train, validation and test loaders of x (B, 784), 0 to 255, and labels y (B,).

    `dataset` is 'mnist', 'digits' (the set that ships with the project) or None: MNIST, or the
    digits where MNIST is neither under `root` nor to be downloaded. Raises DataError.
    """
    splits, source = load_mnist(Path(root), download, dataset)
    return common.make_loaders(splits, source, batch_size, device)


def load_mnist(root: Path, may_download: bool, dataset: str | None) -> tuple[list[Split], dict]:
    """The three splits and where they come from, after the same search as `mnist`."""
    if dataset not in (None, 'mnist', 'digits'):
        raise ValueError(f"dataset must be 'mnist', 'digits' or None, not {dataset!r}")
    if dataset == 'digits':
        return load_digits()
    raw = root / 'MNIST' / 'raw'
    folders = [raw, root / 'MNIST', root]
    missing = [name for name in FILES if common.find(folders, name) is None]
    if missing:
        try:
            fetch(missing, raw, may_download)
        except DataError as error:
            # Part of MNIST shows that its owner wants MNIST: only a bare folder falls back.
            if dataset is None and len(missing) == len(FILES):
                print(f'WARNING: no MNIST in {root}: {error}.\n'
                      'WARNING: using the 1,797 small digits that ship with the project instead; '
                      'the figures are not those of MNIST.', file=sys.stderr)
                return load_digits()
            raise DataError(f'MNIST is missing or incomplete: put {", ".join(missing)} '
                            f'(.gz or not) into {raw}, from {MIRRORS[0]} ({error})') from None
    contents = [common.read_verified(common.find(folders, name), name, FILES) for name in FILES]
    train_x, train_y, test_x, test_y = (common.read_idx(content) for content in contents)
    train_x, test_x = train_x.reshape(-1, common.PIXELS), test_x.reshape(-1, common.PIXELS)
    source = {'dataset': 'mnist',
              'description': 'MNIST, the four IDX files; '
                             f'validation is the last {N_VALIDATION:,} training images',
              'sha256': dict(FILES)}
    return [(train_x[:-N_VALIDATION], train_y[:-N_VALIDATION]),
            (train_x[-N_VALIDATION:], train_y[-N_VALIDATION:]),
            (test_x, test_y)], source


def fetch(names: list[str], folder: Path, may_download: bool) -> None:
    """Download `names` into `folder` or raise a DataError that says why that is not possible."""
    if not may_download:
        raise DataError('downloading is switched off')
    common.download(MIRRORS, names, folder,
                    verify=lambda path, name: common.read_verified(path, name, FILES))
