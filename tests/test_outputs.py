"A chapter's stored outputs are compared with what its cells give: what is noticed, what is passed over."
import json
import pytest
from outputs import difference, faults, recorded, room_of

@pytest.mark.parametrize('old, new', [
    ('1,024 parameters', '1,025 parameters'), ('loss 2.31', 'loss 2.61'), ('[1, 2]', '[1, 2, 3]'), ('3 x 4', '2 x 4'), ('True', 'False'), ('-3', '3'),
    ('d12', 'd13'), ('', 'a line'), ('1e-3', '1e-4'), ('37%', '41%'), ('3.7252903e-04', '2.7252903e-04'), ('state 3 MB', 'state 4 MB'), ('7 of 8 right', '6 of 8 right')])
def test_a_change_is_noticed(old, new): assert difference(old, new)

@pytest.mark.parametrize('old, new', [
    ('loss 2.3112', 'loss 2.3391'), ('took 3 min 51 s', 'took 12 s'), ('1.7x, 4 x, 300 tokens/s', '2.9x, 3 x, 12.5 tokens/s'), ('3.2 ± 0.1 ms, 8 to 1424 ms', '900 µs, 41 to 97 ms'),
    ("{'tok_s': '7.9e+03', 'step_us': 2429, 'seconds': .1}", "{'tok_s': '895', 'step_us': 26315, 'seconds': 3.5}"), ('error 3.1e-07', 'error 9.4e-08'), ('0.02', '0.03'), ('37%', '38%'), ('<f at 0x7f01aa3b10>', '<f at 0x7ffe31b2c0>'),
    ('torch 2.13.0+cpu', 'torch 2.11.0'), ('made 2026-01-02 10:11', 'made 2027-11-12 01:59'), ('| a  |  1 |\n|----|----|', '| a | 1 |\n|---|---|'),
    ('tensor([1.000,  2.000])', 'tensor([1.0001, 2.0000])'), ('-0.00', '0.00')])
def test_a_clock_a_machine_and_rounding_are_passed_over(old, new): assert not difference(old, new)

def test_room():
    assert room_of('#| varies 20%\nf()') == .2 and room_of('#| hide\n#| varies\nf()') is None and room_of('f()') == .05
    assert difference('9 steps', '10 steps') and not difference('9 steps', '10 steps', .2)

def test_what_says_so_is_one_line_a_cell(tmp_path, monkeypatch):
    monkeypatch.setattr('outputs.here', lambda: True)
    from nbdev.test import test_nb
    draw = 'import matplotlib.pyplot as plt; ax = plt.subplots()[1]; '
    said = lambda text: [dict(output_type='stream', name='stdout', text=[text])]
    picture = [dict(output_type='display_data', metadata={}, data={'image/png': '', 'text/plain': 'Figure'})]
    cells = {'same': ('print(1.23)', said('1.22\n')), 'stale': ('print("new", 2)', said('old 2\n')), 'none': ('3', []),
             'free': ('#| varies\nprint(9)', said('8\n')), 'quiet': ('print(5); 6;', said('5\n')), 'note': ('7;   # why', []), 'loud': ('8   # why;', []), 'gpu': ('#| cuda\n1/0', said('x')),
             'bare': (draw + 'ax.set_title("loss");', picture), 'told': (draw + 'ax.set_title("The loss falls");', picture), 'lost': (draw, [])}
    book = dict(cells=[dict(id=k, cell_type='code', metadata={}, execution_count=None, source=s, outputs=o) for k, (s, o) in cells.items()],
                metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3')), nbformat=4, nbformat_minor=5)
    path = tmp_path/'90_small.ipynb'; path.write_text(json.dumps(book))
    with recorded() as run: assert test_nb(path, skip_flags=['cuda'])[0]
    found = [line.split(',')[1].split(':')[0].split()[-1] for line in faults(path, run)[:-1]]
    assert found == ['stale', 'none', 'loud', 'lost', 'bare', 'lost'] and "stored 'old 2', now 'new 2'" in faults(path, run)[0]
    assert faults(path, run)[-1].startswith('python tests/outputs.py nbs/90_small.ipynb')
