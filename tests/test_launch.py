"Ranks as processes: who is left when the notebook goes, what its standard output holds, how an error and an interrupt end."
import os, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
import fresh, pytest
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
        return fresh.Popen([PY, tmp_path/'s.py'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ(tmp_path), start_new_session=True)
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
    if sig == signal.SIGINT: assert p.stderr.read().splitlines().count('KeyboardInterrupt') == 1

def test_a_killed_rank_is_named_and_prints_arrive_whole(start):
    out, err = start('killed').communicate(timeout=60)
    assert 'rank 1 of 2 was killed by SIGKILL' in err
    assert {'[rank 0] from 0', '[rank 1] from 1', '[rank 0] child', '[rank 1] child', "got {'a': 1}"} <= set(out.splitlines()), out

def test_an_error_ends_a_rank_that_waits(start):
    t = time.time(); out, err = start('hangs').communicate(timeout=60)
    assert 'rank 1 of 2 failed' in err and 'ValueError: the cause' in err and time.time() - t < 40

# ---- ranks that hang

HANGS = '''
import ctypes, os, signal, threading, time, torch, torch.distributed as dist
me = lambda: int(os.environ['RANK'])
def meet(): dist.all_reduce(torch.ones(1))
def work(n=3):
    for _ in range(n): meet()
def lock(cfg, emit):
    work()
    if me() == cfg: threading.Lock().acquire() and THE.acquire()
    meet()
THE = threading.Lock(); THE.acquire()
def loop(cfg, emit):
    work()
    while me() == cfg: time.sleep(.01)
    meet()
def stopped(cfg, emit):
    work()
    if me() == cfg: os.kill(os.getpid(), signal.SIGSTOP)
    meet()
def held(cfg, emit):            # C code that holds the interpreter
    work()
    if me() == cfg: ctypes.PyDLL(None).sleep(60)
    meet()
def pipe(cfg, emit):
    work()
    if me() == cfg: os.read(os.pipe()[0], 1)
    meet()
def early(cfg, emit):           # gone to the end without the last call
    work()
    if me() == cfg: time.sleep(60)
    else: meet()
def other(cfg, emit):           # both wait, for different things
    work()
    if me() == cfg: dist.recv(torch.ones(1), 1 - cfg)
    else: dist.recv(torch.ones(1), cfg)
def busy(cfg, emit):            # slow, but it moves: computes, sleeps a little, prints
    for i in range(8):
        end = time.time() + .7
        while time.time() < end: torch.ones(200, 200) @ torch.ones(200, 200)
        meet()
        if me() == 0: emit(i)
def big(cfg, emit):             # one long call that computes
    meet(); emit(1) if me() == 0 else None
    torch.linalg.eigh(torch.randn(cfg, cfg, dtype=torch.float64)); meet()
'''
HANG_SCRIPT = '''
import os, sys, time; sys.path.insert(0, {folder!r})
import hangs; from nano_dh.launch import run_ranks
if __name__ == '__main__':
    t = time.time()
    try:
        for r in run_ranks(hangs.{job}, {cfg}, nproc=2, device='cpu', **{kw}): time.sleep({slow})
        print('done')
    except Exception as e: print(type(e).__name__, time.time() - t, e, sep='|')
'''

def hang(folder, job, cfg, slow=0): # what the notebook prints
    (folder/'hangs.py').write_text(HANGS)
    p = fresh.run([PY, '-c', HANG_SCRIPT.format(folder=str(folder), job=job, cfg=cfg, kw=dict(step=2), slow=slow)], capture_output=True, text=True, timeout=150, env=environ(folder))
    assert not p.stderr.strip() or 'Error' not in p.stderr, p.stderr
    return p.stdout

def never_arrives(folder):
    "It hangs while its module is imported, on one rank only"
    (folder/'late.py').write_text("import os, time\nif os.path.exists('%s'): time.sleep(90)\nelse: open('%s', 'w')\ndef job(cfg, emit): pass" % ((folder/'flag',)*2))
    (folder/'s.py').write_text(f'''
import sys; sys.path.insert(0, {str(folder)!r})
from nano_dh.launch import run_ranks
if __name__ == '__main__':
    import os, late; os.remove({str(folder/'flag')!r})
    try: list(run_ranks(late.job, None, nproc=2, device='cpu', start=12))
    except Exception as e: print(type(e).__name__, e)
''')
    p = fresh.run([PY, folder/'s.py'], capture_output=True, text=True, timeout=150, env=environ(folder))
    return p.stdout + p.stderr

@pytest.fixture(scope='module')
def said(request, tmp_path_factory): # test's name -> future of what its notebook prints; four of them wait at a time
    pool, told, fresh_one = ThreadPoolExecutor(4), {}, lambda: tmp_path_factory.mktemp('hangs')
    for item in request.session.items:
        if getattr(item, 'module', None) is not request.module or 'said' not in item.fixturenames or item.get_closest_marker('skip'): continue
        given = item.callspec.params if hasattr(item, 'callspec') else {}
        told[item.name] = pool.submit(item.function.job, fresh_one(), **given)
    yield told
    pool.shutdown(cancel_futures=True)

def of_notebook(job): # a test of what that job's notebook prints
    def mark(test): test.job = job; return test
    return mark

slow = lambda *a: pytest.param(*a, marks=pytest.mark.slow)

@pytest.mark.parametrize('job,who', [('lock', 0), ('loop', 1), slow('stopped', 1), ('held', 1), slow('lock', 1), slow('loop', 0), slow('stopped', 0), slow('held', 0),
                                     slow('pipe', 0), slow('pipe', 1), slow('early', 0), slow('early', 1)])
@of_notebook(lambda folder, job, who: hang(folder, job, who))
def test_the_rank_that_hangs_is_named(request, said, job, who):
    "Not the one that waits for it; with the stacks of both, within seconds of the limit"
    out = said[request.node.name].result(); first = out.splitlines()[0]
    assert first.startswith('RankError|') and f'a rank hangs: rank {who} of 2 ' in first and f'rank {1 - who} of 2' not in first, out
    assert 'step=2 seconds' in first and 'rank 0:' in out and 'rank 1:' in out
    waits = out.split(f'rank {1 - who}:\n')[1].split('\n\nrank')[0]
    assert 'all_reduce' in waits and 'in meet' in waits, out
    mine = out.split(f'rank {who}:\n')[1].split('\n\nrank')[0]
    assert 'no answer' in mine if job == 'stopped' else f'in {job}' in mine, out

@of_notebook(lambda folder: hang(folder, 'other', 0))
def test_two_that_wait_for_each_other_are_both_named(request, said):
    out = said[request.node.name].result()
    assert 'rank 0 of 2 has been in other' in out and 'rank 1 of 2 has been in other' in out, out

@of_notebook(never_arrives)
def test_a_rank_that_never_arrives_is_named(request, said):
    out = said[request.node.name].result()
    assert out.startswith('RankError a rank hangs: rank ') and 'has not joined the others within 12 s' in out, out

@pytest.mark.parametrize('job,cfg,slow', [slow('busy', 0, 0), slow('busy', 0, 3), ('big', 2500, 0)])
@of_notebook(hang)
def test_slow_is_not_hanging(request, said, job, cfg, slow):
    "Work longer than the limit, one long call, and a reader who does something else for longer than the limit"
    assert said[request.node.name].result() == 'done\n'
