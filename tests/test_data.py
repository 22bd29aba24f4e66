"Data on a bad day: servers that fail, processes that are killed, ranks that arrive together. Loopback only."
import hashlib, http.server, json, os, random, re, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import fresh, pyarrow as pa, pyarrow.parquet as pq, pytest
from nano_dh import dataset
from nano_dh.core import package_data
from nano_dh.dataset import Source, download_hub, fetch, footer, open_data, repackage
from nano_dh.tokenizer import Tokenizer, get_tokenizer

ROOT = Path(__file__).parent.parent

class Server(http.server.ThreadingHTTPServer):
    "Serves `files`; `plan[path]` is a list of what goes wrong with each request in turn"
    daemon_threads, block_on_close = True, False
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.plan, self.tags, self.log, self.lock = {}, {}, {}, [], threading.Lock()
        self.url = f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    def handle_error(self, request, address): pass      # clients hang up on purpose

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_GET(self):
        s = self.server
        with s.lock:
            todo = s.plan.get(self.path); mode = todo.pop(0) if todo else 'ok'
        want = re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))
        a = int(want[1]) if want and mode != 'norange' else 0
        s.log.append((self.path, mode, a))
        if mode.isdigit(): return self.send_error(int(mode))
        if mode == 'head': # an answer whose head never ends
            for c in b'HTTP/1.1 200 OK\r\nX-Slow: ' + b'x'*500:
                try: self.wfile.write(bytes([c])); time.sleep(.02)
                except OSError: return
        if mode == 'chunked':
            data = s.files[self.path]; self.protocol_version = 'HTTP/1.1'; self.close_connection = True
            self.send_response(200); self.send_header('Transfer-Encoding', 'chunked'); self.end_headers()
            for i in range(0, len(data), 9999): self.wfile.write(b'%x\r\n%s\r\n' % (len(data[i:i + 9999]), data[i:i + 9999]))
            return self.wfile.write(b'0\r\n\r\n')
        if mode == 'redirect':
            self.send_response(302); self.send_header('X-Linked-ETag', f'"{s.tags[self.path]}"')
            self.send_header('Location', '/cdn' + self.path); self.send_header('Content-Length', '0')
            return self.end_headers()
        if self.path not in s.files: return self.send_error(404)
        data, tag = s.files[self.path], s.tags.get(self.path, 'v1')
        if a >= len(data): return self.send_error(416)
        at = a + 7 if mode == 'elsewhere' and a else a          # a server that begins in the wrong place
        self.send_response(206 if a else 200)
        if a: self.send_header('Content-Range', f'bytes {at}-{len(data)-1}/{len(data)}')
        self.send_header('Content-Length', str(len(data) - at)); self.send_header('ETag', f'"{tag}"')
        self.end_headers()
        body = bytes(len(data) - at) if mode == 'garbage' else data[at:]
        if mode in ('cut', 'hang'): body = body[:len(body)//2 + 1]
        if mode == 'drip':
            for i in range(len(body)):
                try: self.wfile.write(body[i:i + 1]); time.sleep(.02)
                except OSError: return
        if mode == 'slow':
            for i in range(0, len(body), 1 << 16): self.wfile.write(body[i:i + (1 << 16)]); time.sleep(.05)
            return
        self.wfile.write(body); self.wfile.flush()
        if mode == 'hang': time.sleep(1)

@pytest.fixture
def server():
    s = Server(); yield s
    s.shutdown(); s.server_close()

@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path/'base')); monkeypatch.delenv('NANO_DH_DATA', raising=False)
    return tmp_path

@pytest.fixture(scope='module')
def docs(): return pq.read_table(package_data('sample_val.parquet'))['text'].to_pylist()

def shard(path, texts): pq.write_table(pa.table({'text': texts}), path, 16); return path.read_bytes()
def run(code, *args, **env): # a fresh process
    return fresh.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {'PYTHONPATH': str(ROOT)} | env)

# ---- one file

@pytest.mark.parametrize('plan', [
    ['500', '503', '429'], ['cut', 'cut'], ['hang', 'ok'], ['cut', 'norange'], ['cut', 'garbage'], ['garbage'],
    ['cut', 'elsewhere'], ['drip', 'head'], ['chunked'], ['cut', '500', 'hang', 'norange', 'garbage', 'cut']], ids='-'.join)
def test_fetch_survives(server, tmp_path, docs, plan):
    data = server.files['/f'] = shard(tmp_path/'src', docs); server.plan['/f'] = list(plan)
    p = fetch(f'{server.url}/f', tmp_path/'out'/'f.parquet', tries=8, timeout=.3, pause=.005, check=footer)
    assert p.read_bytes() == data and footer(p)
    assert sorted(x.name for x in p.parent.iterdir()) in (['f.parquet'], ['f.parquet', 'f.parquet.lock'])

def test_fetch_continues_where_it_stopped(server, tmp_path, docs):
    data = server.files['/f'] = shard(tmp_path/'src', docs); server.plan['/f'] = ['cut', 'ok']
    fetch(f'{server.url}/f', tmp_path/'f', pause=.005)
    sent = [a for _, _, a in server.log]
    assert len(sent) == 2 and 0 < sent[1] <= len(data)//2 + 1 and sent[1] > len(data)//2 - (1 << 17)

def test_fetch_never_joins_two_versions(server, tmp_path, docs):
    server.files['/f'] = shard(tmp_path/'a', docs); server.plan['/f'] = ['cut', '404']
    with pytest.raises(ConnectionError): fetch(f'{server.url}/f', tmp_path/'f', pause=.005)
    assert (tmp_path/'f.part').stat().st_size > 0
    new = server.files['/f'] = shard(tmp_path/'b', docs[::-1]); server.tags['/f'] = 'v2'
    assert fetch(f'{server.url}/f', tmp_path/'f', pause=.005, check=footer).read_bytes() == new

def test_fetch_checks_the_sum_that_a_redirect_announces(server, tmp_path, docs):
    data = server.files['/cdn/f'] = shard(tmp_path/'src', docs)
    server.tags['/f'] = hashlib.sha256(data).hexdigest(); server.plan['/f'] = ['redirect']*9
    server.plan['/cdn/f'] = ['garbage', 'cut', 'ok']
    assert fetch(f'{server.url}/f', tmp_path/'f', pause=.005).read_bytes() == data
    server.tags['/f'] = '0'*64
    with pytest.raises(ConnectionError, match='SHA-256'): fetch(f'{server.url}/f', tmp_path/'g', pause=.005, tries=2)
    assert not (tmp_path/'g').exists()

def test_fetch_gives_up_in_one_line(server, tmp_path):
    with pytest.raises(ConnectionError, match='status 404') as e: fetch(f'{server.url}/none', tmp_path/'f', pause=5)
    assert len(server.log) == 1 and '\n' not in str(e.value)               # a 404 is not tried again
    server.plan['/f'] = ['503']*9
    with pytest.raises(ConnectionError, match=r'status 503 \(try 3\); run again'): fetch(f'{server.url}/f', tmp_path/'f', tries=3, pause=.005)
    with pytest.raises(ConnectionError, match='run again') as e: fetch('http://127.0.0.1:9/f', tmp_path/'f', tries=2, pause=.005)
    assert '\n' not in str(e.value) and not (tmp_path/'f').exists()

def test_fetch_gives_up_on_a_server_that_drips(server, tmp_path, docs):
    "A byte now and then kept it for ever; 20,000 of them would take 400 s"
    server.files['/f'] = docs[0].encode()*3; start = time.time()
    for mode in ('drip', 'head'):
        server.plan['/f'] = [mode]*9
        with pytest.raises(ConnectionError, match='bytes a second came|no answer in time'): fetch(f'{server.url}/f', tmp_path/mode, tries=2, timeout=.3, pause=.005)
    assert time.time() - start < 10

# ---- damage, and what is none

def flips(path, n, seed): # the file n times with one bit turned over, then whole again
    data, rng = path.read_bytes(), random.Random(seed)
    for _ in range(n):
        k = rng.randrange(len(data)); b = bytearray(data); b[k] ^= 1 << rng.randrange(8)
        with open(path, 'r+b') as f: f.write(b)              # in place
        yield k
    with open(path, 'r+b') as f: f.write(data)

def texts(folder): m = open_data(str(folder)); return [list(m.texts(s)) for s in ('train', 'val')]

def outcomes(folder, path, n, seed=0, before=lambda: None): # of flipped bits: 'same', 'named', 'unnamed' or 'other text'
    good, out = texts(folder), dict.fromkeys(('same', 'named', 'unnamed', 'other text'), 0)
    for k in flips(path, n, seed):
        before()
        try: out['same' if texts(folder) == good else 'other text'] += 1
        except (OSError, ValueError, MemoryError) as e:
            named = path.name in str(e) and ('row group' in str(e) or 'footer' in str(e) or 'whole parquet' in str(e) or 'column' in str(e))
            out['named' if named else 'unnamed'] += 1
    assert texts(folder) == good
    return out

@pytest.mark.parametrize('codec', ['zstd', 'snappy', 'none', 'gzip'])
def test_flipped_bits_in_shards_of_others(base, docs, codec):
    "Of shards without page checksums the sums noted at the first opening find every one"
    (base/'s').mkdir(); f = base/'s'/'wiki_000.parquet'
    for p, t in ((f, docs[:60]), (base/'s'/'wiki_val.parquet', docs[60:70])): pq.write_table(pa.table({'text': t}), p, 20, compression=codec)
    out = outcomes(base/'s', f, 60)
    assert out['other text'] == out['unnamed'] == 0 and out['named'] > 50, out

def test_flipped_bits_in_shards_written_here(base, docs):
    "Page checksums find them at the first reading, without sums from before"
    repackage(iter(docs), base/'s', group_bytes=40_000, key='k'); f = base/'s'/'shard_00000.parquet'
    out = outcomes(base/'s', f, 80, before=lambda: shutil.rmtree(base/'base'/'sums', ignore_errors=True))
    assert out['other text'] <= 1 and out['unnamed'] == 0 and out['named'] > 60, out
    m = open_data(str(base/'s')); log = next((base/'base'/'sums').glob('*.jsonl'))
    assert len(log.read_text().splitlines()) >= 1
    for _ in flips(f, 1, 5): pass                            # whole again, with another date: no alarm
    assert list(m.texts()) == list(open_data(str(base/'s')).texts())

def test_a_shard_that_was_rewritten_is_no_damage(base, docs):
    (base/'s').mkdir(); f = base/'s'/'a_000.parquet'
    for part in (docs[:40], docs[5:35], docs[:40]):          # by hand, and by repackage under the same name
        pq.write_table(pa.table({'text': part}), f, 2); assert list(open_data(str(base/'s')).texts()) == part[:-2]
    for t in ('abc', 'abd'):
        shutil.rmtree(base/'r', ignore_errors=True)
        assert len(list(open_data(str(repackage(iter([t]*9), base/'r', key=t, val_share=.3))).texts())) == 6

LIMITED = '''import os, resource, sys; from nano_dh.dataset import Source, footer, fetch, Damaged
what, path, url = sys.argv[1:4]
held = []
def pinch():
    if what == 'files':
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        try:
            while True: held.append(os.open('/dev/null', 0))
        except OSError: pass
    if what == 'rights' and os.geteuid() == 0: os.setegid(65534); os.seteuid(65534)
    if what == 'memory':
        size = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20),)*2)
if what == 'fetch':
    def check(p): raise {'e': PermissionError(13, 'Permission denied'), 'm': MemoryError('none left'), 'v': ValueError('no column')}[path]
    fetch(url, sys.argv[4], check=check, tries=2, pause=.01)
s = Source('x', {'train': [(path, None)]}); s.groups; pinch()
for f in (lambda: footer(path, 'body'), lambda: s.read_group('train', 0)):
    try: f(); print('no error')
    except (OSError, ValueError, MemoryError) as e: print(type(e).__name__, e)
'''

@pytest.mark.parametrize('what,says', [('files', 'Too many open files'), ('rights', 'Permission denied'), ('memory', 'no memory to read it')])
def test_only_damage_is_called_damage(base, what, says):
    "Too many open files, no permission, no memory: the file is good, and no message tells to delete it or to fetch it again"
    f = base/'big_000.parquet'; words = ' '.join(str(i) for i in range(100_000))
    pq.write_table(pa.table({'text': [words]*40, 'body': ['x']*40}), f, use_dictionary=False); base.chmod(0o711); f.chmod(0o600)
    for p in (base.parent, base.parent.parent): p.chmod(0o711)
    out, err = run(LIMITED, what, f, '').communicate(timeout=60)
    lines = out.splitlines(); assert len(lines) == 2, err
    assert not any(w in out for w in ('delete', 'fetch', 'damaged', 'not a whole')) and f.name in lines[1] and says in lines[1], out
    assert what == 'memory' or says in lines[0]

@pytest.mark.parametrize('kind', 'emv')
def test_fetch_keeps_what_came_when_it_cannot_be_checked(server, tmp_path, docs, kind):
    data = server.files['/f'] = shard(tmp_path/'src', docs)
    p = run(LIMITED, 'fetch', kind, f'{server.url}/f', tmp_path/'f'); assert p.wait(60) == 1
    assert (tmp_path/'f.part').read_bytes() == data and len(server.log) == 1
    fetch(f'{server.url}/f', tmp_path/'f', check=footer); assert len(server.log) == 1   # nothing is fetched twice

# ---- a set of files

def test_many_files_at_once(server, base, docs, monkeypatch):
    rng, repo, last = random.Random(1), *dataset.HUBS['fineweb-edu']
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    for i in (*range(20), last):
        p = f'/datasets/{repo}/resolve/main/shard_{i:05d}.parquet'
        server.files[p] = shard(base/'src', docs[i % 40:i % 40 + 30])
        server.plan[p] = rng.choices(['500', 'cut', 'norange', 'garbage', 'ok'], k=3)
    s = download_hub('fineweb-edu', 20, pause=.005, tries=9)
    names = {Path(p).name: d for p, d in server.files.items()}
    got = {p.name: p.read_bytes() for p in (base/'base'/'data'/'fineweb-edu').glob('*.parquet')}
    assert got == names and s.n_docs() == 600 and s.n_docs('val') == 30
    seen = len(server.log); m = open_data('fineweb-edu@3')                  # what is here is not asked for again
    assert len(server.log) == seen and m.sources[0].read('train', 31) == docs[2]
    server.files.pop(f'/datasets/{repo}/resolve/main/shard_{last:05d}.parquet')
    with pytest.raises(ConnectionError, match=r'shard_\d+.parquet: status 404'): download_hub('fineweb-edu', 25, pause=.005)

def test_unreachable_hub_is_one_line(base, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(ConnectionError) as e: download_hub('climbmix', 2, pause=.005, tries=2)
    assert '\n' not in str(e.value) and 'run again' in str(e.value)

FETCH = 'import sys; from nano_dh.dataset import fetch, footer; print(fetch(sys.argv[1], sys.argv[2], check=footer, pause=.01))'

def test_killed_download_and_ranks_together(server, tmp_path, docs):
    data = server.files['/f'] = shard(tmp_path/'src', docs*6); server.plan['/f'] = ['slow']
    part, p = tmp_path/'f.part', run(FETCH, f'{server.url}/f', tmp_path/'f')
    end = time.time() + 30
    while time.time() < end and not (part.exists() and part.stat().st_size > 1 << 17): time.sleep(.01)
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (tmp_path/'f').exists() and part.exists()
    server.log.clear(); ranks = [run(FETCH, f'{server.url}/f', tmp_path/'f') for _ in range(2)]
    for r in ranks: assert r.wait(60) == 0, r.stderr.read()
    assert (tmp_path/'f').read_bytes() == data
    assert len(server.log) == 1 and server.log[0][2] >= 1 << 17             # one request in all, for the rest

# ---- repackaging

PACK = '''import sys, time; from nano_dh.dataset import repackage, read_file
slow = (time.sleep(.002) or t for t in read_file(sys.argv[1]))
repackage(slow, sys.argv[2], shard_bytes=200_000, key="k")'''

def test_killed_repackaging_continues(tmp_path, docs):
    src = tmp_path/'docs.jsonl'; src.write_text(''.join(json.dumps({'text': t}) + '\n' for t in docs*2))
    p, end = run(PACK, src, tmp_path/'a'), time.time() + 30
    while time.time() < end and not (tmp_path/'a'/'shard_00001.parquet').exists(): time.sleep(.005)
    p.send_signal(signal.SIGKILL); p.wait()
    with pytest.raises(ValueError, match='is unfinished'): open_data(str(tmp_path/'a'))
    args = dict(shard_bytes=200_000, key='k')
    repackage(iter(docs*2), tmp_path/'a', **args); repackage(iter(docs*2), tmp_path/'b', **args)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path/d).glob('*.parquet')} for d in 'ab')
    assert a == b and len(a) == 14 and open_data(str(tmp_path/'a')).n_docs() + open_data(str(tmp_path/'a')).n_docs('val') == 2*len(docs)

def test_full_disk_leaves_no_shard(tmp_path, docs, monkeypatch):
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(dataset.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'): repackage(iter(docs), tmp_path/'a')
    assert not list((tmp_path/'a').glob('*.parquet'))

def test_hub_set_through_datasets(base, docs):
    src = base/'set'; src.mkdir(); shard(src/'train.parquet', docs)
    m = open_data(f'hf:{src}')
    assert m.n_docs() + m.n_docs('val') == len(docs) and m.sources[0].name == 'set'
    assert sorted(open_data(f'hf:{src}').texts()) == sorted(m.texts())
    with pytest.raises(ValueError, match=r"no column 'body', but text"): open_data(f'hf:{src}::body')
    with pytest.raises(ConnectionError, match='did not open') as e: open_data(f'hf:{base}/none')
    assert '\n' not in str(e.value)

# ---- what trains and what is held out

def lay(root, names): # files whose text says what they are: 'x' held out, 't' to train on; ? after a name: text that is neither
    for name in names:
        p = root/name.rstrip('x?'); p.parent.mkdir(parents=True, exist_ok=True); mark = dict(x='HELD', t='TRAIN').get('x' if name[-1] == 'x' else '?' if name[-1] == '?' else 't', 'OTHER')
        lines = [f'{mark} {p.name} {i} ' + 'word '*20 for i in range(40)]
        if p.suffix == '.parquet': pq.write_table(pa.table({'text': lines}), p, 2)
        elif p.suffix == '.jsonl': p.write_text(''.join(json.dumps({'text': t}) + '\n' for t in lines))
        else: p.write_text('\n\n'.join(lines))

def opened(folder, capsys): # -> texts to train on, to validate on, what was said
    capsys.readouterr(); dataset._say.cache_clear(); m = open_data(str(folder))
    return [' '.join(m.texts(s)) for s in ('train', 'val')] + [capsys.readouterr().out]

SAFE = {'dots': ['wiki.train.txt', 'wiki.valid.txtx'], 'spaces': ['wiki train.txt', 'wiki valid.txtx'], 'folders': ['train/a.txt', 'train/b.txt', 'valid/a.txtx'],
    'eval': ['news.jsonl', 'eval.jsonlx'], 'eval word': ['news.jsonl', 'news_eval.jsonlx'], 'evaluation': ['a.txt', 'a-evaluation.txtx'], 'numbered': ['a1.txt', 'a2.txt', 'valid1.txtx'],
    'capitals': ['wikiTrain.jsonl', 'wikiValidation.jsonlx'], 'upper': ['A.TXT', 'VALID.TXTx'], 'held-out': ['a.txt', 'held-out.txtx'], 'holdout': ['a.jsonl', 'a.hold_out.jsonlx'],
    'middle': ['wiki-en.txt', 'wiki-valid-en.txtx'], 'deep': ['train/x/a.txt', 'valid/x/a.txtx'], 'test folder': ['a.txt', 'b.txt', 'test/c.txtx'], 'dev folder': ['train/a.jsonl', 'dev/a.jsonlx'],
    'shard folders': ['train/p_000.parquet', 'train/p_001.parquet', 'valid/p_000.parquetx'], 'shard dots': ['p.000.parquet', 'p.valid.000.parquetx'], 'lone valid': ['wiki_0.parquet', 'wiki_1.parquet', 'valid.parquetx'],
    'other name': ['prose_0.parquet', 'prose_1.parquet', 'books_val.parquetx'], 'eval shards': ['p_0.parquet', 'p-eval.parquetx'], 'below': ['set/train/a.txt', 'set/validation/b.txtx'], 'val only beside': ['a.txt', 'b.txt', 'val/c.txtx'], 'of': ['train-00000-of-00002.parquet', 'validation-00000-of-00001.parquetx'],
    'readme': ['a.jsonl', 'README.md?', 'LICENSE.txt?'], 'readme2': ['a.txt', 'readme.txt?', 'ATTRIBUTION.md?', 'valid.txtx']}

@pytest.mark.parametrize('case', SAFE)
def test_held_out_text_is_not_trained_on(base, capsys, case):
    lay(base/'d', SAFE[case]); train, val, said = opened(base/'d', capsys)
    assert 'HELD' not in train and 'OTHER' not in train + val and 'TRAIN' in train
    if 'test' not in case and 'readme' != case: assert 'HELD' in val and 'TRAIN' not in val
    for name in SAFE[case]: assert Path(name.rstrip('x?')).name in said, (name, said)         # each file is accounted for

@pytest.mark.parametrize('files', [['train-valid.jsonl'], ['a.txt', 'train_or_eval.txt'], ['train/valid_0.parquet', 'train/p_1.parquet'], ['valid/train.txt', 'train/b.txt'],
    ['valid.txtx'], ['a_test.jsonl', 'a_valid.jsonl'], ['valid.parquetx'], ['test/a.txt', 'test/b.txt'], ['wiki_0.parquet', 'books_0.parquet', 'valid.parquet']], ids='+'.join)
def test_what_is_ambiguous_is_refused(base, files):
    lay(base/'d', files)
    with pytest.raises((ValueError, FileNotFoundError), match='its name says|by their names none|could validate') as e: open_data(str(base/'d'))
    assert '\n' not in str(e.value) and any(Path(f).name.rstrip('x') in str(e.value) for f in files)

def test_files_that_are_left_out_need_no_clear_name(base, capsys, monkeypatch):
    "Beside shards, a folder eval with test files in it stopped `-p data wiki:1,books:1`"
    lay(base/'d', ['wiki_0.parquet', 'wiki_val.parquetx', 'books_0.parquet', 'books_val.parquetx', 'eval/gsm8k_test.jsonl?', 'eval/mmlu_train.jsonl?'])
    monkeypatch.setenv('NANO_DH_DATA', str(base/'d'))
    assert [s.name for s in open_data('wiki:1,books:1').sources] == ['wiki', 'books']
    train, val, said = opened(base/'d', capsys)
    assert 'HELD' not in train and 'OTHER' not in train + val and 'gsm8k_test' in said

@pytest.mark.parametrize('shards,groups', [(1, 1), (1, 2), (2, 1), (2, 2), (2, 50), (3, 20), (5, 1), (9, 4), (30, 3)])
def test_a_small_part_is_set_aside(base, docs, shards, groups):
    "Of two shards half became validation"
    t = (docs*20)[:shards*60]; (base/'d').mkdir()
    for i in range(shards): pq.write_table(pa.table({'text': t[60*i:60*(i + 1)]}), base/'d'/f'p_{i:03d}.parquet', -(-60//groups))
    m = open_data(str(base/'d')); n, v = m.n_docs(), m.n_docs('val')
    assert n + v == len(t) and v >= 1 and v/len(t) <= .25, (n, v)
    if shards*groups > 12: assert v/len(t) <= .11, (n, v)
    assert sorted([*m.texts('train'), *m.texts('val')]) == sorted(t)

def test_a_file_asked_for_by_its_name_trains(base, capsys):
    lay(base/'d', ['wiki.valid.jsonl', 'a.txt']); train, val, said = opened(base/'d'/'wiki.valid.jsonl', capsys)
    assert 'TRAIN' in train and 'asked for by itself: it trains' in said

# ---- files of every kind

def packed(path, data): # bytes, written as the name's last ending says
    import bz2, gzip, lzma
    out = {'.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress, '.zst': lambda b: pa.compress(b, 'zstd', asbytes=True)}.get(path.suffix, bytes)(data)
    path.write_bytes(out); return path

LINES = ['one, "two"\nthree', 'vier fünf', '東京 and more', 'x'*300]
def csv_of(delimiter):
    import csv, io
    f = io.StringIO(); w = csv.writer(f, delimiter=delimiter); w.writerows([['id', 'text'], *enumerate(LINES)]); return f.getvalue()
KINDS = {'jsonl': ''.join(json.dumps({'id': i, 'text': t}) + '\n' for i, t in enumerate(LINES)), 'json': json.dumps([{'text': t} for t in LINES], indent=1), 'csv': csv_of(','), 'tsv': csv_of('\t')}

@pytest.mark.parametrize('end', ['', '.gz', '.bz2', '.xz', '.zst'])
@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_is_read(base, kind, end):
    f = packed(base/f'd.{kind}{end}', KINDS[kind].encode())
    assert list(dataset.read_file(f)) == LINES
    m = open_data(str(f)); assert sorted([*m.texts('train'), *m.texts('val')]) == sorted(LINES)
    if kind == 'json': packed(base/f'lines.json{end}', KINDS['jsonl'].encode()); assert list(dataset.read_file(base/f'lines.json{end}')) == LINES

@pytest.mark.parametrize('end', ['.gz', '.bz2', '.xz', '.zst'])
def test_damage_to_packed_files(base, end):
    good = packed(base/f'd.txt{end}', os.urandom(3000).hex().encode()).read_bytes(); f = base/f'd.txt{end}'; n = len(good)
    middle = [good[:n//3] + b'\x00'*9 + good[n//3 + 9:]]*(end != '.zst')          # pyarrow writes no checksum into a zstd frame
    for bad in (good[:n//2], good[:-1], b'not packed at all', *middle):
        f.write_bytes(bad)
        with pytest.raises(dataset.Damaged, match=f'd.txt{end} is damaged'): list(dataset.read_file(f))

@pytest.mark.parametrize('code', ['utf-16', 'utf-16-le', 'utf-16-be'])
@pytest.mark.parametrize('errors', ['strict', 'replace'])
def test_utf16_is_told_and_read(base, code, errors):
    "With errors='replace', which was the advice, it became a text of signs"
    f = base/'a.txt'; f.write_text('Some plain words, and more of them.\n\n'*9, encoding=code)
    with pytest.raises(ValueError, match=f"encoding='{code}'") as e: list(dataset.read_file(f, errors=errors))
    assert list(dataset.read_file(f, errors=errors, encoding=code))[0].lstrip('\ufeff').startswith('Some plain words')
    repackage(f, base/'out', encoding=code, val_share=0); assert 'plain words' in Source('x', {'train': [(base/'out'/'shard_00000.parquet', None)]}).read('train', 0)

def test_latin1_is_read_as_it_is(base):
    f = base/'a.jsonl'; f.write_bytes('{"text": "café"}\n'.encode('latin-1')*30)
    with pytest.raises(ValueError, match="is not UTF-8; .*encoding='latin-1'"): open_data(str(f))
    assert list(dataset.read_file(f, encoding='latin-1')) == ['café']*30

@pytest.mark.parametrize('name,text,column,says', [
    ('a.jsonl', '{"id": 1, "body": "x"}\n', 'text', "column='body'"), ('a.jsonl', '{"id": 1, "body": "x"}\n', 'id', "'id' is int, not text; name one .*column='body'"),
    ('a.jsonl', '{"id": 1}\n', 'text', 'none of them holds text'), ('a.csv', 'id,body\n1,x\n', 'text', "column='id'|column='body'"), ('a.json', '[{"n": 2, "body": "x"}]', 'text', "row 1 has no 'text'.*column='body'")])
def test_advice_that_helps(base, name, text, column, says):
    (base/name).write_text(text)
    with pytest.raises(ValueError, match=says): list(dataset.read_file(base/name, column))

def test_advice_for_parquet_names_a_column_of_text(base):
    pq.write_table(pa.table({'id': [1, 2], 'score': [.5, 1.], 'body': ['a', 'b']}), base/'p.parquet', 1)
    for column in ('text', 'id'):
        with pytest.raises(ValueError, match="column='body'"): footer(base/'p.parquet', column)
    pq.write_table(pa.table({'id': [1, 2]}), base/'q.parquet', 1)
    with pytest.raises(ValueError, match='none of them holds text'): footer(base/'q.parquet', 'id')

@pytest.mark.parametrize('where', ['folder', 'named', 'footer'])
def test_a_pipe_named_like_data_does_not_hang(base, where):
    code = 'import sys; from nano_dh.dataset import footer, open_data\ntry: print(footer(sys.argv[1]) if sys.argv[2] == "footer" else open_data(sys.argv[1]).n_docs())\nexcept (OSError, ValueError) as e: print(type(e).__name__, e)'
    lay(base/'d', ['p_0.parquet', 'p_val.parquet']); os.mkfifo(base/'d'/'p_1.parquet'); os.mkfifo(base/'d'/'x.jsonl')
    out, err = run(code, base/'d' if where == 'folder' else base/'d'/'p_1.parquet', where).communicate(timeout=60)
    assert ('left out p_1.parquet, x.jsonl' in out and out.splitlines()[-1] == '40') if where == 'folder' else 'Error' in out and 'p_1.parquet' in out, out + err

@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('blank', ['', '  \n\t', None, '\u00a0\u2003'])
def test_a_split_of_blanks_is_refused(base, split, blank):
    "It ended in `val bpb nan`"
    (base/'d').mkdir()
    for s in ('train', 'val'): pq.write_table(pa.table({'text': pa.array(['words']*50 if s != split else [blank]*50, pa.string())}), base/'d'/f'p_{s}.parquet', 5)
    with pytest.raises(ValueError, match='all its documents to .* on are blank'): open_data(str(base/'d'))
    pq.write_table(pa.table({'text': pa.array([blank]*200 + ['word'], pa.string())}), base/'d'/f'p_{split}.parquet', 500); assert open_data(str(base/'d'))

@pytest.mark.parametrize('n', [4000])
def test_many_text_files_open_in_linear_time(base, n):
    "10,000 took 15 s at each opening"
    (base/'d').mkdir()
    for i in range(n): (base/'d'/f'book {i}.txt').write_text(f'Book {i}.\n')
    first = open_data(str(base/'d')); start = time.process_time(); again = open_data(str(base/'d')); took = time.process_time() - start
    assert again.fingerprint == first.fingerprint and first.n_docs() + first.n_docs('val') == n and took < 1.5, took

def test_a_replaced_shard_is_noticed_on_resume(base, docs):
    "As many rows as before, but another text; a run from before sizes counted goes on"
    from nano_dh.dataloader import Loader
    tok = Tokenizer.train(docs, 400)
    def load(state=None): return Loader(open_data(str(base/'d')), tok, batch_rows=8, seq_len=64, prefetch=0, state=state)
    (base/'d').mkdir()
    for s in ('000', '001', 'val'): pq.write_table(pa.table({'text': docs[:12]}), base/'d'/f'p_{s}.parquet', 4)
    l = load(); next(l); state = json.loads(json.dumps(l.state_dict())); want = next(l).x
    assert (next(load(state)).x == want).all()
    old = json.loads(json.dumps(state)); old['identity']['shards'] = l.packer.by_rows
    assert (next(load(old)).x == want).all()
    for part in (docs[12:24], [t[:-1] for t in docs[:12]], docs[:11]):
        pq.write_table(pa.table({'text': part}), base/'d'/'p_001.parquet', 4)
        with pytest.raises(ValueError, match='belongs to other batches: shards'): load(state)

# ---- a text that is one long run

RUNS = dict(blanks=lambda n: (' '*99_999 + 'x')*(n//100_000), short=lambda n: (' '*50_000 + 'x')*(n//50_001), mixed=lambda n: '\t\u2003\n '*(n//4),
            long=lambda n: ' '*n + 'x', separators=lambda n: '\x1c'*n, letters=lambda n: 'ab'*(n//2), signs=lambda n: '!'*n, digits=lambda n: '7'*n,
            marks=lambda n: 'a\u0301'*(n//2), edges=lambda n: '\n'.join([' '*100_000, 'y' + ' '*100_001, ' '*200_000])*(n//400_003))

@pytest.mark.parametrize('kind', RUNS)
def test_a_run_costs_no_more_than_its_length(docs, kind):
    "300,000 blanks held the interpreter for 46 s, because the guard against them looked from each of them anew"
    tok = Tokenizer.train(docs, 600); text = RUNS[kind](1_000_000); start = time.time()
    ids = tok.encode(text); took = time.time() - start
    assert took < 4 and tok.decode(ids) == text, took

@pytest.mark.parametrize('n', [99_998, 99_999, 100_000, 100_001, 200_000, 250_000])
def test_runs_are_cut_where_they_were(docs, n):
    "The ids of data that were tokenized before stay what they were"
    tok = Tokenizer.train(docs, 600); enc = tok.enc.encode_ordinary
    for blank in ' \n\t':
        want = enc('a') if n >= 100_000 else enc('a' + blank*n + 'b c')
        if n >= 100_000:
            for _ in range(n//100_000): want += enc(blank*100_000)
            want += enc(blank*(n % 100_000) + 'b c')
        assert tok.encode('a' + blank*n + 'b c') == want

# ---- ranks that share a cache

RANK = '''import sys; from nano_dh.dataset import open_data; from nano_dh.tokenizer import get_tokenizer
m = open_data(sys.argv[1]); print(get_tokenizer("", m, 700).hash, m.n_docs(), m.fingerprint)'''

def test_ranks_open_and_train_once(base, docs):
    src = base/'notes.jsonl'; src.write_text(''.join(json.dumps(t) + '\n' for t in docs))
    ranks = [run(RANK, src) for _ in range(2)]
    said = {r.communicate(timeout=60)[0].splitlines()[-1] for r in ranks}
    assert len(said) == 1 and all(r.returncode == 0 for r in ranks)
    m = open_data(str(src)); assert said.pop().split() == [get_tokenizer('', m, 700).hash, str(m.n_docs()), m.fingerprint]
    assert len(list((base/'base'/'tokenizers').glob('*/meta.json'))) == 1
    get_tokenizer('', m, 701); assert len(list((base/'base'/'tokenizers').glob('*/meta.json'))) == 2

# ---- what is shipped

def test_attribution_names_every_book():
    text = (ROOT/'ATTRIBUTION.md').read_text()
    for s in ('train', 'val'):
        t = pq.read_table(package_data(f'sample_{s}.parquet'), columns=['title', 'author', 'year'])
        for r in {tuple(r.values()) for r in t.to_pylist()}:
            assert f'| {r[1]} | {r[0]} | {r[2]} |' in text and r[2] < 1926

def mill(base, *a): # runs/tokenizer.ipynb -> (exit code, what was printed)
    p = subprocess.run([sys.executable, '-m', 'papermill', ROOT/'runs'/'tokenizer.ipynb', base/'out.ipynb', '--log-output', *a],
                       cwd=base, text=True, capture_output=True, timeout=120, env=os.environ | {'PYTHONPATH': str(ROOT)})
    return p.returncode, p.stdout + p.stderr

def test_tokenizer_notebook(base):
    code, out = mill(base, '-p', 'vocab_size', '600', '-p', 'others', '', '-p', 'name', 'mine', '-p', 'eval_bytes', '50000')
    assert code == 0, out[-2000:]
    assert get_tokenizer('mine').vocab_size == 600 == Tokenizer.load(base/'base'/'tokenizers'/'mine').vocab_size

@pytest.mark.slow
def test_tokenizer_notebook_refuses(base):
    code, out = mill(base, '-p', 'vocab_sise', '600'); assert code == 1 and "did you mean 'vocab_size'" in out
    code, out = mill(base, '-p', 'vocab_size', '100'); assert code == 1 and 'take 265 or more' in out
