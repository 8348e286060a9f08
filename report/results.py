"""Train and measure every run that the report shows: `make -C report results`.

What has finished with the same script and arguments is skipped, what was cut off goes on from its
checkpoint, all else starts anew. First the runs that the questions ask for, then those that others
are held against and other seeds, then short runs with one choice changed each, whose figures are
gathered in `results/ablations_*.csv`, and at the end the figures that are made of several runs.
"""

import argparse
import csv
import hashlib
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

REPORT = Path(__file__).resolve().parent
CODE = REPORT.parent / 'code'
sys.path.insert(0, str(CODE))

import runs  # noqa: E402


class Job(NamedTuple):
    """One run: its folder in `results/`, the command, and about how long two cores take."""
    folder: str
    command: str
    minutes: float


TEMPLATE_GAN = ('--arch mlp --n_epochs 100 --batch_size 64 --lr 2e-4 --beta1 0.9 --beta2 0.999 '
                '--schedule constant --penalty 0 --max_shift 0 --average 0 --precision fp32')
MAIN = [
    Job('vae_z20', 'a3_vae.py --zdim 20 --iw_samples 1000', 6),
    Job('vae_z2', 'a3_vae.py --zdim 2 --iw_samples 1000', 6),
    Job('gan', 'a3_gan.py', 9),
    Job('nf', 'a3_nf.py', 20),
    Job('nf_mlp', 'a3_nf.py --arch mlp', 16),
    Job('gan_template', f'a3_gan.py {TEMPLATE_GAN}', 16),
    *(Job(f'vae_z{zdim}', f'a3_vae.py --zdim {zdim} --iw_samples 1000', 6) for zdim in (5, 10)),
    Job('vae_gaussian_z20', 'a3_vae.py --likelihood gaussian --iw_samples 1000', 9),
    *(Job(f'{model}_z{zdim}', f'a3_ae.py --model {model} --zdim {zdim}', 3)
      for zdim in (20, 2) for model in ('ae', 'dae')),
    *(Job(f'{name}_seed{seed}', f'{command} --seed {seed}', minutes) for seed in (43, 44)
      for name, command, minutes in (('vae_z20', 'a3_vae.py --zdim 20 --iw_samples 1000', 6),
                                     ('gan', 'a3_gan.py', 9), ('nf', 'a3_nf.py', 20))),
]
# By table: the script, what all its runs have in common, the columns, the choices, the minutes.
ABLATIONS = {
    'vae': ('a3_vae.py', '--zdim 20', ('val_neg_elbo_nats', 'train_neg_elbo_nats'),
            ('', '--augment 0', '--skip no', '--hidden_dim 256', '--n_layers 2',
             '--precision fp32'), 4),
    'gan': ('a3_gan.py', '--n_epochs 10', ('val_frechet', 'class_share_min', 'd_real', 'd_fake'),
            ('', '--arch mlp', '--average 0', '--penalty 0', '--max_shift 0',
             '--beta1 0.9 --beta2 0.999', '--precision fp32'), 2),
    'nf': ('a3_nf.py', '--epochs 3', ('val_bpd', 'train_bpd'),
           ('', '--n_embedding 0', '--max_ranks 64', '--max_ranks 4', '--n_hidden 32',
            '--n_layers 0', '--max_shift 0', '--max_ranks 8 --n_layers 2', '--precision fp32'),
           2.5),
}
# Made of the runs above, and made anew where one of these is new.
FIGURES = [Job('evidence', 'a3_evidence.py', 10), Job('compare', 'a3_compare.py', 6)]


def ablation_jobs(table: str) -> list[Job]:
    """The runs of one table of ablations, in folders `results/ablations/…`."""
    script, common, _, choices, minutes = ABLATIONS[table]
    return [Job('_'.join(['ablations/' + table, *choice.replace('--', '').split()]),
                f'{script} {common} {choice}'.strip(), minutes) for choice in choices]


def finished(job: Job) -> bool | None:
    """Whether the run has ended, of this very script and these arguments; None where it is another
    one, or nothing."""
    folder = REPORT / 'results' / job.folder
    script, *words = job.command.split()
    try:
        config = json.loads((folder / 'config.json').read_text())
        before, digest = config['arguments'], config['script_sha256']
    except (OSError, ValueError, LookupError, TypeError):
        return None
    now = vars(importlib.import_module(script.removesuffix('.py')).parse_args(words))
    alike = all(before.get(name) == value for name, value in now.items()
                if name not in runs.NEUTRAL and value not in (None, 'auto'))  # those are chosen
    if not alike or before.get('only') or digest != runs.script_digest(CODE / script):
        return None
    if any(sha256(run) != then for run, then in config.get('runs', {}).items()):
        return None
    return (folder / 'metrics.json').is_file()


def sha256(run: str) -> str | None:
    """Of what the run measured; None where it has not ended."""
    path = REPORT / 'results' / run / 'metrics.json'
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def train(job: Job, data_dir: str | None) -> None:
    """Run the job to its end. Exits with its status where that is not 0."""
    folder = REPORT / 'results' / job.folder
    script, *words = job.command.split()
    words += ['--results_dir', str(folder.parent), '--dataset', 'mnist']
    words += ['--data_dir', data_dir] if data_dir else []
    words += ['--run', folder.name] if job not in FIGURES else []
    words += ['--resume'] if job not in FIGURES and finished(job) is False else []
    print(f'\n$ python {shlex.join([script, *words])}', flush=True)
    done = subprocess.run([sys.executable, str(CODE / script), *words])
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)


def gather(table: str) -> None:
    """Write `results/ablations_<table>.csv`, a row for each run: flags and last figures."""
    script, common, columns, choices, _ = ABLATIONS[table]
    rows = []
    for job, choice in zip(ablation_jobs(table), choices, strict=True):
        folder = REPORT / 'results' / job.folder
        metrics = json.loads((folder / 'metrics.json').read_text())
        with (folder / 'log.csv').open() as file:
            last = list(csv.DictReader(file))[-1]
        rows.append({'setting': f'{common} {choice}'.strip()}
                    | {name: float(last[name]) for name in columns}
                    | {name: metrics[name] for name in ('train_minutes', 'parameters', 'seed')})
    runs.write_csv(REPORT / 'results' / f'ablations_{table}.csv', rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', nargs='*', help='of results/, to be made; all if none is named')
    parser.add_argument('--data_dir', type=lambda path: str(Path(path).resolve()),
                        help="where MNIST is (default: the project's data/)")
    parser.add_argument('--plan', action='store_true', help='say what is to be done, and stop')
    args = parser.parse_args()
    jobs = MAIN + [job for table in ABLATIONS for job in ablation_jobs(table)] + FIGURES
    unknown = set(args.run) - {job.folder for job in jobs}
    if unknown:
        parser.error(f'no such run: {", ".join(sorted(unknown))}')
    states = {job: finished(job) for job in jobs if not args.run or job.folder in args.run}
    to_do = [job for job, state in states.items() if not state]
    for job, state in states.items():
        print(f'  {"finished" if state else "to go on" if state is False else "to train":9}'
              f'{job.minutes:5g} min  {job.folder}')
    print(f'{len(to_do)} of {len(states)} runs to do, about '
          f'{sum(job.minutes for job in to_do):g} minutes on two cores', flush=True)
    if args.plan:
        return
    try:
        for job in to_do:
            train(job, args.data_dir)
    except KeyboardInterrupt:
        print('\nresults.py: interrupted; the same command goes on from here', file=sys.stderr)
        sys.exit(130)
    for table in ABLATIONS:
        if all(map(finished, ablation_jobs(table))):
            gather(table)


if __name__ == '__main__':
    main()
