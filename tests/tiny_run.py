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

def options(**kw): return [f'--{k}={v}' for k, v in kw.items()]
def parameters(**kw): return [x for k, v in kw.items() for x in ('-p', k, str(v))]
PY = sys.executable
PAPERMILL = str(Path(sys.executable).parent/'papermill')
