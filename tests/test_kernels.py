import json, os, subprocess, sys, tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
import fresh, pytest, torch, torch.nn.functional as F
import nano_dh.kernels as N
from nano_dh.chunked import doc_ids_from
from nano_dh.short_conv import conv_split_norm

ROOT = Path(__file__).resolve().parent.parent

PREPARED = '''
import triton.runtime.interpreter as I
def prepare(fn, now=I._patch_lang, seen=set()): # the language, once for all functions of a module that a kernel calls
    if I.tl.core.is_builtin(I.tl.load): seen.clear()                             # a kernel begins
    if id(fn.__globals__) in seen: return I._LangPatchScope()
    seen.add(id(fn.__globals__)); return now(fn)
I._patch_lang = prepare
'''

def python(code, **env):
    if 'TRITON_INTERPRET' in env: code = PREPARED + code
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))), 'OMP_NUM_THREADS': '1', **env}
    return fresh.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)

def finish(p):
    out = p.communicate(timeout=120)[0]
    assert p.returncode == 0, out
    return out.strip()

needs_triton = pytest.mark.skipif(find_spec('triton') is None, reason='Triton is not installed')

@needs_triton
def test_conv_kernels_interpreted():
    out = finish(python('''
import torch
import nano_dh.short_conv as M
from nano_dh.short_conv import short_conv
torch.manual_seed(0); M.TILE.update(R=2, L=8, fwd_R=2, fwd_L=8)
worst = 0
for B, T, H, HV, K, V, st, dc in [(2, 19, 1, 2, 8, 8, 0, 0), (1, 24, 2, 2, 4, 8, 1, 0), (2, 17, 1, 1, 8, 4, 0, 1),
                                  (2, 13, 1, 3, 6, 10, 1, 1), (2, 1, 1, 2, 8, 8, 1, 0), (1, 3, 1, 2, 8, 8, 0, 0)]:
    C = 2*H*K + HV*V
    x = torch.randn(B, T, C + 7)[..., 3:3+C].requires_grad_(); w = torch.randn(C, 4, requires_grad=True)
    state = torch.randn(B, C, 3) if st else None
    doc = (torch.rand(B, T) < .2).int().cumsum(1).int() if dc else None
    up = [torch.randn(B, T, n, d) for n, d in ((H, K), (H, K), (HV, V))]
    qk, v = M._heads(short_conv(x, w, state, doc)[0], H, HV, K, V)
    ref = M.l2norm(qk[:, :, :H]), M.l2norm(qk[:, :, H:]), v
    out = torch.ops.nano_dh.conv_fwd(x, w, state, doc, H, HV, K, V)
    ga, gb = (torch.autograd.grad(o, (x, w), up) for o in (out, ref))
    worst = max([worst] + [((a - b).norm()/b.norm()).item() for a, b in zip((*out, *ga), (*ref, *gb))])
assert worst < 1e-6, worst
torch.library.opcheck(torch.ops.nano_dh.conv_fwd, (x, w, None, None, 1, 2, 8, 8))
print('fine')''', TRITON_INTERPRET='1'))
    assert out == 'fine'

@needs_triton
def test_step_kernel_interpreted():
    out = finish(python('''
import torch
from nano_dh.delta_rule import delta_rule_step, l2norm
import nano_dh.kernels
torch.manual_seed(0)
for B, H, HV, K, V in ((2, 1, 2, 16, 16), (3, 2, 4, 12, 40)):
    q, k, v, S = l2norm(torch.randn(B, H, K)), l2norm(torch.randn(B, H, K)), torch.randn(B, HV, V), torch.randn(B, HV, K, V)
    g, b = -torch.rand(B, HV), 2*torch.rand(B, HV)
    o, new = delta_rule_step(q, k, v, g, b, S)
    idle, T = S.clone(), S.clone()
    out = torch.ops.nano_dh.delta_step(q, k, v, g, b, T, K**-.5)
    torch.testing.assert_close(out, o); torch.testing.assert_close(T, new)
    torch.ops.nano_dh.delta_step(q, k, v, 0*g, 0*b, idle, K**-.5); assert torch.equal(idle, S)
torch.library.opcheck(torch.ops.nano_dh.delta_step, (q, k, v, g, b, S, .1))
print('fine')''', TRITON_INTERPRET='1'))
    assert out == 'fine'

@needs_triton
def test_loss_kernel_interpreted():
    out = finish(python('''
import torch
import nano_dh.cross_entropy as X
torch.manual_seed(0)
for cols, vocab, cap in ((96, 90, 15.), (128, 128, 0.), (96, 96, 50.), (200, 190, 15.), (200, 70, 0.), (96, 90, 100.), (96, 96, 300.)):
    X.ROW_TILE.update(columns=64)
    z, y = (8 if cap < 99 else 500)*torch.randn(7, cols), torch.tensor([3, 0, -1, 69, 12, -1, 5])
    want, dwant = X._loss_and_grad(z.double(), y, vocab, cap)
    got = torch.ops.nano_dh.loss_and_grad_(z, y, vocab, cap)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.double(), dwant, rtol=1e-4, atol=1e-6)
print('fine')''', TRITON_INTERPRET='1'))
    assert out.endswith('fine'), out      # lanes without a column overflow, and are not counted

INTERPRET = """
import os, sys, torch
import triton.runtime.interpreter as I
patch_tensor = I._patch_lang_tensor
def patched(tensor, scope): # NumPy 2.4 makes no number of an array that holds one
    patch_tensor(tensor, scope); scope.set_attr(tensor, '__index__', lambda self: int(self.handle.data.item()))
I._patch_lang_tensor = patched
import nano_dh.cache, nano_dh.decode as D
from nano_dh.hybrid_model import HybridConfig, HybridModel
torch.set_grad_enabled(False)
FEW = dict(programs=4, block=32, attend_programs=4, attend_bn=8, delta_bv=64) # small blocks and few programs: every
MANY = dict(attend_programs=4, attend_bn=16, delta_bv=8)                     # loop has an end that is not full
for k, t in D.TUNE.items(): t.update(FEW if k == 'few' else MANY)
SIZE = dict(vocab_size=70, sequence_len=64, d_model=64, head_dim=16, head_k_dim=16, head_v_dim=16, window=24, mlp_ratio=2.)
def make(depth=2, seed=1, noise=.1, **kw):
    g = torch.Generator().manual_seed(seed)
    m = HybridModel(HybridConfig.from_depth(depth, **{**SIZE, **kw})).requires_grad_(False)
    for p in m.parameters(): p.add_(torch.randn(p.shape, generator=g), alpha=noise)
    return m
"""

STEP = INTERPRET + """
KINDS = dict(GL=dict(pattern='GL', kv_group=2), nanochat=dict(preset='nanochat', pattern='SL'),
             odd=dict(pattern='GL', d_model=80, head_dim=10, head_v_dim=20, head_k_dim=12, pos='partial', attn_gate='elementwise', mlp_ratio=1.5),
             conversation=dict(preset='conversation', vocab_size=64, neg_eigval=True), GGGL=dict(depth=4), gelu=dict(pattern='G', activation='gelu', resid_scalars=False),
             wide=dict(depth=4, preset='nanochat', kv_group=4), bfloat16=dict(pattern='GL'), room=dict(pattern='GL'))
for name in sys.argv[2:]:
    kw = dict(KINDS[name]); m = make(**kw); half = name == 'bfloat16'; V = m.cfg.vocab_size; slots = 64
    if name == 'room': slots = 70_000; [t.update(attend_programs=512) for t in D.TUNE.values()] # more parts than slots in use
    c = D.inference_copy(m, torch.bfloat16 if half else torch.float32)
    for R in map(int, sys.argv[1].split(',')):
        x = torch.randint(0, V, (R, 45), generator=torch.Generator().manual_seed(R)); ref = c(x)
        a, n = c.init_state(R, slots), [41 - 3*r for r in range(R)]         # rows of different lengths, the last asleep
        for r in range(R):
            one = c.init_state(1, 64); c(x[r:r+1, :n[r]], state=one); c.put(a, r, one)
        a.n = None; d = D.Decoder(c, a, torch.zeros(R, dtype=torch.int64)); assert d.fused
        if R > 2: awake = R - 1; d.live[:awake] = 1
        else: awake = R; d.live.fill_(1)
        was = [t[awake:].clone() for t in a.tensors()]; worst = 0.
        for k in range(2):
            d.tok.copy_(torch.stack([x[r, n[r]+k] for r in range(R)])); z, cap = d.logits(R); z = z[:, :V]
            z = cap*torch.tanh(z/cap) if cap else z
            want = torch.stack([ref[r, n[r]+k] for r in range(awake)])
            worst = max(worst, (z[:awake] - want).abs().max().item())
        assert a.pos.tolist() == [n[r] + 2*(r < awake) for r in range(R)]
        assert all(torch.equal(t[awake:], w) for t, w in zip(a.tensors(), was)), 'a sleeping row changed'
        assert worst < (.15 if half else 2e-5), (name, R, worst)
        print(name, R, 'rows', f'{worst:.1e} of {want.abs().max():.1f}')
print('fine')"""

SAMPLE = INTERPRET + """
from types import SimpleNamespace as N
from nano_dh.engine import Request, sample, seed_key
m = D.inference_copy(make(pattern='G'), torch.float32); V, R = 70, 3
full = lambda v, dt=torch.int64: torch.full((R,), v, dtype=dt)
d = D.Decoder(m, N(pos=full(0)), full(0)); wrong = n = 0
z = 3*torch.randn(R, 128, generator=torch.Generator().manual_seed(0)); z[:, V:] = 99.   # the padding is never drawn
for j, (k, p, mp, T, cap) in enumerate([(0, 1., 0., 1., 0.), (7, 1., 0., 1., 5.), (70, .9, 0., .7, 0.), (1, 1., 0., 1., 0.), (0, 1e-4, 0., 1., 0.),
        (0, 1., 1., 1., 0.), (0, 1., .2, 2., 15.), (500, .999999, 1e-6, 1., 0.), (20, .8, .05, 1.3, 3.), (5, .5, .1, 0., 15.), (69, 1., 0., 1e-5, 0.)]):
    d.temp.fill_(T); d.top_k.fill_(k); d.top_p.fill_(p); d.min_p.fill_(mp); d.live.fill_(1); d.live[2] = 0; d.tok.fill_(-5)
    seeds = [(1 << 40) + 977*j + i for i in range(R)]; at = [3, 10**6, 2**31 + 5]
    d.key.copy_(torch.tensor([seed_key(s) for s in seeds])); d.state.pos.copy_(torch.tensor(at))
    d.draw(z, cap, 0, R); zz = (cap*torch.tanh(z/cap) if cap else z)[:, :V]
    want = [int(sample(zz[i], Request([1], temperature=T, top_k=k, top_p=p, min_p=mp, seed=seeds[i]), at[i])) for i in range(R)]
    wrong += sum(a != b for a, b in zip(want[:2], d.tok.tolist())); n += 2; assert d.tok[2] == -5
    lp = zz.log_softmax(-1)[torch.arange(2), d.tok[:2]]
    torch.testing.assert_close(d.lp[:2], lp, rtol=1e-5, atol=2e-5)
assert wrong == 0, (wrong, n)
print('fine')"""

ENGINE = INTERPRET + """
from dataclasses import replace
import nano_dh.engine as E
from nano_dh.engine import Engine, Request
from nano_dh.tokenizer import Tokenizer
TOK = Tokenizer([bytes([i]) for i in range(256)]); sp = TOK.special
m = make(2, pattern='GL', vocab_size=TOK.vocab_size, d_model=32, mlp_ratio=1.)
rs = [Request(list(range(5*k, 6*k + 2)), max_tokens=3 + k % 4, seed=k, stop_tokens=tuple(range(100 + k, 130)), top_k=(0, 20)[k % 2],
              top_p=(1., .9)[k % 3 == 0], temperature=(1., 0.)[k % 5 == 4], logprobs=(None, 2)[k == 2], keep=k != 2) for k in range(6)]
rs.append(Request([9], max_tokens=1, stop_tokens=()))
rs += [Request([k, 7], max_tokens=5, seed=k, stop_tokens=(), logprobs=k % 2, **how) for k, how in enumerate((dict(presence=2.), dict(frequency=-1., temperature=0.), dict(bias={3: 99., 5: -99.}), dict(bias={8: 1.}, presence=-1., top_k=5)))]
rs.append(Request([4]*70, max_tokens=2, score=2, stop_tokens=()))
got = []
for graphs in (False, True):
    e = Engine(m, TOK, max_rows=3, graphs=graphs, prefix_bytes=0); assert e.lag == int(graphs)
    ss = [e.submit(replace(r)) for r in rs]; steps = 0
    while e.busy: e.step(); steps += 1; ss[5].cancelled |= steps == 9
    assert not e.rows() and not e.pending; e.release(); assert e.nbytes() == 0
    got.append(ss)
for i, (a, b) in enumerate(zip(*got)):
    assert len({a.reason, b.reason}) == 1 or i == 5, (i, a.reason, b.reason)
    k = min(len(a.tokens), len(b.tokens)); assert a.tokens[:k] == b.tokens[:k] and (i == 5 or len(a.tokens) == len(b.tokens)), i
    if a.logprobs: torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-4, atol=1e-4)
    if a.scores: torch.testing.assert_close(torch.tensor([x for x, _ in a.scores[1:]]), torch.tensor([x for x, _ in b.scores[1:]]), rtol=1e-4, atol=1e-4); assert len(a.scores) == len(b.scores) == 70
    if a.state and i != 5:
        assert a.state.n == b.state.n
        for x, y in zip(a.state.tensors(), b.state.tensors()): torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
print('fine')"""

def interpreted(code, *args):
    p = python(f'import sys; sys.argv = {["-", *args]!r}\n' + code, TRITON_INTERPRET='1')
    out = p.communicate(timeout=900)[0]; print(out)
    assert p.returncode == 0 and out.endswith('fine\n'), out

@needs_triton
@pytest.mark.parametrize('kind', ['GL', 'nanochat'])
def test_decoding_step_interpreted(kind):
    "Few rows and many, of different lengths, one asleep"
    interpreted(STEP, '1,3', kind)

@needs_triton
def test_decoding_step_interpreted_odd():
    "Sizes that fill no block"
    interpreted(STEP, '3', 'odd')

@needs_triton
def test_sampling_interpreted(): interpreted(SAMPLE)

@pytest.mark.slow # test_decoding_step_interpreted and test_sampling_interpreted have its kernels
@needs_triton
def test_engine_on_kernels_interpreted():
    "The engine as on a GPU, results a step late: the same texts as with the plain forward"
    interpreted(ENGINE)

@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize('kind', ['GL', 'nanochat', 'odd', 'room', 'conversation', 'GGGL', 'gelu', 'wide', 'bfloat16'])
def test_decoding_step_interpreted_long(kind): interpreted(STEP, '1,2,3,6', kind)

def test_checked_once_a_node(tmp_path):
    "Two ranks ask at the same time: one checks, both get its answer"
    code = f'''
import nano_dh.kernels as N
check = N.check_backends
def counted(*a):
    open({str(tmp_path/'count')!r}, 'a').write('x')
    return check(*a)
N.check_backends = counted
print(N.choose_backend('cpu', 1, 2, 16, 16, seq_len=64).reason)'''
    outs = [finish(p) for p in [python(code, NANO_DH_BASE_DIR=str(tmp_path/'base')) for _ in range(2)]]
    assert len(set(outs)) == 1 and ': torch' in outs[0], outs
    assert (tmp_path/'count').read_text() == 'x'
    saved = json.loads(next((tmp_path/'base'/'backends').glob('*.json')).read_text())
    assert {'host', 'card', 'shape', 'versions', 'dtype', 'code'} <= set(saved['what'])

def test_environment_overrides(monkeypatch):
    monkeypatch.setenv('NANO_DH_BACKEND', 'torch_recurrent')
    assert N.choose_backend('cpu', 1, 2).reason == 'cpu: torch_recurrent, as asked, unchecked'
    assert N.current_backend() == 'torch_recurrent'
    monkeypatch.setenv('NANO_DH_BACKEND', 'torhc')
    with pytest.raises(ValueError, match="nearest: 'torch'"): N.choose_backend('cpu', 1, 2)
    N.set_backend()

def test_wrong_backends_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path))
    monkeypatch.setattr(N, 'BACKENDS', dict(N.BACKENDS))
    monkeypatch.setattr(N, '_chosen', {})
    def scaled(i, f): # the gradient of one input f times too long
        def run(*a):
            a = list(a); a[i] = a[i]*f - (a[i]*(f - 1)).detach()
            return N._torch(*a)
        return run
    for i, n in enumerate(('dq', 'dk', 'dv', 'dg', 'dbeta')): N.register_backend(f'wrong_{n}', scaled(i, 1.05))
    N.register_backend('nan', lambda *a: (N._torch(*a)[0]*torch.nan, N._torch(*a)[1]))
    def broken(*a): raise RuntimeError('a kernel that does not build')
    N.register_backend('broken', broken)
    N.register_backend('quicker_and_wrong', lambda q, k, v, g, b, S, *a: (v*1., S if a[2] else None))
    for dtype in (torch.float32, torch.bfloat16):
        c = N.choose_backend('cpu', 1, 2, 16, 16, seq_len=256, batch=2, dtype=dtype)
        why = {r['name']: r['why'] for r in c.table}
        assert c.name in ('torch', 'torch_recurrent') and not why['torch'] and not why['torch_recurrent'] # the quicker of the right ones
        for n in ('dq', 'dk', 'dv', 'dg', 'dbeta'): assert why[f'wrong_{n}'].startswith(f'{n} errs by 5.'), why
        assert 'inf' in why['nan'] and 'does not build' in why['broken'] and why['quicker_and_wrong']
        assert 'wrong_dv out: dv errs' in c.reason and 'passes' in str(c)

def test_hopper_trap_keeps_fla_out(monkeypatch):
    monkeypatch.setattr(N, 'find_spec', lambda p: None if p == 'tilelang' else object())
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d=None: (9, 0))
    monkeypatch.setattr(N, '_version', lambda p: '3.6.0')
    assert 'install flash-qla, or tilelang, or torch >= 2.12.1' in N.BACKENDS['fla'].ready('cuda')
    assert N.BACKENDS['flash_qla'].ready('cuda') == 'no tilelang (pip install flash-qla)'
    assert 'head dims 64 and 64' in N.BACKENDS['flash_qla'].fits('cuda', torch.bfloat16, 64, 64)
    assert not N.BACKENDS['fla'].fits('cuda', torch.bfloat16, 64, 64)
    monkeypatch.setattr(N, '_version', lambda p: '3.7.1')
    assert N.BACKENDS['fla'].ready('cuda') == ''

def test_layer_compiles_as_one_graph_for_all_documents():
    H, HV, D, B, T = 1, 2, 16, 2, 70
    C = (2*H + HV)*D
    def layer(x, w, g, beta, doc):
        q, k, v, _ = conv_split_norm(x, w, H, HV, D, D, None, doc)
        return N.gated_delta_rule(q, k, v, g, beta, output_state=False, doc_ids=doc)[0]
    torch.manual_seed(0); torch._dynamo.reset(); torch._dynamo.utils.counters.clear()
    xs = [x.requires_grad_() for x in (torch.randn(B, T, C), torch.randn(C, 4), -torch.rand(B, T, HV), torch.rand(B, T, HV))]
    fast = torch.compile(layer, fullgraph=True, backend='aot_eager')
    for cu in ((0, 70, 140), (0, 5, 70, 100, 140), (0, 69, 70, 71, 140)):
        doc = doc_ids_from(torch.tensor(cu), B, T)
        for a, b in zip(*(torch.autograd.grad(f(*xs, doc).square().sum(), xs) for f in (fast, layer))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1

def test_a_process_that_cannot_compile_ahead_says_so():
    "Here: no flash-qla, or no GPU of that number; the run goes on and its check decides"
    from nano_dh.kernels import Ahead
    call = ('flash_qla', 'forward', None, (1, 64), (1, 2, 128, 128), 'docs', 'bfloat16', 99)
    ahead = Ahead('flash_qla', [call, call])
    lines = ahead.wait()
    assert len(lines) == 2 and all(l.startswith('flash_qla forward') and ': ' in l for l in lines), lines
    assert ahead.wait() == []

def test_a_process_that_never_ends_is_ended_and_named():
    "A kernel that never came back kept a chapter waiting for ever"
    from nano_dh.kernels import Ahead
    ahead = Ahead('flash_qla'); process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    ahead.running.append((('flash_qla', 'forward'), process, tempfile.TemporaryFile()))
    assert ahead.wait(.5) == ['flash_qla forward: ended, not done after 0 s'] and process.poll() is not None

def test_half_of_the_kernels_is_compiled_and_none_launched(monkeypatch):
    from nano_dh import kernels as k
    compiled = []
    class JITImpl:                     # as tilelang's: what compile returns is launched by calling it
        def compile(self, name): compiled.append(name); return lambda *args: pytest.fail(f'{name} launched')
    monkeypatch.setitem(sys.modules, 'tilelang', SimpleNamespace()); monkeypatch.setitem(sys.modules, 'tilelang.jit', SimpleNamespace(JITImpl=JITImpl))
    made = JITImpl.compile
    for half, names in ((0, ['b', 'd']), (1, ['a', 'c'])):
        compiled.clear(); JITImpl.compile = made; k._every_second(half)
        for name in 'abcd': JITImpl().compile(name)(1, 2)
        assert compiled == names

def test_a_backend_without_rivals_is_checked_once_for_all_shapes(tmp_path, monkeypatch):
    "Nothing is timed, so rows of another number and length ask no new question; rivals are timed at each shape"
    from nano_dh import kernels as k
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path))
    was = dict(k._chosen)
    monkeypatch.setattr(k, 'BACKENDS', {'torch': k.BACKENDS['torch']})
    a = k.choose_backend('cpu', 1, 1, 16, 16, seq_len=64, batch=1)
    b = k.choose_backend('cpu', 1, 1, 16, 16, seq_len=128, batch=3)
    assert a == b and len(list((tmp_path/'backends').glob('*.json'))) == 1 and a.table[0]['forward'] is None
    monkeypatch.undo(); monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path))
    c, d = (k.choose_backend('cpu', 1, 1, 16, 16, seq_len=T, batch=1) for T in (64, 128))
    assert len(list((tmp_path/'backends').glob('*.json'))) == 3 and any(r['forward'] for r in c.table)
    k._chosen.clear(); k._chosen.update(was)
