"A mixer, a task and a metric in a file of one's own: trained on two ranks, resumed, evaluated, talked to; no line of the package touched"
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
import fresh, pytest, tiny_run, torch

HERE = Path(__file__).parent.parent
KDA = '''
"Kimi Delta Attention's rule (Kimi team, 2025, arXiv:2510.26692): a decay for each channel instead of each head"
import torch, torch.nn.functional as F
from nano_dh.deltanet import GatedDeltaNet, Linear
from nano_dh.hybrid_model import register_mixer

class KDA(GatedDeltaNet):
    def __init__(self, cfg, layer_idx):
        super().__init__(cfg, layer_idx)
        self.a_proj = Linear(cfg.d_model, self.n_v_head*self.head_k_dim)
    def gates(self, x, ab=None):
        if ab is None: ab = torch.cat([self.a_proj(x), self.b_proj(x)], -1)
        f, n = torch.promote_types(x.dtype, torch.float32), self.n_v_head
        a, b = ab.to(f).split([n*self.head_k_dim, n], -1)
        g = -self.A_log.to(f).exp()[:, None]*F.softplus(a.unflatten(-1, (n, -1)) + self.dt_bias.to(f)[:, None])
        return g, self.beta_max*b.sigmoid()
    def recur(self, q, k, v, g, beta, ctx, state=None):
        (B, T, H, K), HV, V, out = q.shape, v.shape[2], v.shape[3], []
        q, k = (x.repeat_interleave(HV//H, 2).to(g.dtype) for x in (q*K**-.5, k))
        if (ok := ctx.valid()) is not None: g, beta = g.where(ok[..., None], 0), beta.where(ok, 0)
        S = g.new_zeros(B, HV, K, V) if state is None else state.S
        for t in range(T):
            if ctx.doc_ids is not None and t: S = S*(ctx.doc_ids[:, t] == ctx.doc_ids[:, t-1])[:, None, None, None]
            S = S*g[:, t].exp()[..., None]
            miss = v[:, t].to(g.dtype) - torch.einsum('bhkv,bhk->bhv', S, k[:, t])
            S = S + torch.einsum('bhk,bhv->bhkv', k[:, t], miss*beta[:, t, :, None])
            out.append(torch.einsum('bhkv,bhk->bhv', S, q[:, t]))
        if state is not None: state.S.copy_(S.detach())
        return torch.stack(out, 1).to(v.dtype)

register_mixer('K', KDA)

def letters(model, tokenizer, step): return dict(recurrent_layers=model.cfg.layer_types.count('K'))
'''

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    d = tmp_path_factory.mktemp('seams'); (d/'my_kda.py').write_text(KDA); return d

def papermill(work, notebook, name, **params):
    env = os.environ | dict(NANO_DH_BASE_DIR=str(work/'base'), OMP_NUM_THREADS='1', PYTHONPATH=str(HERE))
    words = [x for k, v in params.items() for x in ('-p', k, str(v))]
    out, p = work/f'{name}.ipynb', SimpleNamespace(returncode=0, stderr='')
    try:
        r = tiny_run.papermill(env, '--cwd', work, HERE/'runs'/f'{notebook}.ipynb', out, *words); p.returncode, p.stderr = r.exit_code, r.output
    except Exception as e: p.returncode, p.stderr = 1, str(e)
    cells = json.loads(out.read_text())['cells']
    said = ''.join(''.join(o.get('text', '')) for c in cells for o in c.get('outputs', []) if o.get('output_type') == 'stream')
    return p, said

TINY = dict(depth=2, pattern='KL', vocab_size=512, max_seq_len=32, total_batch_size=256, device_batch_size=4, num_iterations=4, eval_tokens=1024,
            eval_every=0, save_every=2, prompts='The', device='cpu', model='head_k_dim:16 head_v_dim:16')

def test_a_mixer_of_ones_own_from_training_to_chat(work, monkeypatch):
    p, said = papermill(work, 'pretrain', 'first', run='kda', imports='my_kda.py', nproc=2, core_metric='my_kda:letters', **TINY)
    assert p.returncode == 0, p.stderr[-2000:]
    assert "{'recurrent_layers': 1}" in said and 'step     4/4' in said
    env = os.environ | dict(NANO_DH_BASE_DIR=str(work/'base'), OMP_NUM_THREADS='1', PYTHONPATH=str(HERE))
    ask = [sys.executable, '-c', 'from nano_dh.serve import dh_chat; dh_chat()', '--model', 'kda', '-p', 'Hello', '--max-tokens', '4', '--device', 'cpu']
    bad = fresh.run(ask, capture_output=True, text=True, env=env, cwd=work)
    assert bad.returncode and "'stored'" in bad.stderr + bad.stdout and 'my_kda.py' in bad.stderr + bad.stdout
    good = fresh.run([*ask, '--imports', 'stored'], capture_output=True, text=True, env=env, cwd=work)
    assert good.returncode == 0, good.stderr[-1000:]

@pytest.mark.slow # test_a_schedule_of_ones_own_in_every_stage resumes on two ranks, chapter 00 refuses what is not told
def test_a_mixer_of_ones_own_goes_on_and_is_evaluated(work):
    p, _ = papermill(work, 'pretrain', 'first', run='kda2', imports='my_kda.py', nproc=2, core_metric='my_kda:letters', **TINY)
    assert p.returncode == 0, p.stderr[-2000:]
    p, said = papermill(work, 'pretrain', 'more', run='kda2', imports='my_kda.py', resume=True, num_iterations=6, nproc=2)
    assert p.returncode == 0 and 'step     6/6' in said, p.stderr[-2000:]
    p, said = papermill(work, 'pretrain', 'without', run='kda2', resume=True, num_iterations=8)
    assert p.returncode and 'parameter imports' in p.stderr
    p, _ = papermill(work, 'base_eval', 'eval', model='kda2', core='none', max_docs=2, imports='stored', nproc=1, device='cpu')
    assert p.returncode == 0, p.stderr[-2000:]

def test_its_state_is_right_and_nothing_is_fused_or_rotated(work, monkeypatch):
    from nano_dh import core, hybrid_model as hm
    from nano_dh.decode import inference_copy
    letters, order = dict(hm.MIXERS), set(hm.ORDERED)
    core.load_imports(str(work/'my_kda.py'))
    try:
        cfg = hm.HybridConfig.from_depth(2, 'KL', vocab_size=64, sequence_len=32, d_model=64, head_dim=32, head_k_dim=16, head_v_dim=16)
        assert cfg.pos == 'none' and hm.HybridConfig.from_depth(2, 'L').pos == 'full'
        m = hm.HybridModel(cfg).double(); gen = torch.Generator().manual_seed(0)
        for p in m.parameters():
            if not p.any(): p.data.normal_(0, .1, generator=gen)
        x = torch.randint(0, 64, (2, 12), generator=gen); whole, state = m(x), m.init_state(2, 12)
        parts = torch.cat([m(x[:, :5], state=state), *(m(x[:, t:t+1], state=state) for t in range(5, 12))], 1)
        assert (whole - parts).abs().max() < 1e-9 and m.init_state(2, 12).nbytes() == m.state_bytes(12, 2)
        two = m(x.reshape(1, -1), cu_seqlens=torch.tensor([0, 12, 24]))
        assert (two.view(whole.shape) - whole).abs().max() < 1e-9
        copy = inference_copy(m, torch.float64)
        assert not hasattr(copy.blocks[0].mixer, 'fused') and (copy(x) - whole).abs().max() < 1e-9
    finally:
        hm.MIXERS.clear(); hm.MIXERS.update(letters); hm.ORDERED.clear(); hm.ORDERED.update(order); sys.modules.pop('my_kda', None); core.OWN.pop('my_kda', None)

def test_a_mixer_says_whether_it_knows_the_order():
    from nano_dh.hybrid_model import MIXERS, register_mixer
    with pytest.raises(ValueError, match='does it know the order of tokens'): register_mixer('X', lambda cfg, i: None)
    assert 'X' not in MIXERS

def test_the_chapters_mixer_works_from_a_file(tmp_path):
    "The cell of the chapter, below the imports that it names, as my_mixer.py"
    cells = {c['id']: ''.join(c['source']) for c in json.loads((HERE/'nbs'/'05_hybrid_model.ipynb').read_text())['cells']}
    (tmp_path/'my_mixer.py').write_text(cells['ema-file'] + '\n' + cells['ema'])
    code = ("from nano_dh.core import load_imports; load_imports('my_mixer.py')\nimport torch\nfrom nano_dh.hybrid_model import HybridConfig, HybridModel\n"
            "m = HybridModel(HybridConfig.from_depth(2, 'EL', vocab_size=64, sequence_len=32, d_model=64, head_dim=32))\n"
            "print(m(torch.zeros(1, 4, dtype=torch.long)).shape, len(m.generate([1, 2], 3)))")
    p = fresh.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(HERE)))
    assert p.returncode == 0 and p.stdout.strip() == 'torch.Size([1, 4, 64]) 3', p.stderr[-1000:]

STAIRS = '''
"A rate that is halved at every quarter of the run"
from nano_dh.train import SCHEDULES

def stairs(step, cfg): return .5**(4*step//cfg.num_iterations)
SCHEDULES['stairs'] = stairs
'''

def test_a_schedule_of_ones_own_in_every_stage(work):
    "On two ranks, resumed, and refused without its file; then fine-tuning and reinforcement learning by the same name"
    from nano_dh import core
    from nano_dh.launch import run_ranks
    from nano_dh.rl import RLConfig, rl
    from nano_dh.sft import FinetuneConfig, finetune
    from nano_dh.train import SCHEDULES, PretrainConfig, pretrain, read_metrics
    from nano_dh.checkpoint import runs_dir
    (work/'my_stairs.py').write_text(STAIRS); was, threads = os.environ.get('NANO_DH_BASE_DIR'), torch.get_num_threads()
    os.environ['NANO_DH_BASE_DIR'] = str(work/'stairs'); own = dict(schedule='stairs', imports=str(work/'my_stairs.py')); torch.set_num_threads(1)
    rates = lambda run: {r['step']: r['lrm'] for r in read_metrics(runs_dir()/run) if 'loss' in r}
    stairs = lambda n: {s: .5**(4*(s - 1)//n) for s in range(1, n + 1)}
    try:
        with pytest.raises(ValueError, match="schedule 'stairs': use 'linear' or 'cosine'; one of your own comes with its file in imports"):
            PretrainConfig(schedule='stairs', device='cpu').resolved()
        core.load_imports(own['imports']); tiny = {k: v for k, v in TINY.items() if k not in ('model', 'pattern')} | dict(pattern='GL', num_iterations=8)
        go = PretrainConfig(**tiny, **own, run='base', nproc=2)
        list(run_ranks(pretrain, go, 2, 'cpu'))
        assert rates('base') == stairs(8)
        lr = {r['step']: r['lr'] for r in read_metrics(runs_dir()/'base') if 'loss' in r}
        assert lr[8] == lr[1]/8
        SCHEDULES.pop('stairs')
        with pytest.raises(ValueError, match="schedule 'stairs'"): PretrainConfig(run='base', resume=True, device='cpu').resolved()
        core.OWN.pop('my_stairs', None); sys.modules.pop('my_stairs', None); core.load_imports(own['imports'])
        list(run_ranks(pretrain, PretrainConfig(run='base', resume=True, num_iterations=12, imports=own['imports'], nproc=2, device='cpu'), 2, 'cpu'))
        after = rates('base'); assert list(after) == list(range(1, 13)) and all(after[s] == stairs(12)[s] for s in range(9, 13))
        finetune(FinetuneConfig(**own, base='base', run='chat', tasks='sums@20', val_tasks='sums/test@5', num_iterations=4, total_batch_size=256,
                                device_batch_size=4, eval_every=0, nproc=0, prompts='', device='cpu', max_seq_len=64), str)
        assert rates('chat') == stairs(4)
        rl(RLConfig(**own, base='base', run='rl', task='sums', questions=1, samples=2, eval_questions=1, num_iterations=4, eval_every=0, max_tokens=4,
                    nproc=0, device='cpu'), str)
        assert rates('rl') == stairs(4)
    finally:
        SCHEDULES.pop('stairs', None); core.OWN.pop('my_stairs', None); sys.modules.pop('my_stairs', None); torch.set_num_threads(threads)
        os.environ.pop('NANO_DH_BASE_DIR') if was is None else os.environ.update(NANO_DH_BASE_DIR=was)
