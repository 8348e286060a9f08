"""Every measured number in the README and in the scripts' docstrings is that of a committed run.

The README's tables have runs as rows and, as the last word of a column's head, the metric's name
in `metrics.json`. A docstring's paragraph that starts with `Measured` names a run and then each
metric with its value.
"""

import ast
import csv
import json
import re
import subprocess

import pytest

import a3_gan
import a3_nf
import a3_vae
import runs
from helpers import CODE

ROOT = CODE.parent
RESULTS = ROOT / 'report' / 'results'
README = (ROOT / 'README.md').read_text(encoding='utf-8')
NAME, DECIMAL = r'`(\w+)`', r'(?<![\w.])\d+\.\d+(?![\w.])'
NOT_MEASURED = {'3.11'}  # Python's version


def committed(name: str) -> str:
    """The text of a results file as committed: a run of the user's own may stand in its place."""
    path = f'report/results/{name}'
    try:
        return subprocess.run(['git', 'show', f'HEAD:{path}'], cwd=ROOT, check=True,
                              capture_output=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        return (ROOT / path).read_text(encoding='utf-8')


def assert_measured(typed: str, run: str, metric: str) -> None:
    """The metric, rounded as the text rounds it, is what the text says."""
    value = json.loads(committed(f'{run}/metrics.json'))[metric]
    typed = typed.replace(',', '')
    assert f'{value:.{len(typed.partition(".")[2])}f}' == typed, f'{run}: {metric}'


def readme_claims() -> list[tuple[str, str, str]]:
    """(number, run, metric) of every cell that stands in a run's row and a metric's column."""
    claims = []
    for table in re.findall(r'(?:^\|.*\n)+', README, flags=re.M):
        head, _, *rows = [line.strip('|').split('|') for line in table.splitlines()]
        for name, *cells in rows:
            run = re.fullmatch(NAME, name.strip())
            for title, cell in zip(head[1:], cells, strict=True):
                metric = re.search(NAME + r'\s*$', title)
                typed = re.search(r'\d[\d,.]*', cell)
                if run and metric and typed:
                    claims.append((typed.group(), run.group(1), metric.group(1)))
    return claims


def test_readme_has_a_table_of_results():
    assert len(readme_claims()) >= 10


@pytest.mark.parametrize('typed, run, metric', readme_claims())
def test_readme_says_what_the_run_measured(typed, run, metric):
    assert_measured(typed, run, metric)


def test_readme_types_no_number_with_decimals_outside_its_tables():
    prose = re.sub(r'(?:^\|.*\n)+', '', README, flags=re.M)
    assert set(re.findall(DECIMAL, prose)) <= NOT_MEASURED


@pytest.mark.parametrize('script', ['a3_vae.py', 'a3_gan.py', 'a3_nf.py', 'a3_ae.py'])
def test_docstring_says_what_its_runs_measured(script):
    docstring = ast.get_docstring(ast.parse((CODE / script).read_text(encoding='utf-8')))
    measured = re.search(r'^Measured.*?(?=\n\n|\Z)', docstring, flags=re.M | re.S).group()
    parts = re.split(r'`(\w+)`:', measured)[1:]  # run, its claims, run, its claims …
    assert len(parts) >= 2
    for run, claims in zip(parts[::2], parts[1::2], strict=True):
        found = re.findall(r'([a-z]\w+)\s+(\d+(?:\.\d+)?)', claims)
        assert found and len(found) >= len(re.findall(DECIMAL, claims))
        for metric, typed in found:
            assert_measured(typed, run, metric)


@pytest.mark.parametrize('script, metric', [
    (a3_vae, 'val_neg_elbo_nats'), (a3_gan, 'val_frechet'), (a3_nf, 'val_bpd')])
def test_ablations_change_flags_of_the_script_for_as_many_epochs(script, metric):
    table = f'ablations_{script.__name__.removeprefix("a3_")}.csv'
    first, *others = csv.DictReader(committed(table).splitlines())
    default = script.parse_args(first['setting'].split())
    assert len(others) >= 5
    for row in others:
        args = script.parse_args(row['setting'].split())
        assert args.epochs == default.epochs and args != default
        assert float(row[metric]) > 0 and set(row) == set(first)


@pytest.mark.parametrize('name', sorted(str(path.relative_to(RESULTS))
                                        for path in RESULTS.glob('**/config.json')))
def test_every_run_is_of_the_present_code(name):
    config = json.loads(committed(name))
    if config['script'] != 'measures':  # the classifier, which every GAN's run may make
        script = CODE / f'{config["script"]}.py'
        assert config['script_sha256'] == runs.script_digest(script)
