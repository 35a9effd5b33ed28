"""The backward pass of sliding-window attention for Hopper in one pass over the pairs, in Gluon: five products a block instead of seven.

dk and dv gather over the queries, as in `triton_kernels.attention_dkv`, whose legend holds here; each block's share of dq is added to a
float32 buffer in memory, in whatever order programs arrive: the last bits of dq differ from run to run. Pays for wide windows;
the two passes of `triton_kernels.py` stay the deterministic way. A loading warp copies queries ahead of two warp groups that multiply.

q_rows, do_rows, k_rows, v_rows, dk_rows, dv_rows: tensor descriptors of (B, T, heads, D) in blocks (1, BM, 1, D) of queries and
(1, BN, 1, D) of keys; past the end they read zeros and write nothing. sum_rows: of the sums (B*H*TP, D) in blocks (BM, D).
"""

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .gluon_common import barriers, fetch


@triton.jit(do_not_specialize=["T", "TP", "H"])
def row_dots(do_ptr, o_ptr, dot_ptr, sum_ptr, T, TP, H, stride_gb, stride_gt, stride_gh, D: tl.constexpr, BM: tl.constexpr):
    """<do, o> of every query (B, H, T), and zeros where dq will be summed (B, H, TP, D), TP a multiple of BM."""
    t, h, batch = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dd = tl.arange(0, D)
    real = t < T
    row = t.to(tl.int64)
    do = tl.load(do_ptr + batch * stride_gb + h * stride_gh + row[:, None] * stride_gt + dd[None, :], mask=real[:, None], other=0.0)
    o = tl.load(o_ptr + ((batch * T + row) * H + h)[:, None] * D + dd[None, :], mask=real[:, None], other=0.0)
    tl.store(dot_ptr + (batch * H + h) * T + t, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1), mask=real)
    tl.store(sum_ptr + ((batch * H + h) * TP + row)[:, None] * D + dd[None, :], tl.zeros([BM, D], tl.float32))


@triton.jit(do_not_specialize=["T", "TP", "H"])
def finish_dq(sum_ptr, dq_ptr, T, TP, H, scale, D: tl.constexpr, BM: tl.constexpr):
    """dq (B, T, H, D) from its float32 sums."""
    t, h, batch = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dd = tl.arange(0, D)
    row = t.to(tl.int64)
    dq = tl.load(sum_ptr + ((batch * H + h) * TP + row)[:, None] * D + dd[None, :])
    at = ((batch * T + row) * H + h)[:, None] * D + dd[None, :]
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=(t < T)[:, None])


@builtin
def _add_to_global(rows, coord, tile, _semantic=None):
    """Begin to add `tile` to the block of `rows` at `coord` in memory (the language has the instruction, but no name for it)."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, rows.handle, coord, tile.handle)


@gluon.jit
def _queries(end_ptr, T, G, window, BM: gl.constexpr, BN: gl.constexpr, DOCUMENTS: gl.constexpr):
    """This program's batch row, key head and first key; its first query, how many blocks of them, and the end of those seeing all keys."""
    g = gl.program_id(0) % G
    s0 = gl.program_id(0) // G * BN
    batch = gl.program_id(1).to(gl.int64)
    end = gl.minimum(s0 + BN - 1 + window, T)
    all_end = gl.minimum(s0 + window, T)
    if DOCUMENTS:
        row = end_ptr + batch * T
        end = gl.minimum(end, gl.load(row + gl.minimum(s0 + BN, T) - 1))
        all_end = gl.minimum(all_end, gl.load(row + s0))
    begin = s0 // BM * BM
    return batch, g, s0, begin, (end - begin + BM - 1) // BM, all_end


@gluon.jit
def _load(
    q_rows, do_rows, k_rows, v_rows, end_ptr, lse_ptr, dot_ptr, q_tile, do_tile, k_tile, v_tile, lse_tile, dot_tile,
    kv_full, q_full, do_full, row_full, free, T, H, R, G, window, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: keys and values once, then every block of queries of the R heads."""
    STAGES: gl.constexpr = q_tile.shape[0]
    BM: gl.constexpr = q_tile.shape[2]
    BN: gl.constexpr = k_tile.shape[1]
    batch, g, s0, begin, blocks, _ = _queries(end_ptr, T, G, window, BM, BN, DOCUMENTS)
    row = batch.to(gl.int32)
    fetch(k_rows, row, s0, g, kv_full.index(0), k_tile)
    fetch(v_rows, row, s0, g, kv_full.index(1), v_tile)
    lane = gl.arange(0, BM, layout=gl.BlockedLayout([BM // 32], [32], [1], [0]))
    for step in range(0, R * blocks):
        h = g * R + step // blocks
        t0 = begin + step % blocks * BM
        i = step % STAGES
        mbarrier.wait(free.index(i), (step // STAGES & 1) ^ 1)
        fetch(q_rows, row, t0, h, q_full.index(i), q_tile.index(i))
        fetch(do_rows, row, t0, h, do_full.index(i), do_tile.index(i))
        at = (batch * H + h) * T + t0 + lane
        real = t0 + lane < T
        lse_tile.index(i).store(gl.load(lse_ptr + at, mask=real, other=0.0))
        dot_tile.index(i).store(gl.load(dot_ptr + at, mask=real, other=0.0))
        mbarrier.arrive(row_full.index(i))


@gluon.jit
def _multiply(
    sum_rows, dk_rows, dv_rows, end_ptr, q_tile, do_tile, k_tile, v_tile, lse_tile, dot_tile, ds_tile, dq_tile,
    kv_full, q_full, do_full, row_full, free, T, TP, H, R, G, window, scale, scale2, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """Both warp groups: dk and dv of BN keys, and those keys' share of dq (without the scale)."""
    STAGES: gl.constexpr = q_tile.shape[0]
    BM: gl.constexpr = q_tile.shape[2]
    BN: gl.constexpr = k_tile.shape[1]
    D: gl.constexpr = k_tile.shape[3]
    dtype: gl.constexpr = k_tile.dtype
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BM, 16])  # of scores, (key, query)
    k_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])  # of dk and dv
    q_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])  # of dq
    p_layout: gl.constexpr = gl.DotOperandLayout(0, k_mma, 2)
    col: gl.constexpr = gl.SliceLayout(0, s_mma)
    batch, g, s0, begin, blocks, all_end = _queries(end_ptr, T, G, window, BM, BN, DOCUMENTS)
    s = s0 + gl.arange(0, BN, layout=gl.SliceLayout(1, s_mma))
    s_end = gl.minimum(s + window, T)  # queries from s up to here see the key
    if DOCUMENTS:
        s_end = gl.minimum(s_end, gl.load(end_ptr + batch * T + s, mask=s < T, other=0))
    lane = gl.arange(0, BM, layout=col)
    k = k_tile.reshape([BN, D])
    v = v_tile.reshape([BN, D])
    none = gl.full([BN, BM], 0.0, gl.float32, s_mma)
    no_dq = gl.full([BM, D], 0.0, gl.float32, q_mma)
    dk = gl.full([BN, D], 0.0, gl.float32, k_mma)
    dv = gl.full([BN, D], 0.0, gl.float32, k_mma)
    mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(kv_full.index(1), 0)
    for step in range(0, R * blocks):
        t0 = begin + step % blocks * BM
        i = step % STAGES
        phase = step // STAGES & 1
        q = q_tile.index(i).reshape([BM, D])
        do = do_tile.index(i).reshape([BM, D])
        mbarrier.wait(q_full.index(i), phase)
        scores = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(row_full.index(i), phase)
        lse = lse_tile.index(i).load(col)
        mbarrier.wait(do_full.index(i), phase)
        dp = warpgroup_mma(v, do.permute((1, 0)), none, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        p = gl.exp2(scores * scale2 - lse[None, :])
        if (t0 < s0 + BN - 1) | (t0 + BM > all_end):
            t = t0 + lane
            p = gl.where((t[None, :] >= s[:, None]) & (t[None, :] < s_end[:, None]), p, 0.0)
        dv = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), do, dv, is_async=True)
        dot = dot_tile.index(i).load(col)
        mbarrier.wait(do_full.index(i), phase)  # long complete; across this ptxas does not move the wait for dp before the exponentials
        dp = warpgroup_mma_wait(1, [dp])
        ds = (p * (dp - dot[None, :])).to(dtype)
        ds_tile.store(ds)
        fence_async_shared()
        tma.store_wait(0)  # the last step's dq has left its tile
        gl.thread_barrier()
        dq = warpgroup_mma(ds_tile.permute((1, 0)), k, no_dq, use_acc=False, is_async=True)
        dk = warpgroup_mma(gl.convert_layout(ds, p_layout), q, dk, is_async=True)
        dq, dv = warpgroup_mma_wait(1, [dq, dv])
        dq_tile.store(dq)
        fence_async_shared()
        gl.thread_barrier()
        row = ((batch * H + g * R + step // blocks) * TP).to(gl.int32) + t0
        _add_to_global(sum_rows, [row, 0], dq_tile)
        dk = warpgroup_mma_wait(0, [dk])
        mbarrier.arrive(free.index(i))
    k.store((dk * scale).to(dtype))  # nobody reads these keys and values again
    v.store(dv.to(dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(dk_rows, [batch.to(gl.int32), s0, g, 0], k_tile)
    tma.async_copy_shared_to_global(dv_rows, [batch.to(gl.int32), s0, g, 0], v_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "TP", "H", "R", "G", "window"])
def attention_gradients(
    q_rows, do_rows, k_rows, v_rows, dk_rows, dv_rows, sum_rows, end_ptr, lse_ptr, dot_ptr,
    T, TP, H, R, G, window, scale, scale2, STAGES: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """dk and dv for BN keys of one key/value head, over all query heads that share it, and their share of those heads' dq."""
    dtype: gl.constexpr = q_rows.dtype
    BM: gl.constexpr = q_rows.block_type.shape[1]
    BN: gl.constexpr = k_rows.block_type.shape[1]
    D: gl.constexpr = q_rows.block_type.shape[3]
    q_tile = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, 1, D], q_rows.layout)
    do_tile = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, 1, D], do_rows.layout)
    k_tile = gl.allocate_shared_memory(dtype, [1, BN, 1, D], k_rows.layout)
    v_tile = gl.allocate_shared_memory(dtype, [1, BN, 1, D], v_rows.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_tile = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    dot_tile = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    ds_tile = gl.allocate_shared_memory(dtype, [BN, BM], gl.NVMMASharedLayout.get_default_for([BN, BM], dtype))
    dq_tile = gl.allocate_shared_memory(gl.float32, [BM, D], sum_rows.layout)
    kv_full, q_full, do_full = barriers(2, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    row_full, free = barriers(STAGES, 1), barriers(STAGES, 1)
    gl.warp_specialize(
        [
            (_multiply, (
                sum_rows, dk_rows, dv_rows, end_ptr, q_tile, do_tile, k_tile, v_tile, lse_tile, dot_tile, ds_tile, dq_tile,
                kv_full, q_full, do_full, row_full, free, T, TP, H, R, G, window, scale, scale2, DOCUMENTS,
            )),
            (_load, (
                q_rows, do_rows, k_rows, v_rows, end_ptr, lse_ptr, dot_ptr, q_tile, do_tile, k_tile, v_tile, lse_tile, dot_tile,
                kv_full, q_full, do_full, row_full, free, T, H, R, G, window, DOCUMENTS,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip
