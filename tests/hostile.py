"""Programs that mean harm, and a look at the machine afterwards. Standard library only, so that any Python can run it."""
import os, time
from pathlib import Path
from nano_dh.execution import run_many

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
