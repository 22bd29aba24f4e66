"""Changes a copy of the package in one place and runs the test that should notice, for each of the mutants below.

    python tests/mutants.py            # all: some minutes; a name or a part of one picks:  python tests/mutants.py fsync

A line a mutant: killed, or SURVIVED. The exit code is the number of those that survived. A mutant whose text is no longer in the package is an error,
so that the list follows the code."""
import os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = 'test_mutants.py::'

MUTANTS = { # name -> file, text, the changed text, test that fails on it
 'backout: one layer early': ('hybrid_model', 'if i == cfg.n_layer // 2: mid = x', 'if i == cfg.n_layer // 2 - 1: mid = x', HERE + 'test_the_subtracted_stream'),
 'tied head left out of FLOPs': ('hybrid_model', 'if self.cfg.tie_embeddings: weights += self.wte.weight.numel()', 'pass', HERE + 'test_a_tied_head'),
 'top-k: one more': ('request', 'device), request.top_k if', 'device), request.top_k + 1 if', HERE + 'test_top_k_is_k'),
 'top-k: one less': ('request', 'device), request.top_k if', 'device), max(1, request.top_k - 1) if', HERE + 'test_top_k_is_k'),
 'few-shot seed': ('core_eval', 'random.Random(1234 + i)', 'random.Random(1235 + i)', HERE + 'test_few_shot'),
 'few-shot seed without the question': ('core_eval', 'random.Random(1234 + i)', 'random.Random(1234)', HERE + 'test_few_shot'),
 'rate of value embeddings': ('optim', 'value_embed=(embedding_lr*wide/2,', 'value_embed=(embedding_lr*wide,', HERE + 'test_rates_of_the_tables'),
 'loss: no maximum up to cap 300': ('cross_entropy', 'if not 0 < cap <= 30:', 'if not 0 < cap <= 300:', HERE + 'test_the_loss_of_large_scores'),
 'loss: no maximum at all': ('cross_entropy', 'if not 0 < cap <= 30:', 'if not 0 <= cap:', HERE + 'test_the_loss_of_large_scores'),
 'packing: what fits exactly does not': ('dataloader', 'np.where(lengths <= gap, lengths, 0).argmax()', 'np.where(lengths < gap, lengths, 0).argmax()', HERE + 'test_what_fits_exactly'),
 'packing: the last place is filled': ('dataloader', 'while size - at > 1 and', 'while size - at > 0 and', HERE + 'test_what_fits_exactly'),
 'error without k/(k-1)': ('loss_eval', '*k/(k - 1) if k > 1', '*1. if k > 1', HERE + 'test_the_error_of_bits'),
 'schedule a step late: pretraining': ('train', 'set_rates(self.opt, self.cfg, self.step)', 'set_rates(self.opt, self.cfg, self.step + 1)', HERE + 'test_the_rate_of_a_pretraining_step'),
 'schedule a step late: fine-tuning and RL': ('train', 'set_rates(self.opt, self.cfg, self.step)', 'set_rates(self.opt, self.cfg, self.step + 1)', HERE + 'test_the_first_step'),
 'rates without the schedule': ('train', "group['initial_lr']*factor", "group['initial_lr']", HERE + 'test_the_rate_of_a_pretraining_step'),
 'no rank scale: fine-tuning and RL': ('sft', 'clamp_min(1)/self.world', 'clamp_min(1)', HERE + 'test_gradients_are_the_same'),
 'a stop string, not the earliest': ('request', 'return text[:min(found)], True', 'return text[:found[0]], True', HERE + 'test_the_earliest_stop'),
 'chance is a quarter: chat': ('chat_eval', "sum(1/c['n_choices'] for c in convs)", '.25*len(convs)', HERE + 'test_chance_is'),
 'chance is a quarter: CORE': ('core_eval', 'sum(1/len(row[key]) for row in rows)/len(rows)', '.25', HERE + 'test_chance_is'),
 'an end inside a draft is passed': ('speculate', 't == draft[right] and t not in ends', 't == draft[right]', HERE + 'test_an_end_inside'),
 'no fsync: small files': ('core', 'file.flush(); os.fsync(file.fileno())', 'file.flush()', HERE + 'test_what_is_written'),
 'no fsync: shards': ('dataset', 'file.flush(); os.fsync(file.fileno())', 'file.flush()', HERE + 'test_what_is_written'),
 'no fsync: checkpoints': ('safe_checkpoint', 'for path in files: _sync(path)', 'pass', HERE + 'test_what_is_written'),
 'varlen: heads of a group apart': ('attention_paths', 'k, v = (x.repeat_interleave(group, 2) if group > 1 else x for x in (k, v))', 'k, v = (x.repeat(1, 1, group, 1) for x in (k, v))', HERE + 'test_grouped_heads'),
 'RL answers with old weights': ('rl', 'cfg = self.cfg; refresh(self.engine, self.model)', 'cfg = self.cfg', HERE + 'test_rl_answers'),
 'RL keeps old beginnings': ('rl', 'engine.release(); engine.slabs = slabs', 'engine.slabs = slabs', HERE + 'test_rl_answers'),
 'minus infinity is multiplied': ('chunked', 'torch.where(low.tril(-1), g[..., None], 0.)', '(g[..., None]*low.tril(-1))', 'test_delta_rule.py::test_minus_infinity'),
 'sandbox without seccomp': ('execution', "    if 'seccomp' in built: _seccomp()\n", '', 'test_sandbox.py::test_hostile_programs_quick'),
 'sandbox: datagram pairs': ('execution', '(_EQUAL, 0, 1, 1), yes, no]                                           # Unix', '(_EQUAL, 0, 0, 1), yes, no]  # Unix', 'test_sandbox.py::test_hostile_programs_quick'),
 'sandbox: a verdict without its number': ('execution', 'if mark == nonce and status in', 'if status in', 'test_sandbox.py::test_hostile_programs_quick'),
 'sandbox: tests in the memory of the program': ('execution', "without=key, built=_BUILT.get(key), names=[*names])", "without=key, built=_BUILT.get(key), names=[*names], tests=tests)", 'test_sandbox.py::test_no_program_passes'),
 'sandbox: tuples become lists': ('execution', "_MAKE = dict(l=list, t=tuple,", "_MAKE = dict(l=list, t=list,", 'test_sandbox.py::test_values_cross'),
 'sandbox: an end that tests may catch': ('execution', 'return _end_of(pid) if ended else end[:2]', 'return end[:2]', 'test_sandbox.py::test_no_program_passes'),
 'sandbox: a signal without a name': ('execution', "signal.Signals(n).name if n in {*signal.Signals} else f'signal {n}'", 'signal.Signals(n).name', 'test_sandbox.py::test_one_program'),
 'sandbox: a program ends the run': ('execution', "    except ValueError as error: return 'error', str(error)\n", '    except ArithmeticError: pass\n', 'test_sandbox.py::test_one_program'),
 'queue: finished runs again': ('beside', 'if out.exists(): continue', 'pass', 'test_scaling.py::test_a_killed_queue'),
 'tasks: a letter inside a word': ('tasks', 'return said_letter(text) ==', 'return text.strip()[:1] ==', 'test_chat.py::test_answers_in_other_clothes'),
 'tasks: numbers as texts': ('tasks', 'return plain_number(found[1]) if found else None', 'return found[1] if found else None', 'test_chat.py::test_answers_in_other_clothes'),
 'tasks: fences of Python alone': ('tasks', "known = '', 'python', 'python3', 'py', 'py3'", "known = '', 'python'", 'test_chat.py::test_answers_in_other_clothes'),
}

def run(name, file, old, new, test) -> bool: # killed
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        for f in ('nano_dh', 'tests', 'nbs'): shutil.copytree(ROOT/f, d/f, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        for f in ('conftest.py', 'pyproject.toml', 'settings.ini', 'README.md'): shutil.copy(ROOT/f, d)
        p, text = d/'nano_dh'/f'{file}.py', (ROOT/'nano_dh'/f'{file}.py').read_text()
        if text.count(old) != 1: raise SystemExit(f'{name}: {old!r} is {text.count(old)} times in {file}.py; write the mutant anew')
        p.write_text(text.replace(old, new))
        file, _, pick = test.partition('::')
        r = subprocess.run([sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', f'tests/{file}', '-k', pick], cwd=d, capture_output=True, text=True,
                           env=os.environ | dict(PYTHONPATH=str(d), OMP_NUM_THREADS='1'), timeout=600)
        if r.returncode not in (0, 1): raise SystemExit(f'{name}: no test ran\n{r.stdout[-2000:]}{r.stderr[-500:]}')
        return r.returncode == 1

if __name__ == '__main__':
    alive, picked = 0, [n for n in MUTANTS if not sys.argv[1:] or any(a in n for a in sys.argv[1:])]
    for name in picked:
        t = time.time(); killed = run(name, *MUTANTS[name]); alive += not killed
        print(f'{"killed  " if killed else "SURVIVED"} {name:46} {MUTANTS[name][3].split("::")[-1]:40} {time.time() - t:5.1f} s', flush=True)
    print(f'{len(picked)} mutants, {alive} survived')
    sys.exit(alive)
