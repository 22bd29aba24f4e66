"What comes in and goes out: nanochat's versions, transformers in a process without this package, lm-evaluation-harness, files of others."
import json, os, pickle, subprocess, sys
from pathlib import Path
import numpy as np, pytest, tiktoken, torch
import make_reference as ref, make_reference_versions as versions
from nano_dh.checkpoint import find_checkpoint, load_model, read_meta
from nano_dh.nanochat import nanochat_steps, read_nanochat
from nano_dh.tokenizer import SPECIALS, SPLIT, Tokenizer

OLD = json.loads(versions.FILE.read_text())['versions']

def tokenizer(folder): # as nanochat keeps it
    folder.mkdir(parents=True, exist_ok=True)
    enc = tiktoken.Encoding('rustbpe', pat_str=SPLIT, mergeable_ranks={bytes([i]): i for i in range(256)},
                            special_tokens={s: 256 + i for i, s in enumerate(SPECIALS)})
    (folder/'tokenizer.pkl').write_bytes(pickle.dumps(enc))
    torch.save(torch.tensor([1]*256 + [0]*9, dtype=torch.int32), folder/'token_bytes.pt')

def saved(root, config, weights, step=1000, kind='base'): # a folder as nanochat writes it
    p = root/f'{kind}_checkpoints'/'d3'; p.mkdir(parents=True)
    torch.save(weights, p/f'model_{step:06d}.pt'); tokenizer(root/'tokenizer')
    (p/f'meta_{step:06d}.json').write_text(json.dumps(dict(step=step, val_bpb=1.25, model_config=config)))
    return p

@pytest.mark.parametrize('model', versions.MODELS)
@pytest.mark.parametrize('version', OLD)
def test_versions(tmp_path, version, model):
    "Logits of each version of nanochat, from its own code"
    got = OLD[version]['models'][model]
    w = {n: torch.empty(s) for n, s in got['shapes'].items()}; versions.fill(w)
    m, tok, meta = read_nanochat(saved(tmp_path, got['config'], w), **(dict(softcap=20.) if version == 'softcap' else {}))
    with torch.no_grad(): z = m(versions.tokens())[:, ::16, ::24]
    assert (z - torch.tensor(got['logits'])).abs().max() < 5e-6 and tok.vocab_size == m.cfg.vocab_size
    assert bool(meta['notes']) == (version not in ('smear', 'july'))

@pytest.mark.parametrize('case', ref.CASES)
def test_depth_8(tmp_path, case):
    "The loss that nanochat's own code gave at depth 8"
    got, kw = json.loads(ref.FILE.read_text())['cases'][case], ref.CASES[case]
    width = kw.get('d_model', 64*ref.DEPTH); heads = width//kw.get('head_dim', 128)
    config = dict(sequence_len=ref.TOKENS, vocab_size=ref.VOCAB, n_layer=ref.DEPTH, n_head=heads, n_kv_head=heads, n_embd=width,
                  window_pattern=kw['pattern'])
    from nano_dh.hybrid_model import HybridConfig, HybridModel
    with torch.device('meta'): shapes = HybridModel(HybridConfig.from_depth(
        ref.DEPTH, preset='nanochat', vocab_size=ref.VOCAB, sequence_len=ref.TOKENS, **kw)).state_dict()
    theirs = lambda n: n.replace('wte.', 'transformer.wte.', n.startswith('wte.')).replace('blocks.', 'transformer.h.').replace('.mixer.', '.attn.')
    w = ref.weights({n: tuple(t.shape) for n, t in shapes.items()}, width)
    assert ref.checksum(w) == got['weights_sha256']
    p = saved(tmp_path, config, {f'_orig_mod.{theirs(n)}': torch.from_numpy(t) for n, t in w.items()})
    (tmp_path/'tokenizer'/'tokenizer.pkl').unlink()
    m, tok, meta = load_model(p, device='cpu'); x, y = ref.batch()
    with torch.no_grad(): loss = m(x, targets=y).item()
    assert abs(loss - got['loss']) < 2e-6*got['loss'] and tok is None

def test_folder(tmp_path):
    "load_model, find_checkpoint and read_meta take the folder; another folder is not taken for one"
    got = OLD['july']['models']['small']
    w = {n: torch.empty(s) for n, s in got['shapes'].items()}; versions.fill(w)
    p = saved(tmp_path, got['config'], w, kind='chatsft')
    assert find_checkpoint(p) == p and nanochat_steps(tmp_path) == []
    m, tok, meta = load_model(p, device='cpu')
    assert read_meta(p)['model'] == meta['model'] == m.cfg.to_dict() and meta['train']['stage'] == 'sft'
    with pytest.raises(ValueError, match='no checkpoint of step 7; it has \\[1000\\]'): load_model(p, 7, 'cpu')
