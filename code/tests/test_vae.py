"""The VAE: its mathematics against independent oracles, its modules and loops, and the script."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, distributions, nn

import a3_vae
import figures
from a3_vae import (PIXELS, VAE, discretised_logistic_log_likelihood, gaussian_kl, manifold_grid,
                    parse_args, prepared)
from conftest import FEWER_DIGITS
from datasets import digits
from datasets.mnist import mnist
from helpers import assert_one_line, read_csv
from marginal_likelihood import (gaussian_log_density, importance_log_weights,
                                 importance_sampled_log_px, log_px_on_lattice)

both_likelihoods = pytest.mark.parametrize('likelihood', ['bernoulli', 'logistic'])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (random(*shape, seed=seed) > 0.3).to(dtype)


def off_by_errors(samples: Tensor, expected: Tensor | float) -> float:
    """How many standard errors the mean of the samples (along the first axis) is off, at most."""
    error = samples.std(0) / math.sqrt(len(samples))
    return float(((samples.mean(0) - expected) / error).abs().max())


def test_densities_and_divergence_are_those_of_torch_distributions():
    z, mean, std = 3 * random(9, 4, 6), random(4, 6, seed=1), random(4, 6, seed=2).exp()
    normal, prior = distributions.Normal(mean, std), distributions.Normal(0 * mean, 1.)
    torch.testing.assert_close(gaussian_log_density(z, mean, std),
                               normal.log_prob(z).sum(-1))
    torch.testing.assert_close(gaussian_kl(mean, std),
                               distributions.kl_divergence(normal, prior).sum(-1))
    x, logits = bits(3, 1, 8), 5 * random(5, 8, seed=1)
    torch.testing.assert_close(a3_vae.bernoulli_log_likelihood(x, logits),
                               distributions.Bernoulli(logits=logits).log_prob(x).sum(-1))
    extremes = torch.tensor([[1e4], [-1e4]])  # where the sigmoid is 0 or 1
    assert a3_vae.bernoulli_log_likelihood(torch.tensor([1.]), extremes).tolist() == [0, -1e4]


def exact_log_likelihood(k: int, mean: float, scale: float) -> mpmath.mpf:
    """log p(k) of a grey value, from its definition, with as many digits as mpmath works with."""
    low, high = (-mpmath.inf if k == 0 else k - 0.5), (mpmath.inf if k == 255 else k + 0.5)
    below, above = (1 / (1 + mpmath.exp((255 * mpmath.mpf(mean) - edge) / (255 * scale)))
                    for edge in (low, high))
    return mpmath.log(above - below)


def test_grey_levels_have_exact_likelihoods_and_gradients_in_float32():
    generator = torch.Generator().manual_seed(1)
    k = torch.randint(256, (400,), generator=generator)
    k[:80], k[80:160] = 0, 255
    mean = torch.rand(400, generator=generator) * 3 - 1
    mean[::2] = k[::2] / 255 + torch.randn(200, generator=generator) / 100
    scale = (torch.rand(400, generator=generator) * 9 - 7).exp()  # wider than LOG_SCALE
    mean.requires_grad_(), scale.requires_grad_()
    pixels = discretised_logistic_log_likelihood(k[:, None] / 255, mean[:, None], scale[:, None])
    pixels.sum().backward()
    with mpmath.workdps(2000):
        numbers = list(zip(k.tolist(), mean.tolist(), scale.tolist(), strict=True))
        exact = [exact_log_likelihood(*row) for row in numbers]
        slopes = [[mpmath.diff(exact_log_likelihood, row, order, h=mpmath.mpf(10) ** -20)
                   for order in ((0, 1, 0), (0, 0, 1))] for row in numbers[::5]]
    torch.testing.assert_close(pixels, torch.tensor([*map(float, exact)]), rtol=1e-4, atol=1e-4)
    expected = torch.tensor([[float(slope) for slope in pair] for pair in slopes])
    torch.testing.assert_close(torch.stack([mean.grad, scale.grad], 1)[::5], expected, rtol=1e-3,
                               atol=1e-3)


@pytest.mark.parametrize('x', [0., 100 / 255, 1.])
@pytest.mark.parametrize('mean', [-1e9, -3., 0., 0.5, 1., 4., 1e9])
@pytest.mark.parametrize('log_scale', a3_vae.LOG_SCALE)
def test_no_mean_and_no_scale_gives_an_infinite_likelihood_or_gradient(x, mean, log_scale):
    mean, log_scale = (torch.tensor([number], requires_grad=True) for number in (mean, log_scale))
    log_p = discretised_logistic_log_likelihood(torch.tensor([x]), mean, log_scale.exp())
    log_p.backward()
    assert log_p.isfinite() and log_p <= 0
    assert mean.grad.isfinite().all() and log_scale.grad.isfinite().all()


def test_the_256_levels_of_a_pixel_share_a_probability_of_one_and_average_to_the_mean():
    mean, scale = random(1, PIXELS) / 2 + 0.5, (3 * random(1, PIXELS, seed=1) - 3).exp()
    levels = torch.arange(256, dtype=torch.float64) / 255
    p = torch.stack([discretised_logistic_log_likelihood(level, mean.T, scale.T)
                     for level in levels]).exp()
    torch.testing.assert_close(p.sum(0), torch.ones(PIXELS).double(), rtol=0, atol=1e-6)
    decoder = SimpleNamespace(mean_and_scale=lambda z: (mean, scale))
    torch.testing.assert_close(a3_vae.LogisticDecoder.forward(decoder, None)[0], levels @ p,
                               rtol=0, atol=1e-6)


def test_manifold_grid_is_the_ppf_of_an_even_grid_right_and_up():
    low, high = scipy.stats.norm.ppf([1 / 6, 5 / 6])
    rows_from_the_top = [(right, up) for up in (high, 0, low) for right in (low, 0, high)]
    torch.testing.assert_close(manifold_grid(3), torch.tensor(rows_from_the_top).float())


def randomised(model: nn.Module, std: float) -> nn.Module:
    """The model in float64, its weights random, with that deviation at a fan-in of 1."""
    torch.manual_seed(3)
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, std=std / math.sqrt(parameter.shape[-1]))
    return model


def random_vae(likelihood: str = 'bernoulli') -> VAE:
    """A VAE of random weights whose posterior is neither the prior nor its own q(z|x)."""
    model = randomised(VAE(16, 2, likelihood=likelihood), 0.5)
    model.decoder.net.last.weight.data[PIXELS:] *= 0.1  # the deviations would say much about z
    return model


class Bounds:
    """A random VAE, two images, and exact values for them by quadrature over [−12, 12]²."""

    @torch.no_grad()
    def __init__(self, likelihood: str):
        self.model, self.x = random_vae(likelihood), bits(2, PIXELS, seed=5)
        axis = torch.linspace(-12, 12, 81, dtype=torch.float64)
        z, cell = torch.cartesian_prod(axis, axis)[:, None], 0.3 ** 2
        logits, *log_scale = self.model.decoder.net(z).split(PIXELS, dim=-1)
        if likelihood == 'bernoulli':
            log_px_z = distributions.Bernoulli(logits=logits).log_prob(self.x).sum(-1)
        else:
            k = (255 * self.x * random(2, PIXELS).sigmoid()).round()
            self.x = k / 255
            below, above = (((k + half) / 255 - logits).div(log_scale[0].clamp(
                *a3_vae.LOG_SCALE).exp()).sigmoid() for half in (-0.5, 0.5))
            below, above = below * (k > 0), 1 - (1 - above) * (k < 255)
            log_px_z = (above - below).clamp(min=1e-300).log().sum(-1)
        log_q = distributions.Normal(*self.model.encoder(self.x)).log_prob(z).sum(-1)
        log_prior = distributions.Normal(0., 1.).log_prob(z).sum(-1)
        self.log_px = (log_px_z + log_prior).logsumexp(0) + math.log(cell)
        self.likelihood_term = (log_q.exp() * log_px_z).sum(0) * cell
        self.kl = (log_q.exp() * (log_q - log_prior)).sum(0) * cell

    @torch.no_grad()
    def estimates(self, estimate: Callable[[Tensor], Tensor], n: int) -> Tensor:
        """n independent estimates for each image: (n, 2)."""
        torch.manual_seed(1)
        return estimate(self.x.repeat(n, 1)).view(n, 2)


@pytest.fixture(scope='module', params=['bernoulli', 'logistic'])
def bounds(request) -> Bounds:
    return Bounds(request.param)


def test_elbo_terms_average_to_their_integrals(bounds):
    torch.testing.assert_close(bounds.model.elbo_terms(bounds.x)[1], bounds.kl)
    samples = bounds.estimates(lambda x: bounds.model.elbo_terms(x)[0], n=2000)
    assert off_by_errors(samples, bounds.likelihood_term) < 4


@pytest.mark.parametrize('widths', [(1.,), (1., 3.)])
def test_the_importance_sampled_bound_rises_to_log_px(bounds, widths):
    gap_of_1, gap_of_10, gap_of_600 = (  # of more rows than are decoded at once; the last few too
        bounds.log_px - bounds.estimates(lambda x, n=n: importance_log_weights(
            bounds.model, x, n, widths).logsumexp(0) - math.log(n), repeats).mean(0)
        for n, repeats in ((1, 2500), (10, 200), (600, 5)))
    assert (gap_of_1 > 0.5).all() and (gap_of_10 > 0).all() and (gap_of_10 < gap_of_1 / 2).all()
    assert gap_of_600.abs().max() < 0.08


def test_log_px_on_a_lattice_is_the_integral():
    bounds = Bounds('bernoulli')
    torch.testing.assert_close(log_px_on_lattice(bounds.model, bounds.x, 200), bounds.log_px)


@both_likelihoods
def test_log_px_in_bfloat16_is_close_to_that_in_float32(likelihood):
    model, x = random_vae(likelihood).float(), bits(50, PIXELS, dtype=torch.float32)
    full, half = (torch.manual_seed(1) and importance_sampled_log_px(model, x, 50, bf16)
                  for bf16 in (False, True))
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert (half - full).mean().abs() < 0.1 and (half - full).std() < 0.5


@pytest.mark.parametrize('skip', [True, False])
def test_a_hidden_layer_is_silu_and_adds_its_input_where_it_may_be_skipped(skip):
    net, x = a3_vae.FullyConnected(3, 5, 2, n_layers=3, skip=skip).double(), random(4, 3)
    first, second, third, last = (part for part in net.modules() if isinstance(part, nn.Linear))
    h = first(x) / (1 + (-first(x)).exp())
    for layer in (second, third):
        h = skip * h + layer(h) / (1 + (-layer(h)).exp())
    torch.testing.assert_close(net(x), last(h))


@pytest.mark.parametrize('extreme', [-1e6, 1e6])
def test_scales_and_deviations_are_positive_and_finite_whatever_the_networks_say(extreme):
    model, x = VAE(16, 4, likelihood='logistic'), bits(3, PIXELS, dtype=torch.float32)
    nn.init.constant_(model.decoder.net.last.bias, extreme)
    _, scale = model.decoder.mean_and_scale(torch.randn(3, 4))
    assert scale.min() > 9e-4 and scale.max() < 10
    assert all(images.min() >= 0 and images.max() <= 1 for images in model.sample(9))
    assert model(x).isfinite() and importance_log_weights(model, x, 3).isfinite().all()
    nn.init.constant_(model.encoder.net.last.bias, extreme)
    mean, std = model.encoder(x)
    assert std.min() > 0 and gaussian_kl(mean, std).isfinite().all()


@both_likelihoods
def test_the_likelihood_alone_teaches_every_unit_of_every_layer(likelihood):
    model = random_vae(likelihood)
    model.elbo_terms(bits(5, PIXELS))[0].sum().backward()
    assert [name for name, parameter in model.named_parameters()
            if not parameter.grad.view(len(parameter), -1).any(1).all()] == []


def deaf_vae(likelihood: str, means: Tensor, scales: Tensor, code: float = 0.) -> VAE:
    """A VAE of pixels with these means and scales, whatever z is, and q(z|x) = N(code, 1)."""
    model = VAE(16, 2, likelihood=likelihood).eval()
    encoder, decoder = model.encoder.net.last, model.decoder.net.last
    for weight in (encoder.weight, decoder.weight):
        nn.init.zeros_(weight)
    encoder.bias.data = torch.tensor([code, code, 0., 0.])
    decoder.bias.data = (means.logit() if likelihood == 'bernoulli' else
                         torch.cat([means, scales.log()]))
    return model


@both_likelihoods
def test_samples_have_the_moments_that_the_decoder_says_for_codes_from_the_prior(likelihood):
    mean, scale, codes = torch.linspace(0.3, 0.7, PIXELS), torch.logspace(0, -0.7, PIXELS), []
    model = deaf_vae(likelihood, mean, scale)
    var = mean - mean.square()  # of a bit
    if likelihood == 'logistic':
        levels = torch.arange(256) / 255
        p = torch.stack([discretised_logistic_log_likelihood(level, mean[:, None], scale[:, None])
                         for level in levels]).exp()
        mean, square = levels @ p, levels.square() @ p
        var = square - mean.square()
    model.decoder.net.register_forward_pre_hook(lambda _, inputs: codes.append(inputs[0]))
    torch.manual_seed(1)
    draws, means = model.sample(1000)
    torch.testing.assert_close(means, mean.expand(1000, PIXELS), rtol=0, atol=1e-4)
    assert off_by_errors(draws, mean) < 5
    assert off_by_errors((draws - mean).square(), var) < 5
    assert off_by_errors(codes[0], 0.) < 4 and off_by_errors(codes[0].square(), 1.) < 4


@both_likelihoods
def test_draws_and_means_are_of_the_same_codes(likelihood):
    model, codes = random_vae(likelihood).float(), []
    model.decoder.net.register_forward_pre_hook(lambda _, inputs: codes.append(inputs[0]))
    model.decoder.net.first.weight.data *= 30  # different codes have quite different means
    torch.manual_seed(1)
    draws, means = model.sample(40)
    torch.testing.assert_close(means, model.decoder(codes[0]))
    near, far = ((draws - other).square().mean() for other in (means, means.flip(0)))
    assert near < 0.9 * far


class Stub(nn.Module):
    """Its negative bound is the average pixel; it remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(())), []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((float(images[0, 0]), self.training, torch.is_grad_enabled(),
                           torch.is_autocast_enabled('cpu')))
        return self.weight * images.mean()


def batches(*sizes_and_values: tuple[int, float]) -> list[Tensor]:
    return [torch.full((size, PIXELS), float(value)) for size, value in sizes_and_values]


def test_each_batch_is_one_step_along_its_own_clipped_gradient_at_its_own_rate():
    model = Stub().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** step)
    a3_vae.epoch_iter(model, batches((3, 1), (2, 5), (1, 9999)), optimizer, schedule)
    assert model.weight.item() == pytest.approx(1 - 0.01 * (1 + 5 / 2 + 200 / 4))


@pytest.mark.parametrize('bf16', [True, False])
def test_run_epoch_trains_on_the_first_set_then_evaluates_on_the_second(bf16):
    model, optimizer = Stub(), torch.optim.SGD([torch.zeros(1)])
    data = batches((2, 3), (2, 3)), batches((4, 7))
    assert a3_vae.run_epoch(model, data, optimizer, bf16=bf16) == (3, 7)
    assert model.calls == [(3, True, True, bf16)] * 2 + [(7, False, False, bf16)]


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_final_estimates_are_averages_over_images_worked_by_hand(precision, monkeypatch):
    grey, scale, in_bf16 = 0.375, math.exp(-1.5), []  # of biases that bfloat16 holds exactly
    means = torch.full([PIXELS], grey)
    model = deaf_vae('logistic', means, 0 * means + scale, code=1.)  # in 2-D the KL is 1
    monkeypatch.setattr(a3_vae, 'importance_sampled_log_px', lambda model, x, n, bf16: (
        in_bf16.append(bf16) or importance_sampled_log_px(model, x, n, bf16)))
    args = SimpleNamespace(seed=7, iw_samples=1000, precision=precision, likelihood='logistic')
    val, test = batches((3, grey), (1, grey + scale)), batches((2, grey), (4, grey + scale))
    metrics = a3_vae.final_estimates(model, val, test, args)
    assert in_bf16 == [precision == 'bf16'] * 2
    cdf, half = scipy.stats.logistic.cdf, 0.5 / 255 / scale  # of a grey level, in scales
    at_mean, one_off = (-PIXELS * math.log(cdf(t + half) - cdf(t - half)) for t in (0, 1))
    nats = (2 * at_mean + 4 * one_off) / 6
    val_nats = (3 * at_mean + one_off) / 4 + 1
    expected = {'val_neg_elbo_nats': val_nats, 'test_kl_nats': 1,
                'val_neg_elbo_bpd': val_nats / PIXELS / math.log(2),
                'test_reconstruction_nats': nats, 'test_neg_elbo_nats': nats + 1,
                'test_neg_elbo_bpd': (nats + 1) / PIXELS / math.log(2), 'iw_samples': 1000,
                'test_nll_bpd': metrics['test_nll_nats'] / PIXELS / math.log(2),
                'parameters': sum(weight.numel() for weight in model.parameters())}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert metrics['test_nll_nats'] == pytest.approx(nats, abs=0.3)  # with 1,000 samples
    again = a3_vae.final_estimates(model, val, test, args)
    assert again['test_nll_nats'] == metrics['test_nll_nats']


@pytest.mark.parametrize('which, deviations, row, column', [
    (0, 90 / 5, lambda i, j: j, lambda i, j: 27 - i),  # a quarter of a turn
    (1, 2 / 0.05, lambda i, j: i, lambda i, j: j + 2 * i - 27),  # sheared by 2
    (2, -0.5 / 0.05, lambda i, j: i, lambda i, j: 7 + j // 2),  # twice as wide
    (3, -0.5 / 0.05, lambda i, j: 7 + i // 2, lambda i, j: j),  # twice as high
    (4, 2 / 0.5, lambda i, j: i, lambda i, j: j + 2),  # moved by two pixels
    (5, 2 / 0.5, lambda i, j: i + 2, lambda i, j: j)])
def test_augment_changes_images_as_it_says(monkeypatch, which, deviations, row, column):
    images, noise = bits(3, PIXELS, dtype=torch.float32), torch.zeros(6, 3)
    noise[which, 1] = deviations
    monkeypatch.setattr(torch, 'randn', lambda *shape, device: noise)
    i, j = torch.meshgrid(torch.arange(28), torch.arange(28), indexing='ij')
    padded = nn.functional.pad(images[1].view(28, 28), [28] * 4)
    changed = padded[28 + row(i, j), 28 + column(i, j)].flatten()
    assert torch.equal(a3_vae.augment(images, 1.), torch.stack([images[0], changed, images[2]]))


def test_a_share_of_the_images_moves_and_grey_ones_are_scaled():
    images, labels = 9 * bits(200, PIXELS, dtype=torch.float32) + 3, torch.zeros(200)
    torch.manual_seed(1)
    [as_it_was], [batch] = prepared([images]), prepared([(images, labels)], 0.3)
    assert as_it_was is images and (255 * batch).round().unique().tolist() == [0, 3, 12]  # 0: edge
    assert abs((batch != images / 255).any(1).double().mean() - 0.3) < 0.1


@pytest.mark.parametrize('words, name, skip, augment, epochs', [
    ('', 'vae_z20', 'yes', 0.8, 40), ('--zdim 5', 'vae_z5', 'yes', 0.8, 40),
    ('--zdim 4', 'vae_z4', 'no', 0.6, 80),
    ('--likelihood logistic', 'vae_logistic_z20', 'yes', 0.5, 40),
    ('--iw_samples 5 --hidden_dim 320', 'vae_z20_iwsamples5', 'yes', 0.8, 40),
    ('--zdim 2 --skip yes --augment 0', 'vae_z2_skipyes_augment0.0', 'yes', 0., 80)])
def test_the_name_has_what_was_changed_and_the_model_decides_some_defaults(
        words, name, skip, augment, epochs):
    args = parse_args(words.split())
    assert (args.name, args.skip, args.augment, args.epochs) == (name, skip, augment, epochs)


@pytest.mark.parametrize('likelihood, n_out', [('bernoulli', PIXELS), ('logistic', 2 * PIXELS)])
def test_the_model_is_made_of_the_arguments(likelihood, n_out):
    words = f'--hidden_dim 7 --zdim 3 --n_layers 2 --likelihood {likelihood}'
    model = a3_vae.make_model(parse_args(words.split()))
    assert [tuple(weight.shape) for weight in model.parameters() if weight.ndim == 2] == [
        (7, PIXELS), (7, 7), (6, 7), (7, 3), (7, 7), (n_out, 7)]
    assert model.encoder.net.skip == model.decoder.net.skip == (likelihood == 'logistic')


def test_reconstructions_are_those_of_mean_codes_of_ten_images_from_everywhere(monkeypatch):
    model, images, saved = random_vae(), bits(35, PIXELS), []
    monkeypatch.setattr(figures, 'save_grid', lambda path, grid, columns: saved.append(grid))
    a3_vae.save_reconstructions(model, images, SimpleNamespace(path=str))
    expected = torch.cat([images[:30:3], model.decoder(model.encoder(images[:30:3])[0])])
    torch.testing.assert_close(saved, [expected])


def test_snapshots_are_drawn_from_the_same_noise_each_time(tmp_path):
    model, args = VAE(hidden_dim=16), SimpleNamespace(seed=7, epochs=9)
    for epoch in (1, 2):
        a3_vae.save_snapshot(model, SimpleNamespace(path=tmp_path.joinpath, args=args), epoch)
    first, _, second, _ = sorted(tmp_path.iterdir())  # the draws, and their means
    assert first.read_bytes() == second.read_bytes()


TINY = ('--dataset', 'digits', '--hidden_dim', 16, '--n_layers', 1, '--batch_size', 50,
        '--iw_samples', 2, '--seed', 7)
TWO = (*TINY, '--zdim', 2, '--epochs', 5, '--run', 'two')


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> tuple[Path, list[tuple]]:
    """A finished run's folder, and for each pass over data the share augmented, and the data."""
    results, passes = tmp_path_factory.mktemp('finished'), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'SIZES', FEWER_DIGITS)
        patch.setattr(a3_vae, 'prepared', lambda data, share=0.: (
            passes.append((share, data)) or prepared(data, share)))
        a3_vae.main(parse_args([*map(str, TWO), f'--results_dir={results}']))
    return results / 'two', passes


def test_the_log_and_the_curve_have_each_epoch_from_the_untrained_network_on(finished):
    rows, curve = (read_csv(finished[0] / name) for name in ('log.csv', 'elbo.csv'))
    assert [name for row in rows for name in row if row[name] == ''] == ['running_neg_elbo_nats']
    for label, name in (('training', 'train_neg_elbo_nats'), ('validation', 'val_neg_elbo_nats')):
        assert abs(float(rows[0][name]) - PIXELS * math.log(2)) < 40  # a fair coin for each pixel
        assert float(rows[-1][name]) < float(rows[0][name]) - 40
        assert [float(row[label]) for row in curve] == [-float(row[name]) for row in rows]


def test_augmentation_the_rate_and_the_manifold_follow_the_epochs(finished):
    assert [share for share, _ in finished[1] if share] == [0.6] * 4  # none in the last fifth
    parts = torch.load(finished[0] / 'checkpoint.pt', weights_only=True)['parts']
    assert parts['schedule']['last_epoch'] == 5 * 600 / 50
    [group] = parts['optimizer']['param_groups']
    assert group['lr'] == pytest.approx(0, abs=1e-6) and group['weight_decay'] == 0
    assert {path.name for path in finished[0].glob('manifold*')} == {
        'manifold_epoch00.png', 'manifold_epoch02.png', 'manifold_epoch05.png'}


def test_each_curve_and_final_estimate_is_of_its_own_images(finished):
    assert tuple(len(data.images) for _, data in finished[1][-2:]) == FEWER_DIGITS[1:]
    assert [len(data.images) for _, data in finished[1][2:-2:3]] == [FEWER_DIGITS[0]] * 6
    assert 'iw_samples' not in (finished[0] / 'metrics.json').read_text()  # it is integrated


def test_the_rate_rises_for_a_tenth_of_the_run_then_falls_as_a_cosine():
    rates = [a3_vae.learning_rate(progress) for progress in (0, 0.05, 0.1, 0.4, 0.55, 1)]
    assert rates == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0])


def test_sample_draws_bits_around_their_means_and_never_from_another_model(copied, run_here):
    words = ('a3_vae.py', *TWO, '--results_dir', copied.parent, '--sample', 3)
    assert run_here(*words).returncode == 0
    draws, means = (np.unique(matplotlib.image.imread(copied / f'sample_{kind}.png')[:84, :84, 0])
                    for kind in ('draws', 'means'))
    assert set(draws) == {0, 1} and len(means) > 20
    other = run_here(*words, '--skip', 'yes')  # though the tensors would fit
    assert_one_line(other, 'is another run: skip was no, is now yes')


def test_a_run_that_diverges_ends_with_status_1_before_nan_is_drawn(tmp_path, run_here):
    done = run_here('a3_vae.py', *TINY, '--epochs', 1, '--lr', 1e20, '--results_dir', tmp_path)
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert re.search(r'is (nan|inf) after epoch 1; .*checkpoint.pt is of epoch 0', done.stderr)


def test_a_run_on_grey_images_says_so_measures_bits_and_shows_the_images(tmp_path, run_here):
    run_here('a3_vae.py', *TINY, '--zdim', 1, '--epochs', 1, '--batch_size', 20,
             '--likelihood', 'logistic', '--results_dir', tmp_path)
    [folder] = tmp_path.iterdir()
    assert re.fullmatch('vae_logistic_z1_epochs1_.*_seed7_digits', folder.name)
    rows, one_bpd = read_csv(folder / 'log.csv'), PIXELS * math.log(2)
    untrained, trained = (float(row['val_neg_elbo_nats']) / one_bpd for row in rows)
    assert 1 < untrained < 8 and trained < untrained - 0.2
    bpd = json.loads((folder / 'metrics.json').read_text())['test_neg_elbo_bpd']
    assert bpd == pytest.approx(trained, rel=0.05)
    _, _, test = mnist(dataset='digits')
    shown = matplotlib.image.imread(folder / 'reconstructions.png')[:84:3, :84:3, 0]
    assert np.abs(shown - test.images[0].view(28, 28).numpy() / 255).max() < 0.6 / 255
