"What holds the repository together: package equals notebooks, notebooks are clean, parameters tagged, imports light, the wheel complete, every figure of the README from a record."
import ast, json, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS, RUNS = sorted(ROOT.glob('nbs/[0-9]*.ipynb')), sorted(ROOT.glob('runs/*.ipynb'))
cells = lambda nb: json.loads(nb.read_text())['cells']
src = lambda c: ''.join(c['source'])
code_lines = lambda t: [l for l in t.splitlines() if not l.startswith(('# %%', '# AUTOGEN'))]

def test_package_equals_notebooks(tmp_path):
    from nbdev.export import nb_export
    lib = tmp_path/'nano_dh'; lib.mkdir()
    for nb in CHAPTERS: nb_export(nb, lib_path=lib)
    made = sorted(p for p in lib.glob('*.py') if p.name[0] != '_')
    assert len(made) == len(CHAPTERS)
    for p in made:
        assert code_lines(p.read_text()) == code_lines((ROOT/'nano_dh'/p.name).read_text()), f'{p.name}: run nbdev_export'
    extra = {p.name for p in (ROOT/'nano_dh').glob('*.py')} - {p.name for p in made} - {'__init__.py', '_modidx.py'}
    assert not extra, f'no chapter exports {extra}'

def test_imports_go_one_way():
    order = [re.search(r'default_exp (\w+)', nb.read_text()).group(1) for nb in CHAPTERS]
    for nb, name in zip(CHAPTERS, order):
        used = set(re.findall(r'^\s*from \.(\w+) import', (ROOT/'nano_dh'/f'{name}.py').read_text(), re.M))
        late = {u for u in used if order.index(u) >= order.index(name)}
        assert not late, f'{nb.name} imports from later chapters: {late}'

def test_volume_1_is_short_and_alone():
    "At most 3,500 exported lines (without blanks and the marks of cells), and no import of volume 2"
    names = 'core delta_rule chunked deltanet gated_attn hybrid_model tokenizer dataset dataloader optim loss_eval checkpoint generate train'.split()
    text = {n: (ROOT/'nano_dh'/f'{n}.py').read_text() for n in names}
    assert sum(bool(l.strip()) and not l.startswith(('# %%', '# AUTO')) for t in text.values() for l in t.splitlines()) <= 3500
    used = {n: {*re.findall(r'(?:from \.|nano_dh\.)(\w+)(?= import)', t)} - {*names} for n, t in text.items()}
    assert not any(used.values()), {n: u for n, u in used.items() if u}

@pytest.mark.parametrize('nb', CHAPTERS + RUNS, ids=lambda p: p.name)
def test_notebook_is_clean(nb):
    d = json.loads(nb.read_text())
    assert set(d['metadata']) == {'kernelspec'} and d['metadata']['kernelspec']['name'] == 'python3'
    ids = [c['id'] for c in d['cells']]
    assert len(ids) == len(set(ids))
    for c in d['cells']:
        assert set(c['metadata']) <= {'tags'}
        assert c.get('execution_count') is None
        for o in c.get('outputs', []):
            assert o['output_type'] != 'error' and o.get('execution_count') is None
            text = json.dumps({k: v for k, v in o.get('data', {}).items() if k != 'image/png'}) + ''.join(o.get('text', ''))
            assert not re.search(r'/(tmp|root|home|work|Users)/', text), f'{c["id"]}: a place on somebody\'s disk'

@pytest.mark.parametrize('nb', RUNS, ids=lambda p: p.name)
def test_run_notebook_has_parameters(nb):
    tagged = [c for c in cells(nb) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    for line in src(tagged[0]).splitlines():
        if line.strip() and not line.startswith('#'): assert re.match(r'\w+: [\w|. ]+ = .+  # \S', line), line

def test_import_is_light():
    heavy = ['fla', 'flash_qla', 'tilelang', 'wandb', 'datasets', 'fastapi', 'transformers']
    for f in (ROOT/'nano_dh').glob('*.py'):                # triton comes with torch's Dynamo; none of ours asks for it at its top
        if f.stem == 'standalone': continue
        top = [n for n in ast.parse(f.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {a.name.split('.')[0] for n in top if isinstance(n, ast.Import) for a in n.names} | {(n.module or '').split('.')[0] for n in top if isinstance(n, ast.ImportFrom) and not n.level}
        assert not names & {*heavy, 'triton'}, f'{f.name} imports {names & {*heavy, "triton"}}'
    mods = [p.stem for p in (ROOT/'nano_dh').glob('*.py') if p.stem[0] != '_' and p.stem != 'standalone'] # which is for transformers
    code = f'import sys, nano_dh\n' + '\n'.join(f'import nano_dh.{m}' for m in mods) + f'\nprint([m for m in {heavy} if m in sys.modules])'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == '[]', f'imported at package import: {out.stdout}'

def test_readme_is_up_to_date_with_its_records():
    from nano_dh.figures import check
    wrong = check(ROOT)[0]
    assert not wrong, '\n'.join(wrong + ['run make figures'])

@pytest.mark.parametrize('f', sorted(ROOT.glob('runs/records/*.json')), ids=lambda f: f.name)
def test_record_has_its_provenance(f):
    from nano_dh.figures import read_record
    read_record(f)

def test_a_changed_number_is_found(tmp_path):
    from nano_dh.figures import _DRAWN, check, draw_all
    shutil.copytree(ROOT/'runs/records', tmp_path/'runs/records', ignore=shutil.ignore_patterns('*.ipynb'))
    readme, record = tmp_path/'README.md', tmp_path/'runs/records/compare-d4-cpu.json'
    shutil.copy(ROOT/'README.md', readme)
    draw_all(tmp_path); _DRAWN.clear()
    assert draw_all(tmp_path) == [], 'drawn twice, not the same bytes'
    text, was, known = readme.read_text(), record.read_text(), check(tmp_path)[0]
    new = lambda: [w for w in check(tmp_path)[0] if w not in known]
    cell = re.search(r'\| GGGL \| (2\.\d{4}) \|', text)[1]                           # a cell of a table
    readme.write_text(text.replace(cell, '2.0000', 1)); [said] = new()
    assert 'block compare_cpu' in said and '2.0000' in said and cell in said
    readme.write_text(text.replace('## Measured\n', '## Measured\n\nIt is 3.14 times as fast.\n')); assert new() == ['README.md: 3.14 stands outside the blocks']
    readme.write_text(text); assert not new()
    record.write_text(was.replace('2.1169', '2.1196')); [said] = new()               # a figure of one seed
    assert 'block compare_cpu' in said
    record.write_text(was.replace('"commit"', '"from"')); assert 'runs/records/compare-d4-cpu.json: no commit' in new()

@pytest.mark.slow
def test_wheel_works_outside_the_checkout(tmp_path):
    r = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path, ROOT], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    whl = next(tmp_path.glob('*.whl'))
    names = zipfile.ZipFile(whl).namelist()
    assert any(n.startswith('nano_dh/data/') and n.endswith('.parquet') for n in names), names
    site = tmp_path/'site'; zipfile.ZipFile(whl).extractall(site)
    code = "import nano_dh; from nano_dh.dataset import open_data; m = open_data(); print(nano_dh.__file__, m.sources[0].n_docs('train'))"
    env = {**os.environ, 'PYTHONPATH': str(site), 'NANO_DH_BASE_DIR': str(tmp_path/'base')}; env.pop('NANO_DH_DATA', None)
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert out.returncode == 0 and str(site) in out.stdout and int(out.stdout.split()[-1]) > 0, out.stdout + out.stderr
