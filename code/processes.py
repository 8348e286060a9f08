"""Several processes that train one model, started by torch's own launcher:

    torchrun --nproc_per_node=2 -- code/a3_vae.py --zdim 20

They begin with the same weights and draw the same permutation of the training images. Of each
batch every process takes its share (`Loader.part`), with noise of its own, and their gradients are
averaged, so that each step is that of the whole batch (but for batch normalisation, where a
network has any: its statistics are those of a share). All else is done by process 0 alone: it
finds the data, resumes, prints, evaluates and writes. A script that torchrun did not start is
process 0 of 1, and then nothing here does anything.
"""

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SIZE, RANK, LOCAL_RANK, LOCAL_SIZE, MACHINES = (
    int(os.environ[name]) if dist.is_torchelastic_launched() else default for name, default in (
        ('WORLD_SIZE', 1), ('RANK', 0), ('LOCAL_RANK', 0), ('LOCAL_WORLD_SIZE', 1),
        ('GROUP_WORLD_SIZE', 1)))
PATIENCE = timedelta(days=1)  # the others wait while process 0 evaluates; torchrun sees a death
_alone = False


class Lost(Exception):
    """The processes cannot go on together, most often because one of them has ended."""


def rank() -> int:
    """The number of this process, from 0."""
    return 0 if _alone else RANK


def size() -> int:
    """The number of processes."""
    return 1 if _alone else SIZE


def launcher() -> str:
    """The words before the script's name in the command that starts all of them: without `--`,
    torchrun takes --run for an option of its own."""
    machines = f'--nnodes={MACHINES} (and its rendezvous) ' * (MACHINES > 1)
    return 'python' if SIZE == 1 else f'torchrun {machines}--nproc_per_node={LOCAL_SIZE} --'


def own_device(name: str) -> str:
    """The device that this process is to use where `--device` says `name`: each has its own GPU,
    and what several processes cannot share is no choice of `auto`."""
    if size() == 1 or name == 'cpu':
        return name
    if name not in ('auto', 'cuda'):
        raise ValueError('several processes need --device auto, cpu or cuda')
    return f'cuda:{LOCAL_RANK}' if name == 'cuda' or torch.cuda.is_available() else 'cpu'


def join(device: torch.device) -> None:
    """Meet the other processes: they talk through nccl on GPUs, through gloo on processors."""
    if size() == 1:
        return
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    with together():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=PATIENCE)


def leave(status: int) -> None:
    """Part from the other processes. One that has failed ends here, since to part in peace it
    would wait for others, which may be waiting for it."""
    if SIZE == 1:
        return
    if not status:
        dist.destroy_process_group()
        return
    if sys.exc_info()[0]:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def let_the_first_speak() -> None:
    """Wait, in other processes than the first, before an error is printed: if the first has met it
    too, it says so, and torchrun has ended this process before the time is up."""
    if rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes must reach. Raises Lost if one of them does not."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(f'cannot go on together ({str(error).splitlines()[0]})') from error


def first(function: Callable[[], Any]) -> Any:
    """What the function returns in process 0, which alone calls it, as if it were the only one.

    The others get a copy, its tensors on their own devices.
    """
    global _alone
    if size() == 1:
        return function()
    result, packed = None, io.BytesIO()
    if RANK == 0:
        _alone = True
        try:
            result = function()
        finally:
            _alone = False
        torch.save(result, packed)
    sent = [packed.getvalue()]
    with together():
        dist.broadcast_object_list(sent)
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    return torch.load(io.BytesIO(sent[0]), device, weights_only=False) if RANK else result


def average_gradients(weights: Iterable[Tensor], images: int) -> None:
    """Replace the gradient of each weight by its average over the processes, each of which counts
    as many times as it has images in this batch."""
    if size() == 1:
        return
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    ones = gradients[0].new_ones(1)
    flat = images * torch.cat([*(gradient.flatten() for gradient in gradients), ones])
    with together():
        dist.all_reduce(flat)
    average = (flat[:-1] / flat[-1]).split([gradient.numel() for gradient in gradients])
    for gradient, values in zip(gradients, average, strict=True):
        gradient.copy_(values.view_as(gradient))


def add_up(*totals: Tensor | float) -> tuple[Tensor, ...]:
    """Each of these tensors or numbers, summed over the processes."""
    if size() == 1:
        return totals
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    totals = [torch.as_tensor(total, device=device).clone() for total in totals]
    with together():
        for total in totals:
            dist.all_reduce(total)
    return tuple(totals)
