"""The autoencoders: their loss against an oracle, what noise there is, and the script.

That a killed run ends as one never stopped is tested in test_faults.py.
"""

import json
import math
import re

import matplotlib.image
import pytest
import torch
from torch import Tensor, distributions, nn

import a3_ae
import runs
from a3_ae import AutoEncoder, corrupt, decodings
from a3_vae import PIXELS, VAE
from conftest import FEWER_DIGITS
from datasets import digits
from datasets.bmnist import bmnist
from helpers import TIMES, assert_one_line, read_csv, stamps
from test_vae import bits, off_by_errors

TINY = ('--dataset', 'digits', '--hidden_dim', 16, '--batch_size', 50, '--seed', 7)
TWO = (*TINY, '--model', 'dae', '--zdim', 2, '--precision', 'fp32', '--epochs', 4, '--run', 'two')
FILES = {'config.json', 'log.csv', 'checkpoint.pt', 'metrics.json', 'loss.pdf', 'loss.csv',
         'reconstructions.png', 'decodings.png'}
LOG = ['epoch', 'train_reconstruction_nats', 'val_reconstruction_nats',
       'running_reconstruction_nats', *TIMES]


def random_autoencoder(z_dim: int = 3, share: float = 0.) -> AutoEncoder:
    """In float64, of random weights; in training mode, as every module is made."""
    torch.manual_seed(3)
    model = AutoEncoder(hidden_dim=16, z_dim=z_dim, share=share).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
    return model


def reconstruction_error(model: AutoEncoder, seen: Tensor, images: Tensor) -> Tensor:
    """−log p(x|z) of each image, z the first half of what the encoder says of what it saw."""
    code = model.encoder.net(2 * seen - 1)[:, :model.z_dim]
    pixels = distributions.Bernoulli(logits=model.decoder.logits(code))
    return -pixels.log_prob(images).sum(-1)


def watch_encoder(model: AutoEncoder) -> list[Tensor]:
    """What the encoder gets to see from now on."""
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    return seen


# --- corruption ----------------------------------------------------------------------------------


def test_corruption_hides_that_share_of_the_pixels_each_on_its_own():
    torch.manual_seed(1)
    kept = corrupt(torch.ones(1000, PIXELS), 0.3)
    assert kept.unique().tolist() == [0, 1]
    assert off_by_errors(kept.flatten(), 0.7) < 4
    for axis, n in ((0, 1000), (1, PIXELS)):  # neither images nor pixels go together
        assert kept.mean(axis).std().item() == pytest.approx(math.sqrt(0.21 / n), rel=0.15)


@pytest.mark.parametrize('share, kept', [(0., 1.), (1., 0.)])
def test_corruption_of_nothing_and_of_all(share, kept):
    assert torch.equal(corrupt(bits(50, PIXELS), share), kept * bits(50, PIXELS))


def test_corruption_turns_no_pixel_on_and_leaves_its_argument_alone():
    images = bits(50, PIXELS)
    corrupted = corrupt(images, 0.5)
    assert not corrupted[images == 0].any() and corrupted[images == 1].unique().tolist() == [0, 1]
    assert torch.equal(images, bits(50, PIXELS))


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize('share, training', [(0., True), (0., False), (0.3, False)])
def test_the_loss_is_minus_the_log_likelihood_given_the_mean_code(share, training):
    model, x = random_autoencoder(share=share).train(training), bits(6, PIXELS)
    torch.testing.assert_close(model(x), reconstruction_error(model, x, x).mean())


def test_in_training_the_encoder_sees_less_than_is_to_be_reconstructed():
    model, x = random_autoencoder(share=0.3), bits(200, PIXELS)
    seen = watch_encoder(model)
    torch.manual_seed(1)
    losses = [model(x), model(x)]
    for corrupted, loss in zip(seen, losses, strict=True):
        assert off_by_errors(corrupted[x == 1], 0.7) < 4 and not corrupted[x == 0].any()
        torch.testing.assert_close(loss, reconstruction_error(model, corrupted, x).mean())
    assert not torch.equal(*seen) and torch.equal(x, bits(200, PIXELS))


def test_evaluation_hides_nothing_and_draws_no_number():
    model, x = random_autoencoder(share=0.3).eval(), bits(6, PIXELS)
    seen = watch_encoder(model)
    before = torch.get_rng_state()
    assert model(x) == model(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert [torch.equal(images, x) for images in seen] == [True, True]


def test_gradients_reach_all_but_the_deviations_which_no_divergence_asks_for():
    torch.manual_seed(0)
    model = AutoEncoder(hidden_dim=16, z_dim=2)
    model(bits(50, PIXELS, dtype=torch.float32)).backward()
    for name, parameter in model.named_parameters():
        if name.startswith('encoder.net.last'):
            assert parameter.grad[:2].any() and not parameter.grad[2:].any()
        else:
            assert parameter.grad.any(), name


@pytest.mark.parametrize('z_dim, skip', [(20, True), (5, True), (4, False), (2, False)])
def test_the_networks_are_those_of_the_vae(z_dim, skip):
    torch.manual_seed(0)
    vae, model = VAE(16, z_dim, skip=skip), AutoEncoder(16, z_dim)
    model.load_state_dict(vae.state_dict())
    x = bits(5, PIXELS, dtype=torch.float32)
    code, _ = vae.encoder(x)
    assert torch.equal(model.decoder(model.encoder(x)[0]), vae.decoder(code))


def test_codes_to_be_decoded_are_drawn_as_if_from_the_prior_of_a_vae():
    model, codes = AutoEncoder(hidden_dim=16, z_dim=2), []
    model.decoder.register_forward_pre_hook(lambda module, inputs: codes.append(inputs[0]))
    torch.manual_seed(1)
    means = decodings(model, 5000)
    assert means.shape == (5000, PIXELS) and means.min() > 0 and means.max() < 1
    assert not means.requires_grad
    assert off_by_errors(codes[0], 0.) < 4 and off_by_errors(codes[0].square(), 1.) < 4


# --- the script ----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def finished(tmp_path_factory, read_run):
    """The folder of a finished run, and what was in it when the run ended."""
    results = tmp_path_factory.mktemp('finished')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'SIZES', FEWER_DIGITS)
        a3_ae.main(a3_ae.parse_args([*map(str, TWO), f'--results_dir={results}']))
    return results / 'two', read_run(results / 'two')


def test_a_run_leaves_these_files_and_nothing_else(finished):
    folder, left = finished
    assert set(left) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ['two']


def test_the_log_and_the_curve_fall_from_the_untrained_network_on(finished):
    rows, curve = (read_csv(finished[0] / name) for name in ('log.csv', 'loss.csv'))
    assert list(rows[0]) == LOG and [row['epoch'] for row in rows] == ['0', '1', '2', '3', '4']
    assert [name for row in rows for name in row if row[name] == ''] == [LOG[3]]
    for label, name in (('training', LOG[1]), ('validation', LOG[2])):
        assert abs(float(rows[0][name]) - PIXELS * math.log(2)) < 40
        assert float(rows[-1][name]) < float(rows[0][name]) - 40
        assert [row[label] for row in curve] == [row[name] for row in rows]


def test_metrics_are_of_the_last_epoch_without_noise(finished):
    metrics = json.loads((finished[0] / 'metrics.json').read_text())
    assert set(metrics) >= {'test_reconstruction_nats', 'seed', 'epochs', 'train_minutes'}
    assert not [name for name in metrics if re.search('elbo|nll|bpd|kl', name)]
    assert metrics['val_reconstruction_nats'] == pytest.approx(
        float(read_csv(finished[0] / 'log.csv')[-1]['val_reconstruction_nats']), rel=1e-5)
    parts = torch.load(finished[0] / 'checkpoint.pt', weights_only=True)['parts']
    assert metrics['parameters'] == sum(weight.numel() for weight in parts['model'].values())


def test_a_run_without_its_metrics_is_ended_from_its_last_checkpoint(copied, finished, run_here,
                                                                      read_run):
    (copied / 'metrics.json').unlink()
    done = run_here('a3_ae.py', *TWO, '--results_dir', copied.parent, '--resume')
    assert done.returncode == 0 and 'going on after epoch 4' in done.stdout
    assert read_run(copied) == finished[1]


def test_the_test_error_is_that_of_the_network_which_others_load(finished, monkeypatch):
    model = runs.load_trained(finished[0], 'a3_ae.py --model dae', 'model', lambda args: (
        AutoEncoder(args.hidden_dim, args.zdim, args.share)))
    monkeypatch.setattr(digits, 'SIZES', FEWER_DIGITS)
    _, _, [images] = bmnist(batch_size=1000, dataset='digits')
    with torch.no_grad():
        error = reconstruction_error(model, images, images).mean().item()
    metrics = json.loads((finished[0] / 'metrics.json').read_text())
    assert metrics['test_reconstruction_nats'] == pytest.approx(error, rel=1e-5)


def test_sample_writes_a_grid_and_changes_nothing_else(copied, run_here):
    before = stamps(copied)
    done = run_here('a3_ae.py', *TWO, '--results_dir', copied.parent, '--sample', 3)
    assert done.returncode == 0, done.stderr
    after = stamps(copied)
    assert set(after) - set(before) == {'sample.png'} and 'sample.png' in done.stdout
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize('words, reason', [
    (('--model', 'ae', '--resume'), 'model was dae, is now ae'),
    (('--model', 'ae', '--sample', 3), 'model was dae, is now ae'),
    (('--share', 0.5, '--resume'), 'share was 0.3, is now 0.5'),
    (('--zdim', 3, '--sample', 3), 'zdim was 2, is now 3')])
def test_going_on_with_another_model_is_refused(copied, run_here, words, reason):
    before = stamps(copied)
    done = run_here('a3_ae.py', *TWO, '--results_dir', copied.parent, *words)
    assert_one_line(done, f'is another run: {reason}')
    assert stamps(copied) == before


def test_hiding_pixels_is_of_the_denoising_one_alone(tmp_path, run_here):
    done = run_here('a3_ae.py', *TINY, '--model', 'ae', '--share', 0.5, '--results_dir', tmp_path)
    assert_one_line(done, '--share has no meaning with --model ae')
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('words, name, share, rows', [
    (('--model', 'ae'), 'ae_z20_digits', 0., 2),
    (('--model', 'dae', '--zdim', 2), 'dae_z2_digits', 0.3, 3),
    (('--model', 'dae', '--share', 0.5), 'dae_z20_share0.5_digits', 0.5, 3)])
def test_a_dry_run_is_named_by_model_and_code_and_shows_what_was_hidden(
        tmp_path, run_here, monkeypatch, words, name, share, rows):
    hidden = []
    monkeypatch.setattr(a3_ae, 'corrupt', lambda images, share: (
        hidden.append((len(images), share)) or corrupt(images, share)))
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    done = run_here('a3_ae.py', *words, '--dry_run', '--dataset', 'digits')
    assert done.returncode == 0, done.stderr
    [folder] = tmp_path.glob('a3_*/*_digits')
    assert folder.name == name and {path.name for path in folder.iterdir()} == FILES
    height, width, *_ = matplotlib.image.imread(folder / 'reconstructions.png').shape
    assert round(10 * height / width) == rows  # of ten images each
    assert hidden == 2 * 3 * [(128, share)] + [(10, share)]  # of three batches an epoch
