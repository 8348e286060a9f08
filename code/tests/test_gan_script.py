"""`a3_gan.py` as a user starts it: what it leaves, what it survives, what it says."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import matplotlib.image
import pytest
import torch

import a3_gan
import a3_vae
import measures
from helpers import TIMES, assert_one_line, read_csv, stamps, stop_twice

# The script, judged on fewer samples: most of the time of a short run goes into these.
FEWER_SAMPLES = {'N_JUDGED': 200, 'EVAL_BATCH': 50}
ON_FEWER_SAMPLES = f"""
import a3_gan, runs
vars(a3_gan).update({FEWER_SAMPLES})
runs.launch(a3_gan.main, a3_gan.parse_args())
"""
TINY = ('--dataset', 'digits', '--latent_dim', 8, '--batch_size', 50, '--save_interval', 5,
        '--seed', 7)  # 12 batches an epoch
FOUR = (*TINY, '--epochs', 4, '--run', 'four')
MEASURES = {'frechet', 'inception_score', 'class_share_min', 'class_share_max', 'class_kl',
            'precision', 'recall', 'density', 'coverage'}
FIXED_METRICS = MEASURES | {f'{name}_floor' for name in MEASURES} | {
    'val_frechet', 'seed', 'epochs', 'parameters', 'train_minutes', 'peak_memory_mb'}
LOG = ['epoch', 'discriminator_loss_nats', 'generator_loss_nats', 'd_real', 'd_fake', 'r1',
       'val_frechet', 'class_share_min', *TIMES]


def expected_files(epochs: list[int]) -> set[str]:
    return {'config.json', 'log.csv', 'checkpoint.pt', 'metrics.json', 'losses.pdf', 'losses.csv',
            'interpolation.png', 'interpolations.png', 'interpolations.csv',
            *(f'samples_epoch{epoch:03d}.png' for epoch in epochs)}


@pytest.fixture(scope='module')
def script(tmp_path_factory) -> Path:
    """A file to start in the place of `a3_gan.py`, of the same name."""
    path = tmp_path_factory.mktemp('script') / 'a3_gan.py'
    path.write_text(ON_FEWER_SAMPLES)
    return path


@pytest.fixture
def run_here(monkeypatch, run_here):
    """The same in this process."""
    for name, value in FEWER_SAMPLES.items():
        monkeypatch.setattr(a3_gan, name, value)
    return partial(run_here, 'a3_gan.py')


# --- one run, and what became of it --------------------------------------------------------------


@pytest.fixture(scope='module')
def finished(tmp_path_factory, script, run_script, read_run):
    """The folder of a finished run, what was in it when the run ended, and what was said."""
    results = tmp_path_factory.mktemp('finished')
    done = run_script(script, *FOUR, '--results_dir', results, fewer_digits=True)
    assert done.returncode == 0, done.stderr
    return results / 'four', read_run(results / 'four'), done


def share_classifier(finished, results: Path) -> None:
    """Spare another results folder the training of the classifier."""
    shutil.copytree(finished[0].parent / 'classifier_digits', results / 'classifier_digits')


def test_a_run_leaves_these_files_lists_them_and_nothing_else(finished):
    folder, left, done = finished
    assert set(left) == expected_files([0, 1, 2, 4])
    assert all(name in done.stdout.splitlines()[-1] for name in left)
    assert {path.name for path in folder.parent.iterdir()} == {'four', 'classifier_digits'}


def test_the_classifier_is_kept_with_what_is_known_of_it(finished):
    folder = finished[0].parent / 'classifier_digits'
    assert {path.name for path in folder.iterdir()} == {
        'checkpoint.pt', 'config.json', 'metrics.json'}
    assert json.loads((folder / 'metrics.json').read_text())['seed'] == measures.SEED


def test_the_log_has_a_row_for_each_epoch_from_the_untrained_network_on(finished):
    rows = read_csv(finished[0] / 'log.csv')
    assert list(rows[0]) == LOG
    assert [row['epoch'] for row in rows] == ['0', '1', '2', '3', '4']
    assert [name for row in rows for name in row if row[name] == ''] == LOG[1:6]  # untrained
    assert all(0 < float(row[name]) < 1 for row in rows[1:] for name in ('d_real', 'd_fake'))
    assert all(float(row[name]) > 0 for row in rows[1:] for name in
               ('discriminator_loss_nats', 'generator_loss_nats', 'r1', 'seconds'))
    frechet = [float(row['val_frechet']) for row in rows]
    assert min(frechet) > 0 and min(frechet[1:]) < frechet[0]


def test_what_is_wrong_with_an_epoch_is_said_and_nothing_else(finished):
    folder, _, done = finished
    assert done.stderr.splitlines() == [
        f'WARNING: epoch {row["epoch"]} has collapsed: a class is missing from the samples'
        for row in read_csv(folder / 'log.csv')[1:] if float(row['class_share_min']) == 0]


def test_metrics_have_the_fixed_names_and_agree(finished):
    metrics = json.loads((finished[0] / 'metrics.json').read_text())
    assert set(metrics) >= FIXED_METRICS
    assert metrics['seed'] == 7 and metrics['epochs'] == 4
    parts = torch.load(finished[0] / 'checkpoint.pt', weights_only=True)['parts']
    optimized = sum(len(group['params']) for name in ('optimizer_G', 'optimizer_D')
                    for group in parts[name]['param_groups'])
    assert optimized == sum(len(parts[name]['state']) for name in ('optimizer_G', 'optimizer_D'))
    assert metrics['parameters'] == sum(
        state['exp_avg'].numel() for name in ('optimizer_G', 'optimizer_D')
        for state in parts[name]['state'].values())
    last = read_csv(finished[0] / 'log.csv')[-1]
    assert metrics['val_frechet'] == pytest.approx(float(last['val_frechet']), rel=1e-5)


def test_metrics_are_in_their_ranges_and_the_floor_is_better(finished):
    metrics = json.loads((finished[0] / 'metrics.json').read_text())
    for end in ('', '_floor'):
        assert all(0 <= metrics[name + end] <= 1 for name in
                   ('class_share_min', 'class_share_max', 'precision', 'recall', 'coverage'))
        assert 1 <= metrics['inception_score' + end] <= 10 and metrics['class_kl' + end] >= 0
    assert 0 < metrics['frechet_floor'] < metrics['frechet']
    assert metrics['coverage_floor'] > metrics['coverage']


def test_the_config_says_what_was_run_on_what(finished):
    config = json.loads((finished[0] / 'config.json').read_text())
    assert config['arguments']['latent_dim'] == 8 and config['arguments']['seed'] == 7
    assert config['arguments']['precision'] in ('bf16', 'fp32')  # as it was picked
    assert config['data']['dataset'] == 'digits' and config['data']['sha256']
    assert config['versions']['torch'] == torch.__version__ and config['device']


def test_the_curves_are_those_of_the_log(finished):
    log = read_csv(finished[0] / 'log.csv')[1:]
    lines = (finished[0] / 'losses.csv').read_text().splitlines()
    assert [line.split(',') for line in lines[1:]] == [
        [row[name] for name in ('epoch', 'discriminator_loss_nats', 'generator_loss_nats',
                                'd_real', 'd_fake')] for row in log]


def test_the_curves_have_a_name_each(finished):
    lines = (finished[0] / 'losses.csv').read_text().splitlines()
    assert {line.count(',') for line in lines} == {4}


def test_interpolations_are_nine_images_a_row_and_metrics_have_the_classes_of_the_first(finished):
    rows = read_csv(finished[0] / 'interpolations.csv')
    classes = [int(row['classified_as']) for row in rows]
    assert [(int(row['row']), int(row['step'])) for row in rows] == [
        divmod(i, 9) for i in range(len(rows))] and len(rows) % 9 == 0
    metrics = json.loads((finished[0] / 'metrics.json').read_text())
    assert classes[0] == metrics['interpolation_from_class']
    assert classes[8] == metrics['interpolation_to_class']
    one, all_rows = (matplotlib.image.imread(finished[0] / name)
                     for name in ('interpolation.png', 'interpolations.png'))
    assert one.shape[:2] == (28 * 3, (9 * 29 - 1) * 3)
    assert all_rows.shape[:2] == ((len(rows) // 9 * 29 - 1) * 3, one.shape[1])
    assert (all_rows[:84] == one).all()


def test_snapshots_are_25_images_and_differ(finished):
    images = [matplotlib.image.imread(finished[0] / f'samples_epoch{epoch:03d}.png')
              for epoch in (0, 1, 2, 4)]
    assert {image.shape[:2] for image in images} == {((5 * 29 - 1) * 3, (5 * 29 - 1) * 3)}
    assert all((a != b).any() for a, b in zip(images, images[1:], strict=False))


def test_a_finished_run_starts_anew_and_ends_the_same(finished, run_here, read_run):
    folder, left, _ = finished
    classifier = stamps(folder.with_name('classifier_digits'))
    (folder / 'samples_epoch099.png').write_bytes(b'of an earlier run')
    before = (folder / 'checkpoint.pt').stat().st_mtime_ns
    done = run_here(*FOUR, '--results_dir', folder.parent)
    assert done.returncode == 0 and (folder / 'checkpoint.pt').stat().st_mtime_ns > before
    assert read_run(folder) == left
    assert stamps(folder.with_name('classifier_digits')) == classifier  # not trained again


def test_a_run_killed_and_interrupted_and_resumed_ends_as_one_never_stopped(
        finished, tmp_path, script, start_script, run_script, read_run):
    folder = tmp_path / 'four'
    share_classifier(finished, tmp_path)
    words = stop_twice(start_script, folder, script, *FOUR, '--results_dir', tmp_path)
    done = run_script(*words, fewer_digits=True)
    assert done.returncode == 0 and 'going on after epoch' in done.stdout
    assert read_run(folder) == finished[1]


def test_resuming_a_finished_run_says_so_and_changes_nothing(copied, run_here):
    before = stamps(copied)
    done = run_here(*FOUR, '--results_dir', copied.parent, '--resume')
    assert done.returncode == 0 and 'finished' in done.stdout
    assert stamps(copied) == before and list(copied.parent.iterdir()) == [copied]


@pytest.mark.parametrize('unfinished', [False, True])
def test_resuming_with_another_argument_is_refused(copied, run_here, unfinished):
    if unfinished:
        (copied / 'metrics.json').unlink()
    before = stamps(copied)
    done = run_here(*FOUR, '--results_dir', copied.parent, '--resume', '--beta1', 0.123)
    assert_one_line(done, r'is another run: beta1 was .*, is now 0\.123')
    assert stamps(copied) == before and list(copied.parent.iterdir()) == [copied]


def test_resuming_with_another_save_interval_goes_on(finished, copied, run_here, read_run):
    (copied / 'metrics.json').unlink()
    share_classifier(finished, copied.parent)
    done = run_here(*FOUR, '--results_dir', copied.parent, '--resume', '--save_interval', 3)
    assert done.returncode == 0 and 'going on after epoch 4' in done.stdout
    assert read_run(copied)['metrics.json'] == finished[1]['metrics.json']


def test_sample_writes_a_grid_and_changes_nothing_else(copied, run_here):
    before = stamps(copied)
    done = run_here(*FOUR, '--results_dir', copied.parent, '--sample', 3)
    assert (done.returncode, done.stderr) == (0, '') and 'sample.png' in done.stdout
    after = stamps(copied)
    assert set(after) - set(before) == {'sample.png'}
    assert {name: after[name] for name in before} == before
    assert list(copied.parent.iterdir()) == [copied]
    assert matplotlib.image.imread(copied / 'sample.png').shape[:2] == (57 * 3, 57 * 3)


def test_25_samples_are_those_of_the_last_snapshot(copied, run_here):
    done = run_here(*FOUR, '--results_dir', copied.parent, '--sample', 25)
    assert done.returncode == 0
    assert (copied / 'sample.png').read_bytes() == (copied / 'samples_epoch004.png').read_bytes()


def test_sampling_a_run_that_is_not_there_is_one_line(tmp_path, run_here):
    done = run_here(*TINY, '--results_dir', tmp_path / 'none', '--sample', 3)
    assert_one_line(done, 'train this run first')
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('words, reason', [
    (('--latent_dim', 9), 'latent_dim was 8, is now 9'),
    (('--arch', 'mlp'), 'arch was conv, is now mlp')])
def test_sampling_with_other_networks_is_refused(copied, run_here, words, reason):
    before = stamps(copied)
    done = run_here(*FOUR, '--results_dir', copied.parent, *words, '--sample', 3)
    assert_one_line(done, reason)
    assert stamps(copied) == before


@pytest.mark.parametrize('words', [(), ('--resume',), ('--sample', 3)])
def test_the_folder_of_the_classifier_is_refused_and_left_alone(
        finished, tmp_path, run_here, words):
    share_classifier(finished, tmp_path)
    folder = tmp_path / 'classifier_digits'
    before = stamps(folder)
    done = run_here(*TINY, '--results_dir', tmp_path, '--run', folder.name, *words)
    assert_one_line(done, '--run: classifier_digits is the folder of the digit classifier')
    assert stamps(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_a_run_of_the_vae_is_refused_and_left_alone(tmp_path, run_here):
    a3_vae.main(a3_vae.parse_args(
        ['--dataset', 'digits', '--epochs', '1', '--zdim', '3', '--hidden_dim', '8',
         '--n_layers', '1', '--iw_samples', '1', '--run', 'four', f'--results_dir={tmp_path}']))
    before = stamps(tmp_path / 'four')
    for words, reason in ((('--sample', 3), 'latent_dim was None, is now 8'),
                          (('--resume',), 'is another run'),
                          ((), 'holds files of a3_vae')):
        assert_one_line(run_here(*FOUR, '--results_dir', tmp_path, *words), reason)
        assert stamps(tmp_path / 'four') == before
    assert list(tmp_path.iterdir()) == [tmp_path / 'four']


def test_the_checkpoint_of_the_vae_is_refused(copied, run_here):
    path = copied / 'checkpoint.pt'
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {'script': 'a3_vae', 'parts': {'model': a3_vae.VAE(8, 3, 1).state_dict()}},
               path)
    done = run_here(*FOUR, '--results_dir', copied.parent, '--sample', 3)
    assert_one_line(done, 'is of a3_vae.py, not of a3_gan.py')


@pytest.mark.filterwarnings('error')  # which would be lines on stderr
@pytest.mark.parametrize('save_interval', [500, 5])
def test_divergence_ends_with_status_1_and_one_line_and_the_last_checkpoint(
        finished, tmp_path, run_here, save_interval):
    share_classifier(finished, tmp_path)
    done = run_here(*TINY, '--save_interval', save_interval, '--epochs', 2, '--lr', 1e20,
                    '--results_dir', tmp_path, '--run', 'two')
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert re.search(r'is (nan|inf) after epoch 1; .*checkpoint.pt is of epoch 0', done.stderr)
    saved = torch.load(tmp_path / 'two' / 'checkpoint.pt', weights_only=True)
    assert [row['epoch'] for row in saved['rows']] == [0]
    assert all(weight.isfinite().all() for weight in saved['parts']['generator'].values())
    assert not (tmp_path / 'two' / 'metrics.json').exists()


@pytest.mark.parametrize('lr', [1e10, 1e15, 1e25])
def test_one_wild_step_after_finite_losses_is_one_line_at_most(finished, tmp_path, run_here, lr):
    share_classifier(finished, tmp_path)
    done = run_here(*TINY, '--batch_size', 600, '--epochs', 1, '--lr', lr, '--results_dir',
                    tmp_path)  # one batch: D's loss is of before its step
    lines = [line for line in done.stderr.splitlines() if not line.startswith('WARNING:')]
    assert done.returncode in (0, 1) and len(lines) == done.returncode


def test_a_last_batch_of_one_image_does_not_stop_training(finished, tmp_path, run_here):
    share_classifier(finished, tmp_path)
    done = run_here(*TINY, '--batch_size', 599, '--epochs', 1, '--results_dir', tmp_path, '--run',
                    'one')
    assert done.returncode == 0, done.stderr
    assert [row['epoch'] for row in read_csv(tmp_path / 'one' / 'log.csv')] == ['0', '1']


def test_one_epoch_one_dimension_no_penalty_and_no_average_are_enough(
        finished, tmp_path, run_here):
    share_classifier(finished, tmp_path)
    done = run_here(*TINY, '--epochs', 1, '--latent_dim', 1, '--penalty', 0, '--average', 0,
                    '--results_dir', tmp_path)
    assert done.returncode == 0, done.stderr
    [folder] = (path for path in tmp_path.iterdir() if path.name != 'classifier_digits')
    assert re.fullmatch('gan_epochs1_.*latentdim1_.*seed7_digits', folder.name)
    assert 'saveinterval' not in folder.name  # says nothing about the result
    assert {path.name for path in folder.iterdir()} == expected_files([0, 1])
    assert [row['r1'] for row in read_csv(folder / 'log.csv')] == ['', '']


def test_help_tells_the_defaults_as_they_are():
    told = {action: re.search(r'default: ([^);]+)\)?$', action.help)
            for action in a3_gan.build_parser()._actions if action.type not in (None, Path)}
    told = {action: found[1] for action, found in told.items() if found}
    assert len(told) >= 8
    assert [action.dest for action, words in told.items()
            if action.type(words) != action.default] == []


def test_a_batch_of_one_is_refused_since_it_has_no_statistics(capsys):
    with pytest.raises(SystemExit, match='^2$'):
        a3_gan.parse_args(['--batch_size=1'])
    assert '--batch_size' in capsys.readouterr().err
