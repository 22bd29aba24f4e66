"Loader and checkpoints across processes: kills, fresh processes, other numbers of ranks."
import hashlib, json, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import fresh, numpy as np, pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from nano_dh.checkpoint import (CheckpointError, checkpoints, find_checkpoint, latest_step,
                                load_checkpoint, save_checkpoint)
from nano_dh.dataloader import Loader, Packer, gather_state
from nano_dh.dataset import open_data
from nano_dh.hybrid_model import HybridConfig, HybridModel
from nano_dh.launch import _context
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
    return fresh.run([sys.executable, '-c', f'from test_loader_checkpoint import *\n{code}', *map(str, args)],
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

def group(rank, world, fn, folder, name, env): # one rank of a gloo group; its server began under whatever environment an earlier test had set
    os.environ.clear(); os.environ.update(env); torch.set_num_threads(1)
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
    _context(); mp.start_processes(group, (2, two_ranks, str(d), 'rendezvous', dict(os.environ)), 2, start_method='forkserver')
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
        p = fresh.Popen([sys.executable, '-c', f'from test_loader_checkpoint import *\n{SAVER}', str(run)],
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
    out = fresh.run([sys.executable, '-c', 'from nano_dh.checkpoint import dh_runs; dh_runs()'], env=env,
                         capture_output=True, text=True)
    assert out.returncode == 0 and 'alpha' in out.stdout and '12' in out.stdout and str(tmp_path) in out.stdout, out
    with pytest.raises(CheckpointError, match='no checkpoint of step 3'): find_checkpoint(tmp_path/'runs'/'alpha', 3)

# ---- damage around a checkpoint

import pickle, random, shutil, zlib
from nano_dh.checkpoint import list_runs, set_aside, verify
from nano_dh.core import dist_info

@pytest.fixture
def saved(tmp_path, monkeypatch):
    "A run in the base folder, with checkpoints at steps 1 and 2; -> its folder, its model and optimizer"
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); m, opt = model(); run = tmp_path/'runs'/'alpha'
    for s in (1, 2): save_checkpoint(run, s, m, opt, TOK(), meta=dict(mark=s))
    return run, m, opt

def reseal(p, change=lambda m: None): # as somebody would who writes right checksums too
    m = json.loads((p/'manifest.json').read_text())
    for f in m['files']:
        if (p/f).exists(): m['files'][f] = [(p/f).stat().st_size, zlib.crc32((p/f).read_bytes())]
    change(m); m.pop('sum', None)
    (p/'manifest.json').write_text(json.dumps(m | dict(sum=zlib.crc32(json.dumps(m, sort_keys=True).encode()))))

MANIFESTS = {'no files': lambda m: m.update(files={}), 'no meta': lambda m: m['files'].pop('meta.json'), 'list': lambda m: m.update(files=[]), 'step': lambda m: m.update(step='two'),
    'serial': lambda m: m.update(serial=None), 'pairs': lambda m: m['files'].update({'meta.json': [1]}), 'text': lambda m: m['files'].update({'meta.json': 'ab'}), 'null': lambda m: m.update(format=None),
    'one less': lambda m: m['files'].pop('rng.pt'), 'no data': lambda m: [m['files'].pop(f) for f in list(m['files']) if f.startswith('state')]}

@pytest.mark.parametrize('case', MANIFESTS)
def test_a_manifest_that_does_not_hold_is_refused(saved, case):
    "With a right checksum or without one, which old checkpoints lack; the other checkpoint and the listing stay"
    run, m, opt = saved; p = run/'000002'
    for old in (False, True):
        reseal(p, MANIFESTS[case]) if not old else (p/'manifest.json').write_text(json.dumps({k: v for k, v in json.loads((p/'manifest.json').read_text()).items() if k != 'sum'}))
        with pytest.raises(CheckpointError, match='damaged') as e: verify(p)
        assert 'set_aside' in str(e.value) and 'step 1' in str(e.value)
        assert [r['name'] for r in list_runs()] == ['alpha']

def test_every_flipped_bit_of_the_small_files_is_found(saved):
    run, m, opt = saved; p, rng = run/'000002', random.Random(0)
    for name in ('manifest.json', 'meta.json', 'rng.pt', 'state/.metadata'):
        f = p/name; data = f.read_bytes()
        for _ in range(40):
            k = rng.randrange(len(data)); b = bytearray(data); b[k] ^= 1 << rng.randrange(8); f.write_bytes(b)
            with pytest.raises(CheckpointError): verify(p)
        f.write_bytes(data)
    assert verify(p)['step'] == 2

def test_one_bad_run_does_not_hide_the_others(saved):
    run, m, opt = saved
    for i, how in enumerate((lambda p: reseal(p, lambda m: m.update(files={'meta.json': None})), lambda p: (p/'meta.json').write_text('[1]'), lambda p: (p/'meta.json').write_text('{}'),
                             lambda p: (p/'meta.json').write_bytes(b'\xff'), lambda p: (p/'manifest.json').write_text('null'), lambda p: (p/'meta.json').unlink())):
        bad = run.parent/f'bad{i}'; shutil.copytree(run/'000002', bad/'000002'); how(bad/'000002')
    (run.parent/'a file').write_text('x'); (run.parent/'bad9'/'000001'/'manifest.json').mkdir(parents=True)
    assert 'alpha' in [r['name'] for r in list_runs()]
    assert find_checkpoint('alpha') == run/'000002'

def test_the_checkpoint_before_a_damaged_one_is_one_command_away(saved):
    run, m, opt = saved; f = next((run/'000002'/'state').glob('*.distcp')); b = bytearray(f.read_bytes()); b[len(b)//2] ^= 1; f.write_bytes(b)
    with pytest.raises(CheckpointError, match='wrong checksum') as e: load_checkpoint(run, *model(1))
    cmd = str(e.value).split('python -c ')[1].strip('"')
    assert fresh.run([sys.executable, '-c', cmd], env=ENV, capture_output=True).returncode == 0
    assert load_checkpoint(run, *model(1))['step'] == 1 and (run/'damaged-000002'/'manifest.json').exists()
    save_checkpoint(run, 2, m, opt); assert latest_step(run) == 2 and (run/'damaged-000002'/'manifest.json').exists()

@pytest.mark.parametrize('value', [float('inf'), float('-inf'), float('nan')])
def test_a_state_that_could_not_continue_is_not_saved(saved, value):
    run, m, opt = saved
    s = next(s for k, s in opt.checkpoint_state().items() if s.tensor.numel() > 1); old = s.tensor.flatten()[0].item(); s.tensor.view(-1)[0] = value
    with pytest.raises(CheckpointError, match='step 3 is not saved, 1 of its tensors hold NaN or infinity: optim'): save_checkpoint(run, 3, m, opt)
    assert latest_step(run) == 2 and not list(run.glob('.unfinished*'))
    s.tensor.view(-1)[0] = old; save_checkpoint(run, 3, m, opt); assert latest_step(run) == 3

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

@pytest.mark.parametrize('how', ['whole', 'inside', 'bytes', 'eval', 'path'])
def test_metadata_is_read_and_not_run(saved, how):
    "A pickle with a program in it, whose checksums fit"
    run, m, opt = saved; p, ran = run/'000002', run/'ran'; f = p/'state'/'.metadata'; good = pickle.loads(f.read_bytes())
    if how == 'whole': f.write_bytes(pickle.dumps(Evil(ran)))
    if how == 'inside': good.planner_data = [Evil(ran)]; f.write_bytes(pickle.dumps(good))
    if how == 'eval': f.write_bytes(b'cbuiltins\neval\n(S"open(%r, \'w\')"\ntR.' % str(ran).encode())
    if how == 'path':
        for i in good.storage_data.values(): i.relative_path = '../../../x'
        f.write_bytes(pickle.dumps(good))
    if how == 'bytes': # an entry that torch unpickles by itself
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata
        k = next(iter(good.state_dict_metadata)); good.state_dict_metadata[k] = BytesStorageMetadata(); f.write_bytes(pickle.dumps(good))
    reseal(p)
    with pytest.raises(CheckpointError, match='.metadata'): load_checkpoint(p, *model(1))
    assert not ran.exists()

def test_what_is_left_of_a_kill_while_pruning_goes(saved):
    "A process killed while it removes an old checkpoint; its number is given to another meanwhile. Loading alone cleans up"
    run, m, opt = saved; host = __import__('socket').gethostname()
    code = '''
import shutil; run = Path(sys.argv[1]); m, opt = model()
def rmtree(p, **kw): print('removing', flush=True); time.sleep(60)
shutil.rmtree = rmtree                                   # the moment of the kill
save_checkpoint(run, 3, m, opt, keep=1)'''
    p = fresh.Popen([sys.executable, '-c', f'from test_loader_checkpoint import *\n{code}', str(run)], env=ENV, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline(); p.kill(); p.wait()
    left = list(run.glob('.unfinished*')); assert left
    for l in left: # as if its number belonged to this process now
        parts = l.name.split('~'); parts[3] = str(os.getpid()); l.rename(run/'~'.join(parts))
    assert load_checkpoint(run, *model(1))['step'] == 3 and not list(run.glob('.unfinished*'))

def test_a_write_that_fails_is_an_exception(tmp_path):
    "torch's CheckpointException is no Exception: it passed through every `except Exception`"
    r = python('''
import resource; m, opt = model(); resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16,)*2); __import__('signal').signal(signal.SIGXFSZ, signal.SIG_IGN)
try: save_checkpoint(Path(sys.argv[1])/'run', 1, m, opt)
except Exception as e: print(type(e).__name__, str(e))''', tmp_path)
    assert r.returncode == 0 and r.stdout.startswith('CheckpointError rank 0: ') and r.stdout.count('\n') == 1, r.stdout + r.stderr
    assert not list((tmp_path/'run').glob('*'))

def test_a_bad_line_of_metrics_costs_that_line(tmp_path):
    from nano_dh.train import read_metrics
    good = [json.dumps(dict(step=i, loss=1.)) for i in range(6)]
    (tmp_path/'metrics.jsonl').write_bytes('\n'.join(good[:2] + ['{"step": 2, "lo', '[]', 'null', '{"loss": 1}'] + good[2:4]).encode() + b'\n\xff\xfe{"\x85\n' + '\n'.join(good[4:]).encode() + b'\n{"st')
    assert [r['step'] for r in read_metrics(tmp_path)] == list(range(6))

# ---- what the environment says

@pytest.mark.parametrize('env,want', [(dict(RANK='3'), (0, 0, 1)), (dict(RANK='1', LOCAL_RANK='1'), (0, 0, 1)), (dict(RANK='x'), (0, 0, 1)), (dict(RANK='', WORLD_SIZE=''), (0, 0, 1)),
    (dict(RANK='1', LOCAL_RANK='1', WORLD_SIZE='2'), (1, 1, 2)), (dict(RANK='2', WORLD_SIZE='2'), None), (dict(RANK='-1', WORLD_SIZE='2'), None), (dict(RANK='one', WORLD_SIZE='2'), None),
    (dict(LOCAL_RANK='7', WORLD_SIZE='2'), None), (dict(RANK='0', WORLD_SIZE='zwei'), None)])
def test_what_the_environment_says_of_ranks(monkeypatch, env, want):
    "A stale RANK without WORLD_SIZE made this process rank 3 of 1: silent, and without a checkpoint"
    for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'): monkeypatch.delenv(k, raising=False)
    for k, v in env.items(): monkeypatch.setenv(k, v)
    if want: i = dist_info(); assert (i.rank, i.local_rank, i.world_size) == want
    else:
        with pytest.raises(ValueError, match='a rank is 0 to WORLD_SIZE-1; unset'): dist_info()

@pytest.mark.parametrize('what', ['missing', 'file', 'rights', 'lock', 'write'])
def test_errors_of_the_base_folder_name_its_variable(tmp_path, what):
    for p in (tmp_path, tmp_path.parent, tmp_path.parent.parent): p.chmod(0o755)
    (tmp_path/'file').write_text(''); base = dict(missing='/proc/none/b', file=str(tmp_path/'file')).get(what, str(tmp_path))
    do = dict(lock='file_lock(base_dir()/"x"/"y").__enter__()', write='atomic_write(base_dir()/"x.json", "")', rights='runs_dir()').get(what, 'base_dir()')
    code = f'import os; from nano_dh.core import *; from nano_dh.checkpoint import runs_dir\nif os.geteuid() == 0: os.setegid(65534); os.seteuid(65534)\ntry: {do}\nexcept OSError as e: print(type(e).__name__, e)'
    r = fresh.run([sys.executable, '-c', code], env=ENV | dict(NANO_DH_BASE_DIR=base), capture_output=True, text=True)
    assert 'NANO_DH_BASE_DIR can name another base folder' in r.stdout and base in r.stdout, r.stdout + r.stderr
