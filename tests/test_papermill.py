"The run notebook as papermill and Jupyter run it."
import json, os, re, signal, subprocess, time
from pathlib import Path
import fresh, nbformat, pytest, tiny_run
from tiny_run import PAPERMILL, PY, ROOT, TINY, environ, parameters, tiny_data

NB = ROOT/'runs'/'pretrain.ipynb'
SMALL = TINY | dict(num_iterations=6, warmup_steps=2, save_every=2, eval_every=3)

@pytest.fixture(scope='module')
def data(tmp_path_factory): return tiny_data(tmp_path_factory.mktemp('data')/'books')
@pytest.fixture(scope='module')
def base(tmp_path_factory): return tmp_path_factory.mktemp('base')

def papermill(base, nb, *args): return tiny_run.papermill(environ(base), nb, *args)
def outputs(nb): return {c['id']: c.get('outputs', []) for c in nb.cells if c.cell_type == 'code'}
def text(outs): return ''.join(o.get('text') or str(o.get('data', {}).get('text/markdown', '')) for o in outs)

def test_parameters_cell_is_the_dataclass():
    from dataclasses import fields
    from nano_dh.train import PretrainConfig
    cell = next(c for c in nbformat.read(NB, 4).cells if 'parameters' in c.metadata.get('tags', []))
    rows = [re.match(r'(\w+): (\w+) = (.*?)  # (.+)', l).groups() for l in cell.source.splitlines()]
    assert [(n, t, eval(d)) for n, t, d, _ in rows] == [(f.name, f.type.__name__, f.default) for f in fields(PretrainConfig)]

def test_help_lists_every_parameter(tmp_path):
    from dataclasses import fields
    from nano_dh.train import PretrainConfig
    out = papermill(tmp_path, '--help-notebook', NB).output
    for f in fields(PretrainConfig): assert re.search(rf'^  {f.name}: {f.type.__name__} \(default', out, re.M), f.name

@pytest.fixture(scope='module')
def ran(base, data, tmp_path_factory): # a command and how it ended; the notebook that it wrote
    file = tmp_path_factory.mktemp('ran')/'o.ipynb'
    cmd, kw = dh_run(base, 'pretrain', '-o', file, *parameters(**SMALL, data=data, run='007'), capture_output=True)
    return cmd, kw, fresh.run(cmd, **kw), file

def test_a_tiny_run_and_its_report(base, ran):
    *_, r, file = ran; assert r.returncode == 0, r.stderr
    out = outputs(nbformat.read(file, 4))
    assert 'parameters (' in text(out['plan']) and 'documents start at [0' in text(out['batch'])
    assert text(out['run']).count('val bpb') == 2 and 'step     6/6' in text(out['run'])
    assert sum('image/png' in o.get('data', {}) for o in out['run']) == 1          # the live curve, updated in place
    assert any('image/png' in o.get('data', {}) for o in out['curves'])
    assert '[The ]' in text(out['samples']) and '| val bpb |' in text(out['table']) and 'load_model(' in text(out['next'])
    assert (base/'runs'/'007'/'000006'/'manifest.json').exists()     # text, though it looks like a number

@pytest.mark.slow # two ranks from a notebook: test_ctrl_c below
def test_redirected_output_is_a_notebook_even_with_two_ranks(base, data, tmp_path):
    with (tmp_path/'out.ipynb').open('w') as f:
        r = subprocess.run([PAPERMILL, NB, *parameters(**SMALL, data=data, nproc=2)], env=environ(base), stdout=f, stderr=subprocess.PIPE,
                           text=True, stdin=subprocess.DEVNULL)
    assert r.returncode == 0, r.stderr
    nb = nbformat.read(tmp_path/'out.ipynb', 4); nbformat.validate(nb)
    assert '2 ranks x' in text(outputs(nb)['plan']) and 'val bpb' in text(outputs(nb)['run'])

@pytest.mark.slow # the same words: test_dh_run_refuses_in_one_line, tests/test_train.py
def test_misspelt_and_refused(base, tmp_path):
    "Both at once: neither depends on the other"
    t = time.time()
    ps = [subprocess.Popen([PAPERMILL, NB, tmp_path/f'{k}.ipynb', '-p', k, v], env=environ(base), stderr=subprocess.PIPE, text=True)
          for k, v in (('depht', '4'), ('depth', '20'))]
    (_, a), (_, b) = [p.communicate() for p in ps]
    assert [p.returncode for p in ps] == [1, 1] and time.time() - t < 40
    assert "unknown parameter 'depht', did you mean 'depth'?" in a
    assert re.search(r'PlanError: Depth 20 on \d+ CPU cores would take .*num_iterations.*\n', b)

def test_compare_takes_a_result_only_for_its_own_parameters(base, data, tmp_path):
    "Named alike, of another depth: an error, not the old result"
    from nano_dh.train import read_metrics
    nb, kw = ROOT/'runs'/'compare.ipynb', dict(variants='GL', seeds=1, depths=2, tokens=1024, total_batch_size=256, max_seq_len=32, vocab_size=384,
                                               eval_tokens=1024, data=data, out=tmp_path/'files')
    call = lambda **new: papermill(base, nb, tmp_path/'c.ipynb', *parameters(**kw | new))
    r = call(); assert r.exit_code == 0, r.output
    assert read_metrics(base/'runs'/'compare-GL-d2-s0')[-1].get('done') and '| GL | ' in text(outputs(nbformat.read(tmp_path/'c.ipynb', 4))['table'])
    with pytest.raises(Exception, match='run compare-GL-d2-s0 exists with num_iterations 4, not 8; take another name, or remove'): call(tokens=2048)

def wait_for(f, cond, seconds=60):
    end = time.time() + seconds
    while time.time() < end and not cond(f): time.sleep(.05)
    assert cond(f), f.read_text() if f.exists() else f'{f} is missing'

@pytest.mark.slow
def test_killed_papermill_continues(base, data, tmp_path):
    kw = SMALL | dict(num_iterations=300, save_every=20, eval_every=0)
    p = subprocess.Popen([PAPERMILL, NB, tmp_path/'a.ipynb', *parameters(**kw, data=data, run='cut')], env=environ(base), stderr=subprocess.DEVNULL)
    f = base/'runs'/'cut'/'metrics.jsonl'
    wait_for(f, lambda f: f.exists() and f.read_text().count('"loss"') >= 50)
    p.kill(); p.wait(); time.sleep(3)                                # the kernel notices, its rank goes with it
    n = f.read_text().count('"loss"'); time.sleep(1)
    assert n == f.read_text().count('"loss"') < 300
    r = papermill(base, NB, tmp_path/'b.ipynb', '-p', 'resume', 'True')   # the newest run
    assert r.exit_code == 0, r.output
    assert [json.loads(l)['step'] for l in f.read_text().splitlines() if '"loss"' in l] == list(range(1, 301))
    assert 'continues from' in text(outputs(nbformat.read(tmp_path/'b.ipynb', 4))['run'])

@pytest.mark.slow
def test_interrupted_in_jupyter(base, data):
    "Cell by cell in a kernel; SIGINT while training; the cells after it still work"
    from jupyter_client import KernelManager
    km = KernelManager(kernel_name='python3'); km.start_kernel(cwd='/', env=environ(base))
    kc = km.client(); kc.start_channels(); kc.wait_for_ready(60)
    said = {}
    def run(cid, src, interrupt=None):
        said[cid] = ''; sent = False; kc.execute(src); end = time.time() + 90
        while time.time() < end:
            try: m = kc.get_iopub_msg(timeout=.2)
            except Exception: m = None
            if interrupt and not sent and interrupt(): km.interrupt_kernel(); sent = True
            if m is None: continue
            c = m['content']; said[cid] += c.get('text', '') + str(c.get('data', {}).get('text/markdown', '')) + ''.join(c.get('traceback', []))
            if m['msg_type'] == 'status' and c['execution_state'] == 'idle' and m['parent_header']['msg_type'] == 'execute_request': return
        raise TimeoutError(cid)
    extra = '\n'.join(f'{k} = {v!r}' for k, v in (SMALL | dict(data=data, run='stopped', num_iterations=2000, save_every=10, eval_every=0)).items())
    f = base/'runs'/'stopped'/'metrics.jsonl'
    try:
        for c in nbformat.read(NB, 4).cells:
            if c.cell_type == 'code':
                run(c.id, c.source, (lambda: f.exists() and f.read_text().count('"loss"') > 25) if c.id == 'run' else None)
                if 'parameters' in c.metadata.get('tags', []): run('injected', extra)
    finally: kc.stop_channels(); km.shutdown_kernel(now=True)
    assert 'interrupted after step' in said['run'] and 'runs/stopped/0000' in said['run']
    assert '| train loss |' in said['table'] and 'to finish it' in said['next'] and 'no samples yet' in said['samples']
    assert not any('Traceback' in s for s in said.values()), said

# ---- dh_run

def dh_run(base, *args, **kw): return [PY, '-c', 'from nano_dh.terminal import dh_run; dh_run()', *map(str, args)], dict(env=environ(base), text=True, stdin=subprocess.DEVNULL, **kw)

def test_dh_run_shows_the_log_and_names_its_output(ran):
    cmd, kw, r, file = ran
    assert r.returncode == 0, r.stderr
    assert 'step     6/6' in r.stdout and Path(re.search('done; the executed notebook: (.*)', r.stdout)[1]).resolve() == file.resolve()
    assert re.search(r'^nano_dh [\d.]+, commit \w+.*, Python 3.*, torch 2.*, \d+ cores? of ', r.stdout, re.M)
    assert 'Executing' not in r.stdout and 'Executing' not in r.stderr and '\n\n\n' not in r.stdout
    again = fresh.run(cmd, **kw)
    assert again.returncode == 1 and again.stderr.startswith('dh_run: ') and 'exists; give another name' in again.stderr

@pytest.mark.parametrize('args, said', [(['pretrian'], "did you mean 'pretrain'?"), (['pretrain', '-p', 'depht', '4'], "did you mean 'depth'?"),
                                        (['pretrain', '-p', 'depth', 'six'], 'int expected')])
def test_dh_run_refuses_in_one_line(base, args, said):
    cmd, kw = dh_run(base, *args, capture_output=True)
    r = fresh.run(cmd, **kw)
    assert r.returncode == 1 and said in r.stderr and r.stderr.count('\n') == 1, r.stderr

def test_one_rate_and_no_texts(base, tmp_path):
    "papermill makes a number of `-p lrs 3e-3` and of `-p lengths 160`; without `texts` there are the sample's books"
    import torch
    from nano_dh.checkpoint import save_checkpoint
    from nano_dh.hybrid_model import HybridConfig, HybridModel
    from nano_dh.tokenizer import Tokenizer
    tok = Tokenizer.train(['It was a long day, and nothing happened.'], 280)
    size = dict(vocab_size=tok.vocab_size, sequence_len=80, d_model=64, head_dim=32, head_k_dim=32, head_v_dim=32)
    save_checkpoint(tmp_path/'run', 5, HybridModel(HybridConfig.from_depth(2, 'GL', **size)), tokenizer=tok)
    given = dict(mechanisms=dict(probes='parity', patterns='L', lrs='3e-3', seeds=1, steps=2, depth=1, d_model=32, device='cpu'),
                 long_context=dict(models=tmp_path/'run', factor=2, per_doc=1, kinds='number', learn_steps=0, lengths='160', depths=1, needles=1, device='cpu'))
    for name, kw in given.items():
        r = papermill(base, ROOT/'runs'/f'{name}.ipynb', tmp_path/f'{name}.ipynb', *parameters(**kw))
        assert r.exit_code == 0, r.output[-1500:]
    curve = json.loads(next((base/'records').glob('long_context*')).read_text())['figures']['curve']
    assert curve['rows'] == 2

@pytest.mark.parametrize('nproc', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_saves_and_says_how_to_go_on(base, data, tmp_path, nproc):
    "The last saved step is the last trained one, though save_every is far away; the command that is named goes on from there"
    name, kw = f'ctrl{nproc}', SMALL | dict(num_iterations=4000, save_every=0, eval_every=0, nproc=nproc)
    cmd, env = dh_run(base, 'pretrain', '-o', tmp_path/'o.ipynb', *parameters(**kw, data=data, run=name), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p = subprocess.Popen(cmd, **env, start_new_session=True); f = base/'runs'/name/'metrics.jsonl'
    wait_for(f, lambda f: f.exists() and f.read_text().count('"loss"') > 25, 120)
    os.killpg(p.pid, signal.SIGINT)                                  # as a terminal does
    out, err = p.communicate(timeout=90)
    assert p.returncode == 130, out + err
    done = [json.loads(l) for l in f.read_text().splitlines()]
    last = max(r['step'] for r in done if 'loss' in r)
    assert (base/'runs'/name/f'{last:06d}'/'manifest.json').exists() and not any(r.get('done') for r in done)
    assert 'saving after this step' in out and f'interrupted after step {last}' in out and f'dh_run pretrain -p run {name} -p resume True' in out
    assert 'to finish it' in text(outputs(nbformat.read(tmp_path/'o.ipynb', 4))['next'])

@pytest.mark.parametrize('nb', sorted((ROOT/'runs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_executed_notebooks_begin_with_commit_version_and_machine(nb):
    "The first thing that runs after the imports, before any parameter can fail"
    cells = [c for c in nbformat.read(nb, 4).cells if c.cell_type == 'code']
    at = [c.id for c in cells].index('made-by')
    assert cells[at].source == 'from nano_dh.report import made_by\nprint(made_by())' and 'parameters' not in [t for c in cells[:at] for t in c.metadata.get('tags', [])]
