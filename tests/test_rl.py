"Reinforcement learning: what counts in the loss, what is left out, and that it learns."
import os, time
from types import SimpleNamespace as N
import pytest, torch
import nano_dh.rl as R
from nano_dh.rl import RLConfig, Tiny, advantages, drift, pack_rollouts, refresh, rl, rollout, tiny_start
from nano_dh.checkpoint import load_model
from nano_dh.engine import Engine
from nano_dh.tasks import render_for_completion

def stream(tokens, logprobs): return N(tokens=tokens, logprobs=logprobs)

def test_advantages_by_hand():
    a = advantages(torch.tensor([[1., 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    torch.testing.assert_close(a[0], torch.tensor([3., -1, -1, -1])/3**.5); assert not a[1:].any()

def test_only_drawn_tokens_of_varied_groups_are_learned():
    g = [[stream([7, 8, 9], [-1., None, -2.]), stream([5], [-3.])], [stream([6], [-1.]), stream([6], [-1.])]]
    b = pack_rollouts([[1, 2], [3]], g, torch.tensor([[1., 0], [1, 1]]), 0)
    assert b.x.tolist() == [[1, 2, 7, 8], [1, 2, 0, 0]] and b.y.tolist() == [[-1, 7, -1, 9], [-1, 5, -1, -1]]
    assert b.logp.tolist() == [[0, -1, 0, -2], [0, -3, 0, 0]] and b.adv.tolist() == [1., -1.]

def test_drift_is_zero_on_itself():
    x = torch.randn(9); assert drift(x, x)['kl'] == 0; assert drift(x, x + .1)['drift'] == pytest.approx(.1, rel=1e-4)
    assert drift(x[:0], x[:0]) == dict(drift=0., drift_max=0., kl=0.)

def test_a_copy_takes_new_weights_in_place():
    from nano_dh.decode import inference_copy
    from nano_dh.hybrid_model import HybridConfig, HybridModel
    kw = dict(pattern='GL', vocab_size=64, sequence_len=64, d_model=64, head_dim=32, head_k_dim=32, head_v_dim=32)
    def model(seed):
        m, g = HybridModel(HybridConfig.from_depth(2, **kw), seed), torch.Generator().manual_seed(seed)
        for p in m.parameters(): p.data += .05*torch.randn(p.shape, generator=g)
        return m
    old, new = model(0), model(1)
    e = N(graphs=True, model=inference_copy(old, torch.float32), slabs=['kept'], release=lambda: None)
    at = [t.data_ptr() for t in e.model.parameters()] + [m.fused.data_ptr() for m in e.model.modules() if hasattr(m, 'fused')]
    refresh(e, new); x = torch.randint(0, 64, (2, 9)); want = inference_copy(new, torch.float32)
    assert torch.equal(e.model(x), want(x)) and not torch.allclose(e.model(x), old(x)) and e.slabs == ['kept']
    assert at == [t.data_ptr() for t in e.model.parameters()] + [m.fused.data_ptr() for m in e.model.modules() if hasattr(m, 'fused')]
    for a, b in zip(e.model.modules(), want.modules()): assert not hasattr(a, 'fused') or torch.equal(a.fused, b.fused)

@pytest.fixture
def toy(tmp_path, monkeypatch):
    "Parameters of a run of moments, on an untrained model"
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path))
    return dict(base=str(R.tiny_base()), run='q', samples=2, eval_questions=2, eval_every=0, device='cpu', nproc=0, max_tokens=4)

def asked(monkeypatch): # -> list that takes the questions of each training step
    out, old = [], R.RLTrainer.answer
    def answer(self, convs, n, seed, at):
        if n == 2: out.append([c['messages'][0]['content'] for c in convs])
        return old(self, convs, n, seed, at)
    monkeypatch.setattr(R.RLTrainer, 'answer', answer)
    return out

def test_a_resumed_run_asks_what_comes_next(toy, monkeypatch):
    "Whatever the number of questions a step; another task is refused, and so are other questions under its name"
    seen = asked(monkeypatch); more = dict(run='q', resume=True)
    rl(RLConfig(**toy, questions=8, num_iterations=2), str)
    p = RLConfig(**more, questions=4, num_iterations=4).resolved(); rl(p, str)               # resolved twice, as the notebook does
    assert [len(s) for s in seen] == [8, 8, 4, 4]
    task = Tiny('train', 20000); order = R.shuffled(20000, 42, 0)
    assert sum(seen, []) == [task[int(i)]['messages'][0]['content'] for i in order[:24]]
    with pytest.raises(ValueError, match="task 'sums' differs from 'tiny', with which run q began"): RLConfig(**more, task='sums').resolved()
    monkeypatch.setattr(Tiny, 'talk', lambda self, a, word, b, sign, old=Tiny.talk: old(self, b, word, a, sign))
    with pytest.raises(ValueError, match='the questions of this run were'): rl(RLConfig(**more, num_iterations=5), str)

def test_draws_belong_to_the_question_on_any_number_of_ranks():
    def seeds(rank, world, at=None): # of the two tries at each of eight questions
        got = []; e = N(max_rows=4, submit=lambda r: got.append(r.seed) or N(), run=lambda s: s)
        at = list(range(8))[rank::world]; rollout(e, [[1]]*len(at), 2, 1, 1., 0, 42, at=at)
        return got
    alone = seeds(0, 1); assert len({*alone}) == 16 and sorted(seeds(0, 2) + seeds(1, 2)) == sorted(alone)
    assert seeds(1, 2)[:2] == alone[2:4]

def test_minutes_count_over_all_starts_and_are_the_only_limit(toy, monkeypatch):
    clock = [0.]
    def now(): clock[0] += 1e-3; return clock[0]
    monkeypatch.setattr(R, 'time', N(perf_counter=now, strftime=time.strftime))
    kw = toy | dict(questions=2, save_every=1, minutes=1.); c = RLConfig(**kw).resolved(); assert c.num_iterations == R.ENDLESS
    assert RLConfig(**kw, num_iterations=7).resolved().num_iterations == 7
    with pytest.raises(ValueError, match='has to know the end; give num_iterations'): RLConfig(**kw, warmdown_ratio=.5).resolved()
    class Killed(Exception): pass
    def steps(stop, **kw): # ten seconds each
        done = []
        def emit(r):
            if 'reward' in r: done.append(r['step']); clock[0] += 10
            if 'checkpoint' in r and r['step'] == stop: raise Killed
        try: rl(RLConfig(**kw), emit)
        except Killed: pass
        return done
    assert steps(3, **kw) == [1, 2, 3]; clock[0] += 1000
    assert steps(0, run='q', resume=True, nproc=0, device='cpu') == [4, 5, 6]
    assert steps(0, run='q', resume=True, nproc=0, device='cpu') == []
    assert steps(0, run='q', resume=True, nproc=0, device='cpu', minutes=1.3) == [7, 8]

def test_runs_that_could_not_learn_are_refused(toy, tmp_path, monkeypatch):
    import json
    from nano_dh.tasks import TASKS, Sums
    (tmp_path/'my.jsonl').write_text(json.dumps(Sums()[0]['messages']))
    class Same(Sums): __init__ = lambda self, split='train', size=100: Sums.__init__(self, 'train', size)
    monkeypatch.setitem(TASKS, 'same', Same)
    for kw, why in ((dict(temperature=0.), 'temperature 0: .*more than 0'), (dict(samples=1), 'samples 1: take 2 or more'), (dict(questions=0), 'questions 0: take 1'),
                    (dict(eval_questions=0), 'eval_questions 0: take 1'), (dict(eval_samples=0), 'eval_samples 0: take 1'), (dict(minutes=-1.), 'minutes -1.0: take 0'),
                    (dict(max_tokens=0), 'max_tokens 0: take 1'), (dict(task=str(tmp_path/'my.jsonl')), 'no right answers; take one of kind generate'),
                    (dict(task='humaneval'), "no split 'train'"), (dict(task='same'), 'task same has the same questions')):
        with pytest.raises(ValueError, match=why) as e: RLConfig(**toy | kw).resolved()
        assert '\n' not in str(e.value)

def examine(right, k, n=100, rank=0, world=1): # what `evaluate` says of a model that is right as `right(question, try)` says, and its seeds
    recs, seeds = [], []; held = Tiny('test', n)
    t = N(cfg=N(eval_samples=k, eval_questions=n, seed=0), rank=rank, world=world, held=held, tok=N(decode=str), sums=lambda *x: list(x), log=lambda **r: recs.append(r))
    def answer(convs, k, seed, at):
        e = N(max_rows=9, submit=lambda r: seeds.append(r.seed) or N(), run=lambda s: s); rollout(e, [[1]]*len(convs), k, seed=seed, at=at)
        return None, [[N(text=c['messages'][1]['content'][1]['text'] if right(i, j) else 'no', tokens=[]) for j in range(k)]
                      for i, c in zip(at, convs)]                              # by its number: two questions may have the same words
    t.answer = answer; R.RLTrainer.evaluate(t)
    return recs[0], seeds

def test_the_error_of_held_out_rewards_is_that_of_questions():
    r, _ = examine(lambda i, j: i % 2, 16); assert r['val_reward'] == .5 and r['val_reward_stderr'] == pytest.approx(.05, rel=.02)     # half is known
    r, _ = examine(lambda i, j: (i + j) % 2, 16); assert r['val_reward'] == .5 and r['val_reward_stderr'] < .01    # each is known by half
    from nano_dh.chat_eval import Score
    for n in (0, 7): assert examine(lambda i, j: i < n, 1)[0]['val_reward_stderr'] == pytest.approx(Score('x', 'generate', 100, n, 0.).stderr)
    alone = examine(lambda i, j: 0, 2, 8)[1]; two = [examine(lambda i, j: 0, 2, 8, r, 2)[1] for r in (0, 1)]
    assert len({*alone}) == 16 and sorted(sum(two, [])) == sorted(alone)

def test_the_toy_is_no_base_of_others(tmp_path, monkeypatch):
    "Nothing takes it for a mid-trained model unless it is named"
    from nano_dh.sft import FinetuneConfig, newest
    from nano_dh.train import PlanError
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); name = tiny_start(3, 'cpu', demos=60)
    with pytest.raises(PlanError, match='no run of mid or base'): FinetuneConfig(stage='sft').resolved()
    with pytest.raises(PlanError, match='no run of sft or mid'): RLConfig(task='sums').resolved()
    with pytest.raises(FileNotFoundError, match='holds no run'): FinetuneConfig(resume=True).resolved()
    assert load_model(name)[2]['train']['stage'] == 'toy' and RLConfig(base=name).resolved().base

@pytest.mark.parametrize('cut', [2, pytest.param(9, marks=pytest.mark.slow)]) # before and after its first checkpoint
def test_a_toy_that_was_cut_short_is_continued(tmp_path, monkeypatch, cut):
    import json
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path))
    def log(r):
        if 'loss' in r and r['step'] >= cut: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): tiny_start(42, 'cpu', log, demos=1500)
    run = tmp_path/'runs'/'tiny-start-42'; want = json.loads((run/'config.json').read_text())['num_iterations']; assert want > 9
    assert R.latest_step(run) == (None if cut == 2 else 7)
    seen = []; assert tiny_start(42, 'cpu', seen.append, demos=1500) == 'tiny-start-42' and R.latest_step(run) == want
    assert sum('loss' in r for r in seen) == want - (0 if cut == 2 else 7)
    seen.clear(); tiny_start(42, 'cpu', seen.append, demos=1500); assert not seen             # and what is whole is left alone

@pytest.fixture(scope='module')
def start(tmp_path_factory):
    os.environ['NANO_DH_BASE_DIR'] = str(tmp_path_factory.mktemp('rl'))
    return tiny_start(0, 'cpu')

@pytest.mark.slow
@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_engine_forgets_old_weights(start, device):
    if device == 'cuda' and not torch.cuda.is_available(): pytest.skip('needs a GPU')
    m, tok, _ = load_model(start, device=device); e = Engine(m, tok); p = [render_for_completion(Tiny('test')[0], tok)]
    a = rollout(e, p, 2, max_tokens=8, seed=1)
    with torch.no_grad(): [q.mul_(.5) for q in m.parameters()]
    refresh(e, m); b = rollout(e, p, 2, max_tokens=8, seed=1); c = rollout(Engine(m, tok), p, 2, max_tokens=8, seed=1)
    assert [s.tokens for s in b[0]] == [s.tokens for s in c[0]] and [s.logprobs for s in a[0]] != [s.logprobs for s in b[0]]

@pytest.mark.slow
def test_two_ranks_and_resume(start):
    from nano_dh.launch import run_ranks
    kw = dict(base=start, questions=8, samples=8, eval_questions=20, eval_every=2, device='cpu', lr_frac=.1, warmdown_ratio=.6)
    two = [*run_ranks(rl, RLConfig(**kw, run='two', num_iterations=2, nproc=2), 2, 'cpu')]
    a = [r for r in two if 'reward' in r]; assert [r['step'] for r in a] == [1, 2] and all(r['kept'] > 0 and r['drift_max'] < 1e-3 for r in a)
    whole, cut = [], []
    rl(RLConfig(**kw, run='whole', num_iterations=3, nproc=0), whole.append)
    class Cut(Exception): pass
    def stop(r): # in its third step: what was planned is the whole run
        if 'reward' in r and r['step'] == 3: raise Cut
    with pytest.raises(Cut): rl(RLConfig(**kw, run='cut', num_iterations=3, save_every=2, nproc=0), stop)
    rl(RLConfig(run='cut', resume=True, nproc=0), cut.append)
    pick = lambda rs: [(r['reward'], r['drift']) for r in rs if 'reward' in r]
    assert pick(cut) == pick(whole)[2:]

@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_it_learns(seed, start):
    out = []; rl(RLConfig(base=tiny_start(seed, 'cpu'), run=f'learn{seed}', nproc=0, device='cpu', seed=seed), out.append)
    r = [x['val_reward'] for x in out if 'val_reward' in x]; n = [x['questions'] for x in out if 'questions' in x]
    assert r[0] < .3 and r[-1] > .9 and min(n) >= 1000
    assert max(x['drift_max'] for x in out if 'drift_max' in x) < 1e-4
