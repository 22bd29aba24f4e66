"Ranks as processes: who is left when the notebook goes, what its standard output holds, how an error and an interrupt end."
import os, signal, subprocess, sys, time
import pytest
from tiny_run import PY, environ

JOBS = '''
import os, time, torch, torch.distributed as dist
def sleeps(cfg, emit):
    emit(os.getpid())
    if os.environ['RANK'] == '1': print('pid', os.getpid(), flush=True)
    time.sleep(60)
def killed(cfg, emit):
    print('from', os.environ['RANK']); os.system('echo child'); emit(dict(a=1))
    x = torch.ones(1); dist.all_reduce(x)
    if os.environ['RANK'] == '1': os.kill(os.getpid(), 9)
    dist.all_reduce(x)
def hangs(cfg, emit):
    if os.environ['RANK'] == '1': raise ValueError('the cause')
    time.sleep(60)
'''
SCRIPT = '''
import sys; sys.path.insert(0, {folder!r})
import jobs; from nano_dh.launch import run_ranks
if __name__ == '__main__':
    for r in run_ranks(jobs.{job}, None, nproc=2, device='cpu'): print('got', r, flush=True)
'''

@pytest.fixture
def start(tmp_path):
    (tmp_path/'jobs.py').write_text(JOBS)
    def go(job):
        (tmp_path/'s.py').write_text(SCRIPT.format(folder=str(tmp_path), job=job))
        return subprocess.Popen([PY, tmp_path/'s.py'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ(tmp_path), start_new_session=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a background shell ignores it
    return go

def gone(pid, wait=5.):
    "A process has ended (or is a zombie) within some seconds"
    end = time.time() + wait
    while time.time() < end:
        try: state = open(f'/proc/{pid}/stat').read().rsplit(')')[-1].split()[0]
        except FileNotFoundError: return True
        if state == 'Z': return True
        time.sleep(.05)
    return False

@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_ranks_go_with_their_parent(start, sig):
    p = start('sleeps'); pids = []
    while len(pids) < 2: pids.append(int(p.stdout.readline().split()[-1]))
    if sig == signal.SIGINT: os.killpg(p.pid, sig)          # as Jupyter does: the whole group
    else: p.send_signal(sig)
    p.wait(10)
    assert all(gone(pid) for pid in pids)
    if sig == signal.SIGINT: assert p.stderr.read().count('KeyboardInterrupt\n') == 1

def test_a_killed_rank_is_named_and_prints_arrive_whole(start):
    out, err = start('killed').communicate(timeout=60)
    assert 'rank 1 of 2 was killed by SIGKILL' in err
    assert {'[rank 0] from 0', '[rank 1] from 1', '[rank 0] child', '[rank 1] child', "got {'a': 1}"} <= set(out.splitlines()), out

def test_an_error_ends_a_rank_that_waits(start):
    t = time.time(); out, err = start('hangs').communicate(timeout=60)
    assert 'rank 1 of 2 failed' in err and 'ValueError: the cause' in err and time.time() - t < 40
