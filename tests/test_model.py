"The whole model beyond the chapter: random splits, compiled graphs, devices that come later, number formats, captured-style states."
import json, random
import pytest, torch, torch.nn.functional as F
from nano_dh.hybrid_model import (HybridConfig, HybridModel, MIXERS, PRESETS, generate, linear_cross_entropy, register_mixer,
                                  softcapped)

TINY = dict(vocab_size=300, sequence_len=64, d_model=128, head_dim=32, head_k_dim=32, head_v_dim=32, window=24)
KINDS = dict(GGGL={}, L=dict(pattern='L'), SSSL=dict(pattern='SSSL'), G=dict(pattern='G', neg_eigval=True),
             nanochat=dict(preset='nanochat'), nanochat_L=dict(preset='nanochat', pattern='L'),
             conversation=dict(preset='conversation'), partial=dict(pos='partial', attn_gate='elementwise', kv_group=2, activation='gelu'))
kinds = pytest.mark.parametrize('kind', KINDS)

def make(kind, noise=.1, dtype=torch.float64, **kw):
    m, g = HybridModel(HybridConfig.from_depth(4, **{**KINDS[kind], **TINY, **kw})).to(dtype), torch.Generator().manual_seed(1)
    for p in m.parameters(): p.data += noise*torch.randn(p.shape, generator=g).to(dtype)
    return m
def tokens(*shape, seed=0, n=300): return torch.randint(0, n, shape, generator=torch.Generator().manual_seed(seed))

@kinds
def test_random_pieces(kind):
    m, x, rng = make(kind).requires_grad_(False), tokens(3, 150), random.Random(0)
    full = m(x)
    for trial in range(5):
        cuts = sorted(rng.sample(range(1, 150), rng.randint(1, 12)))
        s = m.init_state(3, rng.choice((1, 40, 200)))
        y = torch.cat([m(p, state=s) for p in x.tensor_split(cuts, 1)], 1)
        assert (y - full).abs().max() < 1e-9, cuts
        assert s.n == 150 and s.pos.tolist() == [150]*3 and s.capacity >= 150

@kinds
def test_ragged_rows(kind):
    "Rows advance by 0, 1, 5 or 17 tokens at a time, each at its own pace"
    m, x, rng = make(kind).requires_grad_(False), tokens(4, 200), random.Random(1)
    full, s, at = m(x), m.init_state(4, 4), [0]*4
    while max(at) <= 200 - 17:
        n = [rng.choice((0, 1, 5, 17)) for _ in at]; T = max(n + [1])
        piece = torch.stack([F.pad(x[i, a:a+k], (0, T - k), value=7) for i, (a, k) in enumerate(zip(at, n))])
        y = m(piece, state=s, lengths=torch.tensor(n))
        for i, (a, k) in enumerate(zip(at, n)):
            if k: assert (y[i, :k] - full[i, a:a+k]).abs().max() < 1e-9
        at = [a + k for a, k in zip(at, n)]
        assert s.pos.tolist() == at

@kinds
def test_idle_row_keeps_every_bit(kind):
    m, x = make(kind).requires_grad_(False), tokens(2, 30)
    s = m.init_state(2, 64); m(x[:, :20], state=s)
    before = s.select(torch.tensor([1])).tensors()
    m(x[:, 20:], state=s, lengths=torch.tensor([10, 0]))
    for a, b in zip(before, s.select(torch.tensor([1])).tensors()):
        if a.ndim == 4 and a.shape[1] == 64: a, b = a[:, :20], b[:, :20]      # slots in use
        assert torch.equal(a, b)

@kinds
def test_documents_are_alone(kind):
    m, x = make(kind), tokens(2, 100)
    cu = torch.tensor([0, 1, 33, 100, 150, 200, 200, 200], dtype=torch.int32)
    flat = x.flatten()
    loss = m(x, targets=x, cu_seqlens=cu, reduction='sum')
    grads = torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
    parts = sum(m(flat[None, a:b], targets=flat[None, a:b], reduction='sum') for a, b in zip(cu.tolist(), cu.tolist()[1:]) if b > a)
    other = torch.autograd.grad(parts, list(m.parameters()), allow_unused=True)
    assert abs(loss - parts) < 1e-8
    for a, b in zip(grads, other):
        if a is not None: assert (a - b).norm() < 1e-9*(1 + b.norm())
    with pytest.raises(ValueError, match='its own row'): m(x, cu_seqlens=cu, state=m.init_state(2, 100))

@kinds
def test_state_in_place_and_fixed(kind):
    "No buffer moves while it is large enough; n=None reads every slot and refuses to grow"
    m, x = make(kind).requires_grad_(False), tokens(2, 40)
    s = m.init_state(2, 40); s.n = None
    where = [t.data_ptr() for t in s.tensors()]
    y = torch.cat([m(x[:, :1], state=s)] + [m(x[:, i:i+1], state=s) for i in range(1, 40)], 1)
    assert where == [t.data_ptr() for t in s.tensors()]
    assert (y - m(x)).abs().max() < 1e-9
    with pytest.raises(ValueError, match='capacity 40 is fixed'): m(tokens(2, 41), state=s)

@kinds
def test_meta_then_empty_is_direct(kind):
    cfg = HybridConfig.from_depth(4, **{**KINDS[kind], **TINY})
    a = HybridModel(cfg, seed=5)
    with torch.device('meta'): b = HybridModel(HybridConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))))
    b.to_empty(device='cpu'); b.init_weights(5)
    for (n, p), (k, q) in zip(a.state_dict().items(), b.state_dict().items()): assert n == k and torch.equal(p, q)
    x = tokens(2, 64); assert torch.equal(a(x), b(x))
    c = HybridModel(cfg, seed=6); c.load_state_dict(a.state_dict()); assert torch.equal(a(x), c(x))

@kinds
def test_counts_are_those_of_the_tensors(kind):
    m = make(kind); c = m.param_counts()
    pad = sum((len(w) - 300)*w.shape[1] for w in [m.wte.weight, *(e.weight for e in m.value_embeds.values())] +
              ([] if m.cfg.tie_embeddings else [m.lm_head.weight]))
    assert c['total'] == sum(p.numel() for p in m.parameters()) - pad
    assert m.state_bytes(77, 3) == m.init_state(3, 77).nbytes()
    assert set(m.param_roles()) == {n for n, _ in m.named_parameters()}
    assert set(m.param_roles().values()) <= {'matrix', 'embed', 'value_embed', 'lm_head', 'resid', 'x0', 'delta', 'conv', 'norm', 'small'}
    for n, r in m.param_roles().items():
        if r == 'matrix': p = m.get_parameter(n); assert p.ndim == 2 and min(p.shape) >= 32, n

@pytest.mark.parametrize('depth,n', [(12, 286_261_730), (20, 896_533_746)])
@pytest.mark.parametrize('pattern', ['L', 'SSSL'])
def test_preset_has_the_exact_count(depth, n, pattern):
    with torch.device('meta'): m = HybridModel(HybridConfig.from_depth(depth, pattern, preset='nanochat', vocab_size=32768))
    assert m.param_counts()['total'] == n == sum(p.numel() for p in m.parameters())

@pytest.mark.parametrize('depth', [4, 8, 12, 20])
def test_patterns_match_within_two_percent(depth):
    sizes = []
    for kw in (dict(), dict(pattern='L'), dict(pattern='SSSL'), dict(pattern='G'), dict(preset='nanochat')):
        with torch.device('meta'): sizes.append(HybridModel(HybridConfig.from_depth(depth, **kw)).param_counts()['scaling'])
    assert max(sizes) < 1.02*min(sizes)

@pytest.mark.parametrize('kind', ['GGGL', 'SSSL', 'nanochat'])
@pytest.mark.parametrize('docs', [False, True])
def test_one_graph(kind, docs):
    "No graph break, same loss and gradients; the compiler's back end is left out, it takes minutes"
    m, x = make(kind, dtype=torch.float32), tokens(2, 64)
    kw = dict(cu_seqlens=torch.tensor([0, 30, 64, 90, 128], dtype=torch.int32)) if docs else {}
    f = torch.compile(m, fullgraph=True, backend='aot_eager')
    a, b = m(x, targets=x, **kw), f(x, targets=x, **kw)
    ps = [p for p in m.parameters() if p.requires_grad]
    assert abs(a - b) < 1e-5
    for g, h in zip(*(torch.autograd.grad(l, ps, allow_unused=True) for l in (a, b))):
        if g is not None: assert (g - h).norm() <= 1e-4*(1e-3 + g.norm())
    torch._dynamo.reset()

def test_sampling_past_the_table_leaves_training_alone():
    m = make('nanochat', dtype=torch.float32)
    assert len(generate(m, [1, 2], 80)) == 80                 # sequence_len is 64
    m(tokens(1, 64), targets=tokens(1, 64, seed=1)).backward()
    assert m.rope.table.shape[1] >= 82 and all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)

def test_bfloat16_stream_over_float32_weights():
    m, x = make('GGGL', dtype=torch.float32), tokens(2, 64)
    want = m(x); m.compute_dtype = torch.bfloat16
    got = m(x)
    assert m.stream(x).dtype == torch.bfloat16 and got.dtype == torch.float32
    assert (got - want).norm() < .05*want.norm()
    m(x, targets=x).backward()
    assert all(p.grad.dtype == torch.float32 for p in m.parameters() if p.grad is not None)
    s = m.init_state(2, 64); assert s.layers[0].S.dtype == torch.float32 and s.layers[0].conv.dtype == torch.bfloat16
    assert s.nbytes() == m.state_bytes(64, 2)

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('cap', [15., 0., 40.])
def test_loss_against_the_plain_one(reduction, cap):
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 50, 16), (128, 16)))
    y = torch.randint(-1, 100, (3, 50)); y[0] = -1
    z = softcapped(x @ w.T, cap)[..., :100]
    want = F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-1, reduction=reduction)
    got = linear_cross_entropy(x, w, y, cap, reduction, 100, chunk=17)
    assert torch.allclose(got.flatten(), want.flatten(), atol=1e-12)
    c = torch.rand_like(want)
    for a, b in zip(*(torch.autograd.grad((l.flatten()*c.flatten()).sum(), (x, w)) for l in (got, want))):
        assert torch.allclose(a, b, atol=1e-12)
    assert linear_cross_entropy(x, w, torch.full_like(y, -1), cap).item() == 0.

def test_large_uncapped_scores_stay_finite():
    x, w = torch.full((4, 8), 100., requires_grad=True), torch.full((70, 8), 100.)
    w[3] *= -1
    for cap in (0., 15., 1000.):
        l = linear_cross_entropy(x, w, torch.tensor([0, 1, 3, 3]), cap)
        assert torch.isfinite(l) and torch.isfinite(torch.autograd.grad(l, x)[0]).all()

def test_padded_rows_never_sampled():
    m = make('GGGL', dtype=torch.float32)
    with torch.no_grad(): m.lm_head.weight[300:] = 50.
    assert m(tokens(1, 8)).shape[-1] == 300
    assert max(generate(m, [1], 50, top_k=0, temperature=3.)) < 300

def test_last_only_and_lengths():
    m, x = make('GGGL').requires_grad_(False), tokens(2, 20)
    s = m.init_state(2, 20); n = torch.tensor([5, 20])
    y = m(x, state=s, lengths=n, last_only=True)
    full = m(x)
    assert y.shape == (2, 1, 300) and (y[0, 0] - full[0, 4]).abs().max() < 1e-9 and (y[1, 0] - full[1, 19]).abs().max() < 1e-9

@pytest.mark.parametrize('kw,text', [
    (dict(n_head=9, n_kv_head=4), 'n_kv_head 4 does not divide n_head 9; nearest: 3, 9'),
    (dict(n_v_head=6, n_qk_head=4), 'n_qk_head 4 does not divide n_v_head 6; nearest: 3, 6'),
    (dict(pattern='GGGX'), "pattern 'GGGX': known letters: G, L, S"), (dict(attn_gate='headwize'), 'nearest: headwise'),
    (dict(pos='rope'), 'known: none, partial, full'), (dict(vocab_size=0), 'vocab_size 0: must be positive'),
    (dict(head_dim=0), 'head_dim 0'), (dict(sequence_len=-1), 'sequence_len -1: must be positive')])
def test_bad_configurations(kw, text):
    with pytest.raises(ValueError) as e: HybridConfig.from_depth(4, **kw)
    assert text in str(e.value) and '\n' not in str(e.value)

def test_unknown_names():
    with pytest.raises(NameError, match='n_kv_head'): HybridConfig.from_depth(4, n_kv_heads=2)
    with pytest.raises(ValueError, match='known: nanochat, conversation'): HybridConfig.from_depth(4, preset='gpt')
    with pytest.raises(TypeError, match='vocab_size'): HybridConfig.from_depth(4, vocab_size='big')
    with pytest.raises(ValueError, match='one upper-case letter'): register_mixer('g', None)

def test_learns():
    torch.manual_seed(0)
    x = tokens(4, 1, n=300) + torch.arange(65)                 # counting, modulo the vocabulary
    x %= 300
    for kw in KINDS.values():
        m = HybridModel(HybridConfig.from_depth(2, **{**kw, **TINY})); opt = torch.optim.Adam(m.parameters(), lr=5e-3)
        for _ in range(25):
            loss = m(x[:, :-1], targets=x[:, 1:]); opt.zero_grad(); loss.backward(); opt.step()
        assert loss < 2.5, (kw, loss.item())

@pytest.mark.parametrize('pattern, preset', (('GGGL', None), *(pytest.param(*kind, marks=pytest.mark.slow) for kind in (('SSSL', 'nanochat'), ('GGGL', 'conversation')))))
def test_gradient_check_in_bfloat16(pattern, preset):
    "No false alarm where rounding is large, and a gradient that is a fifth too long is found in it"
    from nano_dh.gradient_check import check_gradients
    size = dict(vocab_size=256, sequence_len=128, d_model=128, head_dim=32, head_k_dim=32, head_v_dim=32)
    m = HybridModel(HybridConfig.from_depth(4, pattern, preset, **size)); m.compute_dtype = torch.bfloat16
    x, y = torch.randint(0, 256, (2, 8, 128), generator=torch.Generator().manual_seed(0))
    cu = torch.tensor([0, *(i*128 + b for i in range(8) for b in (50, 128))], dtype=torch.int32)
    torch._dynamo.reset(); f = torch.compile(m, fullgraph=True, dynamic=False, backend='aot_eager')
    seen = check_gradients(m, f, x, y, cu_seqlens=cu); seen.refuse()
    assert 1e-3 < sorted(r['noise'] for r in seen.rows)[len(seen.rows)//2] < .05 and m.compute_dtype == torch.bfloat16
    def longer(*args, **kw): return 1.2*m(*args, **kw)
    assert len(check_gradients(m, longer, x, y).wrong()) > .9*len(seen.rows)
