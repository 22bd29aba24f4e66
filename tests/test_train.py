"Training as processes: killed and continued, one rank against two, started from a notebook or by torchrun, stopped when the loss is lost."
import gc, inspect, json, os, shutil, signal, subprocess, time
from dataclasses import replace
from pathlib import Path
import fresh, pytest, torch
from tiny_run import PY, TINY, environ, options, tiny_data

@pytest.fixture(scope='module')
def data(tmp_path_factory): return tiny_data(tmp_path_factory.mktemp('data')/'books')

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "One base folder for the module, so that the tokenizer is trained once"
    p, old = tmp_path_factory.mktemp('base'), {k: os.environ.get(k) for k in ('NANO_DH_BASE_DIR', 'OMP_NUM_THREADS')}
    os.environ.update(NANO_DH_BASE_DIR=str(p), OMP_NUM_THREADS='1')
    threads = torch.get_num_threads(); torch.set_num_threads(1)      # as in the fresh processes
    yield p
    torch.set_num_threads(threads)
    for k, v in old.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})

def losses(base, run):
    from nano_dh.train import read_metrics
    return {r['step']: r['loss'] for r in read_metrics(base/'runs'/run) if 'loss' in r}

def here(nproc=0, **kw):
    "A run in this process, or on ranks started from it"
    from nano_dh.launch import run_ranks
    from nano_dh.train import PretrainConfig, pretrain
    return list(run_ranks(pretrain, PretrainConfig(**TINY | kw, nproc=nproc), nproc, 'cpu'))

def train(base, **kw):
    "A run in a fresh process, as the command line starts it"
    r = fresh.run([PY, '-m', 'nano_dh.train', *options(**TINY | kw)], env=environ(base), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return r.stdout

def weights(base, run, step):
    from nano_dh.checkpoint import load_model
    return load_model(base/'runs'/run, step=step, device='cpu')[0].state_dict()

def loader(base, run, step): return json.loads((base/'runs'/run/f'{step:06d}'/'loader.json').read_text())

@pytest.fixture(scope='module')
def straight(base, data):
    here(data=data, run='straight', num_iterations=40, save_every=20, keep=0, eval_every=0)
    return losses(base, 'straight')

@pytest.mark.parametrize('shared', [1, 2])
def test_what_a_gpu_run_asks_of_its_kernels(base, data, monkeypatch, shared): # without one: only that the question is understood
    from nano_dh import pretrain
    from nano_dh.train import PretrainConfig
    monkeypatch.setattr(pretrain, 'get_device', torch.device)
    given = TINY | dict(data=data, run='asked', depth=4)
    cfg = replace(PretrainConfig(**given).resolved(), device='cuda', context_parallel=shared)
    asked = inspect.signature(pretrain.choose_backend).bind(**pretrain._asked(cfg)).arguments
    shape = cfg.model_config()
    assert [asked['n_v_head']*shared, asked['head_k_dim'], asked['head_v_dim']] == [shape.n_v_head, shape.head_k_dim, shape.head_v_dim]
    assert pretrain._asked(replace(cfg, pattern='L')) == {}

def test_killed_and_resumed_is_bitwise_the_same(base, data, straight):
    cmd = [PY, '-m', 'nano_dh.train', *options(**TINY | dict(data=data, run='killed', num_iterations=40, save_every=20, keep=0, eval_every=0))]
    p, end = fresh.Popen(cmd, env=environ(base), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), time.time() + 60
    while len(losses(base, 'killed')) < 24 and time.time() < end: time.sleep(.02)
    p.kill(); p.wait()
    assert 24 <= len(losses(base, 'killed')) < 40
    with (base/'runs'/'killed'/'metrics.jsonl').open('a') as f: f.write('{"step": 99, "lo')        # a line cut short
    train(base, run='killed', resume=True)
    assert losses(base, 'killed') == straight and list(straight) == list(range(1, 41))
    assert loader(base, 'killed', 40) == loader(base, 'straight', 40)
    a, b = weights(base, 'killed', 40), weights(base, 'straight', 40)
    assert all(torch.equal(a[k], b[k]) for k in b)

def test_resumed_on_two_ranks(base, data, straight):
    from nano_dh.launch import run_ranks
    from nano_dh.train import PretrainConfig, pretrain
    run = base/'runs'/'wider'; run.mkdir()
    for f in ('config.json', '000020'): (shutil.copytree if f == '000020' else shutil.copy)(base/'runs'/'straight'/f, run/f)
    c = json.loads((run/'config.json').read_text()); (run/'config.json').write_text(json.dumps(c | dict(run='wider')))
    list(run_ranks(pretrain, PretrainConfig(run='wider', resume=True, nproc=2, device='cpu'), 2, 'cpu'))
    two = losses(base, 'wider')
    assert list(two) == list(range(21, 41))
    assert max(abs(two[s] - straight[s]) for s in two) < 1e-5
    assert loader(base, 'wider', 40) == loader(base, 'straight', 40)

@pytest.mark.parametrize('dtype,d_loss,d_weights', [('float64', 1e-10, 1e-8), pytest.param('float32', 1e-5, 1e-3, marks=pytest.mark.slow)])
def test_two_ranks_equal_one(request, base, data, monkeypatch, dtype, d_loss, d_weights):
    "20 steps, the same global batch, default warm-up; ranks started as the notebook does, by the command line and by torchrun"
    kw = dict(data=data, num_iterations=20, save_every=0, eval_every=0, prompts='')
    monkeypatch.setenv('NANO_DH_DTYPE', dtype)
    for n in (0, 2): here(n, run=f'{dtype}-{n}', **kw)
    started = ['2']
    if dtype == 'float64':
        args = [o[2:] for o in options(**TINY | kw, run='float64-t')]
        r = subprocess.run([PY, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'nano_dh.train', *args],
                           env=environ(base), capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
        assert json.loads((base/'runs'/'float64-t'/'000020'/'meta.json').read_text())['world_size'] == 2; started.append('t')
    if request.config.getoption('slow'): train(base, **kw, run=f'{dtype}-m', nproc=2); started.append('m')   # by the command line, as test_resumed_on_two_ranks
    one, w1 = losses(base, f'{dtype}-0'), weights_of(base, f'{dtype}-0', dtype)
    for other in started:
        two, w2 = losses(base, f'{dtype}-{other}'), weights_of(base, f'{dtype}-{other}', dtype)
        assert list(two) == list(range(1, 21)) and max(abs(one[s] - two[s]) for s in one) <= d_loss
        assert max(((w1[k] - w2[k]).norm()/(w1[k].norm() + 1e-12)).item() for k in w1) <= d_weights

def weights_of(base, run, dtype, step=20):
    "The weights in the format they were trained in"
    from nano_dh.checkpoint import load_checkpoint
    from nano_dh.hybrid_model import HybridConfig, HybridModel
    d = base/'runs'/run/f'{step:06d}'
    m = HybridModel(HybridConfig.from_dict(json.loads((d/'meta.json').read_text())['model'])).to(getattr(torch, dtype))
    load_checkpoint(d, m, rng=False)
    return m.state_dict()

def test_ranks_that_share_rows_equal_one(base, data, monkeypatch):
    "Two ranks with a half of every row each, with document borders: the losses of one rank, and one rank goes on from them"
    import pyarrow.parquet as pq
    from nano_dh.launch import run_ranks
    from nano_dh.sft import FinetuneConfig
    from nano_dh.train import PretrainConfig, pretrain
    size, short = 'd_model:64 head_dim:32 head_k_dim:32 head_v_dim:32', base/'short.jsonl'
    texts = pq.read_table(Path(data)/'books_train.parquet')['text'].to_pylist(); pieces = [t[i:i + 60] for t in texts for i in range(0, 1200, 60)]
    short.write_text('\n'.join(json.dumps(dict(text=t)) for t in pieces))
    kw = dict(data=str(short), depth=4, model=size, num_iterations=8, save_every=4, eval_every=0, prompts='', doc_mask=True, max_seq_len=64)
    monkeypatch.setenv('NANO_DH_DTYPE', 'float64')
    for n, name, more in ((0, 'whole', {}), (2, 'shared', dict(context_parallel=2)), (0, 'blind', dict(doc_mask=False))): here(n, run=name, **kw | more)
    whole, two, blind = (losses(base, name) for name in ('whole', 'shared', 'blind'))
    assert list(two) == list(range(1, 9)) and max(abs(whole[s] - two[s]) for s in whole) < 1e-10
    assert abs(whole[8] - blind[8]) > 1e-6                       # there are borders within rows
    shutil.rmtree(base/'runs'/'shared'/'000008')
    list(run_ranks(pretrain, PretrainConfig(run='shared', resume=True, nproc=0, device='cpu'), 0, 'cpu'))
    assert max(abs(whole[s] - losses(base, 'shared')[s]) for s in whole) < 1e-10
    w1, w2 = (weights_of(base, name, 'float64', 8) for name in ('whole', 'shared'))
    assert max(((w1[k] - w2[k]).norm()/(w1[k].norm() + 1e-12)).item() for k in w1) < 1e-8
    with pytest.raises(ValueError, match='in pretraining only'): FinetuneConfig(context_parallel=2, device='cpu').check()
    with pytest.raises(ValueError, match='2 does not divide n_v_head 1, n_head 1; take 1'): PretrainConfig(**TINY | dict(nproc=2, context_parallel=2)).resolved()

@pytest.mark.slow
def test_a_compiled_model_of_shared_rows_is_checked(base, data, monkeypatch):
    "Its gradients at the start, across the border of the ranks, and the losses of whole rows"
    from nano_dh.train import read_metrics
    kw = dict(data=data, depth=4, model='d_model:64 head_dim:32 head_k_dim:32 head_v_dim:32', num_iterations=3, save_every=0, eval_every=0, prompts='', max_seq_len=256, total_batch_size=1024, compile='on')
    for n, name, more in ((0, 'compiled', {}), (2, 'compiled-2', dict(context_parallel=2))): here(n, run=name, **kw | more)
    one, two = (losses(base, name) for name in ('compiled', 'compiled-2')); assert max(abs(one[s] - two[s]) for s in one) < 1e-5
    assert [r for r in read_metrics(base/'runs'/'compiled-2') if 'gradients of' in r.get('note', '')]

def test_a_lost_loss_stops_every_rank_and_names_the_checkpoint(base, data):
    from nano_dh.checkpoint import load_model
    from nano_dh.launch import RankError
    with pytest.raises(RankError, match=r'Diverged: .*last good checkpoint is .*runs/lost/0000'):
        here(2, data=data, run='lost', num_iterations=30, warmup_steps=1, save_every=1, eval_every=0, matrix_lr=1e12, embedding_lr=1e12)
    model, *_ = load_model('lost', device='cpu')
    assert all(torch.isfinite(p).all() for p in model.parameters())

def metric(model, tokenizer, step): return dict(metric=float(step))
def sampler(model, tokenizer, prompts): return [p[::-1] for p in prompts]

def test_evaluations_by_name(base, data):
    from nano_dh.train import PretrainConfig, pretrain
    out = []
    pretrain(PretrainConfig(**TINY | dict(data=data, run='named', num_iterations=4, core_metric='test_train:metric', core_metric_every=2,
                                          sampler='test_train:sampler', prompts='ab|cd', save_every=0, eval_every=0)), out.append)
    assert [r['metric'] for r in out if 'metric' in r] == [2., 4.]
    assert [r['sample'] for r in out if 'sample' in r] == ['ba', 'dc']

def test_documents_apart(base, data):
    from nano_dh.train import PretrainConfig, pretrain
    out = []
    pretrain(PretrainConfig(**TINY | dict(data=data, run='apart', num_iterations=3, doc_mask=True, save_every=0, eval_every=0)), out.append)
    assert len([r for r in out if 'loss' in r]) == 3

def test_refusals(base, tmp_path, monkeypatch):
    from nano_dh.train import PlanError, PretrainConfig, plan
    with pytest.raises(PlanError, match=r'Depth 20 on .* CPU cores would take .* Depth \d+ would fit'): plan(PretrainConfig(depth=20, device='cpu'))
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='holds no run'): PretrainConfig(resume=True).resolved()

# ---- what is refused before it costs anything, and what a late error may not take along

def command(base, *args, **kw):
    "The command line; what it says, whether it ends well or not"
    return fresh.run([PY, '-m', 'nano_dh.train', *args, *options(**kw)], env=environ(base), capture_output=True, text=True)

def test_a_negative_keep_is_refused(base, tmp_path):
    from nano_dh.checkpoint import checkpoints, save_checkpoint
    from nano_dh.train import PretrainConfig, plan
    with pytest.raises(ValueError, match='keep -1: take 0 or more'): plan(PretrainConfig(**TINY, keep=-1))
    with pytest.raises(ValueError, match='keep -1: take 0, which keeps all'): save_checkpoint(tmp_path/'k', 1, torch.nn.Linear(2, 2), keep=-1)
    save_checkpoint(tmp_path/'k', 1, torch.nn.Linear(2, 2), keep=1)
    assert [c['step'] for c in checkpoints(tmp_path/'k')] == [1]

@pytest.mark.parametrize('kw,says', [(dict(core_metric='nope:fn'), "'nope:fn' cannot be called: No module named 'nope'"),
    (dict(sampler='nano_dh.engin:samples'), "No module named 'nano_dh.engin'"), (dict(sampler='math'), "give 'module:function'"),
    (dict(schedule='lin'), "schedule 'lin': use 'linear' or 'cosine'"), (dict(num_iterations=0), 'num_iterations 0: take 1 or more'),
    (dict(device_batch_size=0), 'device_batch_size 0: take 1 or more'), (dict(target_flops=1.), 'less than one token'),
    (dict(device='gpu'), "device 'gpu': use"), (dict(compile='true'), "compile 'true': use"), (dict(run='exp/a'), 'leave out the /'),
    (dict(nproc=3, total_batch_size=960), 'nproc 3: that many ranks cannot share the 64 streams .* take 2')])
def test_values_that_cannot_be_are_one_line(base, data, kw, says):
    from nano_dh.train import PlanError, PretrainConfig, begin, plan
    for at in (plan, begin):
        with pytest.raises((PlanError, ValueError), match=says) as e: at(PretrainConfig(**TINY | dict(data=data, run='wrong') | kw))
        assert '\n' not in str(e.value)
    assert not (base/'runs'/'wrong').exists()

def test_a_gpu_that_is_not_there(base, data, monkeypatch):
    from nano_dh import plan as T
    monkeypatch.setattr(T, 'n_gpus', lambda: 0)
    with pytest.raises(T.PlanError, match='device cuda, but this machine shows none'): T.plan(T.PretrainConfig(**TINY | dict(data=data, device='cuda')))
    with pytest.raises(T.PlanError, match='device cuda, but this machine shows none'): T.plan(T.PretrainConfig(data=data, device='cuda'))     # every size open
    for gpus, ranks in ((3, 2), (6, 4), (8, 8), (0, 0)):
        monkeypatch.setattr(T, 'n_gpus', lambda: gpus)
        assert T.most_ranks() == ranks

def fails(model, tokenizer, step): raise ConnectionError('the download broke off')

@pytest.mark.parametrize('name', ['core_metric', 'sampler'])
def test_the_checkpoint_comes_before_what_may_fail(base, data, name):
    from nano_dh.checkpoint import latest_step
    from nano_dh.train import PretrainConfig, pretrain
    with pytest.raises(ConnectionError): pretrain(PretrainConfig(**TINY | dict(data=data, run=f'fails-{name}', num_iterations=2, save_every=0, eval_every=0,
                                                                             **{name: 'test_train:fails'})), [].append)
    assert latest_step(base/'runs'/f'fails-{name}') == 2

def test_a_long_continuation_is_refused_without_advice_on_depth(base, data):
    from nano_dh.train import PlanError, PretrainConfig, plan
    here(data=data, run='short', num_iterations=4, save_every=2, eval_every=0, prompts='')
    with pytest.raises(PlanError, match='max_hours is 3') as e: plan(PretrainConfig(run='short', resume=True, num_iterations=10**8, device='cpu'))
    assert 'would fit' not in str(e.value) and 'smaller depth' not in str(e.value)
    with pytest.raises(PlanError, match='Depth 20 on'): plan(PretrainConfig(depth=20, device='cpu', model='n_kv_head:5'))
    config = (base/'runs'/'short'/'config.json').read_text()
    with pytest.raises(ValueError, match='num_iterations 3, but run short has done 4 steps'): here(run='short', resume=True, num_iterations=3)
    assert (base/'runs'/'short'/'config.json').read_text() == config

def test_a_failed_start_leaves_the_name_free(base, data):
    with pytest.raises(FileNotFoundError): here(data=str(base/'nowhere'), run='name', num_iterations=2)
    here(data=data, run='name', num_iterations=2, save_every=0, eval_every=0, prompts='')
    assert len(losses(base, 'name')) == 2

def test_one_process_trains_a_run(base, data, monkeypatch):
    "The second is refused while the first lives, and goes on at once when that was killed"
    from nano_dh import pretrain as T
    monkeypatch.setattr(T, 'LOCK_WAIT', .2)
    cmd = [PY, '-m', 'nano_dh.train', *options(**TINY | dict(data=data, run='mine', num_iterations=4000, save_every=5, eval_every=0))]
    p, end = fresh.Popen(cmd, env=environ(base), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), time.time() + 60
    while len(losses(base, 'mine')) < 12 and time.time() < end: time.sleep(.02)
    again = T.PretrainConfig(run='mine', resume=True, device='cpu', num_iterations=4000, prompts='')
    with pytest.raises(T.PlanError, match='run mine is being trained by another process'): T.pretrain(again, [].append)
    assert p.poll() is None
    p.kill(); p.wait()
    def stop(rec):
        if 'loss' in rec: raise KeyboardInterrupt
    gc.freeze()
    with pytest.raises(KeyboardInterrupt): T.pretrain(again, stop)
    assert gc.get_freeze_count() > 0 and gc.isenabled()          # what others have frozen stays so
    assert list(losses(base, 'mine')) == list(range(1, len(losses(base, 'mine')) + 1))

def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    import errno
    from collections import namedtuple
    from torch.distributed.checkpoint.api import CheckpointException
    from nano_dh import safe_checkpoint as C
    from nano_dh.checkpoint import save_checkpoint
    m = torch.nn.Linear(64, 64); save_checkpoint(tmp_path/'r', 1, m)
    def full(e):
        def fn(*a, **kw): raise e
        return fn
    for e, free in ((OSError(errno.ENOSPC, 'No space left on device'), 2**30), (CheckpointException('', {}), 0)):
        monkeypatch.setattr(C, '_dcp', full(e))
        monkeypatch.setattr(C.shutil, 'disk_usage', lambda p, n=free: namedtuple('usage', 'total used free')(2**30, 0, n))
        with pytest.raises(C.CheckpointError, match=r'the disk is full; a checkpoint takes about 16.6 KB, .* are free') as got: save_checkpoint(tmp_path/'r', 2, m)
        assert '\n' not in str(got.value) and [c['step'] for c in C.checkpoints(tmp_path/'r')] == [1]
    monkeypatch.setattr(C, '_dcp', full(CheckpointException('', {})))
    monkeypatch.setattr(C.shutil, 'disk_usage', lambda p: namedtuple('usage', 'total used free')(2**30, 0, 2**30))
    with pytest.raises(CheckpointException): save_checkpoint(tmp_path/'r', 2, m)          # any other failure as it is

# ---- a run that goes on

def test_moved_data_and_a_lost_tokenizer_do_not_end_a_run(tmp_path, monkeypatch):
    from nano_dh.train import PlanError, PretrainConfig, read_metrics, show_batch
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); data = tiny_data(tmp_path/'books')
    kw = dict(run='moved', save_every=2, eval_every=0, prompts='')
    here(data=data, num_iterations=4, **kw)
    os.rename(data, tmp_path/'elsewhere'); shutil.rmtree(tmp_path/'tokenizers')
    new, config = dict(run='moved', resume=True, num_iterations=6, device='cpu'), tmp_path/'runs'/'moved'/'config.json'
    assert 'documents start at' in show_batch(PretrainConfig(**new, data=str(tmp_path/'elsewhere')))
    here(**new, data=str(tmp_path/'elsewhere'))
    assert len(losses(tmp_path, 'moved')) == 6 and not list((tmp_path/'tokenizers').glob('*/meta.json'))
    assert json.loads(config.read_text())['data'] == str(tmp_path/'elsewhere')
    other = tiny_data(tmp_path/'other'); os.rename(tmp_path/'other'/'books_train.parquet', tmp_path/'other'/'prose_train.parquet'); was = config.read_text()
    with pytest.raises(PlanError, match='has other shards than .*elsewhere.* of run moved; give those'): here(**new | dict(num_iterations=8), data=other)
    assert config.read_text() == was and not list((tmp_path/'runs'/'moved').glob('000008'))

def test_the_command_line_says_which_values_were_given(base, data):
    "A default that is spelt out counts; a notebook cannot know, so the plan says what is kept"
    from nano_dh.train import PretrainConfig, plan
    kw = dict(run='said', save_every=0, eval_every=0, prompts='')
    here(data=data, num_iterations=2, matrix_lr=.05, clip=1., **kw)
    config = lambda: json.loads((base/'runs'/'said'/'config.json').read_text())
    here(run='said', resume=True, num_iterations=3, matrix_lr=.02)
    assert (config()['matrix_lr'], config()['clip']) == (.05, 1.)
    assert 'keeps matrix_lr 0.05, clip 1.0: python -m nano_dh.train' in str(plan(PretrainConfig(run='said', resume=True, device='cpu')))
    r = command(base, run='said', resume=True, num_iterations=4, matrix_lr=.02, clip=0, device='cpu'); assert r.returncode == 0, r.stderr
    assert (config()['matrix_lr'], config()['clip'], config()['num_iterations']) == (.02, 0., 4)
    r = command(base, run='said', resume=True, depth=4, device='cpu')
    assert r.returncode == 1 and 'depth 4 differs from 2 of run said' in r.stderr

def test_a_run_that_never_began_is_announced(base, data):
    "The pipeline resumes what was killed before it began; a misspelt name should be seen"
    from nano_dh.train import PretrainConfig, plan
    (base/'runs'/'spelt').mkdir(parents=True); (base/'runs'/'spelt'/'config.json').write_text('{}')
    says = str(plan(PretrainConfig(**TINY | dict(data=data, run='splet', resume=True, num_iterations=2)))).splitlines()[0]
    shutil.rmtree(base/'runs'/'spelt')
    assert 'new: no run of this name was begun; the newest are' in says and says.endswith('spelt')

# ---- what a run takes from its tokenizer and its preset

def test_sizes_come_from_tokenizer_and_preset(base, data):
    from nano_dh.speed import job
    from nano_dh.train import PretrainConfig, plan
    here(data=data, run='own', num_iterations=1, save_every=0, eval_every=0, prompts='')
    kw = {k: v for k, v in TINY.items() if k != 'vocab_size'} | dict(data=data, tokenizer=str(base/'runs'/'own'/'000001'/'tokenizer'), num_iterations=2)
    assert plan(PretrainConfig(**kw)).cfg.vocab_size == 384
    with pytest.raises(ValueError, match='vocab_size 500, but tokenizer .* has 384 tokens; leave vocab_size out'): plan(PretrainConfig(**kw, vocab_size=500))
    c = PretrainConfig(preset='conversation', device='cpu').resolved()
    assert (c.vocab_size, c.max_seq_len, c.model_config().vocab_size) == (65536, 1024, 65536)
    patterns = {w: job(w, 4, 64, 128, device='cpu').model_config().pattern for w in ('nanochat:GGGL', 'nanochat', 'GGGL')}
    assert patterns == {'nanochat:GGGL': 'GGGL', 'nanochat': 'SSSL', 'GGGL': 'GGGL'}
    for name, of in (('n_layer', 'depth'), ('vocab_size', 'vocab_size'), ('sequence_len', 'max_seq_len')):
        with pytest.raises(NameError, match=f'the parameter {of} of the run, set that'): PretrainConfig(model=f'{name}:3', device='cpu').resolved()

def test_longer_runs_decay_less(base):
    "The decay follows the longer of horizon and run"
    from nano_dh.train import PretrainConfig
    long, planned, cut = [PretrainConfig(device='cpu', depth=2, num_iterations=n).resolved() for n in (2000, -1, 20)]
    at = lambda c: c.scaling()['total_tokens']
    assert at(long) == long.total_tokens > at(planned) and at(cut) == cut.horizon and abs(at(planned)/planned.horizon - 1) < .01

@pytest.mark.slow
def test_wandb_offline_resumes_the_same_run(base, data):
    env = environ(base, WANDB_MODE='offline')
    kw = TINY | dict(data=data, run='w b', wandb='proj', num_iterations=4, save_every=2, eval_every=0, prompts='')
    for extra in ({}, dict(resume=True, num_iterations=8)):
        args = kw | extra if not extra else dict(run='w b') | extra
        r = fresh.run([PY, '-m', 'nano_dh.train', *options(**args)], env=env, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
    runs = list((base/'runs'/'w b').glob('wandb/offline-run-*'))
    assert len(runs) == 2 and {r.name.split('-', 3)[-1] for r in runs} == {'w-b'}

def test_a_metric_of_ones_own_is_recorded(base, data):
    from nano_dh.train import PretrainConfig, pretrain
    seen = []
    pretrain(PretrainConfig(**dict(TINY, data=data, nproc=0, num_iterations=4, eval_every=0), run='healthy', metrics='nano_dh.train:health',
                            metrics_every=2), seen.append)
    mine = [r for r in seen if 'half_life_50' in r]
    assert [r['step'] for r in mine] == [2, 4] and mine[1]['moved'] > 0 and mine[0]['lr'] > 0
    assert all(r['grad_norm'] > 0 for r in seen if 'loss' in r)

def test_getting_ready_changes_nothing(base, data, monkeypatch):
    "The step that compiles model and optimizer leaves weights, optimizer, data and the run's losses as they were"
    import functools
    from nano_dh import compiled
    from nano_dh.kernels import Ahead
    from nano_dh.train import PretrainConfig, RankTrainer, pretrain
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    go = dict(TINY, data=data, nproc=0, num_iterations=3, eval_every=0)
    t = RankTrainer(PretrainConfig(**go, compile='on', run='ready').resolved(), print)
    before = {n: p.clone() for n, p in t.model.named_parameters()}; at = t.loader.state_dict()
    t.get_ready(Ahead(''))
    assert all(torch.equal(p, before[n]) for n, p in t.model.named_parameters())
    assert all(p.grad is None for p in t.model.parameters())
    assert t.loader.state_dict() == at and t.opt.step_t.item() == 0
    assert not any(v.any() for b in t.opt.buckets for k, v in b.state.items() if k != 'master')
    assert isinstance(t.fwd, compiled.Compiled) and {'compile', 'kernels', 'choice'} <= {*t.spent}
    for how in ('on', 'whole', 'off'):
        torch._dynamo.reset(); pretrain(PretrainConfig(**go, compile=how, run=f'by-{how}'), lambda r: None)
    on, off, whole = (losses(base, f'by-{how}') for how in ('on', 'off', 'whole'))
    assert len(on) == 3 and on == pytest.approx(off, abs=1e-4) and whole == pytest.approx(off, abs=1e-4)

def test_a_cut_gradient_stops_a_compiled_run(base, data, monkeypatch):
    "Compiled by Dynamo alone, which takes seconds; the fault is put into what is compiled"
    import functools
    from nano_dh import hybrid_model
    from nano_dh.gradient_check import WrongGradient
    from nano_dh.train import PretrainConfig, pretrain
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return torch.relu(x)*torch.relu(x)
        @staticmethod
        def backward(ctx, g): return torch.zeros_like(g)
    right = hybrid_model.relu2
    def cut(x): return Cut.apply(x) if torch.compiler.is_compiling() else right(x)
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    go, seen = dict(TINY, data=data, nproc=0, compile='on', num_iterations=2, eval_every=0), []
    pretrain(PretrainConfig(**go, run='uncut'), seen.append)
    assert any('parameters checked in' in r.get('note', '') for r in seen) and len(losses(base, 'uncut')) == 2
    monkeypatch.setitem(hybrid_model.ACTIVATIONS, 'relu2', cut); torch._dynamo.reset()
    with pytest.raises(WrongGradient, match=r'c_fc.weight: no gradient'): pretrain(PretrainConfig(**go, run='cut'), seen.append)
    assert not losses(base, 'cut')
    torch._dynamo.reset(); pretrain(PretrainConfig(**go, run='unchecked', check_gradients=False), seen.append)
    assert len(losses(base, 'unchecked')) == 2
