"""A small data pack in the schemas of the published sets, so that the tests of tasks, of CORE and of the sandbox run anywhere. All of it is made here.

    python tests/mini_pack.py FOLDER         # writes it; NANO_DH_DATA=FOLDER then names it

With NANO_DH_DATA set the same tests run on the full sets instead, and know their published sizes."""
import json, os, random, re, sys, tempfile
from functools import cache
from pathlib import Path

SIZES = dict(arc_easy=40, arc_challenge=32, mmlu_test=57, mmlu_validation=38, mmlu_dev=19, gsm8k_train=60, gsm8k_test=80, humaneval=16, sft_train=50, sft_val=20)
PUBLISHED = dict(arc_easy=2376, arc_challenge=1172, mmlu_test=14042, mmlu_validation=1531, mmlu_dev=285, gsm8k_train=7473, gsm8k_test=1319, humaneval=164,
                 sft_train=15218, sft_val=400)

def arc(i, r): # allenai/ai2_arc: labels are letters or numbers, sometimes three or five choices
    n = r.choice((4, 4, 4, 3, 5)); a, b = r.randint(2, 40), r.randint(2, 40)
    label = list('ABCDE' if i % 3 else '12345')[:n]; gold = r.randrange(n)
    return dict(id=f'Made_{i}', question=f'A box holds {a} red and {b} blue stones. How many stones are in it?', answerKey=label[gold],
                choices=dict(text=[str(a + b + k - gold) for k in range(n)], label=label))

def mmlu(i, r): # cais/mmlu
    a, b = r.randint(2, 99), r.randint(2, 99); gold = r.randrange(4)
    return dict(question=f'What is {a} times {b}?', subject=f'subject_{i % 19}', choices=[str(a*b + 10*(k - gold)) for k in range(4)], answer=gold)

def gsm8k(i, r): # openai/gsm8k: calls in << >>, thousands with commas, fractions, money, the answer after ####
    a, b, c = r.randint(2, 60), r.randint(2, 60), r.choice((2, 4, 5)); s = a*b; t = s*c; half = t/2
    say = lambda x: f'{x:g}' if x == int(x) else f'{x:.2f}'
    return dict(question=f'Ann packs {a} boxes of {b} pens a day. After {c} days she sells half of them. How many are left?',
                answer=f'A day she packs {a}*{b}=<<{a}*{b}={s}>>{s} pens.\nIn {c} days that is {s}*{c}=<<{s}*{c}={t}>>{t}.\n'
                       f'Half of it is {t}/2=<<{t}/2={say(half)}>>{say(half)}.\n#### {half:,.0f}')

PROGRAMS = [ # name, arguments, text, body, tests; some with a function that they may call
 ('add', 'x, y', 'The sum', 'return x + y', ['f(2, 3) == 5', "f('a', 'b') == 'ab'", 'f(-1, .5) == -.5']),
 ('largest', 'xs', 'The largest, None of nothing', 'return max(xs) if xs else None', ['f([3, 9, 2]) == 9', 'f([]) is None']),
 ('evens', 'xs', 'Only the even ones', 'return [x for x in xs if x % 2 == 0]', ['f([1, 2, 4]) == [2, 4]', 'f([]) == []']),
 ('pairs', 'd', 'Items in order', 'return sorted(d.items())', ["f({2: 'b', 1: 'a'}) == [(1, 'a'), (2, 'b')]"]),
 ('letters', 's', 'The letters that occur', 'return set(s)', ["f('abca') == {'a', 'b', 'c'}"]),
 ('halves', 'xs', 'Two halves', 'n = len(xs)//2\n    return tuple(xs[:n]), tuple(xs[n:])', ['f([1, 2, 3]) == ((1,), (2, 3))']),
 ('root', 'x', 'The square root', 'return math.sqrt(x)', ['abs(f(2)**2 - 2) < 1e-9', 'f(0) == 0']),
 ('steps', 'n', 'A generator', 'for i in range(n): yield i*i', ['tuple(f(3)) == (0, 1, 4)']),
 ('twice', 's', 'Mirrored twice', 'return mirror(s) + mirror(s)', ["f('ab') == 'baba'"], 'def mirror(s):\n    return s[::-1]\n\n\n'),
 ('decode', 's', 'Undo shift', "return ''.join(chr(ord(c) - 1) for c in s)", ["all(f(shift(s)) == s for s in ('abc', '', 'xyz!'))"],
  "def shift(s):\n    return ''.join(chr(ord(c) + 1) for c in s)\n\n\n"),
 ('zero', 'cs', 'A root of a polynomial by halving', 'a, b = -100., 100.\n    for _ in range(200):\n        m = (a + b)/2\n        if poly(cs, a)*poly(cs, m) <= 0: b = m\n        else: a = m\n    return a',
  ['all(abs(poly(c, f(c))) < 1e-6 for c in ([1, 2], [-6, 11, -6, 1]))'], 'def poly(cs, x):\n    return sum(c*x**i for i, c in enumerate(cs))\n\n\n'),
 ('outer', 'n', 'By a helper', 'return inner(n) + 1', ['f(4) == 9'], 'def inner(n):\n    return 2*n\n\n\n')]

def program(i, r): # openai/openai_humaneval; numbers 10, 32, 38, 50 are those with functions in front
    name, args, text, body, tests, *head = PROGRAMS[i % len(PROGRAMS)]
    number = dict(twice=10, zero=32, decode=38, outer=50).get(name, 100 + i) if i < len(PROGRAMS) else 200 + i
    checks = ''.join(f'    assert {x}\n' for x in tests)
    return dict(task_id=f'HumanEval/{number}', entry_point=name, prompt=f'import math\n\n\n{"".join(head)}def {name}({args}):\n    """{text}"""\n',
                canonical_solution=f'    {body}\n', test=f'def check(candidate):\n' + re.sub(r'\bf\(', 'candidate(', checks))

def talk(i, r): # HuggingFaceTB/smol-smoltalk
    return dict(messages=[dict(role='system', content='Be brief.')]*(i % 3 == 0) + [dict(role=('user', 'assistant')[k % 2], content=f'{("Question", "Answer")[k % 2]} {i}.{k}')
                          for k in range(2*r.randint(1, 3))], source='made')

def core(bundle): # one file for each task of CORE but coqa, in the form of the published bundle
    from nano_dh.core_eval import core_tasks
    for t in core_tasks().values():
        if t.label == 'coqa': continue
        r, rows = random.Random(t.label), []
        for i in range(t.shots + 24):
            a, b = r.sample(range(1, 51), 2)
            if t.kind == 'multiple_choice':
                n = r.choice((2, 3, 4, 5)); gold = r.randrange(n); rows.append(dict(query=f'Question: {a} and {b} make', choices=[f'{a + b + k - gold} stones' for k in range(n)], gold=gold))
            elif t.kind == 'schema':
                gold = i % 2; rows.append(dict(context_options=[f'The {a} beat the {b} because the {x}' for x in ((a, b) if gold == 0 else (b, a))], continuation=f'was more than {b} in {i}.', gold=gold))
            else: rows.append(dict(context=f'After {a} comes', continuation=f'{a + 1} in step {i}'))
        path = Path(bundle)/t.uri; path.parent.mkdir(parents=True, exist_ok=True); lines(path, rows)

def lines(path, rows): Path(path).write_text(''.join(json.dumps(r) + '\n' for r in rows))

def write(folder) -> Path: # the pack
    "jsonl files under the names that tasks look for, and the CORE bundle under eval/core"
    d = Path(folder); (d/'eval').mkdir(parents=True, exist_ok=True)
    make = dict(arc=arc, mmlu=mmlu, gsm8k=gsm8k, humaneval=program, sft=talk)
    for name, n in SIZES.items():
        r = random.Random(name); lines(d/'eval'/f'{name}.jsonl', [make[name.split('_')[0]](i, r) for i in range(n)])
    core(d/'eval'/'core'); (d/'eval'/'core'/'world_knowledge').mkdir(exist_ok=True)
    return d

@cache
def data() -> tuple: # (folder, sizes): the full sets where NANO_DH_DATA names them, else this pack
    if full := os.environ.get('NANO_DH_DATA'): return full, PUBLISHED
    home = tempfile.TemporaryDirectory(prefix='mini_pack-'); data.home = home       # as long as the process
    return str(write(home.name)), SIZES

if __name__ == '__main__': print(write(sys.argv[1]))
