"Two gloo ranks against one: same global batch, same losses, same parameters, half the optimizer state."
import datetime, os, pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from nano_dh.launch import _context

STEPS, ROWS, T = 20, 4, 64

def make(dtype, **kw):
    from nano_dh.hybrid_model import HybridConfig, HybridModel
    from nano_dh.optim import build_optimizer
    cfg = HybridConfig.from_depth(4, d_model=128, head_dim=32, head_k_dim=32, head_v_dim=32, n_head=4, n_v_head=4,
                                  n_qk_head=2, vocab_size=256, sequence_len=T)
    model = HybridModel(cfg, seed=1).to(dtype)
    return model, build_optimizer(model, total_batch_size=2**13, shard_numel=1024, **kw)

def batch(i):
    g = torch.Generator().manual_seed(i)
    x = (torch.arange(T + 1)*torch.randint(1, 9, (ROWS, 1), generator=g) + torch.randint(256, (ROWS, 1), generator=g)) % 256
    return x[:, :-1], x[:, 1:]

def train(rank, world, dtype, steps=STEPS, **kw):
    "20 steps of the default schedule; -> losses, parameters, optimizer state bytes"
    torch.set_num_threads(1)
    model, opt = make(dtype, **kw); losses = []
    for i in range(steps):
        x, y = (t[rank::world] for t in batch(i))
        loss = model(x, targets=y); loss.backward()
        opt.schedule(i, STEPS); opt.step(); opt.zero_grad()
        l = loss.detach().double().clone()
        if world > 1: dist.all_reduce(l)
        losses.append(l.item()/world)
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}, opt.state_bytes(), opt.grad_norm.item()

def one_step(rank, world):
    "One step from given gradients: two ranks hold g + d and g - d, whose mean is exactly g (multiples of 1/1024)"
    model, opt = make(torch.float32, clip=.5)
    gen = torch.Generator().manual_seed(5)
    for p in model.parameters():
        g, d = ((torch.randn(p.shape, generator=gen)*1024).round()/1024 for _ in range(2))
        p.grad = g if world == 1 else g + d if rank == 0 else g - d
    opt.schedule(39, 100); opt.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, opt.grad_norm.item()

def odd(rank, world):
    "Sizes that no number of ranks divides: padded stacks and rows"
    from nano_dh.optim import MuonOptions
    from nano_dh.sharded_optim import ShardedMuonAdamW as MuonAdamW
    gen = torch.Generator().manual_seed(3)
    shapes = dict(a=(8, 24), b=(8, 24), c=(8, 24), wte=(101, 16), v=(7,))
    ps = {n: torch.nn.Parameter(torch.randn(s, generator=gen)) for n, s in shapes.items()}
    part = lambda ns: dict(names=list(ns), params=[ps[n] for n in ns], weight_decay=.1)
    opt = MuonAdamW([part('abc') | dict(kind='muon', lr=.02, momentum=.95, options=MuonOptions()),
                     part(['wte', 'v']) | dict(kind='adamw', lr=.1, betas=(.8, .95), eps=1e-8)], shard_numel=1024)
    for _ in range(3):
        for p in ps.values(): p.grad = torch.randn(p.shape, generator=gen)
        if world > 1 and rank: ps['v'].grad = None                     # an unused parameter counts as zero
        if world == 1: ps['v'].grad /= 2
        opt.step()
    return {n: p.detach() for n, p in ps.items()}, opt.grad_norm.item()

def bpb(rank, world):
    "Bits per byte of the rows of this rank, with a source that only rank 0 meets"
    from nano_dh.loss_eval import evaluate_bpb
    model, _ = make(torch.float32); x, y = batch(0)
    rows = [(x[i:i+1], y[i:i+1], None, 'ab'[i == 0]) for i in range(rank, ROWS, world)]
    r = evaluate_bpb(model, rows, torch.arange(256) % 5)
    return r.bpb, r.stderr, r.bytes, {k: v.bpb for k, v in r.sources.items()}

def reshard(rank, world, path):
    "Two ranks train and save their slices"
    from nano_dh.optim import LocalShard
    model, opt = make(torch.float32)
    for i in range(2):
        x, y = (t[rank::world] for t in batch(i))
        model(x, targets=y).backward(); opt.schedule(i, STEPS); opt.step(); opt.zero_grad()
    torch.save({k: (s.tensor.clone(), s.global_shape, s.offset) for k, s in opt.checkpoint_state().items()}, f'{path}/opt{rank}.pt')
    if rank == 0: torch.save(model.state_dict(), f'{path}/model.pt')
    return third(model, opt, rank, world)

def third(model, opt, rank=0, world=1): # the step after the two of `reshard`
    x, y = (t[rank::world] for t in batch(2))
    model(x, targets=y).backward(); opt.schedule(2, STEPS); opt.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}

def worker(rank, world, path):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', store=dist.FileStore(f'{path}/store', world), rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=120))
    out = dict(f64=train(rank, world, torch.float64), f32=train(rank, world, torch.float32),
               bf16=train(rank, world, torch.float32, 6, reduce_dtype=torch.bfloat16),
               one=one_step(rank, world), odd=odd(rank, world), bpb=bpb(rank, world), third=reshard(rank, world, path))
    torch.save(out, f'{path}/out{rank}.pt')
    dist.barrier(); dist.destroy_process_group()

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    path = tmp_path_factory.mktemp('ranks'); os.environ.setdefault('OMP_NUM_THREADS', '1')
    _context(); mp.start_processes(worker, (2, str(path)), nprocs=2, start_method='forkserver')
    return path, [torch.load(path/f'out{r}.pt') for r in range(2)]

def off(a, b): return max(((a[n] - b[n]).norm()/(b[n].norm() + 1e-12)).item() for n in b)

@pytest.mark.parametrize('dtype,key,tol_loss,tol_param', [(torch.float64, 'f64', 1e-10, 1e-8), (torch.float32, 'f32', 1e-5, 1e-3)])
def test_same_run(two, dtype, key, tol_loss, tol_param):
    losses, params, nbytes, norm = train(0, 1, dtype)
    a, b = (r[key] for r in two[1])
    dl, dp = max(abs(x - y) for x, y in zip(a[0], losses)), off(a[1], params)
    print(f'\n{key}: losses differ by {dl:.1e}, parameters by {dp:.1e}; state bytes {nbytes:,} on one rank, {a[2]:,} and {b[2]:,} on two')
    assert losses[-1] < losses[0] - .1
    assert dl < tol_loss and dp < tol_param and off(a[1], b[1]) == 0 and a[0] == b[0]
    assert abs(a[3]/norm - 1) < tol_param and a[3] == b[3]
    assert .5 <= a[2]/nbytes < .56 and b[2]/nbytes < .56

def test_equal_gradients(two):
    params, norm = one_step(0, 1)
    for p, n in (r['one'] for r in two[1]):
        print(f'\none step: {off(p, params):.1e}')
        assert off(p, params) < 1e-6 and abs(n/norm - 1) < 1e-6

def test_bf16_reduction(two):
    f32, bf16 = two[1][0]['f32'][0], two[1][0]['bf16'][0]
    print(f'\nbf16 reduction: losses differ by {max(abs(a - b) for a, b in zip(f32, bf16)):.1e}')
    assert max(abs(a - b) for a, b in zip(f32, bf16)) < .05 and f32 != bf16

def test_odd_sizes(two):
    params, norm = odd(0, 1)
    for p, n in (r['odd'] for r in two[1]): assert off(p, params) < 1e-6 and abs(n/norm - 1) < 1e-6

def test_bpb(two):
    want = bpb(0, 1)
    for got in (r['bpb'] for r in two[1]):
        assert abs(got[0] - want[0]) < 1e-5 and abs(got[1] - want[1]) < 1e-5 and got[2] == want[2]
        assert all(abs(got[3][k] - v) < 1e-5 for k, v in want[3].items()) and len(got[3]) == 2

def test_two_ranks_to_one(two):
    "Slices of two ranks, loaded on one, continue the run"
    from nano_dh.optim import LocalShard
    path, out = two; shards = {}
    for r in range(2):
        for k, s in torch.load(path/f'opt{r}.pt').items(): shards.setdefault(k, []).append(LocalShard(*s))
    model, opt = make(torch.float32); model.load_state_dict(torch.load(path/'model.pt'))
    assert set(shards) == set(opt.checkpoint_state())
    for k, s in opt.checkpoint_state().items():       # every element on exactly one rank
        assert sum(x.tensor.numel() for x in shards[k]) == s.tensor.numel(), k
    opt.load_checkpoint_state(shards)
    assert off(third(model, opt), out[0]['third']) < 1e-5

# ---- values that no run can have

NAN, INF = float('nan'), float('inf')
WRONG = [*((k, v) for k in ('clip', 'embedding_lr', 'unembedding_lr', 'matrix_lr', 'scalar_lr', 'weight_decay', 'final_lr_frac', 'warmdown_ratio', 'gpu_hour_price') for v in (-.5, NAN, INF, -INF)),
         *((k, v) for k in ('target_flops', 'target_param_data_ratio', 'max_hours') for v in (0., -2., NAN, INF)), ('final_lr_frac', -5.), ('final_lr_frac', 1.5), ('warmdown_ratio', 9.),
         ('warmup_steps', -3), ('seed', 2**70), ('seed', -2**64), ('depth', 0), ('depth', 10**6), ('eval_tokens', 0), ('keep', -2), ('nproc', -2), ('total_batch_size', 0), ('num_iterations', 10**18),
         ('max_seq_len', 2**40), ('max_seq_len', 0)]
CHAT, RL = [('epochs', v) for v in (0., -3., NAN, INF)] + [('lr_frac', v) for v in (-.5, NAN, INF)], \
    [('temperature', v) for v in (0., -1., NAN, INF)] + [('top_k', -1), ('minutes', NAN), ('minutes', -1.), ('samples', 1), ('questions', 0), ('max_tokens', 0), ('eval_samples', 0)]

@pytest.mark.parametrize('k,v', WRONG, ids=lambda x: str(x))
def test_numbers_that_no_run_can_have(k, v):
    "One table for every stage: what pretraining refuses, fine-tuning and reinforcement learning refuse in the same words"
    from nano_dh.rl import RLConfig
    from nano_dh.sft import FinetuneConfig
    from nano_dh.train import PretrainConfig
    said = set()
    for cls in (PretrainConfig, FinetuneConfig, RLConfig):
        with pytest.raises(ValueError, match=f'{k} .*: take ') as e: cls(**{k: v}).check()
        said.add(str(e.value)); assert '\n' not in str(e.value)
    assert len(said) == 1

@pytest.mark.parametrize('stage,k,v', [('sft', *x) for x in CHAT] + [('rl', *x) for x in CHAT + RL], ids=lambda x: str(x))
def test_numbers_of_one_stage(stage, k, v):
    from nano_dh import rl, sft
    with pytest.raises(ValueError, match=f'{k} .*: take '): (rl.RLConfig if stage == 'rl' else sft.FinetuneConfig)(**{k: v}).check()

def test_every_number_of_a_stage_has_bounds():
    "A field that is added is bounded too, or this fails; the values at the bounds themselves are allowed"
    from dataclasses import fields
    from nano_dh.core import BOUNDS, check_bounds
    from nano_dh.rl import RLConfig
    from nano_dh.tokenizer import TokenizerConfig
    for cls in (RLConfig, TokenizerConfig):
        numbers = [f.name for f in fields(cls) if type(f.default) in (int, float)]
        assert not set(numbers) - set(BOUNDS)
        for k in numbers:
            for v in BOUNDS[k]:
                if abs(v) != INF: check_bounds(cls(**{k: v}))
        check_bounds(cls())

def test_a_model_that_stays_at_guessing_is_noticed(tmp_path, monkeypatch):
    "Without learning rates the loss stays ln V; with them, nothing is said"
    from nano_dh.train import PretrainConfig, pretrain
    from tiny_run import TINY, tiny_data
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); data = tiny_data(tmp_path/'d')
    off = dict.fromkeys(('matrix_lr', 'embedding_lr', 'unembedding_lr', 'scalar_lr'), 0.)
    for kw, want in ((off, 2), ({}, 0)):
        recs = []; pretrain(PretrainConfig(**TINY, data=data, run=f'r{want}', num_iterations=60, warmup_steps=10, nproc=0, save_every=0, eval_every=0, **kw), recs.append)
        notes = [r for r in recs if 'what guessing gives' in r.get('note', '')]
        assert [r['step'] for r in notes] == [50, 60][:want], notes
        assert not want or f'ln {TINY["vocab_size"]} = 5.951' in notes[0]['note']

def soak(steps):
    import subprocess, sys
    from pathlib import Path
    p = subprocess.run([sys.executable, Path(__file__).parent/'soak.py', str(steps)], capture_output=True, text=True, timeout=2400)
    assert p.returncode == 0, p.stdout + p.stderr
    return p.stdout

def test_the_same_weights_on_both_ranks_for_200_steps(): assert '200 steps' in soak(200)

@pytest.mark.slow
def test_the_same_weights_on_both_ranks_for_20000_steps(): assert '40 times the same weights' in soak(20_000)
