"Optimizer against PyTorch over more settings than the chapter shows, and what only shows over a whole step."
import itertools, pytest, torch
from torch import nn
from nano_dh.optim import (MuonAdamW, MuonOptions, NEWTON_SCHULZ, build_optimizer, muon_update, orthogonalize)

SHAPES = ((64, 32), (64, 32), (32, 64), (48, 48), (16, 128))
OFF = dict(equilibrate=False, renorm=False, beta2=0, cautious=False, scale_decay=False)

def pair(kind, ref, dtype=torch.float32, steps=8, **settings):
    "Largest difference to a PyTorch optimizer after some steps from equal gradients"
    gen = torch.Generator().manual_seed(0)
    init = [torch.randn(s, generator=gen, dtype=dtype) for s in SHAPES]
    A, B = ([nn.Parameter(w.clone()) for w in init] for _ in range(2))
    opt, ref = MuonAdamW([dict(kind=kind, params=A, names=list('abcde'), **settings)]), ref(B)
    for _ in range(steps):
        for a, b in zip(A, B): a.grad = torch.randn(a.shape, generator=gen, dtype=dtype); b.grad = a.grad.clone()
        opt.step(); ref.step()
    return max((a - b).abs().max().item() for a, b in zip(A, B))

@pytest.mark.parametrize('dtype,nesterov,wd', list(itertools.product([torch.float32, torch.float64], [True, False], [0., .1])))
def test_muon_equals_torch(dtype, nesterov, wd):
    o = MuonOptions(coefs=NEWTON_SCHULZ, safety=1., eps=0., ns_dtype=torch.bfloat16, nesterov=nesterov, **OFF)
    d = pair('muon', lambda W: torch.optim.Muon(W, lr=.02, weight_decay=wd, momentum=.95, nesterov=nesterov), dtype,
             lr=.02, momentum=.95, weight_decay=wd, options=o)
    print(f'{d:.1e}'); assert d < 1e-6

@pytest.mark.parametrize('dtype,eps', list(itertools.product([torch.float32, torch.float64], [1e-10, 1e-6])))
def test_adamw_equals_torch(dtype, eps):
    k = dict(lr=.01, betas=(.8, .95), eps=eps, weight_decay=.1)
    d = pair('adamw', lambda W: torch.optim.AdamW(W, **k), dtype, **k)
    print(f'{d:.1e}'); assert d < 1e-6

def naive_muon(p, g, mom, second, lr, mu, wd):
    "All extras, one matrix, as the chapter's text has them"
    m, n = p.shape
    mom += (1 - mu)*(g - mom); u = g + mu*(mom - g)
    u = u/u.norm(dim=1, keepdim=True)*u.norm()/m**.5
    u = orthogonalize(u[None])[0]
    u = u*(min(m, n)**.5/u.norm())
    v = u.square().mean(1, keepdim=True) if m >= n else u.square().mean(0, keepdim=True)
    second += .1*(v - second); w = u/second.sqrt(); w = w*(u.norm()/w.norm())
    lr = lr*max(1, m/n)**.5
    return p - lr*w - lr*wd*p*(w*p >= 0)

@pytest.mark.parametrize('shape', [(24, 8), (8, 24), (16, 16)])
def test_extras_against_naive(shape):
    torch.manual_seed(0); m, n = shape
    p = torch.randn(3, m, n, dtype=torch.float64); mom = torch.zeros_like(p)
    sec = torch.zeros(3, m, 1).double() if m >= n else torch.zeros(3, 1, n).double()
    ref = [(p[i].clone(), mom[i].clone(), sec[i].clone()) for i in range(3)]
    t = lambda x: torch.tensor(x, dtype=torch.float64)
    for _ in range(4):
        g = torch.randn_like(p)
        muon_update(p, g, mom, sec, t(.02), t(.9), t(.3), MuonOptions(ns_dtype=torch.float64))
        ref = [(naive_muon(q, g[i], a, b, .02, .9, .3), a, b) for i, (q, a, b) in enumerate(ref)]
    assert max((p[i] - ref[i][0]).abs().max() for i in range(3)) < 1e-12

class Tiny(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.wte, self.w = nn.Embedding(40, 32), nn.Linear(32, 32, bias=False)
        self.lm_head = nn.Linear(32, 40, bias=False); self.to(dtype)
    def forward(self, x): h = self.wte(x); return self.lm_head(h + self.w(h)).float()
    def param_roles(self): return {'wte.weight': 'embed', 'w.weight': 'matrix', 'lm_head.weight': 'lm_head'}

def losses(model, opt, steps=30, start=0, n=60):
    out, x = [], torch.randint(40, (4, 33), generator=torch.Generator().manual_seed(0))
    for i in range(start, start + steps):
        l = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        opt.zero_grad(set_to_none=i % 2 == 0); l.backward(); opt.schedule(i, n, warmup_steps=5); opt.step(); out.append(l.item())
    return out

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_trains_in_each_dtype(dtype):
    torch.manual_seed(0); m = Tiny(dtype); l = losses(m, build_optimizer(m, total_batch_size=2**15))
    assert l[-1] < .6*l[0] and m.w.weight.dtype == dtype

def test_resume_is_bitwise():
    def mk(): torch.manual_seed(0); m = Tiny(); return m, build_optimizer(m, total_batch_size=2**15)
    straight = losses(*mk(), 20)
    a, oa = mk(); first = losses(a, oa, 10)
    saved = {k: type(s)(s.tensor.clone(), s.global_shape, s.offset) for k, s in oa.checkpoint_state().items()}
    b, ob = mk(); b.load_state_dict(a.state_dict()); ob.load_checkpoint_state(saved)
    assert first + losses(b, ob, 10, 10) == straight

def test_clip_bounds_the_norm():
    torch.manual_seed(0); m = Tiny(); o = build_optimizer(m, clip=1e-3)
    losses(m, o, 1); g = sum((b.state['exp_avg' if 'exp_avg' in b.state else 'momentum']).square().sum() for b in o.buckets)
    assert g.sqrt() < 1.01e-3 and o.grad_norm > 1e-3

@pytest.mark.slow
def test_compiled_step_never_recompiles():
    torch.manual_seed(0); a, b = Tiny(), Tiny(); b.load_state_dict(a.state_dict())
    oa, ob = build_optimizer(a, compile=True, total_batch_size=2**15), build_optimizer(b, total_batch_size=2**15)
    seen = torch._dynamo.utils.counters['stats']
    la = losses(a, oa, 2); n = seen['unique_graphs']; la += losses(a, oa, 20, 2)
    assert seen['unique_graphs'] == n
    assert max(abs(x - y) for x, y in zip(la, losses(b, ob, 22))) < 1e-4
