"""The VAE's mathematics against independent oracles, in float64; then its modules and loops."""

import math
from collections.abc import Callable

import pytest
import scipy.stats
import torch
from torch import Tensor, distributions, nn

import a3_vae
from a3_vae import (
    PIXELS,
    VAE,
    Decoder,
    Encoder,
    GaussianDecoder,
    augment,
    bernoulli_log_likelihood,
    epoch_iter,
    gaussian_kl,
    gaussian_log_density,
    learning_rate,
    manifold_grid,
    prepared,
    run_epoch,
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (random(*shape, seed=seed) > 0.3).to(dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off_by_errors(samples: Tensor, expected: Tensor | float) -> float:
    """How many standard errors the mean of the samples (along the first axis) is off, at most."""
    error = samples.std(0) / math.sqrt(len(samples))
    return float(((samples.mean(0) - expected) / error).abs().max())


# --- the Gaussian, the Bernoulli, the grid -------------------------------------------------------


def test_kl_is_that_of_torch_distributions():
    mean, std = 3 * random(50, 7), random(50, 7, seed=1).exp()
    kl = distributions.kl_divergence(distributions.Normal(mean, std),
                                     distributions.Normal(torch.zeros_like(mean), 1.)).sum(-1)
    torch.testing.assert_close(gaussian_kl(mean, std), kl)


def test_kl_is_the_average_log_ratio_of_the_densities():
    mean, std = random(5), random(5, seed=1).exp()
    z = mean + std * random(200_000, 5, seed=2)
    log_ratio = (gaussian_log_density(z, mean, std)
                 - gaussian_log_density(z, torch.zeros_like(mean), torch.ones_like(std)))
    assert off_by_errors(log_ratio, gaussian_kl(mean, std)) < 4


def test_gaussian_log_density_is_that_of_torch_distributions():
    z, mean, std = 3 * random(9, 4, 6), random(4, 6, seed=1), random(4, 6, seed=2).exp()
    expected = distributions.Normal(mean, std).log_prob(z).sum(-1)
    torch.testing.assert_close(gaussian_log_density(z, mean, std), expected)


@pytest.mark.parametrize('x_shape, logits_shape', [((5, 8), (5, 8)), ((5, 8), (3, 5, 8)),
                                                   ((8,), (5, 8)), ((3, 1, 8), (5, 8))])
def test_bernoulli_log_likelihood_is_that_of_torch_distributions(x_shape, logits_shape):
    x, logits = bits(*x_shape), 5 * random(*logits_shape, seed=1)
    expected = distributions.Bernoulli(logits=logits).log_prob(x).sum(-1)
    torch.testing.assert_close(bernoulli_log_likelihood(x, logits), expected)


def test_bernoulli_log_likelihood_is_exact_where_the_sigmoid_is_0_or_1():
    x = torch.tensor([[1.], [0.], [1.], [0.]])
    logits = torch.tensor([[1e4], [1e4], [-1e4], [-1e4]])
    assert bernoulli_log_likelihood(x, logits).tolist() == [0, -1e4, -1e4, 0]


@pytest.mark.parametrize('steps', [1, 2, 20])
def test_manifold_grid_is_the_ppf_of_an_even_grid_right_and_up(steps):
    ticks = scipy.stats.norm.ppf([(i + 0.5) / steps for i in range(steps)])
    rows_from_the_top = [(right, up) for up in ticks[::-1] for right in ticks]
    torch.testing.assert_close(manifold_grid(steps).double(),
                               torch.tensor(rows_from_the_top, dtype=torch.float64),
                               rtol=1e-6, atol=1e-6)


# --- the bounds, against log p(x) by quadrature --------------------------------------------------


def random_vae(z_dim: int, logit_std: float = 0.12, likelihood: str = 'bernoulli') -> VAE:
    """A float64 VAE of random weights whose posterior is neither the prior nor its own q(z|x)."""
    torch.manual_seed(3)
    model = VAE(hidden_dim=16, z_dim=z_dim, likelihood=likelihood).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
        *_, weight, bias = model.decoder.parameters()  # of the map to the logits
        weight *= logit_std / model.decoder.logits(random(1000, z_dim)).std(0).mean()
        if likelihood == 'gaussian':
            weight[PIXELS:] *= 0.1  # of the pixels' deviations, which would say much of z
            bias[PIXELS:] -= 0.5
        *_, weight, bias = model.encoder.parameters()
        weight *= 0.3 / model.encoder.net(2 * bits(1000, PIXELS) - 1).std(0).mean()
        bias[z_dim:] = 0.3  # a wide q: no rare, heavy importance weights
    return model


def log_likelihood_by_softplus(decoder: Decoder, x: Tensor, z: Tensor) -> Tensor:
    """log p(x|z) for every pair, written otherwise than in the script: (M, D), (Z, D) → (Z, M)."""
    logits = decoder.logits(z)
    return logits @ x.T - nn.functional.softplus(logits).sum(-1, keepdim=True)


def log_density_of_grey_values(decoder: GaussianDecoder, x: Tensor, z: Tensor) -> Tensor:
    """log p(256 x|z) of means and deviations on the scale of the grey values: broadcast."""
    logits, log_std = decoder.net(z).chunk(2, dim=-1)
    pixels = distributions.Normal(256 / (1 + (-logits).exp()), 256 * log_std.exp())
    return pixels.log_prob(256 * x).sum(-1)


def grid(z_dim: int) -> tuple[Tensor, float]:
    """Points of a regular grid over [−12, 12]^D, (Z, D), and the volume of its cells."""
    axis = torch.linspace(-12, 12, 1201 if z_dim == 1 else 161, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * z_dim).view(-1, z_dim), float(axis[1] - axis[0]) ** z_dim


class Bounds:
    """One random VAE, some images, and exact values for them by quadrature."""

    def __init__(self, z_dim: int, likelihood: str):
        grey = likelihood == 'gaussian'
        self.model = random_vae(z_dim, likelihood=likelihood)
        self.x = bits(3, PIXELS, seed=5)
        if grey:
            self.x = (255 * self.x + uniform(3, PIXELS)) / 256
        z, cell = grid(z_dim)
        with torch.no_grad():
            self.mean, self.std = self.model.encoder(self.x)
            log_likelihood = (
                log_density_of_grey_values(self.model.decoder, self.x, z[:, None]) if grey else
                log_likelihood_by_softplus(self.model.decoder, self.x, z))
        log_prior = distributions.Normal(0., 1.).log_prob(z).sum(-1)[:, None]
        log_q = distributions.Normal(self.mean, self.std).log_prob(z[:, None]).sum(-1)  # (Z, 3)
        self.log_px = (log_likelihood + log_prior).logsumexp(0) + math.log(cell)
        self.likelihood_term = (log_q.exp() * log_likelihood).sum(0) * cell
        self.kl = (log_q.exp() * (log_q - log_prior)).sum(0) * cell
        self.elbo = self.likelihood_term - self.kl

    def estimates(self, estimate: Callable[[Tensor], Tensor], n: int) -> Tensor:
        """n independent estimates for each image: (n, 3)."""
        torch.manual_seed(1)
        with torch.no_grad():
            return estimate(self.x.repeat(n, 1)).view(n, 3)


@pytest.fixture(scope='module', params=[(1, 'bernoulli'), (2, 'bernoulli'), (1, 'gaussian')],
                ids=['z1', 'z2', 'gaussian_z1'])
def bounds(request) -> Bounds:
    return Bounds(*request.param)


def test_quadrature_finds_a_gap_worth_estimating(bounds):
    gap = bounds.log_px - bounds.elbo
    assert gap.min() > 0.2 and gap.max() < 20


def test_elbo_terms_average_to_their_integrals(bounds):
    log_likelihood, kl = bounds.model.elbo_terms(bounds.x)
    torch.testing.assert_close(kl, bounds.kl)
    samples = bounds.estimates(lambda x: bounds.model.elbo_terms(x)[0], n=4000)
    assert off_by_errors(samples, bounds.likelihood_term) < 4


def test_one_importance_sample_averages_to_the_elbo(bounds):
    samples = bounds.estimates(lambda x: bounds.model.log_px(x, 1), n=4000)
    assert off_by_errors(samples, bounds.elbo) < 4


def test_the_importance_sampled_bound_lies_between_elbo_and_log_px(bounds):
    samples = bounds.estimates(lambda x: bounds.model.log_px(x, 5), n=2000)
    error = samples.std(0) / math.sqrt(len(samples))
    assert (bounds.elbo < samples.mean(0) - 4 * error).all()
    assert (samples.mean(0) + 4 * error < bounds.log_px).all()


def test_the_importance_sampled_bound_rises_to_log_px(bounds):
    gap_of_1, gap_of_10, gap_of_100, gap_of_3000 = (
        bounds.log_px - bounds.estimates(lambda x, K=K: bounds.model.log_px(x, K), n).mean(0)
        for K, n in ((1, 500), (10, 300), (100, 100), (3000, 5)))
    assert gap_of_10.sum() < gap_of_1.sum() / 2 and gap_of_100.sum() < gap_of_10.sum() / 2
    assert gap_of_3000.abs().max() < 0.1


@pytest.mark.parametrize('rows', [1, 32, 48])  # 1, 8 and 12 samples at once: the last has an end
def test_the_size_of_a_chunk_does_not_change_log_px(monkeypatch, rows):
    model, x = random_vae(z_dim=4), bits(4, PIXELS)  # 16 numbers a sample: one stream of noise
    torch.manual_seed(1)
    at_once = model.log_px(x, 20)
    monkeypatch.setattr(a3_vae, 'IW_ROWS', rows)
    largest = []
    monkeypatch.setattr(model.decoder, 'logits', lambda z, logits=model.decoder.logits:
                        largest.append(len(z)) or logits(z))
    torch.manual_seed(1)
    torch.testing.assert_close(model.log_px(x, 20), at_once)
    assert max(largest) == max(1, rows // 4)


def test_log_px_stays_finite_where_likelihoods_underflow():
    model = random_vae(z_dim=2, logit_std=1e5).float()
    log_px = model.log_px(bits(3, PIXELS, dtype=torch.float32), 10)
    assert log_px.isfinite().all() and log_px.max() < -1e5


# --- the modules ---------------------------------------------------------------------------------

both_likelihoods = pytest.mark.parametrize('likelihood', ['bernoulli', 'gaussian'])


@both_likelihoods
@pytest.mark.parametrize('hidden_dim, z_dim', [(500, 20), (16, 1)])
def test_shapes_are_those_of_the_template(hidden_dim, z_dim, likelihood):
    x = bits(7, PIXELS, dtype=torch.float32)
    mean, std = Encoder(hidden_dim, z_dim)(x)
    assert mean.shape == std.shape == (7, z_dim)
    model = VAE(hidden_dim=hidden_dim, z_dim=z_dim, likelihood=likelihood)
    means = model.decoder(mean)
    assert means.shape == (7, PIXELS) and (means > 0).all() and (means < 1).all()
    assert model(x).shape == ()
    sampled_ims, im_means = model.sample(3)
    assert sampled_ims.shape == im_means.shape == (3, PIXELS)


def test_the_template_calls_modules_without_arguments():
    assert VAE().z_dim == 20
    assert Encoder()(torch.zeros(1, PIXELS))[0].shape == (1, 20)
    assert Decoder()(torch.zeros(1, 20)).shape == (1, PIXELS)


def test_forward_is_the_average_negative_elbo():
    model, x = random_vae(z_dim=2), bits(6, PIXELS)
    torch.manual_seed(1)
    log_likelihood, kl = model.elbo_terms(x)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), -(log_likelihood - kl).mean())


def test_the_untrained_bound_is_near_that_of_a_fair_coin_for_each_pixel():
    torch.manual_seed(0)
    model = VAE().eval()
    neg_elbo = model(bits(100, PIXELS, dtype=torch.float32)).item()
    assert abs(neg_elbo - PIXELS * math.log(2)) < 40


def test_codes_are_drawn_with_the_mean_and_std_of_the_encoder(monkeypatch):
    model, codes = random_vae(z_dim=3), []
    monkeypatch.setattr(model.decoder, 'logits',
                        lambda z: codes.append(z) or z.new_zeros(*z.shape[:-1], PIXELS))
    x = bits(1, PIXELS)
    torch.manual_seed(1)
    with torch.no_grad():
        model.elbo_terms(x.expand(20_000, PIXELS))
        mean, std = model.encoder(x)
    assert off_by_errors(codes[0], mean) < 4
    assert off_by_errors((codes[0] - mean).square(), std.square()) < 4
    eps = (codes[0] - mean) / std
    assert off_by_errors(eps[:, 0] * eps[:, 1], 0.) < 4  # dimensions draw noise of their own


@pytest.mark.parametrize('extreme', [-1e6, 1e6])
def test_std_is_positive_and_finite_whatever_the_encoder_says(extreme):
    model = VAE(hidden_dim=16, z_dim=4)
    *_, bias = model.encoder.parameters()
    nn.init.constant_(bias, extreme)
    mean, std = model.encoder(bits(3, PIXELS, dtype=torch.float32))
    assert (std > 0).all() and gaussian_kl(mean, std).isfinite().all()


@both_likelihoods
def test_gradients_reach_every_unit_of_every_layer(likelihood):
    torch.manual_seed(0)
    model = VAE(hidden_dim=16, z_dim=2, likelihood=likelihood)
    model(bits(50, PIXELS, dtype=torch.float32)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None
            or not parameter.grad.view(len(parameter), -1).any(1).all()] == []


def test_the_likelihood_alone_teaches_mean_and_std():
    model = random_vae(z_dim=2)
    mean_and_std = model.encoder(bits(5, PIXELS))
    model.encoder.forward = lambda x: mean_and_std
    log_likelihood, _ = model.elbo_terms(bits(5, PIXELS))
    for gradient in torch.autograd.grad(log_likelihood.sum(), mean_and_std):
        assert (gradient != 0).all()


@both_likelihoods
def test_decoder_is_the_sigmoid_of_its_logits(likelihood):
    decoder, z = random_vae(z_dim=3, likelihood=likelihood).decoder, random(2, 5, 3)
    torch.testing.assert_close(decoder(z), 1 / (1 + (-decoder.logits(z)).exp()))


def test_pixels_are_one_as_often_as_their_mean_says():
    model = VAE(hidden_dim=16, z_dim=2).eval()
    share = torch.linspace(0.02, 0.98, PIXELS)
    *_, weight, bias = model.decoder.parameters()
    with torch.no_grad():
        weight.zero_()
        bias.copy_(share.logit())
    torch.manual_seed(1)
    draws, means = model.sample(2000)
    torch.testing.assert_close(means, share.expand(2000, PIXELS))
    assert draws.unique().tolist() == [0, 1]
    assert off_by_errors(draws, share) < 5


def test_samples_come_from_the_prior_and_from_the_seed():
    model, codes = VAE(hidden_dim=16, z_dim=2).eval(), []
    model.decoder.register_forward_pre_hook(lambda module, inputs: codes.append(inputs[0]))
    torch.manual_seed(1)
    draws, means = model.sample(5000)
    torch.manual_seed(1)
    again = model.sample(5000)
    assert torch.equal(draws, again[0]) and torch.equal(means, again[1])
    assert not torch.equal(means, model.sample(5000)[1])
    assert off_by_errors(codes[0], 0.) < 4 and off_by_errors(codes[0].square(), 1.) < 4


# --- grey pixels ---------------------------------------------------------------------------------


def gaussian_vae(means: Tensor | float, stds: Tensor | float) -> VAE:
    """A VAE whose pixels have these means and deviations and whose posterior is the prior."""
    model = VAE(hidden_dim=16, z_dim=2, likelihood='gaussian').eval()
    nn.init.zeros_(model.encoder.net.last.weight)
    nn.init.zeros_(model.encoder.net.last.bias)
    nn.init.zeros_(model.decoder.net.last.weight)
    with torch.no_grad():
        bias = model.decoder.net.last.bias
        bias[:PIXELS] = torch.as_tensor(means).logit()
        bias[PIXELS:] = torch.as_tensor(stds).log()
    return model


@pytest.mark.parametrize('x_shape, z_shape', [((5, PIXELS), (5, 3)), ((5, PIXELS), (4, 5, 3)),
                                              ((PIXELS,), (5, 3)), ((4, 1, PIXELS), (5, 3))])
@pytest.mark.parametrize('logit_std', [0.1, 1.])
def test_gaussian_log_likelihood_is_the_density_of_the_grey_values(x_shape, z_shape, logit_std):
    decoder = random_vae(3, logit_std, 'gaussian').decoder
    x, z = uniform(*x_shape), random(*z_shape, seed=1)
    torch.testing.assert_close(decoder.log_likelihood(x, z),
                               log_density_of_grey_values(decoder, x, z))


@pytest.mark.parametrize('height, distance, bpd', [  # of the density of x, against the uniform one
    (1., 0., 8.), (256., 0., 0.), (0.5, 0., 9.), (4., 1., 6 + 0.5 / math.log(2))])
def test_bits_per_dimension_of_one_gaussian_are_those_worked_by_hand(height, distance, bpd):
    std = 1 / (math.sqrt(2 * math.pi) * height)
    model, x = gaussian_vae(0.5, std), torch.full((3, PIXELS), 0.5 + distance * std)
    bits_per_image = torch.cat([model(x)[None], -model.log_px(x, 7)]) / math.log(2)
    assert (bits_per_image / PIXELS).tolist() == pytest.approx([bpd] * 4, abs=1e-4)


def test_gaussian_pixels_are_drawn_with_the_means_and_deviations_of_the_decoder():
    mean, std = torch.linspace(0.3, 0.7, PIXELS), torch.logspace(-1.3, -3, PIXELS)
    torch.manual_seed(1)
    draws, means = gaussian_vae(mean, std).sample(3000)
    torch.testing.assert_close(means, mean.expand(3000, PIXELS))
    assert off_by_errors(draws, mean) < 5
    assert off_by_errors((draws - mean).square(), std.square()) < 5


def test_gaussian_pixels_outside_0_and_1_are_drawn_to_the_ends():
    torch.manual_seed(1)
    draws, means = gaussian_vae(0.5, 2.).sample(100)
    assert draws.min() == 0 and draws.max() == 1 and (means == 0.5).all()
    outside = scipy.stats.norm.cdf(-0.25)  # on each side
    assert (draws == 0).double().mean().item() == pytest.approx(outside, abs=0.01)
    assert (draws == 1).double().mean().item() == pytest.approx(outside, abs=0.01)


@pytest.mark.parametrize('extreme', [-1e6, 1e6])
def test_the_deviation_of_pixels_is_bounded_whatever_the_decoder_says(extreme):
    model = VAE(hidden_dim=16, z_dim=4, likelihood='gaussian')
    nn.init.constant_(model.decoder.net.last.bias, extreme)
    _, std = model.decoder.mean_and_std(random(3, 4, dtype=torch.float32))
    assert std.min() > 1e-4 and std.max() < 10
    x = bits(3, PIXELS, dtype=torch.float32)
    assert model(x).isfinite() and model.log_px(x, 3).isfinite().all()


# --- the loops -----------------------------------------------------------------------------------


class Stub(nn.Module):
    """Its negative bound is the average pixel; it remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((float(images[0, 0]), self.training, torch.is_grad_enabled()))
        return self.weight * images.mean()


def batches(*sizes_and_values: tuple[int, float]) -> list[Tensor]:
    return [torch.full((size, PIXELS), float(value)) for size, value in sizes_and_values]


@pytest.mark.parametrize('training', [True, False])
def test_an_epoch_weights_images_not_batches(training):
    model = Stub().train(training)
    average = epoch_iter(model, batches((5, 1), (5, 2), (2, 10)),
                         torch.optim.SGD(model.parameters(), lr=0.))
    assert isinstance(average, float)
    assert average == pytest.approx((5 * 1 + 5 * 2 + 2 * 10) / 12)


def test_evaluation_leaves_weights_gradients_and_mode_alone():
    model, images = VAE(hidden_dim=16, z_dim=2).eval(), bits(6, PIXELS, dtype=torch.float32)
    model(images).backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    epoch_iter(model, [images], torch.optim.SGD(model.parameters(), lr=1.))
    assert not model.training
    for (weight, gradient), parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(parameter, weight) and torch.equal(parameter.grad, gradient)


def test_training_is_one_step_for_each_batch_with_its_own_gradient():
    torch.manual_seed(0)
    model, data = Stub().train(), batches((3, 1), (2, 5), (1, 2))
    epoch_iter(model, data, torch.optim.SGD(model.parameters(), lr=0.1))
    assert model.weight.item() == pytest.approx(1 - 0.1 * (1 + 5 + 2))


def test_training_changes_every_parameter_of_the_vae():
    torch.manual_seed(0)
    model = VAE(hidden_dim=16, z_dim=2).train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    epoch_iter(model, [bits(6, PIXELS, dtype=torch.float32)],
               torch.optim.SGD(model.parameters(), lr=1e-2))
    for weight, parameter in zip(before, model.parameters(), strict=True):
        assert not torch.equal(weight, parameter)


def test_the_schedule_steps_once_a_batch():
    model = Stub().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** step)
    epoch_iter(model, batches((2, 1), (2, 1), (1, 1)), optimizer, schedule)
    assert optimizer.param_groups[0]['lr'] == 0.125


def test_run_epoch_trains_on_the_first_set_then_evaluates_on_the_second():
    model = Stub()
    train, val = run_epoch(model, (batches((2, 3), (2, 3)), batches((4, 7))),
                           torch.optim.SGD(model.parameters(), lr=0.))
    assert (train, val) == (3, 7)
    assert model.calls == [(3, True, True), (3, True, True), (7, False, False)]


def test_the_learning_rate_rises_once_and_falls_to_zero():
    factors = torch.tensor([learning_rate(i / 1000) for i in range(1001)])
    top = int(factors.argmax())
    assert factors[0] < 0.1 and factors[top] == pytest.approx(1) and abs(factors[-1]) < 1e-6
    assert (factors[:top + 1].diff() > 0).all() and (factors[top:].diff() <= 0).all()


# --- augmentation --------------------------------------------------------------------------------


def strokes(n: int) -> Tensor:
    """Crosses as large as digits, (n, 784), each somewhere near the middle."""
    images = torch.zeros(n, 28, 28)
    for i, image in enumerate(images):
        row, column = 12 + i % 4, 12 + i // 4 % 4
        image[row - 8:row + 8, column - 1:column + 2] = 1
        image[row - 1:row + 2, column - 8:column + 8] = 1
    return images.view(n, PIXELS)


def test_augmenting_no_share_changes_nothing():
    assert torch.equal(augment(strokes(50), 0.), strokes(50))


def test_augmented_images_stay_binary_and_the_argument_as_it_was():
    images = strokes(50)
    assert augment(images, 1.).unique().tolist() == [0, 1]
    assert torch.equal(images, strokes(50))


@pytest.mark.parametrize('share', [0.25, 0.5, 1.])
def test_that_share_of_the_images_moves(share):
    torch.manual_seed(1)
    moved = (augment(strokes(2000), share) != strokes(2000)).any(1).double().mean()
    assert moved == pytest.approx(share, abs=0.05)


def test_augmentation_comes_from_the_seed():
    def once(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return augment(strokes(50), 1.)
    assert torch.equal(once(1), once(1)) and not torch.equal(once(1), once(2))


def test_changes_are_small_and_to_no_side():
    torch.manual_seed(1)
    images = strokes(2000)
    changed = augment(images, 1.)
    mass = changed.sum(1) / images.sum(1)
    assert 0.95 < mass.mean() < 1.05 and mass.std() < 0.15
    rows, columns = torch.arange(PIXELS) // 28, torch.arange(PIXELS) % 28
    for place in (rows, columns):
        shift = changed @ place.float() / changed.sum(1) - images @ place.float() / images.sum(1)
        assert 0.2 < shift.std() < 1.5 and off_by_errors(shift, 0.) < 4


# --- batches as the model takes them -------------------------------------------------------------


def test_binary_batches_are_ready_as_they_are():
    images = strokes(50)
    assert [batch is images for batch in prepared([images, images])] == [True, True]


def test_binary_batches_are_augmented_in_that_share():
    images = strokes(50)
    torch.manual_seed(1)
    [batch] = prepared([images], 0.5)
    torch.manual_seed(1)
    assert torch.equal(batch, augment(images, 0.5)) and not torch.equal(batch, images)


def grey_levels(n: int) -> Tensor:
    return (torch.arange(n * PIXELS) % 256).double().view(n, PIXELS)


def test_grey_values_get_noise_within_their_level():
    images, labels = grey_levels(20), torch.zeros(20)
    torch.manual_seed(1)
    first, second = prepared([(images, labels), (images, labels)], grey=True)
    assert first.min() >= 0 and first.max() < 1 and torch.equal((256 * first).floor(), images)
    assert not torch.equal(first, second)
    noise = 256 * first - images
    assert scipy.stats.kstest(noise.flatten().numpy(), 'uniform').pvalue > 1e-3
    assert len(noise.unique()) == noise.numel() and torch.equal(images, grey_levels(20))


def test_grey_values_are_moved_first_and_get_noise_then():
    images = 90 * strokes(50) + 37
    torch.manual_seed(1)
    [batch] = prepared([(images, torch.zeros(50))], 1., grey=True)
    levels = (256 * batch).floor()
    assert levels.unique().tolist() == [0, 37, 127]  # 0 comes from beyond the edge
    assert (levels != images).any(1).double().mean() > 0.9
    assert batch.min() > 0  # beyond the edge there is noise too
