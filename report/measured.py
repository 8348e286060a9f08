r"""What the report says of its runs, from `results/` to LaTeX: numbers.tex and the tables.

Each number becomes a macro, named by its run and its name in `metrics.json`, units and all, or in
the last row of `log.csv`: `\result{vae_z20}{test_nll_nats}` in the report. A name that no run has
is an error of LaTeX then, and a run that has not ended is one of this script: either stops the
build and says which. Texts are escaped, so nothing in a results file reaches LaTeX as a command.

    python report/measured.py
"""

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import results
from results import REPORT

import runs

# Of metrics, by the end of their names, the longest that fits: how they are printed.
FORMATS = {'bpd': '.3f', 'bpd_iw': '.3f', 'class_kl': '.4f', 'class_kl_floor': '.4f',
           'log10': '.1f', 'frechet': '.1f', 'frechet_floor': '.1f', 'frechet_fitted': '.1f',
           'frechet_spread': '.1f', 'per_second': ',.0f', 'copy_share': '.3f',
           'nats': '.1f', 'minutes': '.1f', 'memory_mb': '.0f', 'accuracy': '.3f',
           'loss_nats': '.2f', 'share_min': '.3f', 'share_max': '.3f', 'share_min_floor': '.3f',
           'share_max_floor': '.3f', 'max_error': '.1e', 'd_real': '.2f', 'd_fake': '.2f',
           '': '.2f'}
# What a choice of the ablations means, for those who do not know the flags.
CHOICES = {
    '': 'our setting, for so many epochs',
    '--augment 0': 'training images never changed',
    '--skip no': 'no residual connections',
    '--hidden_dim 256': '256 units a layer, not 512',
    '--n_layers 2': 'two hidden layers, not three',
    '--precision fp32': 'float32 throughout',
    '--arch mlp': 'fully connected, as the template',
    '--average 0': 'no running average of the generator',
    '--penalty 0': 'no gradient penalty',
    '--max_shift 0': 'no random shifts',
    '--beta1 0.9 --beta2 0.999': r'Adam with $\beta = 0.9, 0.999$',
    '--n_embedding 0': 'values as numbers, not looked up',
    '--max_ranks 64': 'each coupling doubles the pixels',
    '--max_ranks 4': 'couplings of four ranks, not 16',
    '--n_hidden 32': '32 channels, not 64',
    '--n_layers 0': 'no residual layer',
    '--max_ranks 8 --n_layers 2': 'eight ranks, two residual layers',
}
COLUMNS = {'val_neg_elbo_nats': 'validation, nats', 'train_neg_elbo_nats': 'training, nats',
           'val_frechet': 'Fréchet distance', 'class_share_min': 'share of rarest class',
           'd_real': r'$D(\mathbf{x})$', 'd_fake': r'$D(G(\mathbf{z}))$',
           'val_bpd': 'validation, bits', 'train_bpd': 'training, bits',
           'parameters': 'parameters'}


def escaped(text: str) -> str:
    """The text as LaTeX prints it, letter by letter."""
    special = {'\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}',
               '-': '-{}', **{character: '\\' + character for character in '{}$&#_%'}}
    return ''.join(special.get(character, character) for character in text)


def rounded(name: str, value: float) -> str:
    """The value as the report prints it; whole numbers in groups of three digits."""
    if isinstance(value, int):
        return f'{value:,}'.replace(',', '{,}')
    form = max((end for end in FORMATS if name.endswith(end)), key=len)
    mantissa, _, exponent = f'{value:{FORMATS[form]}}'.partition('e')
    return rf'\ensuremath{{{mantissa}\cdot 10^{{{int(exponent)}}}}}' if exponent else mantissa


def finished(folder: Path) -> dict:
    """What the run measured. Exits where it has not ended."""
    try:
        return json.loads((folder / 'metrics.json').read_text())
    except (OSError, ValueError):
        sys.exit(f'measured.py: error: {folder} is not the folder of a finished run')


def last_row(folder: Path) -> dict[str, float]:
    """The numbers of the last epoch in the run's log; none where it has no log."""
    path = folder / 'log.csv'
    if not path.is_file():
        return {}
    with path.open() as file:
        row = list(csv.DictReader(file))[-1]
    return {name: float(value) for name, value in row.items()
            if value and name != 'epoch' and not name.endswith('seconds')}


def numbers() -> list[str]:
    r"""The lines of numbers.tex: a macro for every number of every run."""
    lines = ['% Written by measured.py from results/: change those, not this.']
    for folder in sorted(path.parent for path in REPORT.glob('results/*/config.json')):
        for name, value in (last_row(folder) | finished(folder)).items():
            if isinstance(value, int | float) and re.fullmatch('[a-z0-9_]+', name):
                lines.append(rf'\expandafter\newcommand\csname result/{folder.name}/{name}'
                             rf'\endcsname{{{rounded(name, value)}}}')
    return lines


def tabular(columns: str, head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table, of cells that are LaTeX already."""
    def line(cells: list[str]) -> str:
        return ' & '.join(cells) + r' \\'
    return [rf'\begin{{tabular}}{{@{{}}{columns}@{{}}}}', r'\toprule', line(head), r'\midrule',
            *map(line, rows), r'\bottomrule', r'\end{tabular}']


def ablations(table: str) -> list[str]:
    """The runs with one choice changed each: what was changed, and the last figures."""
    _, common, columns, choices, _ = results.ABLATIONS[table]
    columns = (*columns, 'parameters') if table == 'nf' else columns
    path = REPORT / 'results' / f'ablations_{table}.csv'
    with path.open() as file:
        measured = {row['setting']: row for row in csv.DictReader(file)}
    rows = []
    for choice in choices:
        row = measured.get(f'{common} {choice}'.strip())
        if row is None:
            sys.exit(f'measured.py: error: {path} has no row of {common} {choice}')
        cells = [rounded(name, int(row[name]) if name == 'parameters' else float(row[name]))
                 for name in columns]
        rows.append([CHOICES[choice], *cells])
    return tabular('l' + 'r' * len(columns), ['', *(COLUMNS[c] for c in columns)], rows)


def commands() -> list[str]:
    """Every run that the report shows: the command that makes it, seed, threads and minutes."""
    rows = []
    for job in results.MAIN:
        folder = REPORT / 'results' / job.folder
        metrics, config = finished(folder), json.loads((folder / 'config.json').read_text())
        threads = re.search(r'(\d+) threads$', config['hardware'])
        rows.append([rf'\texttt{{{escaped(job.folder)}}}',
                     rf'\texttt{{{escaped(shlex.join(job.command.split()))}}}',
                     str(metrics['seed']), threads.group(1) if threads else '--',
                     rounded('train_minutes', metrics['train_minutes'])])
    return tabular(r'l>{\raggedright\arraybackslash}p{2.55in}rrr',
                   ['run', r'\texttt{python code/}\dots', 'seed', 'threads', 'minutes'], rows)


def main() -> None:
    tables = {f'tables/ablations_{table}': ablations(table) for table in results.ABLATIONS}
    # The numbers last: they are what make looks at, so a fault in a table must not leave them new.
    for name, lines in (tables | {'tables/commands': commands(), 'numbers': numbers()}).items():
        runs.write_atomic(REPORT / f'{name}.tex', '\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
