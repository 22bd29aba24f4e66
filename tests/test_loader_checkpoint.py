"Loader and checkpoints across processes: kills, fresh processes, other numbers of ranks."
import hashlib, json, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from nano_dh.checkpoint import (CheckpointError, checkpoints, find_checkpoint, latest_step,
                                load_checkpoint, save_checkpoint)
from nano_dh.dataloader import Loader, Packer, gather_state
from nano_dh.dataset import open_data
from nano_dh.hybrid_model import HybridConfig, HybridModel
from nano_dh.optim import build_optimizer
from nano_dh.tokenizer import Tokenizer

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
ENV = dict(os.environ, PYTHONPATH=f'{ROOT}:{HERE}', OMP_NUM_THREADS='1')
TOK = lambda: Tokenizer({bytes([i]): i for i in range(256)})
ROWS, T = 16, 128

def loader(rank=0, world=1, state=None): # short rows, three sources, borders
    mix = open_data(''); s = mix.sources[0]
    mix = SimpleNamespace(name='three', weights=[5, 3, 2], sources=[s, s, s])
    return Loader(mix, TOK(), batch_rows=ROWS, seq_len=T, rank=rank, world_size=world, state=state, documents=True)

def digest(b): return hashlib.sha256(b''.join(t.numpy().tobytes() for t in (b.x, b.y, b.cu_seqlens))).hexdigest()

def python(code, *args, **kw): # in a fresh interpreter
    return subprocess.run([sys.executable, '-c', f'from test_loader_checkpoint import *\n{code}', *map(str, args)],
                          env=ENV, capture_output=True, text=True, timeout=120, **kw)

def test_same_batches_after_a_kill(tmp_path):
    "20 batches straight; 8, kill -9 with two more in the queue, 12 in a fresh process: the same bytes"
    f = tmp_path/'state.json'
    r = python('''
l = loader()
for _ in range(8): print(digest(next(l)), flush=True)
Path(sys.argv[1]).write_text(json.dumps(l.state_dict())); os.kill(os.getpid(), 9)''', f)
    assert r.returncode == -signal.SIGKILL, r.stderr
    first = r.stdout.split(); assert len(first) == 8
    r = python('''
l = loader(state=json.loads(Path(sys.argv[1]).read_text()))
print(*(digest(next(l)) for _ in range(12))); l.close()''', f)
    assert r.returncode == 0, r.stderr
    l = loader(); straight = [digest(next(l)) for _ in range(20)]; l.close()
    assert straight == first + r.stdout.split()

def model(seed=0): # small, with every kind of parameter; its optimizer
    torch.manual_seed(seed)
    m = HybridModel(HybridConfig.from_depth(4, d_model=64, n_head=2, n_kv_head=1, n_v_head=2, n_qk_head=1, head_dim=32,
                    head_k_dim=32, head_v_dim=32, vocab_size=265, sequence_len=T), seed)
    return m, build_optimizer(m)

def whole(opt): # every state tensor in one piece, gathered from the slices of all ranks
    mine = {k: (s.tensor.clone(), tuple(s.global_shape), tuple(s.offset)) for k, s in opt.checkpoint_state().items()}
    parts = [mine]
    if dist.is_initialized():
        parts = [None]*dist.get_world_size(); dist.all_gather_object(parts, mine)
    out = {}
    for p in parts:
        for k, (t, shape, off) in p.items():
            w = out.setdefault(k, torch.full(shape, torch.nan, dtype=t.dtype if t.is_floating_point() else torch.float64))
            w[tuple(slice(o, o + n) for o, n in zip(off, t.shape))] = t.to(w.dtype)
    return out

def group(rank, world, fn, folder, name): # one rank of a gloo group
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/{name}', rank=rank, world_size=world)
    fn(rank, world, Path(folder)); dist.barrier(); dist.destroy_process_group()

def train(m, opt, b): m(b.x, targets=b.y).backward(); opt.step(); opt.zero_grad()

def joined(xs): # the rows of a batch from all ranks, in the order of the global batch
    out = [None]*dist.get_world_size(); dist.all_gather_object(out, xs)
    return [torch.stack(p, 1).flatten(0, 1) for p in zip(*out)]

def two_ranks(rank, world, d):
    "Continue one rank's checkpoint on two, train on, save; then a failing save"
    m, opt = model(7); meta = load_checkpoint(d/'run', m, opt); ref = torch.load(d/'ref.pt')
    same(m, opt, ref); seen = []
    l = loader(rank, world, meta['loader_state'])
    for _ in range(3): b = next(l); train(m, opt, b); seen.append(b.x)
    save_checkpoint(d/'run', 6, m, opt, TOK(), l.state_dict(), dict(mark=rank)); l.close()
    ref = dict(model=m.state_dict(), optim=whole(opt), x=joined(seen))
    if rank == 0: torch.save(ref, d/'ref2.pt'); (d/'file').write_text('')
    dist.barrier()
    with pytest.raises((CheckpointError, OSError)): save_checkpoint(d/'file'/'run', 1, m)   # rank 0 fails, all hear

def same(m, opt, ref):
    for k, v in m.state_dict().items(): assert torch.equal(v, ref['model'][k]), k
    got = whole(opt); assert got.keys() == ref['optim'].keys()
    for k, v in got.items(): assert torch.equal(v, ref['optim'][k]), k

def test_one_rank_becomes_two_becomes_one(tmp_path):
    "Weights, optimizer slices and batches: three steps on one rank, three on two, three on one"
    d = tmp_path; m, opt = model(); l = loader(); xs = []
    for _ in range(3): b = next(l); train(m, opt, b); xs.append(b.x)
    save_checkpoint(d/'run', 3, m, opt, TOK(), l.state_dict())
    torch.save(dict(model=m.state_dict(), optim=whole(opt)), d/'ref.pt')
    straight = [next(l).x for _ in range(6)]; l.close()
    mp.spawn(group, (2, two_ranks, str(d), 'rendezvous'), 2)
    ref = torch.load(d/'ref2.pt'); m, opt = model(7); meta = load_checkpoint(d/'run', m, opt)
    assert (meta['mark'], meta['step'], meta['world_size']) == (0, 6, 2)
    same(m, opt, ref)
    l = loader(state=meta['loader_state']); xs = ref['x'] + [next(l).x for _ in range(3)]; l.close()
    for a, b in zip(straight, xs): assert torch.equal(a, b)

SAVER = '''
torch.set_num_threads(1); run = Path(sys.argv[1]); m, opt = model(); step = 0
if latest_step(run) is not None: step = load_checkpoint(run, m, opt)['step']
assert all((p == step).all() for p in m.parameters()) or step == 0
print(step, flush=True)
while True:
    step += 1
    for p in m.parameters(): p.data.fill_(step)
    save_checkpoint(run, step, m, opt, keep=2)'''

def test_kill_during_save(tmp_path):
    "kill -9 at moments spread over many saves: what is found is complete, and of the last saves"
    run, last, unfinished = tmp_path/'run', 0, 0
    for i in range(3):
        p = subprocess.Popen([sys.executable, '-c', f'from test_loader_checkpoint import *\n{SAVER}', str(run)],
                             env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = p.stdout.readline(); assert line, p.stderr.read()
        assert int(line) == last
        start = time.time()                                  # at least one more save, then a bit
        while latest_step(run) in (None, last) and time.time() - start < 60: time.sleep(.002)
        time.sleep(.03*i); p.kill(); p.wait()
        unfinished += len(list(run.glob('.unfinished*')))
        m, opt = model(1); new = load_checkpoint(run, m, opt)['step']
        assert new > last and all((q == new).all() for q in m.parameters())
        last = new
    assert 1 <= len(checkpoints(run)) <= 3
    print(f'{last} saves, 3 kills, {unfinished} unfinished folders seen')
    m, opt = model(); save_checkpoint(run, last + 1, m, opt)
    assert not list(run.glob('.unfinished*'))                # left by dead processes, now gone

def test_tiny_and_empty_documents():
    "Rows are full with documents of a few tokens, up to the 16 tokens a document that borders allow"
    def mix(docs): return SimpleNamespace(name='m', weights=[1], sources=[SimpleNamespace(
        name='s', row_groups=lambda split: [('f', 0, len(docs))], read_group=lambda split, j: docs)])
    b = Packer(mix(['', 'abcdefghijklmnopqrst', '', 'x'*30]), TOK(), 'train', 8, 512).next_batch()
    assert all(u == 513 for u in b.used)
    b = Packer(mix(['ab']*500), TOK(), 'train', 8, 512).next_batch()      # 3 tokens: 32 documents at most
    assert all(len(s) == 32 for s in b.starts)
    with pytest.raises(ValueError, match='only empty documents'): Packer(mix(['', '']), TOK(), 'train', 64, 64).next_batch()

def test_thread_ends_with_its_loader():
    import gc, threading
    n = threading.active_count(); ls = [loader() for _ in range(3)]
    for l in ls: next(l)
    assert threading.active_count() == n + 3
    ls.clear(); del l; gc.collect()
    assert threading.active_count() == n

def test_console_command(tmp_path):
    env = dict(ENV, NANO_DH_BASE_DIR=str(tmp_path))
    m, _ = model(); save_checkpoint(tmp_path/'runs'/'alpha', 12, m)
    out = subprocess.run([sys.executable, '-c', 'from nano_dh.checkpoint import dh_runs; dh_runs()'], env=env,
                         capture_output=True, text=True)
    assert out.returncode == 0 and 'alpha' in out.stdout and '12' in out.stdout and str(tmp_path) in out.stdout, out
    with pytest.raises(CheckpointError, match='no checkpoint of step 3'): find_checkpoint(tmp_path/'runs'/'alpha', 3)
