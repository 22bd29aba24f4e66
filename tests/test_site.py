"""Links of the repository and of the site. Quick: every link of a notebook or a Markdown file leads to a file, every page can be made.
`--slow`: the whole site, built as `make docs` builds it, checked and looked at in a real Chromium without a network."""
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import fresh, pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which('chromium')
try: from playwright.sync_api import sync_playwright
except ImportError: sync_playwright = None
try: import mkdocs
except ImportError: mkdocs = None

def prose(f): # the Markdown of a file, code left out
    text = f.read_text()
    if f.suffix == '.ipynb':
        text = '\n\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
    text = re.sub(r'^( *`{3,}).*?^\1`*[ ]*$', '', text, flags=re.M | re.S)
    return re.sub(r'`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$', '', text, flags=re.S)

def places(f): # what a file can be linked at, as the pages that show it make them
    heads = re.findall(r'^#+ +(.+?)\s*$', f.read_text() if f.suffix == '.md' else prose(f), re.M)
    return {re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in heads}

FILES = sorted(f for p in ('*.md', 'docs/*.md', 'docs/*.ipynb', 'nbs/*.ipynb', 'runs/*.ipynb', 'runs/records/*.md') for f in ROOT.glob(p))

@pytest.mark.parametrize('f', FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(f):
    dead = []
    for to in re.findall(r'\]\(([^)\s]+)', prose(f)):
        path, _, place = to.partition('#')
        if re.match(r'[a-z]+:', to): continue
        at = f.parent/path if path else f
        if not at.exists(): dead.append(f'{to}: no such file')
        elif place and at.suffix in ('.md', '.ipynb') and place.lower() not in places(at): dead.append(f'{to}: no such heading')
    assert not dead, dead

@pytest.fixture(scope='module')
def site():
    from nano_dh.site import Site
    return Site(ROOT).collect()

def test_every_chapter_has_its_part_and_page(site):
    from nano_dh.site import parts
    nav = site.nav(['<chapters>'])
    listed = [at for part in nav for row in part.values() for c in row for at in c.values()]
    chapters = sorted((ROOT/'nbs').glob('*.ipynb'))
    missing = {f'nbs/{c.name}' for c in chapters} - set(parts((ROOT/'README.md').read_text()))
    assert not missing, f'not in the table of chapters of README.md: {missing}'
    assert len(listed) == len(chapters) and [p.origin for p in site.chapters] == [f'nbs/{c.name}' for c in chapters]
    assert listed == [p.at for p in site.chapters], 'the table of the README has another order than the numbers'
    ats = [p.at for p in site.pages]
    assert len(ats) == len(set(ats)), 'two pages at one place'

def test_pages_hide_what_is_hidden_and_link_to_pages(site):
    for p in site.pages:
        text = site.text(p.at)
        bare = re.sub(r'^ *(`{3,}).*?^ *\1`*[ ]*$', '', text, flags=re.M | re.S)
        assert not re.search(r'^#\s*\|', bare, re.M), p.at
        for code in re.findall(r'^`{3,} \{ \.python.*?^`{3,}$', text, re.M | re.S): assert not re.match(r'.*\n#\s*\| ?(export|hide|eval)', code), p.at
        dead = [to for to in re.findall(r'\]\(([^)\s]+\.ipynb)', re.sub(r'`[^`\n]*`', '', bare)) if '/' in to and ':' not in to]
        assert not dead, (p.at, dead)

def test_links_say_the_number_of_the_chapter_they_lead_to():
    for f in (ROOT/'nbs').glob('*.ipynb'):
        for said, number in re.findall(r'[Cc]hapter (\d+b?)\]\((\d+b?)_', f.read_text()): assert said == number, f'{f.name}: chapter {said} leads to {number}'

def test_names_of_the_book_are_links(site):
    linked = sum(len(re.findall(r'\[`[^`]+`\]\([^)]*api/', site.text(p.at))) for p in site.chapters)
    assert linked > 40
    known = {p.at for p in site.api}
    assert all(at.split('#')[0] in known for found in site.names.values() for at in found)

def test_every_public_name_has_an_entry(site):
    "By the package's own lists, which nbdev writes, not by the site's reading of the notebooks"
    import importlib
    for page in site.api:
        module = importlib.import_module(f'nano_dh.{page.module}')
        names = [n for n in module.__all__ if n[0] != '_']
        missing = [n for n in names if f'{{ #nano_dh.{page.module}.{n} }}' not in page.text]
        assert not missing, (page.module, missing)

def test_the_readmes_script_runs():
    "The first lines of *In a script*, as they stand there"
    script = re.search(r'^## In a script\n(.*?)\n\n +from nano_dh.checkpoint', (ROOT/'README.md').read_text(), re.S | re.M)[1]
    names = {}
    exec('\n'.join(l.removeprefix('    ') for l in script.strip('\n').splitlines()), names)
    assert names['logits'].shape[:2] == (2, 64) and names['loss'].item() > 0

def test_nbdev_docs_says_what_to_use():
    import tomllib
    scripts = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['scripts']
    for name in ('nbdev_docs', 'nbdev_preview'):
        module, function = scripts[name].split(':')
        r = fresh.run([sys.executable, '-c', f'from {module} import {function}; {function}()'], capture_output=True, text=True, cwd=ROOT)
        assert r.returncode == 0 and r.stdout.count('\n') == 1 and '`make docs`' in r.stdout, r.stdout + r.stderr

def test_the_table_of_public_sets_is_that_of_the_command():
    from nano_dh.pack import FEEDS, sources
    there = re.search(r'<!-- pack -->\n(.*?)<!-- end -->', (ROOT/'docs/data.md').read_text(), re.S)[1]
    assert there == sources(FEEDS), sources(FEEDS)

def test_the_map_from_nanochat_names_what_is_there():
    text = (ROOT/'docs/from-nanochat.md').read_text()
    flags = re.search(r'## Flags of pretraining(.*?)^## ', text, re.S | re.M)[1]
    cells = json.loads((ROOT/'runs/pretrain.ipynb').read_text())['cells']
    known = set(re.findall(r'^(\w+):', ''.join(next(c for c in cells if 'parameters' in c['metadata'].get('tags', []))['source']), re.M))
    named = set(re.findall(r'-p (\w+)', flags))
    assert len(named) > 20 and named <= known, named - known
    for module in set(re.findall(r'`nano_dh\.(\w+)`', text)): assert (ROOT/'nano_dh'/f'{module}.py').exists(), module

def test_addresses_of_the_repository_are_those_of_settings_ini():
    from configparser import ConfigParser
    c = ConfigParser(); c.read(ROOT/'settings.ini'); c = c['DEFAULT']
    for f in FILES:
        for user, repo, rest in re.findall(r'github(?:\.com)?/(nano[-_]dh)/([\w-]+)([^\s)`]*)', f.read_text()):
            assert (user, repo) == (c['user'], c['repo']), f
            branch = re.match(r'/blob/([^/]+)/(.+)', rest)
            if branch: assert branch[1] == c['branch'] and (ROOT/branch[2]).exists(), (f.name, rest)

# ---- the whole site

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    if not mkdocs: pytest.skip("needs the extra: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp('site')/'_docs'
    env = dict(os.environ, NO_MKDOCS_2_WARNING='1', PYTHONPATH=str(ROOT))
    r = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', out], cwd=ROOT, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    assert ', 0 broken' in r.stdout, r.stdout
    return out

@pytest.mark.slow
def test_start_notebook_runs_with_the_installed_package_alone(tmp_path):
    "As on a borrowed machine: pip installs the repository, and the notebook knows nothing of a checkout"
    r = subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', tmp_path/'lib', f'git+file://{ROOT}'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    env = dict(os.environ, PYTHONPATH=str(tmp_path/'lib'), NANO_DH_BASE_DIR=str(tmp_path/'base'))
    for k in ('NANO_DH_DATA',): env.pop(k, None)
    r = subprocess.run([sys.executable, '-m', 'papermill', ROOT/'docs/start.ipynb', tmp_path/'out.ipynb', '-p', 'depth', '2', '-p', 'num_iterations', '3'],
                       cwd=tmp_path, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    said = (tmp_path/'out.ipynb').read_text()
    assert 'step     3/3' in said and '[The]' in said and list((tmp_path/'base'/'runs').iterdir())

@pytest.mark.slow
def test_site_builds_and_a_dead_link_is_found(built):
    from nano_dh.site import broken
    n, wrong = broken(built)
    assert n > 1000 and not wrong
    page = built/'index.html'; was = page.read_text()
    page.write_text(was.replace('</body>', "<a href='nbs/gone.html'>x</a><script src='https://cdn.example/x.js'></script></body>"))
    assert sorted(broken(built)[1]) == ['index.html: loads https://cdn.example/x.js from a network', 'index.html: nbs/gone.html leads nowhere']
    page.write_text(was)

@pytest.fixture(scope='module')
def browser():
    if not (CHROMIUM and sync_playwright): pytest.skip('needs chromium and the playwright package')
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--host-resolver-rules=MAP * ~NOTFOUND'])
        yield b
        b.close()

def opened(browser, at, size=(1280, 900), scheme='light'): # a page, and what it asked a network for or complained of
    page, asked = browser.new_context(viewport=dict(width=size[0], height=size[1]), color_scheme=scheme).new_page(), []
    page.on('request', lambda r: None if r.url.startswith(('file:', 'data:', 'blob:')) else asked.append(r.url))
    page.on('pageerror', lambda e: asked.append(str(e)))
    page.on('console', lambda m: asked.append(m.text) if m.type == 'error' else None)
    page.goto(f'file://{at}')
    return page, asked

@pytest.mark.slow
def test_search_lands_in_the_right_chapter_without_a_network(built, browser):
    page, asked = opened(browser, built/'index.html')
    page.focus('input.md-search__input'); page.wait_for_timeout(2000)
    page.keyboard.type('negative eigenvalues', delay=40)
    page.wait_for_selector('.md-search-result__item > a', timeout=20000)
    page.click('.md-search-result__item > a'); page.wait_for_load_state()
    assert re.search(r'/nbs/mechanisms\.html', page.url), page.url
    assert not asked

@pytest.mark.slow
@pytest.mark.parametrize('size', [(1280, 900), (390, 844)], ids=['desktop', 'phone'])
def test_pages_fit_light_and_dark_and_draw_formulas(built, browser, size):
    papers = {}
    for scheme in ('light', 'dark'):
        for at in ('index.html', 'nbs/delta_rule.html', 'measured.html', 'api/kernels.html', 'runs/pretrain.html'):
            page, asked = opened(browser, built/at, size, scheme)
            if at == 'nbs/delta_rule.html':
                page.wait_for_selector('mjx-container svg', timeout=20000)
                left = page.evaluate("[...document.querySelectorAll('.arithmatex')].filter(x => !x.querySelector('mjx-container')).length")
                assert left == 0, 'formulas that are not drawn'
            wide = page.evaluate('document.documentElement.scrollWidth - innerWidth')
            assert wide <= 0, f'{at} is {wide} pixels too wide'
            assert not asked, (at, asked)
            papers[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            page.context.close()
    assert papers['light'] != papers['dark']
