"""The flows' mathematics against independent oracles; then networks, loops, figures, a run."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

import a3_nf
from a3_nf import AutoregressiveFlow, Coupling, Flow, Model, bits_per_dim, from_latent, to_latent
from conftest import FEWER_DIGITS
from datasets import digits
from datasets.common import Loader
from helpers import TIMES, assert_one_line, read_csv, stamps

ROWS, COLUMNS = np.indices((28, 28))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Whole numbers from 0 to 255, a third of them black and a third white: (n, 784)."""
    return (300 * random(n, 784)).long().clamp(-127, 128).add(127).to(dtype)


def shaken(module: nn.Module, dtype: torch.dtype = torch.float64, size: float = 0.5) -> nn.Module:
    """The module with noise on every parameter: no layer is zero, no bias at its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter += size / math.sqrt(fan_in) * torch.randn(parameter.shape)
    return module.to(dtype).eval()


def make(arch: str, dtype: torch.dtype = torch.float64) -> Model:
    """A small model of random weights, neither near its start nor wild."""
    flow = (Flow([784], n_flows=2, n_hidden=32) if arch == 'mlp' else
            AutoregressiveFlow(n_hidden=8, n_layers=2))
    return shaken(Model([784], flow), dtype, size=0.1 if arch == 'mlp' else 0.5)


each_arch = pytest.mark.parametrize('arch', ['mlp', 'autoregressive'])
each_dtype = pytest.mark.parametrize('dtype', [torch.float32, torch.float64])


def test_log_prior_is_that_of_torch_distributions():
    x = 5 * random(4, 3)
    torch.testing.assert_close(a3_nf.log_prior(x), distributions.Normal(0., 1.).log_prob(x))


def test_the_learning_rate_rises_for_a_hundredth_and_falls_to_0():
    assert [a3_nf.learning_rate(progress) for progress in (0, 0.005, 0.01, 0.505, 1)] == [
        0, 0.5, pytest.approx(1), pytest.approx(0.5), 0]


def test_normal_quantiles_are_the_same_by_the_error_function():
    on_mps = type('OnMps', (Tensor,), {'device': SimpleNamespace(type='mps')})  # so it says
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(a3_nf.normal_quantile(u.as_subclass(on_mps)).as_subclass(Tensor),
                               a3_nf.normal_quantile(u))


def histogram(n: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of nine bins, (n, 9), and their edges, from 0 to 1."""
    return ((2 * random(n, 9, seed=8)).log_softmax(-1),
            torch.linspace(0, 1, 10, dtype=torch.float64).square())


def test_latents_are_normal_quantiles_of_the_distribution_function_without_gradient():
    (log_p, edges), z = histogram(200), 2 * random(200)
    cdf = [np.interp(u, edges, np.append(0., p.cumsum()))
           for u, p in zip(z.sigmoid(), log_p.exp().numpy(), strict=True)]
    latent, _ = to_latent(z, log_p.requires_grad_(), edges)
    np.testing.assert_allclose(latent, scipy.stats.norm.ppf(cdf), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('there, back', [(to_latent, from_latent), (from_latent, to_latent)])
def test_slopes_are_those_of_autograd_and_the_maps_inverse_to_each_other(there, back):
    (log_p, edges), z = histogram(2000), (1.5 * random(2000)).requires_grad_()
    mapped, log_slope = there(z, log_p, edges)
    [slope] = torch.autograd.grad(mapped.sum(), z)
    torch.testing.assert_close(log_slope, slope.log())
    torch.testing.assert_close(back(mapped, log_p, edges), (z, -log_slope))


def test_rounding_moves_nothing_out_of_its_bin():
    log_p = (9 * random(100, 1, 9)).float().log_softmax(-1)  # many are less than a digit of 1
    log_p = log_p.expand(-1, 201, -1)
    latent = torch.linspace(-6, 6, 201).expand(100, -1)
    u = from_latent(latent, log_p, torch.linspace(0.1, 0.9, 10))[0].sigmoid()
    assert (u.diff() >= 0).all() and u.min() > 0.0999 and u.max() < 0.9001


@each_dtype
def test_extreme_probabilities_and_logits_leave_all_finite_and_the_density_exact(dtype):
    edges = torch.tensor([0, 0.5, 0.75, 1], dtype=dtype)
    z = torch.linspace(-90, 90, 61, dtype=dtype)  # the middle is on an edge
    for log_p in torch.tensor([[0., -1e3, -1e3], [-1e3, 0., -1e3], [-1e3, -1e3, 0.]], dtype=dtype
                              )[:, None].expand(-1, 61, -1):
        latent, log_slope = to_latent(z, log_p, edges)
        k = torch.bucketize(z.sigmoid(), edges[1:-1], right=True)
        expected = log_p[0, k] - edges.diff().log()[k] + F.logsigmoid(z) + F.logsigmoid(-z)
        torch.testing.assert_close(a3_nf.log_prior(latent) + log_slope, expected)
        for mapped in (latent, *from_latent(z, log_p, edges)):
            assert mapped.isfinite().all()


def test_logit_normalize_is_the_logit_with_the_determinant_of_autograd(monkeypatch):
    monkeypatch.setattr(a3_nf, 'ALPHA', 0.1)
    x, logdet = (images(3) + 0.3).requires_grad_(), random(3)
    model = Model([784], nn.Identity())
    z, logdet_z = model.logit_normalize(x, logdet)
    squeezed = 0.9 * x.detach() / 256 + 0.05
    torch.testing.assert_close(z, torch.from_numpy(scipy.special.logit(squeezed.numpy())))
    [slope] = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(logdet_z, logdet + slope.log().sum(1))
    torch.testing.assert_close(model.logit_normalize(z, logdet_z, reverse=True), (x, logdet))


def test_noise_fills_the_cell_of_each_pixel_anew():
    u = Model([784], nn.Identity()).dequantize(torch.full((20, 784), 5., dtype=torch.float64)) - 5
    assert u.min() >= 0 and u.max() < 1 and len(u.unique()) == u.numel()
    assert scipy.stats.kstest(u.flatten().numpy(), 'uniform').pvalue > 1e-3


# --- flows and their densities -------------------------------------------------------------------


@each_arch
def test_the_log_determinant_is_that_of_autograds_jacobian(arch):
    flow, z, ldj = make(arch).flow, 2 * random(1, 784), random(1)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: flow(z, ldj)[0], z, vectorize=True)[0, :, 0]
    torch.testing.assert_close(flow(z, ldj)[1], ldj + torch.linalg.slogdet(jacobian).logabsdet)


@each_arch
def test_a_flow_is_inverted_pixel_by_pixel_in_float64_and_almost_in_float32(arch):
    model, x = make(arch, torch.float32), images(8)
    in_float64, in_float32 = (
        a3_nf.roundtrip_errors(model, [(x[:5], None), (x[5:], None)], dtype).abs()
        for dtype in (torch.float64, torch.float32))
    assert len(in_float64) == 8 and in_float64.max() < 1e-9 < 1e-6 < in_float32.max()
    model = model.double()
    z, ldj = model.logit_normalize(model.dequantize(x), random(8))
    torch.testing.assert_close(model.flow(*model.flow(z, ldj), reverse=True), (z, ldj))


@each_arch
def test_only_the_networks_compute_in_bfloat16(arch):
    model, x = make(arch, torch.float32), images(4, torch.float32) + 0.5
    with torch.autocast('cpu', torch.bfloat16):
        z, ldj = model.encode(x)
    in_float32 = model.encode(x)[1]
    assert z.dtype == ldj.dtype == torch.float32 and not torch.equal(ldj, in_float32)
    torch.testing.assert_close(ldj, in_float32, rtol=0.01, atol=0)


@each_arch
def test_the_gradient_of_the_loss_is_that_of_differences_in_the_weights(arch):
    """The latents pass no gradient on to the networks; what they leave out would be zero."""
    model, x = make(arch), images(3)
    weights = dict(model.named_parameters())

    def loss(*values: Tensor) -> Tensor:
        torch.manual_seed(0)
        return torch.func.functional_call(model, dict(zip(weights, values, strict=True)), x).sum()
    assert torch.autograd.gradcheck(loss, (*weights.values(),), fast_mode=True, rtol=1e-5)


def test_the_untrained_template_flow_has_the_bits_of_the_closed_form():
    def neg_log_density(s: float) -> float:
        return -scipy.stats.norm.logpdf(scipy.special.logit(s)) + math.log(s) + math.log1p(-s)
    integral, _ = scipy.integrate.quad(neg_log_density, 0.0005, 0.9995, limit=200)
    closed_form = 8 + (integral / 0.999 - math.log(0.999)) / math.log(2)
    every_value_as_often = (torch.arange(64 * 784) % 256).view(64, 784).float()
    bpd = bits_per_dim(Model(shape=[784])(every_value_as_often))
    assert bpd.mean().item() == pytest.approx(closed_form, abs=5e-3)


def test_the_untrained_autoregressive_flow_has_8_bits_for_any_image():
    x = torch.cat([images(3, torch.float32), torch.zeros(1, 784), torch.full((1, 784), 255.)])
    bpd = bits_per_dim(Model([784], AutoregressiveFlow(8))(x))
    assert bpd.tolist() == pytest.approx([8.] * 5, abs=1e-4)


@pytest.mark.parametrize('pixel, cell', [(0, 0), (3, 20), (4, 30), (15, 48)])
def test_the_probabilities_of_a_pixels_256_values_sum_to_1(pixel, cell):
    flow, z = make('autoregressive').flow, random(16, 1, 49).repeat(1, 256, 1)
    share = a3_nf.ALPHA / 2 + (1 - a3_nf.ALPHA) / 256 * (torch.arange(256.).double() + 0.3)
    z[pixel, :, cell] = share.logit()
    latents, log_slope = flow.map(z)
    density = (a3_nf.log_prior(latents) + log_slope)[pixel, :, cell].exp()  # of the logit
    p = density * (1 - a3_nf.ALPHA) / 256 / (share * (1 - share))
    assert p.sum().item() == pytest.approx(1, abs=1e-9) and p.max() > 1.3 * p.min()


@pytest.mark.parametrize('plan', [4, 0])
def test_a_latent_depends_on_its_pixel_and_on_the_earlier_ones_that_its_cell_has_heard_of(plan):
    flow = shaken(AutoregressiveFlow(n_hidden=4, n_layers=2, plan=plan))
    cell = torch.from_numpy(ROWS // 4 * 7 + COLUMNS // 4).flatten()
    # Bayer's matrix in closed form: bits of row ^ column and of row in turn, the lowest first.
    rank = torch.from_numpy(sum(4 ** (1 - bit) * (2 * ((ROWS ^ COLUMNS) >> bit & 1) + (
        ROWS >> bit & 1)) for bit in range(2))).flatten()
    detail = rank >= plan
    row, column = torch.arange(49) // 7, torch.arange(49) % 7
    near = ((row - row[:, None]).abs() <= 1) & ((column - column[:, None]).abs() <= 1)
    heard = near.cummax(0).values  # by a cell or one before it, from which it gathers
    heard_before = (near & (torch.arange(49) < torch.arange(49)[:, None])).cummax(0).values
    i, j = (cell[:, None], rank[:, None], detail[:, None]), (cell, rank, detail)
    expected = torch.eye(784, dtype=torch.bool) | torch.where(
        i[2] == j[2], heard_before[i[0], j[0]] | (i[0] == j[0]) & (j[1] < i[1]),
        i[2] & ~j[2] & heard[i[0], j[0]])
    x = images(1).repeat(785, 1) + 0.5
    x[1:] = torch.where(torch.eye(784, dtype=torch.bool), (x[1:] + 128) % 256, x[1:])
    latents = torch.cat([flow(rows, torch.zeros(len(rows)))[0]
                         for rows in torch.logit(x / 256).split(112)]).detach()
    assert torch.equal(((latents[1:] - latents[0]).abs() > 1e-11).T, expected)


@pytest.mark.parametrize('margin, dtype', [(0.01, torch.float32), (1e-6, torch.float64)])
def test_networks_see_whole_values_and_beyond_these_black_or_white(margin, dtype):
    flow, values = AutoregressiveFlow(8), torch.arange(256).to(dtype)
    for u in (margin, 1 - margin):
        z, _ = Model([256], nn.Identity()).logit_normalize((values + u)[None], torch.zeros(1))
        assert torch.equal(flow.embed(z[0]), flow.embedding.weight)
    ends = flow.embed(torch.tensor([-1e3, 1e3], dtype=dtype))
    assert torch.equal(ends, flow.embedding.weight[[0, 255]])


def test_muon_updates_the_matrices_of_the_autoregressive_flow_and_adam_all_else():
    model = make('autoregressive')
    groups = [optimizer.param_groups[0]['params']
              for optimizer in a3_nf.make_optimizers(model, 1e-2)]
    names = {weight: name for name, weight in model.named_parameters()}
    adam, muon = ([names.pop(weight) for weight in group] for group in groups)
    assert not names and all(name.endswith('.weight') for name in muon)
    assert {name.split('.')[-2] for name in muon} == {
        'look', 'qkv', 'out', 'up', 'down', 'cell', 'within'}
    assert len(a3_nf.make_optimizers(make('mlp'), 1e-2)) == 1


def test_a_coupling_is_the_equation_of_the_paper():
    mask = torch.tensor([[1., 0, 0, 1, 0, 1]], dtype=torch.float64)
    coupling = shaken(Coupling(6, mask, n_hidden=16), size=2.)
    z, ldj = random(5, 6), random(5, seed=1)
    s, t = coupling.nn(z[:, [0, 3, 5]]).chunk(2, dim=1)
    expected = z.index_copy(1, torch.tensor([1, 2, 4]), z[:, [1, 2, 4]] * s.tanh().exp() + t)
    torch.testing.assert_close(coupling(z, ldj), (expected, ldj + s.tanh().sum(1)))


def test_the_template_flow_starts_as_the_identity_and_takes_turns_on_a_checkerboard():
    flow, z, ldj = Flow([784], 3, n_hidden=2), random(3, 784), random(3)
    torch.testing.assert_close(flow(z, ldj), (z, ldj), rtol=0, atol=0)
    assert [layer.mask.tolist() for layer in flow.layers] == [
        [((ROWS + COLUMNS + corner) % 2).flatten().tolist()] for corner in (1, 0) * 3]


# --- loops ---------------------------------------------------------------------------------------


class Stub(nn.Module):
    """Its bits per dimension are the average pixel, and it decodes the first one doubled.

    It remembers how it was called, and takes nine seconds for 100 samples, later one.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls, self.dtypes, self.clock = [], [], 0.
        self.flow = Flow([784], 0)

    def __deepcopy__(self, _) -> 'Stub':
        return self

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((float(images[0, 0]), self.training, torch.is_grad_enabled(),
                           torch.is_autocast_enabled('cpu')))
        return -self.weight * images.mean(1) * 784 * math.log(2)

    def dequantize(self, x: Tensor) -> Tensor:
        self.dtypes.append(x.dtype)
        return x

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))

    def decode(self, z: Tensor) -> Tensor:
        return torch.cat([2 * z[:, :1], z[:, 1:]], dim=1)

    def sample(self, n_samples: int, temperature: float = 1.) -> Tensor:
        self.clock += (1 if self.clock else 9) * n_samples / 100
        return torch.full((n_samples, 784), 255.9 if temperature == 1 else 100.)


def batches(*sizes_and_values: tuple[int, float]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.full((size, 784), float(value)), torch.zeros(size))
            for size, value in sizes_and_values]


@pytest.mark.parametrize('bf16', [False, True])
def test_an_epoch_trains_then_evaluates_and_each_image_has_the_same_weight(bf16):
    model = Stub()
    figures = a3_nf.run_epoch(model, (batches((5, 1), (2, 10)), batches((4, 7), (1, 2))),
                              torch.optim.SGD(model.parameters(), lr=0.), bf16=bf16)
    assert figures == (pytest.approx((5 * 1 + 2 * 10) / 7), pytest.approx((4 * 7 + 2) / 5))
    assert model.calls == [(1, True, True, bf16), (10, True, True, bf16),
                           (7, False, False, bf16), (2, False, False, bf16)]


def test_training_is_one_step_for_each_batch_with_its_own_gradient_clipped():
    model = Stub().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** step)
    a3_nf.epoch_iter(model, batches((3, 0.5), (2, 5), (1, 0.25)), optimizer, schedules=[schedule])
    assert model.weight.item() == pytest.approx(1 - 0.1 * (0.5 + 1 / 2 + 0.25 / 4))
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.1 / 8)


def test_moved_images_are_rolled_by_as_much_in_a_batch_to_all_sides():
    x, labels, seen = images(3), torch.arange(3), set()
    rolled = {(i, j): np.roll(x.view(-1, 28, 28), (i - 1, j - 1), (1, 2)).reshape(-1, 784)
              for i, j in np.ndindex(3, 3)}
    for batch, with_labels in a3_nf.moved([(x, labels)] * 150, 1):
        seen |= {shift for shift in rolled if np.array_equal(batch, rolled[shift])} or {None}
        assert with_labels is labels
    assert seen == set(rolled)


def test_importance_weighting_averages_the_densities_of_each_image():
    log_px = 9 * random(2, 4, 3)  # of two batches, four draws, three images
    draws, batch = iter(log_px.flatten(0, 1)), (torch.zeros(3, 784), None)
    bpd = a3_nf.importance_weighted_bpd(lambda _: next(draws), [batch] * 2, 4)
    expected = -scipy.special.logsumexp(log_px, axis=1, b=1 / 4) / (784 * math.log(2))
    assert bpd == pytest.approx(expected.mean(), rel=1e-9)


@pytest.mark.parametrize('draws', [8, 0])
def test_final_estimates_are_of_these_images_in_this_precision(monkeypatch, draws):
    model, judge = Stub().eval(), SimpleNamespace(
        glance=lambda samples: {'frechet': len(samples) + round(float(samples.max()))},
        measure=lambda samples: {'frechet': float(samples.max()), 'recall': 0.5})
    if not draws:
        model.flow = nn.Identity()  # not the template's: noise within a cell changes nothing
    judged = []
    monkeypatch.setattr(a3_nf.measures, 'Judge', lambda *real: judged.append(real) or judge)
    monkeypatch.setattr(a3_nf.time, 'perf_counter', lambda: model.clock)
    val, test = torch.full((6, 784), 3, dtype=torch.uint8), torch.zeros(1003, 784).byte()
    test[[1, 2, 1001], 0] = torch.tensor([1, 3, 200]).byte()  # the last is not decoded
    loaders = [Loader(x, torch.zeros(len(x)), 250, False, {}) for x in (val, test)]
    classifier = nn.Linear(1, 1)
    estimates = a3_nf.final_estimates(model, classifier, *loaders, seed=7)
    test_bpd = pytest.approx(204 / 1003 / 784)
    assert estimates == ({'test_bpd_iw': test_bpd, 'iw_draws': 8} if draws else {}) | {
        'val_bpd': pytest.approx(3), 'test_bpd': test_bpd, 'val_frechet': 1004,
        'frechet_cool': 1003, 'frechet_floor': 6, 'frechet': 1., 'recall': 0.5,
        'classifier_sha256': a3_nf.measures.fingerprint(classifier),
        'roundtrip_max_error': 3, 'roundtrip_share_off_float32': pytest.approx(2 / 1000),
        'sample_seconds_per_100': 1, 'parameters': 1, 'test_minutes': pytest.approx(101.3 / 60)}
    assert len(model.calls) == 1 + 5 + draws * 5
    for (judge_of, real, _), loader in zip(judged, loaders, strict=True):
        assert judge_of is classifier and torch.equal(real, loader.images / 255)
    assert model.dtypes == 4 * [torch.float64] + 4 * [torch.float32]


# --- figures, and a run --------------------------------------------------------------------------


@pytest.mark.parametrize('last, marks', [(1.1, {}), (1.5, {'1.85': 1.85})])
def test_the_mark_of_the_assignment_is_shown_unless_the_flow_is_far_below(
        monkeypatch, last, marks):
    panels = []
    monkeypatch.setattr(a3_nf.figures, 'save_curves', lambda *drawn: panels.extend(drawn[2]))
    a3_nf.save_bpd_plot([8., *[2.] * 50], [8., *[2.5] * 49, last], 'bpd.pdf')
    assert [panel['references'] for panel in panels] == [{'1.85': 1.85}, marks]
    assert panels[1]['start'] == 5


def read_images(filename: Path, columns: int) -> np.ndarray:
    """The grey values of a grid's images, row by row: (N, 28, 28)."""
    grid = matplotlib.image.imread(filename)[::3, ::3, 0] * 255
    rows = (len(grid) + 1) // 29
    return np.stack([grid[29 * i:29 * i + 28, 29 * j:29 * j + 28]
                     for i in range(rows) for j in range(columns)])


@pytest.mark.filterwarnings('error')
def test_pixels_are_shown_as_whole_grey_values_whatever_was_sampled(tmp_path):
    x = torch.zeros(2, 784)
    x[1, :9] = torch.tensor([0., 7.99, 8., 255.5, 256., -0.01, math.inf, -math.inf, math.nan])
    a3_nf.save_images(tmp_path / 'x.png', x, columns=2)
    shown = read_images(tmp_path / 'x.png', columns=2).round().flatten()
    assert shown[784:793].tolist() == [0, 7, 8, 255, 255, 0, 255, 0, 0]


def test_walks_are_weighted_so_that_each_point_is_as_normal_as_its_ends(tmp_path, monkeypatch):
    shown, ends = [], random(2, 784).float()
    monkeypatch.setattr(a3_nf, 'save_images', lambda path, images, columns: shown.append(images))
    model = SimpleNamespace(dequantize=lambda x: x, encode=lambda x: (x, None), decode=lambda z: z)
    a3_nf.save_interpolations(model, ends, torch.tensor([3, 8]), SimpleNamespace(path=str))
    weights = torch.stack([torch.linspace(1, 0, 9), torch.linspace(0, 1, 9)], dim=1)
    torch.testing.assert_close(shown[0], F.normalize(weights) @ ends)


def test_interpolations_go_from_the_first_image_of_a_class_to_that_of_the_next(tmp_path):
    x, labels = images(7, torch.float32), torch.tensor([4, 4, 0, 9, 1, 0, 7])
    a3_nf.save_interpolations(Model([784], AutoregressiveFlow(n_hidden=8)), x.byte(), labels,
                              SimpleNamespace(path=tmp_path.joinpath))
    shown = read_images(tmp_path / 'interpolations.png', 9).reshape(2, 9, 784)  # 0→1, 4→7
    ends = x[[2, 4, 0, 6]].view(2, 2, 784).numpy()
    assert np.abs(shown[:, [0, 8]] - ends).max() < 1.5  # the logit in float32 may cross a value
    assert (np.abs(shown[:, 1:8] - ends[:, :1]).mean((1, 2)) > 10).all()


TINY = ('--dataset', 'digits', '--n_hidden', 8, '--batch_size', 50, '--seed', 7)
RUN = (*TINY, '--epochs', 3, '--precision', 'bf16', '--run', 'three')


def expected_files(*epochs: int) -> set[str]:
    return {'config.json', 'log.csv', 'checkpoint.pt', 'metrics.json', 'bpd.pdf', 'bpd.csv',
            'interpolations.png', *(f'{kind}_epoch{epoch:02d}.png' for epoch in epochs
                                    for kind in ('samples', 'cool'))}


@pytest.fixture(scope='module')
def finished(tmp_path_factory, read_run) -> tuple[Path, dict]:
    """The folder of a finished run, and what was in it when the run ended."""
    results = tmp_path_factory.mktemp('finished')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'SIZES', FEWER_DIGITS)
        a3_nf.main(a3_nf.parse_args([*map(str, RUN), '--results_dir', str(results)]))
    return results / 'three', read_run(results / 'three')


def test_a_run_logs_each_epoch_from_the_untrained_network_on_and_leaves_these_files(finished):
    folder, left = finished
    assert set(left) == expected_files(0, 1, 2, 3)
    first, *_, last = rows = read_csv(folder / 'log.csv')
    assert list(first) == ['epoch', 'train_bpd', 'val_bpd', 'running_bpd', *TIMES]
    assert [row['epoch'] for row in rows] == ['0', '1', '2', '3']
    assert [name for row in rows for name in row if row[name] == ''] == ['running_bpd']
    assert float(first['val_bpd']) == pytest.approx(8, abs=0.05)  # in bfloat16 not quite
    assert float(last['val_bpd']) < 5 and last['train_bpd'] != last['val_bpd']
    assert [list(row.values()) for row in read_csv(folder / 'bpd.csv')] == [
        [row['epoch'], row['train_bpd'], row['val_bpd']] for row in rows]
    parts = torch.load(folder / 'checkpoint.pt')['parts']
    for name in ('optimizer0', 'optimizer1'):
        [group] = parts[name]['param_groups']
        assert (group['initial_lr'], group['lr']) == (1e-2, 0)


def test_a_run_stopped_in_an_epoch_and_before_its_end_ends_as_one_never_stopped(
        finished, tmp_path, run_here, read_run, monkeypatch):
    words, save_snapshot = (*RUN, '--results_dir', tmp_path, '--resume'), a3_nf.save_snapshot

    def stop(*arguments) -> None:
        if arguments[-1] in (0, 1):  # epochs; the last argument of the other function is a path
            return save_snapshot(*arguments)
        raise KeyboardInterrupt
    for name in ('save_snapshot', 'save_bpd_plot'):
        with monkeypatch.context() as patch:
            patch.setattr(a3_nf, name, stop)
            assert run_here('a3_nf.py', *words).returncode == 130
    assert 'going on after epoch 3' in run_here('a3_nf.py', *words).stdout
    assert read_run(tmp_path / 'three') == finished[1]


def test_sample_writes_the_same_grid_each_time_and_changes_nothing_else(copied, run_here):
    before, grids = stamps(copied), []
    for temperature in (1, 1, 0.01):
        done = run_here('a3_nf.py', *RUN, '--results_dir', copied.parent, '--sample', 3,
                        '--temperature', temperature)
        assert (done.returncode, done.stderr) == (0, '') and 'sample.png' in done.stdout
        grids.append(read_images(copied / 'sample.png', columns=2))
    assert np.array_equal(*grids[:2]) and len(grids[0]) == 4
    warm, cold = (np.abs(np.diff(grid[:3], axis=0)).mean() for grid in grids[1:])
    assert cold < warm / 2  # near the median of every pixel, whichever z
    after = stamps(copied)
    assert after.pop('sample.png') and after == before
    done = run_here('a3_nf.py', *RUN, '--results_dir', copied.parent, '--plan', 8,
                    '--sample', 3)
    assert_one_line(done, 'plan was 4, is now 8')


def test_a_template_flow_that_learns_nothing_has_curves_of_fixed_noise_and_the_same_samples(
        tmp_path, run_here, monkeypatch):
    shifts, moved = [], a3_nf.moved
    monkeypatch.setattr(a3_nf, 'moved', lambda data, max_shift: shifts.append(max_shift)
                        or moved(data, max_shift))
    done = run_here('a3_nf.py', *TINY, '--arch', 'mlp', '--epochs', 5, '--lr', 0, '--precision',
                    'fp32', '--max_shift', 2, '--results_dir', tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    [folder] = tmp_path.glob('nf_mlp*')
    assert {path.name for path in folder.iterdir()} == expected_files(0, 1, 2, 3, 5)
    assert shifts == [0, 2, 2, 2, 2, 0]  # in the last fifth of the epochs images are as they were
    rows = read_csv(folder / 'log.csv')
    assert {name: len({row[name] for row in rows}) for name in rows[0] if name not in TIMES} == {
        'epoch': 6, 'train_bpd': 1, 'val_bpd': 1, 'running_bpd': 6}
    for kind in ('samples', 'cool'):
        assert len({path.read_bytes() for path in folder.glob(f'{kind}_*.png')}) == 1
    hot, cool = (read_images(folder / f'{kind}_epoch00.png', 5) for kind in ('samples', 'cool'))
    assert len(hot) == 25 and hot.std() > cool.std() + 1
    assert ((hot > 127.5) == (cool > 127.5)).all()  # the same noise through the identity
    assert f'"val_bpd": {rows[0]["val_bpd"]},' in (folder / 'metrics.json').read_text()


@pytest.mark.filterwarnings('error')  # which would be lines on stderr
def test_divergence_is_one_line_and_status_1_and_draws_nothing(tmp_path, run_here):
    done = run_here('a3_nf.py', *TINY, '--arch', 'mlp', '--epochs', 1, '--lr', 1e30,
                    '--results_dir', tmp_path, '--run', 'one')
    assert done.returncode == 1 and not (tmp_path / 'one' / 'samples_epoch01.png').exists()
    assert re.fullmatch('.* is (nan|inf) after epoch 1; .*is of epoch 0\n', done.stderr)


@pytest.mark.parametrize('words, name, parameters', [
    ('', 'nf', 1221024), ('--arch mlp', 'nf_mlp', 18045056),
    ('--arch mlp --seed 43 --n_flows 3 --n_hidden 5', 'nf_mlp_nhidden5_nflows3_seed43', 40194),
    ('--n_hidden 8 --n_layers 2 --plan 3', 'nf_nhidden8_nlayers2_plan3', 307512)])
def test_arguments_make_a_name_and_a_flow_of_so_many_parameters(words, name, parameters):
    args = a3_nf.parse_args(words.split())
    assert args.name == name
    assert sum(weight.numel() for weight in a3_nf.make_model(args).parameters()) == parameters


@pytest.mark.parametrize('words, message', [
    ('--arch mlp --n_layers 5', '--n_layers has no meaning with --arch mlp'),
    ('--arch mlp --plan 5', '--plan has no meaning with --arch mlp'),
    ('--n_flows 5', '--n_flows has no meaning with --arch autoregressive'),
    ('--n_hidden 6', '--n_hidden 6 is not a multiple of 4'),
    ('--plan 0 --n_layers 2', '--n_hidden and --n_layers have no meaning with --plan 0'),
    ('--temperature 0.5', '--temperature has no meaning without --sample')])
def test_flags_that_mean_nothing_here_are_one_line(run_here, words, message):
    assert_one_line(run_here('a3_nf.py', *words.split()), message)
