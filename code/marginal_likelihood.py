"""Estimates of log p(x), the marginal likelihood of images under a VAE, in nats.

A VAE has an `encoder`, which gives the mean and standard deviation of q(z|x), a `decoder`, whose
method `log_likelihood(x, z)` gives log p(x|z), and the prior N(0, I).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 4096  # codes decoded at once, which bounds the memory


def gaussian_log_density(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(z; μ, diag σ²), in nats. Shapes: each (..., D), broadcast together, to (...)."""
    return -(0.5 * ((z - mean) / std).square() + std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


def prior_log_density(z: Tensor) -> Tensor:
    """log N(z; 0, I), in nats. Shapes: (..., D) to (...)."""
    return gaussian_log_density(z, torch.zeros_like(z), torch.ones_like(z))


def importance_log_weights(vae: nn.Module, x: Tensor, n: int, widths: tuple[float, ...] = (1.,)
                           ) -> Tensor:
    """log w_k = log p(x|z_k) p(z_k) / r(z_k), z_k ~ r: the mean of w_k is p(x) in expectation.

    The proposal r is an equal mixture of N(μ, (width σ)²), of which q(z|x) has the width 1.
    Shapes: (B, 784) to (n, B).
    """
    (mean, std), step = vae.encoder(x), max(1, ROWS // len(x))
    log_w = mean.new_empty(n, len(x))  # lists of small tensors among large ones fragment the heap
    for start in range(0, n, step):
        rows = log_w[start:start + step]
        shape = len(rows), *mean.shape
        width = mean.new_tensor(widths)[torch.randint(len(widths), (*shape[:2], 1))]
        z = torch.normal(mean.expand(shape), width * std)
        log_r = torch.stack([gaussian_log_density(z, mean, width * std) for width in widths])
        rows[:] = (vae.decoder.log_likelihood(x, z) + prior_log_density(z)
                   - log_r.logsumexp(0) + math.log(len(widths)))
    return log_w


@torch.no_grad()
def importance_sampled_log_px(vae: nn.Module, x: Tensor, n: int, bf16: bool = False) -> Tensor:
    """log p(x) ≈ log 1/n Σ_k p(x|z_k) p(z_k) / r(z_k), z_k ~ r. Shapes: (B, 784) to (B,).

    In expectation a lower bound that rises with n to log p(x) (Burda et al., Importance Weighted
    Autoencoders, ICLR 2016, theorem 1). With fewer than ten latent dimensions, where q(z|x) misses
    some of the posterior, half of the samples are from a Gaussian thrice as wide. With `bf16` the
    networks compute in bfloat16; then rounding can move the average to either side.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        log_w = importance_log_weights(vae, x, n, (1., 3.) if vae.z_dim < 10 else (1.,))
    return log_w.logsumexp(0) - math.log(n)


def bernoulli_log_likelihoods(vae: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    """log p(x|z) of all pairs, by a matrix product: bits (B, 784) and codes (N, D) to (N, B)."""
    logits = vae.decoder.net(z)
    return logits @ x.T + F.logsigmoid(-logits).sum(-1, keepdim=True)


@torch.no_grad()
def log_px_on_lattice(vae: nn.Module, x: Tensor, steps: int = 400) -> Tensor:
    """log ∫ p(x|z) p(z) dz over [−6, 6]², by the trapezoidal rule. Shapes: (B, 784) to (B,).

    For two latent dimensions and Bernoulli pixels. A lattice even in Φ(z) would be too coarse in
    the tails of the prior, where some images have their codes.
    """
    axis = torch.linspace(-6, 6, steps, device=x.device, dtype=x.dtype)
    log_sum = torch.full_like(x[:, 0], -math.inf)
    for z in torch.cartesian_prod(axis, axis).split(ROWS):
        log_joint = bernoulli_log_likelihoods(vae, x, z) + prior_log_density(z)[:, None]
        log_sum = torch.logaddexp(log_sum, log_joint.logsumexp(0))
    return log_sum + 2 * math.log(12 / (steps - 1))
