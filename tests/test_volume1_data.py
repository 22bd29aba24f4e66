"Volume 1 alone: its modules, copied to an empty folder, open data, train a tokenizer and pack the batches that the whole package packs."
import json, os, shutil, subprocess, sys
from pathlib import Path
import fresh, pytest

ROOT = Path(__file__).parent.parent
MODULES = 'core tokenizer dataset dataloader'.split()
CODE = '''import sys
sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')] # an editable installation finds what is not here
import hashlib, json, nano_dh
from pathlib import Path
from nano_dh.core import volume2
from nano_dh.dataset import open_data
from nano_dh.dataloader import Loader
from nano_dh.tokenizer import Tokenizer, get_tokenizer, open_tokenizer
home = Path(sys.argv[1]); out = {'volume 2': volume2()}
def batches(mix, tok, **kw):
    loader = Loader(mix, tok, batch_rows=8, seq_len=64, documents=True, **kw); found = [next(loader) for _ in range(3)]
    state = loader.state_dict(); loader.close(); more = Loader(mix, tok, batch_rows=8, seq_len=64, state=state); found.append(next(more)); more.close()
    return [hashlib.sha256(b.x.numpy().tobytes() + b.y.numpy().tobytes()).hexdigest() for b in found] + [found[0].cu_seqlens.tolist(), b.source if (b := found[-1]) else 0]
tok = Tokenizer.train(open_data('sample').texts('train', 400_000), 600)
for name, spec in dict(sample='', text=str(home/'notes.txt'), lines=str(home/'some.jsonl'), mixture=f"{home/'notes.txt'}:3,{home/'some.jsonl'}:1").items():
    mix = open_data(spec)
    out[name] = [mix.fingerprint, mix.n_docs(), mix.n_docs('val'), batches(mix, tok), batches(mix, tok, token_cache=str(home/'tokens'))]
    val = Loader(mix, tok, 'val', 4, 64); out[name] += [sum(int((b.y >= 0).sum()) for b in val), tok.hash]
folder = open_data(str(home/'set')); out['folder'] = [sorted(folder.texts()), sorted(folder.texts('val'))]
parquet = open_data(str(home/'p_000.parquet')); out['parquet'] = [parquet.n_docs(), list(parquet.texts('val'))]
kept = get_tokenizer('', open_data(''), 600, 400_000); out['kept'] = [kept.hash, open_tokenizer(kept.name).hash]
out['modules'] = sorted(m.split('.')[1] for m in sys.modules if m.startswith('nano_dh.'))
print(json.dumps(out))'''

def result(root, home, base):
    env = {k: v for k, v in os.environ.items() if k != 'NANO_DH_DATA'} | {'PYTHONPATH': str(root), 'NANO_DH_BASE_DIR': str(base)}
    p = fresh.run([sys.executable, '-c', CODE, home], capture_output=True, text=True, env=env, cwd=root, timeout=300)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.splitlines()[-1])

@pytest.fixture(scope='module')
def both(tmp_path_factory):
    import pyarrow as pa, pyarrow.parquet as pq
    top = tmp_path_factory.mktemp('volume1'); home = top/'home'; package = top/'alone'/'nano_dh'; package.mkdir(parents=True); (home/'set').mkdir(parents=True)
    shutil.copytree(ROOT/'nano_dh'/'data', package/'data')
    for name in ('__init__', *MODULES): shutil.copy(ROOT/'nano_dh'/f'{name}.py', package)
    texts = pq.read_table(ROOT/'nano_dh'/'data'/'sample_val.parquet')['text'].to_pylist()
    (home/'notes.txt').write_text('\n\n'.join(texts[:30])); (home/'some.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts[30:80]))
    for name in ('a.txt', 'b.txt', 'b_val.txt'): (home/'set'/name).write_text(f'This is {name}.')
    pq.write_table(pa.table({'text': texts}), home/'p_000.parquet', 4)
    return result(package.parent, home, top/'base1'), result(ROOT, home, top/'base2')

def test_volume1_needs_nothing_of_volume2(both):
    alone, whole = both
    assert not alone['volume 2'] and alone['modules'] == sorted(MODULES)
    assert whole['volume 2'] and {'damage', 'data_folders', 'prefetch'} <= {*whole['modules']}

@pytest.mark.parametrize('what', ['sample', 'text', 'lines', 'mixture', 'folder', 'parquet', 'kept'])
def test_volume1_alone_reads_and_packs_the_same(both, what):
    "Fingerprints, documents, batches with their borders, a state that is taken up, validation, tokenizers"
    alone, whole = both
    assert alone[what] == whole[what]
