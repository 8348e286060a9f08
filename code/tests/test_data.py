"""The data sets: what the loaders give, and what happens to files and networks that are broken.

Most tests write a small MNIST of their own, whose sizes and sha256 replace those of the real one;
the real files are read where A3_DATA or ../shared/data beside the project holds them.
"""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets.bmnist
import datasets.common
import datasets.digits
import datasets.mnist
from datasets.bmnist import binarise, bmnist
from datasets.common import DataError, Loader, answering, server_of
from datasets.mnist import mnist

CODE = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get('A3_DATA', CODE.parents[1] / 'shared' / 'data'))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f'no data in {REAL}')

TRAIN_X, TRAIN_Y, TEST_X, TEST_Y = datasets.mnist.FILES
NO_NETWORK = 'http://127.0.0.1:9/'  # the discard port: refused at once


def idx(array: np.ndarray) -> bytes:
    sizes = b''.join(size.to_bytes(4, 'big') for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def amat(bits: np.ndarray, space: str = ' ', end: str = ' \n') -> bytes:
    return ''.join(space.join(map(str, row)) + end for row in bits).encode()


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in folder.rglob('*')}


def digest(loaders: tuple[Loader, ...]) -> str:
    return hashlib.sha256(b''.join(loader.images.numpy().tobytes()
                                   for loader in loaders)).hexdigest()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test leaves the machine; those of the network put a server of their own here."""
    monkeypatch.setattr(datasets.mnist, 'MIRRORS', [NO_NETWORK])
    monkeypatch.setattr(datasets.common, 'SILENCE_SECONDS', 1.)
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The unpacked files of a set of 30 + 10 training and 12 test images, expected from now on."""
    random = np.random.RandomState(0)
    contents = {TRAIN_X: idx(random.randint(256, size=(40, 28, 28)).astype(np.uint8)),
                TRAIN_Y: idx(random.randint(10, size=40).astype(np.uint8)),
                TEST_X: idx(random.randint(256, size=(12, 28, 28)).astype(np.uint8)),
                TEST_Y: idx(random.randint(10, size=12).astype(np.uint8))}
    for name, content in contents.items():
        monkeypatch.setitem(datasets.mnist.FILES, name, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(datasets.mnist, 'N_VALIDATION', 10)
    return contents


@pytest.fixture
def small_bits(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The bits of a binarised set of 6 + 4 + 5 images, whose sizes are expected from now on."""
    random = np.random.RandomState(1)
    sizes = dict(zip(datasets.bmnist.FILES, (6, 4, 5), strict=True))
    for name, size in sizes.items():
        monkeypatch.setitem(datasets.bmnist.FILES, name, size)
    return {name: random.randint(2, size=(size, 784)) for name, size in sizes.items()}


def write(contents: dict[str, bytes], folder: Path, packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if packed:
            (folder / f'{name}.gz').write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


# Loaders


def loader_of(n: int, batch_size: int, shuffle: bool) -> Loader:
    """n images, each known by its first pixel, which is also its label."""
    images = torch.zeros(n, 784, dtype=torch.uint8)
    images[:, 0] = torch.arange(n)
    return Loader(images, torch.arange(n), batch_size, shuffle, {})


def test_loader_keeps_the_uneven_last_batch():
    loader = loader_of(10, 4, shuffle=False)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [tuple(x.shape) for x, _ in batches] == [(4, 784), (4, 784), (2, 784)]
    assert all(x.dtype == torch.float32 and y.dtype == torch.int64 for x, y in batches)
    assert torch.cat([y for _, y in batches]).tolist() == list(range(10))
    assert len(list(loader_of(10, 5, False))) == len(loader_of(10, 5, False)) == 2
    assert [len(x) for x, _ in loader_of(10, 99, True)] == [10]


def test_shuffling_follows_the_seed_and_covers_every_image_once():
    def order(seed: int) -> list[int]:
        torch.manual_seed(seed)
        batches = list(loader_of(200, 7, shuffle=True))
        assert all(torch.equal(x[:, 0].long(), y) for x, y in batches)
        return torch.cat([y for _, y in batches]).tolist()

    assert order(0) == order(0) != order(1)
    assert order(0) != list(range(200)) == sorted(order(0))
    loader = loader_of(200, 7, shuffle=True)
    torch.manual_seed(0)
    first, second = ([y.tolist() for _, y in loader] for _ in range(2))
    assert first != second


@pytest.mark.parametrize('batch_size', [0, -3])
def test_batch_size_below_one_is_refused(batch_size: int):
    with pytest.raises(ValueError, match='batch_size'):
        loader_of(5, batch_size, False)


# Whole files


@pytest.mark.parametrize('where', ['MNIST/raw', 'MNIST', '.'])
@pytest.mark.parametrize('packed', [True, False])
def test_mnist_is_found_and_split(small: dict[str, bytes], tmp_path: Path, where: str,
                                  packed: bool):
    write(small, tmp_path / where, packed)
    loaders = mnist(tmp_path, batch_size=8, dataset='mnist')
    assert [tuple(loader.images.shape) for loader in loaders] == [(30, 784), (10, 784), (12, 784)]
    assert [loader.shuffle for loader in loaders] == [True, False, False]
    pixels, labels = small[TRAIN_X][16:], small[TRAIN_Y][8:]
    for loader, part in zip(loaders, (slice(30), slice(30, 40)), strict=False):
        assert loader.images.numpy().tobytes() == pixels[part.start and 30 * 784:part.stop * 784]
        assert loader.labels.tolist() == list(labels[part])
        assert loader.images.dtype == torch.uint8 and loader.labels.dtype == torch.int64
    assert loaders[2].images.numpy().tobytes() == small[TEST_X][16:]
    assert loaders[0].source['dataset'] == 'mnist'
    assert loaders[0].source['sha256'] == datasets.mnist.FILES
    json.dumps(loaders[0].source)


@pytest.mark.parametrize('where', ['BinarizedMNIST', '.'])
@pytest.mark.parametrize('packed', [True, False])
def test_binarised_mnist_is_found(small_bits: dict[str, np.ndarray], tmp_path: Path, where: str,
                                  packed: bool):
    write({name: amat(bits) for name, bits in small_bits.items()}, tmp_path / where, packed)
    loaders = bmnist(tmp_path, batch_size=4)
    for loader, bits in zip(loaders, small_bits.values(), strict=True):
        assert loader.images.tolist() == bits.tolist()
        assert loader.labels is None
    x = next(iter(loaders[1]))
    assert x.shape == (4, 784) and x.dtype == torch.float32
    expected = [hashlib.sha256(np.packbits(bits)).hexdigest() for bits in small_bits.values()]
    assert list(loaders[0].source['sha256'].values()) == expected
    assert 'distributed' in loaders[0].source['description']


@pytest.mark.parametrize('space, end', [(' ', '\n'), ('\t', '\t\n'), (' ', ' \r\n'),
                                        ('   ', ' \n\n'), (' ', '\r')])
def test_white_space_of_amat_files_may_vary(small_bits: dict[str, np.ndarray], tmp_path: Path,
                                            space: str, end: str):
    write({name: amat(bits, space, end).rstrip() for name, bits in small_bits.items()}, tmp_path)
    loaders = bmnist(tmp_path)
    assert [loader.images.tolist() for loader in loaders] == [
        bits.tolist() for bits in small_bits.values()]


@needs_real
def test_real_mnist(tmp_path: Path):
    loaders = mnist(REAL, dataset='mnist', download=False)
    assert [len(loader.images) for loader in loaders] == [50_000, 10_000, 10_000]
    assert loaders[2].labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert loaders[0].labels[:5].tolist() == [5, 0, 4, 1, 9]
    # The known mean of the 60,000 training images.
    total = sum(int(loader.images.sum(dtype=torch.int64)) for loader in loaders[:2])
    assert total / (60_000 * 784 * 255) == pytest.approx(0.1307, abs=5e-5)
    # One file unpacked, the others packed.
    shutil.copytree(REAL / 'MNIST', tmp_path / 'MNIST')
    packed = tmp_path / 'MNIST' / 'raw' / f'{TEST_X}.gz'
    packed.with_suffix('').write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert digest(mnist(tmp_path, dataset='mnist', download=False)) == digest(loaders)


@needs_real
def test_real_binarised_mnist():
    loaders = bmnist(REAL, dataset='mnist', download=False)
    assert [len(loader.images) for loader in loaders] == [50_000, 10_000, 10_000]
    assert loaders[0].source['sha256']['bits_test'].startswith('9fcd8da6f0fdf09b')
    assert torch.cat([x.unique() for x in loaders[2]]).unique().tolist() == [0., 1.]
    # The bits and MNIST's own images show the same digits, though in another order.
    assert loaders[2].images.float().mean() == pytest.approx(0.1325, abs=2e-3)


@needs_real
def test_mnist_is_binarised_where_the_distributed_files_are_absent(tmp_path: Path):
    (tmp_path / 'MNIST').symlink_to(REAL / 'MNIST')
    grey, bits = mnist(tmp_path, dataset='mnist'), bmnist(tmp_path, dataset='mnist')
    assert bits[0].labels is None and set(bits[1].images.unique().tolist()) == {0, 1}
    # A value that only this rule and seed give, on any machine and any version of numpy.
    assert bits[0].source['sha256']['bits_valid'] == (
        '9d33353f0c9f2212e72d58eb946fd8c74597122eaa1dd6875655865c97347262')
    images, ones = grey[1].images.flatten(), bits[1].images.flatten()
    for value in (1, 64, 128, 200, 254):
        share = ones[images == value].float()
        error = (value / 255 * (1 - value / 255) / len(share)) ** 0.5
        assert share.mean() == pytest.approx(value / 255, abs=4 * error)
    assert ones[images == 0].sum() == 0 and ones[images == 255].min() == 1


def test_binarising_is_bernoulli_of_x_over_255_and_fixed_by_its_seed():
    grey = np.repeat(np.arange(256, dtype=np.uint8), 20_000).reshape(256, -1)
    bits = binarise(grey, np.random.RandomState(3))
    p = np.arange(256) / 255
    error = np.sqrt(p * (1 - p) / grey.shape[1])
    assert (np.abs(bits.mean(1) - p) <= 5 * error).all()
    assert (bits == binarise(grey, np.random.RandomState(3))).all()
    assert (bits != binarise(grey, np.random.RandomState(4))).any()


# Broken files


def truncated(path: Path, small: dict[str, bytes]) -> str:
    path.write_bytes(path.read_bytes()[:-20])
    return 'expected a whole gzip file'


def not_gzip(path: Path, small: dict[str, bytes]) -> str:
    path.write_bytes(b'<!DOCTYPE html>\n<html>404</html>')
    return 'expected a whole gzip file'


def bit_flipped(path: Path, small: dict[str, bytes]) -> str:
    content = bytearray(small[TRAIN_X])
    content[1000] ^= 1
    path.write_bytes(gzip.compress(content))
    return f'expected sha256 {datasets.mnist.FILES[TRAIN_X]}, found '


def packed_bit_flipped(path: Path, small: dict[str, bytes]) -> str:
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2] ^= 4
    path.write_bytes(packed)
    return 'expected a'


def swapped(path: Path, small: dict[str, bytes]) -> str:
    path.write_bytes(gzip.compress(small[TEST_Y]))
    return f'the content of {TEST_Y}'


def empty(path: Path, small: dict[str, bytes]) -> str:
    path.write_bytes(b'')
    return 'expected'


def folder(path: Path, small: dict[str, bytes]) -> str:
    path.unlink()
    path.mkdir()
    return 'Is a directory'


def dangling_link(path: Path, small: dict[str, bytes]) -> str:
    path.unlink()
    path.symlink_to('nowhere')
    return 'No such file'


@pytest.mark.parametrize('dataset', [None, 'mnist'])
@pytest.mark.parametrize('breakage', [truncated, not_gzip, bit_flipped, packed_bit_flipped,
                                      swapped, empty, folder, dangling_link])
def test_broken_mnist_file_is_named_in_one_line(small, tmp_path, breakage, dataset):
    write(small, tmp_path / 'MNIST' / 'raw')
    path = tmp_path / 'MNIST' / 'raw' / f'{TRAIN_X}.gz'
    expected = breakage(path, small)
    before = tree(tmp_path)
    for load in (mnist, bmnist):
        with pytest.raises(DataError) as error:
            load(tmp_path, dataset=dataset)
        assert str(path) in str(error.value) and expected in str(error.value)
        assert '\n' not in str(error.value)
    assert tree(tmp_path) == before


@contextlib.contextmanager
def ordinary_user():
    """Nobody's rights within, for root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that any user reaches, which pytest's own is not."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for inner in (path, *path.rglob('*')):
        inner.chmod(0o755)
    shutil.rmtree(path)


@pytest.mark.parametrize('unreadable', [f'MNIST/raw/{TEST_X}.gz', 'MNIST/raw'])
def test_unreadable_file_or_folder_is_named_in_one_line(small, open_folder, unreadable):
    write(small, open_folder / 'MNIST' / 'raw')
    (open_folder / unreadable).chmod(0)
    with ordinary_user(), pytest.raises(DataError) as error:
        mnist(open_folder)
    assert str(open_folder / unreadable) in str(error.value)
    assert 'Permission denied' in str(error.value) and '\n' not in str(error.value)


def too_few_rows(bits: np.ndarray) -> tuple[bytes, str]:
    return amat(bits[:-1]), 'expected 4 rows, found 3'


def too_few_columns(bits: np.ndarray) -> tuple[bytes, str]:
    lines = amat(bits).splitlines(keepends=True)
    lines[2] = lines[2][2:]
    return b''.join(lines), 'expected 784 columns, found 783 in line 3'


def misplaced_line_end(bits: np.ndarray) -> tuple[bytes, str]:
    return amat(bits).replace(b' \n', b' ', 1), 'expected 784 columns, found 1568 in line 1'


def other_value(bits: np.ndarray) -> tuple[bytes, str]:
    return b'2' + amat(bits)[1:], "expected only the values 0 and 1, found b'2'"


def touching_values(bits: np.ndarray) -> tuple[bytes, str]:
    text = amat(bits)
    return text[:1] + text[2:], 'digits that touch'


def web_page(bits: np.ndarray) -> tuple[bytes, str]:
    return b'<html>\n404\n</html>', 'expected only the values 0 and 1'


def nothing(bits: np.ndarray) -> tuple[bytes, str]:
    return b'', 'expected 4 rows, found 0'


@pytest.mark.parametrize('breakage', [too_few_rows, too_few_columns, misplaced_line_end,
                                      other_value, touching_values, web_page, nothing])
def test_broken_amat_file_is_named_in_one_line(small_bits, tmp_path, breakage):
    write({name: amat(bits) for name, bits in small_bits.items()}, tmp_path, packed=False)
    path = tmp_path / 'binarized_mnist_valid.amat'
    content, expected = breakage(small_bits[path.name])
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        bmnist(tmp_path)
    assert str(path) in str(error.value) and expected in str(error.value)
    assert '\n' not in str(error.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize('dataset', [None, 'mnist'])
def test_part_of_a_set_is_never_replaced_by_another(small, small_bits, tmp_path, dataset):
    write(small, tmp_path)
    (tmp_path / f'{TEST_Y}.gz').unlink()
    with pytest.raises(DataError, match=f'put {TEST_Y} ') as error:
        mnist(tmp_path, dataset=dataset)
    assert '\n' not in str(error.value)
    write(small, tmp_path)
    write({name: amat(bits) for name, bits in small_bits.items()}, tmp_path)
    (tmp_path / 'binarized_mnist_test.amat.gz').unlink()
    with pytest.raises(DataError, match=r'put binarized_mnist_test.amat .*http'):
        bmnist(tmp_path, dataset=dataset)


# Network


class Server:
    """A mirror on this machine that answers each path from `files`, or breaks as told."""

    def __init__(self, files: dict[str, bytes], promised: int = 0, together: int = 1):
        self.requests = []
        together = threading.Barrier(together)  # this many clients wait for one another

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):  # noqa: N805 - self is the server here
                self.requests.append(handler.path)
                if handler.path.startswith(f'/{TRAIN_X}'):
                    together.wait(60)
                body = files.get(handler.path, b'<html>not here</html>')
                handler.send_response(200)
                handler.send_header('Content-Length', str(len(body) + promised))
                handler.end_headers()
                handler.wfile.write(body)

            def log_message(handler, *args):  # noqa: N805
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.address = f'http://127.0.0.1:{self.server.server_port}/'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> 'Server':
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()


def packed(contents: dict[str, bytes]) -> dict[str, bytes]:
    return {f'/{name}.gz': gzip.compress(content) for name, content in contents.items()}


def test_download_takes_the_mirror_that_works_and_stays_quiet(small, tmp_path, monkeypatch, capfd):
    with Server({}) as web_pages, Server(packed(small)) as good:
        monkeypatch.setattr(datasets.mnist, 'MIRRORS',
                            [NO_NETWORK, web_pages.address, good.address])
        socket.setdefaulttimeout(77)
        try:
            loaders = mnist(tmp_path / 'new', dataset='mnist')
            assert socket.getdefaulttimeout() == 77
        finally:
            socket.setdefaulttimeout(None)
        assert [len(loader.images) for loader in loaders] == [30, 10, 12]
        assert web_pages.requests and good.requests
        good.requests.clear()
        mnist(tmp_path / 'new', dataset='mnist')
        assert not good.requests
    assert set(tree(tmp_path)) == {'new', 'new/MNIST', 'new/MNIST/raw',
                                   *(f'new/MNIST/raw/{name}.gz' for name in small)}
    out, err = capfd.readouterr()
    assert 'http' not in out + err and '%' not in out + err


def test_only_missing_files_are_downloaded(small, tmp_path, monkeypatch):
    write(small, tmp_path)
    (tmp_path / f'{TEST_X}.gz').unlink()
    before = tree(tmp_path)
    with Server(packed(small)) as server:
        monkeypatch.setattr(datasets.mnist, 'MIRRORS', [server.address])
        assert len(mnist(tmp_path)[2].images) == 12
        assert set(server.requests) == {f'/{TEST_X}.gz'}
    assert before.items() <= tree(tmp_path).items()


@pytest.mark.parametrize('how', ['web page', 'cut off', 'dies half way', 'swapped'])
def test_broken_download_leaves_nothing_behind(small, tmp_path, monkeypatch, how):
    files = packed(small)
    last = f'/{TEST_Y}.gz'
    files[last] = {'web page': b'<html>log in first</html>', 'cut off': files[last][:-9],
                   'dies half way': files[last][:-9], 'swapped': files[f'/{TEST_X}.gz']}[how]
    with Server(files, promised=9 if how == 'dies half way' else 0) as server:
        monkeypatch.setattr(datasets.mnist, 'MIRRORS', [server.address])
        with pytest.raises(DataError) as error:
            mnist(tmp_path / 'new', dataset='mnist')
    assert server.address in str(error.value) and '\n' not in str(error.value)
    assert tree(tmp_path) == {}


def test_server_that_never_answers_costs_seconds(small, tmp_path, monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as silent:
        monkeypatch.setattr(datasets.mnist, 'MIRRORS',
                            [f'http://127.0.0.1:{silent.getsockname()[1]}/'])
        import torchvision  # noqa: F401 - its import is not what is timed
        start = time.monotonic()
        with pytest.raises(DataError, match='timed out'):
            mnist(tmp_path, dataset='mnist')
        assert time.monotonic() - start < 5
    assert tree(tmp_path) == {}


def test_network_that_swallows_packets_costs_no_more_than_the_probe(monkeypatch):
    monkeypatch.setattr(datasets.common, 'PROBE_SECONDS', 0.5)
    with socket.socket() as full, contextlib.ExitStack() as clients:
        full.bind(('127.0.0.1', 0))
        full.listen(0)
        for _ in range(4):  # once the queue is full, the kernel drops what asks for more
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        mirrors = [f'http://127.0.0.1:{full.getsockname()[1]}/{i}' for i in range(5)]
        start = time.monotonic()
        assert list(answering(mirrors)) == []
        assert 0.4 < time.monotonic() - start < 2


def test_name_server_that_swallows_packets_costs_no_more_than_the_probe(monkeypatch):
    monkeypatch.setattr(datasets.common, 'PROBE_SECONDS', 0.5)
    over = threading.Event()

    def look_up(*args, **kwargs):
        over.wait(30)
        raise socket.gaierror('no name server')

    monkeypatch.setattr(socket, 'getaddrinfo', look_up)
    start = time.monotonic()
    assert list(answering(['https://a.example/', 'https://b.example/'])) == []
    assert time.monotonic() - start < 2
    over.set()


def test_probe_asks_the_proxy_where_one_is_set(monkeypatch):
    assert server_of('https://a.example/mnist/') == ('a.example', 443)
    assert server_of('http://a.example:81/') == ('a.example', 81)
    monkeypatch.setenv('https_proxy', 'http://user:secret@proxy.example:3128')
    assert server_of('https://a.example/mnist/') == ('proxy.example', 3128)
    monkeypatch.setenv('https_proxy', 'proxy.example:3129')
    assert server_of('https://a.example/mnist/') == ('proxy.example', 3129)
    monkeypatch.setenv('no_proxy', 'a.example')
    assert server_of('https://a.example/mnist/') == ('a.example', 443)
    monkeypatch.delenv('no_proxy')
    monkeypatch.setenv('https_proxy', 'http://proxy.example:not-a-port')
    assert list(answering(['https://a.example/'])) == []


def test_two_processes_may_download_at_once(small, tmp_path, monkeypatch):
    script = ('import json, sys; import datasets.mnist as m; files, m.MIRRORS = '
              'json.loads(sys.argv[1]); m.FILES.update(files); m.N_VALIDATION = 10; '
              "print([len(loader.images) for loader in m.mnist(sys.argv[2], dataset='mnist')])")
    # The server holds this process's request until the other one, slow to start, has asked too.
    monkeypatch.setattr(datasets.common, 'SILENCE_SECONDS', 60.)
    with Server(packed(small), together=2) as server:
        monkeypatch.setattr(datasets.mnist, 'MIRRORS', [server.address])
        told = json.dumps([datasets.mnist.FILES, [server.address]])
        with subprocess.Popen([sys.executable, '-c', script, told, str(tmp_path)], cwd=CODE,
                              stdout=subprocess.PIPE, text=True) as other:
            loaders = mnist(tmp_path, dataset='mnist')
            assert [len(loader.images) for loader in loaders] == [30, 10, 12]
            assert other.communicate(timeout=60)[0] == '[30, 10, 12]\n'
        assert server.requests.count(f'/{TRAIN_X}.gz') >= 2
    assert set(tree(tmp_path)) == {'MNIST', 'MNIST/raw',
                                   *(f'MNIST/raw/{name}.gz' for name in small)}


@pytest.mark.parametrize('download', [True, False])
def test_mnist_not_to_be_had_says_what_to_put_where(tmp_path, download, capfd):
    for load in (mnist, bmnist):
        with pytest.raises(DataError) as error:
            load(tmp_path, download=download, dataset='mnist')
        told = str(error.value)
        assert all(name in told for name in datasets.mnist.FILES)
        assert str(tmp_path / 'MNIST' / 'raw') in told and NO_NETWORK in told
        assert '\n' not in told
    assert tree(tmp_path) == {} and capfd.readouterr() == ('', '')


def test_file_in_place_of_the_folder(tmp_path, monkeypatch, small):
    (tmp_path / 'MNIST').write_text('')
    with Server(packed(small)) as server:
        monkeypatch.setattr(datasets.mnist, 'MIRRORS', [server.address])
        with pytest.raises(DataError, match='MNIST'):
            mnist(tmp_path, dataset='mnist')
    assert tree(tmp_path) == {'MNIST': b''}


def test_unknown_data_set_is_refused(tmp_path):
    for load in (mnist, bmnist):
        with pytest.raises(ValueError, match='cifar'):
            load(tmp_path, dataset='cifar')


# The digits that ship with the project


@pytest.fixture(scope='module')
def digits() -> tuple[Loader, ...]:
    return mnist('nowhere', batch_size=512, dataset='digits')


def test_digits_look_like_mnist_to_the_scripts(digits):
    assert [tuple(loader.images.shape) for loader in digits] == [
        (50_000, 784), (10_000, 784), (10_000, 784)]
    for loader in digits:
        assert loader.images.dtype == torch.uint8 and loader.images.max() == 255
        assert np.bincount(loader.labels, minlength=10) / len(loader.labels) == pytest.approx(
            0.1, abs=0.01)
        # Mostly black, with strokes about as bright and thick as MNIST's, whose mean is 0.13.
        assert loader.images.float().mean() / 255 == pytest.approx(0.13, abs=0.02)
        assert (loader.images == 0).float().mean() > 0.7
        # Drawn in the middle: the outermost frame is all but empty.
        frame = loader.images.view(-1, 28, 28)[:, [0, 27]]
        assert (frame > 127).float().mean() < 0.01
    assert digits[0].source['dataset'] == 'digits'
    found = hashlib.sha256(datasets.digits.FILE.read_bytes()).hexdigest()
    assert digits[0].source['sha256'] == {'digits.npz': found}
    assert datasets.digits.FILE.stat().st_size < 200_000


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer copies of each original, for tests to which their number is nothing."""
    monkeypatch.setattr(datasets.digits, 'SIZES', (3500, 700, 700))


def test_digits_are_the_same_each_time_and_no_copy_repeats(few_digits):
    first = mnist('nowhere', dataset='digits')
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert digest(mnist('nowhere', dataset='digits')) == digest(first)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first[0].images.unique(dim=0)) == 3500


def test_no_digit_is_in_two_splits(few_digits, monkeypatch):
    for change in ('TURN', 'STRETCH', 'SHEAR', 'SHIFT'):
        monkeypatch.setattr(datasets.digits, change, 0.)
    splits, _ = datasets.digits.load_digits()
    # Without changes, copies of one original are equal: they tell which originals a split uses.
    sets = [{image.tobytes() for image in images} for images, _ in splits]
    assert [len(used) for used in sets] == pytest.approx([1283, 257, 257], abs=5)
    assert sum(len(used) for used in sets) == len(set().union(*sets)) == 1797


def test_digits_are_binarised_by_the_same_rule(few_digits):
    grey, bits = (load('nowhere', dataset='digits') for load in (mnist, bmnist))
    expected = binarise(grey[0].images.numpy(), np.random.RandomState(datasets.bmnist.SEED))
    assert (bits[0].images.numpy() == expected).all()
    assert bits[0].labels is None and bits[0].source['dataset'] == 'digits'


def test_falling_back_to_digits_takes_two_lines(tmp_path, capfd, monkeypatch):
    stand_in = [(np.zeros((2, 784), np.uint8), np.zeros(2, np.uint8))] * 3, {'dataset': 'digits'}
    monkeypatch.setattr(datasets.mnist, 'load_digits', lambda: stand_in)
    assert mnist(tmp_path)[0].source['dataset'] == 'digits'
    out, err = capfd.readouterr()
    assert out == '' and len(err.splitlines()) == 2
    assert str(tmp_path) in err and '127.0.0.1' in err and 'digits' in err
    mnist(tmp_path, dataset='digits')
    assert capfd.readouterr() == ('', '')
    assert tree(tmp_path) == {}


def test_damaged_digits_are_refused(tmp_path, monkeypatch):
    damaged = tmp_path / 'digits.npz'
    damaged.write_bytes(datasets.digits.FILE.read_bytes()[:-1])
    monkeypatch.setattr(datasets.digits, 'FILE', damaged)
    with pytest.raises(DataError, match='expected sha256'):
        mnist(tmp_path, dataset='digits')
