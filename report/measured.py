r"""Typeset what the runs of `code/experiments.py` measured: numbers.tex, and every table.

Each number becomes a macro, named after its run and its name in `metrics.json`, or in the last row
of `log.csv`: `\result{vae_z20}{test_nll_nats}` in the report. A name that no run has is then an
error of LaTeX, and a run that has not finished is one of this script: either stops the build and
names it. No text of a results file reaches LaTeX. Needs nothing but Python.

    python3 report/measured.py
"""

import json
import re
import statistics
import sys
from pathlib import Path

REPORT = Path(__file__).resolve().parent
RESULTS = REPORT / 'results'
sys.path.insert(0, str(REPORT.parent / 'code'))

import experiments  # noqa: E402
from files import read_csv, write_text  # noqa: E402

# How metrics are printed, by the end of their names, `_floor` aside: the longest end that fits.
FORMATS = {'bpd': '.3f', 'bpd_iw': '.3f', 'log10': '.1f', 'frechet': '.1f', 'frechet_fitted': '.1f',
           'frechet_spread': '.1f', 'frechet_cool': '.1f', 'frechet_draws': '.1f',
           'frechet_draws_spread': '.1f', 'frechet_median': '.0f', 'nats': '.1f',
           'minutes': '.1f', 'accuracy': '.3f',
           'loss_nats': '.2f', 'share_min': '.3f', 'share_max': '.3f', 'd_fake': '.3f',
           'd_real': '.3f', 'max_error': '.1e', 'share_off_float32': '.3f',
           'saturating_d_fake_median': '.1e', 'saturating_gradient_ratio_median': '.1e',
           'non_saturating_d_fake_median': '.2f', 'non_saturating_gradient_ratio_median': '.2f',
           '': '.2f'}
# What a choice of the ablations means, for those who do not know the flags.
CHOICES = {
    '': 'our setting, for the same number of epochs',
    '--augment 0': 'training images never changed',
    '--skip no': 'no residual connections',
    '--hidden_dim 160': '160 units a layer, not 320',
    '--n_layers 4': 'four hidden layers, not eight',
    '--arch mlp': 'fully connected, as the template',
    '--penalty 0': 'no gradient penalties',
    '--beta1 0.5': r'Adam with $\beta_1 = 0.5$, not 0',
    '--plan 0': "no plan: the detail's small network draws all",
    '--plan 16': "all in the plan: its network draws whole cells in reading order",
    '--n_layers 1': "one layer in the plan's network, not four",
}
COLUMNS = {'val_neg_elbo_nats': 'validation, nats', 'train_neg_elbo_nats': 'training, nats',
           'val_bpd': 'validation, bits',
           'val_frechet': 'Fréchet distance',
           'class_share_min': 'share of rarest class',
           'd_fake': r'$D(G(\mathbf{z}))$'}
# The columns of the two tables that compare models: the metric, the two lines of its head, the
# factor that its unit asks for, the decimals, and which function finds the best of a column.
QUALITY = [('frechet', r"Fr\'echet", r'$\downarrow$', 1, 1, min),
           ('inception_score', 'inception', r'$\uparrow$', 1, 2, max),
           ('class_kl', 'class KL', r'$10^{-3}\downarrow$', 1e3, 1, min),
           ('precision', 'precision', r'\%\,$\uparrow$', 100, 1, max),
           ('recall', 'recall', r'\%\,$\uparrow$', 100, 1, max),
           ('density', 'density', r'$\uparrow$', 1, 2, max),
           ('coverage', 'coverage', r'\%\,$\uparrow$', 100, 1, max)]
FURTHER = [('nearest_train_median', 'nearest', '', 1, 2, None),
           ('near_copy_share', 'copies', r'\%', 100, 2, None),
           ('test_nll_nats', r'$-\log p$', r'nats\,$\downarrow$', 1, 1, None),
           ('test_bpd', r'$-\log p$', r'bits/dim\,$\downarrow$', 1, 3, min),
           ('reconstruction_rms', 'decoding', 'rms', 1, 3, None),
           ('parameters', 'weights', '$10^6$', 1e-6, 2, None),
           ('train_minutes', 'training', 'min', 1, 1, None),
           ('images_per_second', 'sampling', '$10^3$/s', 1e-3, 2, None)]
LATENT_SIZES = ['$J$', r'val.\ $-$ELBO', r'test $-$ELBO', 'reconstruction', 'KL',
                r'$-\log p(x)$', 'in use']


def rounded(name: str, value: float) -> str:
    """The value as the report prints it; whole numbers in groups of three digits."""
    if isinstance(value, int):
        return f'{value:,}'.replace(',', '{,}')
    form = max((end for end in FORMATS if name.removesuffix('_floor').endswith(end)), key=len)
    mantissa, _, exponent = f'{value:{FORMATS[form]}}'.partition('e')
    return rf'\ensuremath{{{mantissa}\cdot 10^{{{int(exponent)}}}}}' if exponent else mantissa


def aligned(number: str, spread: str = '', best: bool = False) -> str:
    r"""Two cells that meet at the decimal point: `12&.3`, the second with the spread if there is one.

    A dash goes into the first. The best number of a column is bold.
    """
    whole, point, decimals = number.partition('.')
    cells = [f'\\textbf{{{cell}}}' if best and cell else cell for cell in (whole, point + decimals)]
    shown = spread and '<' not in number  # "less than" stands alone
    return '&'.join(cells) + (rf'\,{{\scriptsize$\pm${spread}}}' if shown else '')


def fixed(value: float | None, factor: float, decimals: int) -> str:
    """The value times the factor, with so many decimals; `<0.01` for what would look like 0."""
    if value is None:
        return ''
    text = f'{factor * value:.{decimals}f}'
    return text if float(text) or not value else f'<{10 ** -decimals:.{decimals}f}'


def read(run: str, file: str) -> dict:
    """A JSON file of a run; exits if the run has not finished."""
    try:
        return json.loads((RESULTS / run / file).read_text())
    except (OSError, ValueError):
        sys.exit(f'measured.py: error: {RESULTS / run} is not the folder of a finished run')


def last_row(run: str) -> dict[str, float]:
    """The numbers of the last epoch in the run's log; none if it has no log."""
    path = RESULTS / run / 'log.csv'
    last = read_csv(path)[-1] if path.is_file() else {}
    return {name: float(value) for name, value in last.items()
            if value and name != 'epoch' and not name.endswith('seconds')}


def numbers() -> list[str]:
    r"""The lines of numbers.tex: a macro for every number of every run."""
    lines = ['% Written by measured.py from results/: change those, not this.']
    for run in ['classifier', *(job.name for job in experiments.MAIN + experiments.FIGURES)]:
        for name, value in (last_row(run) | read(run, 'metrics.json')).items():
            if isinstance(value, int | float) and re.fullmatch('[a-z0-9_]+', name):
                lines.append(rf'\expandafter\newcommand\csname result/{run}/{name}'
                             rf'\endcsname{{{rounded(name, value)}}}')
    return lines


def tabular(columns: str, *parts: list[list[str]]) -> list[str]:
    """The lines of a table whose parts have rules between them and cells in LaTeX already.

    A column `d` is one of numbers that are `aligned`; of its head, the first part, each cell is
    centred above both halves.
    """
    head = [[rf'\multicolumn{{2}}{{c}}{{{cell}}}' if kind == 'd' else cell
             for kind, cell in zip(columns, row, strict=True)] for row in parts[0]]
    kinds = ''.join('r@{}l' if kind == 'd' else kind for kind in columns)
    lines = [rf'\begin{{tabular}}{{@{{}}{kinds}@{{}}}}']
    for index, part in enumerate([head, *parts[1:]]):
        lines.append(r'\midrule' if index else r'\toprule')
        lines += [' & '.join(cells) + r' \\' for cells in part]
    return [*lines, r'\bottomrule', r'\end{tabular}']


def ablations(table: str) -> list[str]:
    """The runs with one choice changed each: what was changed, and the last figures, with mean and
    sample standard deviation over the seeds."""
    _, shared, columns, choices, seeds, _ = experiments.ABLATIONS[table]
    path = RESULTS / f'ablations_{table}.csv'
    measured, rows = read_csv(path), []
    for choice in choices:
        setting = f'{shared} {choice}'.strip()
        found = [row for row in measured if row['setting'].partition(' --seed')[0] == setting]
        if len(found) < len(seeds):
            sys.exit(f'measured.py: error: {path} has no row for {setting}')
        rows.append([CHOICES[choice]])
        for name in columns:
            values = [float(row[name]) for row in found]
            rows[-1].append(aligned(rounded(name, statistics.mean(values)),
                                    rounded(name, statistics.stdev(values))))
    return tabular('l' + 'd' * len(columns), [['', *(COLUMNS[name] for name in columns)]], rows)


def comparison(columns: list[tuple]) -> list[str]:
    """The real digits and the compared models; `columns` is QUALITY or FURTHER."""
    metrics = read('compare', 'metrics.json')
    rows = {'floor': ['real digits'], 'floor_bits': ['the same, binarised'],
            'floor_train': ['training digits']}
    n_real = len(rows)
    rows |= {model: [label] for model, label in experiments.COMPARED.items()}
    for name, *_, factor, decimals, better in columns:
        values = {model: metrics.get(f'{model}_{name}') for model in rows}
        judged = [values[model] for model in experiments.COMPARED if values[model] is not None]
        best = better(judged, default=None) if better else None
        for model, row in rows.items():
            number, spread = (fixed(value, factor, decimals) for value in (
                values[model], metrics.get(f'{model}_{name}_spread')))
            is_best = best is not None and values[model] == best and 'floor' not in model
            row.append(aligned(number or '--', spread, is_best))
    head = [['', *(column[line] for column in columns)] for line in (1, 2)]
    real = [row for row in list(rows.values())[:n_real] if set(row[1:]) != {'--&'}]
    return tabular('l' + 'd' * len(columns), head, real, list(rows.values())[n_real:])


def latent_sizes() -> list[str]:
    """The VAEs with different numbers of latent dimensions."""
    rows = read_csv(RESULTS / 'evidence' / 'latent_sizes.csv')
    return tabular('r' * len(LATENT_SIZES), [LATENT_SIZES], [
        [str(int(value)) if name in ('zdim', 'dims_in_use') else f'{float(value):.1f}'
         for name, value in row.items()] for row in rows])


def main() -> None:
    files = {f'tables/ablations_{table}': ablations(table) for table in experiments.ABLATIONS}
    # The numbers last: they are what make looks at, so a fault in a table must not leave them new.
    files |= {'tables/quality': comparison(QUALITY), 'tables/further': comparison(FURTHER),
              'tables/latent_sizes': latent_sizes(), 'numbers': numbers()}
    for name, lines in files.items():
        write_text(REPORT / f'{name}.tex', '\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
