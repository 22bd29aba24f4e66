"What a hostile program leaves behind: nothing. As root, as an ordinary user, and with single layers missing."
import os, shutil, subprocess, sys
from pathlib import Path
import mini_pack, pytest
import nano_dh.execution
from hostile import HEAD, HOSTILE, attack
from nano_dh.execution import SandboxError, run_code, run_many
from nano_dh.tasks import HumanEval, local_file

FULL, (DATA, SIZES) = bool(os.environ.get('NANO_DH_DATA')), mini_pack.data()
linux = pytest.mark.skipif(sys.platform != 'linux', reason='the sandbox needs Linux')
pytestmark = linux

QUICK = ['fork bomb', 'memory', 'endless loop', 'deaf to alarms', 'delete the canary', 'kill everybody', 'kill the guard', 'network', 'output flood',
         'deep recursion', 'leave at once', 'a daemon that stays', 'write into the package', *[*HOSTILE][[*HOSTILE].index('a crash') + 1:]]

def test_sixty():
    assert len(HOSTILE) >= 60

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

def _python(): # a Python that an ordinary user may run
    for p in (sys.executable, *(shutil.which(f'python3{v}', path='/usr/local/bin:/usr/bin') for v in ('', '.13', '.12', '.11', '.10'))):
        if p and subprocess.run([*USER, p, '-c', 'import sys, subprocess as s; sys.exit(sys.version_info < (3, 10) or s.run([sys.executable, "-c", ""]).returncode)'], capture_output=True).returncode == 0: return p

USER = ['setpriv', '--reuid=54321', '--regid=54321', '--clear-groups']

@pytest.mark.slow
def test_hostile_programs_as_an_ordinary_user():
    "The same from a process that is not root, if this one is: there user namespaces have to hold"
    import tempfile
    if os.getuid(): pytest.skip('this is an ordinary user already, the other tests are it')
    if not (py := _python()): pytest.skip('an ordinary user can run no Python here')
    with tempfile.TemporaryDirectory() as d:
        d = Path(d); (d/'nano_dh').mkdir(); (d/'nano_dh'/'__init__.py').write_text('')
        shutil.copy(nano_dh.execution.__file__, d/'nano_dh'); shutil.copy(Path(__file__).parent/'hostile.py', d)
        for p in (d, d/'nano_dh', *d.rglob('*.py')): os.chown(p, 54321, 54321)      # his own files, so that only the sandbox protects them
        code = f'from hostile import *; rs = attack({str(d)!r}, [*HOSTILE], seconds=.8); print(sorted({{l for r in rs.values() for l in r.layers}}), len(rs))'
        r = subprocess.run([*USER, py, '-c', code], cwd=d, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr[-3000:]
        assert 'namespaces' in r.stdout and f' {len(HOSTILE)}' in r.stdout

def test_a_good_program_and_its_result():
    r = run_code('import math, random, collections\nprint(math.comb(10, 3))\nopen("f", "w").write("x")')
    assert r.ok and r.out == '120\n' and r.status == 'ok' and 'limits' in r.layers
    r = run_code('if os: pass'); assert r.status == 'error' and 'NameError' in r.detail

FORGERS = dict( # answers to "double a number" that are wrong and want to pass
 verdict='import os\nfor fd in range(3, 256):\n    try: os.write(fd, b"ok \\nok\\n")\n    except OSError: continue\ndef f(x): return 0',
 early='import os\nfor fd in range(3, 256):\n    try: os.write(fd, b"ok ")\n    except OSError: continue\nos._exit(0)',
 number='import sys, os, json\nfr = sys._getframe()\nwhile fr:\n    a, say = fr.f_locals.get("a"), fr.f_locals.get("say")\n'
        '    if a and say: [os.write(say, json.dumps([a["nonce"], "ok", ""]).encode() + b"\\n") for _ in range(9)]\n    fr = fr.f_back\nos._exit(0)',
 equal='class Y(int):\n    def __eq__(self, x): return True\n    def __ne__(self, x): return False\ndef f(x): return Y()',
 silent='import sys\ndef f(x): raise SystemExit(0)',
 gone='import os\ndef f(x): os._exit(0)',
 error='def f(x): raise AssertionError', caught='import os\ndef f(x): os._exit(0)',
 looker='import gc, re, sys\nseen = [o for o in gc.get_objects() + [*sys.modules["__main__"].__dict__.values()] for o in (o.values() if type(o) is dict else [o])\n'
        '        if type(o) is str and "1776" in o and "gc.get" not in o]\ndef f(x): return 1776 if seen else 0',
 memory='import ctypes, re\nbest = 0\nfor l in open("/proc/self/maps"):\n    a, b = (int(x, 16) for x in l.split()[0].split("-"))\n'
        '    if " rw-p " in l: best = best or re.search(rb"f[(]888[)] == 1776", ctypes.string_at(a, b - a))\ndef f(x): return 1776 if best else 0',
 judge='import os\nopen(f"/proc/{os.getppid()}/mem", "r+b")\ndef f(x): return 0',
 builtin='import builtins\nbuiltins.AssertionError = type("E", (Exception,), {})\nbuiltins.exec = print\ndef f(x): return 0')

@pytest.mark.parametrize('forger', FORGERS)
def test_no_program_passes_tests_by_itself(forger):
    check = dict(tests='assert f(888) == 1776', names=['f'], seconds=2.)
    if forger == 'caught': check['tests'] = 'try: assert f(888) == 1776\nexcept BaseException as e: assert not isinstance(e, AssertionError)'
    r = run_code(FORGERS[forger], **check); assert not r.ok and r.status != 'wall', r
    assert run_code('def f(x): return 2*x', **check).ok

def test_values_cross_the_border_as_they_are():
    "What a function gets and gives is equal to what it would be in one process, and of the same type"
    values = "[1, -2**80, .5, float('inf'), 'a', '', b'x', None, True, (1, (2,)), {1: [2]}, {3}, frozenset({4}), 2j, range(4), 'é\\n\\x00']"
    r = run_code('def same(*a, **kw): return a, kw', names=['same'], tests=f'v = {values}\nfor x in v + [v]:\n'
                 '    (y,), kw = same(x, key=x)\n    assert y == x and type(y) is type(x) and kw == dict(key=x), (x, y)')
    assert r.ok, r
    r = run_code('def squares(n): return (i*i for i in range(n))\ndef bad(): raise LookupError("no")', names=['squares', 'bad'],
                 tests='assert tuple(squares(3)) == (0, 1, 4) and squares(1) != [0]\ntry: bad()\nexcept LookupError as e: assert str(e) == "no"\nelse: 1/0')
    assert r.ok, r
    big = run_code('def f(x): return x*2', names=['f'], tests='assert len(f("x"*300_000)) == 600_000'); assert big.ok, big

def test_one_program_does_not_end_a_run():
    "A thousand judged in a row would end with the first of these; each has an answer of its own, and so have its neighbours"
    names = [*HOSTILE][[*HOSTILE].index('a verdict of its own'):]
    rs = run_many([c for n in names for c in ('pass', HEAD + HOSTILE[n])], workers=2, seconds=2.)
    assert all(r.ok for r in rs[::2]) and not any(r.ok for r in rs[1::2]), [(n, r) for n, r in zip(names, rs[1::2]) if r.ok]
    assert all(isinstance(r.detail, str) and '\n' not in r.detail and r.status != 'wall' for r in rs), rs

def test_walls_that_fail_once(monkeypatch):
    "A guard that ends without a word is started again; a system that builds no walls any more is an error"
    real, calls = nano_dh.execution._start, []
    def weak(a, *args):
        calls.append(a['code'])
        return (dict(out=b'', err=b''), '', None) if len(calls) <= lost else real(a, *args)
    run_code('pass'); monkeypatch.setattr(nano_dh.execution, '_start', weak)
    lost = 2; assert run_code('print(1)').out == '1\n' and len(calls) == 3
    lost = 3; calls.clear(); assert run_code('print(1)').status == 'wall' and calls[-1] == ''
    lost = 99; calls.clear()
    with pytest.raises(SandboxError, match='trust=True'): run_code('print(1)')

def test_refuses_where_too_little_is_left():
    with pytest.raises(SandboxError, match='trust=True'): run_code('pass', without=('user', 'namespaces'))
    assert run_code('print(1)', without=('user', 'namespaces', 'landlock', 'seccomp'), trust=True).ok

pack = pytest.mark.skipif(not local_file(DATA, 'humaneval.jsonl', 'HumanEval.jsonl'), reason='NANO_DH_DATA names a folder without HumanEval')

def judged(task, answer=None): # as `evaluate` does, two at a time
    say = lambda c: c['messages'][-1]['content'] if answer is None else answer
    return run_many([dict(code=task.answer(c, say(c)), tests=task.tests(c), names=[c['row']['entry_point']]) for c in task], workers=2, seconds=10.)

@pack
def test_some_canonical_solutions_pass(): assert all(r.ok for r in judged(HumanEval(data=DATA)[::12]))

@pack
@(pytest.mark.slow if FULL else lambda f: f)
def test_every_canonical_solution_passes_and_a_wrong_one_does_not():
    t = HumanEval(data=DATA); rs = judged(t); assert len(rs) == SIZES['humaneval'] and all(r.ok for r in rs), [r for r in rs if not r.ok]
    assert not any(r.ok for r in judged(t[::4], '    return None\n')) and not any(r.ok for r in judged(t[::4], FORGERS['verdict']))
    one = run_many([t.program(c, c['messages'][-1]['content']) for c in t[::3]], workers=2); assert all(r.ok for r in one)      # in one program, by hand
