"What a hostile program leaves behind: nothing. As root, as an ordinary user, and with single layers missing."
import gzip, json, os, subprocess, sys, time
from pathlib import Path
import pytest
from nano_dh.execution import SandboxError, run_code, run_many
from nano_dh.tasks import HumanEval, local_file

DATA = os.environ.get('NANO_DH_DATA', '')
linux = pytest.mark.skipif(sys.platform != 'linux', reason='the sandbox needs Linux')
pytestmark = linux

HOSTILE = { # each must be reported as a failure
 'fork bomb': 'import os\nwhile True: os.fork()',
 'fork bomb, quiet': 'import os\nwhile True:\n    try: os.fork()\n    except OSError: pass',
 'threads': 'import threading, time\nfor _ in range(500): threading.Thread(target=time.sleep, args=(60,)).start()',
 'memory': 'x = []\nwhile True: x.append(bytearray(1 << 25))',
 'one large block': 'x = bytearray(1 << 36)',
 'large integer': 'print(len(str(9**9**8)))',
 'endless loop': 'while True: pass',
 'endless sleep': 'import time; time.sleep(10**6)',
 'deaf to alarms': 'import signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\nwhile True: time.sleep(1)',
 'delete everything': 'import shutil; shutil.rmtree("/", onerror=lambda *a: None); 1/0',
 'delete the canary': 'import os; os.remove(CANARY)',
 'write over the canary': 'open(CANARY, "w").write("gone")',
 'rename the canary': 'import os; os.rename(CANARY, CANARY + "2")',
 'write into the package': 'open(PACKAGE, "a").write("import evil")',
 'write /etc': 'open("/etc/passwd", "a").write("x::0:0::/:/bin/sh\\n")',
 'fill the disk': 'f = open("big", "wb")\nwhile True: f.write(b"x"*(1 << 20)); f.flush()',
 'many files': 'for i in range(10**7): open(str(i), "w").write("x"*4096)',
 'kill the parent': 'import os; os.kill(PARENT, 9)',
 'kill everybody': 'import os\nos.kill(-1, 9)\nwhile True: pass',
 'kill the guard': 'import os; os.kill(os.getppid() or 999999999, 9)',
 'network': 'import socket; socket.create_connection(("127.0.0.1", PORT), timeout=5)',
 'udp': 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(("8.8.8.8", 53)); s.send(b"x")',
 'listen': 'import socket; s = socket.socket(); s.bind(("0.0.0.0", 0)); s.listen(); socket.create_connection(("1.1.1.1", 80), 1)',
 'output flood': 'while True: print("x"*10000)',
 'flood on stderr': 'import sys\nwhile True: sys.stderr.write("x"*10000)',
 'deep recursion': 'import sys; sys.setrecursionlimit(10**9)\ndef f(): return f()\nf()',
 'leave early': 'import sys; sys.exit(0)',
 'leave at once': 'import os; os._exit(0)',
 'a daemon that stays': 'import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: time.sleep(1)\n    os._exit(0)\ntime.sleep(.1); 1/0',
 'become root': 'import os; os.setuid(0); 1/0',
 'a crash': 'import ctypes; ctypes.string_at(0)',
}

def processes(): return {p.name for p in Path('/proc').glob('[0-9]*') if b'execution.py' in _read(p/'cmdline')}
def _read(p):
    try: return p.read_bytes()
    except OSError: return b''

def attack(tmp, names, seconds=.6, **kw):
    "Run hostile programs two at a time and look at the machine afterwards"
    import socket, nano_dh.execution as e
    canary = Path(tmp)/'canary'; canary.write_text('alive'); canary.chmod(0o666)
    hits, srv = [], socket.create_server(('127.0.0.1', 0)); srv.settimeout(.05)
    head = f'CANARY, PACKAGE, PARENT, PORT = {str(canary)!r}, {e.__file__!r}, {os.getpid()}, {srv.getsockname()[1]}\n'
    before = Path(e.__file__).read_bytes(), Path('/etc/passwd').read_bytes()
    rs = dict(zip(names, run_many([head + HOSTILE[n] for n in names], workers=2, seconds=seconds, **kw)))
    try: hits.append(srv.accept())
    except OSError: pass
    assert canary.read_text() == 'alive' and not hits and before == (Path(e.__file__).read_bytes(), Path('/etc/passwd').read_bytes())
    end = time.monotonic() + 2
    while processes() and time.monotonic() < end: time.sleep(.05)
    assert not processes() and not list(Path('/tmp').glob('nano_dh_*/big'))
    for n, r in rs.items(): assert not r.ok and r.seconds < seconds + 6, (n, r)
    return rs

QUICK = ['fork bomb', 'memory', 'endless loop', 'deaf to alarms', 'delete the canary', 'kill everybody', 'kill the guard', 'network', 'output flood',
         'deep recursion', 'leave at once', 'a daemon that stays', 'write into the package']

def test_thirty():
    assert len(HOSTILE) >= 30

def test_hostile_programs_quick(tmp_path):
    rs = attack(tmp_path, QUICK)
    assert rs['endless loop'].status == 'time' and rs['output flood'].status == 'output' and rs['leave at once'].status == 'exit'

@pytest.mark.slow
def test_all_hostile_programs(tmp_path):
    for n, r in attack(tmp_path, [*HOSTILE]).items(): print(f'{n:24} {r.status:7} {r.seconds:.1f} s  {r.detail[:80]}')

@pytest.mark.slow
@pytest.mark.parametrize('without', [('namespaces',), ('landlock',)])
def test_hostile_programs_with_a_layer_missing(tmp_path, without):
    if os.getuid(): pytest.skip('as an ordinary user namespaces are what holds')
    tmp_path.chmod(0o755); canary_free = [n for n in HOSTILE if n not in ('write over the canary',) and not (
        'namespaces' in without and n in ('udp', 'listen'))]          # without them: mode bits protect files, Landlock only TCP
    attack(tmp_path, canary_free, without=without)

@pytest.mark.slow
def test_hostile_programs_as_an_ordinary_user(tmp_path):
    "The same in a process that is not root, if this one is"
    if os.getuid(): pytest.skip('this is an ordinary user already')
    if subprocess.run(['setpriv', '--reuid=54321', '--regid=54321', '--clear-groups', sys.executable, '-c', 'import torch'],
                      capture_output=True).returncode: pytest.skip('an ordinary user cannot read this Python')
    for p in (tmp_path, *tmp_path.parents): p.chmod(p.stat().st_mode | 0o055) if p.stat().st_uid == os.getuid() and p != Path('/') else None
    code = f'import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import test_sandbox as t; t.attack({str(tmp_path)!r}, [*t.HOSTILE])'
    os.chown(tmp_path, 54321, 54321)
    r = subprocess.run(['setpriv', '--reuid=54321', '--regid=54321', '--clear-groups', sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]

def test_a_good_program_and_its_result():
    r = run_code('import math, random, collections\nprint(math.comb(10, 3))\nopen("f", "w").write("x")')
    assert r.ok and r.out == '120\n' and r.status == 'ok' and 'limits' in r.layers
    r = run_code('if os: pass'); assert r.status == 'error' and 'NameError' in r.detail

def test_refuses_where_too_little_is_left():
    with pytest.raises(SandboxError, match='trust=True'): run_code('pass', without=('user', 'namespaces'))
    assert run_code('print(1)', without=('user', 'namespaces', 'landlock'), trust=True).ok

pack = pytest.mark.skipif(not local_file(DATA, 'humaneval.jsonl', 'HumanEval.jsonl'), reason='NANO_DH_DATA names no folder with HumanEval')

def passes(task): return run_many([task.program(c, c['messages'][-1]['content']) for c in task], workers=2, seconds=10.)

@pack
def test_some_canonical_solutions_pass(): assert all(r.ok for r in passes(HumanEval(data=DATA)[::12]))

@pack
@pytest.mark.slow
def test_every_canonical_solution_passes_and_a_wrong_one_does_not():
    t = HumanEval(data=DATA); rs = passes(t); assert len(rs) == 164 and all(r.ok for r in rs), [r for r in rs if not r.ok]
    wrong = run_many([t.program(c, '    return None\n') for c in t[::4]], workers=2)
    assert not any(r.ok for r in wrong)
