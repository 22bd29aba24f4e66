"How the package reads: names are words, functions have names, an effect stands in a line of its own. `python tests/test_style.py` prints the table."
import ast, io, tokenize
from pathlib import Path
import pytest
ROOT = Path(__file__).parents[1]
SHORT = {*'qkvgBTHKVSxi_'}       # letters of the field, an input, an index, nothing
MOST = .10                       # of the names that a module assigns may be another letter
MODULES = sorted(p for p in (ROOT/'nano_dh').glob('*.py') if p.stem[0] != '_')

def assigned(tree):
    "Names that code binds: variables, loop variables, parameters"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): yield node.id, node.lineno
        if isinstance(node, ast.arg): yield node.arg, node.lineno

def letters(tree):
    names = list(assigned(tree))
    return [f'{line}: {name}' for name, line in names if len(name) == 1 and name not in SHORT], len(names)

def faults(tree):
    "Lines of named lambdas, of operators used as statements, of assignments inside expressions (but for the test of an if or a while)"
    tests = {id(w) for node in ast.walk(tree) if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.comprehension))
             for test in (node.ifs if isinstance(node, ast.comprehension) else [node.test]) for w in ast.walk(test)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda): yield f'{node.lineno}: a lambda with a name; write def'
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.BoolOp, ast.IfExp)): yield f'{node.lineno}: an operator as a statement; write if'
        if isinstance(node, ast.NamedExpr) and id(node) not in tests: yield f'{node.lineno}: an assignment inside an expression; give it a line'

@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_code_reads(path):
    tree = ast.parse(path.read_text())
    assert not list(faults(tree)), f'{path.name}: ' + '; '.join(faults(tree))
    short, n = letters(tree)
    assert len(short) <= MOST*n, f'{path.name}: {len(short)} of {n} names are one letter, at most {MOST:.0%} may be: ' + ', '.join(short)

def test_it_notices():
    seen = lambda code: [f.split(': ')[1].split(';')[0] for f in faults(ast.parse(code))]
    assert seen('f = lambda: 1') == ['a lambda with a name'] and seen('a and b()') == ['an operator as a statement']
    assert seen('print(n := 1)') == ['an assignment inside an expression'] and not seen('if n := g(): pass')
    assert letters(ast.parse('for a in q: x, rate = a, 1')) == (['1: a'], 3)

def table():
    print(f"{'module':20}{'lines':>7}{'tokens':>8}{'one letter':>12}{'lambdas/100':>13}{'faults':>8}")
    total = [0]*6
    for p in MODULES:
        text = p.read_text(); tree = ast.parse(text); short, n = letters(tree)
        skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
        row = [text.count('\n'), sum(t.type not in skip for t in tokenize.generate_tokens(io.StringIO(text).readline)),
               len(short), n, sum(isinstance(node, ast.Lambda) for node in ast.walk(tree)), len(list(faults(tree)))]
        total = [a + b for a, b in zip(total, row)]
        for name, r in ((p.stem, row), *[('all', total)]*(p == MODULES[-1])):
            print(f'{name:20}{r[0]:7}{r[1]:8}{r[2]/max(1, r[3]):12.0%}{100*r[4]/max(1, r[0]):13.1f}{r[5]:8}')

if __name__ == '__main__': table()
