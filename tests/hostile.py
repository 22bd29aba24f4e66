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
 # what a service behind a socket with a path would do for whoever asks
 'a socket with a path': 'import socket; socket.socket(socket.AF_UNIX).connect(AGENT)',
 'a datagram to a path': 'import socket; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", MAILBOX)',
 'a pair turned elsewhere': 'import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.connect(MAILBOX); a.send(b"x")',
 'a packet pair': 'import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)',
 'a netlink socket': 'import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)',
 'an io_uring': 'sys(425, 8, ctypes.create_string_buffer(256))',
 'key ring': 'sys({"x86_64": 248, "aarch64": 217}[MACHINE], b"user", b"nano_dh", b"x", 1, -4)',
 'user namespace': 'if L.unshare(0x10000000): raise OSError',
 'user namespace by clone': 'import os\npid = sys({"x86_64": 56, "aarch64": 220}[MACHINE], 0x10000011, None, None, None, None)\nos._exit(0) if pid == 0 else os.waitpid(pid, 0)',
 'page faults of its own': 'sys({"x86_64": 323, "aarch64": 282}[MACHINE], 1)',
 'shared memory': 'n = [L.shmget(0, 1 << 29, 0o1600) for _ in range(3)]\nif min(n) < 0: raise OSError\nfor i in n: L.shmctl(i, 0, None)',
 'a message queue': 'if L.msgget(0, 0o1600) < 0: raise OSError',
 'semaphores': 'if L.semget(0, 100, 0o1600) < 0: raise OSError',
 'files in memory': 'import os\nfd = [os.memfd_create("x") for _ in range(40)]\nfor f in fd: os.write(f, bytes(15 << 20))',
 'trace the parent': 'import os\nif L.ptrace(16, os.getppid(), 0, 0): raise OSError',
 'read the parent': 'import os; open(f"/proc/{os.getppid()}/mem", "rb").read(1)',
 'kill process 1': 'import os; os.kill(1, 9)',
 # what would end whoever judges it
 'a verdict of its own': 'import os\nfor fd in range(3, 256):\n    try: os.write(fd, VERDICT)\n    except OSError: continue\nos._exit(0)',
 'no wall stood': 'import os\nfor fd in range(3, 256):\n    try: os.write(fd, b"wall OSError: none")\n    except OSError: continue\nos._exit(0)',
 'a mute exception': 'class E(Exception):\n    def __str__(self): raise KeyError\nraise E',
 'an exception that says 3': 'class E(Exception):\n    def __str__(self): return 3\nraise E',
 'an exception without a name': 'class M(type):\n    @property\n    def __name__(cls): raise KeyError\nclass E(Exception, metaclass=M): pass\nraise E',
 'an exit without words': 'class E:\n    def __str__(self): raise KeyError\nraise SystemExit(E())',
 'half a character': 'raise ValueError("\\ud800")',
 'a closed stderr': 'import sys; sys.stderr.close(); 1/0',
 'no stdout at all': 'import sys, os; os.close(1); os.close(2); sys.stdout = sys.stderr = None; 1/0',
 'signal 40': 'import os; os.kill(os.getpid(), 40)',
 'a long answer': 'import os\nfor fd in range(3, 256):\n    try:\n        while True: os.write(fd, b"x"*65536)\n    except OSError: continue',
 'a comma too many': 'x = (1,,2)',
 'half a character in the code': 'x = "\ud800"; 1/0',
}

HEAD = """import ctypes, platform
L, MACHINE = ctypes.CDLL(None, use_errno=True), platform.machine()
L.shmat.restype = ctypes.c_void_p
def sys(*a):
    r = L.syscall(*a)
    if r < 0: raise OSError(ctypes.get_errno(), "refused")
    return r
VERDICT = b"".join(a + b"ok" + b for a in (b"", b"\\n") for b in (b" ", b" \\n")) + b'["", "ok", ""]\\n'
"""

def processes(): return {p.name for p in Path('/proc').glob('[0-9]*') if b'execution.py' in _read(p/'cmdline')}
def _read(p):
    try: return p.read_bytes()
    except OSError: return b''

def attack(tmp, names, seconds=.6, **kw):
    "Run hostile programs two at a time and look at the machine afterwards"
    import socket, nano_dh.execution as e
    canary = Path(tmp)/'canary'; canary.write_text('alive'); canary.chmod(0o666)
    hits, srv = [], socket.create_server(('127.0.0.1', 0)); srv.settimeout(.05)
    agent, box = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for s, f in ((agent, 'agent'), (box, 'mailbox')): s.bind(f'{tmp}/{f}'); s.settimeout(.05); os.chmod(f'{tmp}/{f}', 0o777)
    agent.listen()
    head = HEAD + (f'CANARY, PACKAGE, PARENT, PORT = {str(canary)!r}, {e.__file__!r}, {os.getpid()}, {srv.getsockname()[1]}\n'
                   f'AGENT, MAILBOX = {str(tmp)!r} + "/agent", {str(tmp)!r} + "/mailbox"\n')
    before = Path(e.__file__).read_bytes(), Path('/etc/passwd').read_bytes()
    rs = dict(zip(names, run_many([head + HOSTILE[n] for n in names], workers=2, seconds=seconds, **kw)))
    for knock in (srv.accept, agent.accept, lambda: box.recv(1)):
        try: hits.append(knock())
        except OSError: continue
    for s in (srv, agent, box): s.close()
    assert canary.read_text() == 'alive' and not hits and before == (Path(e.__file__).read_bytes(), Path('/etc/passwd').read_bytes())
    end = time.monotonic() + 2
    while processes() and time.monotonic() < end: time.sleep(.05)
    assert not processes() and not list(Path('/tmp').glob('nano_dh_*/big'))
    for n, r in rs.items(): assert not r.ok and r.seconds < seconds + 6, (n, r)
    return rs
