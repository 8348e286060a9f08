"""The report: each question answered under its number, each number from a run, a clean build.

What needs LaTeX is skipped where there is none.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers import CODE

ROOT = CODE.parent
REPORT = ROOT / 'report'
SOURCES = [REPORT / 'report.tex', *sorted((REPORT / 'sections').glob('*.tex'))]
ALL_TEXT = '\n'.join(path.read_text(encoding='utf-8') for path in SOURCES)
QUESTIONS = [f'{section}.{n}' for section, last in ((1, 15), (2, 7), (3, 8), (4, 1))
             for n in range(1, last + 1)]
FINISHED = all(path.with_name('metrics.json').is_file()
               for path in REPORT.glob('results/*/config.json'))

needs_latex = pytest.mark.skipif(not (shutil.which('latexmk') and shutil.which('pdftotext')),
                                 reason='needs latexmk and pdftotext')


def load(name: str):
    """A module of the report's folder, which is no package."""
    sys.path.insert(0, str(REPORT))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(REPORT))


measured = load('measured')


# --- the sources ---------------------------------------------------------------------------------


def test_every_question_has_a_heading_in_order():
    files = re.findall(r'\\input\{(sections/\w+)\}', SOURCES[0].read_text(encoding='utf-8'))
    text = ''.join((REPORT / f'{name}.tex').read_text(encoding='utf-8') for name in files)
    assert re.findall(r'\\question\{([\d.]+)\}', text) == QUESTIONS


def test_every_figure_and_table_that_is_included_exists():
    figures = re.findall(r'\\includegraphics(?:\[[^]]*\])?\{([^}#]+)\}', ALL_TEXT)
    figures += [name for _, name in re.findall(r'\\panel\{([^}]*)\}\{([^}]*)\}', ALL_TEXT)]
    assert len(figures) > 20
    for name in figures:
        assert any((REPORT / 'results' / f'{name}.{kind}').is_file() for kind in ('pdf', 'png'))


def test_every_reference_and_citation_resolves_and_every_entry_is_cited():
    labels = re.findall(r'\\label\{([^}#]+)\}', ALL_TEXT)
    assert len(labels) == len(set(labels))
    assert set(re.findall(r'\\(?:eq|page)?ref\{([^}]+)\}', ALL_TEXT)) <= set(labels)
    cited = {key for keys in re.findall(r'\\cite\w*(?:\[[^]]*\])*\{([^}]+)\}', ALL_TEXT)
             for key in keys.split(',')}
    entries = re.findall(r'^@\w+\{(\w+),', (REPORT / 'references.bib').read_text(), flags=re.M)
    assert cited == set(entries) and len(entries) == len(set(entries))


def test_limited_texts_are_limited():
    limits = re.findall(r'\\question\{([\d.]+)\}[^\n]*\n\n(?:\\footnotetext\{[^}]*\})?'
                        r'\\atmost\{(\d+)\}', ALL_TEXT)
    assert sorted(limits) == [('1.12', '10'), ('2.5', '10'), ('3.7', '10'), ('4.1', '15')]


# What may stand typed: sizes of the data and of grids, facts of mathematics, settings of a run and
# figures of others' papers. All else with more than two significant digits is a \result.
ALLOWED = {'784', '768', '28', '50,000', '10,000', '1,000', '5,000', '256', '255', '543', '1.386',
           '400', '300', '512', '128', '100', '1024', '1.85', '0.0077', '14.3', '1.89', '1.06',
           '1.05', '0.97', '88.7', '87.1', '79.0', '254'}


def test_no_measured_number_is_typed():
    text = re.sub(r'(?<!\\)%.*', '', '\n'.join(path.read_text(encoding='utf-8')
                                               for path in SOURCES[1:]))
    text = re.sub(r'\\(?:result\{[^}]*\}\{[^}]*\}|(?:label|ref|eqref|input|includegraphics|'
                  r'citep?|citet|panel|texttt)(?:\[[^]]*\])*\{[^}]*\}(?:\{[^}]*\})?)', ' ', text)
    text = re.sub(r'\\question\{[\d.]+\}|questions?[~ ][\d.]+\d', ' ', text)
    typed = re.findall(r'(?<![\w.,])\d[\d,]*(?:\.\d+)?', text)
    significant = {number.rstrip(',') for number in typed
                   if len(re.sub(r'^0*\.?0*|[.,]', '', number.rstrip(','))) > 2}
    assert significant <= ALLOWED


# --- from results to LaTeX -----------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """A results folder with one finished run, of which measured.py is to tell."""
    monkeypatch.setattr(measured, 'REPORT', tmp_path)
    folder = tmp_path / 'results' / 'a_run'
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(r'{"data": "\\input{/etc/passwd} 100% _$"}')
    (folder / 'metrics.json').write_text(
        r'{"test_bpd": 1.00649, "parameters": 337836, "roundtrip_max_error": 7.96e-08,'
        r' "source": "\\input{x}", "\\end": 1, "seed": 42}')
    (folder / 'log.csv').write_text('epoch,val_bpd,running_bpd,seconds\n0,8,,1\n1,1.5,2,1\n')
    return folder


def test_numbers_are_rounded_and_named_by_run_and_metric(results):
    lines = measured.numbers()[1:]
    found = dict(re.fullmatch(r'\\expandafter\\newcommand\\csname result/a_run/(\w+)\\endcsname'
                              r'\{(.*)\}', line).groups() for line in lines)
    assert found == {'val_bpd': '1.500', 'running_bpd': '2.000', 'test_bpd': '1.006',
                     'parameters': '337{,}836', 'seed': '42',
                     'roundtrip_max_error': r'\ensuremath{8.0\cdot 10^{-8}}'}


def test_nothing_in_a_results_file_reaches_latex_as_a_command(results):
    text = '\n'.join(measured.numbers())
    assert 'input' not in text and 'passwd' not in text and 'end}' not in text
    assert measured.escaped('\\input{a_b}%$#&~^--') == (
        r'\textbackslash{}input\{a\_b\}\%\$\#\&\textasciitilde{}\textasciicircum{}-{}-{}')


def test_an_unfinished_run_stops_the_build_with_its_name(results):
    (results / 'metrics.json').unlink()
    with pytest.raises(SystemExit, match='a_run is not the folder of a finished run'):
        measured.numbers()


def test_every_ablation_is_told_in_words():
    for table, (*_, choices, _) in measured.results.ABLATIONS.items():
        assert set(choices) <= set(measured.CHOICES), table


# --- the build -----------------------------------------------------------------------------------


def make(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(['make', '-C', str(folder), f'PYTHON={sys.executable}', *words],
                          capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='module')
def built(tmp_path_factory) -> Path:
    """The report's folder in a copy of the project, with the report compiled."""
    if not FINISHED:
        pytest.skip('a run in report/results is not finished')
    root = tmp_path_factory.mktemp('project')
    skip = shutil.ignore_patterns('*.pt', 'ablations', '*_seed*', 'report.*', 'numbers.tex',
                                  'tables', '__pycache__', 'tests', '*.zip', '*.tmp')
    shutil.copytree(ROOT / 'code', root / 'code', ignore=skip)
    shutil.copytree(REPORT, root / 'report', ignore=skip)
    for name in ('report.tex', 'Makefile'):
        shutil.copy(REPORT / name, root / 'report' / name)
    for path in REPORT.glob('results/*_seed*/*.json'):
        target = root / 'report' / path.relative_to(REPORT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    done = make(root / 'report')
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return root / 'report'


def text_of(pdf: Path) -> str:
    return subprocess.run(['pdftotext', '-layout', str(pdf), '-'], check=True,
                          capture_output=True, text=True).stdout


@needs_latex
def test_the_build_has_no_fault(built):
    log = (built / 'report.log').read_text(encoding='utf-8', errors='replace')
    assert 'undefined' not in log and 'multiply defined' not in log
    overfull = [float(points) for points in re.findall(r'Overfull \\[hv]box \(([\d.]+)pt', log)]
    assert max(overfull, default=0) <= 1
    text = text_of(built / 'report.pdf')
    assert '??' not in text
    assert [q for q in QUESTIONS if not re.search(rf'Question {q}\b', text)] == []


@needs_latex
def test_all_fonts_are_embedded_and_none_is_of_type_3(built):
    fonts = subprocess.run(['pdffonts', str(built / 'report.pdf')], check=True,
                           capture_output=True, text=True).stdout.splitlines()[2:]
    assert len(fonts) > 5
    for line in fonts:
        assert 'Type 3' not in line and line.split()[-5] == 'yes', line  # the column "emb"


@needs_latex
def test_a_second_make_does_nothing(built):
    before = (built / 'report.pdf').stat().st_mtime_ns
    done = make(built)
    assert done.returncode == 0 and 'is up to date' in done.stdout
    assert (built / 'report.pdf').stat().st_mtime_ns == before


@pytest.fixture
def copy(built, tmp_path) -> Path:
    """A copy of the compiled report, to be changed."""
    return Path(shutil.copytree(built.parent, tmp_path / 'project')) / 'report'


@needs_latex
def test_another_metric_is_another_text(copy):
    path = copy / 'results' / 'nf' / 'metrics.json'
    metrics = json.loads(path.read_text())
    assert '0.777' not in text_of(copy / 'report.pdf')
    path.write_text(json.dumps(metrics | {'test_bpd': 0.7771}))
    os.utime(path)
    assert make(copy).returncode == 0
    assert '0.777' in text_of(copy / 'report.pdf')


@needs_latex
@pytest.mark.parametrize('spoil, said', [
    (lambda metrics: metrics.pop('test_bpd'), 'There is no test_bpd in results/nf'),
    (None, 'nf is not the folder of a finished run')])
def test_a_missing_metric_and_an_unfinished_run_stop_the_build(copy, spoil, said):
    path = copy / 'results' / 'nf' / 'metrics.json'
    metrics = json.loads(path.read_text())
    path.unlink()
    if spoil:
        spoil(metrics)
        path.write_text(json.dumps(metrics))
    (copy / 'numbers.tex').unlink()
    done = make(copy)
    log = (copy / 'report.log').read_text(encoding='utf-8', errors='replace')
    assert done.returncode != 0 and said in ' '.join((done.stdout + done.stderr + log).split())


@needs_latex
def test_a_table_that_cannot_be_made_stops_every_build_not_only_the_first(copy):
    path = copy / 'results' / 'ablations_vae.csv'
    path.write_text(''.join(path.read_text().splitlines(keepends=True)[:-1]))
    for _ in range(2):
        done = make(copy)
        assert done.returncode != 0 and 'ablations_vae.csv has no row of' in done.stderr


@needs_latex
def test_a_text_of_too_many_lines_stops_the_build(copy):
    path = copy / 'sections' / 'conclusion.tex'
    text = path.read_text(encoding='utf-8')
    assert text.count(r'\atmost{15}{') == 1
    path.write_text(text.replace(r'\atmost{15}{', r'\atmost{15}{' + 'Words upon words. ' * 99))
    assert make(copy).returncode != 0
    log = (copy / 'report.log').read_text(encoding='utf-8', errors='replace')
    assert 'lines; 15 are allowed' in ' '.join(log.split())


@needs_latex
def test_the_submission_has_the_report_and_all_code(copy):
    done = make(copy, 'submission', 'NAME=Doe')
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(copy / 'Doe_assignment3.zip').namelist())
    assert {'report/report.pdf', 'code/a3_vae.py', 'code/a3_gan.py', 'code/a3_nf.py',
            'code/datasets/mnist.py'} <= names
    assert all(re.fullmatch(r'report/report\.pdf|code/.*\.py', name) for name in names)


@pytest.mark.parametrize('name', ['', ' ', '../a', 'a/b', '-x'])
def test_a_submission_needs_a_name(name):
    done = subprocess.run([sys.executable, REPORT / 'submission.py', name], capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'NAME=' in done.stderr
