"Evaluations on whole bundles, on two ranks, from a server, with other people's models, and with input that is wrong."
import functools, http.server, json, os, shutil, threading, zipfile
from pathlib import Path
import mini_pack, pytest, torch
from nano_dh import core_eval as C
from nano_dh.core_eval import ModelScorer, Scorer, Task, core_tasks, encoder, evaluate_core, load_task, make_item, prompts
from nano_dh.hybrid_model import HybridConfig, HybridModel
from nano_dh.tokenizer import Tokenizer

TOY = {t.label: t for t in (Task('sums', 'world_knowledge/sums.jsonl', 'multiple_choice', 3, '\nAnswer: ', 1/3),
                            Task('pets', 'language_understanding/pets.jsonl', 'schema', 2, ' ', .5),
                            Task('capitals', 'language_understanding/capitals.jsonl', 'language_modeling', 2, ' ', 0.))}
FULL, DATA = bool(os.environ.get('NANO_DH_DATA')), mini_pack.data()[0]
def needs_bundle(test): # the published one takes long; the small pack has one too
    test = pytest.mark.skipif(C._inside(DATA) is None, reason='NANO_DH_DATA has no CORE bundle')(test)
    return pytest.mark.slow(test) if FULL else test

def write_bundle(folder):
    animals = 'dog fox owl cat hen rat bug ant'.split()
    rows = dict(sums=[dict(query=f'{a} plus {b} is', choices=[str(a + b + k) for k in (1, 0, 5)], gold=1) for a in range(4) for b in range(5)],
                pets=[dict(context_options=[f'The {a} fled from the {b} because the {c}' for c in (a, b)], continuation='was hungry.', gold=1)
                      for a in animals for b in animals if a < b][:20],
                capitals=[dict(context=f'{a} in capitals is ', continuation=a.upper()) for a in animals*2])
    for k, t in TOY.items():
        f = Path(folder)/t.uri; f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text('\n'.join(json.dumps(r) for r in rows[k]))
    return Path(folder)

def byte_tokenizer(): return Tokenizer([bytes([i]) for i in range(256)])

def small_model(vocab, seed=0, **kw):
    "Float32, with opinions: logits of a fresh model are all zero"
    m = HybridModel(HybridConfig.from_depth(4, d_model=64, head_dim=32, head_k_dim=32, head_v_dim=32, vocab_size=vocab, **kw), seed)
    g = torch.Generator().manual_seed(seed)
    for p in m.parameters(): p.data += .05*torch.randn(p.shape, generator=g)
    return m.eval()

def items_of(bundle, task, enc, n):
    rows = load_task(bundle, task); ids = iter(enc([p for i in range(min(n, len(rows))) for p in prompts(task, rows, i)]))
    return [make_item(task, rows, i, [next(ids) for _ in prompts(task, rows, i)]) for i in range(min(n, len(rows)))]

def share(score, items): return sum(C.correct(it, *got) for it, got in zip(items, score(items)))/len(items)

def gaps(a, b, items): # answers that differ though the two best losses are further apart than 1e-4; largest loss difference
    bad, worst = 0, 0.
    for it, (l, r), (l2, r2) in zip(items, a, b):
        worst = max(worst, *(abs(x - y) for x, y in zip(l, l2))); s = sorted(l)
        tie = len(s) > 1 and s[1] - s[0] < 1e-4
        bad += C.correct(it, l, r) != C.correct(it, l2, r2) and not tie
    return bad, worst

# --- the whole bundle -------------------------------------------------------------------------------------------------

@needs_bundle
def test_answer_key_and_random_answers_on_the_bundle():
    tok, bundle, seen = byte_tokenizer(), C.core_bundle(DATA), 0
    for t in core_tasks().values():
        if (rows := load_task(bundle, t)) is None: assert t.label == 'coqa'; continue
        items = items_of(bundle, t, encoder(tok), 64); seen += 1
        assert share(Scorer(C.oracle(items, tok.vocab_size)), items) == 1, t.label
        bare = [C.Item([[]]*len(r.get('choices') or r.get('context_options') or [0]), [], r.get('gold', -1), i) for i, r in enumerate(rows)]
        p, got = C.chance(t, rows), share(C.random_scorer(), bare)
        assert abs(got - p) <= 3*(p*(1 - p)/len(rows))**.5, (t.label, got, p)
    assert seen == 21

@needs_bundle
def test_shared_prefix_gives_the_same_answers_on_the_bundle():
    from nano_dh.dataset import open_data
    n, few = (2_000_000, 32) if FULL else (200_000, 8); bundle, m = C.core_bundle(DATA), small_model(2048)
    tok = Tokenizer.train(open_data('sample').texts('train', n), 2048)
    for t in core_tasks().values():
        if load_task(bundle, t) is None: continue
        items = items_of(bundle, t, encoder(tok, m), few)
        bad, worst = gaps(ModelScorer(m, shared=False)(items), ModelScorer(m, least=1)(items), items)
        print(f'{t.label}: largest difference of a loss {worst:.1e}')
        assert bad == 0 and worst < 1e-4, (t.label, bad, worst)

# --- the machinery on a small bundle ----------------------------------------------------------------------------------

@pytest.mark.parametrize('kw', [dict(pattern='GGGL'), dict(preset='nanochat', window=32), dict(pattern='L', pos='partial')], ids=str)
def test_shared_prefix_gives_the_same_answers(tmp_path, kw):
    tok, bundle = byte_tokenizer(), write_bundle(tmp_path); m = small_model(tok.vocab_size, **kw)
    for t in TOY.values():
        items = items_of(bundle, t, encoder(tok, m), 32)
        for other in (ModelScorer(m, least=1), ModelScorer(m, least=1, max_tokens=400), ModelScorer(m), Scorer(lambda x: m(x)), Scorer(lambda x: m(x), multiple=64)):
            bad, worst = gaps(ModelScorer(m, shared=False)(items), other(items), items)
            assert bad == 0 and worst < 1e-4

def test_options_that_share_nothing_or_everything():
    "A token that is judged is never in the prefix that options share, though one may be all they have"
    m = small_model(64); rows = [[0, 5, 6, 7], [0, 5, 6, 7]], [[0, 5, 6], [0, 9, 6, 8]], [[0, 5], [0, 6]]
    items = [C.Item([*r], [1]*2, 0, i) for i, r in enumerate(rows)] + [C.Item([[0, 5, 6, 7], [0, 5, 8]], [2, 2], 1, 3)]
    bad, worst = gaps(ModelScorer(m, shared=False)(items), ModelScorer(m, least=1)(items), items); assert bad == 0 and worst < 1e-5

def on_ranks(folders, emit):
    "Everything that is said to be the same on any number of ranks, in one start of them"
    from nano_dh.dataset import open_data
    from nano_dh.loss_eval import bpb_figures, evaluate_documents
    from test_eval import TOY, byte_tokenizer, small_model
    (bundle, texts), tok = folders, byte_tokenizer(); m = small_model(tok.vocab_size, sequence_len=256)
    r = evaluate_core(ModelScorer(m), encoder(tok, m), bundle, tasks=TOY, emit=str)
    emit({k: t['accuracy'] for k, t in r.tasks.items()} | dict(mean=r.mean))
    for batch in (1, 16): emit(bpb_figures(evaluate_documents(m, tok, open_data(texts), batch=batch)))

@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "What one process and two ranks emit, and the texts"
    from nano_dh.launch import run_ranks
    import test_eval
    d = tmp_path_factory.mktemp('ranks'); (d/'text').mkdir(); texts = two_sources(d/'text'); old = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent), old or ''])
    try: yield *(list(run_ranks(test_eval.on_ranks, (str(write_bundle(d/'b')), str(d/'text')), n, 'cpu')) for n in (0, 2)), texts
    finally: os.environ.pop('PYTHONPATH') if old is None else os.environ.update(PYTHONPATH=old)

def test_two_ranks_equal_one(ranks):
    one, two = ranks[0][0], ranks[1][0]
    assert one == two and set(one) == {*TOY, 'mean'}

def test_a_transformers_model(tmp_path):
    T = pytest.importorskip('transformers')
    torch.manual_seed(0)
    m = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=265, n_positions=512, n_embd=32, n_layer=2, n_head=2)).eval()
    tok, bundle = byte_tokenizer(), write_bundle(tmp_path)
    for t in TOY.values():
        items = items_of(bundle, t, encoder(tok), 6)
        for it, (losses, right) in zip(items, C.hf_scorer(m)(items)):
            for r, s, l, ok in zip(it.rows, it.starts, losses, right):
                z = m(torch.tensor([r])).logits[0].detach()
                want = [torch.nn.functional.cross_entropy(z[t-1:t], torch.tensor(r[t:t+1])).item() for t in range(s, len(r))]
                assert abs(sum(want)/len(want) - l) < 1e-4
                assert ok == all(z[t-1].argmax().item() == r[t] for t in range(s, len(r)))

def test_long_prompts_lose_their_beginning(tmp_path):
    tok, bundle = byte_tokenizer(), write_bundle(tmp_path); t = TOY['sums']; rows = load_task(bundle, t)
    ids = encoder(tok)(prompts(t, rows, 0)); whole, cut = (make_item(t, rows, 0, ids, n) for n in (None, 20))
    assert [r[s:] for r, s in zip(cut.rows, cut.starts)] == [r[s:] for r, s in zip(whole.rows, whole.starts)]
    assert all(len(r) <= 20 for r in cut.rows)

def test_bundle_from_a_server(tmp_path, monkeypatch):
    write_bundle(tmp_path/'w'/'eval_bundle'/'eval_data')
    with zipfile.ZipFile(tmp_path/'bundle.zip', 'w') as z:
        for f in (tmp_path/'w').rglob('*.jsonl'): z.write(f, f.relative_to(tmp_path/'w'))
    h = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path)); h.log_message = lambda *a: None
    srv = http.server.ThreadingHTTPServer(('127.0.0.1', 0), h); threading.Thread(target=srv.serve_forever, daemon=True).start()
    monkeypatch.delenv('NANO_DH_DATA', raising=False); monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path/'base'))
    try: root = C.core_bundle(url=f'http://127.0.0.1:{srv.server_port}/bundle.zip')
    finally: srv.shutdown(); srv.server_close()
    assert len(load_task(root, TOY['sums'])) == 20 and C.core_bundle() == root

# --- wrong input ------------------------------------------------------------------------------------------------------

def says(fn, *words):
    with pytest.raises(Exception) as e: fn()
    text = str(e.value)
    assert all(w in text for w in words) and len(text.splitlines()) == 1, text

def test_wrong_input_is_one_clear_error(tmp_path):
    bundle, tok = write_bundle(tmp_path/'b'), byte_tokenizer(); m = small_model(tok.vocab_size)
    f = bundle/TOY['pets'].uri
    f.write_text(''); says(lambda: load_task(bundle, TOY['pets']), 'pets.jsonl', 'no questions')
    f.write_text('{"query": "a", "choices": ["b"], "gold": 0}'); says(lambda: load_task(bundle, TOY['pets']), 'line 1', "'context_options'", 'schema needs')
    f.write_text('{"context_options": ["a", "b"], "continuation": "c", "gold": 2}'); says(lambda: load_task(bundle, TOY['pets']), 'gold 2', '2 options')
    f.write_text('{"context'); says(lambda: load_task(bundle, TOY['pets']), 'not JSON lines')
    says(lambda: encoder(tok, small_model(300)), '265', '300', 'saved with the checkpoint')
    says(lambda: evaluate_core(ModelScorer(m), encoder(tok), bundle, 'copa'), 'none of', 'copa')

def test_checkpoint_of_another_config(tmp_path):
    from nano_dh.checkpoint import load_checkpoint, save_checkpoint
    save_checkpoint(tmp_path, 1, small_model(265))
    says(lambda: load_checkpoint(tmp_path, small_model(265, pattern='L')), 'does not fit this model')
    says(lambda: load_checkpoint(tmp_path, small_model(400)), 'other shapes')

# --- bits per byte ----------------------------------------------------------------------------------------------------

def two_sources(folder):
    "Two sources of a few short documents each, in and beyond ASCII, one with the text of a special token"
    import pyarrow as pa, pyarrow.parquet as pq
    texts = dict(wiki=[f'Page {i}. ' + 'Größe, naïve, 東京. '*(i + 1) for i in range(7)], chat=[f'User {i}: <|bos|> hello {"ha"*40*i}' for i in range(5)])
    for name, docs in texts.items():
        for split in ('train', 'val'): pq.write_table(pa.table(dict(text=docs)), Path(folder)/f'{name}_{split}.parquet', row_group_size=2)
    return texts

def test_bpb_by_source_on_one_and_two_ranks(ranks):
    import math
    (_, a, b), (_, c, d), texts = ranks
    tok = byte_tokenizer(); m = small_model(tok.vocab_size, sequence_len=256)
    for name in ('', *texts):
        x, *others = (r[name] if name else r for r in (a, b, c, d))
        for y in others: assert abs(x['bpb'] - y['bpb']) < 1e-5 and abs(x['stderr'] - y['stderr']) < 1e-5 and x['bytes'] == y['bytes'] and x['units'] == y['units']
    for name, docs in texts.items():                      # from the logits and the raw text, rows of 256 cut by hand
        nats = 0.
        for t in docs:
            ids = [tok.bos_id, *t.encode()]
            for i in range(0, len(ids) - 1, 256):
                z = m(torch.tensor([ids[i:i+256]])).double().log_softmax(-1)[0].detach()
                nats -= sum(z[k, ids[i+k+1]].item() for k in range(min(256, len(ids) - 1 - i)))
        n = sum(len(t.encode()) for t in docs)
        assert a[name]['bytes'] == n and a[name]['units'] == len(docs) and abs(a[name]['bpb'] - nats/n/math.log(2)) < 1e-5

# --- a checkpoint, whole ----------------------------------------------------------------------------------------------

def test_evaluation_of_a_checkpoint(tmp_path, monkeypatch):
    "What runs/base_eval.ipynb runs: bits per byte, CORE of what the bundle has, a record of each"
    from nano_dh.checkpoint import save_checkpoint
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path/'base'))
    tok, bundle = byte_tokenizer(), write_bundle(tmp_path/'b'); m = small_model(tok.vocab_size, sequence_len=128)
    f = bundle/core_tasks()['copa'].uri; f.parent.mkdir(); f.write_text('\n'.join(json.dumps(dict(query=f'{i} is', choices=['a', 'the'], gold=i % 2)) for i in range(9)))
    save_checkpoint(tmp_path/'run', 5, m, tokenizer=tok); recs = []
    C.base_eval(C.BaseEvalConfig(str(tmp_path/'run'), data='sample', core=str(bundle), max_items=6, max_docs=1, device='cpu'), recs.append)
    out = {k: v for r in recs for k, v in r.items()}; bpb, core = (json.loads(Path(f).read_text()) for f in out['records'])
    assert bpb['figures']['bpb'] == out['bpb']['bpb'] and bpb['model']['step'] == 5 and bpb['machine']['torch'] == torch.__version__
    assert core['figures']['tasks']['copa']['n'] == 6 and len(core['figures']['missing']) == 21 and 'mean of 1 of the 22' in core['figures']['name']

# --- long context -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw', [dict(preset='nanochat', window=24), dict(pattern='GGGL', pos='partial'), dict(pattern='GGGL', pos='full')], ids=str)
def test_pieces_of_a_long_row_are_the_whole(kw):
    "Window, smear, backout and positions, beyond the training length; losses and needles"
    from nano_dh.long_context import answered, needle_row, position_losses
    tok = byte_tokenizer(); m = small_model(tok.vocab_size, sequence_len=64, **kw)
    ids, start = needle_row('number', tok, tok.encode('Once upon a time. '*30), 300, .4, 0); x = torch.tensor([ids, ids[::-1]])
    whole = m(x[:, :-1], targets=x[:, 1:], reduction='none').view(2, -1).detach()
    for piece in (37, 128): assert (position_losses(m, x, piece, rows=1) - whole).abs().max() < 1e-4
    x[:, -1] = m(x[:, :-1])[:, -1].argmax(-1)
    assert answered(m, x, [299, 299], piece=50).tolist() == [True, True] and answered(m, x, [start, 299], piece=50).tolist()[1]

# --- the notebooks ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_run_notebooks(tmp_path):
    "Each runs from its parameters to its figures, with a tiny checkpoint"
    import subprocess
    from nano_dh.checkpoint import save_checkpoint
    from tiny_run import PAPERMILL, ROOT, environ
    tok, bundle, env = byte_tokenizer(), write_bundle(tmp_path/'b'), environ(tmp_path/'base')
    f = bundle/core_tasks()['copa'].uri; f.parent.mkdir(); f.write_text('\n'.join(json.dumps(dict(query=f'{i} is', choices=['a', 'the'], gold=i % 2)) for i in range(9)))
    save_checkpoint(tmp_path/'run', 5, small_model(tok.vocab_size, sequence_len=160), tokenizer=tok); (tmp_path/'book.txt').write_text('It was a long day, and nothing happened. '*200)
    given = dict(base_eval=dict(model=tmp_path/'run', core=bundle, max_docs=1),
                 long_context=dict(models=tmp_path/'run', texts=tmp_path/'book.txt', factor=2, kinds='number', learn_steps=1, learn_rows=1, lengths='160 200', depths=2, needles=2),
                 mechanisms=dict(probes='parity', patterns='G- L', lrs='1e-2 3e-3', seeds=2, steps=8, depth=1, d_model=32))
    for name, kw in given.items():
        p = [x for k, v in kw.items() for x in ('-p' if isinstance(v, int) else '-r', k, str(v))]
        out = tmp_path/f'{name}.ipynb'
        r = subprocess.run([PAPERMILL, '--no-progress-bar', '--cwd', str(ROOT), str(ROOT/'runs'/f'{name}.ipynb'), str(out), *p, '-p', 'device', 'cpu'], env=env, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr[-2000:]
        assert 'image/png' in out.read_text()
    kinds = sorted(json.loads(f.read_text())['kind'] for f in (tmp_path/'base'/'records').iterdir())
    assert kinds == ['bpb', 'core', 'long_context', 'mechanisms']
