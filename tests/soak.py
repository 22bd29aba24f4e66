"""Many small steps on two ranks: python tests/soak.py [steps]. Every 500 steps the ranks compare the hashes of all their weights, and at the end
what the process holds (memory, threads, open files) with what it held after the first tenth."""
import hashlib, os, sys, threading, time
from pathlib import Path
import torch, torch.distributed as dist
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from nano_dh.hybrid_model import HybridConfig, HybridModel
from nano_dh.launch import run_ranks
from nano_dh.optim import build_optimizer

T, EVERY = 32, 500

def small(seed=1):
    cfg = HybridConfig.from_depth(1, pattern='G', d_model=32, head_dim=16, head_k_dim=16, head_v_dim=16, n_head=2, n_v_head=2, n_qk_head=1, vocab_size=256, sequence_len=T)
    m = HybridModel(cfg, seed); return m, build_optimizer(m, total_batch_size=2**13, shard_numel=1024)

def held(): # MB of memory, threads, open files
    rss = int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')/1e6
    return rss, threading.active_count(), len(os.listdir('/proc/self/fd'))

def digest(m): return hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in m.parameters())).hexdigest()

def everywhere(x): out = [None]*dist.get_world_size(); dist.all_gather_object(out, x); return out

def soak(steps, emit):
    torch.set_num_threads(1); rank, world = dist.get_rank(), dist.get_world_size()
    m, opt = small(); gen, first, start = torch.Generator().manual_seed(rank), None, time.time()
    for i in range(1, steps + 1):
        x = (torch.arange(T + 1)*torch.randint(1, 9, (1, 1), generator=gen) + torch.randint(256, (1, 1), generator=gen)) % 256
        loss = m(x[:, :-1], targets=x[:, 1:]); loss.backward()
        opt.schedule(i - 1, steps); opt.step(); opt.zero_grad()
        if i == max(1, steps//10): first = held()
        if i % EVERY == 0 or i == steps:
            hashes = everywhere(digest(m)); assert len(set(hashes)) == 1, f'step {i}: the ranks have other weights, {hashes}'
            assert loss.isfinite(), f'step {i}: loss {loss}'
            emit(dict(step=i, loss=loss.item(), hash=hashes[0][:12], seconds=time.time() - start))
    emit(dict(first=everywhere(first), last=everywhere(held())))

if __name__ == '__main__':
    import soak as me; steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    *recs, end = run_ranks(me.soak, steps, nproc=2, device='cpu', step=120)
    print(f'{steps} steps in {recs[-1]["seconds"]:.0f} s, {len(recs)} times the same weights on both ranks, last {recs[-1]["hash"]}; loss {recs[0]["loss"]:.2f} to {recs[-1]["loss"]:.2f}')
    for r, (a, b) in enumerate(zip(end['first'], end['last'])):
        print(f'rank {r}: {a[0]:.0f} MB, {a[1]} threads, {a[2]} files; at the end {b[0]:.0f} MB, {b[1]} threads, {b[2]} files')
        assert b[0] < a[0] + 50 and b[1] <= a[1] + 1 and b[2] <= a[2] + 2
