"""Are the outputs that a chapter stores those that its cells give now, and do its figures say what they show? conftest.py asks when it runs the chapters.

    python tests/outputs.py nbs/07_dataset.ipynb     # runs chapters and stores their outputs anew; cells for a GPU and long ones keep theirs

Numbers may differ by 5%, whole ones not at all; what a clock, a machine or an installation says is passed over. A cell headed `#| varies 20%` gives its numbers
more room, what one headed `#| varies` says is not looked at."""
import contextlib, copy, io, json, os, re, subprocess, sys, tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOM, NOISE = .05, 1e-5             # numbers may differ by this share; below the second they are what rounding left

NUMBER = r'(?:(?<![\w)\]])[-+])?(?:\d+(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?'
UNIT = r'(?:[x×]|\s?[x×](?!\s*[\w(])|\s?(?:[mµun]?s|min|h|sec(?:onds?)?|minutes?|hours?|days?|times|[KMGTP]?\s?[\w.-]+/s|[KMGTP]?\s?[\w.-]+ (?:a|per) second))(?![\w/])'
MASKS = [(re.compile(what), to) for what, to in (
    (r'\x1b\[[0-9;]*m', ''),                                              # colours
    (r'0x[0-9a-f]{6,}', '<address>'), (r'(?<![\w/.])~?(?:/[\w.@+=~-]+){2,}/?', '<path>'),
    (r'\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?)?|\b\d\d:\d\d:\d\d\b|\b1[6-9]\d{8}\b', '<date>'),
    (r'\b\d+\.\d+\.\d+[\w.+]*', '<version>'), (r'(?<![\w.])(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,}(?![\w]|[-+]\d)', '<hash>'),
    (rf'(\b\w*(?:_(?:s|ms|us|ns|per_second)|seconds)\b[\'"]?\s*[:=|]?\s*[\'"]?){NUMBER}', r'\1<measured>'),   # 'tokens_s': 823.12
    (rf'(?<![\w.]){NUMBER}(?:\s?(?:±|\+-|to)\s?{NUMBER})?{UNIT}(?:\s?{NUMBER}{UNIT})*', '<measured>'))]

def lines_left(text): # what a terminal shows of lines that were written over
    return '\n'.join(line.rstrip('\r').split('\r')[-1] for line in text.split('\n'))

def masked(text):
    for what, to in MASKS: text = what.sub(to, text)
    return text

def pieces(text): # words and numbers by turns: [word, number, word, ...]
    return re.split(rf'({NUMBER})', masked(text))

def bare(words): # without spaces and with short lines, which follow the width of numbers
    return re.sub(r'\s+', '', re.sub(r'([-=─_.])\1{2,}', r'\1\1', words))

def near(a:str, b:str, after:str, room:float):
    "Are two numbers the same? `after` is the text that follows them"
    x, y = (float(t.replace(',', '')) for t in (a, b))
    if not re.search('[.e]', a + b) and after[:1] != '%' and room <= ROOM: return x == y
    def place(t): # the unit of its last digit
        digits, _, power = t.partition('e')
        return 10.**(int(power or 0) - len(digits.partition('.')[2]))
    large, last = max(abs(x), abs(y)), 1.01*max(place(a), place(b))
    return abs(x - y) <= max(room*large, min(last, large/2) if 'e' in a + b else last) or large < NOISE

def difference(old:str, new:str, room:float=ROOM): # None, or what stands there and what stands there now
    a, b = pieces(old), pieces(new)
    for i, (x, y) in enumerate(zip(a, b)):
        same = near(x, y, a[i + 1], room) if i % 2 else bare(x) == bare(y)
        if not same: return tuple(' '.join((''.join(t[max(0, i - 2):i])[-40:] + ''.join(t[i:i + 3])[:60]).split()) for t in (a, b))
    return None if len(a) == len(b) else tuple(' '.join(t.split())[-100:] for t in (old, new))

def shown(outputs:list): # -> text, number of pictures
    "What a reader sees of a cell: printed text, then what is displayed; warnings are left out"
    printed, rich, pictures = '', '', 0
    for out in outputs:
        if out['output_type'] == 'stream': printed += ''.join(out['text'])*(out['name'] == 'stdout')
        data = out.get('data', {}); pictures += 'image/png' in data or 'image/svg+xml' in data
        kind = next((k for k in ('image/png', 'image/svg+xml', 'text/markdown', 'text/html', 'text/plain') if k in data), '')
        if kind[:4] == 'text': rich += '\n' + ''.join(data[kind])
    return (lines_left(printed) + rich).strip(), pictures

def room_of(source:str): # share by which numbers may differ; None: all of it may
    said = re.search(r'^#\|\s*varies *(\d*)%?', source, re.M)
    return ROOM if not said else int(said[1])/100 if said[1] else None

def quiet(source:str): # its result is not shown: it ends in a semicolon, whatever comment follows
    kinds = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)
    try: tokens = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in kinds]
    except (SyntaxError, tokenize.TokenError): return False              # a magic command
    return tokens[-1:] == [';']

def differences(path:Path, now:dict): # now: cell id -> outputs of the cells that ran
    "A line for each cell whose stored outputs are not what it gives"
    wrong = []
    for cell in json.loads(Path(path).read_text())['cells']:
        if cell['id'] not in now: continue
        source = ''.join(cell['source']); room = room_of(source)
        new = [o for o in now[cell['id']] if o['output_type'] != 'execute_result' or not quiet(source)]
        (old, before), (new, after) = shown(cell['outputs']), shown(new)
        found = difference(old, new, room) if room else None
        if not found and after and not before: found = ('no picture', f'{after} of them')    # live ones are drawn in notebooks alone
        if found: wrong.append(f'{Path(path).name}, cell {cell["id"]}: stored {found[0]!r}, now {found[1]!r}')
    return wrong

def titles(figure): # the texts above it and its parts
    own = [figure.get_suptitle()] + [ax.get_title(loc) for ax in figure.axes for loc in ('left', 'center', 'right')]
    return own + [t for part in figure.subfigs for t in titles(part)]

@contextlib.contextmanager
def recorded():
    "nbdev's test_nb keeps in `outputs` what cells give (by id), in `untitled` the cells whose figures have no title of three words"
    import nbdev.test
    from execnb.shell import CaptureShell
    from matplotlib.backend_bases import FigureCanvasBase
    class Recorder(CaptureShell):
        outputs, untitled, now = {}, [], ''
        def cell(self, cell, **kw):
            if cell.cell_type != 'code': return
            Recorder.now, cell.outputs = cell.id, []
            super().cell(cell, **kw); self.outputs[cell.id] = cell.outputs
        def _run(self, code, *args, **kw): # execnb would hide what is printed, too
            return super()._run(code + '\n#' if code.rstrip().endswith(';') else code, *args, **kw)
    def drawn(self, *args, **kw):
        if max(len(t.split()) for t in titles(self.figure)) < 3: Recorder.untitled.append(Recorder.now)
        return draw(self, *args, **kw | dict(bbox_inches=None))                    # drawn once; 'tight' draws twice, to measure first
    draw, FigureCanvasBase.print_figure, nbdev.test.CaptureShell = FigureCanvasBase.print_figure, drawn, Recorder
    try: yield Recorder
    finally: FigureCanvasBase.print_figure, nbdev.test.CaptureShell = draw, CaptureShell

def here(): # are outputs made as the stored ones were: on a CPU, with the data that ships?
    from nano_dh.core import get_device
    return get_device().type == 'cpu' and not os.environ.get('NANO_DH_DATA')

def faults(path:Path, run):
    "All that is wrong with what a chapter shows, as lines"
    name, again = Path(path).name, f'python tests/outputs.py nbs/{Path(path).name}'
    stale = differences(path, run.outputs) if here() else []
    shows = [c for c in dict.fromkeys(run.untitled) if shown(run.outputs[c])[1]]
    untold = [f'{name}, cell {c}: a figure without a title that says what it shows' for c in shows]
    return stale + untold + [f'{again}   stores its outputs anew']*bool(stale)

def store(path:Path):
    "Run a chapter and keep what its cells give"
    import nbformat
    from nbclient import NotebookClient
    book = nbformat.read(path, 4); run = copy.deepcopy(book)
    left_out = [c.id for c in run.cells if c.cell_type == 'code' and re.search(r'^#\|\s*(cuda|slow|eval:\s*false)\b', c.source, re.M)]
    for cell in run.cells:
        if cell.id in left_out: cell.source = ''
    NotebookClient(run, timeout=900, kernel_name='python3', resources={'metadata': {'path': str(Path(path).parent)}}).execute()
    for cell, done in zip(book.cells, run.cells):
        if cell.cell_type == 'code' and cell.id not in left_out: cell.outputs, cell.execution_count = done.outputs, None
    nbformat.write(book, path)
    subprocess.run(['nbdev_clean', '--fname', str(path)], cwd=ROOT, check=True)

if __name__ == '__main__':
    if len(sys.argv) < 2: sys.exit(__doc__)
    for name in sys.argv[1:]: store(Path(name).resolve()); print(f'{name}: stored')
