"Small things that could be changed in the package and no test noticed; each of these fails on its mutant in tests/mutants.py."
import json, math, os, random
from pathlib import Path
from types import SimpleNamespace as N
import numpy as np, pytest, torch, torch.nn.functional as F
from nano_dh.hybrid_model import HybridConfig, HybridModel
from nano_dh.tokenizer import Tokenizer

def test_every_mutant_has_its_place():
    "Code that was rewritten takes its mutants along; a stale one would notice nothing"
    from mutants import MUTANTS, ROOT
    code = {file: (ROOT/'nano_dh'/f'{file}.py').read_text() for file, *_ in MUTANTS.values()}
    assert [name for name, (file, old, new, _) in MUTANTS.items() if code[file].count(old) != 1 or old == new] == []

SMALL = dict(d_model=64, head_dim=32, head_k_dim=32, head_v_dim=32, sequence_len=64)

def model(depth=2, seed=0, noise=.1, **kw): # with opinions: a fresh one has none
    m, g = HybridModel(HybridConfig.from_depth(depth, **SMALL | dict(vocab_size=64) | kw), seed), torch.Generator().manual_seed(seed)
    for p in m.parameters(): p.data += noise*torch.randn(p.shape, generator=g)
    return m

def byte_tokenizer(*more): return Tokenizer([bytes([i]) for i in range(256)] + [*more])

# ------------------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize('depth', [3, 4, 6])
def test_the_subtracted_stream_is_that_after_the_middle_block(depth):
    m = model(depth, preset='nanochat', pattern='SL'); outs = []
    hooks = [b.register_forward_hook(lambda b, i, o: outs.append(o)) for b in m.blocks]
    with torch.no_grad():
        m.backout_lambda.fill_(.7); got = m.stream(torch.arange(20)[None])
        want = [F.rms_norm(outs[-1] - .7*o, (64,), eps=1e-6) for o in outs]
    off = [(got - w).abs().max().item() for w in want]
    assert off[depth//2] < 1e-5 and min(o for i, o in enumerate(off) if i != depth//2) > 1e-3, off

def test_a_tied_head_costs_what_an_own_one_does():
    "A product with every row of the head for each token, forward and backward, whoever owns the weights"
    tied, own = (model(2, pattern='GL', tie_embeddings=t, vocab_size=640) for t in (True, False))
    head = 6*own.lm_head.weight.numel()
    assert tied.flops_per_token(64) == own.flops_per_token(64) and own.flops_per_token(64) > head
    wider = model(2, pattern='GL', tie_embeddings=True, vocab_size=1280).flops_per_token(64)
    assert wider - tied.flops_per_token(64) == head

@pytest.mark.parametrize('cap', [0., 1., 15., 30., 31., 50., 90., 100., 150., 200., 300., 500.])
def test_the_loss_of_large_scores_at_any_cap(cap):
    "exp of a score up to the cap: from 89 on float32 overflows, from 30 on sums of many do"
    from nano_dh.cross_entropy import linear_cross_entropy
    g = torch.Generator().manual_seed(0)
    x, w, y = torch.randn(12, 16, generator=g), 60*torch.randn(50, 16, generator=g), torch.randint(0, 50, (12,), generator=g)
    x[3] = w[7].sign()*3; y[5] = -1                       # a row at the cap, one that does not count
    def run(f, dt):
        a, b = (t.to(dt, copy=True).requires_grad_() for t in (x, w)); l = f(a, b); l.backward()
        return [t.double() for t in (l.detach(), a.grad, b.grad)]
    def plain(a, b):
        z = a @ b.T; return F.cross_entropy(cap*torch.tanh(z/cap) if cap else z, y, ignore_index=-1)
    got, want = run(lambda a, b: linear_cross_entropy(a, b, y, cap, chunk=5), torch.float32), run(plain, torch.float64)
    for a, b in zip(got, want): assert a.isfinite().all() and (a - b).norm() <= 1e-4*b.norm() + 1e-6, cap

def test_grouped_heads_in_varlen(monkeypatch):
    "Query heads of a group stand side by side; on a CPU the kernel is played by attention written out for each document"
    varlen_attn = pytest.importorskip('torch.nn.attention.varlen')
    from nano_dh.gated_attn import varlen
    def written_out(q, k, v, cu, cu2, T, T2, scale=None, window_size=(-1, 0)):
        assert q.shape == k.shape == v.shape; out = torch.empty_like(q)
        for a, b in zip(cu.tolist(), cu[1:].tolist()):
            i = torch.arange(b - a); ok = i[:, None] >= i
            if window_size[0] >= 0: ok &= i[:, None] - i <= window_size[0]
            z = torch.einsum('ihd,jhd->hij', q[a:b], k[a:b])*scale
            out[a:b] = torch.einsum('hij,jhd->ihd', z.masked_fill(~ok, -torch.inf).softmax(-1), v[a:b])
        return out
    monkeypatch.setattr(varlen_attn, 'varlen_attn', written_out)
    g = torch.Generator().manual_seed(0); rand = lambda h: torch.randn(2, 12, h, 8, generator=g)
    q, k, v, cu = rand(6), rand(2), rand(2), torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32)
    for window in (None, 2):
        got = varlen(q, k, v, .3, window, cu)
        for h in range(6): # each query head with the keys of its group
            one = written_out(*(t.flatten(0, 1)[:, h:h+1] if t is q else t.flatten(0, 1)[:, h//3:h//3 + 1] for t in (q, k, v)), cu, cu, 12, 12, .3,
                              (-1 if window is None else window, 0))
            torch.testing.assert_close(got[:, :, h], one.view(2, 12, 8))

# ------------------------------------------------------------------------------------------------- the optimizer
def test_rates_of_the_tables():
    "At width 768 and the reference batch: the head .008, the embedding .3, value embeddings half of it"
    from nano_dh.optim import REF_BATCH, build_optimizer
    m = model(2, pattern='GL', d_model=768, head_dim=128, head_k_dim=128, head_v_dim=128, value_embeds=True)
    rates = {g['role']: g['lr'] for g in build_optimizer(m, total_batch_size=REF_BATCH).param_groups}
    assert {k: round(rates[k], 9) for k in ('lm_head', 'embed', 'value_embed')} == dict(lm_head=.008, embed=.3, value_embed=.15)

KW = dict(tasks='sums@60 identity@60', val_tasks='sums/test@20', num_iterations=3, total_batch_size=768, device_batch_size=2, prompts='',
          device='cpu', eval_every=0, warmup_steps=40)

def steps_and_gradients(folder, emit):
    "What one step of fine-tuning and one of reinforcement learning give to the optimizer, as a mean over ranks, and for which step"
    import torch.distributed as dist, nano_dh.rl as R
    from nano_dh.core import dist_info
    from nano_dh.sft import ChatTrainer, FinetuneConfig
    os.environ['NANO_DH_BASE_DIR'] = folder; me = dist_info(); torch.set_num_threads(1)
    def watched(t):
        steps, sums = [], []
        def schedule(step, *a): steps.append(step); old(step, *a)
        def step():
            g = torch.cat([p.grad.flatten() for p in t.model.parameters() if p.grad is not None]).double()
            if me.world_size > 1: dist.all_reduce(g); g /= me.world_size       # as the optimizer does
            sums.append([g.norm().item(), *g[::997].tolist()])
        old = t.opt.schedule; t.opt.schedule, t.opt.step = schedule, step
        return steps, sums
    t = ChatTrainer(FinetuneConfig(**KW, base=f'{folder}/runs/base', run=f'sft{me.world_size}', nproc=me.world_size).resolved(), str)
    sft = watched(t); [t.train_step(next(t.loader)) for _ in range(2)]; t.loader.close()
    t = R.RLTrainer(R.RLConfig(base=f'{folder}/runs/tiny', run=f'rl{me.world_size}', questions=2, samples=2, eval_questions=2, eval_every=0, device='cpu',
                               max_tokens=4, num_iterations=3, nproc=me.world_size, warmup_steps=2, warmdown_ratio=.5).resolved(), str)
    g = torch.Generator().manual_seed(0); x, y = (torch.randint(0, 256, (4, 9), generator=g) for _ in 'xy'); y[1, :6] = -1; own = slice(me.rank, None, me.world_size)
    adv = torch.tensor([1., -1., .5, -.5]); b = R.Rollouts(x[own], y[own], adv[own], torch.zeros(4, 9)[own], torch.eye(2))
    t.roll_seconds, t.roll_tokens = 1., 1; t.cfg.run_dir.mkdir(parents=True, exist_ok=True); rl = watched(t); [t.train_step(b) for _ in range(2)]
    emit(dict(sft=sft, rl=rl))

@pytest.fixture(scope='module')
def taken(tmp_path_factory):
    from nano_dh.checkpoint import save_checkpoint
    from nano_dh.launch import run_ranks
    import test_mutants
    d = tmp_path_factory.mktemp('taken'); old = {k: os.environ.get(k) for k in ('NANO_DH_BASE_DIR', 'PYTHONPATH')}; tok = byte_tokenizer()
    os.environ.update(NANO_DH_BASE_DIR=str(d), PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), old['PYTHONPATH'] or '']))
    threads = torch.get_num_threads()
    try:
        for name in ('base', 'tiny'):
            save_checkpoint(d/'runs'/name, 0, model(2, pattern='GL', vocab_size=tok.vocab_size, sequence_len=96), tokenizer=tok,
                            meta=dict(train=dict(stage='base', total_batch_size=768)))
        yield [next(r for r in run_ranks(test_mutants.steps_and_gradients, str(d), n, 'cpu') if 'sft' in r) for n in (0, 2)]
    finally:
        torch.set_num_threads(threads)
        for k, v in old.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})

@pytest.mark.parametrize('stage', ['sft', 'rl'])
def test_gradients_are_the_same_on_two_ranks(taken, stage):
    "Both optimizers forgive a gradient of another length, so losses and weights do not show it"
    one, two = (np.array(t[stage][1]) for t in taken)
    assert one.shape == two.shape and (one[:, 0] > 0).all() and np.abs(one - two).max() < 1e-4*one[:, 0].max()

@pytest.mark.parametrize('stage', ['sft', 'rl'])
def test_the_first_step_has_the_rate_of_step_0(taken, stage):
    assert [t[stage][0] for t in taken] == [[0, 1], [0, 1]]

def test_the_rate_of_a_pretraining_step_is_that_of_its_number():
    from nano_dh.optim import lr_multiplier
    from nano_dh.train import Trainer
    seen, rates, m = [], [], model(2, pattern='GL'); batch = N(x=torch.arange(20)[None], y=torch.arange(1, 21)[None], cu_seqlens=None, cu_seqlens_cpu=None)
    batch.micro = lambda rows: [batch]
    t = Trainer.__new__(Trainer); group = dict(kind='muon', initial_lr=3., lr=0., momentum=.9)
    t.cfg = N(total_batch_size=20, device_batch_size=1, doc_mask=False, num_iterations=9, warmup_steps=2, warmdown_ratio=.5, final_lr_frac=0., schedule='linear')
    t.world, t.device, t.fwd, t.step = 1, torch.device('cpu'), m, 0
    t.opt = N(param_groups=[group], schedule=lambda step, *a: seen.append((step, *a)), step=lambda: rates.append(group['lr']), zero_grad=lambda: 0)
    for _ in range(3): t.train_step(batch)
    assert seen == [(i, 9, 2, .5) for i in range(3)] and t.step == 3
    assert rates == [3*lr_multiplier(i, 9, 2, .5, 0., 'linear') for i in range(3)]

# ------------------------------------------------------------------------------------------------- data and files
def pieces(*sizes): # of so many tokens, the BOS among them
    from nano_dh.dataloader import Piece
    return [Piece(i, 0, n - 1, np.full(n - 1, 100 + i, np.int32)) for i, n in enumerate(sizes)]

def test_what_fits_exactly_is_taken_and_the_last_place_stays_empty():
    from nano_dh.dataloader import best_fit
    w = pieces(4, 5, 6); row, placed, starts = best_fit(w, 10, 0)
    assert row.tolist() == [0, 100, 100, 100, 0, 102, 102, 102, 102, 102] and starts == [0, 4] and [p.pos for p in w] == [1]
    w = pieces(4, 5, 7); row, placed, starts = best_fit(w, 10, 0)         # one place is left: a BOS alone, and no piece for it
    assert row.tolist() == [0, 100, 100, 100, 0, 101, 101, 101, 101, 0] and starts == [0, 4] and len(placed) == 2
    assert [(p.pos, p.start, p.stop) for p in w] == [(2, 0, 6)]
    w = pieces(10, 3); row, placed, starts = best_fit(w, 10, 0)
    assert row.tolist() == [0] + [100]*9 and starts == [0] and [(p.pos, p.start) for p in w] == [(1, 0)]

class Synced: # which files were on the disk, by number and size, when they got their names
    def __init__(self, monkeypatch):
        self.sizes, sync = {}, os.fsync
        def fsync(fd): sync(fd); st = os.fstat(fd); self.sizes[st.st_ino] = st.st_size
        monkeypatch.setattr(os, 'fsync', fsync)
    def whole(self, path): st = Path(path).stat(); return self.sizes.get(st.st_ino) == st.st_size

def test_what_is_written_is_on_the_disk(tmp_path, monkeypatch):
    "After a power cut a name without content is what remains of a file that was renamed but not synced"
    from nano_dh.checkpoint import save_checkpoint
    from nano_dh.core import atomic_write
    from nano_dh.dataset import repackage
    synced = Synced(monkeypatch)
    atomic_write(tmp_path/'a.json', 'x'*100_000); assert synced.whole(tmp_path/'a.json')
    repackage((f'text {i} '*50 for i in range(60)), tmp_path/'shards', shard_bytes=8000)
    shards = [*(tmp_path/'shards').glob('*.parquet')]; assert len(shards) > 2 and all(map(synced.whole, shards))
    path = Path(save_checkpoint(tmp_path/'run', 3, model(2, pattern='GL'), tokenizer=byte_tokenizer()))
    files = [p for p in path.rglob('*') if p.is_file()]
    assert len(files) > 2 and not [p.name for p in files if not synced.whole(p)]

# ------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize('k', [1, 2, 5, 63])
def test_top_k_is_k(k):
    from nano_dh.engine import Request, sample
    z = torch.randperm(64, generator=torch.Generator().manual_seed(0)).float()*.02; best = set(z.topk(k).indices.tolist())
    drawn = {int(sample(z, Request([1], top_k=k, seed=s), 3)) for s in range(40*k)}
    assert drawn <= best and len(drawn) >= .95*k
    assert int(sample(z, Request([1], top_k=k, temperature=0.), 3)) == z.argmax()

def test_the_earliest_stop_string_ends_the_text():
    "Two in one token, the later one named first"
    from nano_dh.engine import TextStream
    tok = byte_tokenizer(b'xaycz'); t = tok.encode('xaycz'); assert len(t) == 1
    for stop in (('c', 'a'), ('a', 'c'), ('cz', 'yc', 'ay')): assert TextStream(tok, stop).push(t[0]) == ('x', True)
    assert TextStream(tok, ('z', 'yc')).push(t[0]) == ('xa', True)

@pytest.mark.parametrize('most', [0, 16])
def test_an_end_inside_a_draft_ends_the_text(most):
    from nano_dh.engine import Request
    from nano_dh.speculate import speculate
    text = [1, 2, 3, 4, 5, 9, 7, 8]*3; prompt = text[:11]                # what follows was there before, the end among it
    got = speculate(model(2, pattern='GL'), Request(prompt, max_tokens=12, stop_tokens=(9,)), most, choose=lambda z, at: text[at])
    assert got.tokens == [4, 5, 9]
    if most: assert got.drafted > got.accepted > 0

def test_rl_answers_with_the_weights_of_now():
    "An engine that knows the beginnings of prompts forgets them when the weights have changed"
    import nano_dh.rl as R
    from nano_dh.engine import Engine
    tok = byte_tokenizer(); m = model(2, pattern='GL', vocab_size=tok.vocab_size, sequence_len=512)
    long = [dict(messages=[dict(role='user', content='How much is it? '*20), dict(role='assistant', content='5')])]
    c = N(max_tokens=6, temperature=1., top_k=0); fresh = lambda: N(cfg=c, model=m, tok=tok, engine=Engine(m, tok, max_rows=4))
    kept = fresh(); answer = lambda t: [(s.tokens, s.logprobs) for s in R.RLTrainer.answer(t, long, 2, 7, [0])[1][0]]
    before = answer(kept); assert before == answer(kept)
    with torch.no_grad(): [p.mul_(.7) for p in m.parameters()]
    assert answer(kept) == answer(fresh()) != before

# ------------------------------------------------------------------------------------------------- evaluation
def test_few_shot_examples_are_those_of_the_published_evaluation():
    "Drawn by Random(1234 + number of the question) from the others, as nanochat and DCLM draw them"
    from nano_dh.core_eval import Task, prompts
    rows = [dict(context=f'c{i}', continuation=f'a{i}') for i in range(10)]; task = Task('t', '', 'language_modeling', 3, ' ', 0.)
    got = [[int(s.split()[0][1:]) for s in prompts(task, rows, i)[1].split('\n\n')] for i in range(3)]
    assert got == FEW_SHOT, got

FEW_SHOT = [[8, 2, 1, 0], [7, 8, 4, 1], [9, 8, 6, 2]]

def test_the_error_of_bits_per_byte_is_that_of_a_sample():
    "Of a ratio of sums, with k - 1: the spread of the rows around it"
    from nano_dh.loss_eval import bpb_of, moments
    for k in (2, 3, 8):
        g = torch.Generator().manual_seed(k); rows = torch.rand(k, 3, generator=g, dtype=torch.float64)*9 + 1; n, b = (rows[:, i].numpy() for i in (0, 1))
        e = n - n.sum()/b.sum()*b; want = math.sqrt(k*(e**2).sum()/(k - 1))/b.sum()/math.log(2)     # the rows' e have mean 0
        assert bpb_of(moments(rows)).stderr == pytest.approx(want, rel=1e-6)
    assert math.isnan(bpb_of(moments(rows[:1])).stderr)

def test_chance_is_that_of_the_choices_there_are():
    from nano_dh.chat_eval import evaluate_task
    from nano_dh.core_eval import Task as CoreTask, chance
    from nano_dh.tasks import Task, ask_choice
    class Some(Task):
        name, kind, index, sizes = 'some', 'choice', range(6), (2, 3, 5, 2, 8, 12)
        def example(self, i): return ask_choice('?', [*range(self.sizes[i])], 0)
    tok = byte_tokenizer(); want = sum(1/n for n in Some.sizes)/6
    s, _ = evaluate_task(model(2, pattern='GL', vocab_size=tok.vocab_size, sequence_len=256), tok, Some())
    assert s.chance == pytest.approx(want) and s.centred == pytest.approx((s.accuracy - want)/(1 - want))
    rows = [dict(choices='ab'), dict(choices='abcde'), dict(choices='abc')]
    assert chance(CoreTask('t', '', 'multiple_choice', 0, ' ', 0.), rows) == pytest.approx((1/2 + 1/5 + 1/3)/3)
    assert chance(CoreTask('t', '', 'schema', 0, ' ', 0.), [dict(context_options='ab')]) == .5
    assert chance(CoreTask('t', '', 'language_modeling', 0, ' ', 0.), rows) == 0
