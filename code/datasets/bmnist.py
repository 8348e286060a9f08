"""Static binarised MNIST: 50,000 / 10,000 / 10,000 images of pixels 0 and 1, without labels.

The distributed files (Larochelle and Murray, 2011, after Salakhutdinov and Murray, 2008) where
they are present, else MNIST binarised once: each pixel is 1 with probability x/255.
"""

from pathlib import Path

import numpy as np
import torch

from datasets import common
from datasets.common import DataError, Loader
from datasets.mnist import load_mnist

FILES = {'binarized_mnist_train.amat': 50_000,
         'binarized_mnist_valid.amat': 10_000,
         'binarized_mnist_test.amat': 10_000}
ADDRESS = 'http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/'
SEED = 2008  # of the binarisation: part of the data set, not of a run


def bmnist(root: str | Path = './data/', batch_size: int = 128, download: bool = True,
           dataset: str | None = None, device: str | torch.device = 'cpu') -> tuple[Loader, ...]:
    """Train, validation and test loaders of x (B, 784) in {0., 1.}.

    `dataset` is 'mnist', 'digits' (the set that ships with the project, binarised by the same
    rule) or None: the distributed files, else what `mnist` finds. Raises DataError.
    """
    root = Path(root)
    folders = [root / 'BinarizedMNIST', root]
    paths = {name: common.find(folders, name) for name in FILES} if dataset != 'digits' else {}
    missing = [name for name, path in paths.items() if path is None]
    if paths and not missing:
        images = [common.read_amat(paths[name], n_rows) for name, n_rows in FILES.items()]
        source = {'dataset': 'mnist',
                  'description': 'static binarised MNIST, the three distributed .amat files',
                  'sha256': {}}
    elif len(missing) < len(paths):
        raise DataError(f'binarised MNIST is not complete: put {", ".join(missing)} (.gz or not) '
                        f'into {folders[0]}, from {ADDRESS}')
    else:
        splits, grey_source = load_mnist(root, download, dataset)
        random = np.random.RandomState(SEED)
        images = [binarise(grey, random) for grey, _ in splits]
        source = grey_source | {'description': f'{grey_source["description"]}; binarised once: '
                                               f'Bernoulli(x/255), seed {SEED}'}
    digests = {f'bits_{split}': common.bits_digest(bits)
               for split, bits in zip(('train', 'valid', 'test'), images, strict=True)}
    source['sha256'] = source['sha256'] | digests
    return common.make_loaders([(bits, None) for bits in images], source, batch_size, device)


def binarise(grey: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Bits that are 1 with probability x/255: x exceeds exactly x of the values 0 to 254.

    RandomState because numpy promises its stream for good, unlike that of its newer Generator;
    whole numbers because no device or library rounds them.
    """
    return (grey > random.randint(255, size=grey.shape, dtype=np.uint8)).astype(np.uint8)
