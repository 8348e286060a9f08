"""The autoencoders: their loss against an oracle, what noise there is, and the script."""

import json
import math
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch import Tensor, distributions, nn

import a3_ae
import a3_vae
import runs
from a3_ae import AutoEncoder, corrupt
from a3_vae import PIXELS
from conftest import FEWER_DIGITS
from datasets import digits
from datasets.bmnist import bmnist
from helpers import assert_one_line, read_csv, stamps
from test_vae import bits, off_by_errors, randomised

TINY = ('--dataset', 'digits', '--hidden_dim', 16, '--batch_size', 50, '--seed', 7)
TWO = (*TINY, '--model', 'dae', '--zdim', 2, '--precision', 'fp32', '--epochs', 4,
       '--weight_decay', 0.05, '--run', 'two')


def reconstruction_error(model: AutoEncoder, seen: Tensor, images: Tensor) -> Tensor:
    """−log p(x|z) of each image, z the first half of what the encoder says of what it saw."""
    code = model.encoder.net(2 * seen - 1)[:, :model.z_dim]
    pixels = distributions.Bernoulli(logits=model.decoder.net(code))
    return -pixels.log_prob(images).sum(-1)


def test_corruption_sets_that_share_of_the_pixels_to_0_each_on_its_own():
    torch.manual_seed(1)
    kept = corrupt(torch.ones(1000, PIXELS), 0.3)
    assert kept.unique().tolist() == [0, 1] and off_by_errors(kept.flatten(), 0.7) < 4
    for axis, n in ((0, 1000), (1, PIXELS)):  # neither images nor pixels go together
        assert kept.mean(axis).std().item() == pytest.approx(math.sqrt(0.21 / n), rel=0.15)
    images = bits(50, PIXELS)
    assert torch.equal(corrupt(images, 0.), images) and not corrupt(images, 0.5)[images == 0].any()


def test_the_encoder_sees_less_than_is_to_be_reconstructed_but_in_training_alone():
    model = randomised(AutoEncoder(a3_vae.VAE(16, 3), share=0.3), 1.)
    x, seen = bits(200, PIXELS), []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(1)
    losses = model(x), model(x)
    for loss, corrupted in zip(losses, seen, strict=True):
        assert off_by_errors(corrupted[x == 1], 0.7) < 4
        torch.testing.assert_close(loss, reconstruction_error(model, corrupted, x).mean())
    assert not torch.equal(*seen) and torch.equal(x, bits(200, PIXELS))
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    torch.testing.assert_close(model.eval()(x), reconstruction_error(model, x, x).mean())


def test_codes_to_be_decoded_are_drawn_as_if_from_the_prior_of_a_vae():
    model = AutoEncoder(a3_vae.VAE(16, 2))
    model.decoder = nn.Identity()
    torch.manual_seed(1)
    codes = a3_ae.decodings(model, 5000)
    assert off_by_errors(codes, 0.) < 4 and off_by_errors(codes.square(), 1.) < 4


@pytest.mark.parametrize('words, zdim, name, share', [
    ('', 20, 'ae_z20', 0.), ('--model dae', 5, 'dae_z5', 0.3),
    ('--model dae --share 0.5', 4, 'dae_z4_share0.5', 0.5)])
def test_only_the_denoising_one_hides_pixels_and_the_networks_are_those_of_the_vae(
        words, zdim, name, share):
    args = a3_ae.parse_args([*words.split(), f'--zdim={zdim}'])
    model, vae = a3_ae.make_model(args), a3_vae.make_model(a3_vae.parse_args([f'--zdim={zdim}']))
    assert (args.name, model.share, model.z_dim) == (name, share, zdim)
    model.load_state_dict(vae.state_dict())
    assert model.encoder.net.skip == model.decoder.net.skip == vae.encoder.net.skip
    with pytest.raises(SystemExit):
        a3_ae.parse_args(['--model', 'ae', '--share', '0.5'])


@pytest.fixture(scope='module')
def finished(tmp_path_factory, read_run) -> tuple[Path, dict]:
    """The folder of a finished run, and what was in it when the run ended."""
    results, shares, prepared = tmp_path_factory.mktemp('finished'), [], a3_vae.prepared
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'SIZES', FEWER_DIGITS)
        patch.setattr(a3_ae, 'prepared', lambda data, share: (
            shares.append(share) or prepared(data, share)))
        a3_ae.main(a3_ae.parse_args([*map(str, TWO), f'--results_dir={results}']))
    assert shares == [0., 0.6, 0.6, 0.6, 0.]  # as the VAE: not before, nor in the last fifth
    return results / 'two', read_run(results / 'two')


def test_weights_decay_as_the_arguments_say(finished):
    parts = torch.load(finished[0] / 'checkpoint.pt', weights_only=True)['parts']
    assert [group['weight_decay'] for group in parts['optimizer']['param_groups']] == [0.05]


def test_the_log_and_the_curve_fall_from_the_untrained_network_on(finished):
    rows, curve = (read_csv(finished[0] / name) for name in ('log.csv', 'loss.csv'))
    for label, name in (('training', 'train_reconstruction_nats'),
                        ('validation', 'val_reconstruction_nats')):
        assert float(rows[-1][name]) < float(rows[0][name]) - 40
        assert [row[label] for row in curve] == [row[name] for row in rows]


def test_the_errors_are_those_of_the_network_which_others_load(finished, monkeypatch):
    model = runs.load_trained(finished[0], 'a3_ae', 'model', a3_ae.make_model)
    monkeypatch.setattr(digits, 'SIZES', FEWER_DIGITS)
    metrics = json.loads((finished[0] / 'metrics.json').read_text())
    for name, loader in zip(('val', 'test'), bmnist(dataset='digits')[1:], strict=True):
        [images] = loader.head(200, 200)
        error = reconstruction_error(model, images, images).mean().item()
        assert metrics[f'{name}_reconstruction_nats'] == pytest.approx(error, rel=1e-5)


def test_a_run_without_its_metrics_is_ended_from_its_last_checkpoint(copied, finished, run_here,
                                                                      read_run):
    (copied / 'metrics.json').unlink()
    torch.manual_seed(99)  # another process has another state
    done = run_here('a3_ae.py', *TWO, '--results_dir', copied.parent, '--resume')
    assert done.returncode == 0 and 'going on after epoch 4' in done.stdout
    assert read_run(copied) == finished[1]


def test_sample_changes_nothing_else_and_draws_from_no_other_model(copied, run_here):
    words = ('a3_ae.py', *TWO, '--results_dir', copied.parent, '--sample', 3)
    before = stamps(copied)
    assert str(copied / 'sample.png') in run_here(*words).stdout
    grid = matplotlib.image.imread(copied / 'sample.png')
    assert grid.shape[:2] == (3 * 57, 3 * 57)  # two rows of two, with a gap
    (copied / 'sample.png').unlink()
    other = run_here(*words, '--model', 'ae')  # though the tensors would fit
    assert_one_line(other, 'is another run: model was dae, is now ae')
    assert_one_line(run_here(*words, '--n_layers', 2), 'n_layers was 3, is now 2')
    assert stamps(copied) == before


def test_reconstructions_show_what_was_hidden_if_anything_was(finished, tmp_path, run_here):
    run_here('a3_ae.py', *TINY, '--epochs', 1, '--results_dir', tmp_path, '--run', 'plain')
    plain, denoised = (matplotlib.image.imread(folder / 'reconstructions.png')[::3, ::3, 0]
                       for folder in (tmp_path / 'plain', finished[0]))
    assert (len(plain), len(denoised)) == (29 * 2 - 1, 29 * 3 - 1)  # rows of images, with gaps
    images, seen = denoised[:28], denoised[29:57]
    assert (seen <= images).all() and 0.5 < seen.sum() / images.sum() < 0.9
