"""The flows' mathematics against independent oracles, in float64; then modules, loops, figures."""

import itertools
import math
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from matplotlib.axes import Axes
from torch import Tensor, distributions, nn

import a3_nf
from a3_nf import (
    ALPHA,
    KNOTS,
    MAX_GRAD_NORM,
    PIXELS,
    PUBLISHED,
    Coupling,
    Flow,
    HistogramCoupling,
    Model,
    MultiScaleFlow,
    bits_per_dim,
    dither_matrix,
    embed,
    epoch_iter,
    from_latent,
    get_mask,
    importance_weighted_bpd,
    learning_rate,
    log_prior,
    moved,
    path,
    roundtrip_errors,
    run_epoch,
    sample_prior,
    save_bpd_plot,
    save_images,
    save_interpolations,
    to_latent,
)
from helpers import read_csv

BAYER_4 = [[0, 8, 2, 10],
           [12, 4, 14, 6],
           [3, 11, 1, 9],
           [15, 7, 13, 5]]
BAYER_8 = [[0, 32, 8, 40, 2, 34, 10, 42],
           [48, 16, 56, 24, 50, 18, 58, 26],
           [12, 44, 4, 36, 14, 46, 6, 38],
           [60, 28, 52, 20, 62, 30, 54, 22],
           [3, 35, 11, 43, 1, 33, 9, 41],
           [51, 19, 59, 27, 49, 17, 57, 25],
           [15, 47, 7, 39, 13, 45, 5, 37],
           [63, 31, 55, 23, 61, 29, 53, 21]]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Whole numbers from 0 to 255, a third of them black and a third white: (n, 784)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-255, 511, (n, PIXELS), generator=generator).clamp(0, 255).to(dtype)


def shaken(module: nn.Module, dtype: torch.dtype = torch.float64, size: float = 0.5) -> nn.Module:
    """The module with noise on every parameter: no layer is zero, no bias at its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += size / math.sqrt(fan_in) * noise
    return module.to(dtype).eval()


def make(arch: str, dtype: torch.dtype = torch.float64) -> Model:
    """A small model of random weights, neither near its start nor wild."""
    torch.manual_seed(0)
    if arch == 'mlp':
        return shaken(Model([PIXELS], Flow([PIXELS], n_flows=2, n_hidden=32)), dtype, size=0.1)
    return shaken(Model([PIXELS], MultiScaleFlow(n_hidden=8)), dtype)


@pytest.fixture(params=['mlp', 'multiscale'])
def arch(request) -> str:
    return request.param


@pytest.fixture
def model(arch) -> Model:
    return make(arch)


def log_density(model: Model, x: Tensor) -> Tensor:
    """log p of dequantised images: (B,)."""
    z, ldj = model.encode(x)
    return log_prior(z).flatten(1).sum(1) + ldj


# --- the prior, the bits, the board, the ranks, the path -----------------------------------------


def test_log_prior_is_that_of_torch_distributions():
    x = 5 * random(4, 3, 2)
    torch.testing.assert_close(log_prior(x), distributions.Normal(0., 1.).log_prob(x))


def test_the_prior_is_drawn_from_the_standard_normal():
    assert sample_prior((3, 2, 5)).shape == (3, 2, 5)
    draws = sample_prior((100, 100)).flatten()
    assert scipy.stats.kstest(draws.numpy(), 'norm').pvalue > 1e-3


def test_a_uniform_density_on_the_256_values_of_784_pixels_is_8_bits():
    log_px = torch.tensor([-784 * math.log(256), 0., 784 * math.log(2)], dtype=torch.float64)
    assert bits_per_dim(log_px).tolist() == pytest.approx([8, 0, -1])


def test_the_mask_is_a_checkerboard_with_1_in_the_corner():
    mask = get_mask()
    assert mask.shape == (1, PIXELS) and mask.unique().tolist() == [0, 1]
    board = mask.view(28, 28)
    assert board[0, 0] == 1
    assert (board[1:] + board[:-1] == 1).all() and (board[:, 1:] + board[:, :-1] == 1).all()


@pytest.mark.parametrize('matrix', [[[0]], [[0, 2], [3, 1]], BAYER_4, BAYER_8],
                         ids=lambda matrix: len(matrix))
def test_the_dither_matrix_is_the_classical_one(matrix):
    assert dither_matrix(len(matrix)).tolist() == matrix


def test_four_ranks_in_a_row_are_a_lattice_of_every_fourth_pixel():
    places = [divmod(int(i), 8) for i in dither_matrix(8).flatten().argsort()]
    for k in range(0, 64, 4):
        assert len({(row % 4, column % 4) for row, column in places[k:k + 4]}) == 1


def test_the_ends_of_a_path_are_exact_and_its_weights_are_those_worked_by_hand():
    start, end = random(2, 9)
    points = path(start, end, steps=2)
    assert points.shape == (4, 9)
    assert torch.equal(points[0], start) and torch.equal(points[-1], end)
    torch.testing.assert_close(points[1], (2 * start + end) / math.sqrt(5))
    torch.testing.assert_close(points[2], (start + 2 * end) / math.sqrt(5))


def test_a_path_between_independent_latents_stays_standard_normal():
    for points in path(*random(2, 20_000), steps=3):
        assert scipy.stats.kstest(points.numpy(), 'norm').pvalue > 1e-3


# --- the map of a histogram ----------------------------------------------------------------------


def histogram(*shape: int, n_bins: int = 9) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the bins, (*shape, K), and their edges."""
    edges = random(n_bins, seed=7).softmax(0).cumsum(0)
    return (2 * random(*shape, n_bins, seed=8)).log_softmax(-1), torch.cat(
        [torch.zeros(1, dtype=edges.dtype), edges[:-1], torch.ones(1, dtype=edges.dtype)])


def inside_bins(edges: Tensor, *shape: int) -> Tensor:
    """Logits of points that are nowhere near an edge."""
    generator = torch.Generator().manual_seed(9)
    k = torch.randint(len(edges) - 1, shape, generator=generator)
    part = 0.1 + 0.8 * torch.rand(shape, generator=generator, dtype=edges.dtype)
    return torch.logit(edges[k] + edges.diff()[k] * part)


def cdf(u: Tensor, log_p: Tensor, edges: Tensor) -> np.ndarray:
    """The piecewise-linear distribution function at each u, by numpy."""
    return np.reshape([
        np.interp(point, edges, np.append(0., p.cumsum()))
        for point, p in zip(u.flatten().numpy(), log_p.exp().flatten(0, -2).numpy(), strict=True)],
        u.shape)


def test_latents_are_normal_quantiles_of_the_distribution_function():
    log_p, edges = histogram(5, 40)
    z = 2 * random(5, 40)
    latent, _ = to_latent(z, log_p, edges)
    np.testing.assert_allclose(
        latent, scipy.stats.norm.ppf(cdf(z.sigmoid(), log_p, edges)), rtol=1e-9, atol=1e-9)


def test_the_slope_is_that_of_the_distribution_function_by_differences():
    log_p, edges = histogram(5, 40)
    z, h = inside_bins(edges, 5, 40), 1e-6
    u = z.sigmoid()
    density = (cdf(u + h, log_p, edges) - cdf(u - h, log_p, edges)) / (2 * h)
    latent = scipy.stats.norm.ppf(cdf(u, log_p, edges))
    expected = np.log(density) + scipy.stats.logistic.logpdf(z) - scipy.stats.norm.logpdf(latent)
    np.testing.assert_allclose(to_latent(z, log_p, edges)[1], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize('there', [to_latent, from_latent])
def test_slopes_are_those_of_autograd(there):
    log_p, edges = histogram(5, 40)
    z = 1.5 * random(5, 40)
    z.requires_grad_()
    mapped, log_slope = there(z, log_p, edges)
    [slope] = torch.autograd.grad(mapped.sum(), z)
    torch.testing.assert_close(log_slope, slope.log())


def test_the_maps_are_inverse_to_each_other():
    log_p, edges = histogram(50, 40)
    for z, there, back in ((3 * random(50, 40), to_latent, from_latent),
                           (1.5 * random(50, 40), from_latent, to_latent)):
        mapped, log_slope = there(z, log_p, edges)
        z_again, log_slope_back = back(mapped, log_p, edges)
        torch.testing.assert_close(z_again, z)
        torch.testing.assert_close(log_slope_back, -log_slope)


def test_a_point_on_an_edge_belongs_to_the_bin_on_its_right():
    _, log_slope = to_latent(torch.zeros(1), torch.tensor([0.2, 0.8]).log(),
                             torch.tensor([0, 0.5, 1]))
    expected = scipy.stats.norm.ppf(0.2)
    assert log_slope.item() == pytest.approx(
        math.log(1.6) + math.log(1 / 4) - scipy.stats.norm.logpdf(expected))


def test_rounding_moves_nothing_out_of_its_bin():
    log_p = torch.tensor([0.5, 4e-8, 0.5 - 4e-8]).log()  # the second: less than a digit of 0.5
    z, _ = from_latent(torch.linspace(-1e-6, 1e-6, 101), log_p, torch.tensor([0, 0.25, 0.75, 1]))
    assert (z.diff() >= 0).all()


def test_latents_pass_no_gradient_on_to_the_histogram():
    log_p, edges = histogram(5)
    latent, log_slope = to_latent(random(5), log_p.requires_grad_(), edges)
    assert log_slope.requires_grad and not latent.requires_grad


@pytest.mark.parametrize('there', [to_latent, from_latent])
def test_one_histogram_serves_a_whole_batch(there):
    log_p, edges = histogram(1, 40)
    z = random(5, 40)
    for broadcast, expanded in zip(there(z, log_p, edges), there(z, log_p.expand(5, 40, 9), edges),
                                   strict=True):
        assert torch.equal(broadcast, expanded)


def rare(p: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The middle of the first bin, which has probability p; log-probabilities; edges."""
    return (torch.tensor(scipy.special.logit(0.125), dtype=dtype),
            torch.tensor([p, 0.5, 0.5 - p], dtype=dtype).log(),
            torch.tensor([0, 0.25, 0.75, 1], dtype=dtype))


def test_both_tails_are_exact():
    z, log_p, edges = rare(1e-9, torch.float64)
    latent, log_slope = to_latent(z, log_p, edges)
    assert latent.item() == pytest.approx(scipy.stats.norm.ppf(5e-10), rel=1e-7)
    torch.testing.assert_close(from_latent(latent, log_p, edges), (z, -log_slope), rtol=1e-6,
                               atol=0)
    mirrored = to_latent(-z, log_p.flip(0), edges)
    torch.testing.assert_close(mirrored, (-latent, log_slope), rtol=1e-6, atol=0)
    torch.testing.assert_close(from_latent(mirrored[0], log_p.flip(0), edges), (-z, -log_slope),
                               rtol=1e-6, atol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('p', [1e-9, 1e-30])
def test_the_density_is_exact_in_both_tails_also_where_the_latent_is_rounded(p, dtype):
    z, log_p, edges = rare(p, dtype)
    expected = math.log(p / 0.25) + scipy.stats.logistic.logpdf(z.item())
    for latent, log_slope in (to_latent(z, log_p, edges), to_latent(-z, log_p.flip(0), edges)):
        assert (log_prior(latent) + log_slope).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('log_p', [[0., -1e3, -1e3], [-1e3, 0., -1e3], [-1e3, -1e3, 0.]])
def test_all_is_finite_where_probabilities_underflow(log_p, dtype):
    edges = torch.tensor([0, 0.25, 0.75, 1], dtype=dtype)
    log_p = torch.tensor(log_p, dtype=dtype)
    z = torch.linspace(-90, 90, 61, dtype=dtype)
    for there in (to_latent, from_latent):
        assert all(result.isfinite().all() for result in there(z, log_p, edges))


# --- the squeeze, the logit, the noise -----------------------------------------------------------


@pytest.mark.parametrize('alpha', [ALPHA, 0.1])
def test_logit_normalize_is_the_logit_with_the_determinant_of_autograd(monkeypatch, alpha):
    monkeypatch.setattr(a3_nf, 'ALPHA', alpha)
    x, logdet = (images(3) + 0.3).requires_grad_(), random(3)
    before = logdet.clone()
    model = Model([PIXELS], nn.Identity())
    z, logdet_z = model.logit_normalize(x, logdet)
    squeezed = (1 - alpha) * x.detach() / 256 + alpha / 2
    torch.testing.assert_close(z, torch.from_numpy(scipy.special.logit(squeezed.numpy())))
    [slope] = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(logdet_z, logdet + slope.log().sum(1))
    x_again, logdet_again = model.logit_normalize(z, logdet_z, reverse=True)
    torch.testing.assert_close(x_again, x)
    torch.testing.assert_close(logdet_again, logdet)
    assert torch.equal(logdet, before)


def test_noise_fills_the_cell_of_each_pixel_anew():
    x = images(20)
    u = Model([PIXELS], nn.Identity()).dequantize(x) - x
    assert u.min() >= 0 and u.max() < 1
    assert scipy.stats.kstest(u.flatten().numpy(), 'uniform').pvalue > 1e-3
    assert len(u.unique()) == u.numel()


# --- the density ---------------------------------------------------------------------------------


@pytest.mark.parametrize('reverse', [False, True])
def test_the_log_determinant_is_that_of_autograds_jacobian(model, reverse):
    z, ldj = 2 * random(1, PIXELS), random(1)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: model.flow(z, ldj, reverse)[0], z, vectorize=True)[0, :, 0]
    torch.testing.assert_close(model.flow(z, ldj, reverse)[1],
                               ldj + torch.linalg.slogdet(jacobian).logabsdet)


def test_the_log_determinant_of_the_multi_scale_flow_is_that_of_differences():
    model = make('multiscale')
    zeros = torch.zeros(4, dtype=torch.float64)
    z, _ = model.logit_normalize(images(4) + 0.5, zeros)  # off the edges, where f has a kink
    step = 1e-5 * random(4, PIXELS).sign()  # of both signs: no pixel moves another's latent
    slope = (model.flow(z + step, zeros)[0] - model.flow(z - step, zeros)[0]) / (2 * step)
    torch.testing.assert_close(model.flow(z, zeros)[1], slope.log().sum(1), rtol=1e-6, atol=1e-4)


def test_forward_then_reverse_gives_back_logits_and_determinant(model):
    x = images(8) + torch.rand(8, PIXELS, dtype=torch.float64)
    z, ldj = model.logit_normalize(x, random(8))
    before = z.clone(), ldj.clone()
    z_again, ldj_again = model.flow(*model.flow(z, ldj), reverse=True)
    torch.testing.assert_close(z_again, z)
    torch.testing.assert_close(ldj_again, ldj)
    assert torch.equal(z, before[0]) and torch.equal(ldj, before[1])  # arguments stay
    assert (model.decode(model.encode(x)[0]) - x).abs().max() < 1e-6


def test_reverse_then_forward_gives_back_latents_and_determinant(model):
    z, ldj = random(8, PIXELS), random(8)
    z_again, ldj_again = model.flow(*model.flow(z, ldj, reverse=True))
    torch.testing.assert_close(z_again, z)
    torch.testing.assert_close(ldj_again, ldj)


@pytest.mark.parametrize('std', [0., 0.02], ids=['zero', 'random'])
@pytest.mark.parametrize('make', [lambda: Coupling(c_in=PIXELS, mask=get_mask()),
                                  lambda: Flow([PIXELS], n_flows=2)], ids=['coupling', 'flow'])
def test_the_round_trip_that_the_course_asks_for(make, std):
    module, x = make(), random(8, PIXELS, dtype=torch.float32)
    for layer in getattr(module, 'layers', [module]):
        nn.init.normal_(layer.nn[-1].weight, std=std)
        nn.init.normal_(layer.nn[-1].bias, std=std)
    with torch.no_grad():
        z, ldj = module(x, torch.zeros(8))
        x_again, ldj_again = module(z, ldj, reverse=True)
    assert (z != x).any() == (std > 0)
    assert ((x_again - x) / x).abs().mean() < 1e-5
    assert ldj_again.abs().mean() < 1e-5


@torch.no_grad()
def test_the_round_trip_of_the_multi_scale_flow_in_float32():
    model, x = shaken(Model([PIXELS], MultiScaleFlow()), torch.float32), images(8)
    for u, worst in ((torch.full_like(x, 0.5), torch.max),  # no pixel crosses a whole value
                     (torch.rand_like(x), torch.median)):
        x_u = (x + u).float()
        assert worst((model.decode(model.encode(x_u)[0]) - x_u).abs()) < 0.01


def test_without_an_embedding_all_but_the_kind_of_input_is_the_same():
    flow = MultiScaleFlow(n_hidden=8, n_embedding=0)
    model, x = Model([PIXELS], flow), images(2) + torch.rand(2, PIXELS, dtype=torch.float64)
    assert bits_per_dim(log_density(model, x)).tolist() == pytest.approx([8, 8], abs=1e-4)
    shaken(model, torch.float32)
    z, ldj = model.logit_normalize(x, random(2))
    z.requires_grad_()
    latents, ldj_there = flow(z, ldj)
    [slope] = torch.autograd.grad(latents.sum(), z)
    torch.testing.assert_close(ldj_there, ldj + slope.log().sum(1))
    z_again, ldj_again = flow(latents, ldj_there, reverse=True)
    torch.testing.assert_close(z_again, z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ldj_again, ldj, rtol=0, atol=1e-2)


def closed_form_bpd(alpha: float) -> float:
    """Of the template's untrained flow, for pixels of all values alike: by quadrature."""
    def neg_log_density(s: float) -> float:
        return -scipy.stats.norm.logpdf(scipy.special.logit(s)) + math.log(s) + math.log1p(-s)
    integral, _ = scipy.integrate.quad(neg_log_density, alpha / 2, 1 - alpha / 2, limit=200)
    return (integral / (1 - alpha) - math.log1p(-alpha)) / math.log(2) + 8


@pytest.mark.parametrize('alpha', [ALPHA, 0.1])
def test_the_untrained_template_flow_has_the_bits_of_the_closed_form(monkeypatch, alpha):
    monkeypatch.setattr(a3_nf, 'ALPHA', alpha)
    model = Model([PIXELS], Flow([PIXELS], n_flows=1, n_hidden=8)).double()
    every_value_alike = (torch.arange(64 * PIXELS) % 256).view(64, PIXELS).double()
    bpd = bits_per_dim(model(every_value_alike)).mean().item()
    assert bpd == pytest.approx(closed_form_bpd(alpha), abs=5e-3)


def test_the_closed_form_is_8_bits_and_the_divergence_of_logistic_from_normal():
    kl = -2 + math.log(2 * math.pi) / 2 + math.pi ** 2 / 6  # −h(logistic) + ½ log 2π + ½ π²/3
    assert closed_form_bpd(0) == pytest.approx(8 + kl / math.log(2), abs=1e-3)
    assert 8 + kl / math.log(2) == pytest.approx(8.81, abs=5e-3)


@pytest.mark.parametrize('alpha', [ALPHA, 0.1])
def test_the_untrained_multi_scale_flow_has_8_bits_for_any_image(monkeypatch, alpha):
    monkeypatch.setattr(a3_nf, 'ALPHA', alpha)
    model = Model([PIXELS], MultiScaleFlow(n_hidden=8))
    x = torch.cat([images(3, dtype=torch.float32), torch.zeros(1, PIXELS),
                   torch.full((1, PIXELS), 255.)])
    assert bits_per_dim(model(x)).tolist() == pytest.approx([8.] * 5, abs=1e-4)


def test_the_density_is_the_same_anywhere_in_the_cell_of_a_pixel():
    model = make('multiscale')
    values = torch.arange(4 * PIXELS).view(4, PIXELS) % 256
    low, middle, high = (log_density(model, values + u) for u in (0.001, 0.5, 0.999))
    torch.testing.assert_close(low, middle)
    torch.testing.assert_close(high, middle)


def test_black_and_white_have_bins_of_their_own():
    assert KNOTS[:2] == (0, 1) and KNOTS[-2:] == (255, 256) and sorted(set(KNOTS)) == list(KNOTS)


def test_the_gradient_of_the_loss_is_that_of_differences_in_the_weights(model):
    """The latents pass no gradient on to the networks; what they leave out would be zero."""
    x, weights = images(3) + 0.5, list(model.parameters())
    gradients = torch.autograd.grad(log_density(model, x).sum(), weights)
    assert all(gradient.any() for gradient in gradients)
    direction = [random(*weight.shape, seed=i) for i, weight in enumerate(weights)]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    sides, h = [], 1e-6
    with torch.no_grad():
        for step in (h, -2 * h):
            for weight, d in zip(weights, direction, strict=True):
                weight += step * d
            sides.append(log_density(model, x).sum())
    torch.testing.assert_close(slope, (sides[0] - sides[1]) / (2 * h), rtol=1e-5, atol=1e-4)


def test_forward_is_the_log_density_of_dequantised_images(model):
    x = images(3)
    torch.manual_seed(1)
    log_px = model(x)
    torch.manual_seed(1)
    assert log_px.shape == (3,)
    torch.testing.assert_close(log_px, log_density(model, x + torch.rand_like(x)))


# --- two dimensions, where everything can be counted ---------------------------------------------


class Chain(nn.Module):
    """Layers one after the other, on latents of any shape."""

    def __init__(self, layers: list[nn.Module], z_shape: tuple[int, ...]):
        super().__init__()
        self.layers, self.z_shape = nn.ModuleList(layers), z_shape

    def forward(self, z: Tensor, ldj: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        for layer in reversed(self.layers) if reverse else self.layers:
            z, ldj = layer(z, ldj, reverse)
        return z, ldj


class Toy:
    """A model of two pixels, and the probability of each square of a grid by its density.

    Values: where the grid's lines are, (M + 1,); `masses`: of the squares, (M, M).
    """

    def __init__(self, kind: str):
        if kind == 'affine':
            masks = [torch.tensor([mask]) for mask in ([1., 0.], [0., 1.])] * 2
            chain = Chain([Coupling(2, mask, n_hidden=16) for mask in masks], (2,))
            squeezed = torch.linspace(-16, 16, 321, dtype=torch.float64).sigmoid()
            self.values = (squeezed - ALPHA / 2) * 256 / (1 - ALPHA)  # past black and white, too
        else:
            embedding, rank = nn.Embedding(256, 8), torch.arange(2).view(2, 1, 1)
            chain = Chain([HistogramCoupling(embedding, rank, first, first + 1, n_hidden=8)
                           for first in (1, 0)], (2, 1, 1))
            self.values = torch.arange(257, dtype=torch.float64)
        self.model = shaken(Model([2], chain), size=0.7)
        middles, widths = (self.values[1:] + self.values[:-1]) / 2, self.values.diff()
        points = torch.cartesian_prod(middles, middles).view(-1, *chain.z_shape)
        with torch.no_grad():
            density = log_density(self.model, points).exp().view(len(widths), len(widths))
        self.masses = density * widths[:, None] * widths


@pytest.fixture(scope='module', params=['affine', 'histogram'])
def toy(request) -> Toy:
    torch.manual_seed(0)
    return Toy(request.param)


def test_the_density_of_two_pixels_integrates_to_1(toy):
    assert toy.masses.sum().item() == pytest.approx(1, abs=1e-3)


def test_the_pixels_of_the_toy_depend_on_each_other(toy):
    independent = toy.masses.sum(1, keepdim=True) * toy.masses.sum(0)
    assert (toy.masses - independent).abs().sum() / 2 > 0.03  # or the others would show little


def test_samples_of_two_pixels_fall_as_often_as_the_density_says(toy):
    n, side = 100_000, len(toy.masses) // 32
    x = toy.model.sample(n).flatten(1)
    counts, _, _ = np.histogram2d(*x.T.double().numpy(), bins=[toy.values[::side].numpy()] * 2)
    p = toy.masses.view(32, side, 32, side).sum((1, 3)).numpy()
    distance = np.abs(counts / n - p).sum() / 2
    by_chance = np.sqrt(2 / np.pi * p * (1 - p) / n).sum() / 2
    assert distance < 1.2 * by_chance < 0.06


# --- the modules ---------------------------------------------------------------------------------


def test_the_template_calls_modules_with_these_arguments():
    model = Model(shape=[PIXELS])
    assert isinstance(model.flow, Flow) and model.flow.z_shape == (PIXELS,)
    assert len(model.flow.layers) == 8 and model.flow.layers[0].nn[0].out_features == 1024
    with torch.no_grad():
        assert model(images(2, dtype=torch.float32)).shape == (2,)
    assert model.sample(n_samples=2).shape == (2, PIXELS)


def test_a_coupling_is_the_equation_of_the_paper():
    mask = torch.tensor([[1., 0, 0, 1, 0, 1]], dtype=torch.float64)
    coupling = shaken(Coupling(6, mask, n_hidden=16), size=2.)
    z, ldj = random(5, 6), random(5, seed=1)
    kept, changed = z[:, [0, 3, 5]], z[:, [1, 2, 4]]
    s, t = coupling.nn(kept).chunk(2, dim=1)
    z_there, ldj_there = coupling(z, ldj)
    assert torch.equal(z_there[:, [0, 3, 5]], kept)
    torch.testing.assert_close(z_there[:, [1, 2, 4]], changed * s.tanh().exp() + t)
    torch.testing.assert_close(ldj_there, ldj + s.tanh().sum(1))


def test_couplings_take_turns_on_the_board():
    corners = [float(layer.mask[0, 0]) for layer in Flow([PIXELS], 3, n_hidden=2).layers]
    assert corners == [1, 0] * 3


def test_the_template_flow_starts_as_the_identity():
    z, ldj = random(3, PIXELS, dtype=torch.float32), torch.zeros(3)
    z_there, ldj_there = Flow([PIXELS], 2, n_hidden=8)(z, ldj)
    assert torch.equal(z_there, z) and torch.equal(ldj_there, ldj)


STARTS = {3: [0, 1, 2, *range(4, 64, 3)], 4: [0, 1, 2, *range(4, 64, 4)],
          8: [0, 1, 2, 4, *range(8, 64, 8)], 16: [0, 1, 2, 4, 8, 16, 32, 48],
          64: [0, 1, 2, 4, 8, 16, 32]}  # the first rank of each coupling, by `max_ranks`


@pytest.mark.parametrize('max_ranks', STARTS)
def test_a_latent_depends_on_its_pixel_and_on_all_those_of_earlier_couplings(max_ranks):
    flow = shaken(MultiScaleFlow(n_hidden=4, max_ranks=max_ranks))
    rank = torch.tensor(BAYER_8).repeat(4, 4)[:28, :28].flatten()
    coupling = torch.bucketize(rank, torch.tensor(STARTS[max_ranks]), right=True)
    x = images(1) + 0.5
    changed = rank == torch.arange(-1, 64)[:, None]  # nothing, then each rank
    x = torch.where(changed, (x + 128) % 256, x)
    latents, _ = flow(torch.logit(x / 256), x.new_zeros(65))
    coupling_of_rank = torch.stack([coupling[rank == r][0] for r in range(64)])
    expected = changed[1:] | (coupling > coupling_of_rank[:, None])
    assert torch.equal((latents[1:] - latents[0]).abs() > 1e-9, expected)


@pytest.mark.parametrize('max_ranks', STARTS)
def test_every_pixel_is_mapped_by_exactly_one_coupling(max_ranks):
    flow = shaken(MultiScaleFlow(n_hidden=4, max_ranks=max_ranks))
    z = random(2, 16, 7, 7)
    times = sum((layer(z, z.new_zeros(2))[0] != z).int() for layer in flow.layers)
    assert len(flow.layers) == len(STARTS[max_ranks]) and (times == 1).all()


@pytest.mark.parametrize('u, dtype', [(0.01, torch.float32), (0.99, torch.float32),
                                      (1e-6, torch.float64), (1 - 1e-6, torch.float64)])
def test_networks_see_whole_values(u, dtype):
    embedding = nn.Embedding(256, 8)
    values = torch.arange(256).view(1, 4, 8, 8)
    z, _ = Model([256], nn.Identity()).logit_normalize(values.to(dtype) + u, torch.zeros(1))
    for channel, vectors in enumerate(embed(embedding, z)):
        assert vectors.shape == (1, 8, 8, 8)
        assert torch.equal(vectors[0].permute(1, 2, 0), embedding.weight[values[0, channel]])


def test_without_an_embedding_networks_see_shares_of_256():
    x = 256 * torch.rand(2, 3, 7, 7, dtype=torch.float64)
    z, _ = Model([147], nn.Identity()).logit_normalize(x, torch.zeros(2))
    seen = torch.stack(embed(None, z), dim=1)
    torch.testing.assert_close(seen.float(), (x / 256).float()[:, :, None])


def test_logits_of_no_value_are_seen_as_black_or_white():
    embedding = nn.Embedding(256, 8)
    black, white = embed(embedding, torch.tensor([-1e3, 1e3]).view(1, 2, 1, 1))
    assert torch.equal(black.flatten(), embedding.weight[0])
    assert torch.equal(white.flatten(), embedding.weight[255])


def test_samples_are_decoded_noise_of_that_temperature(arch):
    model = make(arch, torch.float32)
    torch.manual_seed(1)
    x = model.sample(50, 0.7)
    torch.manual_seed(1)
    eps = torch.randn(50, PIXELS)
    torch.testing.assert_close(x, model.decode(0.7 * eps), rtol=1e-4, atol=1e-3)
    assert x.shape == (50, PIXELS) and not x.requires_grad
    assert -0.01 < x.min() < 10 and 246 < x.max() < 256.01


def test_only_the_networks_compute_in_bfloat16(arch):
    model, x = make(arch, torch.float32), images(4, dtype=torch.float32)
    x = x + 0.5
    in_float32 = bits_per_dim(log_density(model, x))
    with torch.autocast('cpu', torch.bfloat16):
        z, ldj = model.encode(x)
        in_bfloat16 = bits_per_dim(log_density(model, x))
    assert z.dtype == ldj.dtype == in_bfloat16.dtype == torch.float32
    assert not torch.equal(in_bfloat16, in_float32)
    torch.testing.assert_close(in_bfloat16, in_float32, rtol=0.01, atol=0)


# --- the loops -----------------------------------------------------------------------------------


class Stub(nn.Module):
    """Its bits per dimension are the average pixel; it remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((float(images[0, 0]), self.training, torch.is_grad_enabled(),
                           torch.is_autocast_enabled('cpu')))
        return -self.weight * images.mean(1) * PIXELS * math.log(2)


def batches(*sizes_and_values: tuple[int, float]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.full((size, PIXELS), float(value)), torch.zeros(size))
            for size, value in sizes_and_values]


@pytest.mark.parametrize('training', [True, False])
def test_an_epoch_weights_images_not_batches(training):
    model = Stub().train(training)
    average = epoch_iter(model, batches((5, 1), (5, 2), (2, 10)),
                         torch.optim.SGD(model.parameters(), lr=0.))
    assert isinstance(average, float)
    assert average == pytest.approx((5 * 1 + 5 * 2 + 2 * 10) / 12)


def test_training_is_one_step_for_each_batch_with_its_own_gradient_clipped():
    model = Stub().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** step)
    epoch_iter(model, batches((3, 0.5), (2, 5), (1, 0.25)), optimizer, schedule)
    assert model.weight.item() == pytest.approx(
        1 - 0.1 * (0.5 + MAX_GRAD_NORM / 2 + 0.25 / 4))
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.1 / 8)


def test_training_changes_every_parameter_and_evaluation_none(arch):
    model = make(arch, torch.float32)
    data, optimizer = [(images(6, dtype=torch.float32), None)], torch.optim.SGD(
        model.parameters(), lr=1.)
    changed = []
    for _ in range(2):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        epoch_iter(model, data, optimizer)
        changed.append({not torch.equal(weight, parameter) for weight, parameter
                        in zip(before, model.parameters(), strict=True)})
        model.train()
    assert changed == [{False}, {True}]


@pytest.mark.parametrize('bf16', [False, True])
def test_run_epoch_trains_on_the_first_set_then_evaluates_on_the_second(bf16):
    model = Stub()
    train, val = run_epoch(model, (batches((2, 3), (2, 3)), batches((4, 7))),
                           torch.optim.SGD(model.parameters(), lr=0.), bf16=bf16)
    assert (train, val) == pytest.approx((3, 7))
    assert model.calls == [(3, True, True, bf16), (3, True, True, bf16), (7, False, False, bf16)]


def test_moved_images_are_rolled_alike_in_a_batch_to_all_sides():
    x, labels = images(3), torch.arange(3)

    def rolled(down: int, right: int) -> Tensor:
        rows, columns = (torch.arange(28) - down) % 28, (torch.arange(28) - right) % 28
        return x.view(-1, 28, 28)[:, rows][:, :, columns].flatten(1)
    allowed = {shift: rolled(*shift) for shift in itertools.product((-1, 0, 1), repeat=2)}
    seen = set()
    for batch, with_labels in moved([(x, labels)] * 150, 1):
        [shift] = [shift for shift in allowed if torch.equal(batch, allowed[shift])]
        seen.add(shift)
        assert with_labels is labels
    assert seen == set(allowed)


def test_images_moved_by_nothing_are_as_they_were():
    assert all(torch.equal(batch, images(3)) for batch, _ in moved([(images(3), None)] * 20, 0))


def iw_bpd(model: Model, x: Tensor, draws: int, times: int = 1) -> float:
    """The average over so many estimates, from the same stream of noise each time."""
    torch.manual_seed(1)
    return float(np.mean([importance_weighted_bpd(model, [(x, None)], draws)
                          for _ in range(times)]))


def test_one_importance_weighted_draw_is_the_ordinary_figure(model):
    torch.manual_seed(1)
    bpd = epoch_iter(model, [(images(3), None)])
    assert iw_bpd(model, images(3), 1) == pytest.approx(bpd)


def test_importance_weighting_averages_densities_of_each_image(model):
    data = [(images(3), None), (images(2, seed=1), None)]
    torch.manual_seed(1)
    bpd = importance_weighted_bpd(model, data, 4)
    torch.manual_seed(1)
    with torch.no_grad():
        log_px = np.hstack([np.stack([model(x).numpy() for _ in range(4)]) for x, _ in data])
    expected = -scipy.special.logsumexp(log_px, axis=0, b=1 / 4) / (PIXELS * math.log(2))
    assert bpd == pytest.approx(expected.mean(), rel=1e-9)


def test_more_draws_are_a_tighter_bound_where_the_density_varies_in_a_cell(arch, model):
    x = images(3)
    one, five, twenty = iw_bpd(model, x, 1, 20), iw_bpd(model, x, 5, 4), iw_bpd(model, x, 20)
    if arch == 'mlp':
        assert twenty < five - 1e-3 and five < one - 1e-3
    else:
        assert twenty == pytest.approx(one, abs=1e-6) and five == pytest.approx(one, abs=1e-6)


class Lossy(nn.Module):
    """Decodes the first pixel of each image as twice what it was."""

    def dequantize(self, x: Tensor) -> Tensor:
        return x

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))

    def decode(self, z: Tensor) -> Tensor:
        return torch.cat([2 * z[:, :1], z[:, 1:]], dim=1)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_round_trip_errors_are_those_of_the_worst_pixel_of_each_image(dtype):
    x = images(6)
    x[:, 0] = torch.tensor([0., 0.25, 3., 0.75, 0.5, 0.])
    errors = roundtrip_errors(Lossy(), [(x[:4], None), (x[4:], None)], dtype)
    assert errors.dtype == dtype and errors.tolist() == x[:, 0].tolist()


def test_the_round_trip_of_float32_networks_is_exact_where_the_maps_are_in_float64(arch):
    model = make(arch, torch.float32)
    in_float64, in_float32 = (
        roundtrip_errors(model, [(images(6, dtype=torch.float32), None)], dtype).max()
        for dtype in (torch.float64, torch.float32))
    assert 0 < in_float64 < 1e-6 < in_float32


def test_the_learning_rate_rises_for_a_hundredth_and_falls_to_0():
    factors = torch.tensor([learning_rate(i / 1000) for i in range(1001)])
    top = int(factors.argmax())
    assert factors[0] == 0 and factors[top] == pytest.approx(1) and abs(factors[-1]) < 1e-6
    assert top == 10
    assert (factors[:top + 1].diff() > 0).all() and (factors[top:].diff() < 0).all()


# --- the figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize('last, marks', [(1.1, PUBLISHED), (1.5, {'asked for': 1.85})])
def test_the_curve_has_a_pdf_a_csv_and_the_marks(tmp_path, monkeypatch, last, marks):
    drawn = {'axhline': [], 'annotate': []}  # heights and words, lowest first
    for name, method in ((name, getattr(Axes, name)) for name in drawn):
        monkeypatch.setattr(Axes, name, lambda axes, what, *words, name=name, method=method,
                            **options: drawn[name].append(what)
                            or method(axes, what, *words, **options))
    train, val = [8., 2., last - 0.1], [8., 2.5, last]
    save_bpd_plot(train, val, tmp_path / 'bpd.pdf')
    marks = [('asked for', 1.85), *sorted(marks.items(), key=lambda mark: mark[1])]
    assert list(zip(drawn['annotate'], drawn['axhline'], strict=True)) == marks
    assert (tmp_path / 'bpd.pdf').read_bytes().startswith(b'%PDF')
    assert [[float(cell) for cell in row.values()] for row in read_csv(tmp_path / 'bpd.csv')] == [
        pytest.approx(row) for row in zip(range(3), train, val, strict=True)]


def read_images(filename, columns: int) -> np.ndarray:
    """The grey values of a grid's images, row by row: (N, 28, 28)."""
    grid = matplotlib.image.imread(filename)[::3, ::3, 0] * 255
    rows = (len(grid) + 1) // 29
    return np.stack([grid[29 * i:29 * i + 28, 29 * j:29 * j + 28]
                     for i in range(rows) for j in range(columns)])


@pytest.mark.filterwarnings('error')
def test_pixels_are_shown_as_whole_grey_values_whatever_was_sampled(tmp_path):
    values = torch.tensor([0., 7.99, 8., 255.5, 256., -0.01, math.inf, -math.inf, math.nan])
    x = torch.zeros(2, PIXELS)
    x[1, :9] = values
    save_images(tmp_path / 'x.png', x, columns=2)
    black, shown = read_images(tmp_path / 'x.png', 2).round().reshape(2, PIXELS)
    assert not black.any()
    assert shown[:9].tolist() == [0, 7, 8, 255, 255, 0, 255, 0, 0]


def test_interpolations_go_from_the_first_image_of_a_class_to_that_of_the_next(tmp_path):
    model = Model([PIXELS], MultiScaleFlow(n_hidden=8)).eval()
    x, labels = images(7, dtype=torch.float32), torch.tensor([4, 4, 0, 9, 1, 0, 7])
    save_interpolations(model, x.byte(), labels, SimpleNamespace(path=tmp_path.joinpath))
    shown = read_images(tmp_path / 'interpolations.png', 9).reshape(2, 9, PIXELS)  # 0→1, 4→7
    ends = x[[2, 4, 0, 6]].view(2, 2, PIXELS).numpy()
    assert np.abs(shown[:, [0, 8]] - ends).max() < 1.5  # the logit in float32 may cross a value
    middles = shown[:, 1:8]
    assert (np.abs(middles - ends[:, :1]).mean((1, 2)) > 10).all()
