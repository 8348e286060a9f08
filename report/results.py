"""Train and measure every run that the report shows: `make -C report results`.

A run that is finished, with these arguments and with code that does the same, is left alone; one
that was cut off is continued; any other is made anew. The figures that are made of several runs
come last. If one of them is to be made, the runs that it needs are trained again where their
weights are missing, as they are in a fresh clone.
"""

import argparse
import hashlib
import importlib
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPORT = Path(__file__).resolve().parent
CODE = REPORT.parent / 'code'
RESULTS = REPORT / 'results'
sys.path.insert(0, str(CODE))

import experiments  # noqa: E402
import runs  # noqa: E402
from files import read_csv, write_csv  # noqa: E402


def state(job: experiments.Job) -> str:
    """Whether the run is `finished`, `cut off` (and can be continued), or `to do`."""
    folder, module = RESULTS / job.name, importlib.import_module(job.script)
    try:
        config = runs.read_json(folder / 'config.json')
    except (OSError, ValueError):
        return 'to do'
    args = module.parse_args(job.words)
    now = {'arguments': vars(args)}
    if (runs.difference(config, now) or config['arguments'].get('only')
            or ('binarised once' in config['data'].get('description', '')) != bool(job.data)
            or any(sha256(run) != then for run, then in config.get('runs', {}).items())
            or runs.difference(
                config, now | {'fingerprint': runs.fingerprint(module.main, args)})):
        return 'to do'
    if (folder / 'metrics.json').is_file():
        return 'finished'
    return 'cut off' if (folder / 'checkpoint.pt').is_file() else 'to do'


def sha256(run: str) -> str | None:
    """The digest of what the run measured; None if it has not finished."""
    path = RESULTS / run / 'metrics.json'
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def make(job: experiments.Job, state: str, data_dir: Path, threads: int) -> None:
    """Run the job to its end. Exits with its status if that is not 0."""
    folder = RESULTS / job.name
    words = [*job.words, '--results_dir', folder.parent, '--data_dir', data_dir / job.data,
             '--dataset', 'mnist']
    if job not in experiments.FIGURES:
        words += ['--run', folder.name, '--resume' if state == 'cut off' else '--overwrite']
    command = [str(CODE / f'{job.script}.py'), *map(str, words)]
    print(f'\n$ python {shlex.join(command)}', flush=True)
    done = subprocess.run([sys.executable, *command],
                          env=os.environ | {'OMP_NUM_THREADS': str(threads)})
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)


def gather(table: str) -> None:
    """Write `results/ablations_<table>.csv`, a row for each run: its flags and last figures."""
    rows = []
    for job in experiments.ablation_jobs(table):
        metrics = runs.read_json(RESULTS / job.name / 'metrics.json')
        figures = metrics | read_csv(RESULTS / job.name / 'log.csv')[-1]
        rows.append({'setting': ' '.join(job.words)}
                    | {name: float(figures[name]) for name in experiments.ABLATIONS[table][2]}
                    | {name: metrics[name] for name in ('train_minutes', 'parameters', 'seed')})
    write_csv(RESULTS / f'ablations_{table}.csv', rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', nargs='*', help='names of runs to make (default: all)')
    parser.add_argument('--data_dir', type=Path, default=REPORT.parent / 'data',
                        help="folder of MNIST (default: the project's data/)")
    parser.add_argument('--jobs', type=int, default=1, choices=range(1, 257), metavar='N',
                        help='runs to make at a time, which share the processors (default: 1)')
    parser.add_argument('--plan', action='store_true', help='say what is to be done, and stop')
    args = parser.parse_args()
    jobs = experiments.every_job()
    unknown = set(args.run) - {job.name for job in jobs}
    if unknown:
        parser.error(f'no such run: {", ".join(sorted(unknown))}')
    states = {}
    for job in jobs:
        if not args.run or job.name in args.run:
            states[job] = state(job)
            print(f'  {states[job]:9}{job.minutes:5g} min  {job.name}', flush=True)
    to_do = {job: found for job, found in states.items() if found != 'finished'}
    changed = {job.name for job in to_do}
    figures = [job for job in experiments.FIGURES if job in states
               and changed & {job.name, *experiments.NEEDED[job.name]}]
    needed = {name for figure in figures for name in experiments.NEEDED[figure.name]} - changed
    for job in jobs:
        if job.name in needed and not job.has_weights(RESULTS):
            to_do[job] = 'to do'
            print(f'  needed   {job.minutes:5g} min  {job.name}, whose weights are missing')
    models = [job for job in jobs if job in to_do and job not in experiments.FIGURES]
    print(f'{len(models + figures)} runs to make, about '
          f'{sum(job.minutes for job in models + figures):g} minutes on two cores', flush=True)
    if args.plan:
        return
    data_dir, cores = args.data_dir.resolve(), os.cpu_count() or 1
    threads = max(1, cores // args.jobs)
    try:
        with ThreadPoolExecutor(args.jobs) as pool:  # a failure cancels the runs that wait
            list(pool.map(lambda job: make(job, to_do[job], data_dir, threads), models))
        for job in figures:
            make(job, 'to do', data_dir, cores)
    except KeyboardInterrupt:
        print('\nresults.py: interrupted; the same command goes on from here', file=sys.stderr)
        sys.exit(130)
    for table in experiments.ABLATIONS:
        if all((RESULTS / job.name / 'metrics.json').is_file()
               for job in experiments.ablation_jobs(table)):
            gather(table)


if __name__ == '__main__':
    main()
