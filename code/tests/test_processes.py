"""Several processes do what one does: started by torchrun, two at a time, which talk through gloo.

As a script, which torchrun starts, this file trains each model for twenty steps and saves it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import a3_gan
import a3_nf
import a3_vae
import processes
from datasets.common import Loader
from helpers import CODE, read_csv

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
            '--']
SHORT = ('--dataset', 'digits', '--hidden_dim', 8, '--batch_size', 5000, '--epochs', 4,
         '--iw_samples', 1, '--device', 'cpu', '--precision', 'fp32')


def torchrun(script: Path, *words: object) -> subprocess.CompletedProcess:
    """`torchrun --nproc_per_node=2 <script>`, to its end."""
    return subprocess.run([*TORCHRUN, script, *map(str, words)], text=True, capture_output=True,
                          timeout=300, env=os.environ | {'PYTHONPATH': str(CODE)})


def said(done: subprocess.CompletedProcess) -> list[str]:
    """The lines of the script, as opposed to those of torchrun."""
    return [line for line in done.stderr.splitlines() if line.startswith('a3_')]


def shared_loader() -> Loader:
    """Twenty batches of random images, the last of which is smaller, and shared as two and three.
    """
    images = torch.randint(256, (157, 784), dtype=torch.uint8)
    loader = Loader(images, torch.zeros(157), 8, shuffle=True, source={})
    loader.part = processes.rank(), processes.size()
    return loader


def trained() -> dict[str, dict]:
    """Weights and epoch averages of each model after twenty steps, in float64 and without noise.
    """
    torch.set_default_dtype(torch.float64)
    torch.rand_like = torch.randn_like = lambda like: torch.full_like(like, 0.5)
    randn, done = torch.randn, {}

    def sgd(network: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
        return torch.optim.SGD(network.parameters(), lr, momentum=0.9)

    def images(scale: float) -> list[Tensor]:
        torch.manual_seed(1)
        return [scale * x.double() for x, _ in shared_loader()]

    torch.manual_seed(0)
    models = {'vae': a3_vae.VAE(32, 4, 3), 'mlp': a3_nf.Model([784], a3_nf.Flow([784], 1, 16)),
              'flow': a3_nf.Model([784], a3_nf.AutoregressiveFlow(8, 1, 4))}
    generator, discriminator = a3_gan.Generator(8), a3_gan.Discriminator()
    for name, model in models.items():
        data = images(1 / 255) if name == 'vae' else [(x, None) for x in images(1.)]
        epoch_iter = a3_vae.epoch_iter if name == 'vae' else a3_nf.epoch_iter
        done[name] = {'average': epoch_iter(model.train(), data, sgd(model)),
                      **model.state_dict()}
    torch.randn = lambda *size, device: torch.ones(size)
    average = a3_gan.train(images(1 / 255), discriminator, generator, sgd(generator, 1e-3),
                           sgd(discriminator, 1e-3), penalty=0.5)
    torch.randn = randn
    done['gan'] = {**average, **{f'{network.__class__.__name__} {name}': weight for network in (
        generator, discriminator) for name, weight in network.named_parameters()}}
    return done


def test_twenty_steps_of_two_processes_are_those_of_one(tmp_path):
    done = torchrun(Path(__file__), tmp_path)
    assert done.returncode == 0, done.stderr
    subprocess.run([sys.executable, __file__, tmp_path], env=os.environ | {
        'PYTHONPATH': str(CODE)}, check=True, timeout=300)
    alone, *both = (torch.load(tmp_path / name) for name in ('0_of_1', '0_of_2', '1_of_2'))
    for together in both:
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_each_process_has_its_share_and_a_batch_too_small_to_share_goes_to_all():
    shares, noise = [], []
    for rank in range(3):
        torch.manual_seed(5)
        loader = Loader(torch.arange(27).view(-1, 1), None, 11, shuffle=True, source={})
        loader.part = rank, 3
        shares.append([batch.flatten().tolist() for batch in loader])
        noise.append(torch.rand(1).item())
    assert len(set(noise)) == 3
    torch.manual_seed(5)
    order = [float(n) for n in torch.randperm(27)]
    assert [sum(parts, []) for parts in list(zip(*shares, strict=True))[:2]] == [
        order[:11], order[11:22]]
    assert [len(share[0]) for share in shares] == [4, 4, 3]
    assert [share[2] for share in shares] == [order[22:]] * 3


@pytest.mark.slow
@pytest.mark.parametrize('script', ['a3_vae.py', 'a3_ae.py', 'a3_gan.py', 'a3_nf.py'])
def test_two_processes_leave_one_run_and_one_log(script, tmp_path):
    done = torchrun(CODE / script, '--dry_run', '--dataset', 'digits')
    assert done.returncode == 0 and said(done) == []
    [folder] = [line.split()[2].rstrip(':') for line in done.stdout.splitlines()
                if line.startswith('files in ')]
    assert [row['epoch'] for row in read_csv(Path(folder) / 'log.csv')] == ['0', '1', '2']
    assert json.loads((Path(folder) / 'config.json').read_text())['processes'] == 2


@pytest.mark.slow
@pytest.mark.parametrize('words, line', [
    (('a3_gan.py', '--batch_size', 3), '--batch_size 3 is less than two images for each of 2'),
    (('a3_gan.py', '--zdim', 3), 'unknown flag --zdim'),
    (('a3_gan.py', '--device', 'mps'), 'several processes need --device auto, cpu or cuda'),
    (('a3_vae.py', '--sample', 3), 'this trains nothing'),
    (('a3_compare.py',), 'this trains nothing')])
def test_what_two_processes_cannot_do_is_one_line(words, line):
    done = torchrun(CODE / words[0], *words[1:])
    assert done.returncode and len(said(done)) == 1 and line in said(done)[0]


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_and_resuming_it_ends_as_if_it_had_not(
        tmp_path, read_run):
    words = [CODE / 'a3_vae.py', *map(str, SHORT), '--results_dir', tmp_path]
    assert torchrun(*words, '--run', 'straight').returncode == 0
    run = subprocess.Popen([*TORCHRUN, *words, '--run', 'killed'], text=True,
                           stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    log = tmp_path / 'killed' / 'log.csv'
    started = time.monotonic()
    while not log.is_file() or len(read_csv(log)) < 3:
        time.sleep(0.01)
        assert time.monotonic() < started + 120
    children = subprocess.check_output(['pgrep', '-P', str(run.pid)], text=True).split()
    [second] = [child for child in children
                if b'\0RANK=1\0' in Path(f'/proc/{child}/environ').read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    _, stderr = run.communicate(timeout=60)
    assert 'command_line.py' not in stderr  # as it would be in a traceback
    [line] = [line for line in stderr.splitlines() if line.startswith('a3_vae.py: ')]
    _, typed = line.split('; go on with: torchrun --nproc_per_node=2 -- ')
    alone = subprocess.run([sys.executable, *shlex.split(typed)], text=True, capture_output=True)
    assert alone.returncode == 2 and 'processes was 2, is now 1' in alone.stderr
    assert 'going on after epoch' in torchrun(*shlex.split(typed)).stdout
    assert read_run(tmp_path / 'killed') == read_run(tmp_path / 'straight')


def main(folder: Path) -> None:
    if processes.SIZE > 1:
        processes.join(torch.device('cpu'))
    torch.save(trained(), folder / f'{processes.rank()}_of_{processes.size()}')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
