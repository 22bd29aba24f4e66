"What comes in and goes out: nanochat's versions, transformers in a process without this package, lm-evaluation-harness, files of others."
import json, os, pickle, subprocess, sys
from functools import lru_cache
from pathlib import Path
import numpy as np, pytest, tiktoken, torch
import make_reference as ref, make_reference_versions as versions
from nano_dh.checkpoint import find_checkpoint, load_model, read_meta
from nano_dh.nanochat import nanochat_steps, read_nanochat
from nano_dh.tokenizer import SPECIALS, SPLIT, Tokenizer

OLD = json.loads(versions.FILE.read_text())['versions']

def tokenizer(folder): # as nanochat keeps it
    folder.mkdir(parents=True, exist_ok=True)
    enc = tiktoken.Encoding('rustbpe', pat_str=SPLIT, mergeable_ranks={bytes([i]): i for i in range(256)},
                            special_tokens={s: 256 + i for i, s in enumerate(SPECIALS)})
    (folder/'tokenizer.pkl').write_bytes(pickle.dumps(enc))
    torch.save(torch.tensor([1]*256 + [0]*9, dtype=torch.int32), folder/'token_bytes.pt')

def saved(root, config, weights, step=1000, kind='base'): # a folder as nanochat writes it
    p = root/f'{kind}_checkpoints'/'d3'; p.mkdir(parents=True)
    torch.save(weights, p/f'model_{step:06d}.pt'); tokenizer(root/'tokenizer')
    (p/f'meta_{step:06d}.json').write_text(json.dumps(dict(step=step, val_bpb=1.25, model_config=config)))
    return p

@pytest.mark.parametrize('model', versions.MODELS)
@pytest.mark.parametrize('version', OLD)
def test_versions(tmp_path, version, model):
    "Logits of each version of nanochat, from its own code"
    got = OLD[version]['models'][model]
    w = {n: torch.empty(s) for n, s in got['shapes'].items()}; versions.fill(w)
    m, tok, meta = read_nanochat(saved(tmp_path, got['config'], w), **(dict(softcap=20.) if version == 'softcap' else {}))
    with torch.no_grad(): z = m(versions.tokens())[:, ::16, ::24]
    assert (z - torch.tensor(got['logits'])).abs().max() < 5e-6 and tok.vocab_size == m.cfg.vocab_size
    assert bool(meta['notes']) == (version not in ('smear', 'july'))

@pytest.mark.parametrize('case', ref.CASES)
def test_depth_8(tmp_path, case):
    "The loss that nanochat's own code gave at depth 8"
    got, kw = json.loads(ref.FILE.read_text())['cases'][case], ref.CASES[case]
    width = kw.get('d_model', 64*ref.DEPTH); heads = width//kw.get('head_dim', 128)
    config = dict(sequence_len=ref.TOKENS, vocab_size=ref.VOCAB, n_layer=ref.DEPTH, n_head=heads, n_kv_head=heads, n_embd=width,
                  window_pattern=kw['pattern'])
    from nano_dh.hybrid_model import HybridConfig, HybridModel
    with torch.device('meta'): shapes = HybridModel(HybridConfig.from_depth(
        ref.DEPTH, preset='nanochat', vocab_size=ref.VOCAB, sequence_len=ref.TOKENS, **kw)).state_dict()
    theirs = lambda n: n.replace('wte.', 'transformer.wte.', n.startswith('wte.')).replace('blocks.', 'transformer.h.').replace('.mixer.', '.attn.')
    w = ref.weights({n: tuple(t.shape) for n, t in shapes.items()}, width)
    assert ref.checksum(w) == got['weights_sha256']
    p = saved(tmp_path, config, {f'_orig_mod.{theirs(n)}': torch.from_numpy(t) for n, t in w.items()})
    (tmp_path/'tokenizer'/'tokenizer.pkl').unlink()
    m, tok, meta = load_model(p, device='cpu'); x, y = ref.batch()
    with torch.no_grad(): loss = m(x, targets=y).item()
    assert abs(loss - got['loss']) < 2e-6*got['loss'] and tok is None

def test_folder(tmp_path):
    "load_model, find_checkpoint and read_meta take the folder; another folder is not taken for one"
    got = OLD['july']['models']['small']
    w = {n: torch.empty(s) for n, s in got['shapes'].items()}; versions.fill(w)
    p = saved(tmp_path, got['config'], w, kind='chatsft')
    assert find_checkpoint(p) == p and nanochat_steps(tmp_path) == []
    m, tok, meta = load_model(p, device='cpu')
    assert read_meta(p)['model'] == meta['model'] == m.cfg.to_dict() and meta['train']['stage'] == 'sft'
    with pytest.raises(ValueError, match='no checkpoint of step 7; it has \\[1000\\]'): load_model(p, 7, 'cpu')

# ---------------------------------------------------------------------------------------------- out
STRANGER = '''
import json, sys
sys.modules['nano_dh'] = None                      # an import of it would fail
import torch
if not torch.cuda.is_available(): sys.modules['fla'] = None # its kernels ask triton for a GPU at import
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error()
job = json.load(open(sys.argv[1]))
m = AutoModelForCausalLM.from_pretrained(job['folder'], **job['how'])
tok = AutoTokenizer.from_pretrained(job['folder'])
batch = tok(job['prompts'], return_tensors='pt', padding=True)
new = m.generate(**batch, max_new_tokens=job['new'], do_sample=False, eos_token_id=None)[:, batch['input_ids'].shape[1]:]
with torch.no_grad(): z = m(torch.tensor([job['ids']])).logits[0]
chat = tok.apply_chat_template(job['chat'], add_generation_prompt=True, return_dict=False)
half = AutoModelForCausalLM.from_pretrained(job['folder'], dtype=torch.bfloat16, **job['how'])
with torch.no_grad(): agree = (half(torch.tensor([job['ids']])).logits[0].argmax(-1) == z.argmax(-1)).float().mean().item()
json.dump(dict(ids=new.tolist(), text=tok.batch_decode(new), chat=chat, last=z[-1].tolist(), largest=z.abs().max().item(), agree=agree,
               version=transformers.__version__, kind=type(m).__module__), open(sys.argv[2], 'w'))
'''
CHAT = [dict(role='user', content='Who are you?'), dict(role='assistant', content='A mole.'), dict(role='user', content='Where do you live?')]

def stranger(tmp, model, tok, folder, python=sys.executable, new=16): # what transformers alone makes of a folder
    texts = passages(); prompts = [texts[i % len(texts)][:n] for i, n in enumerate([1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 200, 4, 6, 9, 15, 31, 60, 120, 7])]
    ids = tok.encode(texts[0], bos=True)[:150]
    remote = (Path(folder)/'modeling_nano_dh.py').exists()
    job = dict(folder=str(folder), how=dict(trust_remote_code=True) if remote else {}, prompts=prompts, new=new, ids=ids, chat=CHAT)
    (tmp/'job.json').write_text(json.dumps(job)); (tmp/'stranger.py').write_text(STRANGER)
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')} | dict(HF_HOME=str(tmp/'hf'), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    r = subprocess.run([python, '-I', 'stranger.py', 'job.json', 'got.json'], cwd=tmp, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    from nano_dh.hybrid_model import generate
    from nano_dh.tasks import render_for_completion
    got = json.loads((tmp/'got.json').read_text())
    own = [generate(model, tok.encode(p, bos=True), new, temperature=0) for p in prompts]
    assert got['ids'] == own and got['text'] == [tok.decode(o) for o in own] and got['chat'] == render_for_completion(CHAT, tok)
    with torch.no_grad(): z = model(torch.tensor([ids]))[0]
    assert (z[-1] - torch.tensor(got['last'])).abs().max() < 5e-6*max(1, got['largest']) and got['agree'] > .9
    assert got['kind'].startswith('transformers.models.qwen3_next' if not remote else 'transformers_modules.')
    return got

def passages():
    import pyarrow.parquet as pq
    from nano_dh.core import package_data
    return pq.read_table(package_data('sample_val.parquet'), columns=['text'])['text'].to_pylist()[:40]

@lru_cache
def trained(**kw): # a small model after a few steps, and its tokenizer
    from nano_dh.hybrid_model import HybridConfig, HybridModel
    texts = passages(); tok = Tokenizer.train(texts, 700, name='t')
    size = dict(vocab_size=700, d_model=64, head_dim=16, head_k_dim=16, head_v_dim=16, sequence_len=128)
    m = HybridModel(HybridConfig.from_depth(4, **size | kw))
    opt, ids = torch.optim.AdamW(m.parameters(), lr=1e-2), torch.tensor(tok.encode(' '.join(texts), bos=True))
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        at = torch.randint(len(ids) - 65, (8,), generator=g)
        x = torch.stack([ids[a:a+65] for a in at])
        m(x[:, :-1], targets=x[:, 1:]).backward(); opt.step(); opt.zero_grad()
    return m.eval(), tok

@pytest.mark.parametrize('case', ['default', pytest.param('nanochat', marks=pytest.mark.slow), 'qwen'])
def test_stranger(tmp_path, case):
    "Trained here, opened by transformers without this package: logits, 20 uneven prompts in one batch, conversation"
    import nano_dh.exchange
    m, tok = trained(**({} if case == 'default' else dict(preset=case)))
    stranger(tmp_path, m, tok, m.save_pretrained(tmp_path/'out', tok, format='qwen' if case == 'qwen' else 'hf'))

# ---------------------------------------------------------------------------------------------- lm-evaluation-harness
FIVE = 'hellaswag arc_easy piqa winograd lambada_openai'.split()

def questions(rows, task, tok, n): # chapter 54's items, and the same as the harness's documents
    from nano_dh.core_eval import make_item, prompts
    items, docs = [], []
    for i in range(min(n, len(rows))):
        it = make_item(task, rows, i, tok.encode_batch(prompts(task, rows, i), bos=True))
        at = it.starts if task.kind == 'schema' else [min(it.starts)]*len(it.rows) # an option may be the beginning of another
        cut = [(tok.decode_bytes(r[1:s]), tok.decode_bytes(r[s:])) for r, s in zip(it.rows, at)]
        items.append(it); docs.append(dict(contexts=[a.decode(errors='replace') for a, _ in cut], ends=[b.decode(errors='replace') for _, b in cut]))
    return items, docs

def cut_alike(items, docs, lm): # where the harness cuts a question elsewhere (blanks go to the answer), chapter 54 is asked with that cut
    moved = 0
    for it, d in zip(items, docs):
        pairs = [lm._encode_pair(a, b) if a else ([lm.tok.bos_id], lm.tok.encode(b)) for a, b in zip(d['contexts'], d['ends'])]
        assert [a + b for a, b in pairs] == it.rows
        starts = [len(a) for a, _ in pairs]
        moved += starts != it.starts; it.starts = starts
    return moved

def through_harness(lm, name, docs, kind): # [(nats, greedy), ...] of each document, from the harness's own log
    import datasets, lm_eval
    from lm_eval.tasks import TaskManager
    if kind == 'schema': how = dict(output_type='multiple_choice', doc_to_text=lambda d: 0, doc_to_choice=lambda d: d['contexts'], doc_to_target=lambda d: d['ends'][0])
    else: how = dict(output_type='multiple_choice', doc_to_text=lambda d: d['contexts'][0], doc_to_choice=lambda d: d['ends'], doc_to_target=lambda d: 0)
    task = dict(task=f'pack_{name}', custom_dataset=lambda **kw: dict(test=datasets.Dataset.from_list(docs)), test_split='test', target_delimiter='',
                num_fewshot=0, metric_list=[dict(metric='acc')], metadata=dict(version=1), **how)
    r = lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=TaskManager(include_defaults=False), log_samples=True, bootstrap_iters=0)
    samples = sorted(next(iter(r['samples'].values())), key=lambda s: s['doc_id'])
    return [[tuple(x) if isinstance(x, (list, tuple)) else x for x in s['filtered_resps']] for s in samples]

def compare_harness(run, n, bundle, names=FIVE, shots=2, say=print): # -> task -> (questions, differing, ties, elsewhere cut, largest difference)
    from dataclasses import replace
    from nano_dh.core_eval import ModelScorer, core_tasks, correct, load_task
    from nano_dh.lm_harness import register
    lm, out = register()(run=run, device='cpu'), {}
    for name in names:
        task = core_tasks()[name]; task = replace(task, shots=min(task.shots, shots)); rows = load_task(bundle, task)
        items, docs = questions(rows, task, lm.tok, n)
        moved = cut_alike(items, docs, lm)
        ours, theirs = ModelScorer(lm.model)(items), through_harness(lm, name, docs, task.kind)
        differ = ties = 0; far = 0.
        for it, (losses, right), got in zip(items, ours, theirs):
            size = [len(r) - s for r, s in zip(it.rows, it.starts)]
            lp, greedy = [float(g[0]) for g in got], [str(g[1]) == 'True' for g in got]
            far = max(far, max(abs(-l*k - x) for l, k, x in zip(losses, size, lp)))
            if it.gold < 0: differ += greedy[0] != right[0]; continue
            mean = [-x/k for x, k in zip(lp, size)]; a, b = sorted(losses)[:2]
            if correct(it, losses, right) != correct(it, mean, right):
                if b - a < 1e-5: ties += 1
                else: differ += 1
        out[name] = (len(items), differ, ties, moved, far); say(name, out[name], flush=True)
    return out

def test_harness(tmp_path, monkeypatch):
    "Through the harness's own evaluator: chapter 54's answers, question by question"
    pytest.importorskip('lm_eval')
    from nano_dh.checkpoint import runs_dir, save_checkpoint
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path))
    m, tok = trained(); save_checkpoint(runs_dir()/'small', 1, m, None, tok, meta=dict(train=dict(stage='base')))
    from nano_dh.core_eval import core_tasks
    texts = passages(); words = [t.split() for t in texts]
    for name, rows in dict(
            piqa=[dict(query=' '.join(w[:12]), choices=[' '.join(w[12:18]), ' '.join(v[12:17])], gold=0) for w, v in zip(words, words[1:])],
            winograd=[dict(context_options=[' '.join(w[:9]), ' '.join(v[:9])], continuation=' '.join(w[9:14]), gold=0) for w, v in zip(words, words[1:])],
            lambada_openai=[dict(context=' '.join(w[:12]), continuation=w[12]) for w in words]).items():
        f = tmp_path/'bundle'/core_tasks()[name].uri; f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text('\n'.join(map(json.dumps, rows)))
    out = compare_harness('small', 20, tmp_path/'bundle', ('piqa', 'winograd', 'lambada_openai'))
    assert all(differ == 0 and far < 1e-3 for _, differ, _, _, far in out.values()), out

# ---------------------------------------------------------------------------------------------- a nanochat checkpoint, from logits to fine-tuning
def as_nanochat(root, m, tok): # the model of preset nanochat as nanochat's training would leave it
    c = m.cfg; theirs = {}
    for n, t in m.state_dict().items():
        n = 'transformer.' + n if n.startswith('wte') else n.replace('blocks.', 'transformer.h.').replace('.mixer.', '.attn.')
        theirs['_orig_mod.' + n] = t
    p = saved(root, dict(sequence_len=c.sequence_len, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, n_kv_head=c.n_kv_head,
                         n_embd=c.d_model, window_pattern=c.pattern), theirs)
    enc = tiktoken.Encoding('rustbpe', pat_str=tok.pattern, mergeable_ranks={t: i for i, t in enumerate(tok.tokens)}, special_tokens=tok.special)
    (root/'tokenizer'/'tokenizer.pkl').write_bytes(pickle.dumps(enc))
    torch.save(tok.token_bytes().int(), root/'tokenizer'/'token_bytes.pt')
    return p

def test_nanochat_to_the_end(tmp_path, monkeypatch, capsys):
    "Imported: logits, bits per byte, chat, fine-tuning from the run and from the folder, and out again to transformers"
    from nano_dh.dataset import open_data
    from nano_dh.engine import Engine
    from nano_dh.exchange import dh_export, dh_import
    from nano_dh.loss_eval import evaluate_documents
    from nano_dh.serve import Chat
    from nano_dh.sft import FinetuneConfig
    from nano_dh.train import once
    from nano_dh.checkpoint import runs_dir
    import tiny_run
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path/'base')); monkeypatch.setenv('NANO_DH_DATA', tiny_run.tiny_data(tmp_path/'data'))
    m, tok = trained(preset='nanochat')
    p = as_nanochat(tmp_path, m, tok)
    dh_import([str(p), 'theirs'])
    mix, ids = open_data(''), torch.tensor([tok.encode(passages()[3], bos=True)[:100]])
    bpb = evaluate_documents(m, tok, mix, max_docs=3).bpb
    for name in ('theirs', p):
        got, gtok, meta = load_model(name, device='cpu')
        assert torch.equal(got(ids), m(ids)) and gtok.encode('Größe 12') == tok.encode('Größe 12')
        assert evaluate_documents(got, gtok, mix, max_docs=3).bpb == bpb and meta['train']['stage'] == 'base' and meta['step'] == 1000
    text = lambda model, t: ''.join(x.text for x in Chat(Engine(model, t, max_rows=1, prefix_bytes=0), temperature=0., max_tokens=12).ask('Who are you?'))
    assert text(got, gtok) == text(m, tok)
    talk = tmp_path/'my talk.json'; talk.write_text(json.dumps([dict(instruction='Who are you?', output='A mole.')]*40))
    for i, base in enumerate(('theirs', str(p))):
        c = FinetuneConfig(run=f'tuned{i}', base=base, tasks=f'"{talk}"', val_tasks=f'"{talk}"', stage='sft', num_iterations=3, device='cpu', total_batch_size=512,
                           device_batch_size=4, prompts='').resolved()
        records = once(c); assert any('loss' in r for r in records) and load_model(f'tuned{i}', device='cpu')[2]['train']['stage'] == 'sft'
    a, b = (load_model(f'tuned{i}', device='cpu')[0] for i in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    dh_export(['theirs', str(tmp_path/'out')]); assert 'val' in (tmp_path/'out'/'README.md').read_text()
    stranger(tmp_path, m, tok, tmp_path/'out')
    with pytest.raises(SystemExit, match='run theirs exists; give another name'): dh_import([str(p), 'theirs'])
