"""Rollouts in a forked child of a process that has used PyTorch's threads: they end, and with the parent's numbers.

Every case is a process of its own, so that one which waits for ever is killed by its alarm and by nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_COMMON = """
import multiprocessing, os, signal, sys, threading, warnings
import torch, hjepa_fast as hf
warnings.simplefilter("ignore")
torch.set_num_threads(2)
torch.manual_seed(0)
nets = [hf.LatentHNN(64, (128, 64)), hf.SeparableHNN(64, (128, 64), (96,)), hf.SeparableHNN(64, (128,), quadratic=True)]
z0 = torch.randn(300, 64)


def results(backend, net):
    z = z0.clone().requires_grad_()
    out = hf.rollout(net, z, 0.1, 4, energy=True, backend=backend)
    loss = out.states.square().mean() + out.energy.mean() + hf.energy(net, z).mean()
    return [out.states.detach(), *torch.autograd.grad(loss, [z, *net.parameters()], allow_unused=True, materialize_grads=True)]


def same(found, expected):
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(found, expected, strict=True))


def in_child(check):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        try:
            os._exit(0 if check() else 3)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def used():
    "PyTorch's threads, and this library's, have been at work in the calling thread."
    (z0 @ z0.T).sum()
    return results("auto", nets[0])
"""
_CASES = {
    "every backend, forward and backward": """
used()
for backend in ("auto", "torch", "reference"):
    for net in nets:
        expected = results(backend, net)
        assert in_child(lambda: torch.get_num_threads() == 2 and same(results(backend, net), expected)) == 0, (backend, net)
        assert same(results(backend, net), expected)
""",
    "a child of a child, with more threads and with one": """
expected = used()
def child():
    torch.set_num_threads(4)
    return same(used(), expected) and in_child(lambda: torch.set_num_threads(1) or same(used(), expected)) == 0
assert in_child(child) == 0
""",
    "from a second thread, in a second thread": """
expected, found = used(), []
def in_thread():
    found.append(in_child(lambda: same(used(), expected)))
def in_thread_of_child():
    ok = []
    thread = threading.Thread(target=lambda: ok.append(same(used(), expected)))
    thread.start()
    thread.join()
    return ok == [True] and same(used(), expected)
thread = threading.Thread(target=lambda: used() and in_thread())
thread.start()
thread.join()
found.append(in_child(in_thread_of_child))
assert found == [0, 0], found
""",
    "a pool of forked processes": """
expected = used()
signal.alarm(60)
with multiprocessing.get_context("fork").Pool(2, signal.alarm, (30,)) as pool:
    for found in pool.starmap(results, [("auto", nets[0])] * 4):
        assert same(found, expected)
""",
    "workers of a DataLoader": """
expected = used()[0]
signal.alarm(60)
class Rolled(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        assert torch.get_num_threads() == 1
        with torch.no_grad():
            return hf.rollout(nets[0], z0, 0.1, 4, backend=("auto", "torch", "reference", "cpp")[index]).states
options = {"num_workers": 2, "multiprocessing_context": "fork", "worker_init_fn": lambda _: signal.alarm(30)}
for found in torch.utils.data.DataLoader(Rolled(), batch_size=None, **options):
    assert same([found], [expected])
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("case", _CASES)
def test_forked_children_finish(case):
    done = subprocess.run([sys.executable, "-c", _COMMON + _CASES[case]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
