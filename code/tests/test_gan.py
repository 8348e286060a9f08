"""The GAN: its mathematics against independent oracles, its networks and its training, one run."""

import copy
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

import a3_gan
import figures
import measures
import runs
from a3_gan import (
    PIXELS, Discriminator, Generator, discriminator_loss, follow, generator_loss, gradient_penalty,
    learning_rate, make_model, parse_args, sample, save_interpolations,
    save_loss_plot, spherical_path, train, warn, watched)
from conftest import FEWER_DIGITS
from datasets import digits
from datasets.common import Loader
from datasets.mnist import mnist
from helpers import TIMES, assert_one_line, read_csv, stamps

FEWER_SAMPLES = {'N_JUDGED': 80, 'EVAL_BATCH': 50}
TINY = ('--dataset', 'digits', '--latent_dim', 8, '--batch_size', 50, '--save_interval', 5,
        '--seed', 7)  # 12 batches an epoch
THREE = (*TINY, '--epochs', 3, '--run', 'three', '--lr', 2e-3, '--beta1', 0.4, '--beta2', 0.98,
         '--penalty', 0.3, '--average', 0.95, '--precision', 'fp32',
         '--device', 'cpu')
LOG = ['epoch', 'discriminator_loss_nats', 'generator_loss_nats', 'd_real', 'd_fake', 'r1', 'r2',
       'val_frechet', 'class_share_min', *TIMES]


@pytest.fixture(autouse=True, scope='module')
def few() -> Iterator[None]:
    """Fewer digits, and fewer samples to judge: most of the time of a short run goes into these.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'SIZES', FEWER_DIGITS)
        for name, value in FEWER_SAMPLES.items():
            patch.setattr(a3_gan, name, value)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, in double precision."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(n: int, seed: int = 0) -> Tensor:
    """Random images, (n, 784) in [−1, 1]."""
    return random(n, PIXELS, seed=seed).tanh()


# --- the losses and the gradient penalty ---------------------------------------------------------


def test_losses_are_the_cross_entropies_of_torch_distributions():
    real, fake = 3 * random(7, 1), 3 * random(5, 1, seed=1)  # each averaged over its own number
    is_real, is_fake = distributions.Bernoulli(logits=real), distributions.Bernoulli(logits=fake)
    torch.testing.assert_close(
        discriminator_loss(real, fake),
        -is_real.log_prob(0 * real + 1).mean() - is_fake.log_prob(0 * fake).mean())
    torch.testing.assert_close(generator_loss(fake), -is_fake.log_prob(0 * fake + 1).mean())


def test_losses_are_exact_where_the_sigmoid_is_0_or_1():
    sure = torch.tensor([[1000.]])
    assert discriminator_loss(sure, -sure).item() == 0
    assert discriminator_loss(-sure, sure).item() == 2000
    assert (generator_loss(sure).item(), generator_loss(-sure).item()) == (0, 1000)


def test_the_best_discriminator_leaves_log_4_less_twice_the_jensen_shannon_divergence():
    p, q = random(6).softmax(0), random(6, seed=1).softmax(0)  # over the six images there are
    logits = (p / q).log().requires_grad_()  # D = p / (p + q), as in the paper's proposition 1
    loss = sum(p[i] * q[j] * discriminator_loss(logits[i:i + 1, None], logits[j:j + 1, None])
               for i in range(6) for j in range(6))
    middle = (p + q) / 2
    divergence = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    torch.testing.assert_close(loss, math.log(4) - 2 * divergence)
    [slope] = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(slope, torch.zeros_like(slope))


def test_the_penalty_is_averaged_over_the_images_and_has_the_right_gradient_in_the_weights():
    images, curvature = random(5, 8), random(8, seed=1).requires_grad_()

    def penalty(weight: Tensor) -> Tensor:
        return gradient_penalty(lambda x: (weight * x.square() / 2).sum(1, keepdim=True), images)
    torch.testing.assert_close(
        penalty(curvature), torch.stack([((curvature * x) ** 2).sum() for x in images]).mean())
    assert torch.autograd.gradcheck(penalty, [curvature])
    assert not images.requires_grad and curvature.grad is None


# --- the path between two samples ----------------------------------------------------------------


def path(start: Tensor, end: Tensor) -> Tensor:
    """Nine points, as the script has them: in single precision."""
    return spherical_path(start.float(), end.float(), steps=7).double()


@pytest.mark.parametrize('a, b', [(2., 2.), (2., 2e-2), (2., 2e-4), (-1., 1e-2)])
def test_a_path_has_equal_angles_in_one_plane_and_a_norm_that_changes_evenly(a, b):
    start, other = random(2, 30)
    end = a * start + b * other  # far, near, nearer and nearly opposite
    rows, ends = path(start, end), torch.stack([start, end])
    torch.testing.assert_close(rows[[0, -1]], ends, rtol=1e-5, atol=1e-5)
    angle = 2 * (F.normalize(ends).diff(dim=0).norm() / 2).asin()
    torch.testing.assert_close(F.normalize(rows).diff(dim=0).norm(dim=1),
                               2 * (angle / 16).sin().expand(8), rtol=1e-3, atol=1e-6)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(rows.norm(dim=1), torch.lerp(start.norm(), end.norm(), t),
                               rtol=1e-4, atol=0)
    basis = torch.linalg.qr(ends.T).Q
    torch.testing.assert_close(rows @ basis @ basis.T, rows, rtol=1e-5, atol=1e-3 * rows.max())


@pytest.mark.parametrize('start, factor', [(random(20), 3), (random(20), -2),
                                           (torch.tensor([1.5]), -1 / 3)])
def test_a_path_between_ends_on_one_line_is_straight(start, factor):
    t = torch.linspace(1, factor, 9, dtype=torch.float64)
    torch.testing.assert_close(path(start, factor * start), start.double() * t[:, None],
                               rtol=1e-5, atol=1e-6)


# --- the networks --------------------------------------------------------------------------------


def test_the_mlp_is_the_layout_of_the_template_and_conv_has_two_convolutions_at_the_image():
    def layout(network: nn.Module) -> list[tuple[int, ...]]:
        return [tuple(weight.shape) for weight in network.parameters() if weight.dim() > 1]
    generator, discriminator = make_model(parse_args(['--arch', 'mlp']))
    assert layout(generator) == [(128, 100), (256, 128), (512, 256), (1024, 512), (784, 1024)]
    assert layout(discriminator) == [(512, 784), (256, 512), (1, 256)]
    generator, discriminator = make_model(parse_args(['--latent_dim', '3']))
    assert layout(generator) == [
        (128, 3), (256, 128), (512, 256), (1568, 512), (32, 16, 4, 4), (16, 1, 4, 4)]
    assert layout(discriminator) == [
        (16, 1, 4, 4), (32, 16, 4, 4), (512, 1568), (256, 512), (1, 256)]


@pytest.mark.parametrize('arch', ['conv', 'mlp'])
def test_noise_becomes_images_in_range_and_images_one_logit_each(arch):
    generator, discriminator = Generator(3, arch), Discriminator(arch)
    images = generator(50 * random(7, 3).float())
    assert generator.latent_dim == 3 and images.shape == (7, PIXELS)
    assert -1 <= images.min() < 0 < images.max() <= 1
    assert discriminator(images).shape == (7, 1)
    torch.testing.assert_close(discriminator(images)[:3], discriminator(images[:3]))  # each alone


def test_weights_of_conv_keep_the_size_of_signals_for_the_inputs_that_each_output_has():
    for network, n_inputs in ((Generator(), (100, 128, 256, 512, 32 * 2 * 2, 16 * 2 * 2)),
                              (Discriminator(), (4 * 4, 16 * 4 * 4, 32 * 7 * 7, 512, 256))):
        layers = [layer for layer in network.net if hasattr(layer, 'weight')]
        assert [layer.weight.std().item() for layer in layers] == pytest.approx(
            [math.sqrt(2 / 1.04 / n) for n in n_inputs], rel=0.15)
        assert not any(layer.bias.any() for layer in layers)


# --- training ------------------------------------------------------------------------------------


def sgd(network: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=lr)


def small_networks() -> tuple[nn.Module, nn.Module]:
    generator = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Linear(16, PIXELS))
    generator.latent_dim = 5
    discriminator = nn.Sequential(nn.Linear(PIXELS, 16), nn.Tanh(), nn.Linear(16, 1))
    return generator.double(), discriminator.double()


def train_by_hand(batches: list[Tensor], discriminator: nn.Module, generator: nn.Module,
                  averaged: nn.Module, decay: float, step: int, penalty: float) -> dict:
    """SGD with a learning rate of 0.1 at first, halved after each batch; a penalty every other."""
    rows, weights, penalties = [], [], []
    for n, images in enumerate(batches):
        fakes = generator(torch.randn(len(images), 5))
        d_real, d_fake = (discriminator(x).sigmoid() for x in (images, fakes.detach()))
        objective = loss_D = -d_real.log().mean() - (1 - d_fake).log().mean()
        if penalty and n % 2 == 0:
            both = []
            for inputs in (images.clone(), fakes.detach().clone()):
                inputs.requires_grad_()
                [slope] = torch.autograd.grad(discriminator(inputs).sum(), inputs,
                                              create_graph=True)
                both.append((slope ** 2).sum() / len(images))
            objective = loss_D + penalty * sum(both)  # γ/2, twice
            penalties.append([len(images), *(value.item() for value in both)])
        step_down(objective, discriminator, 0.1 / 2 ** n)
        loss_G = -discriminator(fakes).sigmoid().log().mean()
        step_down(loss_G, generator, 0.1 / 2 ** n)
        beta = min(decay, (1 + step + n) / (10 + step + n)) if step + n else 0.
        for mean, weight in zip(averaged.parameters(), generator.parameters(), strict=True):
            mean.data = beta * mean.data + (1 - beta) * weight.data
        averaged[1].load_state_dict(averaged[1].state_dict() | dict(generator[1].named_buffers()))
        rows.append([value.item() for value in (loss_D, loss_G, d_real.mean(), d_fake.mean())])
        weights.append(len(images))
    averages = np.average(rows, axis=0, weights=weights)
    sizes, *columns = np.array(penalties).T if penalties else ([],)
    return dict(zip(LOG[1:], averages, strict=False)) | {
        name: np.average(column, weights=sizes)
        for name, column in zip(('r1', 'r2'), columns, strict=False)}


def step_down(loss: Tensor, network: nn.Module, lr: float) -> None:
    weights = list(network.parameters())
    for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        weight.data -= lr * slope


@pytest.mark.parametrize('penalty, decay, step', [(0., 0.2, 1), (0.1, 0.9999, 0)])
def test_training_is_d_then_g_with_the_same_images_then_the_average_for_each_batch(
        monkeypatch, penalty, decay, step):
    monkeypatch.setattr(a3_gan, 'PENALTY_EVERY', 2)
    monkeypatch.setattr(torch, 'randn', partial(torch.randn, dtype=torch.float64))
    batches = [pictures(8), pictures(8, seed=1), pictures(5, seed=2)]
    generator, discriminator = small_networks()
    networks = {'discriminator': discriminator, 'generator': generator,
                'averaged': small_networks()[0]}
    expected = copy.deepcopy(networks)
    for network in networks.values():
        network.eval()  # as sampling leaves them
    optimizers = {'optimizer_G': sgd(generator), 'optimizer_D': sgd(discriminator)}
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 ** n)
                 for optimizer in optimizers.values()]
    torch.manual_seed(1)
    row = train(batches, **networks, **optimizers, decay=decay, step=step, penalty=penalty,
                schedules=schedules)
    torch.manual_seed(1)
    by_hand = train_by_hand(batches, **expected, decay=decay, step=step, penalty=penalty)
    assert {name: value for name, value in row.items() if value is not None} == pytest.approx(
        by_hand, rel=1e-9)
    for name, network in networks.items():
        torch.testing.assert_close(network.state_dict(), expected[name].state_dict())


@pytest.mark.parametrize('bf16', [False, True])
def test_only_the_networks_compute_in_bfloat16_and_what_they_return_is_in_float32(bf16):
    generator, discriminator = Generator(5), Discriminator()
    within, results = {generator: [], discriminator: []}, []  # dtypes before the last step; after
    for network, dtypes in within.items():
        network.net.register_forward_hook(
            lambda *call, dtypes=dtypes: dtypes.append(call[2].dtype))
        network.register_forward_hook(lambda *call: results.append(call[2].detach()))
    row = train([pictures(4).float()], discriminator, generator, sgd(generator),
                sgd(discriminator), penalty=0.1, bf16=bf16)
    low = torch.bfloat16 if bf16 else torch.float32
    assert within == {generator: [low], discriminator: [low] * 4}
    assert {result.dtype for result in results} == {torch.float32} and all(row.values())
    assert (results[0] != results[0].bfloat16()).any()  # nor is the tanh computed in it


@pytest.mark.parametrize('decay, betas', [
    (0.9999, [0, 2 / 11, 3 / 12, 4 / 13]), (0.2, [0, 2 / 11, 0.2, 0.2]), (0., [0, 0, 0, 0])])
def test_the_average_copies_at_first_and_forgets_ever_more_slowly_down_to_the_decay(decay, betas):
    averaged, generator = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = averaged.weight.detach().clone()
    for step, beta in enumerate(betas):
        nn.init.normal_(generator.weight)
        follow(averaged, generator, decay, step)
        expected = beta * expected + (1 - beta) * generator.weight.detach()
        torch.testing.assert_close(averaged.weight.detach(), expected)


def test_the_average_has_the_latest_batch_statistics():
    averaged, generator = Generator(3, 'mlp'), Generator(3, 'mlp')
    generator(random(20, 3).float())
    follow(averaged, generator, 0.9, 100)
    torch.testing.assert_close(dict(averaged.named_buffers()), dict(generator.named_buffers()))


def test_the_learning_rate_rises_to_1_in_a_fiftieth_and_falls_to_a_fifth():
    assert [learning_rate(progress) for progress in (0, 0.01, 0.02, 0.51, 1)] == pytest.approx(
        [0, 0.5, 1, 0.6, 0.2])


def test_the_batches_of_an_epoch_are_scaled_and_samples_drawn_at_each_interval(monkeypatch):
    pixels = torch.arange(7 * PIXELS).remainder(256).view(7, PIXELS).byte()
    real = Loader(pixels, torch.zeros(7), batch_size=3, shuffle=False, source={})
    drawn, batches = [], []
    monkeypatch.setattr(figures, 'save_grid', lambda path, images: drawn.append(
        (len(batches), path, tuple(images.shape))))
    run = SimpleNamespace(track=lambda batches: batches, path=Path)
    for batch in watched(real, Shown(), torch.zeros(25, 2), interval=2, epoch=2, run=run):
        batches.append(batch)  # the fourth of all, and the fifth: the sixth is one image
    assert [len(batch) for batch in batches] == [3, 3]
    torch.testing.assert_close(torch.cat(batches).double(), 2 * (pixels[:6].double() / 255) - 1)
    assert torch.cat(batches).min() == -1 and torch.cat(batches).max() == 1
    assert drawn == [(n, Path('samples_latest.png'), (25, PIXELS)) for n in (1, 2)]


@pytest.mark.parametrize('row, words', [
    ({}, []), ({'class_share_min': None}, []), ({'d_real': 0.998, 'd_fake': 0.002}, []),
    ({'epoch': 0, 'd_real': None, 'd_fake': None, 'class_share_min': 0.}, []),
    ({'d_real': 0.9995}, ['diverged.*D.x. of 0.9995 and D.G.z.. of 0.4000']),
    ({'d_fake': 0.0005}, ['diverged.*D.x. of 0.6000 and D.G.z.. of 0.0005']),
    ({'d_real': 0.0005}, ['diverged']), ({'class_share_min': 0.}, ['collapsed']),
    ({'d_fake': 0.9995, 'class_share_min': 0.}, ['diverged', 'collapsed'])])
def test_a_pinned_discriminator_and_a_missing_class_are_one_line_each(capsys, row, words):
    warn({'epoch': 3, 'd_real': 0.6, 'd_fake': 0.4, 'class_share_min': 0.05} | row)
    for line, word in zip(capsys.readouterr().err.splitlines(), words, strict=True):
        assert re.match(f'WARNING: epoch 3 has {word}', line)


# --- samples and figures -------------------------------------------------------------------------


@pytest.mark.parametrize('arch', ['conv', 'mlp'])
def test_a_sample_is_the_image_of_its_noise_alone_and_sampling_disturbs_nothing(arch):
    averaged, z, stream = Generator(5, arch).train(), random(120, 5).float(), torch.get_rng_state()
    images = sample(averaged, z)  # in two batches and a half
    assert images.shape == (120, PIXELS) and not images.requires_grad
    assert torch.equal(torch.get_rng_state(), stream)
    torch.testing.assert_close(2 * images - 1, averaged.eval()(z).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample(averaged.train(), z[77:78]), images[77:78])


class Shown(nn.Module):
    """Shows its noise as the first pixels of a black image."""

    def forward(self, z: Tensor) -> Tensor:
        return F.pad(z.tanh(), (0, PIXELS - z.shape[1]), value=-1.)


def interpolated(folder: Path, z: Tensor, bias: float = 0.) -> tuple[list, list[dict]]:
    """The classes at the ends, and the rows of the CSV.

    The classifier sees the number of the brightest of the first pixels; the bias is towards 3.
    """
    def look_at(images: Tensor) -> tuple[Tensor, Tensor]:
        return images, (30 * images[:, :10] + bias * torch.eye(10)[3]).log_softmax(1)
    ends = save_interpolations(Shown(), SimpleNamespace(look_at=look_at), z,
                               SimpleNamespace(path=folder.joinpath))
    return ends, read_csv(folder / 'interpolations.csv')


def read_grey(file: Path) -> Tensor:
    """The grey values of a grid, each pixel of an image once."""
    return torch.tensor(matplotlib.image.imread(file)[::3, ::3, 0])


def test_ten_classes_give_five_rows_from_the_surest_of_one_class_to_that_of_the_next(tmp_path):
    z = random(300, 10).float()
    ends, rows = interpolated(tmp_path, z)
    assert ends == [0, 1]
    assert [(int(row['row']), int(row['step'])) for row in rows] == [
        divmod(i, 9) for i in range(45)]
    assert [row['classified_as'] for row in rows if row['step'] in '08'] == list('0123456789')
    five = read_grey(tmp_path / 'interpolations.png')
    assert five.shape == (5 * 29 - 1, 9 * 29 - 1)
    surest = z[(15 * z.tanh()).softmax(1).argmax(0)[:2]]  # of a 0 and of a 1
    ends = torch.cat([five[:28, :28].reshape(1, -1), five[:28, -28:].reshape(1, -1)])
    torch.testing.assert_close(ends, (Shown()(surest) + 1) / 2, rtol=0, atol=0.6 / 255)


def test_a_class_without_a_partner_has_no_row_unless_there_is_no_other_class(tmp_path):
    ends, rows = interpolated(tmp_path, 3 * torch.eye(10)[[4, 7, 9]])
    assert ends == [4, 7] and len(rows) == 9
    ends, rows = interpolated(tmp_path, random(300, 10).float(), bias=40.)
    assert ends == [3, 3] and [row['classified_as'] for row in rows] == ['3'] * 9
    image = read_grey(tmp_path / 'interpolations.png')
    assert (image[:, :28] != image[:, -28:]).any()  # to another sample at least


def test_the_references_of_the_curves_are_what_holds_where_d_cannot_tell(tmp_path, monkeypatch):
    drawn, logit = [], torch.zeros(1, 1)
    monkeypatch.setattr(figures, 'save_curves', lambda filename, x, panels: drawn.extend(panels))
    save_loss_plot([{}], tmp_path / 'losses.pdf', 5.)
    assert drawn[0]['references'] == pytest.approx({
        'log 4': discriminator_loss(logit, logit).item(), 'log 2': generator_loss(logit).item()})
    assert drawn[1]['references'] == {'½': logit.sigmoid().item()}
    assert drawn[2]['references'] == {'real': 5.}


# --- the flags, and a run ------------------------------------------------------------------------


def test_the_template_has_its_flags_and_a_run_the_name_of_those_that_change_it(capsys):
    words = ['--n_epochs', '3', '--batch_size', '5', '--lr', '0.1', '--latent_dim', '6',
             '--save_interval', '7']
    args = parse_args(words)
    assert (args.epochs, args.batch_size, args.lr, args.latent_dim, args.save_interval) == (
        3, 5, 0.1, 6, 7)
    assert args.name == 'gan_epochs3_batchsize5_lr0.1_latentdim6'
    with pytest.raises(SystemExit, match='^2$'):
        parse_args(['--batch_size', '1'])  # there are no batch statistics of one image
    assert '--batch_size' in capsys.readouterr().err


def noted(calls: list[dict], function: Callable, *args) -> dict:
    """Called in the place of `train`: keeps its arguments by name, and the learning rates."""
    call = inspect.signature(train).bind(*args).arguments
    groups = [call[name].param_groups[0] for name in ('optimizer_G', 'optimizer_D')]
    for name, group in zip(('generator', 'discriminator'), groups, strict=True):
        assert all(map(torch.equal, call[name].parameters(), group['params']))
    calls.append(call | {'lr': [group['lr'] for group in groups]})
    return function(*args)


@pytest.fixture(scope='module')
def finished(tmp_path_factory, read_run) -> tuple[Path, dict, list[dict]]:
    """The folder of a finished run, what it held in the end, and how `train` was called."""
    calls, results = [], tmp_path_factory.mktemp('finished')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a3_gan, 'train', partial(noted, calls, train))
        a3_gan.main(parse_args([*map(str, THREE), f'--results_dir={results}']))
    return results / 'three', read_run(results / 'three'), calls


def test_a_run_leaves_these_files_a_row_for_each_epoch_and_the_curves_of_the_log(finished):
    folder, left, _ = finished
    assert set(left) == {
        'config.json', 'log.csv', 'checkpoint.pt', 'metrics.json', 'losses.pdf', 'losses.csv',
        'interpolations.png', 'interpolations.csv',
        *(f'samples_epoch{epoch:03d}.png' for epoch in range(4))}
    rows = read_csv(folder / 'log.csv')
    assert list(rows[0]) == LOG and [row['epoch'] for row in rows] == ['0', '1', '2', '3']
    assert [name for row in rows for name in row if row[name] == ''] == LOG[1:7]  # untrained
    assert [list(row.values()) for row in read_csv(folder / 'losses.csv')] == [
        [row[name] for name in (*LOG[:5], 'val_frechet')] for row in rows[1:]]


def test_training_gets_the_arguments_of_the_command_line_and_the_rate_of_its_batch(finished):
    for epoch, call in enumerate(finished[2]):
        assert (call['decay'], call['penalty']) == (0.95, 0.3)
        assert call['step'] == 12 * epoch and len(call['schedules']) == 2
        rate = 2e-3 * learning_rate((12 * epoch + 1) / 37)  # not 0 in the first of 36 batches
        assert call['lr'] == pytest.approx([rate, rate])
    for name in ('optimizer_G', 'optimizer_D'):
        [group] = call[name].param_groups
        assert group['betas'] == (0.4, 0.98)
        assert group['lr'] == pytest.approx(2e-3 / 5)


def test_samples_of_the_average_are_judged_against_test_images_and_so_are_validation_images(
        finished):
    folder = finished[0]
    written = json.loads((folder / 'metrics.json').read_text())
    real, val, test = mnist(folder, 50, False, 'digits', torch.device('cpu'))
    classifier = measures.load_classifier(folder.parent, real, val)
    averaged = runs.load_trained(folder, 'a3_gan', 'averaged', lambda args: make_model(args)[0])

    def drawn(purpose: str) -> Tensor:
        runs.seed_all(7, purpose)
        return sample(averaged, torch.randn(80, 8))
    judge = measures.Judge(classifier, test.images / 255, test.labels)
    expected = judge.measure(drawn('judged')) | {
        f'{name}_floor': value for name, value in judge.measure(val.images / 255).items()}
    expected['val_frechet'] = measures.Judge(classifier, val.images / 255, val.labels).glance(
        drawn('judged in training'))['frechet']
    assert {name: written[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert written['frechet_floor'] < written['frechet']
    assert written['classifier_sha256'] == measures.fingerprint(classifier)
    networks = make_model(parse_args(['--latent_dim', '8']))
    assert written['parameters'] == sum(weight.numel() for network in networks
                                        for weight in network.parameters())
    rows = read_csv(folder / 'interpolations.csv')
    assert [int(rows[i]['classified_as']) for i in (0, 8)] == [
        written['interpolation_from_class'], written['interpolation_to_class']]


def test_a_run_interrupted_and_resumed_ends_as_one_never_stopped_whatever_it_drew_between(
        finished, run_here, read_run, monkeypatch):
    end_epoch, results = runs.Run.end_epoch, finished[0].parent
    words = (*THREE, '--results_dir', results, '--run', 'stopped')

    def interrupt(run: runs.Run, row: dict) -> None:
        end_epoch(run, row)
        if row['epoch'] == 2:
            raise KeyboardInterrupt
    torch.manual_seed(98)  # another process has another state
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, 'end_epoch', interrupt)
        assert run_here('a3_gan.py', *words).returncode == 130
    assert (results / 'stopped' / 'samples_latest.png').is_file()
    torch.manual_seed(99)
    done = run_here('a3_gan.py', *words, '--save_interval', 500, '--resume')
    assert done.returncode == 0 and 'going on after epoch 2' in done.stdout
    left = read_run(results / 'stopped')
    assert left.pop('config.json') != finished[1]['config.json']  # the other interval
    assert left.items() <= finished[1].items() and len(left) == len(finished[1]) - 1


def test_of_100_epochs_every_tenth_is_judged_and_two_early_ones_halfway_and_the_end_shown(
        finished, run_here, monkeypatch):
    calls, rows, results = [], [], finished[0].parent
    pinned = dict.fromkeys(LOG[1:7], 1.)
    monkeypatch.setattr(a3_gan, 'train', partial(noted, calls, lambda *args: pinned))
    monkeypatch.setattr(runs.Run, 'end_epoch',  # without a checkpoint
                        lambda run, row: (run.rows.append(row), rows.append(row)))
    done = run_here('a3_gan.py', *TINY, '--epochs', 100, '--arch', 'mlp', '--schedule', 'constant',
                    '--precision', 'bf16', '--results_dir', results, '--run', 'hundred')
    assert done.returncode == 0, done.stderr
    assert [row['epoch'] for row in rows if row['val_frechet']] == list(range(0, 101, 10))
    assert sorted(path.name for path in (results / 'hundred').glob('samples_*')) == [
        f'samples_epoch{epoch:03d}.png' for epoch in (0, 1, 4, 50, 100)]
    assert {(*call['lr'], call['bf16']) for call in calls} == {(2e-3, 2e-3, True)}
    assert done.stderr.count(' has diverged: ') == 100


def test_samples_drawn_later_are_those_of_the_last_epoch_and_change_no_other_file(
        copied, run_here):
    before = stamps(copied)
    for n, columns in ((3, 2), (25, 5)):
        done = run_here('a3_gan.py', *THREE, '--results_dir', copied.parent, '--sample', n)
        assert (done.returncode, done.stderr) == (0, '') and 'sample.png' in done.stdout
        assert read_grey(copied / 'sample.png').shape == (columns * 29 - 1, columns * 29 - 1)
    assert (copied / 'sample.png').read_bytes() == (copied / 'samples_epoch003.png').read_bytes()
    after = stamps(copied)
    assert after.pop('sample.png') and after == before
    assert list(copied.parent.iterdir()) == [copied]


@pytest.mark.parametrize('name, value', [('latent_dim', 9), ('arch', 'mlp')])
def test_sampling_with_other_networks_is_refused(finished, run_here, name, value):
    done = run_here('a3_gan.py', *THREE, '--results_dir', finished[0].parent, f'--{name}', value,
                    '--sample', 3)
    assert_one_line(done, f'{name} was .*, is now {value}')


def test_the_folder_of_the_classifier_is_refused_and_left_alone(finished, run_here):
    folder = finished[0].with_name('classifier_digits')
    before = stamps(folder)
    assert set(before) == {'checkpoint.pt', 'config.json', 'metrics.json'}
    done = run_here('a3_gan.py', *TINY, '--results_dir', folder.parent, '--run', folder.name)
    assert_one_line(done, '--run: classifier_digits is the folder of the digit classifier')
    assert stamps(folder) == before
