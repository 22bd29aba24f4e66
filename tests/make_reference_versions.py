"""Asks versions of nanochat (github.com/karpathy/nanochat) since its first what logits they give, and writes what tests/test_exchange.py
holds the import to.

    python tests/make_reference_versions.py --nanochat REPOSITORY     # a git directory with its history; float32 on the CPU, half a minute

Nothing of nanochat is copied: each commit is unpacked into a temporary folder, imported by a process of its own, filled with weights that
a generator of bits gives on any machine, and asked."""
import argparse, inspect, io, json, os, subprocess, sys, tarfile, tempfile
from pathlib import Path
import numpy as np, torch
from make_reference import numbers

FILE = Path(__file__).parent/'reference_nanochat_versions.json'
VERSIONS = dict(first='3a5e0bc', scalars='aa530cd', windows='b62a5bc', gates='85b3e95', softcap='aba30cb', march='6ed7d1d', smear='a825e63', july='92d63d4')
MODELS = dict(small=dict(sequence_len=128, vocab_size=265, n_layer=3, n_head=4, n_kv_head=4, n_embd=64),
              shared=dict(sequence_len=300, vocab_size=265, n_layer=4, n_head=6, n_kv_head=2, n_embd=96))
PATTERN, TOKENS = 'SSL', 128

def tokens() -> torch.Tensor: return torch.tensor((numbers([7, 1], 2*TOKENS)*265).astype(np.int64)).view(2, TOKENS)

def fill(named:dict): # name -> tensor of nanochat; every one of them, none zero
    "Numbers by name, in the size that training leaves"
    for i, n in enumerate(sorted(named)):
        u, t = (2*numbers([9, i], named[n].numel()) - 1)*3**.5, named[n]
        centre = dict(resid_lambdas=1.1, x0_lambdas=.15, smear_lambda=.5, backout_lambda=.3).get(n, 0.)
        size = .1 if 'lambda' in n or n.startswith('lm_head') else 1. if t.ndim < 2 or 'wte' in n or 'gate' in n else t.shape[1]**-.5
        t.copy_(torch.from_numpy((centre + size*u).astype(np.float32)).view(t.shape))

def ask(model:str) -> dict: # in a process that has one version first in its path; -O, since the first ones insist on bfloat16
    from nanochat.gpt import GPT, GPTConfig
    try:
        from nanochat import flash_attention
        flash_attention.USE_FA3 = False
        flash_attention._override_impl = 'sdpa'
    except ImportError: pass                                               # the first versions have none
    known = GPTConfig.__dataclass_fields__
    c = MODELS[model] | (dict(window_pattern=PATTERN) if 'window_pattern' in known else {})
    torch.manual_seed(0)
    m = GPT(GPTConfig(**c)); m.init_weights(); m.float()
    base = inspect.signature(m._precompute_rotary_embeddings).parameters['base'].default
    n = c['n_embd']//c['n_head']; angle = torch.arange(m.cos.shape[1])[:, None]/base**(torch.arange(0, n, 2)/n)
    assert (m.cos[0, :, 0] - angle.cos()).abs().max() < 4e-3              # the first ones round their tables to bfloat16
    m.cos, m.sin = (t[None, :, None] for t in (angle.cos(), angle.sin()))
    with torch.no_grad(): fill(m.state_dict())
    with torch.no_grad(), torch.autocast('cpu', enabled=False): z = m.float()(tokens())
    return dict(config=c, shapes={n: list(p.shape) for n, p in m.state_dict().items()}, rope_base=base,
                logits=z[:, ::16, ::24].float().tolist(), largest=z.abs().max().item())

def versions(repo:Path) -> dict:
    out, env = {}, os.environ | dict(NANOCHAT_DTYPE='float32', TORCHDYNAMO_DISABLE='1', OMP_NUM_THREADS='1')
    for name, commit in VERSIONS.items():
        with tempfile.TemporaryDirectory() as d:
            tar = subprocess.run(['git', f'--git-dir={repo}', 'archive', commit, 'nanochat'], capture_output=True, check=True).stdout
            tarfile.open(fileobj=io.BytesIO(tar)).extractall(d, filter='data')
            got = {}
            for m in MODELS:
                r = subprocess.run([sys.executable, '-O', __file__, '--ask', m], env=env | dict(PYTHONPATH=d), capture_output=True, text=True)
                if r.returncode: raise SystemExit(f'{name} {commit}: {r.stderr[-900:]}')
                got[m] = json.loads(r.stdout.splitlines()[-1])
        full = subprocess.run(['git', f'--git-dir={repo}', 'rev-parse', commit], capture_output=True, text=True, check=True).stdout.strip()
        out[name] = dict(commit=full, models=got); print(name, {m: round(g['largest'], 2) for m, g in got.items()}, flush=True)
    return out

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--nanochat', type=Path, help='a git directory of nanochat with its history'); parser.add_argument('--ask', help='for itself')
    a = parser.parse_args()
    if a.ask: print(json.dumps(ask(a.ask))); sys.exit()
    out = dict(source='github.com/karpathy/nanochat', command='python tests/make_reference_versions.py --nanochat REPOSITORY', torch=torch.__version__,
               versions=versions(a.nanochat.resolve()))
    FILE.write_text(json.dumps(out) + '\n'); print(f'{FILE.name}: {FILE.stat().st_size:,} bytes')
