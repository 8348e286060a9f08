"""MNIST: 50,000 training, 10,000 validation and 10,000 test images with their labels."""

import sys
from pathlib import Path

import numpy as np
import torch

from datasets.common import PIXELS, DataError, Loader, fetch, find, make_loaders, read_file
from datasets.digits import load_digits

# The sha256 of each file after unpacking, since gzip files of the same content can differ.
FILES = {
    'train-images-idx3-ubyte': 'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db',
    'train-labels-idx1-ubyte': '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5',
    't10k-images-idx3-ubyte': '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7',
    't10k-labels-idx1-ubyte': 'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2',
}
# The original host, yann.lecun.com, no longer serves the files.
MIRRORS = ['https://ossci-datasets.s3.amazonaws.com/mnist/',
           'https://storage.googleapis.com/cvdf-datasets/mnist/']
N_VALIDATION = 10_000  # the last of the 60,000 training images


def mnist(root: str | Path = './data/', batch_size: int = 128, download: bool = True,
          dataset: str | None = None, device: str | torch.device = 'cpu') -> tuple[Loader, ...]:
    """Train, validation and test loaders of x (B, 784), from 0 to 255, and labels y (B,).

    `dataset` is 'mnist', 'digits' (the set that ships with the project) or None, which means MNIST
    or, if that is neither under `root` nor can be downloaded, the digits. Raises DataError.
    """
    if dataset not in (None, 'mnist', 'digits'):
        raise ValueError(f"dataset must be 'mnist', 'digits' or None, not {dataset!r}")
    if dataset == 'digits':
        return make_loaders(*load_digits(), batch_size, device)
    raw = Path(root) / 'MNIST' / 'raw'
    folders = [raw, raw.parent, Path(root)]
    missing = [name for name in FILES if find(folders, name) is None]
    try:
        if missing and not download:
            raise DataError('downloading is switched off')
        if missing:
            fetch(MIRRORS, {name: FILES[name] for name in missing}, raw)
    except DataError as error:
        # Whoever has some of the files wants MNIST: the digits replace it only if all are missing.
        if dataset is None and len(missing) == len(FILES):
            print(f'WARNING: no MNIST in {root}: {error}.\n'
                  'WARNING: using the 1,797 small digits that ship with the project instead; '
                  'the figures are not those of MNIST.', file=sys.stderr)
            return mnist(root, batch_size, download, 'digits', device)
        raise DataError(f'MNIST is missing or incomplete: put {", ".join(missing)} '
                        f'(.gz or not) into {raw}, from {MIRRORS[0]} ({error})') from None
    contents = [read_file(find(folders, name), FILES[name]) for name in FILES]
    # An IDX file has 4 bytes of header, the last of which is the rank, and 4 more for each size.
    train_x, train_y, test_x, test_y = (
        np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * content[3])
        for content in contents)
    train_x, test_x = train_x.reshape(-1, PIXELS), test_x.reshape(-1, PIXELS)
    splits = [(train_x[:-N_VALIDATION], train_y[:-N_VALIDATION]),
              (train_x[-N_VALIDATION:], train_y[-N_VALIDATION:]), (test_x, test_y)]
    description = ('MNIST, the four IDX files; '
                   f'validation is the last {N_VALIDATION:,} training images')
    source = {'dataset': 'mnist', 'description': description, 'sha256': dict(FILES)}
    return make_loaders(splits, source, batch_size, device)
