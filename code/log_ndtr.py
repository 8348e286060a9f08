"""log Φ, as `torch.special.log_ndtr`, of operations that every device has."""

import math

import torch
from torch import Tensor

# The highest power first: see `LogNdtr`.
P = (0.1368375, -0.7340828, 1.5048863, -1.3651963, 0.4742841, -0.2156642, 0.1363625, 0.3869171,
     1.0000597, -2.0175511)


class LogNdtr(torch.autograd.Function):
    """For t ≥ 0, log Φ(t) = log(1 + erf(t/√2)) − log 2.

    For t < 0, with s = 1 / (1 − t/3), log Φ(t) = −t²/2 + log s + P(s): what is left to P is smooth
    from s = 1, where t = 0, to s = 0, and P is its Chebyshev interpolation there.
    """

    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        left, right = (-t).relu(), t.clamp(0, 9)  # beyond 9 nothing is left, even of the slope
        s = 1 / (1 + left / 3)
        rest = torch.zeros_like(t)
        for coefficient in P:
            rest = rest.mul_(s).add_(coefficient)
        rest += s.log() + torch.log1p(torch.erf(right * math.sqrt(0.5)))
        ctx.save_for_backward(right, rest)
        return rest - 0.5 * left.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        right, rest = ctx.saved_tensors  # φ(t) / Φ(t), where exp(−t²/2) cancels for t < 0
        return grad * (-0.5 * math.log(2 * math.pi) - rest - 0.5 * right.square()).exp()


def log_ndtr(t: Tensor) -> Tensor:
    """log Φ(t) of each element, with the gradient φ(t) / Φ(t), to 1e-6 (relative below −1)."""
    return LogNdtr.apply(t)
