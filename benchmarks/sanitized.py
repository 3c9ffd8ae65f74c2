"""What gpu.sh runs under compute-sanitizer: every kernel a few times, on odd shapes, with freshly allocated buffers."""

from mixout_fast import backends, mixout, testing

CASES = [(shape, dtype) for shape in testing.SHAPES[:2] for dtype in testing.DTYPES]


def main() -> None:
    served = [name for name, reason in backends.describe("cuda").items() if reason is None and name != "reference"]
    for backend in served:
        for shape, dtype in CASES:
            for mask in testing.MASKS:
                case = testing.random_case(*shape, p=0.6, mask=mask, dtype=dtype, device="cuda")
                testing.run(case, backend)
                mixout(case.weight, case.target, case.p, True, mask=mask, seed=case.seed, backend=backend)
    print(f"ran {len(CASES)} problems with {', '.join(served) or 'no backend: only the reference serves CUDA'}")


if __name__ == "__main__":
    main()
