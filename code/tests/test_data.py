"""The data sets: what the loaders give, and what happens to files and networks that are broken.

Most tests replace MNIST by a small one. The real files are read
from the folder that A3_DATA names, or from ../shared/data beside the project.
"""

import gzip
import hashlib
import math
import os
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from datasets import bmnist, common, digits, mnist
from datasets.common import DataError, Loader
from mirror import Server, amat, idx, packed, tree, write

CODE = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get('A3_DATA', CODE.parents[1] / 'shared' / 'data'))
TRAIN_X, TRAIN_Y, TEST_X, TEST_Y = mnist.FILES
FULL_SIZES = digits.SIZES
NO_SERVER = 'http://127.0.0.1:9/'  # the discard port, which refuses connections
mnist_and_bmnist = pytest.mark.parametrize('load', [mnist.mnist, bmnist.bmnist])


@pytest.fixture(autouse=True)
def offline_and_small(monkeypatch) -> None:
    """No test leaves the machine, waits long for an answer or makes all the digits."""
    monkeypatch.setattr(mnist, 'MIRRORS', [NO_SERVER])
    monkeypatch.setattr(common, 'SILENCE_SECONDS', 0.5)
    monkeypatch.setattr(urllib.request, '_opener', None)  # which remembers the proxies
    monkeypatch.setattr(urllib.request, 'getproxies', dict)
    monkeypatch.setattr(digits, 'SIZES', (3500, 700, 700))


def error_of(load, *args, **options) -> str:
    with pytest.raises(DataError, match='^.*$') as error:  # one line
        load(*args, **options)
    return str(error.value)


@pytest.fixture
def small(monkeypatch) -> dict[str, bytes]:
    """The unpacked files of 30 + 10 training and 12 test images, which are MNIST from now on."""
    images = np.random.RandomState(0).randint(256, size=(52, 28, 28)).astype(np.uint8)
    labels = np.arange(52, dtype=np.uint8) // 6
    arrays = images[:40], labels[:40], images[40:], labels[40:]
    contents = dict(zip(mnist.FILES, map(idx, arrays), strict=True))
    for name, content in contents.items():
        monkeypatch.setitem(mnist.FILES, name, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(mnist, 'N_VALIDATION', 10)
    return contents


@pytest.fixture
def small_bits(monkeypatch) -> dict[str, np.ndarray]:
    """The bits of 6 + 4 + 5 images, which are the sizes of binarised MNIST from now on."""
    sizes = dict(zip(bmnist.FILES, (6, 4, 5), strict=True))
    monkeypatch.setattr(bmnist, 'FILES', sizes)
    return {name: np.random.RandomState(n).randint(2, size=(n, 784)) for name, n in sizes.items()}


def loader_of(n: int, batch_size: int, shuffle: bool) -> Loader:
    """n images, each with its index as its first pixel and as its label."""
    images = torch.arange(n, dtype=torch.uint8)[:, None] * torch.eye(784, dtype=torch.uint8)[0]
    return Loader(images, torch.arange(n), batch_size, shuffle, {})


def test_batches_keep_the_order_and_the_uneven_last_one():
    assert [(x.shape, x.dtype, y.tolist()) for x, y in loader_of(10, 4, False)] == [
        ((len(y), 784), torch.float32, y) for y in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9])]
    assert len(loader_of(10, 4, False)) == 3 and len(loader_of(10, 5, False)) == 2


def test_shuffling_follows_the_seed_and_covers_every_image_once():
    def orders(seed: int) -> list[list[int]]:
        loader = loader_of(200, 7, shuffle=True)
        torch.manual_seed(seed)
        epochs = [list(loader) for _ in range(2)]
        assert all(torch.equal(x[:, 0].long(), y) for epoch in epochs for x, y in epoch)
        return [torch.cat([y for _, y in epoch]).tolist() for epoch in epochs]

    first, second = orders(0)
    assert orders(0) == [first, second] and first != second and first != orders(1)[0]
    assert first != list(range(200)) == sorted(first)


def test_head_is_the_first_images_without_shuffling():
    head = loader_of(10, 4, shuffle=True).head(6)
    assert [y.tolist() for _, y in head] == [[0, 1, 2, 3], [4, 5]] and len(head.labels) == 6
    assert [y.tolist() for _, y in head.head(5, batch_size=3)] == [[0, 1, 2], [3, 4]]


def test_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match='batch_size must be at least 1, not 0'):
        loader_of(10, 0, shuffle=False)


@pytest.mark.parametrize('where, gzipped', [('MNIST/raw', True), ('MNIST', False), ('.', True)])
def test_mnist_is_found_and_split(small, tmp_path, where, gzipped):
    write(small, tmp_path / where, gzipped)
    loaders = mnist.mnist(tmp_path, batch_size=8, dataset='mnist')
    assert [(len(loader.images), loader.shuffle) for loader in loaders] == [
        (30, True), (10, False), (12, False)]
    images, labels = (torch.cat([getattr(loader, name) for loader in loaders])
                      for name in ('images', 'labels'))
    assert images.numpy().tobytes() == small[TRAIN_X][16:] + small[TEST_X][16:]
    assert labels.dtype == torch.int64
    assert labels.tolist() == list(small[TRAIN_Y][8:] + small[TEST_Y][8:])
    assert loaders[0].source['sha256'] == mnist.FILES and next(iter(loaders[0]))[0].shape[0] == 8


@pytest.mark.parametrize('where, gzipped, space, end', [
    ('BinarizedMNIST', True, ' ', ' \n'), ('.', False, '\t', '\r\n\r\n'), ('.', True, '  ', '\r')])
def test_binarised_mnist_is_found_whatever_its_white_space(small_bits, tmp_path, where, gzipped,
                                                           space, end):
    write({name: amat(bits, space, end).rstrip() for name, bits in small_bits.items()},
          tmp_path / where, gzipped)
    loaders = bmnist.bmnist(tmp_path, batch_size=4)
    assert [x.images.tolist() for x in loaders] == [bits.tolist() for bits in small_bits.values()]
    assert next(iter(loaders[1])).shape == (4, 784)  # no labels
    digests = [hashlib.sha256(np.packbits(bits)).hexdigest() for bits in small_bits.values()]
    assert loaders[0].source['sha256'] == dict(
        zip(('bits_train', 'bits_valid', 'bits_test'), digests, strict=True))


@pytest.mark.skipif(not REAL.is_dir(), reason=f'no data in {REAL}')
def test_real_files_have_their_known_labels_mean_and_digests():
    train, val, test = mnist.mnist(REAL, dataset='mnist', download=False)
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    total = sum(int(loader.images.sum(dtype=torch.int64)) for loader in (train, val))
    assert total / (60_000 * 784 * 255) == pytest.approx(0.1307, abs=5e-5)
    readme = (CODE.parent / 'data' / 'README.md').read_text()
    digests = bmnist.bmnist(REAL, dataset='mnist', download=False)[0].source['sha256']
    assert len(digests) == 3 and all(digest in readme for digest in digests.values())


@pytest.mark.parametrize('dataset', [None, 'mnist', 'digits'])
def test_other_images_are_binarised_with_the_seed_of_the_set(small, tmp_path, dataset):
    write(small | (dict.fromkeys(bmnist.FILES, b'') if dataset == 'digits' else {}), tmp_path)
    grey, bits = (load(tmp_path, dataset=dataset) for load in (mnist.mnist, bmnist.bmnist))
    random = np.random.RandomState(2008)
    for x, b in zip(grey, bits, strict=True):
        drawn = random.randint(255, size=x.images.shape, dtype=np.uint8)
        assert (b.images.numpy() == (x.images.numpy() > drawn)).all() and b.labels is None
    assert grey[0].source['dataset'] == bits[0].source['dataset'] == (dataset or 'mnist')
    assert bits[0].source['description'].startswith(grey[0].source['description'] + '; binarised')
    assert {*grey[0].source['sha256'], 'bits_test'} < set(bits[0].source['sha256'])


def test_binarising_is_bernoulli_of_x_over_255():
    grey = np.repeat(np.arange(256, dtype=np.uint8), 20_000).reshape(256, -1)
    p, share = np.arange(256) / 255, bmnist.binarise(grey, np.random.RandomState(3)).mean(1)
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / grey.shape[1])).all()


@mnist_and_bmnist
@pytest.mark.parametrize('spoil, found', [
    (lambda path: path.write_bytes(path.read_bytes()[:-20]), 'ended before'),
    (lambda path: path.write_bytes(b'<html>\n404</html>'), 'Not a gzipped file'),
    (lambda path: path.write_bytes(path.read_bytes()[:10] + b'\xff' * 9), 'while decompressing'),
    (lambda path: path.write_bytes(gzip.compress(b'other content')), 'expected sha256'),
    (lambda path: (path.unlink(), path.mkdir()), 'Is a directory'),
    (lambda path: (path.unlink(), path.symlink_to('nowhere')), 'No such file'),
    (lambda path: (path.parent.rename(path.parents[1] / 'old'),
                   path.parent.symlink_to('raw')), 'symbolic links')])
def test_broken_file_is_named_and_kept(small, tmp_path, load, spoil, found):
    path = tmp_path / 'MNIST' / 'raw' / f'{TRAIN_X}.gz'
    write(small, path.parent)
    spoil(path)
    before, error = tree(tmp_path), error_of(load, tmp_path)
    assert error.startswith(str(path.with_suffix(''))) and found in error
    assert tree(tmp_path) == before


@pytest.mark.parametrize('old, new, found', [
    (b'\n', b'', '784 values, each 0 or 1, found 1568 in line 1'),  # two images on a line
    (b'0 ', b'0', '784 values, each 0 or 1, found 783 in line 1'),
    (b'0 ', b'00 ', "784 values, each 0 or 1, found 784 in line 1: [b'0', b'00', b'1']"),
    (b'0 ', b'2 ', "784 values, each 0 or 1, found 784 in line 1: [b'0', b'1', b'2']"),
    (b'', b'0 ' * 784 + b'\n', '4 rows, found 5')])
def test_amat_file_of_other_content_is_named(small_bits, tmp_path, old, new, found):
    write({name: amat(bits) for name, bits in small_bits.items()}, tmp_path, gzipped=False)
    path = tmp_path / 'binarized_mnist_valid.amat'
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    assert error_of(bmnist.bmnist, tmp_path).startswith(f'{path}: expected {found}')


def test_part_of_a_set_is_never_replaced_by_another(small, tmp_path):
    write({name: small[name] for name in (TRAIN_X, TRAIN_Y, TEST_X)}, tmp_path)
    assert f'put {TEST_Y} (.gz' in error_of(mnist.mnist, tmp_path)
    write(small | {'binarized_mnist_test.amat': b''}, tmp_path)
    assert 'put binarized_mnist_train.amat, binarized_mnist_valid.amat (.gz' in error_of(
        bmnist.bmnist, tmp_path)


@mnist_and_bmnist
def test_unknown_data_set_is_refused(tmp_path, load):
    with pytest.raises(ValueError, match='cifar'):
        load(tmp_path, dataset='cifar')


@mnist_and_bmnist
@pytest.mark.parametrize('download', [True, False])
def test_absent_mnist_is_an_error_that_says_what_to_put_where(tmp_path, load, download, capfd):
    error = error_of(load, tmp_path, download=download, dataset='mnist')
    assert all(part in error for part in (*mnist.FILES, f'{tmp_path}/MNIST/raw, from {NO_SERVER}'))
    assert ('switched off' in error) == (not download)
    assert tree(tmp_path) == {} and capfd.readouterr() == ('', '')


def test_missing_files_come_from_the_first_mirror_that_works(small, tmp_path, monkeypatch, capfd):
    mnist.MIRRORS[:] = ['http://bad.invalid/', 'http://good.invalid/', 'http://spare.invalid/']
    files = {f'http://good.invalid{path}': content for path, content in packed(small).items()}
    write({TEST_Y: small[TEST_Y]}, tmp_path)
    with Server(files) as proxy:
        monkeypatch.setattr(urllib.request, 'getproxies', lambda: {'http': proxy.address})
        assert [len(loader.images) for loader in mnist.mnist(tmp_path)] == [30, 10, 12]
    assert [*dict.fromkeys(proxy.requests)] == [f'http://bad.invalid/{TRAIN_X}.gz', *files][:4]
    assert set(tree(tmp_path)) == {f'{TEST_Y}.gz', 'MNIST', 'MNIST/raw', *(
        f'MNIST/raw/{name}.gz' for name in (TRAIN_X, TRAIN_Y, TEST_X))}
    assert socket.getdefaulttimeout() is None and capfd.readouterr() == ('', '')


@pytest.mark.parametrize('last, promised, together, found', [
    (b'<html>', 0, 1, 'Not a gzipped file'), (b'', 9, 1, TEST_Y), (b'', 0, 2, 'timed out')],
    ids=['web page', 'dies half way', 'stalls'])
def test_failed_download_leaves_nothing_behind(small, tmp_path, last, promised, together, found):
    with Server(packed(small) | {f'/{TEST_Y}.gz': last}, promised, together) as server:
        mnist.MIRRORS[:] = [server.address]
        error = error_of(mnist.mnist, tmp_path / 'new', dataset='mnist')
    assert f'({server.address}: ' in error and found in error and tree(tmp_path) == {}


def test_name_lookup_that_hangs_is_given_up_for_each_mirror(tmp_path, monkeypatch):
    mnist.MIRRORS[:] = ['https://a.example/', 'https://b.example/']
    over, start = threading.Event(), time.monotonic()
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **kwargs: over.wait(30) and [])
    assert 'https://a.example/: no answer; https://b.example/: no answer' in error_of(
        mnist.mnist, tmp_path, dataset='mnist')
    assert time.monotonic() - start < 4
    # Python does not wait at its end for the threads that still hang.
    assert all(thread.daemon for thread in threading.enumerate()[1:])
    over.set()


@pytest.mark.parametrize('kind', [HTTPException, ValueError, RuntimeError, ImportError])
def test_any_error_of_a_download_is_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(common, 'fetch_from', Mock(side_effect=kind('two\nlines')))
    assert f'({NO_SERVER}: two lines)' in error_of(mnist.mnist, tmp_path, dataset='mnist')


def test_two_may_download_at_once(small, tmp_path, monkeypatch):
    monkeypatch.setattr(common, 'SILENCE_SECONDS', 60.)
    with Server(packed(small), together=2) as server:
        mnist.MIRRORS[:] = [server.address]
        with ThreadPoolExecutor(2) as pool:
            loaded = list(pool.map(mnist.mnist, [tmp_path, tmp_path]))
    socket.setdefaulttimeout(None)  # of the process, which two threads set at once
    assert [[len(loader.images) for loader in loaders] for loaders in loaded] == [[30, 10, 12]] * 2
    assert set(tree(tmp_path / 'MNIST' / 'raw')) == {path[1:] for path in packed(small)}


def test_digits_look_like_mnist(monkeypatch):
    monkeypatch.setattr(digits, 'SIZES', FULL_SIZES)
    loaders = mnist.mnist('nowhere', dataset='digits')
    assert [len(loader.images) for loader in loaders] == [50_000, 10_000, 10_000]
    for loader in loaders:
        assert np.bincount(loader.labels) / len(loader.labels) == pytest.approx(0.1, abs=0.01)
        # Mostly black, with strokes about as bright and thick as MNIST's, whose mean is 0.13.
        assert loader.images.float().mean() / 255 == pytest.approx(0.13, abs=0.02)
        assert loader.images.max() == 255 and (loader.images == 0).float().mean() > 0.7
        # Drawn in the middle: the outermost frame is all but empty.
        assert (loader.images.view(-1, 28, 28)[:, [0, 27]] > 127).float().mean() < 0.01


def test_digits_are_the_same_each_time_and_no_copy_repeats():
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    first, second = (mnist.mnist('nowhere', dataset='digits')[0].images for _ in range(2))
    assert torch.equal(first, second) and len(first.unique(dim=0)) == 3500
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_no_digit_is_in_two_splits_or_has_two_labels(monkeypatch):
    for change in ('TURN', 'STRETCH', 'SHEAR', 'SHIFT'):
        monkeypatch.setattr(digits, change, 0.)
    # Without changes, copies of one original are equal: they tell which originals a split uses.
    sets = [{(image.tobytes(), label) for image, label in zip(*split, strict=True)}
            for split in digits.load_digits()[0]]
    assert [len(used) for used in sets] == pytest.approx([1283, 257, 257], abs=5)
    assert sum(len(used) for used in sets) == 1797
    assert len({image for used in sets for image, _ in used}) == 1797


def test_a_turn_keeps_the_shape(monkeypatch):
    monkeypatch.setattr(digits, 'TURN', math.pi / 2)
    straight, turned = (
        digits.distort(torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0)),
                       Mock(uniform=lambda *_, turn=turn: turn * np.eye(6)[:, :1]))
        for turn in (0, 1))
    np.testing.assert_allclose(np.rot90(straight.reshape(28, 28)), turned.reshape(28, 28), atol=2)


def test_digits_replace_absent_mnist_with_a_warning_of_two_lines(tmp_path, capfd):
    assert mnist.mnist(tmp_path)[0].source['dataset'] == 'digits'
    out, err = capfd.readouterr()
    assert out == '' and len(err.splitlines()) == 2
    assert str(tmp_path) in err and NO_SERVER in err and tree(tmp_path) == {}


def test_damaged_digits_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, 'FILE', tmp_path / 'digits.npz')
    digits.FILE.write_bytes(b'damaged')
    assert f'{digits.FILE}: expected sha256' in error_of(mnist.mnist, tmp_path, dataset='digits')
