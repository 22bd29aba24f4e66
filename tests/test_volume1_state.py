"Volume 1's optimizer, loss and checkpoint without volume 2: five steps, saved, loaded in another process, continued; and the same weights as the whole package makes."
import os, shutil, subprocess, sys
from pathlib import Path
import fresh, pytest, torch

ROOT = Path(__file__).parents[1]
VOLUME1 = 'core delta_rule chunked deltanet gated_attn hybrid_model tokenizer optim loss_eval checkpoint'.split()

RUN = '''
import sys
sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]   # an editable install would lend its volume 2
import torch
from pathlib import Path
from nano_dh.hybrid_model import HybridConfig, HybridModel
from nano_dh.optim import build_optimizer
from nano_dh.checkpoint import latest_step, load_checkpoint, load_model, save_checkpoint
from nano_dh.loss_eval import evaluate_bpb
from nano_dh.tokenizer import Tokenizer
from nano_dh import chunked, deltanet, gated_attn, hybrid_model
from nano_dh.core import Replaceable, volume2
volume2()      # the plain layers here, for what is compared is the optimizer and the checkpoint; tests/test_volume1.py compares layers
for module in (chunked, deltanet, gated_attn, hybrid_model):
    for f in vars(module).values():
        if isinstance(f, Replaceable): f.now = f.plain
torch.set_num_threads(1); run, first, last, out = Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
tok = Tokenizer({bytes([i]): i for i in range(256)})
cfg = HybridConfig.from_depth(4, d_model=64, head_dim=32, head_k_dim=32, head_v_dim=32, vocab_size=tok.vocab_size, sequence_len=32)
model = HybridModel(cfg, first); torch.manual_seed(first); opt = build_optimizer(model, total_batch_size=2**13, clip=1.)
def batch(i): return torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(i))
if first: assert load_checkpoint(run, model, opt)['loader_state'] == dict(at=first)
noise = []
for i in range(first, last):
    x = batch(i); model(x[:, :-1], targets=x[:, 1:]).backward()
    opt.schedule(i, 20, warmup_steps=3); opt.step(); opt.zero_grad(); noise.append(torch.rand(1).item())
bpb = evaluate_bpb(model, [(batch(99)[:, :-1], batch(99)[:, 1:])], tok.token_bytes())
if not first: save_checkpoint(run, last, model, opt, tok, dict(at=last))
if not first: assert torch.equal(load_model(run, device='cpu')[0](x[:, :-1]), model.eval()(x[:, :-1])) and latest_step(run) == last
saved = {k: getattr(v, 'tensor', v) for k, v in opt.checkpoint_state().items()}
torch.save(dict(model=model.state_dict(), optim=saved, noise=noise, bpb=bpb.bpb, kind=type(opt).__name__,
                modules=sorted(m.removeprefix('nano_dh.') for m in sys.modules if m.startswith('nano_dh.'))), out)
'''

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "A folder with volume 1 in it"
    folder = tmp_path_factory.mktemp('volume1'); (folder/'nano_dh').mkdir()
    for name in ['__init__', *VOLUME1]: shutil.copy(ROOT/'nano_dh'/f'{name}.py', folder/'nano_dh')
    shutil.copytree(ROOT/'nano_dh'/'data', folder/'nano_dh'/'data')
    return folder

def ran(package, run, first, last, out): # in a fresh process; -> what it left
    env = os.environ | dict(PYTHONPATH=str(package), NANO_DH_BASE_DIR=str(run.parent/'base'))
    r = fresh.run([sys.executable, '-c', RUN, str(run), str(first), str(last), str(out)], env=env, cwd=run.parent, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return torch.load(out)

def same(a, b): assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

@pytest.fixture(scope='module')
def straight(alone, tmp_path_factory): # eight steps, then saved
    d = tmp_path_factory.mktemp('straight'); return ran(alone, d/'run', 0, 8, d/'out.pt')

def test_continued_is_going_on(alone, straight, tmp_path):
    "Five steps, a new process, three more: bitwise the eight in one go"
    first = ran(alone, tmp_path/'run', 0, 5, tmp_path/'a.pt'); rest = ran(alone, tmp_path/'run', 5, 8, tmp_path/'b.pt')
    same(rest['model'], straight['model']); same(rest['optim'], straight['optim'])
    assert first['noise'] + rest['noise'] == straight['noise']
    assert first['kind'] == 'MuonAdamW' and rest['bpb'] == straight['bpb'] and 7 < rest['bpb'] < 9
    assert not {*first['modules']} - {*VOLUME1}

def test_whole_package_makes_the_same(alone, straight, tmp_path):
    "Weights of the same eight steps"
    whole = ran(ROOT, tmp_path/'whole', 0, 8, tmp_path/'c.pt')
    assert whole['kind'] == 'ShardedMuonAdamW' and 'safe_checkpoint' in whole['modules']
    for k, v in whole['model'].items(): assert (v - straight['model'][k]).abs().max() < 1e-6, k

@pytest.mark.slow # what is written alone is read alone above, and the files are the same
def test_each_reads_what_the_other_wrote(alone, straight, tmp_path):
    ran(alone, tmp_path/'run', 0, 5, tmp_path/'d.pt'); ran(ROOT, tmp_path/'other', 0, 5, tmp_path/'e.pt')
    mixed = ran(ROOT, tmp_path/'run', 5, 8, tmp_path/'f.pt'), ran(alone, tmp_path/'other', 5, 8, tmp_path/'g.pt')
    for each in mixed:
        for k, v in each['model'].items(): assert (v - straight['model'][k]).abs().max() < 1e-6, k
