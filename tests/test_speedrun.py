"The whole pipeline, killed and resumed, and the page that reports it."
import json, os, re, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import nbformat, pytest
from tiny_run import PAPERMILL, ROOT, environ, parameters, tiny_data
import nano_dh
from nano_dh import report, speedrun
from nano_dh.checkpoint import runs_dir, save_checkpoint
from nano_dh.core import atomic_write
from nano_dh.hybrid_model import HybridConfig, HybridModel
from nano_dh.report import Card, compare_cards, git_state, main, report_card, status_file
from nano_dh.speedrun import (ORDER, PRESETS, Speedrun, SpeedrunConfig, StageError, check_parameters, find_notebooks, flags,
                              parameters_of)
from nano_dh.tokenizer import Tokenizer

NB = ROOT/'runs'/'speedrun.ipynb'

@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path/'base')); monkeypatch.delenv('NANO_DH_DATA', raising=False)
    return tmp_path/'base'

def status(name): return json.loads(status_file(name).read_text())
def ended(name): return {k: [a['ended'] for a in r['attempts']] for k, r in status(name)['stages'].items()}
def steps(run): return [r['step'] for r in map(json.loads, (runs_dir()/run/'metrics.jsonl').read_text().splitlines()) if 'loss' in r]

# ---- the notebook and the presets

def test_parameters_cell_is_the_dataclass():
    from dataclasses import fields
    cell = next(c for c in nbformat.read(NB, 4).cells if 'parameters' in c.metadata.get('tags', []))
    rows = [re.match(r'(\w+): (\w+) = (.*?)  # (.+)', l).groups() for l in cell.source.splitlines()]
    assert [(n, t, eval(d)) for n, t, d, _ in rows] == [(f.name, f.type.__name__, f.default) for f in fields(SpeedrunConfig)]

@pytest.mark.parametrize('preset', PRESETS)
def test_presets_name_parameters_that_exist(preset):
    stages = SpeedrunConfig(preset=preset, with_rl=True, data='sample', nproc=1, device='cpu', chat_data='x').stages()
    assert [s.name for s in stages] == 'tokenizer pretrain base_eval midtrain sft chat_eval rl rl_eval'.split()
    for s in stages: check_parameters(s, parameters_of(ROOT/'runs'/f'{s.notebook}.ipynb'))

def test_preset_by_machine(base, monkeypatch):
    for gpus, want in ((0, 'cpu'), (1, 'd12'), (8, 'd20')):
        monkeypatch.setattr(speedrun, 'n_gpus', lambda: gpus)
        assert SpeedrunConfig().resolved().preset == want
    assert SpeedrunConfig(device='cpu').resolved().preset == 'cpu'
    data = [s.params.get('data', '') for s in SpeedrunConfig(preset='d20').resolved().stages()]
    assert re.fullmatch(r'climbmix@\d+', data[0]) and data[0] == data[1] == data[2] and data[3] == ''

def test_data_is_written_down(base, monkeypatch):
    monkeypatch.setenv('NANO_DH_DATA', 'some/folder')
    assert [s.params['data'] for s in SpeedrunConfig(preset='d20').resolved().stages()[:3]] == ['some/folder']*3

def test_notebooks_are_found_or_asked_for(tmp_path, monkeypatch):
    assert find_notebooks() == ROOT/'runs' and find_notebooks(str(ROOT/'runs')) == ROOT/'runs'
    monkeypatch.setattr(nano_dh, '__file__', str(tmp_path/'site'/'nano_dh'/'__init__.py'))      # installed without a checkout
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='clone it, or give their folder as notebooks') as e: find_notebooks()
    assert '\n' not in str(e.value)
    monkeypatch.chdir(ROOT); assert find_notebooks() == ROOT/'runs'

def test_wrong_words(base):
    for kw, e, says in ((dict(start='sfft'), NameError, 'stages are tokenizer'), (dict(more='sft.epoch:2'), NameError, "did you mean 'epochs'"),
                        (dict(more='pretrain.depth:six'), TypeError, 'pretrain.depth'), (dict(more='epochs=2'), ValueError, 'stage.parameter:value'),
                        (dict(resume=True), FileNotFoundError, 'leave resume out'), (dict(preset='d21'), NameError, 'smoke, cpu, d12, d20, d32'),
                        (dict(stop='rl'), NameError, 'stages are'), (dict(run='../x'), ValueError, 'a name begins with'), (dict(run='a/b'), ValueError, "run 'a/b'"),
                        (dict(start='sft', stop='pretrain'), ValueError, 'start sft comes after stop pretrain'), (dict(device='tpu'), NameError, 'cuda, mps, cpu'),
                        (dict(chat_data='/no/where'), FileNotFoundError, 'no such folder')):
        with pytest.raises(e, match=re.escape(says)) as got: Speedrun(SpeedrunConfig(**(dict(preset='smoke') | kw)), say=str)
        assert '\n' not in str(got.value)
    assert not (base/'runs').exists() or not any((base/'runs').iterdir())

def test_gpu_presets_ask_for_gpus(base, monkeypatch):
    monkeypatch.setattr(speedrun, 'n_gpus', lambda: 0)
    with pytest.raises(ValueError, match='preset d20 is made for GPUs and none is seen here; say device cpu'): Speedrun(SpeedrunConfig(preset='d20'), say=str)
    assert Speedrun(SpeedrunConfig(preset='d20', device='cpu'), say=str).stages[1].params['depth'] == 20

def test_paths_are_whole(base, tmp_path, monkeypatch):
    (tmp_path/'my data').mkdir(); monkeypatch.chdir(tmp_path)
    s = Speedrun(SpeedrunConfig(run='p', preset='smoke', data='./my data', chat_data='./my data', out='my out'), say=str)
    assert {x.params['data'] for x in s.stages} == {str(tmp_path/'my data')} and s.out == tmp_path/'my out'
    assert SpeedrunConfig(preset='smoke', data='./nothing').resolved().data == './nothing' and SpeedrunConfig(data='sample').resolved().data == 'sample'

def test_a_place_that_cannot_be_written(base, tmp_path):
    (tmp_path/'file').touch(); s = Speedrun(SpeedrunConfig(run='p', preset='smoke', out=str(tmp_path/'file'/'out')), say=str)
    with pytest.raises(OSError, match='file/out'): s.run()
    assert not status_file('p').exists()                                # the name is still free

@pytest.mark.parametrize('text', ('', '[]', '{}', '3', '{"stages": 3, "earlier": []}', '{"stages": {"sft": {"status": "done"}}, "earlier": []}'))
def test_a_damaged_status(base, capsys, text):
    atomic_write(status_file('hurt'), text)
    for kw in (dict(run='hurt'), dict(run='hurt', resume=True), dict(resume=True)):
        with pytest.raises(ValueError, match='status.json is damaged; move it away'): Speedrun(SpeedrunConfig(preset='smoke', **kw), say=str)
    assert main(['hurt']) == 1 and re.fullmatch('.*is damaged; move it away.*\n', capsys.readouterr().err) and status_file('hurt').read_text() == text

# ---- killed and resumed

def kill_when(cond, name, stage, sig=signal.SIGKILL):
    "In a thread: end the process of a stage as soon as cond() holds"
    def go():
        end = time.time() + 120
        while time.time() < end:
            try:
                if cond(): os.kill(status(name)['stages'][stage]['attempts'][-1]['pid'], sig); return
            except (OSError, KeyError, ValueError, IndexError): pass
            time.sleep(.02)
    t = threading.Thread(target=go, daemon=True); t.start(); return t

@pytest.mark.slow
def test_a_killed_stage_goes_on(base, tmp_path, monkeypatch):
    said, data = [], tiny_data(tmp_path/'books')
    more = ('tokenizer.vocab_size:384 pretrain.vocab_size:384 pretrain.num_iterations:150 pretrain.save_every:10 pretrain.eval_every:0 '
            'pretrain.max_seq_len:32 pretrain.total_batch_size:128')
    cfg = SpeedrunConfig(run='cut', preset='smoke', data=data, more=more, nproc=0, device='cpu', stop='pretrain', out=str(tmp_path/'out'))
    s = Speedrun(cfg, said.append)
    kill_when(lambda: len(steps('cut-pretrain')) >= 15, 'cut', 'pretrain')
    with pytest.raises(StageError) as e: s.run()
    msg = str(e.value)
    assert re.match(r'pretrain failed after \d+ s: killed by SIGKILL; see ', msg) and '\n' not in msg
    assert '2-pretrain' in msg and re.search(r'to go on: papermill \S+speedrun.ipynb \S+ -p run cut -p resume True -p out \S+out$', msg)
    assert ended('cut')['pretrain'] == ['killed'] and ended('cut')['base_eval'] == []
    page = (status_file('cut').parent/'report.md').read_text()                      # a page of what there is
    assert 'mid-training: pending' in page and '| pretrain | failed |' in page
    before = (tmp_path/'out'/'1-tokenizer.ipynb').stat().st_mtime_ns
    said.clear(); s = Speedrun(SpeedrunConfig(resume=True, stop='pretrain', out=str(tmp_path/'out')), said.append); card = s.run()
    assert ended('cut') | {} == dict(tokenizer=['done'], pretrain=['killed', 'done'], base_eval=[], midtrain=[], sft=[], chat_eval=[])
    assert (tmp_path/'out'/'1-tokenizer.ipynb').stat().st_mtime_ns == before and not (tmp_path/'out'/'1-tokenizer-2.ipynb').exists()
    assert steps('cut-pretrain') == list(range(1, 151))
    assert re.search(r'continues from .*cut-pretrain/0000\d0', (tmp_path/'out'/'2-pretrain-2.ipynb').read_text())
    assert said[0].startswith('tokenizer  done before') and 'in 2 attempts' in said[1] and len(said) == 3
    assert card.last('base')['step'] == 150 and card['tokenizer']['vocab_size'] == 384
    assert [t['tries'] for t in card['time']] == [1, 2, 0, 0, 0, 0] and 'mid-training: pending' in card['missing']
    assert 'resume' not in status('cut')['stages']['pretrain']['command'] and repr(card).startswith('# cut')
    assert re.search(r'\| pretrain \| done \| \d+ s \| 2 \|', str(card))
    with pytest.raises(ValueError, match='resume True continues it'): Speedrun(SpeedrunConfig(run='cut'), str)
    with pytest.raises(FileNotFoundError, match="no run 'cute' to resume; the newest are cut"): Speedrun(SpeedrunConfig(run='cute', resume=True), str)
    said.clear(); t = Speedrun(SpeedrunConfig(run='cut', resume=True, more='pretrain.depth:1'), said.append)   # only looked at
    assert said == ['pretrain   has other parameters: depth 2 -> 1; it runs again']
    typed = t.command(t.stages[0]); monkeypatch.chdir(tmp_path)
    assert typed.startswith('papermill ') and t.command(t.stages[0]).split()[2] == 'out/1-tokenizer.ipynb'
    text = status_file('cut').read_text(); status_file('cut').write_text(text[:100])
    with pytest.raises(ValueError, match='is damaged; move it away'): Speedrun(SpeedrunConfig(run='cut', resume=True, preset='smoke'), str)
    assert t.status['stages']['tokenizer']['status'] == 'done' and t.filled(t.stages[1])['run'] == 'cut-pretrain-2'

def alive(pattern):
    me = str(os.getpid()); out = []
    for p in Path('/proc').glob('[0-9]*/cmdline') if sys.platform == 'linux' else ():
        try: text = p.read_bytes().replace(b'\0', b' ').decode(errors='replace')
        except OSError: continue
        if pattern in text and p.parent.name != me: out.append(text)
    return out

@pytest.mark.slow
def test_the_whole_pipeline_killed_resumed_changed(base, tmp_path):
    "The notebook itself is killed in mid-training, with all that it started; then a parameter changes"
    out = tmp_path/'out'; said = []
    args = parameters(preset='smoke', run='all', with_rl=True, more='midtrain.num_iterations:200 midtrain.save_every:20 midtrain.eval_every:0', out=out)
    p = subprocess.Popen([PAPERMILL, NB, tmp_path/'s.ipynb', *args], env=environ(base), stderr=subprocess.DEVNULL, cwd=tmp_path)
    end = time.time() + 200
    while time.time() < end and not ((runs_dir()/'all-midtrain'/'metrics.jsonl').exists() and len(steps('all-midtrain')) > 30): time.sleep(.1)
    p.kill(); p.wait(); time.sleep(4)
    n = len(steps('all-midtrain')); time.sleep(1)
    assert n == len(steps('all-midtrain')) < 200 and not alive(str(out))          # nothing goes on unseen
    assert status('all')['stages']['midtrain']['status'] == 'running'
    r = subprocess.run([PAPERMILL, NB, tmp_path/'s2.ipynb', *parameters(resume=True, out=out)], env=environ(base), capture_output=True, text=True,
                       cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-3000:]
    assert {k: v for k, v in ended('all').items() if v != ['done']} == dict(midtrain=['killed', 'done'])
    assert steps('all-midtrain') == list(range(1, 201))
    text = (tmp_path/'s2.ipynb').read_text()
    assert 'pretrain   done before' in text and 'dh_chat' in text and '| identity |' in text and 'papermill runs' in text.replace(str(ROOT) + '/', '')
    card = Card(json.loads((status_file('all').parent/'report.json').read_text()))
    assert [s['stage'] for s in card['stages']] == ['base', 'mid', 'sft', 'rl'] and 'ChatCORE' in card['scores']['rl']
    r = subprocess.run([PAPERMILL, NB, tmp_path/'s3.ipynb', *parameters(resume=True, out=out, more='sft.num_iterations:4')], env=environ(base),
                       capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-3000:]
    runs = {k: v['product'] for k, v in status('all')['stages'].items()}
    assert runs == dict(tokenizer='all-tokenizer', pretrain='all-pretrain', base_eval='', midtrain='all-midtrain', sft='all-sft-2', chat_eval='',
                        rl='all-rl-2', rl_eval='')
    assert 'has other parameters: num_iterations 8 -> 4' in (tmp_path/'s3.ipynb').read_text()
    assert [e['stage'] for e in status('all')['earlier']] == ['sft', 'chat_eval', 'rl', 'rl_eval'] and (runs_dir()/'all-sft').is_dir()

@pytest.mark.slow
def test_an_error_is_one_line(base, tmp_path):
    s = Speedrun(SpeedrunConfig(run='bad', preset='smoke', data=str(tmp_path/'nowhere'), device='cpu', out=str(tmp_path/'out')), str)
    with pytest.raises(StageError) as e: s.run()
    assert re.match(r"tokenizer failed after \d+ s: FileNotFoundError: no data '.*nowhere'", str(e.value)) and '\n' not in str(e.value)
    assert status('bad')['stages']['tokenizer']['status'] == 'failed'
    page = (status_file('bad').parent/'report.md').read_text()
    assert 'No stage has left a checkpoint' in page and 'pretraining: pending' in page

# ---- the page

@pytest.fixture
def made(base):
    "Two stages as training leaves them, written by hand"
    tok = Tokenizer({bytes([i]): i for i in range(256)})
    m = HybridModel(HybridConfig.from_depth(2, pattern='GL', vocab_size=tok.vocab_size, sequence_len=64, d_model=64, head_dim=32, head_k_dim=32,
                                            head_v_dim=32), 0)
    def run(name, stage, was, rows, step):
        t = dict(stage=stage, base=str(was), total_batch_size=100, num_iterations=10, depth=2, pattern='GL', device='cpu')
        at = save_checkpoint(runs_dir()/name, step, m, tokenizer=tok, meta=dict(train=t, seconds=61.))
        atomic_write(runs_dir()/name/'metrics.jsonl', ''.join(json.dumps(r) + '\n' for r in rows)); return at
    b = run('b', 'base', '', [dict(step=1, loss=5.5), dict(step=5, val_bpb=3., val_stderr=.1), dict(step=10, loss=4.5),
                              dict(step=10, val_bpb=2., val_stderr=.2)], 10)
    s = run('s', 'sft', b, [dict(step=0, val_bpb=1., val_stderr=.3), dict(step=7, loss=float('nan')), dict(step=7, val_bpb=.5, val_stderr=.4),
                            dict(step=9, val_bpb=.1, val_stderr=.1)], 7)
    chat = dict(chat_core=.25, step=7, results=[dict(task='identity', accuracy=.5, stderr=.1, samples=[['<b>who|`', 'I\n<img>', True]])])
    atomic_write(runs_dir()/'s'/'chat_eval-000007.json', json.dumps(chat))
    for i, bpb in enumerate((9., 1.75)):
        atomic_write(base/'records'/f'bpb-{i}.json', json.dumps(dict(kind='bpb', model=dict(path=str(b)), figures=dict(bpb=bpb, stderr=.01))))
        os.utime(base/'records'/f'bpb-{i}.json', (i, i))
    return base

def test_the_page_says_what_was_left(made):
    c = report_card('s'); page = str(c)
    assert [s['run'] for s in c['stages']] == ['b', 's'] and report_card()['name'] == report_card(str(runs_dir()/'s'/'000007'))['name'] == 's'
    f = c.figures()
    assert f['base val bpb'] == (2., .2) and f['sft val bpb'] == (.5, .4) and f['sft identity'] == (.5, .1)    # up to the step of the checkpoint
    assert f['base bits per byte'] == (1.75, .01) and f['sft ChatCORE'] == (.25, None)                         # the newest record
    e = c['stages'][0]['figures']
    assert (e['loss']['before']['value'], e['loss']['after']['value']) == (5.5, 4.5) and e['val_bpb']['before']['step'] == 5
    for row in ('| base | b | 10 | 1K | train loss | 5.5000 (step 1) | 4.5000 |', '| ChatCORE | - | 0.2500 |', '| identity | - | 0.5000 ± 0.1000 |',
                "| identity | `<b>who\\|'` | `I <img>` | right |", '2 min 02 s of training steps alone. No GPU, no cost.',
                '- mid-training: no such run', '- s: stopped at step 7 of 10', '- CORE of b: not evaluated'): assert row in page, row
    assert '- chat evaluation' not in page and '- bits per byte' not in page
    json.dumps(c.data, allow_nan=False)

def test_a_damaged_or_missing_file_is_no_figure(made):
    (runs_dir()/'s'/'chat_eval-000007.json').write_text('{"chat_core":'); (made/'records'/'bpb-1.json').write_text('')
    for i, x in enumerate(('[]', '3', '{}', 'null')): (made/'records'/f'odd-{i}.json').write_text(x)
    shutil.rmtree(runs_dir()/'b'); c = report_card('s')
    assert [s['run'] for s in c['stages']] == ['s'] and '- pretraining: no such run' in str(c) and '- chat evaluation of s: not done' in str(c)
    assert c['scores'] == dict(sft={}) and 'No evaluation was found' in str(c)

def test_where_money_is_spent(made):
    f = runs_dir()/'s'/'000007'/'meta.json'; m = json.loads(f.read_text()); m['train']['device'] = 'cuda'; m['world_size'] = 8
    f.write_text(json.dumps(m))
    assert report_card('s', price=2.5)['cost'] == pytest.approx(61*8/3600*2.5) and '$0.34' in str(report_card('s', price=2.5))

def test_without_git(made, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert git_state() == dict(commit='', date='', changed=[], diff='') and '| code | no git |' in str(report_card('s'))

def test_from_a_terminal(made, capsys):
    assert main(['s']) == 0 and 'kept in' in capsys.readouterr().out and (runs_dir()/'s'/'report.md').exists()
    assert main(['s', str(runs_dir()/'s'/'report.json')]) == 0 and 'Told the same' in capsys.readouterr().out
    assert main(['b', 's']) == 0 and 'On one page only' in capsys.readouterr().out
    assert main(['none']) == 1 and capsys.readouterr().err.count('\n') == 1
    assert main(['a', 'b', 'c']) == 2
