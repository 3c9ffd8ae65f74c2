"""The Triton kernels: mask words, mixing, products in one pass, the dense weight gradient.

Every kernel draws its mask from (seed, index), so no mask is ever in memory. Compile the kernels with
enable_fp_fusion=False: w' = u + (w - u) · s rounds three times (reference.py), with a fused multiply-add only twice.
W and U share a dtype, x and X[:, kept] too; offsets are int64, strides may have any size, and sizes need not be
multiples of the blocks.

Names: weight W (N, K) or (N, K, R), target U of the same shape, rows x (M, K), C the capacity of an input mask.
"""

import triton
import triton.language as tl

# Triton's interpreter truncates fp32 to bf16, widens subnormal bf16 wrongly, and multiplies the bit patterns of bf16
# matrices as integers (triton 3.9, runtime/interpreter.py: _convert_float, create_dot). Compiled, none of this is used.
INTERPRETS = tl.constexpr(triton.knobs.runtime.interpret)

# Arguments that change between calls of a layer: p's threshold, the seed, and numbers of rows, parts and programs.
# A kernel specialised on them would be compiled again when an integer becomes 1, or an integer or address a multiple of
# 16, or ceases to be.
VARIABLE = (
    "threshold", "seed_ptr", "M", "weight_programs", "weight_blocks", "gathered_rows", "programs", "summed_rows",
    "part_rows",
)  # fmt: skip

# Mask entries that mask_end draws at once: 2 Philox calls per thread.
COUNTED = tl.constexpr(1024)


@triton.jit
def widen(value, dtype: tl.constexpr):
    """The value in fp32 or fp64, exactly."""
    if INTERPRETS and value.dtype == tl.bfloat16:
        value = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """The value rounded to `dtype`, to nearest even."""
    if INTERPRETS and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = tl.where(value != value, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def drawn_entries(seed, threshold, group, BLOCK: tl.constexpr):
    """Whether entries 4·group … 4·group + BLOCK - 1 are drawn as kept: (BLOCK,), or (A, BLOCK) for groups (A, 1)."""
    group = (group + tl.arange(0, BLOCK // 4)).to(tl.int64)
    low = group.to(tl.uint32)
    zero = tl.zeros_like(low)
    word0, word1, word2, word3 = tl.philox(seed, low, (group >> 32).to(tl.uint32), zero, zero)
    return tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3)).to(tl.int64) >= threshold


@triton.jit
def drawn_columns(seed, threshold, start, end, BLOCK: tl.constexpr):
    """Whether columns start … start + BLOCK - 1 are drawn as kept, (BLOCK,); false from `end` on. 4 divides start."""
    return drawn_entries(seed, threshold, start // 4, BLOCK) & (start + tl.arange(0, BLOCK) < end)


@triton.jit
def mask_end(seed, threshold, limit, C, BOUNDED: tl.constexpr):
    """The column from which on all are dropped: the (C+1)-th that is drawn as kept, or `limit` if that comes first.

    More than C are drawn as kept with a probability below 1e-8, so the usual pass only counts them. A block of columns
    passes its own end as `limit`: with many blocks that halves the draws.
    """
    end = limit
    if BOUNDED:
        counts = tl.zeros((COUNTED,), tl.int32)
        for start in range(0, limit, COUNTED):
            counts += drawn_columns(seed, threshold, start, limit, COUNTED).to(tl.int32)
        if tl.sum(counts) > C:
            kept = 0
            for start in range(0, limit, COUNTED):
                drawn = drawn_columns(seed, threshold, start, limit, COUNTED).to(tl.int32)
                past = (drawn > 0) & (kept + tl.cumsum(drawn) > C)
                end = tl.minimum(end, tl.min(tl.where(past, start + tl.arange(0, COUNTED), limit)))
                kept += tl.sum(drawn)
    return end


@triton.jit
def mixed_tile(
    weight_ptr, target_ptr, weight_offset, target_offset, inside, keep, scale,
    IS_GRADIENT: tl.constexpr, KEPT_ALONE: tl.constexpr,
):  # fmt: skip
    """u + (w - u) · s where kept, u itself where dropped; for a gradient g, g · s and 0. In scale's dtype.

    Offsets, inside and keep broadcast to the tile's shape. Entries not `inside` are 0. target_ptr None: u = 0.
    KEPT_ALONE: W's dropped entries, which are whole vectors of neighbours then, are not read.
    """
    read = inside & keep if KEPT_ALONE else inside
    weight = widen(tl.load(weight_ptr + weight_offset, mask=read, other=0), scale.dtype)
    if IS_GRADIENT:
        return tl.where(keep, weight * scale, 0.0)
    if target_ptr is None:
        target = tl.zeros_like(weight)
    else:
        target = widen(tl.load(target_ptr + target_offset, mask=inside, other=0), scale.dtype)
    # u + -0 is u for every u. The selection stands between product and sum so that nothing can fuse the two: Triton
    # 3.6's assembler (ptxas 12.9) does for sm_100, despite --fmad=false. A literal -0.0 is +0 in Triton 3.6.
    minus_zero = tl.full((), -(2**63), tl.int64).to(tl.float64, bitcast=True).to(scale.dtype)
    return target + tl.where(keep, (weight - target) * scale, minus_zero)


@triton.jit
def column_sums(
    program, matrix_ptr, sums_ptr, M, N, part_rows, stride_m, stride_n,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Column sums of matrix (M, N) over every part_rows rows: (parts, N), of which a program computes BLOCK_N.

    The order is fixed: BLOCK_M chains of part_rows / BLOCK_M entries, then the sum of the chains.
    """
    if matrix_ptr is not None:
        column_blocks = tl.cdiv(N, BLOCK_N)
        column = program % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        part = program // column_blocks
        # Transposed, so that the interpreter's tl.sum is no chain either: numpy sums neighbours in memory in 8 parts.
        sums = tl.zeros((BLOCK_N, BLOCK_M), COMPUTE)
        offset = column.to(tl.int64)[:, None] * stride_n + tl.arange(0, BLOCK_M).to(tl.int64)[None, :] * stride_m
        for row_start in range(part * part_rows, min((part + 1) * part_rows, M), BLOCK_M):
            row = row_start + tl.arange(0, BLOCK_M)
            pointer = matrix_ptr + tl.full((), row_start, tl.int64) * stride_m + offset
            sums += widen(tl.load(pointer, mask=(column < N)[:, None] & (row < M)[None, :], other=0), COMPUTE)
        sums = narrow(tl.sum(sums, 1), sums_ptr.dtype.element_ty)
        tl.store(sums_ptr + part.to(tl.int64) * N + column, sums, mask=column < N)


@triton.jit(do_not_specialize=VARIABLE)
def prologue_kernel(
    weight_ptr,  # (N, K, R), any strides
    target_ptr,  # the same, or None
    mixed_ptr,  # (N, K, R), any strides: written
    rows_ptr,  # (M, K), any strides
    columns_ptr,  # (M, C), contiguous: written
    index_ptr,  # (C,) int32: written
    seed_ptr,  # int64
    threshold: tl.int64, factor: tl.float64, N, K,
    R,  # None for matrices
    M, C, stride_wn, stride_wk, stride_wr, stride_un, stride_uk, stride_ur, stride_mn, stride_mk, stride_mr,
    stride_xm, stride_xk,
    weight_programs,
    weight_blocks,  # row blocks that a program mixes
    gathered_rows,  # rows of x that a program gathers
    programs,  # those that mix and gather; others sum
    summed_ptr,  # dY (M, N), any strides
    sums_ptr,  # (parts, N), contiguous: written
    summed_rows, summed_columns, part_rows, stride_sm, stride_sn,
    IS_GRADIENT: tl.constexpr, BOUNDED: tl.constexpr, KEPT_ALONE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # a tile of W'
    BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr,  # a tile of x
    SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Input mask. The first `weight_programs` programs write W', the next index and X[:, kept], the last column sums.

    Without weight_ptr no W' is written, without rows_ptr no index and columns, without summed_ptr no sums. The index is
    padded with -1, the columns with 0. With IS_GRADIENT weight_ptr is dW', and mixed_ptr m ⊙ dW' · s.
    """
    seed = tl.load(seed_ptr)
    program = tl.program_id(0)
    if program < weight_programs:
        if weight_ptr is not None:
            # Consecutive programs mix the same row blocks, and so share pages of memory.
            column_blocks = tl.cdiv(K, BLOCK_K)
            start = program % column_blocks * BLOCK_K
            first_block = program // column_blocks * weight_blocks
            scale = tl.full((), factor, COMPUTE)
            end = mask_end(seed, threshold, min(K, start + BLOCK_K), C, BOUNDED)
            keep = drawn_columns(seed, threshold, start, end, BLOCK_K)[None, :]
            column = (start + tl.arange(0, BLOCK_K))[None, :]
            k = column.to(tl.int64)
            rows = N if R is None else N * R
            for block in range(first_block, min(first_block + weight_blocks, tl.cdiv(rows, BLOCK_N))):
                row = (block * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
                if R is None:  # From row // 1 and row % 1 the compiler does not see which entries are neighbours.
                    n, r = row.to(tl.int64), tl.zeros((1, 1), tl.int64)
                else:
                    n, r = (row // R).to(tl.int64), (row % R).to(tl.int64)
                inside = (row < rows) & (column < K)
                weight_offset = n * stride_wn + r * stride_wr + k * stride_wk
                target_offset = n * stride_un + r * stride_ur + k * stride_uk
                mixed = mixed_tile(
                    weight_ptr, target_ptr, weight_offset, target_offset, inside, keep, scale, IS_GRADIENT, KEPT_ALONE
                )
                offset = n * stride_mn + r * stride_mr + k * stride_mk
                tl.store(mixed_ptr + offset, narrow(mixed, mixed_ptr.dtype.element_ty), mask=inside)
    elif program < programs:
        if rows_ptr is not None:
            gather_rows(
                rows_ptr, columns_ptr, index_ptr, seed, threshold, (program - weight_programs) * gathered_rows,
                gathered_rows, M, K, C, stride_xm, stride_xk, BLOCK_M, BLOCK_X,
            )  # fmt: skip
    else:
        column_sums(
            program - programs, summed_ptr, sums_ptr, summed_rows, summed_columns, part_rows, stride_sm, stride_sn,
            COMPUTE, SUM_ROWS, SUM_COLUMNS,
        )  # fmt: skip


@triton.jit
def gather_rows(
    rows_ptr, columns_ptr, index_ptr, seed, threshold, first_row, count, M, K, C, stride_xm, stride_xk,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the kept columns of `count` rows; the first program also writes the index.

    Rows are read whole and kept entries stored in their slots: even at p = 0.9, 81 % of the 32-byte sectors of a 16-bit
    row hold a kept entry.
    """
    last_row = min(first_row + count, M)
    kept = 0
    for start in range(0, K, BLOCK_K):
        drawn = drawn_columns(seed, threshold, start, K, BLOCK_K)
        # The hint lays threads along the columns, where kept neighbours have neighbouring slots. Without it Triton 3.6
        # lays threads along the rows: on sm_90 160 registers, not 80. Stores are not made vectors, since Triton knows
        # of no alignment of the slots.
        slot = tl.max_contiguous(kept + tl.cumsum(drawn.to(tl.int32)) - 1, 2)
        kept += tl.sum(drawn.to(tl.int32))
        keep = drawn & (slot < C)
        column = start + tl.arange(0, BLOCK_K)
        if first_row == 0:
            tl.store(index_ptr + slot, column, mask=keep)
        for row_start in range(first_row, last_row, BLOCK_M):
            row = (row_start + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
            offset = row * stride_xm + column.to(tl.int64)[None, :] * stride_xk
            entries = tl.load(rows_ptr + offset, mask=(row < last_row) & (column < K)[None, :])
            tl.store(columns_ptr + row * C + slot[None, :], entries, mask=(row < last_row) & keep[None, :])
    for start in range(min(kept, C), C, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        if first_row == 0:
            tl.store(index_ptr + slot, -1, mask=slot < C)
        for row_start in range(first_row, last_row, BLOCK_M):
            row = (row_start + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
            tl.store(columns_ptr + row * C + slot[None, :], 0.0, mask=(row < last_row) & (slot < C)[None, :])


@triton.jit(do_not_specialize=VARIABLE)
def element_kernel(
    weight_ptr,  # (N, K), any strides
    target_ptr,  # the same, or None
    mixed_ptr,  # (N, K), contiguous: written
    seed_ptr,  # int64
    threshold: tl.int64, factor: tl.float64,
    entries: tl.int64,  # N · K
    K, stride_wn, stride_wk, stride_un, stride_uk,
    programs,  # those that mix; others sum
    summed_ptr,  # dY (M, N), or the sums of its parts (parts, N), any strides
    sums_ptr,  # (parts, N), or (N,), contiguous: written
    summed_rows, summed_columns, part_rows, stride_sm, stride_sn,
    IS_GRADIENT: tl.constexpr, CONTIGUOUS: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Element mask: W', or with IS_GRADIENT m ⊙ dW' · s.

    Entries are taken in row-major order, 4 per Philox call, whatever K is.
    """
    seed = tl.load(seed_ptr)
    program = tl.program_id(0)
    if program < programs:
        scale = tl.full((), factor, COMPUTE)
        start = program.to(tl.int64) * BLOCK
        keep = drawn_entries(seed, threshold, start // 4, BLOCK)
        entry = start + tl.arange(0, BLOCK)
        inside = entry < entries
        if CONTIGUOUS:
            weight_offset, target_offset = entry, entry
        else:
            n, k = entry // K, entry % K
            weight_offset, target_offset = n * stride_wn + k * stride_wk, n * stride_un + k * stride_uk
        mixed = mixed_tile(
            weight_ptr, target_ptr, weight_offset, target_offset, inside, keep, scale, IS_GRADIENT, False
        )
        tl.store(mixed_ptr + entry, narrow(mixed, mixed_ptr.dtype.element_ty), mask=inside)
    else:
        column_sums(
            program - programs, summed_ptr, sums_ptr, summed_rows, summed_columns, part_rows, stride_sm, stride_sn,
            COMPUTE, SUM_ROWS, SUM_COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARIABLE)
def one_pass_kernel(
    rows_ptr,  # x (M, K), or dY (M, N), any strides
    weight_ptr,  # (N, K), any strides
    target_ptr,  # the same, or None
    bias_ptr,  # (N,), or None
    output_ptr,  # y (M, N), or dX (M, K), contiguous: written
    seed_ptr,  # int64
    threshold: tl.int64, factor: tl.float64, M, N, K, C,
    stride_xm, stride_xr, stride_wn, stride_wk, stride_un, stride_uk, stride_b,
    TRANSPOSED: tl.constexpr, ELEMENT: tl.constexpr, BOUNDED: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x W'ᵀ + b, or with TRANSPOSED dY W', without W' in memory: a program computes BLOCK_F features of BLOCK_M rows.

    The product is computed transposed, out[f, m] = Σ_r W'[f, r] x[m, r]: W' is the left operand, which tensor cores
    take from the registers where it was mixed, and the few rows are the narrow side.
    """
    seed = tl.load(seed_ptr)
    scale = tl.full((), factor, COMPUTE)
    features, reduced_size = (K, N) if TRANSPOSED else (N, K)
    feature_start = tl.program_id(0) * BLOCK_F
    # Before anything else is live: later, dX in fp32 spills on sm_80.
    if not ELEMENT:
        end = mask_end(seed, threshold, min(K, feature_start + BLOCK_F) if TRANSPOSED else K, C, BOUNDED)
        if TRANSPOSED:
            keep = drawn_columns(seed, threshold, feature_start, end, BLOCK_F)[None, :]
    feature = feature_start + tl.arange(0, BLOCK_F)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_offset = row.to(tl.int64)[None, :] * stride_xm

    # Without tensor cores a product is a chain of multiply-adds, whose error grows with its length: for 1023 entries at
    # 3 rows it is 5 times that of MKL's sum. So each half of a step is summed from zero, and first and second halves
    # are added up apart: 1.02 times (1.13 with whole steps and one sum). A piece is added in the step after its own:
    # added at once, the compiler would make it one chain again.
    IN_PIECES: tl.constexpr = PRECISION == "ieee" and rows_ptr.dtype.element_ty.primitive_bitwidth >= 32
    zeros = tl.zeros((2, BLOCK_F, BLOCK_M) if IN_PIECES else (BLOCK_F, BLOCK_M), COMPUTE)
    sums, piece = zeros, zeros
    for start in range(0, reduced_size, BLOCK_R):
        reduced = start + tl.arange(0, BLOCK_R)
        inside = (row < M)[None, :] & (reduced < reduced_size)[:, None]
        x = tl.load(rows_ptr + row_offset + reduced.to(tl.int64)[:, None] * stride_xr, mask=inside, other=0)
        n, k = (reduced, feature) if TRANSPOSED else (feature, reduced)
        if ELEMENT:
            group = (n.to(tl.int64) * (K // 4))[:, None] + (feature_start if TRANSPOSED else start) // 4
            keep = drawn_entries(seed, threshold, group, BLOCK_F if TRANSPOSED else BLOCK_R)
        elif not TRANSPOSED:
            keep = drawn_columns(seed, threshold, start, end, BLOCK_R)[None, :]
        inside = (n < N)[:, None] & (k < K)[None, :]
        n, k = n.to(tl.int64)[:, None], k.to(tl.int64)[None, :]
        weight_offset, target_offset = n * stride_wn + k * stride_wk, n * stride_un + k * stride_uk
        mixed = mixed_tile(weight_ptr, target_ptr, weight_offset, target_offset, inside, keep, scale, False, False)
        mixed = narrow(mixed, x.dtype)
        if TRANSPOSED:
            mixed = tl.trans(mixed)
        if INTERPRETS:
            mixed, x = widen(mixed, COMPUTE), widen(x, COMPUTE)
        if IN_PIECES:
            sums += piece
            halves = tl.permute(mixed.reshape(BLOCK_F, 2, BLOCK_R // 2), (1, 0, 2))
            x = x.reshape(2, BLOCK_R // 2, BLOCK_M)
            piece = tl.dot(halves, x, zeros, input_precision=PRECISION, out_dtype=COMPUTE)
        else:
            sums = tl.dot(mixed, x, sums, input_precision=PRECISION, out_dtype=COMPUTE)
    if IN_PIECES:
        sums = tl.sum(sums + piece, 0)

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + feature.to(tl.int64) * stride_b, mask=feature < features, other=0)
        sums += widen(bias, COMPUTE)[:, None]
    inside = (row < M)[None, :] & (feature < features)[:, None]
    offset = row.to(tl.int64)[None, :] * features + feature[:, None]
    tl.store(output_ptr + offset, narrow(sums, output_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARIABLE)
def expand_kernel(
    compact_ptr,  # (C, N), any strides
    index_ptr,  # (C,) int32, ascending, then -1
    dense_ptr,  # (N, K), any strides: written
    factor: tl.float64, N, K, C, stride_cc, stride_cn, stride_dn, stride_dk,
    row_count,  # rows of dW that a program writes
    programs,  # those that write dW; others sum
    summed_ptr,  # sums of parts of dY (parts, N), or None
    sums_ptr,  # db (N,): written
    summed_rows, summed_columns, part_rows, stride_sm, stride_sn,
    STEPS: tl.constexpr,  # bits of K, no fewer than C's: with C's, a change of p would compile anew
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dW[:, index] = compactᵀ · s, 0 elsewhere. Each entry is written once."""
    program = tl.program_id(0)
    if program < programs:
        scale = tl.full((), factor, COMPUTE)
        column_blocks = tl.cdiv(K, BLOCK_K)
        column = program % column_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        # Binary search: slot is the number of indices below the column.
        slot = tl.zeros((BLOCK_K,), tl.int32)
        for step in tl.static_range(STEPS):
            candidate = slot + (1 << (STEPS - 1 - step))
            entry = tl.load(index_ptr + candidate - 1, mask=candidate <= C, other=-1)
            slot = tl.where((entry >= 0) & (entry < column), candidate, slot)
        kept = tl.load(index_ptr + slot, mask=slot < C, other=-1) == column
        first_row = program // column_blocks * row_count
        for row_start in range(first_row, min(first_row + row_count, N), BLOCK_N):
            row = row_start + tl.arange(0, BLOCK_N)
            offset = slot.to(tl.int64)[:, None] * stride_cc + row.to(tl.int64)[None, :] * stride_cn
            compact = tl.load(compact_ptr + offset, mask=kept[:, None] & (row < N)[None, :], other=0)
            scaled = narrow(widen(compact, COMPUTE) * scale, dense_ptr.dtype.element_ty)
            offset = column.to(tl.int64)[:, None] * stride_dk + row.to(tl.int64)[None, :] * stride_dn
            tl.store(dense_ptr + offset, scaled, mask=(column < K)[:, None] & (row < N)[None, :])
    else:
        column_sums(
            program - programs, summed_ptr, sums_ptr, summed_rows, summed_columns, part_rows, stride_sm, stride_sn,
            COMPUTE, SUM_ROWS, SUM_COLUMNS,
        )  # fmt: skip
