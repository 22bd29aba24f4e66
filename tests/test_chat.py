"Conversations, their mask and packing, and what fine-tuning does, against things computed another way."
import json, math, os, subprocess, sys, re
from pathlib import Path
import nbformat, pytest, torch
import mini_pack
from tiny_run import PAPERMILL, ROOT, environ, parameters
from nano_dh.checkpoint import save_checkpoint
from nano_dh.hybrid_model import HybridConfig, HybridModel
from nano_dh.sft import ChatLoader, ChatTrainer, FinetuneConfig, finetune
from nano_dh.tasks import (ARC, GSM8K, MMLU, ConversationError, HumanEval, SmolTalk, Sums, TaskMixture, local_file, messages,
                           open_tasks, render, render_batch)
from nano_dh.identity import Identity
from nano_dh.tokenizer import Tokenizer

tok = Tokenizer({bytes([i]): i for i in range(256)})
DATA, SIZES = mini_pack.data()
def pack(test): # of a test on the published sets, or where NANO_DH_DATA names none on a small pack in their schemas
    return pytest.mark.skipif(not local_file(DATA, 'gsm8k_test.jsonl'), reason='NANO_DH_DATA names a folder without the published sets')(test)

def tiny(dtype=torch.float32, pattern='GGL', **kw):
    cfg = HybridConfig.from_depth(3, vocab_size=tok.vocab_size, sequence_len=96, d_model=64, head_dim=32, head_k_dim=32, head_v_dim=32,
                                  pattern=pattern, **kw)
    m, g = HybridModel(cfg, 0), torch.Generator().manual_seed(1)
    for p in m.parameters(): p.data += .05*torch.randn(p.shape, generator=g)
    return m.to(dtype)

def packed(m, convs, dtype=torch.float32): # loss of each conversation, all in one row with borders
    rs = [render(c, tok) for c in convs]; ids, on = sum((r.ids for r in rs), []), sum((r.mask for r in rs), [])
    ends = torch.tensor([len(r) for r in rs]).cumsum(0).tolist()
    x = torch.tensor([ids]); y = torch.tensor([[t if o else -1 for t, o in zip(ids[1:] + [0], on[1:] + [0])]])
    l = m(x, targets=y, reduction='none', cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32)).detach().view(-1)
    return [l[a:e].sum().item() for a, e in zip([0, *ends], ends)]

@pytest.mark.parametrize('pattern,kw', [('GGL', {}), ('S', dict(window=128)), ('GL', dict(smear=True, backout=True))])
@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_order_in_a_row_does_not_matter(pattern, kw, dtype, tol):
    m = tiny(dtype, pattern, **kw); convs = [*Sums(size=4), *Identity(size=4)]; perm = [5, 2, 7, 0, 4, 1, 6, 3]
    a, b = packed(m, convs), packed(m, [convs[i] for i in perm])
    for j, i in enumerate(perm): assert abs(a[i] - b[j]) < tol*a[i]
    for c, l in zip(convs, a): assert abs(packed(m, [c])[0] - l) < tol*l          # and it is the loss it has alone

def test_loss_touches_the_supervised_tokens_only():
    m = tiny(torch.float64); b = next(ChatLoader(TaskMixture([Sums(size=50), Identity(size=50)]), tok, batch_rows=4, seq_len=96, prefetch=0))
    z = m(b.x, cu_seqlens=b.cu_seqlens).detach().requires_grad_()
    torch.nn.functional.cross_entropy(z.flatten(0, 1), b.y.flatten(), ignore_index=-1, reduction='sum').backward()
    assert torch.equal(z.grad.abs().sum(-1) > 0, b.y >= 0)
    m.zero_grad(); loss = m(b.x, targets=b.y, reduction='sum', cu_seqlens=b.cu_seqlens); loss.backward()
    g = [p.grad.clone() for p in m.parameters()]
    m.zero_grad(); free = torch.where(b.y >= 0, b.y, torch.randint(0, 256, b.y.shape))   # any targets elsewhere
    l = m(b.x, targets=free, reduction='none', cu_seqlens=b.cu_seqlens).view(b.y.shape)
    (l*(b.y >= 0)).sum().backward()
    for p, q in zip(m.parameters(), g): torch.testing.assert_close(p.grad, q, rtol=1e-9, atol=1e-12)
    seen = {tok.decode([t]) for t in b.y[b.y >= 0].tolist()}
    assert '<|assistant_end|>' in seen and not seen & {'<|user_end|>', '<|assistant_start|>', '<|output_start|>', '<|output_end|>', '<|bos|>'}

def base(tmp): # a checkpoint to start from
    os.environ['NANO_DH_BASE_DIR'] = str(tmp)
    m = HybridModel(HybridConfig.from_depth(2, pattern='GL', vocab_size=tok.vocab_size, sequence_len=96, d_model=64, head_dim=32,
                                            head_k_dim=32, head_v_dim=32), 0)
    return str(save_checkpoint(Path(tmp)/'runs'/'base', 0, m, tokenizer=tok, meta=dict(train=dict(stage='base', total_batch_size=768))))

KW = dict(tasks='sums@60 identity@60', val_tasks='sums/test@20', num_iterations=3, total_batch_size=768, prompts='', device='cpu', nproc=0,
          eval_every=0, warmup_steps=40)

def losses(tmp, **kw):
    from dataclasses import replace
    out = []; finetune(FinetuneConfig(**KW | kw), out.append)
    return [r['loss'] for r in out if 'loss' in r]

def stopped(tmp, **kw):
    "A run of four steps that ends after its third; its checkpoint is that of the second"
    class Stop(Exception): pass
    def emit(r):
        if 'loss' in r and r['step'] == 3: raise Stop
    with pytest.raises(Stop): finetune(FinetuneConfig(**KW | dict(num_iterations=4, save_every=2) | kw), emit)

def weights(tmp, run, step):
    from nano_dh.checkpoint import load_model
    return load_model(Path(tmp)/'runs'/run, step=step, device='cpu')[0].state_dict()

def test_micro_batches_do_not_change_the_loss(tmp_path, monkeypatch):
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); b = base(tmp_path)
    a = losses(tmp_path, base=b, run='a', device_batch_size=8)
    c = losses(tmp_path, base=b, run='c', device_batch_size=1)
    assert len(a) == 3 and all(abs(x - y) < 1e-5*x for x, y in zip(a, c))
    t = ChatTrainer(FinetuneConfig(**KW | dict(base=b, run='d', device_batch_size=2)).resolved(), lambda r: None)
    batch = next(t.loader); n, want = 0, 0.     # the loss of a batch by hand, conversation by conversation
    for x, y, st in zip(batch.x, batch.y, batch.starts):
        for s, e in zip(st, st[1:] + [len(x)]):
            l = t.model(x[None, s:e], targets=y[None, s:e], reduction='none'); n += (y[s:e] >= 0).sum().item(); want += l.sum().item()
    got, count = t.train_step(batch).tolist(); t.loader.close()
    assert count == n and abs(got - want) < 1e-4*want and abs(got/count - a[0]) < 1e-4*a[0]

@pytest.mark.slow
def test_ranks_do_not_change_the_loss(tmp_path, monkeypatch):
    from nano_dh.launch import run_ranks
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); b = base(tmp_path)
    a = losses(tmp_path, base=b, run='a', device_batch_size=2)
    cfg = FinetuneConfig(**KW | dict(base=b, run='two', device_batch_size=2, nproc=2))
    c = [r['loss'] for r in run_ranks(finetune, cfg, 2, 'cpu') if 'loss' in r]
    assert all(abs(x - y) < 1e-4*x for x, y in zip(a, c)) and len(c) == 3

def test_resume_is_exact(tmp_path, monkeypatch):
    "Where the rate falls, so that a run of another length would be another run"
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); b = base(tmp_path)
    fall = dict(warmup_steps=0, warmdown_ratio=1., num_iterations=4)
    whole = losses(tmp_path, base=b, run='whole', **fall)
    stopped(tmp_path, base=b, run='cut', **fall)
    assert losses(tmp_path, run='cut', base=b, resume=True, **fall) == whole[2:] and len(whole) == 4
    assert losses(tmp_path, base=b, run='longer', **fall | dict(num_iterations=5))[2:4] != whole[2:]
    a, c = weights(tmp_path, 'whole', 4), weights(tmp_path, 'cut', 4)
    assert all(torch.equal(a[k], c[k]) for k in a)

def test_a_run_continues_without_its_base(tmp_path, monkeypatch):
    "Its own checkpoint holds model and tokenizer; what was settled when it began is refused"
    import shutil
    from nano_dh.sft import chat_plan, show_chats
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); b = base(tmp_path); go = dict(run='cut', resume=True)
    whole = losses(tmp_path, base=b, run='whole', num_iterations=4); stopped(tmp_path, base=b, run='cut')
    for kw, why in ((dict(epochs=3.), 'epochs 3.0 differs from 1.0, with which run cut began; leave it out, or give num_iterations'),
                    (dict(lr_frac=.2), 'lr_frac 0.2 differs from 1.0.*give matrix_lr'), (dict(base='other'), 'base other differs from .*base/000000 of run cut')):
        with pytest.raises(ValueError, match=why): FinetuneConfig(**go, **kw).resolved()
    for kw in (dict(epochs=1.), dict(base='base'), dict(base=b), dict(base=str(Path(b).parent))): assert FinetuneConfig(**go, **kw).resolved().base == b
    shutil.rmtree(Path(b).parent)
    p = chat_plan(FinetuneConfig(**go, num_iterations=4, device='cpu', nproc=0)); assert p.cfg.base == b and p.done == 2 and show_chats(p.cfg, 1)
    assert losses(tmp_path, **go, num_iterations=4) == whole[2:]
    with pytest.raises(Exception, match='no run or checkpoint'): FinetuneConfig(run='new', resume=True, base='base').resolved()

def test_resume_takes_a_run_of_its_own_kind(tmp_path, monkeypatch):
    from nano_dh.train import PretrainConfig
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); b = base(tmp_path)
    losses(tmp_path, base=b, run='first', num_iterations=1); losses(tmp_path, base=b, run='second', stage='sft', num_iterations=1)
    assert FinetuneConfig(resume=True, num_iterations=2).resolved().run == 'first'
    assert FinetuneConfig(resume=True, num_iterations=2, stage='sft').resolved().run == 'second'
    with pytest.raises(FileNotFoundError, match='holds no run'): PretrainConfig(resume=True).resolved()
    with pytest.raises(ValueError, match='of stage mid'): PretrainConfig(resume=True, run='first').resolved()

def test_resume_before_the_beginning_has_the_rates_of_a_new_run(tmp_path, monkeypatch):
    from nano_dh.rl import RLConfig
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); b = base(tmp_path); names = ('matrix_lr', 'embedding_lr', 'unembedding_lr', 'scalar_lr')
    rates = lambda c: [getattr(c, k) for k in names]
    rl = dict(base=b, task='sums', device='cpu', nproc=0)
    for make, kw in ((FinetuneConfig, dict(KW, base=b, stage='sft')), (FinetuneConfig, dict(KW, base=b, lr_frac=.3)), (RLConfig, rl)):
        fresh = make(run='x', **kw).resolved(); again = make(run='x', resume=True, **kw).resolved()
        assert rates(again) == rates(fresh) != [getattr(FinetuneConfig, k) for k in names]
        assert rates(again.resolved()) == rates(fresh)                       # a plan's configuration is resolved once more
    losses(tmp_path, base=b, run='x', stage='sft', num_iterations=1)
    assert FinetuneConfig(run='x', resume=True, stage='sft').resolved().matrix_lr == pytest.approx(.002)     # and one that began keeps its own

def test_at_most_so_many_and_spread_over_the_set(tmp_path, monkeypatch):
    "The mixtures of the stages fit sets of any size; a part of a sorted file has all its subjects; the plan has the true numbers"
    from nano_dh.chat_eval import evaluate_task
    from nano_dh.sft import STAGES, chat_plan
    from nano_dh.tasks import open_task
    data = tmp_path/'data'; data.mkdir()
    def write(name, rows): (data/name).write_text('\n'.join(map(json.dumps, rows)))
    exam = [dict(question=f'q{i}', subject=f's{i//50}', choices=list('wxyz'), answer=i % 4) for i in range(1000)]
    for s in ('train', 'test'): write(f'mmlu_{s}.jsonl', exam)
    write('gsm8k_train.jsonl', [dict(question='How many?', answer='#### 3')]*4); write('sft_train.jsonl', [dict(messages=Sums()[0]['messages'])]*7)
    got = {t.name: len(t) for t in open_tasks(STAGES['mid']['full'], 'train', str(data))}
    assert (got['mmlu'], got['gsm8k'], got['smoltalk'], got['sums']) == (1000, 4, 7, 10000)
    assert len(open_task('smoltalk', 'train', str(data), 20000)) == 7
    subjects = lambda t: len({t.rows[i]['subject'] for i in t.index})
    t = open_task('mmlu', 'test', str(data), 200); assert len(t) == 200 and subjects(t) == 20 and subjects(t[:100]) == 20
    assert list(open_task('mmlu', 'test', str(data), 50).index) == list(t.index)[:50]
    with pytest.raises(ValueError, match='mmlu@0: take 1 or more'): open_tasks('mmlu@0', 'test', str(data))
    asked = []; whole = MMLU('test', data=str(data)); seen = lambda c, text: asked.append(c['messages'][0]['content']) or True
    whole.evaluate = seen; s, _ = evaluate_task(tiny(), tok, whole, size=40); assert s.n == 40 and len({int(q[1:].split()[0])//50 for q in asked}) > 15
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); b = base(tmp_path)
    p = chat_plan(FinetuneConfig(base=b, tasks='mmlu/train@99999 sums@60', val_tasks='sums/test@20', data=str(data), device='cpu', nproc=0))
    assert '1,060 conversations (mmlu 1,000, sums 60)' in str(p)

def test_all_gpus_that_can_share_the_data(tmp_path, monkeypatch):
    import nano_dh.plan as T, nano_dh.rl as R
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); b = base(tmp_path)
    monkeypatch.setattr(T, 'n_gpus', lambda: 6)
    monkeypatch.setattr(T, 'machine', lambda d: dict(name='six', memory=80e9, flops=1e15))
    assert FinetuneConfig(**KW | dict(base=b, device='cuda', nproc=-1, total_batch_size=-1)).resolved().nproc == 4
    assert R.RLConfig(base=b, task='sums', device='cuda').resolved().nproc == 4

@pytest.mark.parametrize('kw,says', [(dict(keep=-1), 'keep -1: take 0 or more'), (dict(device='gpu'), "device 'gpu': use"), (dict(schedule='lin'), "schedule 'lin': use"),
    (dict(eval_every=-3), 'eval_every -3: take 0 or more'), (dict(run='a/b'), 'leave out the /'), (dict(device='cuda'), 'device cuda, but this machine shows none')])
def test_values_that_cannot_be_are_refused_by_the_plan(tmp_path, monkeypatch, kw, says):
    "As in pretraining, before anything is trained; those of RL too"
    import nano_dh.plan as T, nano_dh.rl as R
    from nano_dh.sft import chat_plan
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); b = base(tmp_path); monkeypatch.setattr(T, 'n_gpus', lambda: 0)
    for refuse in (lambda: chat_plan(FinetuneConfig(base=b, **kw)), lambda: R.RLConfig(base=b, task='sums', **kw).resolved()):
        with pytest.raises((T.PlanError, ValueError), match=says) as e: refuse()
        assert '\n' not in str(e.value)

def test_inherited_and_misspelt_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); b = base(tmp_path)
    with pytest.raises(ValueError, match='depth comes with the base'): FinetuneConfig(base=b, depth=8).resolved()
    with pytest.raises(NameError, match="did you mean 'sums'"): FinetuneConfig(base=b, tasks='smus').resolved()
    with pytest.raises(ValueError, match='stage'): FinetuneConfig(base=b, stage='x').resolved()

@pack
@pytest.mark.parametrize('task,name', [(lambda: ARC('easy', data=DATA), 'arc_easy'), (lambda: ARC('challenge', data=DATA), 'arc_challenge'),
    *((lambda s=s: MMLU(s, data=DATA), f'mmlu_{s}') for s in ('test', 'validation', 'dev')),
    *((lambda s=s: GSM8K(s, data=DATA), f'gsm8k_{s}') for s in ('train', 'test')), (lambda: HumanEval(data=DATA), 'humaneval'),
    (lambda: SmolTalk('train', data=DATA), 'sft_train'), (lambda: SmolTalk('test', data=DATA), 'sft_val')], ids=lambda x: x if isinstance(x, str) else '')
def test_published_sizes_and_every_example_is_a_conversation(task, name):
    t = task(); n = SIZES[name]; assert len(t) == n
    for i in range(0, n, max(1, n//200)): assert messages(t[i])
    for c in t[:50:7]:
        if t.kind in ('choice', 'generate') and t.name != 'humaneval':
            a = c['messages'][-1]['content']; a = a if isinstance(a, str) else ''.join(p['text'] for p in a if p['type'] == 'text')
            assert t.evaluate(c, a) and not t.evaluate(c, 'nothing')

def test_the_examination_of_programs_is_not_trained_on(tmp_path):
    from nano_dh.tasks import open_task
    (tmp_path/'humaneval.jsonl').write_text(json.dumps(dict(prompt='def f():\n', entry_point='f', canonical_solution='    return 1\n', test='')))
    assert len(open_task('humaneval', 'test', str(tmp_path))) == 1
    for f in (lambda: open_task('humaneval', 'train', str(tmp_path)), lambda: open_tasks('sums@5 humaneval', 'train', str(tmp_path))):
        with pytest.raises(ValueError, match="humaneval has no split 'train', only test"): f()

def test_answers_in_other_clothes(tmp_path):
    "A right answer is right however it is written, and a wrong one wrong: letters, numbers, programs"
    from nano_dh.tasks import Task, ask_choice, said_letter
    c = ask_choice('?', [*range(4)], 2); says = [Task().evaluate(c, t) for t in ('C', 'C.', '**C**', '(C)', 'C: two', 'Answer: C', 'Certainly not C', 'Could be', 'B', 'c')]
    assert says == [True]*6 + [False]*4 and said_letter('A dog') is None and ask_choice('?', [*range(20)], 15)['messages'][1]['content'] == 'P'
    (tmp_path/'gsm8k_test.jsonl').write_text(''.join(json.dumps(dict(question='?', answer=f'So.\n#### {x}')) + '\n' for x in ('-5', '5.5', '1,000')))
    g = GSM8K('test', data=str(tmp_path)); dress = [('-5', '-$5', '$-5', '\u22125', '-5.00', ' - 5'[1:2] + '5'), ('5.50', '$5.5', '5.5 dollars'), ('1000', '1,000.0', '$1,000', '£1000.')]
    for i, d in enumerate(dress):
        for j, c in enumerate(g): assert all(g.evaluate(c, f'So it is\n#### {x}') == (i == j) for x in d), (d, j)
    (tmp_path/'humaneval.jsonl').write_text(json.dumps(dict(task_id='T/0', prompt='import math\n\ndef f(x):\n', entry_point='f', canonical_solution='    return 1\n',
                                                            test='def check(f):\n    assert f(4) == 2\n')))
    h = HumanEval(data=str(tmp_path)); r = h[0]
    for put in ('```py\n{}```', '~~~python3\n{}~~~', '```\n{}', 'a\n```sh\nls\n```\n```py\n{}```\n```\nf(undefined)\n```'):
        for end in ('\n', '\r\n'):
            right, wrong = (put.format(f'def f(x):\n    return {v}\n').replace('\n', end) for v in ('int(math.sqrt(x))', 'x'))
            assert h.evaluate(r, right) and not h.evaluate(r, wrong), (put, end)

@pack
def test_programs_may_call_the_functions_of_their_prompt():
    "The whole function alone, without the helpers that stand before it"
    t = HumanEval(data=DATA); he = {c['row']['task_id'].split('/')[1]: c for c in t}
    for k in ('10', '32', '38', '50'):
        r = he[k]['row']; p = r['prompt']; own = p[p.rindex(f"def {r['entry_point']}"):] + r['canonical_solution']
        for answer in (f'```python\n{own}```', f"```python\n{p}{r['canonical_solution']}```", r['canonical_solution']): assert t.evaluate(he[k], answer), k

@pack
def test_gsm8k_calls_give_what_the_authors_wrote():
    from nano_dh.execution import calculator
    n = right = 0
    for c in GSM8K('test', data=DATA)[:300]:
        ps = c['messages'][-1]['content']
        for p, q in zip(ps, ps[1:]):
            if p['type'] == 'python':
                r = calculator(p['text']); n += 1
                try: right += r is not None and abs(float(r) - float(q['text'].replace(',', ''))) < .011*max(1, abs(float(r)))
                except ValueError: pass
    assert n > 2.5*len(GSM8K('test', data=DATA)[:300]) and right/n > .97

@pytest.mark.parametrize('nb', ['midtrain', 'sft', 'chat_eval', 'rl'])
def test_parameters_of_the_notebooks_are_fields(nb):
    from nano_dh.chat_eval import ChatEvalConfig
    from nano_dh.rl import RLConfig
    cls = dict(chat_eval=ChatEvalConfig, rl=RLConfig).get(nb, FinetuneConfig)
    from dataclasses import fields
    fs = {f.name: f for f in fields(cls)}
    cell = next(c for c in nbformat.read(ROOT/'runs'/f'{nb}.ipynb', 4).cells if 'parameters' in c.metadata.get('tags', []))
    for l in cell.source.splitlines():
        n, t, d = re.match(r'(\w+): (\w+) = (.*?)  # .+', l).groups()
        assert fs[n].type.__name__ == t and (eval(d) == fs[n].default or n == 'stage'), l

def test_questions_are_read_whole_or_counted_as_too_long():
    "A model with a bound: what it reads is never cut, the answer has the room that is left"
    from nano_dh.chat_eval import answers, eval_table, evaluate_task
    from nano_dh.engine import Engine
    from nano_dh.tasks import Task, chat, render_for_completion
    m = tiny(pattern='L'); e, read = Engine(m, tok, max_rows=2), []; room = e.max_len; assert room == 96
    submit = e.submit; e.submit = lambda r: (read.append(r.prompt), submit(r))[1]
    class Words(Task):
        name, kind, index = 'words', 'generate', range(5)
        def example(self, i): return chat('w'*(10, 92, 88, 300, 93)[i], 'x')         # four tokens more with the roles
        def evaluate(self, conv, text): return True
    convs = [*Words()]; ids = [render_for_completion(c, tok) for c in convs]; assert [len(i) for i in ids] == [14, 96, 92, 304, 97]
    got = answers(e, convs, n=2, max_tokens=256)
    assert read == [ids[0]]*2 + [ids[2]]*2 and [len(g) for g in got] == [2, 0, 2, 0, 0]
    assert all(len(i) + len(s.tokens) <= room for i, g in zip(ids, got) for s in g)
    s, some = evaluate_task(m, tok, Words(), engine=e, max_tokens=256)
    assert (s.n, s.right, s.too_long) == (5, 2, 3) and '3 too long to read' in str(s) and 'too long' in some[1][1] and '2 of 5, 3 too long' in eval_table([s.record()]).data

@pytest.mark.slow
def test_chat_eval_is_the_same_on_two_ranks(tmp_path, monkeypatch):
    from nano_dh.chat_eval import ChatEvalConfig, chat_eval
    from nano_dh.launch import run_ranks
    monkeypatch.setenv('NANO_DH_BASE_DIR', str(tmp_path)); b = base(tmp_path)
    losses(tmp_path, base=b, run='a', num_iterations=30, warmup_steps=5, tasks='identity@100')
    cfg = ChatEvalConfig(model='a', tasks='identity sums@11', max_tokens=24, nproc=2, device='cpu').resolved()
    one, two = [], [*run_ranks(chat_eval, cfg, 2, 'cpu')]; chat_eval(cfg, one.append)
    for x, y in zip(one, two): assert all(x[k] == y[k] for k in x if k in ('task', 'n', 'right', 'accuracy', 'chat_core'))
    assert [x.get('n') for x in two] == [12, 11, None]

@pytest.mark.slow
def test_the_three_notebooks_in_a_row(tmp_path):
    base(tmp_path); env = environ(tmp_path)
    for nb, kw in (('midtrain', dict(tasks='sums@100 identity@50', num_iterations=6)), ('sft', dict(tasks='identity@100', num_iterations=4)),
                   ('chat_eval', dict(tasks='identity sums@10', max_tokens=16))):
        kw |= {} if nb == 'chat_eval' else dict(val_tasks='sums/test@10', eval_tokens=2000)
        r = subprocess.run([PAPERMILL, ROOT/'runs'/f'{nb}.ipynb', tmp_path/f'{nb}.ipynb', *parameters(**kw)], env=env, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr[-3000:]
    got = json.loads(next((tmp_path/'runs').glob('*/chat_eval-*.json')).read_text())
    assert [r['n'] for r in got['results']] == [12, 10] and math.isfinite(got['chat_core'])

def test_local_files_lie_in_linked_folders_too(tmp_path):
    "`sft` and `eval` may be links; a link to a folder above ends"
    far, data = tmp_path/'far', tmp_path/'data'; (far/'deep').mkdir(parents=True); data.mkdir()
    (far/'deep'/'sft_train.jsonl').write_text(json.dumps(dict(messages=Sums()[0]['messages'])))
    (data/'sft').symlink_to(far); (far/'up').symlink_to(data); (far/'same').symlink_to(far/'deep')
    assert local_file(data, 'sft_train.jsonl').resolve() == far/'deep'/'sft_train.jsonl' and local_file(data, 'x.jsonl') is None
    assert SmolTalk('train', data=str(data))[0] == dict(messages=Sums()[0]['messages'])
