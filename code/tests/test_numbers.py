"""Every measured number in the README and in the scripts' docstrings is that of a results file.

The README's tables have runs as rows and, as the last word of each column's head, the metric's
name in `metrics.json`. A docstring's paragraph that starts with `Measured` names its run and then
each metric with its value.
"""

import ast
import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'report' / 'results'
RUN, METRIC, DECIMAL = r'`(\w+)`', r'`(\w+)`', r'(?<![\w.])\d+\.\d+(?![\w.])'
NOT_MEASURED = {'3.11'}  # Python's version


def assert_matches(typed: str, run: str, metric: str) -> None:
    """The metric, rounded as the text rounds it, is what the text says."""
    metrics = json.loads((RESULTS / run / 'metrics.json').read_text())
    decimals = len(typed.partition('.')[2])
    assert f'{metrics[metric]:.{decimals}f}' == typed.replace(',', ''), f'{run}: {metric}'


def tables() -> list[list[list[str]]]:
    """The README's tables, as rows of cells, without the rule under the head."""
    blocks = re.findall(r'(?:^\|.*\n)+', (ROOT / 'README.md').read_text(), flags=re.M)
    return [[[cell.strip() for cell in line.strip('|\n').split('|')]
             for line in block.splitlines() if not re.match(r'^[|\s:-]+$', line)]
            for block in blocks]


def test_readme_tables_say_what_the_runs_measured():
    checked = 0
    for head, *rows in tables():
        metrics = [re.search(METRIC + r'$', cell) for cell in head]
        for row in rows:
            run = re.match(RUN + r'$', row[0])
            for metric, cell in zip(metrics, row, strict=True):
                typed = re.search(r'\d[\d,]*(\.\d+)?', cell)
                if run and metric and typed:
                    assert_matches(typed.group(), run.group(1), metric.group(1))
                    checked += 1
    assert checked >= 10


def test_readme_types_no_measured_number_outside_its_tables():
    prose = re.sub(r'(?:^\|.*\n)+', '', (ROOT / 'README.md').read_text(), flags=re.M)
    assert set(re.findall(DECIMAL, prose)) <= NOT_MEASURED


@pytest.mark.parametrize('script', sorted(ROOT.glob('code/a3_*.py')), ids=lambda path: path.name)
def test_docstring_says_what_its_run_measured(script):
    docstring = ast.get_docstring(ast.parse(script.read_text()))
    paragraphs = re.findall(r'^Measured .*?(?=\n\n|\Z)', docstring, flags=re.M | re.S)
    assert paragraphs
    for paragraph in paragraphs:
        runs = re.findall(r'\b((?:vae|gan|nf)(?:_\w+)?)\b(?=:)', paragraph)
        parts = re.split(r'\b(?:vae|gan|nf)(?:_\w+)?:', paragraph)[1:]
        assert runs
        for run, part in zip(runs, parts, strict=True):
            claims = re.findall(r'([a-z]\w*_\w+)\s+(\d+(?:\.\d+)?)', part)
            assert len(claims) == len(re.findall(DECIMAL, part))
            for metric, typed in claims:
                assert_matches(typed, run, metric)


def test_ablations_are_of_runs_with_a_bound_a_time_and_a_seed():
    rows = list(csv.DictReader((RESULTS / 'ablations_vae.csv').open()))
    assert len(rows) >= 6
    default = json.loads((RESULTS / 'vae_z20' / 'metrics.json').read_text())
    assert float(rows[0]['val_neg_elbo_nats']) == default['val_neg_elbo_nats']
