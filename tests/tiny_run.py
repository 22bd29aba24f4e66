"What the tests of training share: a small data folder and the parameters of a run of seconds."
import os, sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(depth=2, device='cpu', vocab_size=384, max_seq_len=32, total_batch_size=256, device_batch_size=4, eval_tokens=1024, prompts='The ')

def tiny_data(folder):
    "A folder of parquet shards with a few passages of the shipped sample"
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    for split, n in (('train', 24), ('val', 4)):
        f = ROOT/'nano_dh'/'data'/f'sample_{split}.parquet'
        rows = next(pq.ParquetFile(f).iter_batches(n, columns=['text']))['text'].to_pylist()[:n]
        pq.write_table(pa.table(dict(text=[r[:4000] for r in rows])), folder/f'books_{split}.parquet', row_group_size=8)
    return str(folder)

def environ(base, **kw):
    "The environment of a fresh process: the checkout's package, its own base folder, one thread"
    env = {**os.environ, 'NANO_DH_BASE_DIR': str(base), 'PYTHONPATH': os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))), 'OMP_NUM_THREADS': '1', **kw}
    return {k: v for k, v in env.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'NANO_DH_DATA')}

def papermill(env, *args):
    "The command, in this process; the notebook's kernel is a process of its own. What it raises is raised"
    import fresh
    from click.testing import CliRunner
    from papermill.cli import papermill as command
    from unittest.mock import patch
    # a kernel whose ranks had a server would wait for that to end, to be ended itself after half this time
    with patch('jupyter_client.launcher.Popen', fresh.Popen), patch('jupyter_client.manager.KernelManager.shutdown_wait_time', .5):
        return CliRunner(env=env).invoke(command, [str(a) for a in ('--no-progress-bar', *args)], catch_exceptions=False)

def talker(vocab_size, seed=0, sequence_len=1024):
    """A model of a moment that writes letters and never ends by itself: the letters' rows are opposite in pairs and long, so that one
    of them is always far more likely than the end, whose logit is 0"""
    import torch
    from nano_dh.hybrid_model import HybridConfig, HybridModel
    size = dict(vocab_size=vocab_size, sequence_len=sequence_len, d_model=64, head_dim=32, head_k_dim=32, head_v_dim=32)
    m = HybridModel(HybridConfig.from_depth(2, 'GL', **size), seed).requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for p in m.parameters(): p.data += .05*torch.randn(p.shape, generator=g)
    letters = b'abcdefghijklmnopqrstuvwxyz ,.\n'
    rows = 8*torch.randn(len(letters)//2, 64, generator=g)
    m.lm_head.weight.data.zero_()
    m.lm_head.weight.data[list(letters)] = torch.cat([rows, -rows])
    return m

def options(**kw): return [f'--{k}={v}' for k, v in kw.items()]
def parameters(**kw): return [x for k, v in kw.items() for x in ('-p', k, str(v))]
PY = sys.executable
PAPERMILL = str(Path(sys.executable).parent/'papermill')
