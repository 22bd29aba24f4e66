"Inference beyond the chapters: exactness in any company, random schedules, fresh processes, hostile tool calls, long streams."
import copy, json, math, os, random, re, subprocess, sys, threading, time, tracemalloc, weakref
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
import fresh, jsonschema, nbformat, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from nano_dh.bench import TABLES, BenchConfig
import nano_dh.cache as C
from nano_dh.cache import PrefixCache, StateError, read_prompt
from nano_dh.dataset import open_data
from nano_dh.decode import Recorded
import nano_dh.engine as E
from nano_dh.engine import Engine, Request, TextStream, sample
from nano_dh.execution import calculator
from nano_dh.gated_attn import causal_mask, over_cache
from nano_dh.hybrid_model import HybridConfig, HybridModel, generate
from nano_dh.request import _words, gumbel
from nano_dh.tokenizer import Tokenizer
from tiny_run import PAPERMILL, environ, parameters

ROOT = Path(__file__).resolve().parent.parent
TOK = Tokenizer([bytes([i]) for i in range(256)])
SIZE = dict(vocab_size=TOK.vocab_size, sequence_len=4096, d_model=128, head_dim=32, head_k_dim=32, head_v_dim=32)

def make(depth=4, seed=0, noise=.05, **kw):
    m = HybridModel(HybridConfig.from_depth(depth, **{**SIZE, **kw})).requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for p in m.parameters(): p.add_(torch.randn(p.shape, generator=g), alpha=noise)
    return m

@lru_cache
def text(): return next(open_data().texts('train', 100_000)).encode()

@lru_cache
def trained(pattern='GGGL', steps=30):
    "A model that has learned something of the letters of English"
    torch.manual_seed(0)
    m, x = HybridModel(HybridConfig.from_depth(4, pattern, **SIZE)), torch.tensor(list(text()[:60_000]))
    opt = torch.optim.AdamW(m.parameters(), 3e-3)
    for i in range(steps):
        rows = torch.stack([x[j:j+65] for j in torch.randint(0, len(x) - 65, (4,)).tolist()])
        loss = m(rows[:, :-1], targets=rows[:, 1:]); opt.zero_grad(); loss.backward(); opt.step()
    assert loss < 3.4, loss
    return m.requires_grad_(False)

def splits(n, trials, seed=0):
    rng = random.Random(seed)
    for _ in range(trials):
        out, left = [], n
        while left: out.append(min(left, rng.choice((1, 2, rng.randint(1, 64), rng.randint(1, 300))))); left -= out[-1]
        yield out

@pytest.mark.parametrize('dtype,limit,trials', [(torch.float32, 2e-4, 12), (torch.float64, 1e-9, 4),
                                                pytest.param(torch.float32, 2e-4, 200, marks=pytest.mark.slow),
                                                pytest.param(torch.float64, 1e-9, 200, marks=pytest.mark.slow)])
def test_pieces_of_any_length(dtype, limit, trials):
    m = copy.deepcopy(trained()).to(dtype); x = torch.tensor([list(text()[5000:5300])])
    full, worst = m(x), 0.
    for cut in [[1]*300, *splits(300, trials)]:
        state = m.init_state(1, 1)
        z = torch.cat([m(p, state=state) for p in x.split(cut, 1)], 1)
        worst = max(worst, (z - full).abs().max().item())
    print(f'{dtype}: {trials} random splits and single tokens, worst difference of logits {worst:.1e}')
    assert worst < limit

def requests(rng, n, longest=24):
    return [Request([rng.randrange(256) for _ in range(rng.choice((1, 5, 63, 64, 65, 200)))], max_tokens=rng.randint(1, longest),
                    temperature=rng.choice((0, 0, 1, 1.5)), top_k=rng.choice((0, 5, 50)), top_p=rng.choice((1, .9)), min_p=rng.choice((0, .05)),
                    seed=rng.randrange(1 << 40), stop_tokens=tuple(rng.sample(range(256), 12))) for _ in range(n)]

def drain(e, most=5000):
    while e.busy and most: e.step(); most -= 1
    assert not e.busy, 'the engine does not come to an end'

def alone(m, r, **kw): e = Engine(m, TOK, prefix_bytes=0, **kw); return e.run([e.submit(replace(r))])[0]

slow = lambda x: pytest.param(x, marks=pytest.mark.slow)
@pytest.mark.parametrize('kind', [{}, slow(dict(preset='nanochat')), slow(dict(kv_group=2, pos='full')), slow(dict(d_model=192, head_dim=64))])
def test_company_changes_no_bit(kind):
    "16 requests of different lengths, arriving at different steps, some cancelled: each gives what it gives alone"
    m, rng = make(**kind), random.Random(1)
    rs = requests(rng, 16); want = [alone(m, r, exact=True) for r in rs]
    e = Engine(m, TOK, exact=True, max_rows=9)
    order, got = rng.sample(range(16), 16), {}
    while order or e.busy:
        for _ in range(rng.randint(0, 3)):
            if order: i = order.pop(); got[i] = e.submit(replace(rs[i]))
        if rng.random() < .1 and got: rng.choice(list(got.values())).cancel()
        e.step()
    reasons = [s.reason for s in got.values()]
    assert 'cancelled' in reasons and len(set(reasons)) == 3, reasons
    for i, s in got.items(): assert s.tokens == want[i].tokens[:None if s.reason != 'cancelled' else len(s.tokens)]
    assert not e.rows() and not e.nbytes() and not e.pending

def test_fast_mode_same_up_to_ties():
    "Without the exact mode tokens may differ only where two logits are as good as equal"
    m, rng = make().double(), random.Random(2)
    rs = requests(rng, 12); want = [alone(m, r) for r in rs]
    e = Engine(m, TOK, max_rows=5); got = e.run([e.submit(replace(r)) for r in rs])
    assert [s.tokens for s in got] == [s.tokens for s in want]

@pytest.mark.parametrize('exact', [True, False])
def test_results_read_a_step_later(exact):
    "As on a GPU, where a step is launched before the last one was read: the same texts, and an end, also of one token"
    m, rng = make().double(), random.Random(3)
    rs = [*requests(rng, 8), Request([5], max_tokens=1), Request([6], max_tokens=2, stop_tokens=())]
    rs += [Request([7], max_tokens=9, stop_tokens=(), keep=True, logprobs=2)]
    got = []
    for lag in (0, 1):
        e = Engine(m, TOK, max_rows=4, exact=exact); e.lag = lag
        streams = [e.submit(replace(r)) for r in rs]; drain(e); assert not e.pending and not e.rows()
        got.append(streams)
    for a, b in zip(*got):
        assert (a.tokens, a.reason) == (b.tokens, b.reason)
        if a.logprobs: torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs))
        if a.state:
            assert a.state.n == b.state.n
            for x, y in zip(a.state.tensors(), b.state.tensors()): torch.testing.assert_close(x, y)

@lru_cache
def one_layer(pattern): return make(1, pattern=pattern, d_model=32, head_dim=16, head_k_dim=16, head_v_dim=16, mlp_ratio=1., sequence_len=512)

EVENT = st.tuples(st.integers(1, 90), st.integers(1, 12), st.integers(0, 3), st.sampled_from(['submit', 'submit', 'cancel', 'step', 'step']))
def schedule(events, pattern, exact, rows, lag):
    m = one_layer(pattern)
    e = Engine(m, TOK, exact=exact, max_rows=rows, max_bytes=m.state_bytes(128, 6), prefix_bytes=20_000, piece=64)
    e.lag, make_slab = lag, e.new_slab       # lag 1: results are read a step later, as on a GPU
    def counted(rows, cap): # while a slab grows, the old one is still there
        assert e.nbytes() + m.state_bytes(cap, rows) <= e.max_bytes
        return make_slab(rows, cap)
    e.new_slab, streams = counted, []
    for n, k, steps, what in events:
        if what == 'submit': streams.append(e.submit(Request(list(range(n)), max_tokens=k, seed=n, stop_tokens=(k,))))
        elif what == 'cancel' and streams: streams[n % len(streams)].cancel()
        for _ in range(steps): e.step()
        assert e.nbytes() <= e.max_bytes and len(e.rows()) <= rows and e.prefix.nbytes <= 20_000
        assert e.prefix.nbytes == sum(s.nbytes for s in e.prefix.snaps.values())
    drain(e)
    assert all(s.done and (s.reason == 'cancelled' or len(s.tokens) == s.limit or s.tokens[-1] in s.request.stop_tokens) for s in streams)
    assert not e.rows() and not e.pending and e.nbytes() == 0 and not e.reading and e.reader is None
    e.release(); assert e.prefix.nbytes == 0 and not e.prefix.snaps
ARGS = dict(events=st.lists(EVENT, max_size=14), pattern=st.sampled_from('GL'), exact=st.booleans(), rows=st.integers(1, 6), lag=st.integers(0, 1))
QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)
@settings(max_examples=50, derandomize=True, **QUIET)
@given(**ARGS)
def test_random_schedules(**kw):
    with strides(64): schedule(**kw)
@pytest.mark.slow
@settings(max_examples=1000, **QUIET)
@given(**ARGS)
def test_random_schedules_long(**kw):
    with strides(64): schedule(**kw)

PROCESS = '''
import sys, torch
sys.path.insert(0, sys.argv[2]); import test_engine as T
m = T.make(); e = T.Engine(m, T.TOK)
state, meta = m.load_state(sys.argv[1])
print(e.run([e.submit(T.Request([meta["last"]], max_tokens=30, seed=3, top_k=40, stop_tokens=(), state=state))])[0].tokens)
'''
def test_save_new_process_continue(tmp_path):
    m = make(); e = Engine(m, TOK); prompt = list(b'a conversation that goes on')
    s = e.run([e.submit(Request(prompt, max_tokens=30, seed=3, top_k=40, stop_tokens=(), keep=True))])[0]
    last = s.tokens[-1]                                        # the file holds everything before it
    state = m.init_state(1, 1); read_prompt(m, prompt + s.tokens[:-1], state)
    m.save_state(tmp_path/'chat', state, dict(last=last))
    here = e.run([e.submit(Request([last], max_tokens=30, seed=3, top_k=40, stop_tokens=(), state=state))])[0].tokens
    unbroken = e.run([e.submit(Request(prompt, max_tokens=60, seed=3, top_k=40, stop_tokens=()))])[0].tokens
    assert unbroken == s.tokens + here
    out = fresh.run([sys.executable, '-c', PROCESS, str(tmp_path/'chat'), str(ROOT/'tests')], capture_output=True, text=True,
                         env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert out.stdout.strip() == str(here), out.stderr[-500:]
    whole = Engine(m, TOK); kept = e.run([e.submit(Request([7], max_tokens=20, temperature=0, stop_tokens=(), state=s.state))])[0].tokens
    assert kept == generate(m, prompt + s.tokens + [7], 20, 0)      # what `keep` leaves has read all of it
    data = (tmp_path/'chat').read_bytes()
    for bad, word in ((data[:len(data)//2], 'whole'), (b'PK' + data, 'whole'), (data[:-9] + bytes([data[-9] ^ 8]) + data[-8:], 'checksum')):
        (tmp_path/'bad').write_bytes(bad)
        with pytest.raises(StateError, match=word) as err: m.load_state(tmp_path/'bad')
        assert '\n' not in str(err.value)
    with pytest.raises(StateError, match='made by model'): make(seed=1).load_state(tmp_path/'chat')

def test_no_byte_of_a_saved_state_may_change(tmp_path):
    "Every byte of the header, and some of the numbers: one clear error, or nothing was changed"
    m = one_layer('G'); state = m.init_state(1, 1); read_prompt(m, [1, 2, 3], state)
    m.save_state(tmp_path/'s', state, dict(last=3, text='hello'))
    data, bad, rng = (tmp_path/'s').read_bytes(), tmp_path/'bad', random.Random(0)
    size = 8 + int.from_bytes(data[:8], 'little'); assert 100 < size < 2000
    for i in [*range(size), *(rng.randrange(size, len(data)) for _ in range(40))]:
        bad.write_bytes(data[:i] + bytes([data[i] ^ (1 << rng.randrange(7))]) + data[i+1:])
        try: got, meta = m.load_state(bad)
        except StateError as err: assert '\n' not in str(err) and len(str(err)) < 300; continue
        assert meta == dict(last=3, text='hello') and all(torch.equal(a, b) for a, b in zip(got.tensors(), state.tensors()))
    for n in (0, 1, 7, 8, 9, size - 1, size, size + 1, len(data) - 1):
        bad.write_bytes(data[:n])
        with pytest.raises(StateError): m.load_state(bad)
    with pytest.raises(StateError): m.load_state(tmp_path)

def test_prefix_cache_bitwise_and_faster():
    m, rng = make(sequence_len=4096), random.Random(3)
    m = copy.copy(m); m.exact = True
    shared = [rng.randrange(256) for _ in range(2048)]
    ask = [shared + [rng.randrange(256) for _ in range(40)] for _ in range(4)]
    cache = PrefixCache(m)
    def first(q, c):
        t = time.process_time(); z = read_prompt(m, q, m.init_state(1, 4096), c, exact=True); return z, time.process_time() - t
    first(ask[0], None); first(ask[0], cache)
    cold, warm = zip(*((first(q, None), first(q, cache)) for q in ask[1:]))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(cold, warm)) and cache.hits == 3
    ratio = sorted(c[1]/w[1] for c, w in zip(cold, warm))[1]
    print(f'2,048 shared tokens: first token {ratio:.1f} times sooner'); assert ratio >= 3

def test_prefix_cache_bounded():
    m = one_layer('G'); one = m.state_bytes(0)
    c, rng = PrefixCache(m, max_bytes=5*one), random.Random(0)
    for _ in range(20): read_prompt(m, [rng.randrange(256) for _ in range(rng.randint(60, 3000))], m.init_state(1, 64), c)
    assert 0 < c.nbytes <= 5*one and c.nbytes == sum(s.nbytes for s in c.snaps.values())

HOSTILE = ['__import__("os").system("touch /tmp/x")', '().__class__.__bases__[0].__subclasses__()', '9**9**9', '9**9**9**9', '(9**99)**99', '2**-9999999',
           '"a"*10**9', '"a".count("a", 0)', '"a".count.__self__', '"%999999d" % 1', '('*200 + ')'*200, '('*120 + '1' + ')'*120, '('*33 + '1' + ')'*33, '-'*250 + '1', '1'*5000, '9'*257,
           'lambda: 1', '[x for x in (1,)]', 'open("/etc/passwd")', 'exec("1")', 'f"{1}"', '1;2', 'a=1', '\x00', '1\n+1\n', '1e999', '1e308*10', '(-1)**.5', '1j', 'True+1',
           '"a".replace("a","b")', 'b"a".count(b"a")', '1 if 1 else 2', '0x' + 'f'*600, '1<2', '~1', '1@2', '...', 'None', '8**(1/0)', '"".join(["a"])', '2**2049', '1_0'*90,
           "'" + '\\'*45, '"' + '\\'*200, '"' + "\\'"*120]
def test_hostile_expressions():
    before, threads = set(os.listdir('/tmp')), threading.active_count()
    tracemalloc.start(); worst = 0.
    for x in HOSTILE:
        t = time.process_time(); assert calculator(x) is None, x; worst = max(worst, time.process_time() - t)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert worst < .1 and peak < 4e6 and threading.active_count() == threads and 'x' not in set(os.listdir('/tmp')) - before
    assert calculator('2+3*4', seconds=0) is None                    # the clock is looked at

@settings(max_examples=300, derandomize=True, **QUIET)
@given(st.text(alphabet='0123456789+-*/%().,"\'abcount ', max_size=60))
def test_calculator_never_raises(x):
    t = time.process_time(); r = calculator(x); assert (r is None or isinstance(r, str)) and time.process_time() - t < .2

@settings(max_examples=100, derandomize=True, **QUIET)
@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_text_stream(s, stop):
    "Whatever the pieces, together they are the text up to the first stop string"
    s = s.encode('utf-8', 'ignore').decode(); stop = [w.encode('utf-8', 'ignore').decode() for w in stop]; stop = tuple(w for w in stop if w)
    out, hit, ts = '', False, TextStream(TOK, stop)
    for b in s.encode():
        piece, hit = ts.push(b); out += piece
        assert '\ufffd' not in piece or '\ufffd' in s
        if hit: break
    if not hit: out += ts.flush()
    at = [i for w in stop if (i := s.find(w)) >= 0]
    if not at: assert out == s
    else: assert hit and any(s.startswith(out + w) for w in stop) and len(out) >= min(at)

def test_tool_in_the_stream():
    m, sp = make(), TOK.special
    for exact in (False, True):
        e = Engine(m, TOK, exact=exact)
        s = e.submit(Request(TOK.encode('a'), max_tokens=30, tools=True, stop_tokens=(), temperature=0))
        s.forced.extend([sp['<|python_start|>'], *TOK.encode('6*7'), sp['<|python_end|>']])
        e.run([s])
        assert s.tokens[5:9] == [sp['<|output_start|>'], *TOK.encode('42'), sp['<|output_end|>']]
        assert s.tokens[9:] == generate(m, TOK.encode('a') + s.tokens[:9], 21, 0)      # it was read as well

@pytest.mark.parametrize('exact', [True, False])
def test_tools_with_results_a_step_late(exact, monkeypatch):
    """A model that writes calls: what it drew before the engine knew better is replaced, whenever the results are read"""
    m, sp, texts = make().double(), TOK.special, {} # by length of the prompt: position -> what the model writes there
    a, b, out, end = (sp[f'<|{n}|>'] for n in ('python_start', 'python_end', 'output_start', 'output_end'))
    call = lambda x: [a, *TOK.encode(x), b]
    def want(*xs): # calls, and what is forced behind each
        return [t for x in xs for t in [*call(x), *([out, *TOK.encode(calculator(x)), end] if calculator(x) else [])]]
    plans = [([7], want('6*7', '1+1')), ([8]*3, want('open("x")', '2**10')), ([9]*9, want('12*12')), ([5]*30, [])]
    draw = sample
    def write(z, r, pos): # the plan first, then its own words; where the tool speaks it draws what it likes
        plan, at = plans[r.seed], pos - len(r.prompt)
        inside = at < len(plan[1]) and sum(t == out for t in plan[1][:at]) == sum(t == end for t in plan[1][:at]) and plan[1][at] != out
        return torch.tensor(plan[1][at]) if inside else draw(z, r, pos)
    monkeypatch.setattr(E, 'sample', write)
    got = []
    for lag in (0, 1):
        e = Engine(m, TOK, exact=exact, max_rows=3); e.lag = lag
        rs = [Request(p, max_tokens=len(w) + k, seed=i, tools=True, stop_tokens=(), temperature=0, logprobs=0, keep=True)
              for i, (p, w) in enumerate(plans) for k in (9, 0, -1, -3) if len(w) + k > 0]
        ss = [e.submit(r) for r in rs]; drain(e); got.append(ss); assert not e.pending
    for s, t in zip(*got):
        r, plan = s.request, plans[s.request.seed][1]
        assert s.tokens == t.tokens and s.tokens[:len(plan)] == plan[:r.max_tokens] and s.reason == t.reason == 'length'
        assert s.text == t.text and [x is None for x in s.logprobs] == [x is None for x in t.logprobs]
        assert sum(x is None for x in s.logprobs) == forced(s.tokens, out, end)
        assert s.tokens[len(plan):] == generate(m, r.prompt + s.tokens[:len(plan)], max(0, r.max_tokens - len(plan)), 0)
        assert s.state.n == t.state.n == len(r.prompt) + r.max_tokens                # it has read all of it, forced tokens too
        full = m.init_state(1, 1); read_prompt(m, r.prompt + s.tokens, full)
        for x, y, w in zip(s.state.tensors(), t.state.tensors(), full.tensors()):
            if x.shape == w.shape: torch.testing.assert_close(x, w); torch.testing.assert_close(y, w)

def forced(tokens, out, end): # how many of them the tool said
    n = on = 0
    for t in tokens: on |= t == out; n += on; on &= t != end
    return n

def test_noise_is_gumbel():
    u = torch.exp(-torch.exp(-gumbel(1, 2, torch.arange(100_000)).double()))
    counts = torch.histc(u, 100, 0, 1); chi2 = ((counts - 1000)**2/1000).sum().item()
    assert chi2 < 160                                            # 99 degrees of freedom: 1 in 10,000
    a, b = (gumbel(s, p, torch.arange(20_000)).double() for s, p in ((1, 2), (1, 3)))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < .03

def test_sampling_follows_the_distribution():
    z = torch.tensor([2., 1., 0., -1., -3.]); r = Request([1], top_k=4, top_p=.95)
    n = 4000; got = torch.bincount(torch.stack([sample(z, replace(r, seed=i), 7) for i in range(n)]), minlength=5)/n
    p = z.softmax(-1); p[4] = 0; p /= p.sum(); p[3] = 0 if p[:3].sum() >= .95 else p[3]; p /= p.sum()
    assert (got - p).abs().max() < .03, (got, p)

def test_forks_of_one_prompt():
    m = make(); e = Engine(m, TOK, prefix_bytes=0); reads = []
    step = m.forward
    ss = e.generate_batch(['one prompt'], n=6, max_tokens=5, stop_tokens=())
    assert len({tuple(s.tokens) for s in ss}) > 1
    for i, s in enumerate(ss): assert s.tokens == alone(m, replace(s.request)).tokens

def test_limits_have_sentences():
    m = make(pattern='L', sequence_len=64); e = Engine(m, TOK)
    with pytest.raises(ValueError, match='reads up to 63'): e.submit(Request([1]*64))
    assert e.generate([1]*60, max_tokens=50, stop_tokens=()).reason == 'length'
    assert len(make().blocks) == 4 and len(Engine(make(sequence_len=64), TOK).generate([1]*200, max_tokens=30, stop_tokens=()).tokens) == 30
    with pytest.raises(ValueError, match='max_bytes'): Engine(make(), TOK, max_bytes=10_000).submit(Request([1], max_tokens=10_000))
    e = Engine(make(), TOK); ok = e.submit(Request([1], max_tokens=3, stop_tokens=()))
    for bad in ([1, TOK.vocab_size], [-1]):                     # would end in the middle of a step, for everybody
        with pytest.raises(ValueError, match='in the prompt'): e.submit(Request(bad))
    with pytest.raises(ValueError, match='python_start'): Engine(make()).submit(Request([1], tools=True))
    assert len(e.generate([1], max_tokens=2, stop_tokens=(), logprobs=10**6).tops[0]) == TOK.vocab_size
    assert len(ok.result().tokens) == 3 and not e.busy
    assert Request([1], temperature=1e-40).temperature == 0 and sample(torch.tensor([1., 2.]), Request([1], temperature=1e-9), 1) == 1
    for kw, word in ((dict(prompt=[]), 'empty'), (dict(prompt=[1], top_p=0), 'top_p'), (dict(prompt=[1], temperature=-1), 'temperature'),
                     (dict(prompt=[1], max_tokens=0), 'max_tokens'), (dict(prompt=[1], logprobs=-1), 'logprobs'), (dict(prompt=[1], stop=('',)), 'stop')):
        with pytest.raises(ValueError, match=word): Request(**kw)

def test_cancelled_together():
    "Rows that are left in one step, the last of them first in line to move into a hole"
    m = make()
    for gone in ((0, 3), (1, 2, 3), (0, 1, 2, 3), (3,), (0,)):
        for exact in (False, True):
            e = Engine(m, TOK, exact=exact); ss = [e.submit(Request([65 + i], max_tokens=12, seed=i, stop_tokens=())) for i in range(4)]
            for _ in range(3): e.step()
            for i in gone: ss[i].cancel()
            drain(e)
            assert [s.reason for s in ss] == ['cancelled' if i in gone else 'length' for i in range(4)]
            assert not e.rows() and not e.nbytes()

@pytest.mark.slow
def test_run_notebook(tmp_path):
    "runs/inference.ipynb: its parameters are those of the package, tables and figure come out"
    nb = ROOT/'runs'/'inference.ipynb'
    cell = next(c for c in nbformat.read(nb, 4).cells if 'parameters' in c.metadata.get('tags', []))
    rows = [re.match(r'(\w+): (\w+) = (.*?)  # (.+)', l).groups() for l in cell.source.splitlines()]
    assert [(n, t, eval(d)) for n, t, d, _ in rows] == [(f.name, f.type.__name__, f.default) for f in fields(BenchConfig)]
    kw = dict(device='cpu', stages='decode stream', depths=2, variants='GGGL', batches='1 2', prompt=16, stream=20, steps=1)
    r = subprocess.run([PAPERMILL, nb, tmp_path/'o.ipynb', *parameters(**kw)], env=environ(tmp_path/'base'), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    out = {c.id: c.get('outputs', []) for c in nbformat.read(tmp_path/'o.ipynb', 4).cells}
    tables = ''.join(o.data.get('text/markdown', '') for o in out['tables'])
    assert [t for t in TABLES if f'**{t}**' in tables] == ['The step alone', 'One stream'] and 'failed' not in tables
    assert any('image/png' in o.get('data', {}) for o in out['figure'])

def test_failed_prompt_ends_alone(monkeypatch):
    """Memory runs out while prompts are read together: the one at fault ends with the error, the others go on"""
    m = make(); e = Engine(m, TOK); read = E.Reading.read
    def fails(self):
        if any(p[0] == 66 for p in self.prompts): raise MemoryError('no room')
        return read(self)
    monkeypatch.setattr(E.Reading, 'read', fails)
    a, b, c = (e.submit(Request([t], max_tokens=5, stop_tokens=())) for t in (65, 66, 67))
    with pytest.raises(MemoryError): e.run([a, b, c])
    e.run([a, b, c])
    assert (a.reason, b.reason, c.reason) == ('length', 'error', 'length') and not e.busy

@pytest.mark.parametrize('reads,recorded', [(1, 0), (300, 0), (4096, 0), (1, 512), (300, 128)])
def test_prompts_read_together(reads, recorded):
    """Many prompts of different lengths, some known, some twice, some cancelled on the way: the tokens of each alone"""
    m, rng = make().double(), random.Random(reads); kw = dict(max_tokens=6, top_k=20, stop_tokens=())
    base = [rng.randrange(200) for _ in range(150)]
    prompts = [base[:rng.choice((0, 64, 150))] + [rng.randrange(200) for _ in range(rng.randint(1, 140))] for _ in range(14)]
    asks = [Request(p, seed=i, **kw) for i, p in enumerate([*prompts, *prompts[:4]])]
    want = []
    for r in asks:
        e = Engine(m, TOK, prefix_bytes=0); want.append(e.run([e.submit(replace(r))])[0].tokens)
    e = Engine(m, TOK, max_rows=8, piece=128, reads=reads)
    if recorded: e.recorded = Recorded(e.model, recorded)      # as on a GPU, where its pieces are recordings
    streams = [e.submit(replace(r)) for r in asks]
    for i in range(200):
        if i == 1: streams[11].cancel()
        if not e.step(): break
    assert [s.tokens for i, s in enumerate(streams) if i != 11] == [w for i, w in enumerate(want) if i != 11]
    assert streams[11].reason == 'cancelled' and not e.busy and not e.rows()

def test_together_needs_fewer_forwards(monkeypatch):
    m, calls = make(), []; read = E.Reading.read
    monkeypatch.setattr(E.Reading, 'read', lambda self: calls.append(len(self.prompts)) or read(self))
    for reads, want in ((1, [1]*6), (120, [3, 3]), (4096, [6])):
        calls.clear(); e = Engine(m, TOK, reads=reads)
        e.generate_batch([[i]*40 for i in range(6)], max_tokens=2, stop_tokens=())
        assert calls == want

def reading(m, n, times=200): # seconds of attention to n slots
    b = next(b.mixer for b in m.blocks if hasattr(b.mixer, 'c_k'))
    q, k, v = (torch.randn(1, t, h, b.head_dim) for t, h in ((1, b.n_head), (n, b.n_kv_head), (n, b.n_kv_head)))
    pos, out = torch.tensor([[n-1]]), []
    for _ in range(times):
        t = time.perf_counter(); over_cache(q, k, v, b.scale, causal_mask(pos, torch.arange(n)[None])); out.append(time.perf_counter() - t)
    return sorted(out)[times//2]

@pytest.mark.slow
@pytest.mark.parametrize('pattern,n', [('G', 200_000), ('GL', 20_000)])
def test_long_streams(pattern, n):
    m = make(2, pattern=pattern, d_model=64, head_dim=16, head_k_dim=16, head_v_dim=16, mlp_ratio=1.)
    state = m.init_state(1, 1024); fixed = m.state_bytes(0); x, times = torch.tensor([[1]]), []
    recurrent = lambda: sum(t.nbytes for s in state.layers if hasattr(s, 'S') for t in (s.S, s.conv))
    size = recurrent()
    with torch.inference_mode():
        for i in range(n):
            if i % 1000 == 0: times.append(time.process_time())
            x = m(x, state=state)[:, -1:].argmax(-1)
    times.append(time.process_time()); d = [b - a for a, b in zip(times, times[1:])]
    print(f'{pattern}: {n} tokens; ms a token at the start {d[0]:.3f}, at the end {d[-1]:.3f}; recurrent bytes {recurrent()}')
    assert recurrent() == size and int(state.pos) == n
    if pattern == 'G': assert state.nbytes() == fixed and d[-1] < 1.5*sorted(d)[len(d)//2]
    else: # what the attention layer reads more at the end than in the first thousand
        extra = reading(m, n - 500) - reading(m, 500)
        print(f'attention explains {1e3*extra:.3f} ms more a token, {d[0] + 1e3*extra:.3f} in all')
        assert d[-1] < 1.3*(d[0] + 1e3*extra)

def reachable(cache): # bytes that its snapshots keep alive
    seen, todo = {}, list(cache.snaps.values())
    while todo:
        s = todo.pop(); seen[id(s)] = s.nbytes; todo += [s.parent]*(s.parent is not None)
    return sum(seen.values())

def numbers(seed, n): rng = random.Random(seed); return [rng.randrange(200) for _ in range(n)]

def test_state_that_grows_while_read():
    "A known beginning and a new prompt: padded they need more slots than either; what the cache keeps is right"
    m, a, b = make(2, pattern='GL').double(), numbers(0, 200), numbers(1, 150); kw = dict(max_tokens=6, stop_tokens=(), temperature=0)
    e = Engine(m, TOK, reads=4096); e.generate(a, **kw)
    e.run([e.submit(Request(p, **kw)) for p in (a[:199] + [7], b)])
    s = e.generate(b[:140] + [3], **kw)
    assert s.cached == 128 and s.tokens == alone(m, s.request).tokens

def test_bytes_of_the_cache_are_all_counted():
    "A snapshot may leave while a prompt that begins with it is still read"
    m, kw = one_layer('G'), dict(max_tokens=1, stop_tokens=()); e = Engine(m, TOK, reads=4096); a = numbers(0, 65)
    for p in (a, numbers(1, 65)): e.generate(p, **kw)
    e.prefix.max_bytes = e.prefix.nbytes
    e.run([e.submit(Request(p, **kw)) for p in (numbers(2, 70), numbers(3, 80), a[:64] + numbers(4, 140))])
    assert 0 < e.prefix.nbytes == reachable(e.prefix) <= e.prefix.max_bytes

def test_no_room_for_a_prompt(monkeypatch):
    "No memory for a state, then none for the first draw: who needs it ends, nobody is lost, nothing is left behind"
    m, place, first = make(2).double(), Engine.place, E.Slab.first
    def small(self, need):
        if need > 64: raise MemoryError('no room')
        return place(self, need)
    def unlucky(self, i, row, z):
        if row.stream.request.prompt == [66]: raise MemoryError('no room')
        return first(self, i, row, z)
    for name, f, on in (('place', small, Engine), ('first', unlucky, E.Slab)):
        for exact in (False, True):
            rs = [Request([t], max_tokens=n, stop_tokens=(), temperature=0) for t, n in ((65, 5), (66, 90), (67, 5), (68, 1))]
            want = [alone(m, r, exact=exact).tokens for r in rs]
            with monkeypatch.context() as patch:
                patch.setattr(on, name, f); e = Engine(m, TOK, exact=exact); ss = [e.submit(r) for r in rs]
                with pytest.raises(MemoryError): drain(e)
                drain(e)
            assert [s.reason for s in ss] == ['length', 'error', 'length', 'length'] and not ss[1].tokens and e.nbytes() == 0
            assert [s.tokens for s in ss if s is not ss[1]] == [w for i, w in enumerate(want) if i != 1]

def test_cancelled_while_rows_are_short():
    "Read, and waiting for a row behind others: it ends at the next step, not when its turn comes"
    m = make(2); e = Engine(m, TOK, max_rows=4, max_bytes=3*m.state_bytes(128, 1)); kw = dict(max_tokens=100, stop_tokens=())
    e.submit(Request([1], **kw)); e.step(); ss = [e.submit(Request([2+i], **kw)) for i in range(3)]
    for _ in range(3): e.step()
    assert len(e.reading) == 2
    ss[2].cancel(); e.step(); assert ss[2].reason == 'cancelled' and ss[1].reason is None
    drain(e); assert [s.reason for s in ss] == ['length', 'length', 'cancelled']

def test_long_prompt_does_not_widen_others(monkeypatch):
    "A long prompt is not padded with rows that ended long ago"
    calls, read = [], E.Reading.read
    monkeypatch.setattr(E.Reading, 'read', lambda self: calls.append(len(self.prompts)) or read(self))
    for prompts, most in (([[1]*9, [2]*9, [3]*1000, [4]*9], 2), ([[i]*500 for i in range(4)], 4)):
        calls.clear(); e = Engine(one_layer('G'), TOK, piece=64, reads=1024, prefix_bytes=0)
        e.run([e.submit(Request(p, max_tokens=1, stop_tokens=())) for p in prompts])
        assert max(calls) == most, calls

def test_padding_of_a_recorded_piece_has_positions():
    "A piece that begins behind a known beginning, padded beyond the last trained position"
    m = make(2, pattern='GL', pos='full', sequence_len=1024, d_model=64).double(); a = numbers(0, 1023); kw = dict(max_tokens=1, stop_tokens=())
    e = Engine(m, TOK, piece=512); e.recorded = Recorded(e.model, 1024); e.generate(a[:577] + [5], **kw)
    s = e.generate(a, temperature=0, **kw)
    assert s.cached == 576 and s.tokens == alone(m, s.request).tokens

@lru_cache
def mixed(kind): # small, float64
    kw = dict(G=dict(pattern='G'), GL=dict(pattern='GL'), full=dict(pattern='GL', pos='full', sequence_len=300), nanochat=dict(preset='nanochat', window=32))[kind]
    return make(2, **{**dict(d_model=32, head_dim=16, head_k_dim=16, head_v_dim=16, mlp_ratio=1., sequence_len=512), **kw}).double()

@lru_cache
def by_itself(kind, prompt, known, k, seed):
    m, state = mixed(kind), None
    if known: state = m.init_state(1, 64); read_prompt(m, numbers(known, 30), state)
    r = Request(prompt, max_tokens=k, seed=seed, temperature=seed % 2, top_k=20, stop_tokens=(seed,), state=state)
    s = alone(m, r); return r, s.tokens, s.reason

@contextmanager
def strides(n): # long beginnings that are short, so that many prompts wait for one
    with pytest.MonkeyPatch.context() as patch:
        for x in (C, E): patch.setattr(x, 'STRIDE', n)
        yield patch

def journey(seed, kind, waits):
    "Requests, cancels, errors in a random order: every stream ends once, with the tokens of the request alone"
    rng, m = random.Random(seed), mixed(kind); share, stride = seed % 2, rng.choice((64, 64, 128, 1024))
    e = Engine(m, TOK, max_rows=rng.randint(1, 6), max_bytes=m.state_bytes(256, rng.randint(1, 6)), prefix_bytes=rng.choice((0, 1, 60_000, 1 << 30)),
               piece=rng.choice((64, 128, 1024)), reads=rng.choice((1, 100, 300, 4096)))
    if share: # room for many, most of which begin alike
        e.max_rows, e.reads, e.piece, e.max_bytes, stride = rng.randint(2, 12), rng.choice((300, 4096)), 64, m.state_bytes(256, 12), 64
    if share: e.prefix.max_bytes = rng.choice((m.state_bytes(64)*3, 1 << 30))
    if rng.random() < .5: e.recorded = Recorded(m, 256)
    e.lag = rng.randint(0, 1); risk = rng.choice((0, 0, .05)); ends, streams, base = [], [], numbers(seed, 200)
    end = e.end; e.end = lambda s, reason: (ends.append(s.id), end(s, reason))
    group = e.together; e.together = lambda: (group(), waits.append(len(e.awaited)))[0]
    def risky(f):
        def g(*args, **kw):
            if rng.random() < risk: raise MemoryError('bad luck')
            return f(*args, **kw)
        return g
    def step():
        try: e.step()
        except MemoryError: pass
        assert e.nbytes() <= e.max_bytes and len(e.rows()) <= e.max_rows and len(e.reading) == len({s.id for s in e.reading})
        assert e.prefix.nbytes == reachable(e.prefix) <= e.prefix.max_bytes
        kids = [id(s.parent) for s in e.prefix.snaps.values()]
        assert all(s.children == kids.count(id(s)) and not s.gone for s in e.prefix.snaps.values())
    with strides(stride) as patch:
        for on, name in ((E.Reading, 'read'), (Engine, 'place'), (Engine, 'open'), (E.Slab, 'first'), (E.Slab, 'next'), (E.Slab, 'copy'), (HybridModel, 'take'), (type(m.blocks[-1]), 'forward')):
            patch.setattr(on, name, risky(getattr(on, name)))  # the last: in the middle of a forward
        for _ in range(rng.randint(5, 40)):
            what, base = rng.random(), numbers(rng.randrange(8), 200) if share else base
            for _ in range(rng.choice((1, 1, 5)) if what < .5 else 0):
                p = tuple(base[:rng.choice((64, 128, 200) if share else (0, 1, 64, 65, 128, 200))] + numbers(rng.randrange(9), rng.choice((1, 3, 40))))
                was, risk = risk, 0; r, tokens, reason = by_itself(kind, p, rng.choice((0, 0, 0, 7)), rng.choice((1, 2, 12)), rng.randrange(6)); risk = was
                try: streams.append((e.submit(replace(r, keep=rng.random() < .3)), tokens, reason))
                except ValueError: pass                     # does not fit
            if .5 < what < .65 and streams: rng.choice(streams)[0].cancel()
            elif .65 < what < .68: e.release()
            elif what > .68: step()
        for _ in range(2000):
            if not e.busy: break
            step()
    assert not e.busy and not e.rows() and not e.reading and not e.nbytes() and sorted(ends) == sorted(s.id for s, *_ in streams)
    for s, tokens, reason in streams:
        if s.reason in ('cancelled', 'error'): assert s.tokens == tokens[:len(s.tokens)] and (s.cancelled or risk)
        else: assert (s.tokens, s.reason) == (tokens, reason)
        if s.state: assert s.state.n == (s.request.state.n if s.request.state else 0) + len(s.request.prompt) + len(s.tokens)
    return sum(s.reason in ('stop', 'length') for s, *_ in streams)

@pytest.mark.parametrize('kind', ['G', 'GL', 'full', 'nanochat'])
def test_journeys(kind):
    waits = []; assert sum(journey(i, kind, waits) for i in range(8)) > 20 and sum(map(bool, waits)) > 3, waits
@pytest.mark.slow
@pytest.mark.parametrize('kind', ['G', 'GL', 'full', 'nanochat'])
def test_journeys_long(kind): assert sum(journey(i, kind, []) for i in range(8, 200)) > 300

def test_exact_window_in_every_row():
    "Logprobs of a row do not depend on which row of a group it is, with 33 keys neither"
    m = make(2, preset='nanochat', window=32, d_model=32, head_dim=16, head_k_dim=16, head_v_dim=16, mlp_ratio=1., sequence_len=512)
    e = Engine(m, TOK, exact=True, prefix_bytes=0)
    for seed in range(3):
        ss = [e.submit(Request(numbers(seed, 280), max_tokens=10, seed=seed, stop_tokens=(), logprobs=3)) for _ in range(4)]; e.run(ss)
        assert all((s.tokens, s.logprobs, s.tops) == (ss[0].tokens, ss[0].logprobs, ss[0].tops) for s in ss)

# ---- long beginnings that are read once

@contextmanager
def shapes_read(m): # of each forward
    seen = []; hook = m.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    try: yield seen
    finally: hook.remove()

def read_together(m, asks, seen, **kw): # -> streams, tokens that went through the model before each had its first
    e = Engine(m, TOK, reads=1 << 20, **kw); ss = [e.submit(replace(r, max_tokens=1)) for r in asks]
    seen.clear(); e.run(ss); return ss, sum(a*b for a, b in seen)

def test_long_beginning_is_read_once():
    "Six prompts with 2,048 tokens in common cost about one reading of them; tokens as alone, also where the cache has no room"
    m, base = mixed('GL'), numbers(0, 2048)
    asks = [Request(base + numbers(i, 20 + i), seed=i, stop_tokens=()) for i in range(1, 7)]; want = [alone(m, replace(r, max_tokens=1)).tokens for r in asks]
    least, tails = sum(len(r.prompt) - 2048 for r in asks), 6*26
    with shapes_read(m) as seen:
        for kw, most in ((dict(), 2048 + tails), (dict(max_rows=2), 2048 + 3*2*26), (dict(piece=128), 2048 + tails), (dict(exact=True), 2048 + tails),
                         (dict(prefix_bytes=0), 6*(2048 + 26)), (dict(prefix_bytes=m.state_bytes(1024)), 2048 + tails + 5*1024)):
            ss, n = read_together(m, asks, seen, **kw); print(kw, n)
            assert [s.tokens for s in ss] == want
            assert 2048 + least <= n <= most if kw.get('prefix_bytes', 1) else n >= 6*2048 + least
            if not kw: assert [s.cached for s in ss] == [0] + [2048]*5 and n == 2048 + tails
    print(f'{n} tokens with room for one snapshot')

def test_deeper_beginnings():
    "Some share more than others: each beginning is read once, whatever the order"
    m, a = mixed('G'), numbers(0, 192)
    with strides(64), shapes_read(m) as seen:
        ps = [a[:64] + numbers(1, 30), a + numbers(2, 30), a[:128] + numbers(3, 30), a + numbers(4, 30), numbers(5, 30), a[:128]]
        for seed in range(6):
            asks = [Request(p, seed=i, stop_tokens=()) for i, p in enumerate(random.Random(seed).sample(ps, 6))]
            ss, _ = read_together(m, asks, seen, piece=64)
            assert [s.tokens for s in ss] == [alone(m, replace(r, max_tokens=1)).tokens for r in asks]
            known = {s.cached for s in ss if s.request.prompt[:192] == a}
            assert sum(s.cached == 0 for s in ss) == 2 and 192 in known # the first of them, and the one that is unlike all

def test_unrelated_are_read_with_the_first():
    "Who waits keeps its row; the others are read meanwhile, and nobody stands behind a longer one"
    m, base = mixed('G'), numbers(0, 2048); kw = dict(max_tokens=40, stop_tokens=())
    new = lambda e, *p: [e.submit(Request(x, **kw)) for x in p]
    a, b, c, d = base + [1], base + [2], base + numbers(3, 3000), numbers(4, 1025)
    e = Engine(m, TOK, reads=1 << 20); busy, = new(e, [9]); e.step(); ss = new(e, a, b, c, d, a)
    e.step(); assert [s.id for s in e.reading] == [1, 4, 5] and len(e.awaited) == 2          # the same prompt needs not wait
    e.step(); assert ss[3].tokens and not ss[0].tokens                                       # d has ended; known now
    e.step(); assert not e.queue and all(s.tokens for s in (ss[0], ss[1], ss[4])) and not ss[2].tokens
    e.run(ss); assert [s.cached for s in ss] == [0, 2048, 2048, 0, 0] and ss[0].tokens == ss[4].tokens
    e = Engine(m, TOK, reads=1 << 20, max_rows=2); ss = new(e, a, b, d); e.step()
    assert ss[0].tokens and ss[1].tokens and not ss[2].tokens                                # d was the last to come
    e.run(ss); assert all(len(s.tokens) == 40 for s in ss)
    m = mixed('GL'); e = Engine(m, TOK, reads=1 << 20, max_bytes=m.state_bytes(4096, 2) + m.state_bytes(64, 8)); e.submit(Request([1], **kw)); e.step()
    ss = [e.submit(Request(p, max_tokens=k, stop_tokens=())) for p, k in ((a, 40), (b, 40), (d, 5000))]
    e.step(); assert [s.id for s in e.queue] == [2, 3]                                       # who finds no place stands behind who waits
    e.run(ss[:2] + [e.submit(Request([1], max_tokens=1))]); assert ss[2].tokens; ss[2].cancel(); drain(e)

@pytest.mark.parametrize('how', ['cancel', 'error', 'cancel others'])
def test_who_is_waited_for_leaves(how, monkeypatch):
    "The first one goes while others wait for what it reads: the next of them takes its place at the same step"
    m, base = mixed('G'), numbers(0, 2048); read, seen = E.Reading.read, []; kw = dict(max_tokens=4, stop_tokens=())
    ps = [base + [i] for i in range(3)] + [numbers(9, 3000)]; want = [alone(m, Request(p, **kw)).tokens for p in ps]
    def reads(self):
        if how == 'error' and any(p[-1] == 0 for p in self.prompts): raise MemoryError('no room')
        seen.append([p[2048:] for p in self.prompts]); return read(self)
    monkeypatch.setattr(E.Reading, 'read', reads)
    e = Engine(m, TOK, reads=1 << 20, piece=512); busy = e.submit(Request([5], max_tokens=200, stop_tokens=())); e.step(); ss = [e.submit(Request(p, **kw)) for p in ps]
    if how == 'error':
        with pytest.raises(MemoryError, match='no room'): e.run(ss)
        e.run(ss); assert ss[0].reason == 'error' and not ss[0].tokens
    else:
        e.step(); assert [len(e.reading), len(e.awaited)] == [2, 2]
        gone = ss[:1] if how == 'cancel' else ss[1:3]; [s.cancel() for s in gone]; seen.clear(); e.step()
        if how == 'cancel': assert sorted(map(len, seen[0])) == [1, 952] and (1,) in seen[0]
        e.run(ss); assert all(s.reason == 'cancelled' for s in gone)
    e.run([busy]); assert not e.busy and not e.rows() and not e.awaited
    for s, w in zip(ss, want): assert s.tokens == (w if s.reason == 'length' else [])
    assert sum(s.reason == 'length' for s in ss) == (2 if how == 'cancel others' else 3)

def test_a_row_nobody_wants_is_left():
    m = mixed('G'); kw = dict(max_tokens=1, stop_tokens=())
    with strides(64):
        e = Engine(m, TOK, reads=1 << 20, piece=64); busy = e.submit(Request([1], max_tokens=100, stop_tokens=())); e.step()
        long, short = (e.submit(Request(numbers(i, n), **kw)) for i, n in ((0, 1000), (1, 640))); e.step(); assert len(e.reading) == 2
        long.cancel(); e.run([short]); assert short.tokens == alone(m, short.request).tokens
    assert e.prefix.find(short.request.prompt).n == 576 and e.prefix.find(long.request.prompt).n == 64 # one piece

def test_a_small_cache_starves_nobody():
    "Pairs that begin alike keep coming, and drive what a long prompt has read out of the cache: it is read nevertheless, and once"
    m = mixed('G'); kw = dict(max_tokens=1, stop_tokens=())
    with strides(64), shapes_read(m) as seen:
        e = Engine(m, TOK, reads=1 << 20, piece=64, prefix_bytes=3*m.state_bytes(64)); busy = e.submit(Request([1], max_tokens=10**4, stop_tokens=())); e.step()
        long = e.submit(Request(numbers(0, 64*12), **kw)); steps = 0
        while not long.done and steps < 60:
            steps += 1; pair = numbers(steps, 64); [e.submit(Request(pair + [i], **kw)) for i in range(2)]; e.step()
        busy.cancel(); drain(e); print(f'{steps} steps')
    assert steps <= 16

# ---- large pieces, while nobody else decodes

def lengths_read(seen): return [b for _, b in seen if b > 1]

def beside(m, reads=16384, busy=False, **kw): # -> an engine; busy: another row decodes in it
    e = Engine(m, TOK, reads=reads, **kw)
    if busy: e.submit(Request([9], max_tokens=10**4, stop_tokens=())); e.step()
    return e

@pytest.mark.parametrize('kind', ['GL', 'nanochat'])
def test_a_long_prompt_alone_takes_two_forwards(kind):
    "In pieces while another row decodes or where it must be exact; the same logits, the same greedy text"
    m, p = mixed(kind), numbers(0, 5000); kw = dict(max_len=10**4); ask = Request(p, max_tokens=8, temperature=0, stop_tokens=(), logprobs=20)
    grid = [*range(64, 5000, 64), 5000]; exact = [b - a for a, b in zip([0, *grid], grid)]
    with shapes_read(m) as seen:
        def read(e): seen.clear(); s = e.submit(replace(ask)); e.run([s]); return s, lengths_read(seen)
        alone_, n = read(beside(m, **kw)); assert n == [4096, 904]
        for e, want in ((beside(m, prefix_bytes=0, **kw), [5000]), (beside(m, reads=4096, **kw), [3072, 1024, 904]),
                        (beside(m, busy=True, **kw), [1024]*4 + [896, 8]), (beside(m, reads=None, **kw), [1024]*4 + [896, 8])):
            s, n = read(e); assert n == want and s.tokens == alone_.tokens
            torch.testing.assert_close(torch.tensor(s.logprobs), torch.tensor(alone_.logprobs), atol=1e-9, rtol=0)
            for a, b in zip(s.tops, alone_.tops):
                assert dict(a).keys() == dict(b).keys()
                torch.testing.assert_close(torch.tensor([q for _, q in a]), torch.tensor([q for _, q in b]), atol=1e-9, rtol=0)
        s, n = read(beside(m, exact=True, **kw)); assert n == exact and s.tokens == alone_.tokens

def test_large_pieces_in_float32():
    "Logits within what rounding does (as in the test of pieces of any length)"
    m, p = make(sequence_len=4096), numbers(0, 3000); out = [{}, {}]
    for busy in (0, 1):
        e = beside(m, busy=bool(busy)); s = e.submit(Request(p, max_tokens=1, stop_tokens=(), logprobs=TOK.vocab_size)); e.run([s]); out[busy] = dict(s.tops[0])
    assert max(abs(out[0][t] - out[1][t]) for t in out[0]) < 2e-4

def test_exact_bits_do_not_know_large_pieces():
    "Warm and cold, whatever `reads`: bitwise the same"
    m, p = mixed('GL'), numbers(0, 2500); got = []
    for reads, known in ((1024, 0), (16384, 0), (16384, 2300), (16384, 1500)):
        e = Engine(m, TOK, reads=reads, exact=True)
        if known: e.generate(p[:known] + [7], max_tokens=1)
        s = e.generate(p, max_tokens=5, stop_tokens=(), temperature=0, logprobs=10); got.append((s.tokens, s.logprobs, s.tops)); assert s.cached == known//64*64
    assert all(g == got[0] for g in got)

def test_pieces_follow_the_company():
    "Who decodes ends while a long prompt is read: the rest is read at once. A reading that waits for a row goes on in pieces"
    m, p = mixed('G'), numbers(0, 9000); kw = dict(stop_tokens=())
    with shapes_read(m) as seen:
        e = Engine(m, TOK, reads=16384); a = e.submit(Request([1], max_tokens=4, **kw)); e.step(); s = e.submit(Request(p, max_tokens=2, **kw)); seen.clear(); e.run([a, s])
        assert lengths_read(seen) == [1024]*2 + [8192 - 2048, 9000 - 8192] and s.tokens == alone(m, s.request).tokens
        e = Engine(m, TOK, reads=16384, max_bytes=m.state_bytes(16384, 2)); short = numbers(1, 5000)
        ss = [e.submit(Request(q, max_tokens=60, **kw)) for q in (short, p)]; seen.clear(); e.step()
        first = list(seen); e.run(ss); assert [s.tokens for s in ss] == [alone(m, s.request).tokens for s in ss]
        assert max(t for _, t in first) > 1024

def test_questions_on_one_text():
    "Together: the text once. One after the other: the second shows where the text ends, the third finds it"
    m, base = mixed('GL'), numbers(0, 5000); kw = dict(max_tokens=1, stop_tokens=(), temperature=0)
    ps = [base + numbers(i, 1500 + i) for i in range(1, 6)]; want = [alone(m, Request(p, **kw)).tokens for p in ps]
    with shapes_read(m) as seen:
        e = beside(m); ss = [e.submit(Request(p, **kw)) for p in ps]; e.run(ss)
        assert [s.tokens for s in ss] == want and [s.cached for s in ss] == [0] + [4096]*4
        assert seen[0] == (1, 4096) and len(lengths_read(seen)) <= 4 and sum(a*b for a, b in seen) < 4096 + 5*2600
        e, n = beside(m), []
        for p, w in zip(ps, want): seen.clear(); s = e.generate(p, **kw); n.append((s.cached, len(lengths_read(seen)))); assert s.tokens == w
        assert n == [(0, 2), (0, 3), (4096, 2), (4096, 2), (4096, 2)], n
        e = beside(m); e.generate(base, **kw); seen.clear()      # the next turns of a conversation
        assert [e.generate(base + numbers(7, k), **kw).cached for k in (100, 400, 700)] == [4096, 4096, 5120]
        assert lengths_read(seen) == [1004, 1024, 280, 580]      # the second passes 5,120

def test_large_pieces_that_are_cancelled():
    "Between two of them; nobody is left behind"
    m, p = mixed('G'), numbers(0, 9000); e = Engine(m, TOK, reads=16384); s = e.submit(Request(p, max_tokens=5, stop_tokens=())); seen = []
    other = e.submit(Request(numbers(1, 30), max_tokens=5, stop_tokens=()))
    h = m.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape[1]) or s.cancel()); e.step(); h.remove()
    assert s.reason == 'cancelled' and [n for n in seen if n > 1] == [8192]
    assert e.run([other])[0].tokens == alone(m, other.request).tokens and not e.busy and not e.reading

@pytest.mark.parametrize('limit,ends', [(2000, 'length'), (500, 'error')])
def test_no_memory_for_a_large_piece(limit, ends):
    "It is read in small ones; where these are too large as well, it ends with a sentence"
    m, p = mixed('GL'), numbers(0, 5000); asks = [Request(q, max_tokens=4, stop_tokens=()) for q in (p, [3, 4], [5])]; want = [alone(m, r).tokens for r in asks]
    seen = []
    def scarce(_, args):
        seen.append(args[0].shape[1])
        if args[0].shape[1] > limit: raise MemoryError('no room')
    for n in (1, 3):
        e = Engine(m, TOK, reads=16384); h = m.blocks[0].register_forward_pre_hook(scarce); ss = [e.submit(r) for r in asks[:n]]; seen.clear()
        for _ in range(200):
            try:
                if not e.step(): break
            except MemoryError: assert ends == 'error'
        h.remove(); assert [s.reason for s in ss] == [ends, 'length', 'length'][:n] and not e.busy and not e.reading
        assert [s.tokens for s in ss[1:]] == want[1:n] and ss[0].tokens == (want[0] if ends == 'length' else [])
        assert max(seen) > 1024 and (ss[0].error is None) == (ends == 'length')

def test_a_mistake_is_not_tried_again(monkeypatch):
    "Only memory that has run out makes a single prompt start anew"
    m, calls = mixed('G'), []
    monkeypatch.setattr(E.Reading, 'read', lambda self: calls.append(1) or (_ for _ in ()).throw(RuntimeError('a mistake')))
    e = Engine(m, TOK, reads=16384); s = e.submit(Request(numbers(0, 5000)))
    with pytest.raises(RuntimeError, match='a mistake'): e.run([s])
    assert len(calls) == 1 and s.reason == 'error'

def test_longer_prompts_have_smaller_pieces():
    "The mask of a piece has at most `reads` times `reads` entries"
    m = mixed('G'); e = Engine(m, TOK, reads=16384)
    with shapes_read(m) as seen: e.generate(numbers(0, 33_000), max_tokens=1, stop_tokens=())
    n = lengths_read(seen); assert sum(n) == 33_000 and len(n) <= 6 and max(n)*33_000 <= 16384**2

# ---- memory that runs out

@pytest.mark.parametrize('error', [MemoryError('no room'), torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('exact', [False, True])
def test_no_memory_in_a_step(error, exact, monkeypatch):
    "The newest ends with a sentence, the others say what they say alone"
    m, real, calls = mixed('GL'), E.Slab.next, [0]; kw = dict(max_tokens=20, stop_tokens=(), logprobs=1)
    rs = [Request([i]*(i + 1), seed=i, **kw) for i in range(6)]; want = [alone(m, r, exact=exact) for r in rs]
    def next_(self, live):
        out = real(self, live); calls[0] += 1
        if calls[0] in (3, 9): raise error                  # states have moved on, results are lost
        return out
    for lag in (0, 1):
        calls[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(E.Slab, 'next', next_); e = Engine(m, TOK, exact=exact, max_rows=5); e.lag = lag; ss = [e.submit(replace(r)) for r in rs]
            for _ in range(2):
                with pytest.raises(type(error)): e.run(ss)
            e.run(ss)
        assert not e.busy and not e.rows() and not e.pending and [s.reason for s in ss].count('error') == 2 and ss[0].reason == 'length'
        for s, w in zip(ss, want):
            assert s.tokens == w.tokens[:len(s.tokens)] and (s.reason == 'error') == (s.error is not None)
            if s.error: assert re.fullmatch(r'no memory is left to go on with it \(\d+ tokens\); ask for less, or when fewer are served', s.error)
            else: torch.testing.assert_close(torch.tensor(s.logprobs), torch.tensor(w.logprobs)); assert len(s.logprobs) == len(s.tops) == 20
    assert not E.no_memory(RuntimeError('a mistake')) and E.no_memory(error)

@pytest.mark.parametrize('lag', [0, 1])
def test_no_memory_while_a_tool_speaks(lag, monkeypatch):
    "What the calculator has still to say is said after a restart; a continued conversation goes on from its state"
    m, sp = mixed('G').double(), TOK.special; a, b, out, end = (sp[f'<|{n}|>'] for n in ('python_start', 'python_end', 'output_start', 'output_end'))
    plan = [a, *TOK.encode('12*345'), b]; says = [out, *TOK.encode('4140'), end]; draw, real = sample, E.Slab.next
    state = m.init_state(1, 64); read_prompt(m, numbers(1, 30), state)
    def write(z, r, pos):
        at = pos - (30 if r.state else 0) - len(r.prompt)
        return torch.tensor(plan[at]) if at < len(plan) else draw(z, r, pos)
    monkeypatch.setattr(E, 'sample', write)
    def run(fail, before):
        calls = [0]
        def next_(self, live):
            calls[0] += 1
            if calls[0] == fail: raise MemoryError('no room')
            return real(self, live)
        with monkeypatch.context() as patch:
            patch.setattr(E.Slab, 'next', next_); e = Engine(m, TOK); e.lag = lag
            ss = [e.submit(Request(p, max_tokens=24, tools=True, stop_tokens=(), seed=3, state=before, keep=True)) for p in ([1, 2], [3])]
            if fail:
                with pytest.raises(MemoryError): e.run(ss)
            e.run(ss); return ss
    for before in (None, state):
        want = run(0, before)[0]; assert want.tokens[:len(plan + says)] == plan + says and want.text
        for fail in (1, 5, 9, 10, 11, 12, 15):
            s, gone = run(fail, before); assert gone.reason == 'error' and (s.tokens, s.text, s.reason) == (want.tokens, want.text, 'length')
            assert s.state.n == want.state.n
            for x, y in zip(s.state.tensors(), want.state.tensors()): torch.testing.assert_close(x, y)

def test_no_memory_while_a_slab_grows(monkeypatch):
    "Rows that were moved already are still there"
    m, copied = mixed('GL'), E.Slab.copy; kw = dict(max_tokens=30, stop_tokens=()); e = Engine(m, TOK)
    rs = [Request([i], seed=i, **kw) for i in range(4)]; want = [alone(m, r).tokens for r in rs]
    ss = [e.submit(r) for r in rs]; e.step(); calls = [0]
    def copy_(self, *args):
        calls[0] += 1
        if calls[0] == 3: raise MemoryError('no room')
        return copied(self, *args)
    monkeypatch.setattr(E.Slab, 'copy', copy_); late = e.submit(Request([9], **kw))
    with pytest.raises(MemoryError): e.run(ss)
    e.run(ss); assert [s.tokens for s in ss] == want and late.reason == 'error' and 'to read it (1 tokens)' in late.error

def test_close_frees_the_recorded_pieces():
    "At once, without the garbage collector; the engine is as good as new"
    m = make(2); e = Engine(m, TOK, prefix_bytes=0); e.recorded = Recorded(m, 256); kw = dict(max_tokens=5, stop_tokens=())
    want, refs = e.generate([1]*70, **kw).tokens, [weakref.ref(x) for x in (e.recorded, e.recorded.state.tensors()[0])]
    e.release(); assert e.recorded.made; s = e.submit(Request([1]*70, **kw)); e.close(); assert refs[0]() is None and refs[1]() is None
    assert e.run([s])[0].tokens == want and e.recorded is None
    e.graphs = True; assert isinstance(e.open([[1, 2]]).forward, Recorded) and isinstance(e.open([[1], [2]]).forward, HybridModel)
    reading = e.recorded; e.reader = iter(()); e.close(); assert e.recorded is reading      # in use

# ---- mistakes and damage

def until_done(e, ss): # -> what was raised on the way
    raised = []
    while not all(s.done for s in ss):
        try: e.step()
        except Exception as error: raised.append(error)
        assert len(raised) < 50
    return raised

@pytest.mark.parametrize('lag,exact', [(0, False), (1, False), (0, True)])
def test_a_mistake_ends_only_its_request(lag, exact, monkeypatch):
    "A step fails whenever certain rows are in it: these end, with the error, and the others say what they say alone"
    m, real = mixed('GL'), E.Slab.next; kw = dict(max_tokens=20, stop_tokens=())
    rs = [Request([i]*(i + 1), seed=i, **kw) for i in range(12)]; want = [alone(m, r, exact=exact).tokens for r in rs]
    def next_(self, live):
        out = real(self, live)
        if any(len(r.stream.request.prompt) in at and len(r.stream.tokens) >= at[len(r.stream.request.prompt)] for _, r in live): raise RuntimeError('a mistake')
        return out
    monkeypatch.setattr(E.Slab, 'next', next_)
    for at in ({5: 3}, {1: 0}, {12: 1}, {4: 2, 9: 11}, {6: 5, 7: 5, 8: 5}):
        e = Engine(m, TOK, exact=exact); e.lag = lag; ss = [e.submit(replace(r)) for r in rs]; raised = until_done(e, ss)
        bad = [i for i in range(12) if i + 1 in at]
        assert [i for i, s in enumerate(ss) if s.reason == 'error'] == bad and len(raised) == len(bad), (at, [s.reason for s in ss])
        assert all(s.tokens == w for i, (s, w) in enumerate(zip(ss, want)) if i not in bad)
        assert all(ss[i].error == 'the engine failed on it (RuntimeError)' for i in bad) and not e.busy and not e.rows()

def test_a_step_that_fails_once(monkeypatch):
    "Nobody ends, nothing is raised, and all rows are in use again soon"
    m, real, calls = mixed('GL'), E.Slab.next, [0]; kw = dict(max_tokens=60, stop_tokens=())
    rs = [Request([i]*(i + 1), seed=i, **kw) for i in range(8)]; want = [alone(m, r).tokens for r in rs]
    def next_(self, live):
        calls[0] += 1
        if calls[0] == 5: raise RuntimeError('only once')
        return real(self, live)
    monkeypatch.setattr(E.Slab, 'next', next_); e = Engine(m, TOK, max_rows=8); ss = [e.submit(r) for r in rs]
    for _ in range(5): e.step()
    assert e.most == 4
    for _ in range(10): e.step()
    assert e.most == 8 and len(e.rows()) == 8
    assert not until_done(e, ss) and [s.tokens for s in ss] == want and not any(s.error for s in ss)

def test_a_mistake_of_the_calculator(monkeypatch):
    m, sp = mixed('G'), TOK.special; plan = [sp['<|python_start|>'], *b'1+1', sp['<|python_end|>']]; draw = sample
    monkeypatch.setattr(E, 'sample', lambda z, r, pos: torch.tensor(plan[pos - 2]) if r.tools and pos - 2 < len(plan) else draw(z, r, pos))
    def broken(text): raise KeyError(text)
    monkeypatch.setattr(E, 'calculator', broken); e = Engine(m, TOK); kw = dict(max_tokens=12, stop_tokens=())
    a, b = e.submit(Request([1, 2], tools=True, **kw)), e.submit(Request([1, 2], **kw)); raised = until_done(e, [a, b])
    assert (a.reason, b.reason) == ('error', 'length') and [type(x) for x in raised] == [KeyError] and b.tokens == alone(m, b.request).tokens

@pytest.mark.parametrize('lag', [0, 1])
def test_numbers_that_are_none(lag):
    "Not a token is drawn from them; one damaged state ends one stream; damaged weights are named"
    m = mixed('GL'); kw = dict(max_tokens=20, stop_tokens=(), logprobs=1); e = Engine(m, TOK); e.lag = lag
    ss = [e.submit(Request([i]*70, seed=i, **kw)) for i in range(3)]
    for _ in range(5): e.step()
    assert e.damaged() == [] and e.prefix.snaps
    slab, i = e.where(ss[1]); n = len(ss[1].tokens)
    with torch.inference_mode(): slab.state.layers[0].S[i] = float('nan')
    raised = until_done(e, ss); assert [type(x) for x in raised] == [E.NotFinite] and not e.prefix.snaps
    assert [s.reason for s in ss] == ['length', 'error', 'length'] and 'not finite' in ss[1].error and len(ss[1].tokens) <= n + lag
    assert len(ss[1].tokens) == len(ss[1].logprobs) and all(math.isfinite(x) for x in ss[1].logprobs)
    for s in (ss[0], ss[2]): assert s.tokens == alone(m, s.request).tokens
    m = copy.deepcopy(m); m.blocks[1].mlp.c_fc.weight.data[3, 3] = float('nan'); e = Engine(m, TOK); e.lag = lag
    assert e.damaged() == ['blocks.1.mlp.c_fc.weight']
    for how in (dict(), dict(temperature=0.), dict(score=2), dict(score=0, max_tokens=0)):
        s = e.submit(Request([1, 2, 3], **{**kw, **how})); assert [type(x) for x in until_done(e, [s])] == [E.NotFinite] and s.tokens == [] and s.reason == 'error'

# ---- salts, scores, steering

def test_salts_share_nothing():
    "Neither what lies in the cache, nor a reading at the same time, nor the last prompt tells one salt of another's"
    m, p = mixed('GL'), numbers(0, 200); kw = dict(max_tokens=4, stop_tokens=()); e = Engine(m, TOK, max_rows=8)
    ask = lambda salt, p=p: Request(p, salt=salt, **kw)
    first = [e.submit(ask(x)) for x in (b'a', b'b', b'a')]; e.run(first)
    again = [e.run([e.submit(ask(x, p + [1])) for _ in '12']) for x in (b'a', b'b', b'c', b'')]
    assert [s.cached for s in first] == [0, 0, 0] and [[s.cached for s in ss] for ss in again] == [[192]*2, [192]*2, [0, 0], [0, 0]]
    assert e.run([e.submit(ask(b'', p + [1]))])[0].cached == 201 and e.run([e.submit(ask(b'd', p + [1]))])[0].cached == 0    # the last prompt
    assert len({tuple(s.tokens) for s in first}) == 1 and len({tuple(s.tokens) for ss in again for s in ss}) == 1

@pytest.mark.parametrize('n', [1, 2, 63, 64, 65, 200])
def test_scores_of_a_prompt(n):
    m, p = mixed('GL'), numbers(n, n); z = m(torch.tensor([p]))[0].log_softmax(-1); e = Engine(m, TOK, piece=64)
    other = e.submit(Request([1], 40, stop_tokens=())); ss = [e.submit(Request(p, k, score=2, stop_tokens=(), seed=3)) for k in (0, 6)]; e.run([other, *ss])
    for s in ss:
        assert len(s.scores) == n and s.scores[0] == (None, None) and s.reason == 'length'
        for i, (own, top) in enumerate(s.scores[1:]):
            assert abs(own - z[i, p[i+1]]) < 1e-3 and [t for t, _ in top] == z[i].topk(2).indices.tolist() and abs(top[0][1] - z[i].max()) < 1e-3
    assert ss[0].tokens == [] and ss[1].tokens == alone(m, Request(p, 6, stop_tokens=(), seed=3)).tokens and other.tokens == alone(m, other.request).tokens
    with pytest.raises(ValueError, match='at least 1'): Request(p, 0)
    with pytest.raises(ValueError, match='score'): Request(p, score=-1)

@pytest.mark.parametrize('lag', [0, 1])
def test_bias_and_penalties(lag):
    "Token by token as their definition says, in company, and where a restart reads the answer again"
    m = mixed('GL'); kw = dict(max_tokens=30, stop_tokens=())
    hows = [dict(presence=2.), dict(frequency=.7), dict(bias={3: 100., 200: -100.}), dict(bias={7: 2.}, presence=-1., frequency=.5, temperature=0.), dict()]
    def plain(p, r): # one token after the other, from whole forwards
        out = []
        for _ in range(r.max_tokens):
            z = m(torch.tensor([p + out]))[0, -1]
            for t, b in (r.bias or {}).items(): z[t] += b
            for t in set(out): z[t] -= r.presence + r.frequency*out.count(t)
            out.append(sample(z, r, len(p) + len(out)).item())
        return out
    rs = [Request([i + 1]*3, seed=i, **kw, **h) for i, h in enumerate(hows)]; e = Engine(m, TOK); e.lag = lag
    ss = [e.submit(r) for r in rs]
    for _ in range(9): e.step()
    e.step_failed(RuntimeError('on purpose')); e.run(ss)
    assert [s.tokens for s in ss] == [plain(r.prompt, r) for r in rs] and ss[2].tokens == [3]*30

SHORT = dict(type='string', maxLength=6)
SCHEMAS = [dict(type='boolean'), dict(type='null'), dict(type='integer', minimum=-3, maximum=40), dict(type='number', exclusiveMinimum=0, maximum=1), SHORT, dict(enum=['red', 'green', 3, None, 'né']), dict(const={'a': [1]}),
    dict(type='string', pattern='^[a-c]{2,4}$'), dict(type='string', format='date'), dict(type=['integer', 'null'], minimum=0, maximum=9), dict(type='array', items=dict(type='boolean'), minItems=2, maxItems=4),
    dict(type='array', prefixItems=[SHORT, dict(type='boolean')], items=False, minItems=2), dict(anyOf=[dict(type='boolean'), SHORT]), dict(type='object', additionalProperties=False),
    dict(type='object', properties=dict(name=SHORT, age=dict(type='integer', minimum=0, maximum=120), more=dict(type='boolean')), required=['name', 'age'], additionalProperties=False),
    dict(type='object', properties={'a "quoted" \\ é': dict(type='null')}, required=['a "quoted" \\ é'], additionalProperties=False),
    {'$defs': dict(tree=dict(type='object', properties=dict(v=dict(type='boolean'), next=dict(anyOf=[dict(type='null'), {'$ref': '#/$defs/tree'}])), required=['v', 'next'], additionalProperties=False)), '$ref': '#/$defs/tree'}]

def fits(s, schema): # a finished stream
    assert s.reason in ('stop', 'length') and s.error is None, (s.reason, s.error)
    if s.reason == 'length': assert len(s.tokens) == s.limit; return False
    assert s.tokens[-1] in s.engine.stop_tokens and not {*s.tokens[:-1]} & {*TOK.special.values()}
    jsonschema.validate(json.loads(s.text), schema)
    return True

def schemas(): # small ones, nested
    leaf = st.sampled_from(SCHEMAS[:10])
    names = st.lists(st.text(st.characters(codec='utf-8', exclude_categories=['Cs']), max_size=4), unique=True, min_size=1, max_size=3)
    def deeper(inner):
        objects = names.flatmap(lambda ns: st.tuples(st.fixed_dictionaries({n: inner for n in ns}), st.sets(st.sampled_from(ns))))
        lists = st.builds(lambda x, n: dict(type='array', items=x, minItems=n, maxItems=n + 1), inner, st.integers(0, 2))
        return lists | objects.map(lambda o: dict(type='object', properties=o[0], required=sorted(o[1]), additionalProperties=False))
    return st.recursive(leaf, deeper, max_leaves=4)

HOW = [dict(temperature=0.), dict(), dict(temperature=2.), dict(top_k=3), dict(top_p=.5), dict(min_p=.5, bias={34: 100., 123: -100., 256: 100.}), dict(presence=2., frequency=-1.)]

@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(schemas(), st.integers(0, 2**32), st.sampled_from(HOW)), min_size=6, max_size=6))
def test_json_fits_any_schema(asked):
    e, ids = json_engine(), {}
    for schema, seed, how in asked:                      # all of an example at once
        try: g = e.grammar(schema)
        except E.GrammarError as error: assert '\n' not in str(error)
        else: ids[e.submit(Request([seed % 200], 300, seed=seed, grammar=g, **how))] = schema
    for s, schema in zip(e.run([*ids]), ids.values()): fits(s, schema)

@lru_cache
def json_engine(): return Engine(make(vocab_size=320), TOK, exact=True)   # a vocabulary padded beyond the tokenizer's

def test_json_ends_right_and_disturbs_nobody():
    "All schemas, greedy and drawn, in one batch with others: those that end by themselves fit, the others are the same to the bit"
    e, n = json_engine(), len(SCHEMAS)
    gs = [e.grammar(x) for x in SCHEMAS]
    ask = [Request([i], 250, seed=i, temperature=t, grammar=gs[i]) for i in range(n) for t in (0., 1., 1.5)]
    plain = [Request([i, 7], 30, seed=i, temperature=i % 2, logprobs=2, bias={5: 1.} if i % 3 == 0 else None) for i in range(8)]
    alone = [e.run([e.submit(replace(r))])[0] for r in plain]
    mixed = ask + plain; order = random.Random(0).sample(range(len(mixed)), len(mixed))
    got = dict(zip(order, e.run([e.submit(replace(mixed[i])) for i in order])))
    for i, a in enumerate(alone):
        b = got[len(ask) + i]; assert (a.tokens, a.logprobs, a.tops) == (b.tokens, b.logprobs, b.tops)
    ended = [fits(got[k], SCHEMAS[k//3]) for k in range(len(ask))]
    assert sum(ended) > .6*len(ended) and all(any(ended[3*i:3*i + 3]) for i in range(n)), ended
    for k in range(0, len(ask), 5): assert e.run([e.submit(replace(ask[k]))])[0].tokens == got[k].tokens    # and they are the same alone

def test_json_cut_says_length():
    e = json_engine(); g = e.grammar(SCHEMAS[14]); whole = e.run([e.submit(Request([3], 400, seed=1, grammar=g))])[0]
    assert fits(whole, SCHEMAS[14])
    for k in (1, 5, len(whole.tokens) - 1): # the last: complete, but it has not said so
        s = e.run([e.submit(Request([3], k, seed=1, grammar=g))])[0]; assert (s.reason, s.tokens) == ('length', whole.tokens[:k])
    s = e.run([e.submit(Request([3], len(whole.tokens), seed=1, grammar=g))])[0]; assert s.reason == 'stop'

def test_json_goes_on_after_an_error(monkeypatch):
    "A step fails after tokens were followed: they are followed again, from the start if the place is ahead"
    e = Engine(make().double(), TOK); g = e.grammar(SCHEMAS[14]); ask = [Request([i], 60, seed=i, grammar=g) for i in range(3)]
    want = [e.run([e.submit(replace(r))])[0].tokens for r in ask]; steps = 0
    def unlucky(*_):
        nonlocal steps; steps += 1
        if steps == 9: raise MemoryError('no room')
    hook = e.model.blocks[2].register_forward_pre_hook(unlucky); ss = [e.submit(replace(r)) for r in ask]
    with pytest.raises(MemoryError): e.run(ss)
    e.run(ss); hook.remove(); assert [s.tokens for s in ss[:2]] == want[:2] and ss[2].reason == 'error'
    guide, text = E.Guide(g), [*b'{"name": "Ada", "age": 36}']; z = torch.zeros(TOK.vocab_size)
    guide.follow(text); guide.follow(text[:9]); a = guide.mask(z); other = E.Guide(g); other.follow(text[:9]); assert a.equal(other.mask(z)) and a.isfinite().sum() == 1 + 4
    ends = torch.tensor(sorted(e.stop_tokens)); guide.follow(text); assert guide.mask(z).isfinite().nonzero()[:, 0].equal(ends)
    guide.follow([*text, ends[0].item()]); guide.mask(z); guide.check()          # an end that was drawn and is not read back yet

def test_json_that_outgrows_its_parser_ends_alone():
    e = json_engine(); g = e.grammar(SCHEMAS[14]); other = Request([5], 30, seed=5); alone = e.run([e.submit(replace(other))])[0].tokens
    s, o = e.submit(Request([3], 200, grammar=g)), e.submit(other)
    while len(s.tokens) < 3: e.step()
    s.guide.at.consume_token(0); assert s.guide.at.is_error()                    # as llguidance is when a limit is met
    e.run([s, o]); assert s.reason == 'error' and 'too large' in s.error and '\n' not in s.error and o.tokens == alone

def test_json_refusals(monkeypatch):
    e = json_engine(); g = e.grammar({})
    for kw, words in ((dict(tools=True), 'tools speak outside'), (dict(stop_tokens=(1,)), 'leave out stop_tokens')):
        with pytest.raises(ValueError, match=words): Request([1], grammar=g, **kw)
    for bad in (dict(type='wish'), dict(uniqueItems=True, type='array'), {'$ref': 'http://localhost/x'}, dict(type='string', pattern='(?=a)b'), {'not': {}}, {'x-guidance': dict(lenient=True), 'not': {}}, dict(type='integer', minimum=2, maximum=1), 3):
        with pytest.raises(E.GrammarError) as said: e.grammar(bad)
        assert '\n' not in str(said.value) and len(str(said.value)) < 300
    with pytest.raises(E.GrammarError, match='needs a tokenizer'): Engine(make(), None).grammar({})
    monkeypatch.setitem(sys.modules, 'llguidance', None); _words.cache_clear()
    with pytest.raises(E.GrammarError, match='pip install llguidance'): e.grammar({})

def test_json_where_results_are_read_late():
    "As on a GPU, a token is read back one step after it was drawn: the grammar follows it before, its end too"
    e = Engine(make().double(), TOK); late = Engine(e.model, TOK); late.lag = 1
    ask = [Request([i], 120, seed=i, temperature=i % 2, grammar=e.grammar(x) if i % 3 else None) for i, x in enumerate(SCHEMAS)]
    a, b = ([(s.tokens, s.reason, s.error) for s in x.run([x.submit(replace(r)) for r in ask])] for x in (e, late))
    assert a == b and sum(why == 'stop' for _, why, _ in a[1:]) > 5

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_json_on_a_gpu():
    "Recorded steps: what ends by itself fits, the others write what they write alone"
    e = Engine(make().cuda(), TOK, max_rows=32, prefix_bytes=0)
    ask = [Request([i], 200, seed=i, temperature=i % 2, grammar=e.grammar(x)) for i, x in enumerate(SCHEMAS)]
    plain = [Request([i, 7], 60, seed=i) for i in range(6)]; alone = [s.tokens for s in e.run([e.submit(replace(r)) for r in plain])]
    got = e.run([e.submit(r) for r in ask + plain])
    assert sum(fits(s, x) for s, x in zip(got, SCHEMAS)) > len(SCHEMAS)//2 and [s.tokens for s in got[len(ask):]] == alone
