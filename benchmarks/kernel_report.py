"""Compiles every Triton kernel ahead of time, for GPUs that need not be present, and inspects the machine code.

    python -m benchmarks.kernel_report [--quick]

Each launch that the backend makes, in every dtype and configuration that it can choose, is compiled for NVIDIA's
compute capabilities 8.0, 9.0 and 10.0 and for AMD's gfx942. Registers, spills, shared memory, products on tensor cores
and loads of 16 bytes are read with the disassembler that Triton ships, for AMD from the assembly. The exit status is 1
if a kernel breaks a rule of `faults`. Speed is not measured.
"""

import argparse
import functools
import itertools
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.progress import progress
from mixout_fast import __version__
from mixout_fast.backends import triton as backend

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Most shared memory of a program, from the vendors' tables of compute capabilities; gfx942: local data share.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Instructions that multiply matrices: mma, wgmma and tcgen05, MFMA.
TENSOR_CORE = {
    "sm_80": r"\bHMMA",
    "sm_90": r"\b(?:HMMA|HGMMA)",
    "sm_100": r"\b(?:HMMA|UTC\w*MMA)",
    "gfx942": r"\bv_mfma",
}
POINTER = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
PRECISIONS = [(dtype, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
PRECISIONS += [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
# (out_features, in_features): the first has too few features for ONE_PASS_FEATURES[0], the second has enough.
SIZES = (1024, 1024), (8192, 8192)


@dataclass
class Launch:
    """A recorded launch: what it computes, and the arguments that determine what is compiled."""

    what: str
    dtypes: str
    kernel: object
    arguments: tuple
    options: dict
    compute: torch.dtype

    @property
    def config(self) -> str:
        blocks = "x".join(str(v) for k, v in self.options.items() if k.startswith("BLOCK"))
        precision = " tf32" if self.options.get("PRECISION") == "tf32" else ""
        return f"{blocks} {self.options.get('num_warps', 4)}w{precision}"

    @property
    def multiplies_on_tensor_cores(self) -> bool:
        ieee = self.compute == torch.float32 and self.options.get("PRECISION") == "ieee"
        return self.kernel is backend.kernels.one_pass_kernel and not ieee and self.compute != torch.float64


@dataclass
class Reading:
    """A compiled kernel's registers and spills per thread, shared memory per program, and numbers of instructions."""

    registers: int
    spills: int
    shared: int
    tensor_core: int
    wgmma: int
    wide_loads: int
    narrow_loads: int
    fused: int


def launches(quick: bool) -> list[Launch]:
    """The launches of the backend's functions, for sizes that reach every row of its tables; each compilation once."""
    seen = {}

    seed, p = torch.tensor(0), 0.9
    for dtype, compute in PRECISIONS[:1] if quick else PRECISIONS:
        record = functools.partial(note_launches, seen, dtype, compute)
        for out_features, in_features in SIZES:
            weight = torch.empty(out_features, in_features, dtype=dtype)
            grad = torch.empty(4096, out_features, dtype=compute)
            parts = backend.empty_sums(grad, None)
            for mask in ("input", "element"):
                draw = (seed, p, mask)
                record(f"mix, {mask}", backend.mix, weight, weight, *draw, compute)
                record(f"mask_grad, {mask}", backend.mask_grad, weight, *draw, 2.0, dtype)
                mixing = (*draw, 2.0, False, False, compute)
                record(f"mix, {mask}, sum", backend.prologue, weight, weight, None, grad, *mixing)
                precisions = ("ieee", "tf32") if compute == torch.float32 else ("ieee",)
                for rows, precision in itertools.product((16, 32, 64), precisions):
                    x = torch.empty(rows, in_features, dtype=compute)
                    # Up to the most rows in either table; some of these combinations only benchmarks.paths takes.
                    if rows > max(*backend.ONE_PASS_ROWS[compute], *backend.MANY_OUTPUTS_ROWS[compute]):
                        continue
                    with mock.patch.object(backend, "_precision", lambda dtype, precision=precision: precision):
                        record(f"y, {mask}", backend.product, x, weight, weight, weight[0], *draw, False)
                        record(f"dX, {mask}", backend.product, x, weight, weight, None, *draw, True)
            x, draw = torch.empty(4096, in_features, dtype=compute), (seed, p, "input", 2.0)
            index = torch.empty(backend.capacity(in_features, p), dtype=torch.int32)
            compact = torch.empty(len(index), out_features, dtype=compute)
            for sums, summed in ((", sum", grad), ("", None)):
                record(f"gather{sums}", backend.prologue, None, None, x, summed, *draw, False, False, compute)
            for column_major in (False, True):
                where = ", columns" if column_major else ""
                W, dW = (empty_matrix(out_features, in_features, d, column_major) for d in (dtype, compute))
                for sums, summed in ((", sum", parts), ("", None)):
                    ending = (summed, *draw, True, column_major, dtype)
                    record(f"mask_grad of dW'{sums}{where}", backend.prologue, dW, None, None, *ending)
                    record(
                        f"expand{sums}{where}", backend.expanded, compact, index, summed, in_features, 2.0, *ending[-2:]
                    )
                for sums, summed in ((", sum", grad), ("", None)):
                    ending = (summed, *draw, False, column_major, compute)
                    record(f"mix, gather{sums}{where}", backend.prologue, W, W, x, *ending)
                    if column_major:
                        record(f"mix{sums}{where}", backend.prologue, W, W, None, *ending)
    return list(seen.values())


def empty_matrix(out_features: int, in_features: int, dtype: torch.dtype, column_major: bool) -> torch.Tensor:
    """An empty matrix (N, K), row-major or column-major."""
    if column_major:
        return torch.empty(in_features, out_features, dtype=dtype).t()
    return torch.empty(out_features, in_features, dtype=dtype)


def note_launches(seen: dict, dtype: torch.dtype, compute: torch.dtype, what: str, function, *arguments) -> None:
    """Call the backend's function, recording its launches in `seen` instead of making them."""

    def note(kernel, grid, device, *values, **options):
        launch = Launch(
            what, "->".join(dict.fromkeys(str(d)[6:] for d in (dtype, compute))), kernel, values, options, compute
        )
        signature, constants, _ = specialization(launch)
        seen.setdefault((kernel, str(signature), str(constants), str(options)), launch)

    with mock.patch.object(backend, "launch", note):
        function(*arguments)


def specialization(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and divisibilities, as Triton derives them from the arguments at a launch."""
    signature, constants, attributes = {}, {}, {}
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments, strict=False)) | launch.options
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, values[parameter.name]
        specialized = not parameter.do_not_specialize
        is_one = isinstance(value, int) and value == 1 and specialized and not parameter.annotation_type
        if parameter.is_constexpr or value is None or is_one:
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
        else:
            signature[name] = parameter.annotation_type or ("i32" if value < 2**31 else "i64")
        if specialized and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_for(launch: Launch, target: GPUTarget):
    options = {name: launch.options[name] for name in ("num_warps", "num_stages") if name in launch.options}
    signature, constants, attributes = specialization(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options | {"enable_fp_fusion": False})


def read(compiled, name: str) -> Reading:
    if name.startswith("sm"):
        return read_cubin(compiled.asm["cubin"], compiled.metadata.shared, name)
    return read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared, name)


def read_cubin(cubin: bytes, shared: int, name: str) -> Reading:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E[.\w]*", sass)
    wide = sum(".128" in load for load in loads)
    return Reading(
        registers=registers,
        spills=stack + local + len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=shared,
        tensor_core=len(re.findall(TENSOR_CORE[name], sass)),
        wgmma=len(re.findall(r"\bHGMMA", sass)),
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
        fused=len(re.findall(r"\b(?:FFMA|DFMA)", sass)),
    )


def read_amdgcn(assembly: str, shared: int, name: str) -> Reading:
    def noted(key):
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1])

    loads = re.findall(r"\b(?:global|buffer|flat)_load_\w+", assembly)
    wide = sum(load.endswith("dwordx4") for load in loads)
    return Reading(
        registers=noted("vgpr_count"),
        spills=noted("vgpr_spill_count") + noted("private_segment_fixed_size"),
        shared=shared,
        tensor_core=len(re.findall(TENSOR_CORE[name], assembly)),
        wgmma=0,
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
        fused=len(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mac|mad)_f(?:32|64)", assembly)),
    )


def faults(launch: Launch, name: str, reading: Reading) -> list[str]:
    """The rules that a compiled kernel breaks, in words."""
    found = []
    kernels = backend.kernels
    streams = launch.kernel in (kernels.prologue_kernel, kernels.element_kernel)
    if reading.spills:
        found.append(f"{reading.spills} spills")
    if reading.shared > SHARED_LIMIT[name]:
        found.append(f"{reading.shared} bytes of shared memory")
    if streams and not reading.wide_loads:
        found.append("no loads of 16 bytes")
    if streams and reading.narrow_loads > 1:
        found.append("loads of less than 16 bytes beside the seed's")
    # Products without tensor cores consist of fused multiply-adds.
    if (streams or launch.multiplies_on_tensor_cores) and reading.fused:
        found.append("fused multiply-adds")
    if launch.multiplies_on_tensor_cores and not reading.tensor_core:
        found.append("no products on tensor cores")
    wide = launch.options.get("BLOCK_F", 0) >= 64
    if name == "sm_90" and wide and launch.multiplies_on_tensor_cores and not reading.wgmma:
        found.append("no wgmma")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="bf16 only")
    options = parser.parse_args(arguments)
    if backend.INTERPRETS:
        parser.error("TRITON_INTERPRET is set: nothing is compiled")
    todo = [(launch, name) for launch in launches(options.quick) for name in TARGETS]
    lines, failures = [], 0
    bar = progress(todo)
    for launch, name in bar:
        bar.set_description(f"{launch.what} {launch.dtypes} {name}")
        reading = read(compile_for(launch, TARGETS[name]), name)
        found = faults(launch, name, reading)
        failures += bool(found)
        cells = (reading.registers, reading.spills, reading.shared, reading.tensor_core, reading.wide_loads)
        row = f"{launch.what:<18} {launch.dtypes:<18} {launch.config:<18} {name:<7}"
        row += "".join(f"{cell:>9}" for cell in (*cells, reading.narrow_loads))
        lines.append("  ".join([row, *found]))
    print(
        f"mixout_fast {__version__}, torch {torch.__version__}, triton {triton.__version__}; nothing was run on a GPU"
    )
    print("registers a thread; bytes of shared memory a program; numbers of instructions")
    header = ("regs", "spills", "shared", "tensor", "16-byte", "narrower")
    print(f"{'launch':<18} {'dtype':<18} {'blocks, warps':<18} {'target':<7}" + "".join(f"{h:>9}" for h in header))
    print("\n".join(lines))
    print(f"{len(lines)} compiled, {failures} with a fault")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
