"""Shapes, layouts and p drawn anew in every run, for sizes near the end of a block or a vector that no list has.

A failure names its case; the seed that the report shows gives the same cases again.
"""

import dataclasses
import random

import pytest
import torch
from parameters import masks, precisions

from mixout_fast import testing

ROUNDS = 2
"""Cases in one run of each dtype, mask, backend and path."""

LARGEST = 4 * max(map(max, testing.SHAPES))
LAYOUTS = ("rows", "columns", "every second column", "longer rows", "odd start")


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def random_shape(rng, smallest=1):
    """(rows, in_features, out_features): each as often below 16 as above 256, not all of them large."""
    while True:
        shape = [round(smallest * (LARGEST / smallest) ** rng.random()) for _ in range(3)]
        if torch.Size(shape).numel() <= 400 * LARGEST:
            return shape


def random_options(rng, dtype, compute, mask, device):
    return {
        "mask": mask, "dtype": dtype, "compute": compute, "device": device, "seed": rng.getrandbits(31),
        "target": rng.random() < 0.8, "bias": rng.random() < 0.8,
    }  # fmt: skip


def laid_out(tensor, layout):
    """The same values with other strides, or from another address on."""
    if tensor is None or layout == "rows":
        return tensor
    if layout == "columns":
        return tensor.t().contiguous().t()
    if layout == "every second column":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if layout == "longer rows":
        return torch.nn.functional.pad(tensor, (0, 3))[..., : tensor.shape[-1]]
    return torch.nn.functional.pad(tensor.flatten(), (1, 0))[1:].view(tensor.shape)


def with_random_layouts(rng, case, of_weights=LAYOUTS):
    layouts = {name: rng.choice(LAYOUTS) for name in ("input", "bias", "grad_output")}
    layouts |= {name: rng.choice(of_weights) for name in ("weight", "target")}
    operands = {name: laid_out(getattr(case, name), layout) for name, layout in layouts.items()}
    return dataclasses.replace(case, **operands, origin=f"{case.origin}, {layouts}")


@precisions
@masks
def test_bits_and_exact_results(dtype, compute, mask, device, backend, path, rng):
    for _ in range(ROUNDS):
        shape, options = random_shape(rng), random_options(rng, dtype, compute, mask, device)
        p = rng.choice((rng.random(), 0.001, 0.9, 1.0))
        case = testing.random_case(*shape, p=p, **options)
        # A column-major W' is multiplied as it lies, and the library sums another order then.
        of_weights = [layout for layout in LAYOUTS if layout != "columns"]
        testing.check_all_bits(with_random_layouts(rng, case, of_weights), backend)
        case = testing.integer_case(*shape, p=rng.choice((0.5, 0.75)), **options)
        testing.check_exact(with_random_layouts(rng, case), backend)


@precisions
@masks
def test_error(dtype, compute, mask, device, backend, path, rng):
    for _ in range(ROUNDS):
        # So many outputs that error_cases has enough results: the largest of a few errors is luck.
        shape, options = random_shape(rng, smallest=16), random_options(rng, dtype, compute, mask, device)
        cases = testing.error_cases(testing.random_case, shape, p=rng.uniform(0.1, 0.5), **options)
        testing.check_error(cases, backend)
