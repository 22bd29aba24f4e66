"What a hostile program leaves behind: nothing. As root, as an ordinary user, and with single layers missing."
import os, shutil, subprocess, sys
from pathlib import Path
import pytest
import nano_dh.execution
from hostile import HOSTILE, attack
from nano_dh.execution import SandboxError, run_code, run_many
from nano_dh.tasks import HumanEval, local_file

DATA = os.environ.get('NANO_DH_DATA', '')
linux = pytest.mark.skipif(sys.platform != 'linux', reason='the sandbox needs Linux')
pytestmark = linux

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
