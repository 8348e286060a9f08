"""The report: its sources, `measured.py`, and the PDF, whose tests are skipped without LaTeX."""

import importlib
import json
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
experiments = measured.experiments


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
    assert sorted(limits) == [('1.12', '10'), ('2.5', '10'), ('4.1', '15')]


# What may stand typed: sizes of the data and of grids, facts of mathematics, settings of a run and
# figures of others' papers. All else with more than two significant digits is a \result.
ALLOWED = {'784', '768', '28', '50,000', '10,000', '1,000', '5,000', '256', '255', '543', '1.386',
           '400', '300', '320', '384', '512', '128', '100', '1024', '1.85', '0.0077', '14.3',
           '1.89', '1.06', '1.05', '0.97', '88.7', '87.1', '79.0', '251', '248', '250', '0.999',
           '200', '392', '0.975', '1.96', '2,000'}


def test_no_measured_number_is_typed():
    text = re.sub(r'(?<!\\)%.*', '', '\n'.join(path.read_text(encoding='utf-8')
                                               for path in SOURCES[1:]))
    text = re.sub(r'\\(?:result\{[^}]*\}\{[^}]*\}|(?:label|ref|eqref|input|includegraphics|hspace|'
                  r'citep?|citet|panel|texttt)(?:\[[^]]*\])*\{[^}]*\}(?:\{[^}]*\})?)', ' ', text)
    text = re.sub(r'\\question\{[\d.]+\}|questions?[~ ][\d.]+\d', ' ', text)
    typed = re.findall(r'(?<![\w.,])\d[\d,]*(?:\.\d+)?', text)
    significant = {number.rstrip(',') for number in typed
                   if len(re.sub(r'^0*\.?0*|[.,]', '', number.rstrip(','))) > 2}
    assert significant <= ALLOWED


# --- from results to LaTeX -----------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """A results folder with the one run of the table, and another one that a user tried."""
    monkeypatch.setattr(measured, 'RESULTS', tmp_path)
    monkeypatch.setattr(experiments, 'MAIN', [experiments.Job('a_run', 'a3_nf.py', 1)])
    monkeypatch.setattr(experiments, 'FIGURES', [])
    for name in ('a_run', 'a_trial', 'classifier'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.json').write_text('{}')
    folder = tmp_path / 'a_run'
    (folder / 'metrics.json').write_text(
        r'{"test_bpd": 1.00649, "parameters": 337836, "roundtrip_max_error": 7.96e-08,'
        r' "data": "\\input{x}", "\\end": 1, "seed": 42}')
    (folder / 'log.csv').write_text('epoch,val_bpd,running_bpd,seconds\n0,8,,1\n1,1.5,2,1\n')
    (tmp_path / 'a_trial' / 'metrics.json').write_text('{"test_bpd": 7}')
    return tmp_path


def test_numbers_of_the_runs_in_the_table_are_rounded_and_named_and_no_text_reaches_latex(results):
    lines = measured.numbers()[1:]
    found = dict(re.fullmatch(r'\\expandafter\\newcommand\\csname result/a_run/(\w+)\\endcsname'
                              r'\{(.*)\}', line).groups() for line in lines)
    assert found == {'val_bpd': '1.500', 'running_bpd': '2.000', 'test_bpd': '1.006',
                     'parameters': '337{,}836', 'seed': '42',
                     'roundtrip_max_error': r'\ensuremath{8.0\cdot 10^{-8}}'}


def test_an_unfinished_run_stops_the_build_with_its_name(results):
    (results / 'a_run' / 'metrics.json').unlink()
    with pytest.raises(SystemExit, match='a_run is not the folder of a finished run'):
        measured.numbers()


def test_numbers_meet_at_the_decimal_point_and_only_the_best_is_bold():
    assert [measured.aligned(*cell) for cell in (('12.3',), ('7',), ('--',))] == [
        '12&.3', '7&', '--&']
    assert measured.aligned('8.26', '0.12') == r'8&.26\,{\scriptsize$\pm$0.12}'
    assert measured.aligned('<0.001', '<0.001') == '<0&.001'
    assert measured.aligned('8.2', best=True) == r'\textbf{8}&\textbf{.2}'


def test_the_comparison_has_rows_for_real_digits_and_each_model_and_marks_the_best(
        results, monkeypatch):
    monkeypatch.setattr(experiments, 'COMPARED', {'gan': 'GAN', 'nf': 'flow'})
    (results / 'compare').mkdir()
    (results / 'compare' / 'metrics.json').write_text(json.dumps(
        {'floor_frechet': 5.1, 'gan_frechet': 7.72, 'gan_frechet_spread': 0.91,
         'nf_frechet': 18.0, 'gan_class_kl': 0.0014, 'gan_recall': 0.863, 'nf_recall': 0.9}))
    lines = measured.comparison(measured.QUALITY)
    assert lines[0] == r'\begin{tabular}{@{}l' + 7 * 'r@{}l' + '@{}}'
    assert [line.count('&') for line in lines] == [0, 0, 7, 7, 0, 14, 0, 14, 14, 0, 0]
    empty = ' & --& & --& & --& & --&'
    assert lines[5] == rf'real digits & 5&.1 & --& & --&{empty} \\'
    assert lines[7] == (r'GAN & \textbf{7}&\textbf{.7}\,{\scriptsize$\pm$0.9} & --& & '
                        r'\textbf{1}&\textbf{.4} & --& & 86&.3 & --& & --& \\')
    assert lines[8] == r'flow & 18&.0 & --& & --& & --& & \textbf{90}&\textbf{.0} & --& & --& \\'


def test_the_numbers_need_nothing_but_python(tmp_path):
    blocked = 'import sys; sys.modules.update(dict.fromkeys(("torch", "numpy", "matplotlib")))'
    done = subprocess.run(
        [sys.executable, '-S', '-c', f'{blocked}; sys.path.insert(0, {str(REPORT)!r}); '
         'import measured; print(len(measured.numbers()))'],
        capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and int(done.stdout) > 100, done.stderr


# --- the build -----------------------------------------------------------------------------------


def make(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(['make', '-C', str(folder), f'PYTHON={sys.executable}', *words],
                          capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='module')
def built(tmp_path_factory) -> Path:
    """The report's folder in a copy of the project, with the report compiled."""
    root = tmp_path_factory.mktemp('project')
    skip = shutil.ignore_patterns('*.pt', 'ablations', '.*', 'report.[!t]*', 'numbers.tex',
                                  'tables', '__pycache__', 'tests', '*.zip', '*.tmp')
    for name in ('code', 'report'):
        shutil.copytree(ROOT / name, root / name, ignore=skip)
    done = make(root / 'report')
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return root / 'report'


def text_of(pdf: Path) -> str:
    return subprocess.run(['pdftotext', '-layout', str(pdf), '-'], check=True,
                          capture_output=True, text=True).stdout


@needs_latex
def test_the_report_answers_every_question_with_no_fault_of_latex(built):
    log = (built / 'report.log').read_text(encoding='utf-8', errors='replace')
    assert 'undefined' not in log and 'multiply defined' not in log
    overfull = [float(points) for points in re.findall(r'Overfull \\[hv]box \(([\d.]+)pt', log)]
    assert max(overfull, default=0) <= 1
    text = text_of(built / 'report.pdf')
    assert '??' not in text
    assert [q for q in QUESTIONS if not re.search(rf'Question {q}\b', text)] == []
    fonts = subprocess.run(['pdffonts', str(built / 'report.pdf')], check=True,
                           capture_output=True, text=True).stdout.splitlines()[2:]
    assert len(fonts) > 5
    for line in fonts:
        assert 'Type 3' not in line and line.split()[-5] == 'yes', line  # the column "emb"
    before = (built / 'report.pdf').stat().st_mtime_ns
    assert 'is up to date' in make(built).stdout
    assert (built / 'report.pdf').stat().st_mtime_ns == before


@needs_latex
def test_the_submission_has_the_report_and_all_code(built):
    done = make(built, 'submission', 'NAME=Doe')
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(built / 'Doe_assignment3.zip').namelist())
    assert {'report/report.pdf', 'code/a3_vae.py', 'code/datasets/mnist.py'} <= names
    assert all(re.fullmatch(r'report/report\.pdf|code/.*\.py', name) for name in names)


@needs_latex
def test_a_missing_metric_a_missing_row_and_a_text_too_long_stop_the_build(built, tmp_path):
    copy = Path(shutil.copytree(built.parent, tmp_path / 'project')) / 'report'
    path = copy / 'results' / 'ablations_vae.csv'
    whole = path.read_text()
    path.write_text(''.join(whole.splitlines(keepends=True)[:-1]))
    for _ in range(2):  # a fault in a table stops every build, not only the first
        done = make(copy)
        assert done.returncode != 0 and 'ablations_vae.csv has no row for' in done.stderr
    path.write_text(whole)

    path = copy / 'results' / 'nf' / 'metrics.json'
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps({name: metrics[name] for name in metrics if name != 'test_bpd'}))
    path = copy / 'sections' / 'abstract.tex'  # what comes first, so that LaTeX stops soon
    text = path.read_text(encoding='utf-8')
    path.write_text(text + r'\result{nf}{test_bpd}')
    assert make(copy).returncode != 0
    log = (copy / 'report.log').read_text(encoding='utf-8', errors='replace')
    assert 'There is no test_bpd in the results of nf' in ' '.join(log.split())

    path.write_text(r'\atmost{15}{' + 'Words upon words. ' * 199 + '}' + text)
    assert make(copy).returncode != 0
    log = (copy / 'report.log').read_text(encoding='utf-8', errors='replace')
    assert 'lines; 15 are allowed' in ' '.join(log.split())
