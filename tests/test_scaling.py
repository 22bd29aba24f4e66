"The queue of a study: killed in the middle of a run and started again, by two processes at once."
import json, os, re, subprocess, time
from dataclasses import asdict
import fresh, pytest
from tiny_run import PAPERMILL, PY, ROOT, TINY, environ, parameters, tiny_data

STEPS = 40

@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "A folder with a list of three runs of a second each; the last two are the same run under two names"
    from nano_dh.plan import PretrainConfig
    place = tmp_path_factory.mktemp('study'); base, folder = place/'base', place/'runs'; folder.mkdir()
    more = dict(data=tiny_data(place/'books'), nproc=0, model='d_model:64 head_dim:32 head_k_dim:32 head_v_dim:32', device_batch_size=8, num_iterations=STEPS, save_every=10, prompts='', eval_every=0, warmup_steps=4, keep=0)
    old = os.environ.get('NANO_DH_BASE_DIR'); os.environ['NANO_DH_BASE_DIR'] = str(base)
    runs = [PretrainConfig(**TINY | more | kw).resolved() for kw in (dict(run='first', depth=1, seed=1), dict(run='killed', seed=2), dict(run='twin', seed=2))]
    (folder/'runs.list').write_text(json.dumps([asdict(cfg) for cfg in runs]))
    yield base, folder
    if old is None: os.environ.pop('NANO_DH_BASE_DIR')
    else: os.environ['NANO_DH_BASE_DIR'] = old

def queue(base, folder): # a process that works on the list, as there is one for each card
    return fresh.Popen([PY, '-m', 'nano_dh.scaling', str(folder), '1e6'], env=environ(base, CUDA_VISIBLE_DEVICES=''), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

def names(text): return re.findall(r'^(\w+) \d+ s', text, re.M)     # of the runs that were done

def said(process):
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    return names(text)

def records(folder): return {f.stem: (f.read_bytes(), f.stat().st_mtime_ns, f.stat().st_ino) for f in folder.glob('*.json')}
def losses(base, run):
    from nano_dh.train import read_metrics
    return [(r['step'], r['loss']) for r in read_metrics(base/'runs'/run) if 'loss' in r]

def test_a_killed_queue_goes_on_and_repeats_nothing(study):
    base, folder = study
    one, end = queue(base, folder), time.time() + 100
    while len(losses(base, 'killed')) < 24 and time.time() < end and one.poll() is None: time.sleep(.01)
    one.kill(); one.wait()                                             # SIGKILL: nobody cleans up
    assert 24 <= len(losses(base, 'killed')) < STEPS, 'not killed in the middle of the run'
    before, first = records(folder), losses(base, 'first')
    log = (base/'runs'/'first'/'metrics.jsonl').stat().st_mtime_ns
    assert [*before] == ['first'] and not (base/'runs'/'twin').exists()

    done = [said(p) for p in [queue(base, folder), queue(base, folder)]]   # two at once on one list
    assert sorted(sum(done, [])) == ['killed', 'twin'], f'each of them once, the finished one not again: {done}'
    after = records(folder)
    assert {**after, **before} == after and {*after} == {'first', 'killed', 'twin'}      # its bytes and its time
    assert (base/'runs'/'first'/'metrics.jsonl').stat().st_mtime_ns == log and losses(base, 'first') == first

    # what was killed went on from its checkpoint, and is what it would have been
    assert losses(base, 'killed') == losses(base, 'twin') and [s for s, _ in losses(base, 'killed')] == list(range(1, STEPS + 1))
    rows = {r['run']: r for f in after.values() for r in json.loads(f[0])}
    assert rows['killed']['val_bpb'] == rows['twin']['val_bpb'] and rows['killed']['loss'] == rows['twin']['loss']
    for r in rows.values(): assert r['tokens'] == r['steps']*r['batch'] == STEPS*256 and r['passes'] == r['tokens']/1e6

def test_what_left_no_record_is_not_trained_again(study, capsys):
    "Killed between the last step and the record: it is made from what the run wrote; and then nothing is left to do"
    from nano_dh.scaling import main
    base, folder = study
    before, log = records(folder), base/'runs'/'first'/'metrics.jsonl'; at = log.stat().st_mtime_ns
    (folder/'first.json').unlink(); main([folder, '1e6'])
    assert names(capsys.readouterr().out) == ['first'] and log.stat().st_mtime_ns == at
    was, now = (json.loads(f) for f in (before['first'][0], (folder/'first.json').read_text()))
    assert [{**r, 'time': 0} for r in now] == [{**r, 'time': 0} for r in was]
    after = records(folder); main([folder, '1e6'])
    assert not capsys.readouterr().out and records(folder) == after and {**after, 'first': 0} == {**before, 'first': 0}

STUDIES = dict(memory=dict(depths=1, seq_lens='32 64', batches='2 4', vocab_size=384), miniseries=dict(tokens=8192, flops=1e15, draws=20),
               scaling_laws=dict(budgets='2e10 4e10', sizes='1 2', fewest=4, passes=100, draws=20))

@pytest.mark.slow # three notebooks; each chapter trains its own
@pytest.mark.parametrize('name', STUDIES)
def test_the_notebook_of_a_study_and_its_record(name, tmp_path):
    "What it leaves is a record that the README can be drawn from"
    import io
    from matplotlib.figure import Figure
    from nano_dh.figures import BLOCKS, HEAD, PICTURES
    common = {} if name == 'memory' else dict(data=tiny_data(tmp_path/'books'), vocab_size=384, max_seq_len=32, eval_tokens=1024)
    def run(base, **kw):
        r = subprocess.run([PAPERMILL, '--no-progress-bar', ROOT/'runs'/f'{name}.ipynb', tmp_path/'o.ipynb', *parameters(**common | STUDIES[name] | kw, out=tmp_path/'out', device='cpu')],
                           env=environ(tmp_path/base), cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert r.returncode == 0, r.stderr[-2000:]
    run('base')
    kind = name.removesuffix('_laws'); [file] = (tmp_path/'out').rglob(f'{kind}.json'); rec = json.loads(file.read_text())
    assert rec['kind'] == kind and all(rec.get(k) for k in HEAD) and not any('error' in row for row in rec['rows'])
    assert BLOCKS[kind][0](rec).startswith('| ')
    fig = Figure(layout='constrained'); PICTURES[f'{kind}.png'][0](fig, rec); fig.savefig(io.BytesIO(), format='png')
    file.write_text(json.dumps(rec | dict(commit='a'*40)))                  # as if the tree had no changes
    run('empty', redraw=file, data='')                                       # drawn anew, nothing trained
    assert not (tmp_path/'empty'/'runs').exists() and [file] == [*file.parent.glob(f'{kind}.json'), *file.parent.glob(f'{kind}-1.json')]
