"Both mixers: random pieces, ragged batches, compilation, number formats"
import random
import pytest, torch
from types import SimpleNamespace as NS
from nano_dh.chunked import doc_ids_from
from nano_dh.deltanet import Context, GatedDeltaNet, norm
from nano_dh.gated_attn import GatedAttention, Rope

CFG = dict(d_model=48, n_qk_head=1, n_v_head=2, head_k_dim=16, head_v_dim=16, conv_size=4, neg_eigval=True,
           n_head=4, n_kv_head=2, head_dim=16, qk_scale=1.2, attn_gate='elementwise', ve_gate_channels=12,
           has_value_embed=lambda i: i % 2 == 1)
ROPE = Rope(8, 1e5, 64).double()
KINDS = 'G', 'L', 'S'

def mixer(kind, idx=1, **kw):
    cfg, gen = NS(**{**CFG, **kw}), torch.Generator().manual_seed(3)
    m = GatedDeltaNet(cfg, idx) if kind == 'G' else GatedAttention(cfg, idx, window=13 if kind == 'S' else None)
    m.init_weights(gen)
    for n, p in m.named_parameters():
        if p.ndim > 1 and not p.any(): p.data.normal_(0, .2, generator=gen)
    return m.double()

def data(m, B, T, seed=0):
    gen = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)
    return norm(r(B, T, CFG['d_model'])), r(B, T, m.value_dim)

def context(pos, kv_len=0, **kw):
    return Context(torch.zeros(pos.shape, dtype=torch.long), pos, rope=ROPE(pos, int(pos.max()) + 1), kv_len=kv_len, **kw)

def whole(m, x, ve, **kw): return m(x, context(torch.arange(x.shape[1]).expand(len(x), -1), **kw), ve=ve)

@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_random_pieces(kind):
    "Any split of a text gives what the whole gives"
    m, rng = mixer(kind), random.Random(0)
    x, ve = data(m, 2, 140); ref = whole(m, x, ve)
    for _ in range(12):
        cuts = sorted({0, 140, *rng.sample(range(1, 140), rng.randint(0, 12))})
        s, out = m.init_state(2, 140, dtype=x.dtype), []
        for a, b in zip(cuts, cuts[1:]):
            out.append(m(x[:, a:b], context(torch.arange(a, b).expand(2, -1), b), s, ve[:, a:b]))
        torch.testing.assert_close(torch.cat(out, 1), ref, atol=1e-10, rtol=0)

@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_ragged_batch(kind):
    "Rows that advance by random amounts, zero among them, each as if alone; an idle row keeps every bit"
    B, total, rng = 3, 60, random.Random(1)
    m = mixer(kind); x, ve = data(m, B, total); ref = whole(m, x, ve)
    s, pos = m.init_state(B, total, dtype=x.dtype), [0]*B
    while min(pos) < total:
        n = [min(rng.choice([0, 0, 1, 3, 9]), total - p) for p in pos]; T = max(max(n), 1)
        at = torch.tensor([[p + t for t in range(T)] for p in pos])
        take = lambda t: torch.stack([torch.cat([t[b, p:p+k], t.new_full((T-k, t.shape[2]), 7.)])
                                      for b, (p, k) in enumerate(zip(pos, n))])
        old = [{k: v[b].clone() for k, v in vars(s).items()} for b in range(B)]
        y = m(take(x), context(at, min(max(pos) + T, total), lengths=torch.tensor(n)), s, take(ve))
        for b in range(B):
            torch.testing.assert_close(y[b, :n[b]], ref[b, pos[b]:pos[b]+n[b]], atol=1e-10, rtol=0)
            if n[b] == 0: assert all(torch.equal(v[b], old[b][k]) for k, v in vars(s).items())
            pos[b] += n[b]

@pytest.mark.parametrize('kind', KINDS)
def test_documents(kind):
    "Outputs and gradients of packed documents are those of the documents alone"
    m = mixer(kind); x, ve = data(m, 2, 70); cu = torch.tensor([0, 1, 33, 70, 135, 140, 140])
    at = torch.cat([torch.arange(b - a) for a, b in zip(cu, cu[1:])]).view(2, 70)
    y = m(x, context(at, cu_seqlens=cu, doc_ids=doc_ids_from(cu, 2, 70)), ve=ve)
    g = torch.autograd.grad(y.square().sum(), list(m.parameters()))
    ys = [whole(m, x.flatten(0, 1)[None, a:b], ve.flatten(0, 1)[None, a:b])[0] for a, b in zip(cu[:-2], cu[1:-1])]
    torch.testing.assert_close(y.flatten(0, 1), torch.cat(ys), atol=1e-10, rtol=0)
    for a, b in zip(g, torch.autograd.grad(sum(t.square().sum() for t in ys), list(m.parameters()))):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)

@pytest.mark.parametrize('kind', KINDS)
def test_fullgraph(kind):
    "One graph, no recompilation from batch to batch, with and without documents"
    m = mixer(kind).float(); torch._dynamo.reset()
    f = torch.compile(lambda x, pos, cu, ids: m(x, Context(pos, pos, cu, ids)), backend='aot_eager', fullgraph=True)
    x, pos = torch.randn(2, 64, 48), torch.arange(64).expand(2, -1)
    for docs in (False, True):
        for i in range(3):
            cu = torch.tensor([0, 5 + i, 64, 100 - i, 128, 128]) if docs else None
            ids = None if cu is None else doc_ids_from(cu, 2, 64)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                y = f(x, pos, cu, ids)
                y.sum().backward()
            torch.testing.assert_close(y, m(x, Context(pos, pos, cu, ids)), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('kind', KINDS)
def test_formats(kind):
    "bfloat16 stream over float32 weights, bfloat16 weights, and no memory at first"
    m = mixer(kind).float(); x, ve = data(m, 2, 40); ref = whole(m, x.float(), ve.float())
    for w in (m, mixer(kind).bfloat16()):
        y = whole(w, x.bfloat16(), ve.bfloat16())
        assert y.dtype == torch.bfloat16 and (y.float() - ref).norm() < .03*ref.norm()
    with torch.device('meta'): ghost = type(m)(NS(**CFG), 1)
    ghost.to_empty(device='cpu').init_weights(torch.Generator().manual_seed(3))
    assert all(torch.isfinite(p).all() for p in ghost.parameters())

@pytest.mark.parametrize('kind', KINDS)
def test_state_has_no_graph(kind):
    "Reading a long text with gradients on does not chain the pieces together"
    m = mixer(kind); x, ve = data(m, 1, 12); s = m.init_state(1, 12, dtype=x.dtype)
    for a, b in ((0, 5), (5, 6), (6, 12)): m(x[:, a:b], context(torch.arange(a, b)[None], b), s, ve[:, a:b])
    assert not any(t.requires_grad for t in vars(s).values())
