"Forward and backward of the whole model on this machine: tokens/s of several patterns, eager and compiled, interleaved."
import argparse, statistics, time
import torch
from nano_dh.hybrid_model import HybridConfig, HybridModel

p = argparse.ArgumentParser()
p.add_argument('--patterns', default='GGGL,L,SSSL')
p.add_argument('--depth', type=int, default=4)
p.add_argument('--seq_len', type=int, default=256)
p.add_argument('--batch', type=int, default=8)
p.add_argument('--vocab', type=int, default=4096)
p.add_argument('--rounds', type=int, default=5)
p.add_argument('--threads', type=int, default=2)
p.add_argument('--clock', default='wall', choices=('wall', 'process'), help='process: processor time, for a busy machine; take --threads 1')
p.add_argument('--modes', default='eager,compiled')
p.add_argument('--profile', action='store_true', help='print the operations that take the time, eager')
a = p.parse_args()
torch.set_num_threads(a.threads)
clock = dict(wall=time.perf_counter, process=time.process_time)[a.clock]
x, y = torch.randint(0, a.vocab, (2, a.batch, a.seq_len))

def make(pattern):
    o = dict(preset='nanochat') if pattern == 'nanochat' else dict(pattern=pattern)
    return HybridModel(HybridConfig.from_depth(a.depth, vocab_size=a.vocab, sequence_len=a.seq_len, **o))

def once(f, model):
    t = clock()
    f(x, targets=y).backward(); model.zero_grad()
    return clock() - t

patterns, runs = a.patterns.split(','), {}
for mode in a.modes.split(','):
    for pat in patterns:
        m = make(pat); f = m if mode == 'eager' else torch.compile(m, fullgraph=True)
        t = once(f, m); once(f, m)
        runs[mode, pat] = f, m, []
        print(f'{mode} {pat}: first call {t:.1f} s', flush=True)
for _ in range(a.rounds):
    for f, m, ts in runs.values(): ts.append(once(f, m))
n, speed = x.numel(), {}
for (mode, pat), (f, m, ts) in runs.items(): speed[mode, pat] = n/statistics.median(ts)
print(f'torch {torch.__version__}, {a.threads} threads, depth {a.depth}, T {a.seq_len}, B {a.batch}, vocab {a.vocab}, {a.clock} time')
for (mode, pat), s in speed.items():
    base = speed.get((mode, 'L'))
    print(f'{mode:9} {pat:9} {s:7.0f} tokens/s' + (f'   {s/base:.2f} of L' if base else ''))
if a.profile:
    from torch.profiler import profile
    for pat in patterns:
        f, m, _ = runs['eager', pat]
        with profile() as prof: once(f, m)
        print(pat); print(prof.key_averages().table(sort_by='self_cpu_time_total', row_limit=25, max_name_column_width=45))
