"""Fresh Python processes that need not import torch, papermill and the like first: `fresh.Popen` and `fresh.run` are those of subprocess, for a Python with `-c`, `-m` or a file.

A server imports these once, and nothing of the package, and forks itself for each of them. What is set before a process begins it cannot change: those
that want Triton's interpreter have a server of their own, and one that wants other such settings than a server has is started as usual. NO_FORK=1
starts all as usual (`make weekly`), and so do other systems and other versions of Python, whose private methods may be others."""
import atexit, gc, json, os, runpy, select, signal, socket, subprocess, sys, threading, types

EARLY = 'PYTHON', 'MALLOC', 'LD_', 'OMP', 'MKL', 'TRITON_INTERPRET'       # variables that a process reads as it begins
early = lambda env: {k: v for k, v in env.items() if k.startswith(EARLY) and k not in ('PYTHONPATH', 'PYTHONIOENCODING')}

TRIED = sys.platform == 'linux' and sys.version_info[:2] == (3, 11)

class Server:
    "Of one test process, started when it is wanted first"
    running = {}        # test process, with Triton's interpreter or without -> its server
    def __init__(self, env):
        self.env = env
        self.ask, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f'import sys; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r}); import fresh; fresh.serve({theirs.fileno()})'
        self.process = subprocess.Popen([sys.executable, '-c', code], env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL); theirs.close()
    @classmethod
    def for_(cls, wanted): # the environment of a process -> what can start it, or None
        own, key = {'TRITON_INTERPRET': '1'} if wanted.get('TRITON_INTERPRET') == '1' else {}, (os.getpid(), 'TRITON_INTERPRET' in wanted)
        server = cls.running.get(key)
        if server is None or server.process.poll() is not None:
            env = os.environ | dict(OMP_NUM_THREADS='1') | own
            if early(wanted) != early(env): return None
            server = cls.running[key] = cls(env)
        return server if early(wanted) == early(server.env) else None

class Popen(subprocess.Popen):
    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        args = [os.fspath(a) for a in args] if not isinstance(args, str) else args
        ours = TRIED and 'NO_FORK' not in os.environ and args[0] == sys.executable and preexec_fn is None and not pass_fds
        server = Server.for_(os.environ if env is None else env) if ours else None
        if server is None:
            self.link = None; return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[3:9]
        self.link, theirs = socket.socketpair()
        env = {k: str(v) for k, v in (os.environ if env is None else env).items()}
        job = dict(args=args[1:], cwd=os.path.abspath(os.fspath(cwd or '.')), env=env, session=rest[-2])
        try:
            fds = [theirs.fileno(), *(given if given >= 0 else own for own, given in enumerate((p2cread, c2pwrite, errwrite)))]
            socket.send_fds(server.ask, [json.dumps(job).encode()], fds)
        finally:
            theirs.close(); self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self.pid, self._child_created = int(self.link.recv(16)), True
    def _try_wait(self, flags): # -> process, its status as waitpid says it
        if self.link is None: return super()._try_wait(flags)
        if flags & os.WNOHANG and not select.select([self.link], [], [], 0)[0]: return 0, 0
        return self.pid, int(self.link.recv(16) or 0)
    def _internal_poll(self, *args, **kw):
        if self.link is None: return super()._internal_poll(*args, **kw)
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid: self._handle_exitstatus(status)
        return self.returncode
    def _handle_exitstatus(self, status, *args, **kw):
        super()._handle_exitstatus(status, *args, **kw)
        if self.link: self.link.close()

def run(args, *, capture_output=False, timeout=None, **kw):
    if capture_output: kw |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with Popen(args, **kw) as p:
        try: out, err = p.communicate(timeout=timeout)
        except BaseException: p.kill(); raise
        return subprocess.CompletedProcess(args, p.returncode, out, err)

def serve(fd:int):
    "Fork for each request that comes; a copy of this process leaves the loop with what it is to run"
    import numpy, papermill.execute, pyarrow.parquet, torch, torch._dynamo, torch.distributed.checkpoint
    gc.collect(); gc.freeze()
    ask, links = socket.socket(fileno=fd), {}
    heard, wakes = socket.socketpair(); heard.setblocking(False); wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None); signal.signal(signal.SIGINT, signal.SIG_IGN); signal.set_wakeup_fd(wakes.fileno())
    while True:
        ready, *_ = select.select([ask, heard], [], [])
        if heard in ready:
            heard.recv(1 << 16)
            while links:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid: break
                link = links.pop(pid)
                try: link.send(str(status).encode())
                except OSError: pass                       # nobody waits for it
                link.close()
        if ask not in ready: continue
        job, given, *_ = socket.recv_fds(ask, 1 << 20, 4)
        if not job: os._exit(0)                            # the tests are over
        link, *std = given
        link = socket.socket(fileno=link); pid = os.fork()
        if not pid: break
        for f in std: os.close(f)
        links[pid] = link
    signal.set_wakeup_fd(-1); signal.signal(signal.SIGCHLD, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.default_int_handler)
    job = json.loads(job)
    if job['session']: os.setsid()                         # before anybody may ask for its group
    link.send(str(os.getpid()).encode())
    for s in (ask, heard, wakes, link, *links.values()): s.close()
    begin(job, std)

def begin(job, std):
    "As `python -c CODE ...`, `python -m MODULE ...` or `python FILE ...` would"
    for own, given in enumerate(std): os.dup2(given, own); os.close(given)
    if how := job['env'].get('PYTHONIOENCODING'):
        encoding, _, errors = how.partition(':')
        sys.stdin, sys.stdout = (open(n, mode, encoding=encoding, errors=errors or None, closefd=False) for n, mode in ((0, 'r'), (1, 'w')))
    servers = {os.path.abspath(p) for p in (*path_of(os.environ), os.path.dirname(__file__))}
    os.environ.clear(); os.environ.update(job['env']); os.chdir(job['cwd'])
    what, *argv = job['args']
    if what in ('-c', '-m'): given, *argv = argv
    first = {'-c': '', '-m': os.getcwd()}.get(what, os.path.dirname(os.path.abspath(what)))
    sys.path[:] = [first, *path_of(os.environ), *(p for p in sys.path if p and os.path.abspath(p) not in servers)]
    sys.argv = [what if what != '-m' else given, *argv]
    main = sys.modules['__main__'] = types.ModuleType('__main__'); del sys.modules['fresh']
    try:
        if what == '-c': exec(compile(given, '<string>', 'exec'), main.__dict__)
        elif what == '-m': runpy.run_module(given, run_name='__main__', alter_sys=True)
        else: runpy.run_path(what, run_name='__main__')
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if code and not isinstance(e.code, int): print(e.code, file=sys.stderr)
    threading._shutdown(); atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream: stream.flush()
    os._exit(code)                                         # taking everything apart costs more than all the rest

def path_of(env): return [p for p in env.get('PYTHONPATH', '').split(os.pathsep) if p]
