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

@pytest.fixture(scope='module')
def start(tmp_path_factory):
    os.environ['NANO_DH_BASE_DIR'] = str(tmp_path_factory.mktemp('rl'))
    return tiny_start(0, 'cpu')

@pytest.mark.slow
def test_engine_forgets_old_weights(start):
    m, tok, _ = load_model(start, device='cpu'); e = Engine(m, tok); p = [render_for_completion(Tiny('test')[0], tok)]
    a = rollout(e, p, 2, max_tokens=8, seed=1)
    with torch.no_grad(): [q.mul_(.5) for q in m.parameters()]
    refresh(e, m); b = rollout(e, p, 2, max_tokens=8, seed=1); c = rollout(Engine(m, tok), p, 2, max_tokens=8, seed=1)
    assert [s.tokens for s in b[0]] == [s.tokens for s in c[0]] and [s.logprobs for s in a[0]] != [s.logprobs for s in b[0]]

@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_it_learns(seed, start):
    out = []; rl(RLConfig(base=tiny_start(seed, 'cpu'), run=f'learn{seed}', nproc=0, device='cpu', seed=seed), out.append)
    r = [x['val_reward'] for x in out if 'val_reward' in x]; n = [x['questions'] for x in out if 'questions' in x]
    assert r[0] < .3 and r[-1] > .9 and min(n) >= 1000
    assert max(x['drift_max'] for x in out if 'drift_max' in x) < 1e-4
