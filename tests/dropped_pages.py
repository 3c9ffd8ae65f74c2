"""Weights with a memory page per input neuron, so that reading a dropped neuron's weights can be made to fault."""

import ctypes
import itertools
import mmap
import multiprocessing
import signal

import torch

from mixout_fast import reference, testing

NEURONS = 64


def outputs(module, w, u, *draw):
    return module.linear(torch.eye(NEURONS, dtype=w.dtype), w.t(), u.t(), None, *draw, False, False)[0]


def grad_input(module, w, u, *draw):
    grad, needs = torch.eye(NEURONS, w.shape[1], dtype=w.dtype), (True, False, False)
    return module.gradients(grad, None, None, None, w.t(), u.t(), *draw, 1.0, needs, False)[0]


MIXED = {
    "y": outputs,
    "dX": grad_input,
    "W'": lambda module, w, u, *draw: module.mix(w[None], u[None], *draw, w.dtype),
    "masked dW'": lambda module, w, u, *draw: module.mask_grad(w[None], *draw, 2.0, w.dtype),
}
"""Functions of a backend's module, row-major W and U (K, N), and the draw. y and dX are products of the identity with
column-major (N, K), so their entries are those of W'; the others take (1, K, N), the weight of a convolution with one
output."""


def check_they_are_not_read(name: str, module, dtype: torch.dtype, seed: int) -> None:
    """MIXED[name] equals the reference's in a process where the pages of all dropped neurons fault."""
    torch.manual_seed(seed)
    draw = torch.tensor(seed), 0.5, "input"
    weight = torch.frombuffer(mmap.mmap(-1, NEURONS * mmap.PAGESIZE), dtype=dtype).view(NEURONS, -1).normal_()
    target = torch.randn_like(weight)
    dropped = ~reference.keep_mask(draw[0], (1, NEURONS), *draw[1:])[0]
    want = MIXED[name](reference, weight, target, *draw)

    def mix():
        torch.set_num_threads(1)  # a forked process lacks the library's threads
        for row in itertools.compress(weight, dropped):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(row.data_ptr()), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        got = MIXED[name](module, weight, target, *draw)
        testing.assert_same_values(name, got, want, f"{dtype}, seed={seed}")

    process = multiprocessing.get_context("fork").Process(target=mix)
    process.start()
    process.join(120)
    hangs = process.is_alive()
    process.kill()
    assert not hangs, "still running after two minutes"
    read = f"{name} reads what is dropped: {dtype}, seed={seed}"
    assert process.exitcode == 0, read if process.exitcode == -signal.SIGSEGV else "its error is on stderr"
