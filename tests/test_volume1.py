"Volume 1 alone: its modules in a folder of their own train a model and sample from it, and compute what the whole package computes."
import ast, os, shutil, subprocess, sys
from pathlib import Path
import fresh, pyarrow.parquet as pq, pytest, torch

ROOT = Path(__file__).resolve().parent.parent
MODEL = 'core delta_rule chunked deltanet gated_attn hybrid_model generate'.split()      # what a model needs of volume 1

PROGRAM = '''
import sys, torch
sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]      # of a checkout elsewhere
import nano_dh, nano_dh.generate
from nano_dh.core import volume2
from nano_dh.hybrid_model import HybridConfig, HybridModel
where, text, out = sys.argv[1:]
assert nano_dh.__file__.startswith(where), nano_dh.__file__
torch.set_num_threads(1)
SMALL = dict(vocab_size=256, sequence_len=64, d_model=64, head_dim=32, head_k_dim=16, head_v_dim=16, window=20)
text = torch.frombuffer(bytearray(open(text, 'rb').read()), dtype=torch.uint8).long()
def batch(n, T, generator):
    at = torch.randint(0, len(text) - T - 1, (n, 1), generator=generator) + torch.arange(T + 1)
    return text[at[:, :-1]], text[at[:, 1:]]

def numbers(**kw): # of a model as if trained, in float64
    gen = torch.Generator().manual_seed(1)
    model = HybridModel(HybridConfig.from_depth(4, **{**SMALL, **kw})).double()
    for p in model.parameters(): p.data += .1*torch.randn(p.shape, generator=gen)
    x, y = batch(2, 50, gen); y[0, :9] = -1; cu = torch.tensor([0, 20, 50, 61, 100])
    found = dict(logits=model(x), rows=model(x, targets=y, reduction='none'), packed=model(x, cu_seqlens=cu))
    loss = model(x, targets=y) + model(x, targets=y, cu_seqlens=cu)
    found |= {f'grad {n}': g for (n, p), g in zip(model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())))}
    state = model.init_state(2, 8)
    found['pieces'] = torch.cat([model(part, state=state) for part in (x[:, :30], *x[:, 30:34].split(1, 1), x[:, 34:])], 1)
    found['said'] = torch.tensor(model.generate(x[0, :5].tolist(), 12, temperature=0))
    return {n: t.detach() for n, t in found.items()}

def train(steps=40):
    model, gen, losses = HybridModel(HybridConfig.from_depth(4, **SMALL)), torch.Generator().manual_seed(0), []
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        x, y = batch(4, 64, gen); loss = model(x, targets=y)
        opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    return losses, model.generate(list(b'The '), 20)

losses, sample = train()
kinds = dict(GGGL={}, G=dict(pattern='G', neg_eigval=True), nanochat=dict(preset='nanochat'), conversation=dict(preset='conversation', vocab_size=256, pattern='GL'))
torch.save(dict(volume2=volume2(), losses=losses, sample=sample, kinds={n: numbers(**kw) for n, kw in kinds.items()}), out)
'''

def run(where, tmp, name):
    text, out = tmp/'text', tmp/f'{name}.pt'
    if not text.exists():
        books = pq.read_table(ROOT/'nano_dh/data/sample_train.parquet', columns=['text'])['text']
        text.write_text(''.join(books[:5].to_pylist()))
    env = os.environ | dict(PYTHONPATH=str(where), OMP_NUM_THREADS='1')
    p = fresh.run([sys.executable, '-c', PROGRAM, str(where), str(text), str(out)], capture_output=True, text=True, env=env, cwd=tmp)
    assert p.returncode == 0, p.stderr[-3000:]
    return torch.load(out)

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('volume1'); home = tmp/'alone'/'nano_dh'; home.mkdir(parents=True)
    for name in ('__init__', *MODEL): shutil.copy(ROOT/'nano_dh'/f'{name}.py', home)
    return tmp, run(home.parent, tmp, 'alone')

def test_it_trains_and_samples(alone):
    found = alone[1]
    assert not found['volume2']
    first, last = (sum(l)/5 for l in (found['losses'][:5], found['losses'][-5:]))
    assert abs(found['losses'][0] - torch.tensor(256.).log()) < .01 and last < first - 1.5, found['losses']
    assert len(found['sample']) == 20 and all(0 <= t < 256 for t in found['sample'])

def test_the_whole_package_computes_the_same(alone):
    tmp, mine = alone
    whole = run(ROOT, tmp, 'whole')
    assert whole['volume2']
    for kind, found in mine['kinds'].items():
        for name, a in found.items():
            b = whole['kinds'][kind][name]
            assert a.shape == b.shape and (a - b).abs().max() <= 1e-10*max(1, b.abs().max()), (kind, name, (a - b).abs().max())
    torch.testing.assert_close(torch.tensor(mine['losses'][:10]), torch.tensor(whole['losses'][:10]), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('name', MODEL)
def test_no_import_of_volume_2(name):
    tree = ast.parse((ROOT/'nano_dh'/f'{name}.py').read_text())
    used = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level and not n.module for a in n.names}
    used |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level and n.module}
    assert used <= set(MODEL), f'{name} imports {used - set(MODEL)}'
