"""The trained models side by side: how good and how varied their samples are, by equal measures.

Compared are the VAE with 20 latent dimensions on binarised digits and on grey ones, the GAN and
the flow of this project, and the template's GAN and flow; if other seeds were trained, with mean
and spread. A digit classifier (`measures.py`) judges as many samples of each run as there are test
images, five times over; real images, measured in the same way, are the floor, as they are and
binarised, since the first VAE has seen no greys. The samples of VAEs are means of p(x|z); the
distance of samples proper is `frechet_draws`. Further columns say whether samples copy training
images, what training and sampling cost, and, where a model can tell, the likelihood of images and
how well an image is encoded and decoded.

    python code/a3_compare.py
    python code/a3_compare.py --only nf

Reads the finished runs of the three scripts, with their weights, and says which are missing and
how to make them. Writes `report/results/compare/`: samples, and the numbers of each run
(`measures.csv`) and each model (`metrics.json`).
"""

import argparse
import hashlib
import json
import shlex
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import a3_gan
import a3_nf
import a3_vae
import figures
import measures
import runs
from command_line import Parser, RunError, launch
from datasets.bmnist import bmnist
from datasets.mnist import mnist
from experiments import COMPARED, Job, seeds_of
from files import read_csv, write_csv, write_json

N_SAMPLES = 10_000  # samples of each run
N_DRAWS = 5  # times that so many are drawn: measures by the classifier are averages over these
N_BLOCKS = 10  # blocks that the samples are drawn in, each of them timed
DECODED = 10  # every tenth test image is encoded and decoded
NEAR_COPY = 0.01  # the share of test images that count as copies
ROWS = 500  # images in a block of distances
SHOWN = 50  # samples of each model that are shown, in two rows
COSTS = 'parameters', 'train_minutes', 'images_per_second'  # taken from a model's first run


# --- the models ----------------------------------------------------------------------------------


def sample(network: nn.Module, n: int) -> Tensor:
    """n samples, (n, 784) in [0, 1]. Of a VAE they are means of p(x|z), since draws have
    independent noise on every pixel; of a flow whole grey values, as the data are."""
    if isinstance(network, a3_vae.VAE):
        return network.sample(n)[1]
    if isinstance(network, a3_nf.Model):
        return network.sample(n).clamp(0, 255).floor() / 255
    device = next(network.parameters()).device
    return a3_gan.sample(network, torch.randn(n, network.latent_dim, device=device))


def decoding_errors(network: nn.Module, grey: Tensor, bits: Tensor) -> Tensor | None:
    """Decoded minus encoded images, (N, 784), in units of a pixel's range; None for a GAN.

    `grey` has values 0 to 255, `bits` 0 and 1. A VAE decodes the mean codes of images as it was
    trained on them; the errors of a flow's inverse, in float64, are rounding.
    """
    if isinstance(network, a3_vae.VAE):
        is_grey = isinstance(network.decoder, a3_vae.LogisticDecoder)
        x = grey / 255 if is_grey else bits
        return network.decoder(network.encoder(x)[0]) - x
    if isinstance(network, a3_nf.Model):
        precise = torch.float32 if grey.device.type == 'mps' else torch.float64
        batches = [(rows, None) for rows in grey.split(a3_nf.EVAL_BATCH)]
        return a3_nf.roundtrip_errors(network, batches, precise) / 256
    return None


NETWORKS = {  # of each script: the module, its network's name in a checkpoint, and what makes it
    'a3_vae': (a3_vae, 'model', a3_vae.make_model),
    'a3_gan': (a3_gan, 'averaged', lambda args: a3_gan.make_model(args)[0]),
    'a3_nf': (a3_nf, 'model', a3_nf.make_model)}


# --- measures ------------------------------------------------------------------------------------


@torch.no_grad()
def draw(network: nn.Module, n: int) -> tuple[Tensor, float]:
    """n samples (n, 784) in [0, 1], in 8 bits like the data, and the median of images a second."""
    blocks, rates = [], []
    for _ in range(N_BLOCKS):
        start = time.perf_counter()
        block = sample(network, n // N_BLOCKS)
        blocks.append((255 * block).round().cpu() / 255)  # .cpu() waits for the device
        rates.append(len(block) / (time.perf_counter() - start))
    return torch.cat(blocks).to(block.device), statistics.median(rates)


def nearest_distances(images: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances (N,) of images (N, D) to the nearest of others (M, D), 0 for a copy."""
    # ‖a − b‖² is least where a·b − ‖b‖²/2 is greatest. The products are rounded, but only choose
    # the image: its distance is computed exactly below.
    half = others.square().sum(1) / 2
    return torch.cat([(rows - others[torch.addmm(-half, rows, others.T).argmax(1)]).norm(dim=1)
                      for rows in images.split(ROWS)])


def copy_measures(images: Tensor, train: Tensor, val: Tensor, threshold: float | None = None
                  ) -> tuple[dict[str, float], float]:
    """Whether images copy training images; all images are (N, 784) in [0, 1].

    A small distance alone says little: blur is near to everything. So, following Meehan et al.,
    A Non-Parametric Test to Detect Data-Copying in Generative Models (AISTATS 2020), distances to
    training images are compared with those to validation images, which no model was fitted to. A
    near copy is an image whose distance to the nearest training image, divided by that to the
    nearest validation image, is below a threshold. Test images are measured without one and set
    it, so that a share NEAR_COPY of them is below; a model that copies has more.

    Returns the median distance to a training image and the share of near copies by their names in
    `metrics.json`, and the threshold.
    """
    to_train, to_val = (nearest_distances(images, real) for real in (train, val))
    ratios = to_train / to_val.clamp(min=1 / 255)  # one grey level in one pixel
    if threshold is None:
        threshold = float(np.quantile(ratios.cpu().numpy(), NEAR_COPY))
    return {'nearest_train_median': float(to_train.median()),
            'near_copy_share': float((ratios < threshold).float().mean())}, threshold


def summarise(rows: list[dict]) -> dict[str, float]:
    """The mean of each measure over a model's runs and, if there are several, the sample standard
    deviation as `…_spread`. Costs are those of the first run. Absent measures are left out.
    """
    summary = {}
    for name, first in rows[0].items():
        if isinstance(first, int | float):
            values = [first] if name in COSTS else [row[name] for row in rows]
            summary[name] = statistics.mean(values)
            if len(values) > 1:
                summary[f'{name}_spread'] = statistics.stdev(values)
    return summary


# --- the comparison ------------------------------------------------------------------------------


def load_all(args: argparse.Namespace, jobs: list[Job], dataset: str) -> dict[str, nn.Module]:
    """The network of each run by its name; with `--dry_run` untrained.

    Raises RunError, in one line, which names every missing run and the command that makes it.
    """
    shared, defaults = ['--dataset', dataset] * (dataset == 'digits'), vars(parse_args([]))
    for name in ('data_dir', 'results_dir'):
        if getattr(args, name) != defaults[name]:
            shared += [f'--{name}', str(getattr(args, name))]
    missing = [job for job in jobs if not (args.dry_run or job.has_weights(args.results_dir))]
    if missing:
        commands = [shlex.join(['python', f'code/{job.script}.py', *job.words, '--run', job.name,
                                *shared]) for job in missing]
        raise RunError(f'{args.results_dir}: missing, unfinished or without weights: '
                       f'{", ".join(job.name for job in missing)}; '
                       f'make {"it" if len(missing) == 1 else "them"} with: '
                       + ' && '.join(commands))
    networks = {}
    for job in jobs:
        script, part, make = NETWORKS[job.script]
        runs.seed_all(args.seed, job.name)
        networks[job.name] = (
            make(script.parse_args(job.words)).eval() if args.dry_run else
            runs.load_trained(args.results_dir / job.name, job.script, part, make))
    return networks


def kept(folder: Path, classifier: str) -> tuple[dict, dict[str, dict], dict[str, str]]:
    """What the folder has of a comparison: its metrics, and for each run its row and its digest.

    Raises RunError, in one line, if it has none, or one by a classifier with another sha256.
    """
    try:
        metrics = runs.read_json(folder / 'metrics.json')
        digests = runs.read_json(folder / 'config.json')['runs']
        rows = {row['run']: row for row in read_csv(folder / 'measures.csv')}
        for model in COMPARED:
            (folder / f'samples_{model}.png').stat()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f'{folder} has no comparison to add to, leave out --only: {error}'
                       ) from None
    if metrics.get('classifier_sha256') != classifier:
        raise RunError(f'{folder} was judged by another classifier: leave out --only')
    return metrics, rows, digests


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--only', nargs='+', choices=tuple(COMPARED), metavar='NAME',
                        help='measure these models again and keep the rest of the last comparison '
                             f'(default: all): {", ".join(COMPARED)}')
    parser.add_shared_arguments(trains=False)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = runs.pick_device(args.device)
    train, val, test = mnist(args.data_dir, ROWS, not args.dry_run, args.dataset, device)
    dataset, n = train.source['dataset'], N_SAMPLES
    _, val_bits, bits = bmnist(args.data_dir, ROWS, not args.dry_run, dataset, device)
    if args.dry_run:
        n, args.only = 200, None
        train, val, test, val_bits, bits = (
            loader.head(200) for loader in (train, val, test, val_bits, bits))
    names, suffix = args.only or list(COMPARED), '_digits' * (dataset == 'digits')
    jobs = {model: [job._replace(name=job.name + suffix) for job in seeds_of(model)]
            for model in COMPARED}
    networks = load_all(args, [job for model in names for job in jobs[model]], dataset)
    folder = args.results_dir / f'compare{suffix}'
    print(f'{folder}: {"dry run" if args.dry_run else "comparison"} on {device}, '
          f'{train.source["description"]}')

    classifier = measures.load_classifier(args.results_dir, train, val)
    sha256 = measures.fingerprint(classifier)
    metrics, rows, digests = kept(folder, sha256) if args.only else ({}, {}, {})
    real_train, real_val, real_test = (loader.images / 255 for loader in (train, val, test))
    judge = measures.Judge(classifier, real_test, test.labels)
    copies, threshold = copy_measures(real_test, real_train, real_val)
    every_fifth = real_train[::len(real_train) // len(real_test)]
    floors = {'floor': judge.measure(real_val) | copies,
              'floor_train': judge.measure(every_fifth) | dict.fromkeys(copies),
              'floor_bits': judge.measure(val_bits.images.float()) | dict.fromkeys(copies)}
    metrics |= {'seed': args.seed, 'samples': n, 'near_copy_ratio': threshold,
                'classifier_sha256': sha256}
    for name, floor in floors.items():
        metrics |= {f'{name}_{key}': value for key, value in floor.items() if value is not None}
        rows[name] = {'run': name} | floor | dict.fromkeys(
            ('frechet_draws', 'reconstruction_rms', 'test_nll_nats', 'test_bpd', *COSTS))
    decoded = test.images[::DECODED].float(), bits.images[::DECODED].float()
    samples = {'real': real_test}
    for model in names:
        for job in jobs[model]:
            run, network = job.name, networks[job.name].to(device)
            content = b'{}' if args.dry_run else (
                args.results_dir / run / 'metrics.json').read_bytes()
            trained, digests[run] = json.loads(content), hashlib.sha256(content).hexdigest()
            bpd = trained.get('test_bpd', trained.get('test_neg_elbo_bpd'))
            runs.seed_all(args.seed, f'compared {run}')
            images, rate = draw(network, n)
            again = range(0 if args.dry_run else N_DRAWS - 1)
            judged = [judge.measure(images)] + [judge.measure(draw(network, n)[0]) for _ in again]
            with torch.no_grad():
                errors = decoding_errors(network, *decoded)
            copies, _ = copy_measures(images, real_train, real_val, threshold)
            rows[run] = {'run': run} | {
                name: statistics.mean(measured[name] for measured in judged)
                for name in judged[0]} | copies | {
                'frechet_draws': (statistics.mean(
                    judge.glance(network.sample(n)[0])['frechet'] for _ in judged)
                    if isinstance(network, a3_vae.VAE) else None),
                'reconstruction_rms': (
                    None if errors is None else float(errors.square().mean().sqrt())),
                'test_nll_nats': trained.get('test_nll_nats') if bpd is None else None,
                'test_bpd': bpd, 'parameters': trained.get('parameters'),
                'train_minutes': trained.get('train_minutes'), 'images_per_second': rate}
            runs.finite(rows[run], f'in {run}')
            if job is jobs[model][0]:
                samples[model] = images
            print(f'{run}  ' + '  '.join(f'{key} {value:.4g}' for key, value in rows[run].items()
                                         if isinstance(value, float)), flush=True)
        metrics |= {f'{model}_{key}': value for key, value in
                    summarise([rows[job.name] for job in jobs[model]]).items()}

    source = train.source | {'sha256': train.source['sha256'] | bits.source['sha256']}
    args.only = None  # whatever was measured again, the comparison is one of all models
    config = runs.describe(main, args, source, device) | {'runs': digests}
    if not args.dry_run:
        config['fingerprint'] = runs.fingerprint(main, args)
    order = [*floors, *(job.name for model in COMPARED for job in jobs[model])]
    if len({tuple(rows[run]) for run in order}) > 1:
        raise RunError(f'{folder} has other columns: leave out --only')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'metrics.json').unlink(missing_ok=True)  # until the rest is there
    for name, images in samples.items():
        figures.save_grid(folder / f'samples_{name}.png', images[:SHOWN], SHOWN // 2, scale=2)
    write_json(folder / 'config.json', config)
    write_csv(folder / 'measures.csv', [rows[run] for run in order])
    write_json(folder / 'metrics.json', runs.finite(metrics, 'in the comparison'))
    print(f'files in {folder}: ' + ', '.join(sorted(path.name for path in folder.iterdir())))


if __name__ == '__main__':
    launch(main, parse_args())
