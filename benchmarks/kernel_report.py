"""Compiles every Triton kernel ahead of time, for GPUs that need not be there, and reads what came out.

    python -m benchmarks.kernel_report [--quick]

Each launch that the backend makes, in every dtype and configuration that it can choose, is compiled for NVIDIA's
compute capabilities 8.0, 9.0 and 10.0 and for AMD's gfx942, and read with the disassembler that Triton ships:
registers, spills, shared memory, products on tensor cores, loads of 16 bytes. Exit status 1 where a kernel breaks a
rule of `faults`. It says nothing of speed.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
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
# Shared memory a program may have, from the vendors' tables of compute capabilities; gfx942: local data share.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Instructions that multiply matrices: mma, wgmma and tcgen05, MFMA.
TENSOR_CORE = {"sm_80": r"\bHMMA", "sm_90": r"\b(?:HMMA|HGMMA)", "sm_100": r"\b(?:HMMA|UTC\w*MMA)", "gfx942": r"\bv_mfma"}
POINTER = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
PRECISIONS = [(dtype, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
PRECISIONS += [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
# (rows, in_features, out_features): enough features for the first of ONE_PASS_CONFIGS, and not.
NARROW, WIDE = (1024, 1024), (8192, 8192)


@dataclass
class Launch:
    """A recorded launch: what was compiled for, and the arguments that decide what is compiled."""

    what: str
    dtypes: str
    kernel: object
    arguments: tuple
    options: dict
    compute: torch.dtype
    readings: dict = field(default_factory=dict)

    @property
    def config(self) -> str:
        blocks = "x".join(str(v) for k, v in self.options.items() if k.startswith("BLOCK"))
        precision = " tf32" if self.options.get("PRECISION") == "tf32" and self.compute == torch.float32 else ""
        return f"{blocks} {self.options.get('num_warps', 4)}w{precision}"

    @property
    def multiplies_on_tensor_cores(self) -> bool:
        ieee = self.compute == torch.float32 and self.options.get("PRECISION") == "ieee"
        return self.kernel is backend.kernels.one_pass_kernel and not ieee and self.compute != torch.float64


@dataclass
class Reading:
    """Of a compiled kernel: per thread and program, and numbers of instructions."""

    registers: int
    spills: int
    shared: int
    tensor_core: int
    wgmma: int
    wide_loads: int
    narrow_loads: int
    fused: int


def launches(quick: bool) -> list[Launch]:
    """Those of the backend's functions for sizes that reach every row of its tables, each compilation once."""
    seen = {}

    def record(what, dtype, compute, function, *arguments):
        def note(kernel, grid, device, *values, **options):
            names = "->".join(dict.fromkeys(str(d)[6:] for d in (dtype, compute)))
            launch = Launch(what, names, kernel, values, options, compute)
            signature, constants, _ = specialization(launch)
            seen.setdefault((kernel, str(signature), str(constants), str(options)), launch)

        with mock.patch.object(backend, "launch", note):
            function(*arguments)

    for dtype, compute in PRECISIONS[:1] if quick else PRECISIONS:
        seed = torch.tensor(0)
        for p in (0.9,):
            for out_features, in_features in (NARROW, WIDE):
                weight = torch.empty(out_features, in_features, dtype=dtype)
                for mask in ("input", "element"):
                    masked = (weight, weight, seed, p, mask)
                    record(f"mix, {mask}", dtype, compute, backend.mix, *masked, compute)
                    record(f"mask_grad, {mask}", dtype, compute, backend.mask_grad, weight, *masked[2:], 2.0, dtype)
                    for rows in (16, 32, 64):
                        x = torch.empty(rows, in_features, dtype=compute)
                        bias, forward, backward = weight[0], *backend.is_one_pass(compute, rows)
                        precisions = ("tf32", "ieee") if compute == torch.float32 else ("ieee",)
                        for precision in precisions:
                            with mock.patch.object(backend, "_precision", lambda precision=precision: precision):
                                if forward:
                                    record(f"y, {mask}", dtype, compute, backend.product, x, *masked[:2], bias, *masked[2:], False)
                                if backward:
                                    record(f"dX, {mask}", dtype, compute, backend.product, x, *masked[:2], None, *masked[2:], True)
                x = torch.empty(4096, in_features, dtype=compute)
                record("gather", dtype, compute, backend.gather, x, seed, p, True)
                record("mix, gather", dtype, compute, backend.mixed_and_gathered, weight, weight, x, seed, p)
                compact = torch.empty(backend.capacity(in_features, p), out_features, dtype=compute)
                index = torch.empty(len(compact), dtype=torch.int32)
                record("expand", dtype, compute, backend.expanded, compact, index, in_features, 2.0, dtype)
    return list(seen.values())


def specialization(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and divisibilities, as Triton derives them from the arguments at a launch."""
    signature, constants, attributes = {}, {}, {}
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments, strict=False)) | launch.options
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, values[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.annotation_type
        if parameter.is_constexpr or value is None or is_one:
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
        else:
            signature[name] = parameter.annotation_type or ("i32" if value < 2**31 else "i64")
        if isinstance(value, torch.Tensor) or value % 16 == 0:
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


if __name__ == "__main__":
    import time
    ls = launches("--quick" in sys.argv)
    print(len(ls))
    for l in ls:
        for name in (TARGETS if len(sys.argv) < 3 else sys.argv[2].split(",")):
            t=time.time()
            try:
                r = read(compile_for(l, TARGETS[name]), name)
                print(l.what, l.dtypes, l.config, name, r, f"{time.time()-t:.1f}", flush=True)
            except Exception as e:
                print(l.what, l.dtypes, l.config, name, "ERROR", type(e), str(e)[-600:], flush=True)
