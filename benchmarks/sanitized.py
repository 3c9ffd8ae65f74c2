"""What gpu.sh runs under compute-sanitizer: a backend's kernels, on shapes of whole vectors and on odd ones."""

import argparse

import torch

from mixout_fast import mixout, testing

# With few rows the products take one pass, with many the weight is mixed first.
SHAPES = ((3, 255, 63), (130, 128, 64), (5, 128, 64), (130, 255, 63))
PRECISIONS = [
    (torch.float32, torch.bfloat16),
    *((dtype, dtype) for dtype in testing.DTYPES),
    (torch.float32, torch.float16),
]
# Triton takes half a second to compile a kernel: it gets only the first of SHAPES and of PRECISIONS.
TRITON_SHAPES, TRITON_PRECISIONS = 2, 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitized", description=__doc__)
    parser.add_argument("backend", choices=("cuda", "triton"))
    backend = parser.parse_args().backend
    few = backend == "triton"
    for shape in SHAPES[: TRITON_SHAPES if few else None]:
        for dtype, compute in PRECISIONS[: TRITON_PRECISIONS if few else None]:
            for mask in testing.MASKS:
                # With an input mask dW is one full product, masked, at p = 0.2; at 0.7 backward gathers the kept
                # columns for it, at 0.9 forward does.
                for p in (0.2, 0.7, 0.9) if mask == "input" else (0.9,):
                    case = testing.random_case(*shape, p=p, mask=mask, dtype=dtype, compute=compute, device="cuda")
                    testing.run(case, backend)
                    testing.run(testing.column_major(case), backend)
                mixout(case.weight, case.target, case.p, True, mask=mask, seed=case.seed, backend=backend)
    print(f"ran the kernels of {backend}")


if __name__ == "__main__":
    main()
