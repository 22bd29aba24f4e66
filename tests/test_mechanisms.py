"The quick gate of the architecture: what the delta rule can and cannot do, trained from nothing on a CPU."
import pytest, torch
from nano_dh.mechanisms import PROBES, Probe, ProbeRun, accuracy, mqar, train_runs

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def train(pattern, probe, seed=0, **kw): return train_runs([ProbeRun(pattern, probe, seed=seed, **kw)])[0].model

PARITY = dict(lr=1e-2, steps=600, depth=1, d_model=32, head_dim=16, n_qk_head=2)
RECALL = Probe('mqar', 33, 32, mqar(16, 16, 4))

def test_parity_with_negative_eigenvalues():
    m, p = train('G-', PROBES['parity'], **PARITY), PROBES['parity']
    assert accuracy(m, p, p.train_len) > .99 and accuracy(m, p, 4*p.train_len) > .95

@pytest.mark.slow # chapter 56 shows the same
def test_parity_without():
    m, p = train('G', PROBES['parity'], **PARITY), PROBES['parity']
    assert accuracy(m, p, 4*p.train_len) < .70

def test_recall_by_the_delta_rule_alone():
    m = train('G', RECALL, lr=1e-2, steps=500, depth=1, d_model=64, head_dim=32)
    assert accuracy(m, RECALL, 32) > .95 and accuracy(m, RECALL, 64) > .95       # twice the pairs, too

@pytest.mark.slow
@pytest.mark.parametrize('seed', [1, 2])
def test_other_seeds(seed):
    p = PROBES['parity']
    assert accuracy(train('G-', p, seed, **PARITY), p, 4*p.train_len) > .95
    assert accuracy(train('G', p, seed, **PARITY), p, 4*p.train_len) < .70
    assert accuracy(train('G', RECALL, seed, lr=1e-2, steps=500, depth=1, d_model=64, head_dim=32), RECALL, 32) > .95

@pytest.mark.slow
def test_recall_by_attention():
    "Two layers find the pairs by their positions; rows that grow make it quick"
    m = train('L', RECALL, lr=3e-3, steps=1500, depth=2, d_model=64, head_dim=16)
    assert accuracy(m, RECALL, 32) > .95
