"Volume 1 alone: its modules in a folder of their own, without the rest of the package, train on the sample, go on from a checkpoint and write."
import json, os, shutil, subprocess, sys
import fresh, pytest
from tiny_run import PY, ROOT, TINY, environ

VOLUME1 = '''core delta_rule chunked deltanet gated_attn hybrid_model tokenizer dataset dataloader optim loss_eval checkpoint generate train'''.split()

KW = TINY | dict(num_iterations=12, warmup_steps=2, save_every=6, eval_every=6)
ALONE = f'''
import json, sys, torch; torch.set_num_threads(1)
sys.meta_path = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]     # which would find the rest in a checkout
from dataclasses import replace
from nano_dh.core import volume2
from nano_dh.train import TrainConfig, Trainer, read_metrics
cfg = TrainConfig(**{KW!r}, run='alone').resolved()
class Stop(Exception): pass
def stop(rec):
    if rec['step'] == 9: raise Stop
try: Trainer(cfg, stop).run()
except Stop: pass
t = Trainer(replace(cfg, resume=True), lambda rec: None); t.run()
print(json.dumps(dict(volume2=volume2(), records=read_metrics(cfg.run_dir))))
'''

def train_alone(tmp_path):
    site = tmp_path/'site'/'nano_dh'; site.mkdir(parents=True)
    for name in ['__init__', *VOLUME1]: shutil.copy(ROOT/'nano_dh'/f'{name}.py', site)
    shutil.copytree(ROOT/'nano_dh'/'data', site/'data')
    env = environ(tmp_path/'base') | dict(PYTHONPATH=str(site.parent))
    p = fresh.run([PY, '-c', ALONE], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    return json.loads(p.stdout.splitlines()[-1])

def test_volume_1_trains_alone(tmp_path, monkeypatch):
    alone = train_alone(tmp_path); records = alone['records']
    losses = {r['step']: r['loss'] for r in records if 'loss' in r}
    assert not alone['volume2'] and list(losses) == list(range(1, 13)) and losses[12] < losses[1] - .5
    assert [r['checkpoint'][-6:] for r in records if 'checkpoint' in r] == ['000006', '000012']          # stopped at 9, went on from 6
    assert [bool(r['sample']) for r in records if 'sample' in r] == [True] and len([r for r in records if 'val_bpb' in r]) == 2
    import torch
    from nano_dh.train import PretrainConfig, pretrain, read_metrics
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path/'whole')); threads = torch.get_num_threads(); torch.set_num_threads(1); whole = []
    try: pretrain(PretrainConfig(**KW, run='whole', nproc=0), whole.append)
    finally: torch.set_num_threads(threads)
    with_all = {r['step']: r['loss'] for r in whole if 'loss' in r}
    # the fused convolution and loss round otherwise, and training makes more of it (in float64 tests/test_volume1.py finds 1e-10)
    apart = [abs(with_all[s] - losses[s]) for s in losses]
    assert apart[0] < 1e-6 and max(apart) < 5e-4 and list(with_all) == list(losses), apart
