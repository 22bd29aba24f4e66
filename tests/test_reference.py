"The preset `nanochat` beside numbers that nanochat's own code gave (tests/make_reference.py); that code is not needed here."
import json, math
import numpy as np, pytest, torch
import make_reference as ref
from nano_dh import deltanet
from nano_dh.hybrid_model import HybridConfig, HybridModel
from nano_dh.optim import REF_BATCH, MuonAdamW, MuonOptions, build_optimizer

REF = json.loads(ref.FILE.read_text())
cases = pytest.mark.parametrize('case', ref.CASES)

def model(case): return HybridModel(HybridConfig.from_depth(ref.DEPTH, preset='nanochat', vocab_size=ref.VOCAB, sequence_len=ref.TOKENS,
                                                            **ref.CASES[case]))

def filled(case): # the model with the reference's weights
    m = model(case); w = ref.weights({n: tuple(p.shape) for n, p in m.named_parameters()}, m.cfg.d_model)
    assert ref.checksum(w) == REF['cases'][case]['weights_sha256']
    for n, p in m.named_parameters(): p.data.copy_(torch.from_numpy(w[n]))
    return m

def measure(case): # what make_reference measures of nanochat
    m = filled(case)
    with torch.no_grad(): head = [m.stream(ref.batch()[0])]
    windows = [ref.TOKENS if b.mixer.window is None else b.mixer.window for b in m.blocks]
    return ref.measure(m, dict(m.named_parameters()), m.blocks, head, windows)

@pytest.fixture(scope='module')
def measured(): # case -> the same under nanochat's epsilon, the one number of the block that differs on purpose; once
    done = {}
    def get(case):
        if case not in done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(deltanet, 'EPS', torch.finfo(torch.float32).eps)
                done[case] = measure(case)
        return done[case]
    assert math.isclose(REF['norm_eps'], torch.finfo(torch.float32).eps, rel_tol=1e-3)
    return get

def off(got, want): # largest difference of lengths and products, as parts of the length
    got, want = np.atleast_2d(got), np.atleast_2d(want)
    assert got.shape == want.shape and np.isfinite(got).all()
    return (np.abs(got - want)/np.abs(want[:, :1])).max()

@cases
def test_stream(measured, case):
    got, want = measured(case), REF['cases'][case]
    assert got['windows'] == want['windows'] and got['backout_layer'] == want['backout_layer']
    assert math.isclose(got['loss'], want['loss'], rel_tol=1e-6)
    for k in ('into_first_block', 'after_block', 'into_head'): assert off(got[k], want[k]) < 2e-6, k
    assert math.isclose(got['kept_for_backout'], want['kept_for_backout'], rel_tol=1e-6)

@cases
def test_gradients(measured, case):
    got, want = measured(case), REF['cases'][case]
    assert got['gradients'].keys() == want['gradients'].keys() and got['c_fc'].keys() == want['c_fc'].keys()
    for k in want['gradients']: # a scalar's is a small difference of large sums
        assert off(got['gradients'][k], want['gradients'][k]) < (3e-5 if 'lambda' in k else 1e-5), k
    for n in want['c_fc']: assert off(got['c_fc'][n], want['c_fc'][n]) < 1e-5, n

def test_as_it_is():
    "With its own epsilon, 1e-6, which shows in the gradient of backout alone (6e-5)"
    got, want = measure('SSSL'), REF['cases']['SSSL']
    assert math.isclose(got['loss'], want['loss'], rel_tol=1e-6) and off(got['after_block'], want['after_block']) < 5e-6
    for k in want['gradients']: assert off(got['gradients'][k], want['gradients'][k]) < (1e-4 if 'lambda' in k else 1e-5), k

def test_layout():
    "Short windows by length of the context, layers with value embeddings by depth"
    for n, w in REF['short_window'].items():
        assert HybridConfig.from_depth(8, preset='nanochat', sequence_len=int(n)).window == w, n
    for n, layers in REF['value_embeds'].items():
        c = HybridConfig.from_depth(int(n), preset='nanochat'); assert [i for i in range(int(n)) if c.has_value_embed(i)] == layers

def test_initial_values():
    "Constants are equal; drawn values have the same range, mean and spread, as far as their number lets one see"
    got = ref.ranges(dict(model('SSSL').named_parameters()))
    assert got.keys() == REF['initial'].keys()
    for k, want in REF['initial'].items():
        g, n = got[k], want['numel']; assert g['numel'] == n, k
        if n < 10 or not want['std']: assert all(math.isclose(g[v], want[v], rel_tol=1e-6) for v in want), k; continue
        noise = 5*(2/n)**.5                                                # five standard errors of a difference
        assert abs(g['mean'] - want['mean']) < noise*want['std'] and abs(g['std']/want['std'] - 1) < noise, k
        ends = .3 if k in ('wte', 'lm_head') else max(noise, 1e-3)         # normal: open ends; uniform: a bound that is nearly reached
        assert all(abs(g[v] - want[v]) < ends*(want['max'] - want['min']) for v in ('min', 'max')), k
    for k in ('ve_gate', 'smear_gate'): assert 0 <= got[k]['min'] and .01 < got[k]['max'] < .02

# what build_optimizer does otherwise on purpose; the chapter of the optimizer says why
GATES = [f'blocks.{i}.mixer.ve_gate.weight' for i in range(1, ref.DEPTH, 2)]
EPS = ('resid_lambdas', 'x0_lambdas', 'smear_gate.weight', 'smear_lambda', 'backout_lambda')

@pytest.mark.parametrize('name,batch', [('groups', REF_BATCH), ('groups_of_twice_the_batch', 2*REF_BATCH)])
def test_settings(name, batch):
    rates = {k: v for k, v in ref.RATES.items() if k != 'weight_decay'}
    opt = build_optimizer(model('SSSL'), total_batch_size=batch, weight_decay=ref.RATES['weight_decay'], **rates)
    assert build_optimizer.__defaults__[:5] == tuple(ref.RATES[k] for k in ('matrix_lr', 'embedding_lr', 'unembedding_lr', 'scalar_lr', 'weight_decay'))
    ours = {n: g for g in opt.param_groups for n in g['names']}
    seen = set()
    for want in REF[name]:
        for n in want['names']:
            seen.add(n); g = ours[n]
            if n in GATES: assert g['role'] == 'small' and want['kind'] == 'muon'; continue
            assert g['kind'] == want['kind'] and math.isclose(g['lr'], want['lr'], rel_tol=1e-9), n
            if g['kind'] == 'muon': assert g['options'].beta2 == want['beta2']; continue
            assert (*g['betas'],) == (*want['betas'],) and g['weight_decay'] == want['weight_decay'], n
            assert (g['eps'], want['eps']) == ((1e-8 if n in EPS else 1e-10), 1e-10), n
    assert seen == ours.keys()

def test_three_steps():
    """The optimizer's arithmetic: nanochat's groups, three steps of rising rate and momentum. Muon's polynomials multiply rounding in small
    singular values by a thousand, in float64 here no less than in float32 (4e-4 either way, so it is the reference's own)"""
    want, m = REF['cases']['narrow'], filled('narrow')
    named, groups = dict(m.named_parameters()), []
    for g in want['groups']:
        g = dict(g, params=[named[n] for n in g['names']])
        if g['kind'] == 'muon': g['options'] = MuonOptions(beta2=g.pop('beta2'))
        groups.append(g)
    opt = MuonAdamW(groups)
    got = ref.steps(m, named, opt.param_groups, opt.step)
    assert np.allclose(got['losses'], want['losses'], rtol=1e-5)
    muon = {ref.kind(n) for g in groups if g['kind'] == 'muon' for n in g['names']}
    for k in want['moved']: assert off(got['moved'][k], want['moved'][k]) < (1e-3 if k in muon else 1e-4), k
