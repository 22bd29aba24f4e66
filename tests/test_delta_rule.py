"Chunked against recurrent, in float64, over the whole grid of shapes, decays, states and borders."
import itertools, pytest, torch
from nano_dh.delta_rule import l2norm, recurrent_gated_delta_rule, delta_rule_step
from nano_dh.chunked import chunk_gated_delta_rule, doc_ids_from

B, K, V = 2, 8, 6

def inputs(T, R, decay, beta_max=2., H=2, seed=0, correlated=False):
    gen = torch.Generator().manual_seed(seed + 1000*T + R)
    rand = lambda *s: torch.rand(*s, dtype=torch.float64, generator=gen)
    randn = lambda *s: torch.randn(*s, dtype=torch.float64, generator=gen)
    HV = H*R
    q, k = l2norm(randn(B, T, H, K)), l2norm(randn(B, T, H, K) + 5*correlated*randn(B, 1, H, K))
    g = -(1 + 15*rand(HV)) * 10**(-3 + 2*rand(B, T, HV))          # A ~ U(1, 16), dt ~ logU(1e-3, 1e-1)
    if decay == '0': g = 0*g
    if decay == '-100': g = g.where(rand(B, T, HV) > .3, -100.)
    if decay == '-1000': g = 0*g - 1000
    beta = rand(B, T, HV) * beta_max
    return [x.requires_grad_() for x in (q, k, randn(B, T, HV, V), g, beta)]

def borders(T): return torch.tensor(sorted({0, T//3, T//2, T, T + T//5, 2*T - 1, 2*T}) + [2*T, 2*T])

def run(f, xs, weights, state=None, **kw):
    "Outputs and all gradients of one fixed weighted sum of outputs and final state"
    o, S = f(*xs, state, **kw)
    loss = (o * weights[0]).sum() + (0 if S is None else (S * weights[1]).sum())
    leaves = [*xs] + ([] if state is None else [state])
    return [o, S, *torch.autograd.grad(loss, leaves)]

def worst(xs, state=None, n=B, sizes=(None, 64), **kw):
    "Largest norm(difference) / (norm + 1) over outputs, final states and gradients, and over chunk sizes"
    weights = [torch.randn(s, dtype=torch.float64) for s in (xs[2].shape, (n, xs[2].shape[2], K, V))]
    ref = run(recurrent_gated_delta_rule, xs, weights, state, **kw)
    outs = [run(chunk_gated_delta_rule, xs, weights, state, chunk_size=C, **kw) for C in sizes]
    return max(((x - y).norm() / (x.norm() + 1)).item() for out in outs for x, y in zip(ref, out))

@pytest.mark.parametrize('R', [1, 2, 3])
@pytest.mark.parametrize('T', [1, 63, 64, 65, 200])
def test_chunked_equals_recurrent(T, R):
    for decay, with_state, docs in itertools.product(('init', '0', '-100'), (False, True), (False, True)):
        xs, cu = inputs(T, R, decay), borders(T) if docs else None
        n = len(cu) - 1 if docs else B
        state = torch.randn(n, 2*R, K, V, dtype=torch.float64, requires_grad=True) if with_state else None
        assert worst(xs, state, n, cu_seqlens=cu) <= 1e-10, (decay, with_state, docs)

@pytest.mark.parametrize('R', [1, 2, 3])
@pytest.mark.parametrize('T', [1, 63, 64, 65, 200])
def test_document_masks_equal_recurrent(T, R):
    for decay, C in itertools.product(('init', '0', '-100'), (16, 64)):
        xs, cu = inputs(T, R, decay), borders(T)
        w = [torch.randn(xs[2].shape, dtype=torch.float64)]
        ref = run(lambda *a: (recurrent_gated_delta_rule(*a, cu_seqlens=cu)[0], None), xs, w)
        for kw in (dict(cu_seqlens=cu), dict(doc_ids=doc_ids_from(cu, B, T))):
            out = run(lambda *a: chunk_gated_delta_rule(*a, output_state=False, chunk_size=C, **kw), xs, w)
            for x, y in zip(ref, out):
                if x is not None: assert (x - y).norm() <= 1e-10 * (x.norm() + 1)

@pytest.mark.parametrize('decay', ['init', '0'])
def test_correlated_keys_and_reflections(decay):
    xs = inputs(200, 2, decay, correlated=True)
    xs[4] = (2 - .01*xs[4]).detach().requires_grad_()
    assert worst(xs) <= 1e-10

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_finite_at_minus_1000(dtype):
    xs = [x.detach().to(dtype).requires_grad_() for x in inputs(130, 2, '-1000')]
    state = torch.randn(B, 4, K, V, dtype=dtype, requires_grad=True)
    cu = borders(130)
    for kw in (dict(state=state), dict(output_state=False), dict(cu_seqlens=cu, output_state=False)):
        o, S = chunk_gated_delta_rule(*xs, **kw)
        leaves = xs + ([state] if 'state' in kw else [])
        for x in (o, *torch.autograd.grad(o.sum() + (0 if S is None else S.sum()), leaves)): assert x.isfinite().all()

@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_minus_infinity_wipes_the_memory(dtype, tol):
    "At the first and last token, at chunk borders, twice in a row, everywhere; with states, documents and masks"
    for where in ([0], [129], [31, 32, 63, 64], [*range(130)], [5, 6, 100]):
        xs = [x.detach().to(dtype) for x in inputs(130, 2, 'init')]
        xs[3][:, where, ::2] = -torch.inf
        xs, cu, n = [x.requires_grad_() for x in xs], borders(130), len(borders(130)) - 1
        state = lambda n: torch.randn(n, 4, K, V, dtype=dtype, requires_grad=True)
        assert worst(xs) <= tol and worst(xs, state(B)) <= tol and worst(xs, state(n), n, cu_seqlens=cu) <= tol, where
        o = recurrent_gated_delta_rule(*xs, cu_seqlens=cu)[0]
        torch.testing.assert_close(chunk_gated_delta_rule(*xs, cu_seqlens=cu, output_state=False)[0], o, rtol=0, atol=tol)

def test_float32_pieces_and_steps_agree():
    xs = [x.detach().float() for x in inputs(100, 2, '-100')]
    whole, S = chunk_gated_delta_rule(*xs)
    state, out = None, []
    for a, b in ((0, 37), (37, 38), (38, 90)):
        o, state = chunk_gated_delta_rule(*(x[:, a:b] for x in xs), state); out.append(o)
    for t in range(90, 100):
        o, state = delta_rule_step(*(x[:, t] for x in xs), state); out.append(o[:, None])
    assert (torch.cat(out, 1) - whole).abs().max() < 5e-6 and (state - S).abs().max() < 5e-6

@pytest.mark.parametrize('docs', [False, True])
def test_traces_without_a_graph_break(docs):
    xs = [x.detach().float().requires_grad_() for x in inputs(96, 2, 'init')]
    cu = torch.tensor([0, 40, 96, 150, 192, 192]) if docs else None
    f = lambda *a: chunk_gated_delta_rule(*a, cu_seqlens=cu, output_state=False)[0]
    torch._dynamo.reset()
    o, c = f(*xs), torch.compile(f, fullgraph=True, backend='aot_eager', dynamic=False)(*xs)
    torch.testing.assert_close(o, c)
    for a, b in zip(torch.autograd.grad(o.square().sum(), xs), torch.autograd.grad(c.square().sum(), xs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

@pytest.mark.slow
def test_compiles_with_inductor():
    xs = [x.detach().float().requires_grad_() for x in inputs(96, 2, 'init')]
    f = lambda *a: chunk_gated_delta_rule(*a)
    torch._dynamo.reset()
    (o, S), (oc, Sc) = f(*xs), torch.compile(f, fullgraph=True, dynamic=False)(*xs)
    torch.testing.assert_close(o, oc, rtol=1e-4, atol=1e-5); torch.testing.assert_close(S, Sc, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(o.square().sum(), xs), torch.autograd.grad(oc.square().sum(), xs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
