"""Measures nanochat's own model and optimizer (github.com/karpathy/nanochat) and writes what tests/test_reference.py holds the preset `nanochat` to.

    python tests/make_reference.py --nanochat PATH        # a clean checkout; float32 on the CPU, half a minute

Nothing of nanochat is copied: it is imported from PATH, filled with weights that a generator of bits gives on any machine and with any
version of torch, and asked for losses, gradients and steps. The same functions then measure nano_dh."""
import argparse, hashlib, json, math, os, re, subprocess, sys
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F

FILE = Path(__file__).parent/'reference_nanochat_d8.json'
DEPTH, VOCAB, ROWS, TOKENS, SEED = 8, 512, 2, 256, 20
CASES = dict(SSSL=dict(pattern='SSSL'), L=dict(pattern='L'), narrow=dict(pattern='SSSL', d_model=256, head_dim=64))
RATES = dict(unembedding_lr=.008, embedding_lr=.3, matrix_lr=.02, scalar_lr=.5, weight_decay=.28)
STEPS = ((.1, .85), (.2, .88), (.3, .91))          # of three steps: part of the learning rates, Muon's momentum
KINDS = {'value_embeds': 'value_embeds', 'mixer.c_proj': 'attn_c_proj', 'mlp.c_proj': 'mlp_c_proj'}  # a piece of the name -> kind

def kind(name:str) -> str: # of a parameter, by nano_dh's name for it
    for piece, k in KINDS.items():
        if piece in name: return k
    return name.removesuffix('.weight').split('.')[-1]

def ours(name:str) -> str: # nano_dh's name for a parameter of nanochat
    for a, b in (('transformer.wte', 'wte'), ('transformer.h', 'blocks'), ('.attn.', '.mixer.')): name = name.replace(a, b)
    return name

def numbers(seed, n:int) -> np.ndarray: # n float64 between 0 and 1
    "From raw bits, whose stream NumPy promises to keep"
    return (np.random.PCG64(seed).random_raw(n) >> np.uint64(11)) * 2.**-53

def weights(shapes:dict, width:int) -> dict: # nano_dh's names -> float32 arrays
    "Every parameter, none of them zero: a gradient that a zero hides cannot be compared"
    unit = width**-.5
    centre = dict(resid_lambdas=1.1, x0_lambdas=.15, smear_lambda=.5, backout_lambda=.3)
    spread = dict(wte=.8, lm_head=.1, c_fc=.6*unit, attn_c_proj=.5*unit, mlp_c_proj=.5*unit, smear_gate=.3, ve_gate=.3,
                  resid_lambdas=.05, x0_lambdas=.05, smear_lambda=.05, backout_lambda=.05)
    def draw(i, name):
        u = (2*numbers([SEED, i], math.prod(shapes[name])) - 1) * 3**.5
        return (centre.get(kind(name), 0.) + spread.get(kind(name), unit)*u).astype(np.float32).reshape(shapes[name])
    return {name: draw(i, name) for i, name in enumerate(sorted(shapes))}

def checksum(weights:dict) -> str: return hashlib.sha256(b''.join(weights[n].tobytes() for n in sorted(weights))).hexdigest()

def batch() -> tuple: # tokens and targets, (ROWS, TOKENS) each
    ids = torch.tensor((numbers([SEED, 10**6], ROWS*(TOKENS + 1))*VOCAB).astype(np.int64)).view(ROWS, TOKENS + 1)
    x, y = ids[:, :-1].clone(), ids[:, 1:].clone()
    y[0, 100:110] = -1                                                     # not counted
    return x, y

def seen(t:torch.Tensor, name:str) -> np.ndarray: # length, and products with two directions that belong to the name
    t = t.detach().double().flatten().numpy()
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'big')
    return np.array([np.linalg.norm(t)] + [t @ ((2*numbers([key, j], t.size) - 1)*3**.5) for j in (0, 1)])

def by_kind(tensors:dict) -> dict: # kind -> length and products of all its tensors together
    out = {}
    for n, t in tensors.items():
        a, b = out.get(kind(n), np.zeros(3)), seen(t, n)
        out[kind(n)] = np.array([math.hypot(a[0], b[0]), *(a + b)[1:]])
    return {k: v.tolist() for k, v in sorted(out.items())}

def backed_out(streams:list, head:torch.Tensor, weight:float) -> int: # after which block the subtracted stream was kept
    off = [(F.rms_norm(streams[-1] - weight*s, (s.shape[-1],)) - head).abs().max().item() for s in streams]
    return int(np.argmin(off))

def measure(model, named:dict, blocks, head:list, windows:list) -> dict: # named: nano_dh's names -> parameters; head: fills with the head's input
    "Loss, gradients and stream of one batch"
    streams, first, hooks = [], [], [b.register_forward_hook(lambda b, i, o: streams.append(o.detach())) for b in blocks]
    hooks += [blocks[0].register_forward_pre_hook(lambda b, i: first.append(i[0].detach()))]
    x, y = batch()
    model.zero_grad(); loss = model(x, targets=y); loss.backward()
    for h in hooks: h.remove()
    grads = {n: p.grad for n, p in named.items()}
    layer = lambda n: int(re.search(r'blocks\.(\d+)', n)[1])
    fc = sorted((n for n in grads if kind(n) == 'c_fc'), key=layer)
    at = backed_out(streams, head[0], named['backout_lambda'].item())
    return dict(loss=loss.item(), windows=windows, backout_layer=at, gradients=by_kind(grads), c_fc={n: seen(grads[n], n).tolist() for n in fc},
                into_first_block=seen(first[0], 'first').tolist(), after_block=[seen(s, f'stream {i}').tolist() for i, s in enumerate(streams)],
                kept_for_backout=float(np.linalg.norm(streams[at].double().numpy())), into_head=seen(head[0], 'head').tolist())

def ranges(named:dict) -> dict: # kind -> how its initial values lie
    out = {}
    for k in sorted({kind(n) for n in named}):
        v = torch.cat([p.detach().flatten().double() for n, p in named.items() if kind(n) == k])
        out[k] = dict(numel=v.numel(), mean=v.mean().item(), std=v.std(correction=0).item(), min=v.min().item(), max=v.max().item())
    return out

def steps(model, named:dict, groups:list, step) -> dict: # groups: param_groups of an optimizer; step: its method
    "Losses before each of three steps and after them, and how far the parameters went"
    x, y = batch(); start, losses = {n: p.detach().clone() for n, p in named.items()}, []
    rates = [g['lr'] for g in groups]
    for part, momentum in STEPS:
        for g, lr in zip(groups, rates):
            g['lr'] = lr*part
            if g['kind'] == 'muon': g['momentum'] = momentum
        model.zero_grad(); loss = model(x, targets=y); loss.backward(); step(); losses.append(loss.item())
    with torch.no_grad(): losses.append(model(x, targets=y).item())
    return dict(losses=losses, moved=by_kind({n: named[n].detach() - start[n] for n in named}))

# ------------------------------------------------------------------------------------------------- nanochat
def theirs(path:Path, case:str): # model of a case, filled
    from nanochat.gpt import GPT, GPTConfig
    kw = CASES[case]; width = kw.get('d_model', 64*DEPTH); heads = width//kw.get('head_dim', 128)
    with torch.device('meta'):
        m = GPT(GPTConfig(sequence_len=TOKENS, vocab_size=VOCAB, n_layer=DEPTH, n_head=heads, n_kv_head=heads, n_embd=width,
                          window_pattern=kw['pattern']))
    m.to_empty(device='cpu'); torch.manual_seed(0); m.init_weights()
    drawn = ranges(dict((ours(n), p) for n, p in m.named_parameters()))
    named = {ours(n): p for n, p in m.named_parameters()}
    filled = weights({n: tuple(p.shape) for n, p in named.items()}, width)
    for n, p in named.items(): p.data.copy_(torch.from_numpy(filled[n]))
    return m, named, checksum(filled), drawn

def settings(optimizer, named:dict) -> list: # groups of nanochat's optimizer, as plain values
    names = {id(p): n for n, p in named.items()}
    keep = ('kind', 'lr', 'betas', 'eps', 'weight_decay', 'momentum', 'beta2')
    return [dict({k: g[k] for k in keep if k in g}, names=sorted(names[id(p)] for p in g['params'])) for g in optimizer.param_groups]

def norm_eps(norm) -> float: # what the norm adds to a mean square
    x = torch.full((1, 64), 1e-3)
    return ((x/norm(x)).double().square() - x.double().square()).mean().item()

def make(path:Path) -> dict:
    def git(*a): return subprocess.run(['git', '-C', path, *a], capture_output=True, text=True, check=True).stdout.strip()
    if changed := git('status', '--porcelain', '--untracked-files=no'):
        raise SystemExit(f'{path}: {len(changed.splitlines())} files differ from its commit, 0 may; take a clean checkout')
    os.environ |= dict(NANOCHAT_DTYPE='float32', TORCHDYNAMO_DISABLE='1'); sys.path.insert(0, str(path))
    from nanochat import flash_attention, gpt
    flash_attention.USE_FA3 = False                                        # SDPA, also where there is a GPU
    out = dict(source='github.com/karpathy/nanochat', commit=git('rev-parse', 'HEAD'), torch=torch.__version__, numpy=np.__version__,
               command='python tests/make_reference.py --nanochat PATH', dtype='float32', device='cpu', depth=DEPTH, vocab=VOCAB,
               rows=ROWS, tokens=TOKENS, seed=SEED, norm_eps=norm_eps(gpt.norm), rates=RATES, schedule=STEPS, cases={})
    lengths = (128, 256, 300, 512, 513, 1000, 1024, 2048, 4096, 5000)
    def short(n): return gpt.GPT._compute_window_sizes(None, gpt.GPTConfig(sequence_len=n))[0][0]
    out['short_window'] = {n: short(n) for n in lengths}
    out['value_embeds'] = {n: [i for i in range(n) if gpt.has_ve(i, n)] for n in (1, 2, 3, 8, 12)}
    for case in CASES:
        m, named, total, drawn = theirs(path, case)
        head = []; hook = m.lm_head.register_forward_pre_hook(lambda m, i: head.append(i[0].detach()))
        one = out['cases'][case] = dict(weights_sha256=total, **measure(m, named, m.transformer.h, head, [w for w, _ in m.window_sizes]))
        hook.remove()
        if case == 'SSSL':
            out['initial'] = drawn
            out['groups'] = settings(m.setup_optimizer(**RATES), named)
            twice = {k: v*2**.5 for k, v in RATES.items() if k != 'weight_decay'}  # what a batch of 2**20 tokens makes of the rates
            out['groups_of_twice_the_batch'] = settings(m.setup_optimizer(**twice), named)
        if case == 'narrow':
            opt = m.setup_optimizer(**RATES)
            one |= dict(groups=settings(opt, named)) | steps(m, named, opt.param_groups, opt.step)
    return out

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--nanochat', type=Path, required=True, help='a clean checkout of nanochat')
    FILE.write_text(json.dumps(make(parser.parse_args().nanochat.resolve()), indent=1) + '\n')
    print(f'{FILE.name}: {FILE.stat().st_size:,} bytes')
