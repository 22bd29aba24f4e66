"Kimi Delta Attention, the delta rule without a gate and Mamba-2 as layers of a model: what every mixer has to do"
import os, subprocess, sys
from pathlib import Path
import fresh, pytest, torch
from nano_dh import hybrid_model as hm
from nano_dh.train import _overrides
from nano_dh.mixers import LETTERS, KimiDelta, chunk_kda, chunk_linear, memory_loop, mixer_variants

HERE = Path(__file__).parent.parent
PATTERNS = ['KKKL', 'DDDL', 'MMML']

@pytest.fixture(autouse=True)
def letters(): # as in a fresh process, whatever other tests have registered
    was, order = dict(hm.MIXERS), set(hm.ORDERED)
    for letter, mixer in LETTERS.items(): hm.register_mixer(letter, mixer)
    yield
    hm.MIXERS.clear(); hm.MIXERS.update(was); hm.ORDERED.clear(); hm.ORDERED.update(order)

def model(pattern, **kw): # nothing is zero
    cfg = hm.HybridConfig.from_depth(4, pattern, **dict(dict(vocab_size=64, sequence_len=64, d_model=64, head_dim=16, head_k_dim=16, head_v_dim=16), **kw))
    m, gen = hm.HybridModel(cfg).double(), torch.Generator().manual_seed(0)
    for p in m.parameters():
        if not p.any(): p.data.normal_(0, .1, generator=gen)
    return m

def tokens(*shape): return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))
gap = lambda a, b: (a - b).abs().max().item()

@pytest.mark.parametrize('pattern', PATTERNS)
def test_causal_and_documents_apart(pattern):
    m, x = model(pattern), tokens(2, 70); whole = m(x)
    other = x.clone(); other[:, 40:] = (other[:, 40:] + 1) % 64
    assert gap(m(other)[:, :40], whole[:, :40]) == 0 and gap(m(other)[:, 40:], whole[:, 40:]) > 1e-6
    emb = m.wte.weight; emb.grad = None
    m(x)[:, 30].square().sum().backward(); late = set(x[:, 31:].flatten().tolist()) - set(x[:, :31].flatten().tolist())
    assert all(emb.grad[t].abs().max() == 0 for t in late)
    cu = torch.tensor([0, 1, 33, 70, 104, 140, 140]); docs = m(x, cu_seqlens=cu).flatten(0, 1)
    for a, b in zip(cu[:-2].tolist(), cu[1:-1].tolist()): assert gap(docs[a:b], m(x.flatten()[None, a:b])[0]) < 1e-9
    assert gap(docs.view(whole.shape), whole) > 1e-6

@pytest.mark.parametrize('pattern', [*PATTERNS, 'K', 'D', 'M'])
def test_steps_pieces_and_padding_equal_the_forward(pattern):
    m, x = model(pattern, neg_eigval=True).requires_grad_(False), tokens(2, 50); whole = m(x)
    assert m.cfg.pos == 'none'
    for cuts in (range(1, 50), (1, 7, 39), (32,)):
        s = m.init_state(2, 50); at = [t.data_ptr() for t in s.tensors()]
        assert gap(torch.cat([m(part, state=s) for part in x.tensor_split(tuple(cuts), 1)], 1), whole) < 1e-9
        assert [t.data_ptr() for t in s.tensors()] == at
    s = m.init_state(2, 50); assert s.nbytes() == m.state_bytes(50, 2)
    a, before = m(x[:, :20], state=s, lengths=torch.tensor([9, 20])), [t.clone() for t in s.select(torch.tensor([0])).tensors()]
    for i, j in ((20, 21), (21, 26)): m(x[:, i:j], state=s, lengths=torch.tensor([0, j - i]))   # row 0 takes no part: not a bit changes
    now = s.select(torch.tensor([0]))
    for letter, old, new in zip(m.cfg.layer_types, m.init_state(1, 50).layers, now.layers):
        if letter != 'L': assert torch.equal(new.S, before.pop(0)) and torch.equal(new.conv, before.pop(0))
        else: del before[:2]
    assert gap(a[0, :9], whole[0, :9]) < 1e-9 and gap(m(torch.stack([x[0, 9:33], x[1, 26:]]), state=s)[1], whole[1, 26:]) < 1e-9

@pytest.mark.parametrize('pattern', PATTERNS)
def test_learns_saved_and_loaded(pattern, tmp_path, monkeypatch):
    from nano_dh.checkpoint import load_model, runs_dir, save_checkpoint
    from nano_dh.decode import inference_copy
    from nano_dh.tokenizer import Tokenizer
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path))
    m, x = model(pattern, vocab_size=265).float(), tokens(4, 33)
    opt = torch.optim.Adam(m.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = m(x[:, :-1], targets=x[:, 1:]); opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    assert all(p.grad is not None for p in m.parameters()) and losses[-1] < losses[0] - .3
    assert all(p.grad.abs().sum() > 0 for p in m.blocks[0].mixer.parameters())
    m.eval(); save_checkpoint(runs_dir()/'other', 12, m, None, Tokenizer([bytes([i]) for i in range(256)], name='bytes'), meta=dict(train=dict(stage='base')))
    for letter in LETTERS: hm.MIXERS.pop(letter, None)
    code = ("import torch; from nano_dh.checkpoint import load_model; m = load_model('other')[0]\n"
            "print(m.cfg.pattern, m(torch.arange(9)[None]).double().sum().item())")
    if pattern == 'KKKL': # a process that has never heard of the letter
        env = os.environ | dict(PYTHONPATH=str(HERE), OMP_NUM_THREADS='1')
        p = fresh.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert p.returncode == 0, p.stderr[-1500:]
        said = p.stdout.split()[-2:]
        assert said[0] == pattern and abs(float(said[1]) - m(torch.arange(9)[None]).double().sum().item()) < 1e-3
    for letter, mixer in LETTERS.items(): hm.register_mixer(letter, mixer)
    back = load_model('other')[0]
    assert torch.equal(back.to(torch.float32)(x), m(x)) or gap(back(x), m(x)) < 1e-5
    copy = inference_copy(m, torch.float32); assert not hasattr(copy.blocks[0].mixer, 'fused') and gap(copy(x), m(x)) < 1e-5
    half = model(pattern).bfloat16(); assert half(x).isfinite().all()
    exact = [p.dtype for n, p in half.named_parameters() if n.endswith(('A_log', 'dt_bias'))]; assert set(exact) <= {torch.float32, torch.float64}

@pytest.mark.parametrize('pattern', PATTERNS)
def test_answers_of_the_engine_are_those_of_the_model(pattern):
    from nano_dh.engine import Engine
    m, prompts = model(pattern).eval(), tokens(3, 23).tolist(); prompts[1] = prompts[1][:7]
    for prompt, stream in zip(prompts, Engine(m).generate_batch(prompts, max_tokens=12, temperature=0.)):
        assert list(stream.tokens) == list(m.generate(prompt, 12, temperature=0.))[-12:]

def test_an_unknown_letter_is_one_line():
    with pytest.raises(ValueError, match='known letters: G, L, S.*parameter imports') as e: hm.HybridConfig.from_depth(4, 'QQQL')
    assert '\n' not in str(e.value) and 'K, D, M' in str(e.value)

def test_a_letter_of_ones_own_stays_ones_own(tmp_path):
    "Whoever takes K first has it, and a checkpoint that holds such code is not read with the K of the book"
    (tmp_path/'mine.py').write_text("from nano_dh.deltanet import GatedDeltaNet\nfrom nano_dh.hybrid_model import register_mixer\n"
                                    "class Mine(GatedDeltaNet): pass\nregister_mixer('K', Mine)\n")
    code = ("from nano_dh.core import load_imports, OWN; load_imports('mine.py')\nfrom nano_dh.hybrid_model import HybridConfig, HybridModel, MIXERS\n"
            "m = HybridModel(HybridConfig.from_depth(2, 'KD', d_model=128, vocab_size=64)); print([type(b.mixer).__name__ for b in m.blocks])\n"
            "from nano_dh.safe_checkpoint import _letters\n"
            "meta = dict(model=dict(pattern='KL'), imports=list(OWN.values())); _letters(meta, 'here'); OWN.clear(); _letters(meta, 'here')")
    p = fresh.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(HERE)), cwd=tmp_path)
    assert p.stdout.strip() == "['Mine', 'GatedAttention']" and 'nobody here has registered K' in p.stderr and 'mine.py' in p.stderr, p.stderr[-800:]

@pytest.mark.parametrize('depth', [4, 8, 12])
def test_sizes_match_and_the_list_can_be_compared(depth):
    def on_meta(pattern, **kw):
        with torch.device('meta'): return hm.HybridModel(hm.HybridConfig.from_depth(depth, pattern, vocab_size=4096, **kw))
    def matrices(m): return sum(p.numel() for block in m.blocks for p in block.parameters() if p.ndim == 2)
    for pattern in [*PATTERNS, 'K', 'D', 'M']:
        m, base = on_meta(pattern), on_meta(pattern.replace(pattern[0], 'G'))
        assert abs(matrices(m)/matrices(base) - 1) < .02 and abs(m.param_counts()['scaling']/base.param_counts()['scaling'] - 1) < .02
        assert m.flops_per_token(64) > 0
    first, *words = mixer_variants().split(); assert first == 'GGGL' and {*PATTERNS, 'GL', 'GGGGGGGL', 'G'} <= {*words} and len({*words}) == len(words)
    base = on_meta('GGGL').param_counts()['scaling']
    for word in words:
        pattern, *fields = word.split('+')
        most = .021 if 'elementwise' in word or 'kv_group' in word else .02 # a matrix more, or half of two less
        assert abs(on_meta(pattern, **_overrides(' '.join(fields))).param_counts()['scaling']/base - 1) < most, word

def test_the_same_numbers_wherever_a_layer_is_built():
    cfg = hm.HybridConfig.from_depth(4, 'KKKL', vocab_size=64, d_model=64, head_dim=16, head_k_dim=16, head_v_dim=16)
    with torch.device('meta'): ghost = KimiDelta(cfg, 1)
    ghost, real = ghost.to_empty(device='cpu'), KimiDelta(cfg, 1)
    for m in (ghost, real): m.init_weights(torch.Generator().manual_seed(5))
    for k, x in real.state_dict().items(): assert torch.equal(ghost.state_dict()[k], x), k

def test_chunk_sizes_agree():
    g = torch.Generator().manual_seed(0); r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    q, k, v, beta = *(torch.nn.functional.normalize(r(1, 100, 1, 8), dim=-1) for _ in range(2)), r(1, 100, 2, 6), 2*r(1, 100, 2).sigmoid()
    for rule, decay, correct in ((chunk_kda, -r(1, 100, 2, 8).exp(), True), (chunk_linear, -r(1, 100, 2, 1).exp(), False)):
        true = memory_loop(q, k, v, decay, beta, correct=correct)[0]
        for size in (1, 2, 16, 64, 128): assert gap(rule(q, k, v, decay, beta, chunk_size=size)[0], true) < 1e-9

def test_operations_are_those_of_the_formula():
    from torch.utils.flop_counter import FlopCounterMode
    for letter, rule in (('K', chunk_kda), ('M', chunk_linear)):
        q, k, v, g, beta, S = *(torch.zeros(1, 256, 2, 32) for _ in range(5)), torch.zeros(1, 2, 32, 32)
        if letter == 'M': g = g[..., :1]
        with FlopCounterMode(display=False) as n: rule(q, k, v, g, beta[..., 0], S, chunk_size=64)
        cfg = hm.HybridConfig.from_depth(4, letter, d_model=64, head_dim=32, head_k_dim=32, head_v_dim=32, vocab_size=64)
        with torch.device('meta'): said = LETTERS[letter](cfg, 0).flops(256)
        assert abs(n.get_total_flops()/256/said - 1) < .02

def test_compiles_as_one_graph():
    "As a run on a GPU does it: no break, the same gradients"
    for pattern in PATTERNS:
        m, x, cu = model(pattern[0], n_layer=1), tokens(2, 33), torch.tensor([0, 10, 32, 64])
        def go(f): return torch.autograd.grad(f(x[:, :-1], targets=x[:, 1:], cu_seqlens=cu), list(m.parameters()))
        try: both = zip(go(m), go(torch.compile(m, fullgraph=True, dynamic=False, backend='aot_eager')))
        finally: torch._dynamo.reset()
        assert all(gap(a, b) < 1e-10 for a, b in both)
