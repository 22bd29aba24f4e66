"Reinforcement learning: what counts in the loss, what is left out, and that it learns."
import os
from types import SimpleNamespace as N
import pytest, torch
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
    kw = dict(base=start, questions=8, samples=8, eval_questions=20, eval_every=2, device='cpu', lr_frac=.1)
    two = [*run_ranks(rl, RLConfig(**kw, run='two', num_iterations=2, nproc=2), 2, 'cpu')]
    a = [r for r in two if 'reward' in r]; assert [r['step'] for r in a] == [1, 2] and all(r['kept'] > 0 and r['drift_max'] < 1e-3 for r in a)
    whole, cut = [], []
    rl(RLConfig(**kw, run='whole', num_iterations=3, nproc=0), whole.append)
    rl(RLConfig(**kw, run='cut', num_iterations=2, nproc=0), lambda r: None)
    rl(RLConfig(run='cut', resume=True, num_iterations=3, nproc=0), cut.append)
    pick = lambda rs: [(r['reward'], r['drift']) for r in rs if 'reward' in r]
    assert pick(cut) == pick(whole)[2:]

@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_it_learns(seed, start):
    out = []; rl(RLConfig(base=tiny_start(seed, 'cpu'), run=f'learn{seed}', nproc=0, device='cpu', seed=seed), out.append)
    r = [x['val_reward'] for x in out if 'val_reward' in x]; n = [x['questions'] for x in out if 'questions' in x]
    assert r[0] < .3 and r[-1] > .9 and min(n) >= 1000
    assert max(x['drift_max'] for x in out if 'drift_max' in x) < 1e-4
