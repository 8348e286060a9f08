"""The GAN's mathematics against independent oracles, in float64; then its modules and loops."""

import io
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

import a3_gan
from a3_gan import (
    PINNED,
    PIXELS,
    Discriminator,
    Generator,
    average,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    learning_rate,
    moved,
    sample,
    save_interpolations,
    spherical_path,
    train,
    update_discriminator,
    update_generator,
    warn,
)
from helpers import read_csv


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images, (n, 784) in [−1, 1]."""
    return random(n, PIXELS, seed=seed, dtype=dtype).tanh()


# --- the losses ----------------------------------------------------------------------------------


def test_losses_of_two_and_two_images_are_those_worked_by_hand():
    real = torch.tensor([[math.log(3)], [0.]], dtype=torch.float64)  # D(x) = 3/4 and 1/2
    fake = torch.tensor([[-math.log(3)], [math.log(4)]], dtype=torch.float64)  # 1/4 and 4/5
    assert discriminator_loss(real, fake).item() == pytest.approx(
        -(math.log(3 / 4) + math.log(1 / 2)) / 2 - (math.log(3 / 4) + math.log(1 / 5)) / 2)
    assert generator_loss(fake).item() == pytest.approx(-(math.log(1 / 4) + math.log(4 / 5)) / 2)


def test_losses_are_log_4_and_log_2_where_nothing_is_told_apart():
    nothing = torch.zeros(6, 1, dtype=torch.float64)
    assert discriminator_loss(nothing, nothing).item() == pytest.approx(math.log(4))
    assert generator_loss(nothing).item() == pytest.approx(math.log(2))


def test_losses_are_the_cross_entropies_of_torch_distributions():
    real, fake = 3 * random(7, 1), 3 * random(5, 1, seed=1)  # each averaged over its own number
    is_real, is_fake = distributions.Bernoulli(logits=real), distributions.Bernoulli(logits=fake)
    ones = torch.ones_like
    torch.testing.assert_close(
        discriminator_loss(real, fake),
        -is_real.log_prob(ones(real)).mean() - is_fake.log_prob(0 * fake).mean())
    torch.testing.assert_close(generator_loss(fake), -is_fake.log_prob(ones(fake)).mean())
    torch.testing.assert_close(generator_loss(fake), -(1 / (1 + (-fake).exp())).log().mean())


def test_losses_are_exact_where_the_sigmoid_is_0_or_1():
    sure = torch.tensor([[1000.]])
    assert discriminator_loss(sure, -sure).item() == 0
    assert discriminator_loss(-sure, sure).item() == 2000
    assert (generator_loss(sure).item(), generator_loss(-sure).item()) == (0, 1000)


def test_the_best_discriminator_leaves_log_4_less_twice_the_jensen_shannon_divergence():
    p, q = random(6).softmax(0), random(6, seed=1).softmax(0)  # of six images that there may be
    logits = (p / q).log().requires_grad_()  # D = p / (p + q), as in the paper's proposition 1

    def expected(loss) -> Tensor:  # both losses are averages: weight each image by its share
        return sum(p[i] * q[j] * loss(logits[i:i + 1, None], logits[j:j + 1, None])
                   for i in range(6) for j in range(6))
    loss = expected(discriminator_loss)
    middle = (p + q) / 2
    divergence = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    torch.testing.assert_close(loss, math.log(4) - 2 * divergence)
    [slope] = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(slope, torch.zeros_like(slope))


def test_gradients_in_the_logits_are_the_errors_of_d():
    real, fake = (3 * random(5, 1)).requires_grad_(), (3 * random(4, 1, seed=1)).requires_grad_()
    of_real, of_fake = torch.autograd.grad(discriminator_loss(real, fake), (real, fake))
    torch.testing.assert_close(of_real, -(1 - real.sigmoid()) / 5)
    torch.testing.assert_close(of_fake, fake.sigmoid() / 4)
    [of_generator] = torch.autograd.grad(generator_loss(fake), fake)
    torch.testing.assert_close(of_generator, -(1 - fake.sigmoid()) / 4)


def test_the_gradient_stays_where_d_is_sure_of_a_fake_while_the_saturating_one_vanishes():
    fake = torch.full((4, 1), -40., dtype=torch.float64, requires_grad=True)
    [non_saturating] = torch.autograd.grad(generator_loss(fake), fake)
    torch.testing.assert_close(non_saturating, torch.full_like(fake, -1 / 4))
    saturating_loss = discriminator_loss(torch.full_like(fake, 1e3), fake)  # −E log(1 − D(G(z)))
    [saturating] = torch.autograd.grad(-saturating_loss, fake)
    torch.testing.assert_close(saturating, -fake.detach().sigmoid() / 4)
    assert saturating.abs().max() < 1e-17


# --- the gradient penalty ------------------------------------------------------------------------


def test_the_penalty_of_a_linear_discriminator_is_the_square_of_its_weight():
    discriminator = nn.Linear(PIXELS, 1).double()
    torch.testing.assert_close(gradient_penalty(discriminator, random(3, PIXELS)),
                               discriminator.weight.square().sum())


def test_the_penalty_of_a_quadratic_discriminator_is_averaged_over_the_images():
    images, curvature = random(5, 8), random(8, seed=1)
    gradients = images * curvature
    torch.testing.assert_close(
        gradient_penalty(lambda x: (curvature * x.square() / 2).sum(1, keepdim=True), images),
        torch.stack([gradient @ gradient for gradient in gradients]).mean())


def test_the_penalty_has_a_gradient_in_every_parameter():
    images, weights = random(3, 4), [random(4, 5, seed=1), random(5, 1, seed=2)]
    assert torch.autograd.gradcheck(
        lambda w, v: gradient_penalty(lambda x: (x @ w).tanh() @ v, images),
        [weight.requires_grad_() for weight in weights])


@pytest.mark.parametrize('requires_grad', [False, True])
def test_the_penalty_leaves_the_images_and_the_weights_gradients_alone(requires_grad):
    discriminator = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    images = random(3, 6).requires_grad_(requires_grad)
    gradient_penalty(discriminator, images)
    assert images.grad is None and images.requires_grad == requires_grad
    assert all(weight.grad is None for weight in discriminator.parameters())


# --- the path between two samples ----------------------------------------------------------------


def path(start: Tensor, end: Tensor, steps: int = 7) -> Tensor:
    return spherical_path(start.float(), end.float(), steps).double()


def angles(rows: Tensor) -> Tensor:
    """Between each row and the next, in radians."""
    a, b = F.normalize(rows[:-1]), F.normalize(rows[1:])
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('steps, dim', [(7, 100), (0, 2), (3, 5)])
def test_a_path_has_its_steps_and_both_ends_in_their_precision(steps, dim, dtype):
    rows = spherical_path(random(dim, dtype=dtype), random(dim, seed=1, dtype=dtype), steps)
    assert rows.shape == (steps + 2, dim) and rows.dtype == dtype


def test_the_ends_of_a_path_are_where_it_was_to_start_and_end():
    start, end = random(100), 3 * random(100, seed=1)
    rows = path(start, end)
    torch.testing.assert_close(rows[0], start, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows[-1], end, rtol=1e-5, atol=1e-6)


def test_a_quarter_of_a_circle_is_cut_as_by_hand():
    rows = path(torch.tensor([2., 0.]), torch.tensor([0., 2.]), steps=2)
    half, root = 1., math.sqrt(3)  # 2 sin 30° and 2 cos 30°
    torch.testing.assert_close(
        rows, torch.tensor([[2, 0], [root, half], [half, root], [0, 2]], dtype=torch.float64),
        rtol=1e-6, atol=1e-6)


def test_a_path_keeps_the_norm_of_its_ends_and_a_straight_line_does_not():
    start, end = random(50, 100), random(50, 100, seed=1)
    middles = torch.stack([path(a, b, steps=1)[1] for a, b in zip(start, end, strict=True)])
    assert abs(middles.norm(dim=1).mean() / math.sqrt(100) - 1) < 0.05
    assert abs(((start + end) / 2).norm(dim=1).mean() / math.sqrt(100 / 2) - 1) < 0.05


@pytest.mark.parametrize('ratio', [1, 0.01, 7])
def test_the_norm_changes_evenly_along_a_path(ratio):
    start, end = F.normalize(random(2, 30)) * torch.tensor([[5.], [5. * ratio]])
    torch.testing.assert_close(path(start, end).norm(dim=1),
                               torch.linspace(5, 5 * ratio, 9, dtype=torch.float64), rtol=1e-5,
                               atol=0)


@pytest.mark.parametrize('apart', [1., 1e-2, 1e-4, -0.999])  # far, near, nearer, opposite
def test_the_steps_of_a_path_are_equal_angles_in_one_plane(apart):
    start, other = random(2, 30)
    end = 2 * (start + apart * other) if apart > 0 else apart * start + 0.01 * other
    rows = path(start, end)
    whole = angles(torch.stack([start, end]))
    torch.testing.assert_close(angles(rows), whole.expand(8) / 8, rtol=1e-3, atol=1e-6)
    basis = torch.linalg.qr(torch.stack([start, end], dim=1)).Q
    torch.testing.assert_close(rows @ basis @ basis.T, rows, rtol=1e-5, atol=1e-3 * rows.max())


@pytest.mark.parametrize('factor', [1, 3])
def test_a_path_between_ends_of_one_direction_is_straight(factor):
    start = random(20)
    torch.testing.assert_close(
        path(start, factor * start),
        start * torch.linspace(1, factor, 9, dtype=torch.float64)[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('start, factor', [(torch.tensor([1.5]), -1 / 3), (random(20), -2)])
def test_a_path_between_opposite_ends_is_the_straight_line(start, factor):
    torch.testing.assert_close(
        path(start, factor * start),
        start.double() * torch.linspace(1, factor, 9, dtype=torch.float64)[:, None],
        rtol=1e-5, atol=1e-6)


# --- the modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize('arch', ['conv', 'mlp'])
@pytest.mark.parametrize('latent_dim', [100, 1])
def test_shapes_and_ranges_are_those_of_the_template(latent_dim, arch):
    generator = Generator(latent_dim, arch)
    images = generator(random(7, latent_dim, dtype=torch.float32))
    assert generator.latent_dim == latent_dim and images.shape == (7, PIXELS)
    assert images.abs().max() <= 1 and images.min() < 0 < images.max()
    assert Discriminator(arch)(images).shape == (7, 1)


def test_the_template_calls_modules_without_arguments():
    generator = Generator()
    z = torch.randn(2, generator.latent_dim)
    assert Discriminator()(generator(z)).shape == (2, 1)


def test_extreme_noise_stays_in_range():
    images = Generator(4).eval()(1e6 * random(5, 4, dtype=torch.float32))
    assert images.isfinite().all() and images.abs().max() <= 1


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_outputs_have_the_precision_of_the_inputs(dtype):
    generator, discriminator = Generator(5).to(dtype), Discriminator().to(dtype)
    images = generator(random(3, 5, dtype=dtype))
    assert images.dtype == discriminator(images).dtype == dtype


def test_outputs_have_the_precision_of_the_inputs_also_under_autocast():
    generator, discriminator, z = Generator(5), Discriminator(), random(4, 5, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        images = generator(z)
        logits = discriminator(images)
    assert images.dtype == logits.dtype == torch.float32
    in_float32 = discriminator(images)
    assert not torch.equal(logits, in_float32)  # computed in bfloat16 all the same
    torch.testing.assert_close(logits, in_float32, rtol=0.05, atol=0.01)


def test_the_generator_judges_each_row_alone_when_not_training():
    generator, z = Generator(5).eval(), random(6, 5, dtype=torch.float32)
    others = torch.cat([z[:1], 9 * random(5, 5, seed=1, dtype=torch.float32)])
    torch.testing.assert_close(generator(z)[0], generator(others)[0])
    assert not torch.equal(generator(z)[1], generator(others)[1])


def test_real_and_generated_images_in_one_batch_do_not_touch_in_the_discriminator():
    discriminator = Discriminator().train()

    def logits(images: Tensor) -> Tensor:
        torch.manual_seed(1)
        return discriminator(images)
    one = pictures(6)
    other = torch.cat([one[:3], 0.1 * one[3:]])
    torch.testing.assert_close(logits(one)[:3], logits(other)[:3])
    assert not torch.equal(logits(one)[3:], logits(other)[3:])


def test_gradients_reach_every_parameter_of_both():
    torch.manual_seed(0)
    generator, discriminator = Generator(5), Discriminator()
    fakes = generator(torch.randn(20, 5))
    (discriminator_loss(discriminator(pictures(20)), discriminator(fakes))
     + generator_loss(discriminator(fakes))).backward()
    assert [name for network in (generator, discriminator)
            for name, weight in network.named_parameters()
            if weight.grad is None or weight.dim() > 1 and not weight.grad.any()] == []


# --- one update ----------------------------------------------------------------------------------


def sgd(network: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=lr)


class SmallGenerator(nn.Module):
    latent_dim = 5

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Linear(16, PIXELS))

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z).tanh()


class Pair:
    """Two networks in training, a batch of real images, and generated ones with their graph.

    The script's own networks, or small ones where the arithmetic is in question.
    """

    def __init__(self, small: bool = False):
        torch.manual_seed(0)
        self.generator = SmallGenerator() if small else Generator(5)
        self.discriminator = nn.Sequential(
            nn.Linear(PIXELS, 16), nn.Tanh(), nn.Linear(16, 1)) if small else Discriminator()
        self.images, self.z = pictures(8), torch.randn(8, 5)
        for weight in (*self.generator.parameters(), *self.discriminator.parameters()):
            weight.grad = torch.randn_like(weight)  # of an earlier batch
        self.fakes = self.generator(self.z)


def state(network: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters, buffers and gradients, by name."""
    gradients = {f'{name}.grad': weight.grad for name, weight in network.named_parameters()
                 if weight.grad is not None}
    return {name: value.clone() for name, value in (network.state_dict() | gradients).items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before | after if name not in before or name not in after
            or not torch.equal(before[name], after[name])}


@pytest.mark.parametrize('penalty', [0., 10.])
def test_an_update_of_d_leaves_the_generator_and_the_images_as_they_were(penalty):
    pair = Pair()
    before, images = state(pair.generator), pair.images.clone()
    update_discriminator(pair.discriminator, sgd(pair.discriminator), pair.images, pair.fakes,
                         penalty)
    assert changed(before, state(pair.generator)) == set()
    assert torch.equal(pair.images, images) and not pair.images.requires_grad
    pair.fakes.sum().backward()  # the graph is still whole


def test_an_update_of_g_leaves_the_discriminator_as_it_was():
    pair = Pair()
    before = state(pair.discriminator)
    update_generator(pair.discriminator, sgd(pair.generator), pair.fakes)
    assert changed(before, state(pair.discriminator)) == set()
    assert all(weight.requires_grad for weight in pair.discriminator.parameters())


def test_each_update_changes_every_parameter_of_its_own_network():
    pair = Pair()
    before = state(pair.discriminator), state(pair.generator)
    update_discriminator(pair.discriminator, sgd(pair.discriminator), pair.images, pair.fakes)
    update_generator(pair.discriminator, sgd(pair.generator), pair.fakes)
    for network, old in zip((pair.discriminator, pair.generator), before, strict=True):
        matrices = {name for name, weight in network.named_parameters() if weight.dim() > 1}
        assert matrices and matrices <= changed(old, state(network))


def test_each_update_lowers_its_own_loss():
    def loss_D() -> Tensor:
        torch.manual_seed(1)
        return discriminator_loss(pair.discriminator(pair.images), pair.discriminator(pair.fakes))

    def loss_G() -> Tensor:
        torch.manual_seed(1)
        return generator_loss(pair.discriminator(pair.generator(pair.z)))
    pair = Pair()
    before = loss_D()
    update_discriminator(pair.discriminator, sgd(pair.discriminator, 0.01), pair.images,
                         pair.fakes)
    assert loss_D() < before
    before = loss_G()
    update_generator(pair.discriminator, sgd(pair.generator, 0.01), pair.fakes)
    assert loss_G() < before


def test_updates_return_what_held_before_their_step():
    discriminator, generator = nn.Linear(PIXELS, 1).double(), nn.Linear(5, PIXELS).double()
    images, fakes = pictures(8, dtype=torch.float64), generator(random(6, 5)).tanh()
    real, fake = discriminator(images), discriminator(fakes)
    r1 = gradient_penalty(discriminator, images)
    returned = update_discriminator(discriminator, sgd(discriminator), images, fakes, penalty=3.)
    for value, expected in zip(returned, (discriminator_loss(real, fake), real.sigmoid().mean(),
                                          fake.sigmoid().mean(), r1), strict=True):
        torch.testing.assert_close(value, expected.detach())
        assert not value.requires_grad
    loss = generator_loss(discriminator(fakes)).detach()
    returned = update_generator(discriminator, sgd(generator), fakes)
    torch.testing.assert_close(returned, loss)
    assert not returned.requires_grad


@pytest.mark.parametrize('penalty', [0., 3.])
def test_the_step_of_a_linear_d_is_that_worked_by_hand(penalty):
    discriminator = nn.Linear(PIXELS, 1).double()
    images, fakes = pictures(8, dtype=torch.float64), pictures(6, seed=1, dtype=torch.float64)
    w, b = (weight.detach().clone() for weight in discriminator.parameters())
    real_error, fake_error = 1 - (images @ w.T + b).sigmoid(), (fakes @ w.T + b).sigmoid()
    down = ((real_error * images).mean(0) - (fake_error * fakes).mean(0)
            - penalty * w)  # the gradient of γ/2 ‖w‖² is γ w
    *_, r1 = update_discriminator(discriminator, sgd(discriminator), images, fakes, penalty)
    torch.testing.assert_close(discriminator.weight, w + 0.1 * down)
    torch.testing.assert_close(discriminator.bias,
                               b + 0.1 * (real_error.mean() - fake_error.mean()))
    assert r1 is None if penalty == 0 else r1.item() == pytest.approx(w.square().sum().item())


def test_the_step_of_a_linear_g_is_that_worked_by_hand():
    discriminator, generator = nn.Linear(7, 1).double(), nn.Linear(5, 7, bias=False).double()
    z, w = random(6, 5), generator.weight.detach().clone()
    fakes = generator(z)
    error = 1 - discriminator(fakes).detach().sigmoid()
    update_generator(discriminator, sgd(generator), fakes)
    up = (error * discriminator.weight.detach()).T @ z / 6  # E (1 − D(G(z))) ∂logit/∂w
    torch.testing.assert_close(generator.weight, w + 0.1 * up)


# --- one pass over the data ----------------------------------------------------------------------


def train_by_hand(pair: Pair, batches: list[Tensor], penalty: float) -> dict[str, float]:
    """D first, then G through the new D with the same images, with plain gradients; SGD of 0.1."""
    D, G, rows, r1s = pair.discriminator, pair.generator, [], []
    for n, images in enumerate(batches):
        fakes = G(torch.randn(len(images), 5))
        d_real, d_fake = D(images).sigmoid(), D(fakes.detach()).sigmoid()
        loss_D = -d_real.log().mean() - (1 - d_fake).log().mean()
        r1 = 0.
        if penalty and n % a3_gan.PENALTY_EVERY == 0:
            inputs = images.clone().requires_grad_()
            [slope] = torch.autograd.grad(D(inputs).sum(), inputs, create_graph=True)
            r1 = (slope ** 2).sum() / len(images)
            r1s.append(r1.item())
        step_down(loss_D + penalty / 2 * a3_gan.PENALTY_EVERY * r1, D)
        loss_G = -D(fakes).sigmoid().log().mean()
        step_down(loss_G, G)
        rows.append([value.item() for value in (loss_D, loss_G, d_real.mean(), d_fake.mean())])
    averages = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    names = ('discriminator_loss_nats', 'generator_loss_nats', 'd_real', 'd_fake')
    return dict(zip(names, averages, strict=True)) | {'r1': sum(r1s) / len(r1s) if r1s else None}


def step_down(loss: Tensor, network: nn.Module) -> None:
    weights = list(network.parameters())
    slopes = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            weight -= 0.1 * slope


@pytest.mark.parametrize('penalty', [0., 0.1])
def test_training_is_d_first_then_g_with_the_same_images_for_each_batch(penalty):
    batches = [pictures(8), pictures(8, seed=1), pictures(5, seed=2)]
    pair, expected = Pair(small=True), Pair(small=True)
    torch.manual_seed(1)
    row = train(batches, pair.discriminator, pair.generator, sgd(pair.generator),
                sgd(pair.discriminator), penalty=penalty)
    torch.manual_seed(1)
    by_hand = train_by_hand(expected, batches, penalty)
    for network in ('discriminator', 'generator'):
        torch.testing.assert_close(getattr(pair, network).state_dict(),
                                   getattr(expected, network).state_dict(), rtol=1e-4, atol=1e-5)
    r1, r1_by_hand = row.pop('r1'), by_hand.pop('r1')
    assert row == pytest.approx(by_hand, rel=1e-4)
    assert r1 == pytest.approx(r1_by_hand, rel=1e-4) if penalty else r1 is None


class Blank(nn.Module):
    """Makes black images only, of a weight that has no say in them."""

    latent_dim = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        return self.weight * z.new_zeros(len(z), PIXELS)


@pytest.mark.parametrize('every', [1, 2, 16])
def test_the_penalty_comes_once_in_so_many_batches_and_counts_as_many_times(monkeypatch, every):
    monkeypatch.setattr(a3_gan, 'PENALTY_EVERY', every)
    discriminator, generator = nn.Linear(PIXELS, 1), Blank()
    norms = []

    def black_images():  # on these, only the penalty moves w: by −0.1 γ `every` w
        for _ in range(2 * every + 1):
            yield torch.zeros(2, PIXELS)
            norms.append(discriminator.weight.norm().item())
    norm = discriminator.weight.norm().item()
    row = train(black_images(), discriminator, generator, sgd(generator), sgd(discriminator),
                penalty=0.2)
    factor = 1 - 0.1 * 0.2 * every
    assert norms == pytest.approx([norm * factor ** (1 + n // every)
                                   for n in range(2 * every + 1)], rel=1e-4)
    assert row['r1'] == pytest.approx(
        norm ** 2 * (1 + factor ** 2 + factor ** 4) / 3, rel=1e-4)


def test_moved_pixels_go_down_and_right_and_come_in_again_opposite():
    images = pictures(2)
    down_right = moved(images, (1, 2)).view(2, 28, 28)
    rows, columns = (torch.arange(28) - 1) % 28, (torch.arange(28) - 2) % 28
    assert torch.equal(down_right, images.view(2, 28, 28)[:, rows][:, :, columns])
    assert torch.equal(moved(moved(images, (1, 2)), (-1, -2)), images)


def test_real_and_generated_images_are_moved_alike_as_far_as_allowed():
    class Dot(Blank):
        def forward(self, z: Tensor) -> Tensor:
            return self.weight * F.one_hot(torch.tensor([14 * 28 + 14]), PIXELS).expand(len(z), -1)

    class Watching(nn.Linear):
        def forward(self, img: Tensor) -> Tensor:
            seen.append(img.detach().argmax(1))
            return super().forward(img)
    seen: list[Tensor] = []
    generator, discriminator = Dot(), Watching(PIXELS, 1)
    dot = generator(torch.zeros(3, 2)).detach()
    torch.manual_seed(0)
    train([dot] * 60, discriminator, generator, sgd(generator, 0.), sgd(discriminator),
          max_shift=1)
    assert all((places == places[0]).all() for places in seen)  # of one batch
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    assert all(for_d[0] == for_g[0] for for_d, for_g in pairs)
    assert {divmod(int(for_g[0]), 28) for _, for_g in pairs} == set(
        itertools.product((13, 14, 15), repeat=2))


def test_both_schedules_step_once_a_batch():
    pair = Pair()
    optimizers = sgd(pair.generator, 1.), sgd(pair.discriminator, 1.)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** step)
                 for optimizer in optimizers]
    train([pictures(2)] * 3, pair.discriminator, pair.generator, *optimizers, schedules=schedules)
    assert [optimizer.param_groups[0]['lr'] for optimizer in optimizers] == [0.125, 0.125]


def test_training_trains_both_and_averages_after_each_update():
    pair = Pair()
    averaged = average(pair.generator, decay=0.)
    pair.generator.eval(), pair.discriminator.eval()
    train([pictures(4)] * 3, pair.discriminator, pair.generator, sgd(pair.generator),
          sgd(pair.discriminator), averaged)
    assert pair.generator.training and pair.discriminator.training
    assert averaged.n_averaged == 3
    assert changed(pair.generator.state_dict(), averaged.module.state_dict()) == set()


def test_training_in_bfloat16_goes_nearly_the_same_way_with_losses_and_weights_in_float32():
    rows = []
    for bf16 in (False, True):
        pair = Pair()
        torch.manual_seed(1)
        rows.append(train([pictures(8)] * 3, pair.discriminator, pair.generator,
                          sgd(pair.generator), sgd(pair.discriminator), penalty=0.1, bf16=bf16))
        assert {weight.dtype for weight in pair.generator.parameters()} == {torch.float32}
    assert rows[1] != rows[0] and rows[1] == pytest.approx(rows[0], rel=0.03)


# --- the average of the generator ----------------------------------------------------------------


def wander(network: nn.Module, seed: int) -> None:
    """Change every weight, as a step of training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.3 * torch.randn_like(weight)


def test_an_average_with_no_decay_is_the_generator():
    generator = Generator(5)
    averaged = average(generator, decay=0.)
    for seed in range(3):
        wander(generator, seed)
        generator(random(8, 5, dtype=torch.float32))  # moves its batch statistics
        averaged.update_parameters(generator)
        assert changed(generator.state_dict(), averaged.module.state_dict()) == set()


@pytest.mark.parametrize('decay', [0.2, 0.9999])
def test_the_average_forgets_ever_more_slowly_down_to_the_decay(decay):
    generator = nn.Linear(3, 2).double()
    averaged, expected = average(generator, decay), torch.zeros(2, 3, dtype=torch.float64)
    for n in range(8):
        wander(generator, seed=n)
        averaged.update_parameters(generator)
        beta = min(decay, (1 + n) / (10 + n)) if n else 0.  # the first weights are copied
        expected = beta * expected + (1 - beta) * generator.weight.detach()
        torch.testing.assert_close(averaged.module.weight.detach(), expected)


def test_the_average_is_a_copy_that_survives_a_checkpoint_and_goes_on_the_same():
    generator = Generator(5)
    averaged = average(generator, decay=0.9)
    for seed in range(4):
        wander(generator, seed)
        averaged.update_parameters(generator)
    checkpoint = io.BytesIO()
    torch.save(averaged.state_dict(), checkpoint)
    checkpoint.seek(0)
    revived = average(Generator(5), decay=0.9)
    revived.load_state_dict(torch.load(checkpoint, weights_only=True))
    for seed in range(4, 6):
        assert changed(averaged.state_dict(), revived.state_dict()) == set()
        wander(generator, seed)
        averaged.update_parameters(generator)
        revived.update_parameters(generator)


# --- samples -------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """A generator that has moved, and an average that is not it; 200 draws for its statistics."""
    monkeypatch.setattr(a3_gan, 'EVAL_BATCH', 20)
    torch.manual_seed(0)
    generator = Generator(5)
    averaged = average(generator, decay=0.9)
    for seed in range(3):
        wander(generator, seed)
        generator(3 + random(8, 5, seed=seed, dtype=torch.float32))
        averaged.update_parameters(generator)
    return generator, averaged


def test_samples_are_the_images_of_the_average_in_0_to_1(trained):
    _, averaged = trained
    z = random(50, 5, dtype=torch.float32)  # two batches and a half
    images = sample(averaged, z)
    assert images.shape == (50, PIXELS) and not images.requires_grad
    assert 0 <= images.min() < 0.5 < images.max() <= 1
    torch.testing.assert_close(2 * images - 1, averaged.module(z).detach(), rtol=1e-4, atol=1e-4)


def test_a_sample_does_not_depend_on_the_others(trained):
    _, averaged = trained
    z = random(50, 5, dtype=torch.float32)
    images = sample(averaged, z)
    torch.testing.assert_close(sample(averaged, z.flip(0)).flip(0), images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample(averaged, z[33:34]), images[33:34], rtol=1e-4, atol=1e-4)


def test_samples_come_from_their_noise_alone_whatever_was_drawn_or_sampled_before(trained):
    generator, averaged = trained
    z = random(50, 5, dtype=torch.float32)
    images = sample(averaged, z)
    torch.manual_seed(99)
    averaged.train()
    averaged(5 * random(30, 5, seed=1, dtype=torch.float32))  # spoils the batch statistics
    assert torch.equal(sample(averaged, z), images)
    assert not torch.allclose(sample(averaged, z + 1), images)


def test_sampling_disturbs_neither_the_random_stream_nor_the_generator_nor_the_average(trained):
    generator, averaged = trained
    stream, mode, before = torch.get_rng_state(), generator.training, state(generator)
    weights = [weight.detach().clone() for weight in averaged.parameters()]
    sample(averaged, random(50, 5, dtype=torch.float32))
    assert torch.equal(torch.get_rng_state(), stream)
    assert changed(before, state(generator)) == set() and generator.training == mode
    assert all(map(torch.equal, weights, averaged.parameters())) and averaged.n_averaged == 3


def test_samples_have_the_batch_statistics_of_the_averaged_weights(trained):
    generator, averaged = trained
    norms = [module for module in averaged.modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        pytest.skip('there is no batch normalisation')
    noise, activations = [], []
    averaged.module.register_forward_pre_hook(
        lambda module, inputs: noise.append(inputs[0]) if module.training else None)
    norms[0].register_forward_pre_hook(
        lambda module, inputs: activations.append(inputs[0]) if module.training else None)
    sample(averaged, random(50, 5, dtype=torch.float32))
    assert [len(draws) for draws in noise] == [20] * a3_gan.N_STATISTICS
    batches = [x.transpose(0, 1).flatten(1) for x in activations]  # (channels, values)
    torch.testing.assert_close(norms[0].running_mean, torch.cat(batches, dim=1).mean(1))
    torch.testing.assert_close(norms[0].running_var,
                               torch.stack([x.var(1) for x in batches]).mean(0))
    draws = torch.cat(noise)
    assert abs(draws.mean()) < 0.18 and abs(draws.std() - 1) < 0.13  # of 500 standard normals
    assert len(draws.unique()) == draws.numel()


def test_the_batch_statistics_rest_on_5_000_draws():
    averaged, sizes = average(SmallGenerator(), decay=0.), []
    averaged.module.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0])) if module.training else None)
    sample(averaged, random(1, 5, dtype=torch.float32))
    assert sum(sizes) == 5_000


# --- interpolations ------------------------------------------------------------------------------


class Shown(nn.Module):
    """Shows its noise as the first pixels of a black image."""

    def forward(self, z: Tensor) -> Tensor:
        return F.pad(z.tanh(), (0, PIXELS - z.shape[1]), value=-1.)


class Brightest:
    """A classifier that sees the number of the brightest of the first pixels, or always a 3."""

    def __init__(self, always_3: bool = False):
        self.bias = torch.zeros(10)
        self.bias[3] = 40. * always_3

    def look_at(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, (30 * images[:, :10] + self.bias).log_softmax(1)


def interpolated(folder: Path, z: Tensor, always_3: bool = False) -> tuple[list, list[dict]]:
    """The classes at the ends, and the rows of the CSV."""
    ends = save_interpolations(average(Shown(), 0.), Brightest(always_3), z,
                               SimpleNamespace(path=folder.joinpath))
    return ends, read_csv(folder / 'interpolations.csv')


def test_ten_classes_give_five_rows_from_the_surest_of_one_class_to_that_of_the_next(tmp_path):
    z = random(300, 10, dtype=torch.float32)
    ends, rows = interpolated(tmp_path, z)
    assert ends == [0, 1]
    assert [(row['row'], row['step']) for row in rows] == [
        (str(i), str(j)) for i in range(5) for j in range(9)]
    assert [row['classified_as'] for row in rows if row['step'] in '08'] == list('0123456789')
    one, all_five = (matplotlib.image.imread(tmp_path / name)[::3, ::3, 0]
                     for name in ('interpolation.png', 'interpolations.png'))
    assert (one.shape, all_five.shape) == ((28, 9 * 29 - 1), (5 * 29 - 1, 9 * 29 - 1))
    assert (one == all_five[:28]).all()
    images = sample(average(Shown(), 0.), z)
    surest = Brightest().look_at(images)[1].argmax(0)
    for column, c in ((0, 0), (8, 1)):
        shown = torch.tensor(one[:, column * 29:column * 29 + 28]).flatten()
        torch.testing.assert_close(shown, images[surest[c]], rtol=0, atol=0.6 / 255)


def test_the_ends_are_of_their_class_also_where_the_classifier_is_unsure_of_it(tmp_path):
    z = torch.full((2, 10), -9.)
    z[0, 1], z[0, 2:5] = 0.01, 0.  # p of a 1 is little more than 1/4, but it is a 1
    z[1, 1], z[1, 2] = 0.49, 0.5  # p of a 1 is nearly 1/2, but it is a 2
    assert interpolated(tmp_path, z)[0] == [1, 2]


def test_a_class_without_a_partner_has_no_row(tmp_path):
    ends, rows = interpolated(tmp_path, 3 * torch.eye(10)[[4, 7, 9]])
    assert ends == [4, 7] and len(rows) == 9


def test_a_collapsed_generator_is_interpolated_all_the_same(tmp_path):
    ends, rows = interpolated(tmp_path, random(300, 10, dtype=torch.float32), always_3=True)
    assert ends == [3, 3] and [row['classified_as'] for row in rows] == ['3'] * 9
    image = matplotlib.image.imread(tmp_path / 'interpolation.png')
    assert image.shape[:2] == (28 * 3, (9 * 29 - 1) * 3)
    assert (image[:, :84] != image[:, -84:]).any()  # to another sample at least


# --- warnings, the schedule, the flags -----------------------------------------------------------


def said(capsys, epoch: int = 3, d_real: float | None = 0.6, d_fake: float | None = 0.4,
         class_share_min: float | None = 0.05) -> list[str]:
    warn({'epoch': epoch, 'd_real': d_real, 'd_fake': d_fake, 'class_share_min': class_share_min})
    captured = capsys.readouterr()
    assert captured.out == ''
    return captured.err.splitlines()


@pytest.mark.parametrize('row', [{}, {'class_share_min': None}, {'class_share_min': 1e-4},
                                 {'d_real': 1 - 2 * PINNED, 'd_fake': 2 * PINNED}])
def test_a_healthy_epoch_goes_unsaid(capsys, row):
    assert said(capsys, **row) == []


def test_the_untrained_network_goes_unsaid(capsys):
    assert said(capsys, epoch=0, d_real=None, d_fake=None, class_share_min=0.) == []


@pytest.mark.parametrize('row', [{'d_real': 1 - PINNED / 2}, {'d_fake': PINNED / 2},
                                 {'d_real': PINNED / 2}, {'d_fake': 1 - PINNED / 2}])
def test_a_pinned_discriminator_is_one_line(capsys, row):
    [line] = said(capsys, **row)
    assert line.startswith('WARNING: epoch 3 has diverged')
    assert f'D(x) of {row.get("d_real", 0.6):.4f} and D(G(z)) of {row.get("d_fake", 0.4):.4f}' \
        in line


def test_a_missing_class_is_one_line(capsys):
    [line] = said(capsys, class_share_min=0.)
    assert line.startswith('WARNING: epoch 3 has collapsed')


def test_both_at_once_are_two_lines(capsys):
    assert len(said(capsys, d_fake=0., class_share_min=0.)) == 2


def test_the_learning_rate_rises_once_to_1_and_falls_to_0_without_a_jump():
    factors = torch.tensor([learning_rate(i / 1000) for i in range(1001)])
    top = int(factors.argmax())
    assert factors[0] == 0 and factors[top] == pytest.approx(1) and abs(factors[-1]) < 1e-6
    assert top == 20
    assert (factors[:top + 1].diff() > 0).all() and (factors[top:].diff() < 0).all()
    assert factors.diff().abs().max() < 0.051


def test_the_template_has_its_flags():
    words = ['--n_epochs', '3', '--batch_size', '5', '--lr', '0.1', '--latent_dim', '6',
             '--save_interval', '7']
    args = a3_gan.parse_args(words)
    assert (args.epochs, args.batch_size, args.lr, args.latent_dim, args.save_interval) == (
        3, 5, 0.1, 6, 7)
    assert a3_gan.parse_args(['--epochs', *words[1:]]) == args
