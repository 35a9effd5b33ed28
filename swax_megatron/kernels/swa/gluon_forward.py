"""The forward pass of sliding-window attention for Hopper, in Gluon (Triton's language with explicit layouts and barriers).

The same function as `triton_kernels.attention_forward`, whose legend holds here. Programs stay and walk over tiles of queries. In each, a
loading warp copies tiles to shared memory (tensor memory accelerator) ahead of two warp groups that multiply, 64 rows each; barriers
in shared memory say which tiles are full and which are free. The softmax of one block runs beside the products of its neighbours
(Shah et al. 2024, "FlashAttention-3"). Rows of a tile are (time, head) pairs, PACK heads that share a key/value head.

q_rows, o_rows, k_rows, v_rows: tensor descriptors of (B, T, heads, D) in blocks (1, 64 / PACK, PACK, D) and (1, BN, 1, D); past the end
they read zeros and write nothing.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .gluon_common import barriers, fetch, keys_of


@gluon.jit
def _load(
    q_rows, k_rows, v_rows, start_ptr, q_tile, k_tile, v_tile, q_full, q_free, k_full, k_free, v_full, v_free,
    T, H, R, B, window, tiles, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: each tile's queries, then its blocks of keys and values, as room becomes free."""
    PACK: gl.constexpr = q_tile.shape[3]
    QUERIES: gl.constexpr = q_tile.shape[2]
    STAGES: gl.constexpr = k_tile.shape[0]
    BN: gl.constexpr = k_tile.shape[2]
    n = 0
    count = 0
    for tile in range(gl.program_id(0), B * (H // PACK) * tiles, gl.num_programs(0)):
        batch, h, t0, first, _, end = keys_of(tile, start_ptr, T, H, window, tiles, PACK, 2 * QUERIES, DOCUMENTS)
        for half in gl.static_range(2):
            i = count % 2 * 2 + half
            mbarrier.wait(q_free.index(i), (count // 2 & 1) ^ 1)
            fetch(q_rows, batch, t0 + half * QUERIES, h, q_full.index(i), q_tile.index(i))
        count += 1
        for s0 in range(first, end, BN):
            i = n % STAGES
            free = (n // STAGES & 1) ^ 1
            mbarrier.wait(k_free.index(i), free)
            fetch(k_rows, batch, s0, h // R, k_full.index(i), k_tile.index(i))
            mbarrier.wait(v_free.index(i), free)
            fetch(v_rows, batch, s0, h // R, v_full.index(i), v_tile.index(i))
            n += 1


@gluon.jit
def _softmax(scores, m, total, s0, t, low, t0, all_from, scale2, col: gl.constexpr, BN: gl.constexpr):
    """One block of the online softmax: exp2 of the scores, the new maximum and sum, and the factor of what came before.

    A query at t sees the keys low ... t; block s0 needs a mask unless every query of the tile sees all of it.
    """
    if (s0 < all_from) | (s0 + BN - 1 > t0):
        s = s0 + gl.arange(0, BN, layout=col)
        scores = gl.where((s[None, :] <= t[:, None]) & (s[None, :] >= low[:, None]), scores, -1e30)
    m_new = gl.maximum(m, gl.max(scores, 1) * scale2)
    p = gl.exp2(scores * scale2 - m_new[:, None])
    keep = gl.exp2(m - m_new)
    return p, m_new, total * keep + gl.sum(p, 1), keep


@gluon.jit
def _multiply(
    half, o_rows, start_ptr, lse_ptr, q_tile, k_tile, v_tile, q_full, q_free, k_full, k_free, v_full, v_free,
    T, H, B, window, tiles, scale2, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """One warp group: o and its base-2 log-sum-exp for half of each tile's rows."""
    QUERIES: gl.constexpr = q_tile.shape[2]
    PACK: gl.constexpr = q_tile.shape[3]
    ROWS: gl.constexpr = QUERIES * PACK
    D: gl.constexpr = q_tile.shape[4]
    STAGES: gl.constexpr = k_tile.shape[0]
    BN: gl.constexpr = k_tile.shape[2]
    dtype: gl.constexpr = q_tile.dtype
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_mma, 2)
    row: gl.constexpr = gl.SliceLayout(1, s_mma)
    o_row: gl.constexpr = gl.SliceLayout(1, o_mma)
    col: gl.constexpr = gl.SliceLayout(0, s_mma)
    lane = gl.arange(0, ROWS, layout=row)
    none = gl.full([ROWS, BN], 0.0, gl.float32, s_mma)
    n = 0
    count = 0
    for tile in range(gl.program_id(0), B * (H // PACK) * tiles, gl.num_programs(0)):
        batch, h, t0, first, all_from, end = keys_of(tile, start_ptr, T, H, window, tiles, PACK, 2 * QUERIES, DOCUMENTS)
        mine = count % 2 * 2 + half
        q = q_tile.index(mine).reshape([ROWS, D])
        wide = batch.to(gl.int64)
        t = t0 + half * QUERIES + lane // PACK
        low = t - window + 1
        if DOCUMENTS:
            low = gl.maximum(low, gl.load(start_ptr + wide * T + t, mask=t < T, other=0))
        m = gl.full([ROWS], -1e20, gl.float32, row)  # above the masked scores, so that a block a query does not see adds nothing
        total = gl.full([ROWS], 0.0, gl.float32, row)
        acc = gl.full([ROWS, D], 0.0, gl.float32, o_mma)
        i = n % STAGES
        phase = n // STAGES & 1
        mbarrier.wait(q_full.index(mine), count // 2 & 1)
        mbarrier.wait(k_full.index(i), phase)
        scores = warpgroup_mma(q, k_tile.index(i).reshape([BN, D]).permute((1, 0)), none, use_acc=False, is_async=True)
        tma.store_wait(0)  # the last tile's o has left the place of its queries
        mbarrier.arrive(q_free.index((count + 1) % 2 * 2 + half), pred=count > 0)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_free.index(i))
        p, m, total, keep = _softmax(scores, m, total, first, t, low, t0, all_from, scale2, col, BN)
        p16 = gl.convert_layout(p.to(dtype), p_layout)
        for s0 in range(first + BN, end, BN):  # the scores of this block beside the values of the one before
            n += 1
            j = n % STAGES
            mbarrier.wait(k_full.index(j), n // STAGES & 1)
            scores = warpgroup_mma(q, k_tile.index(j).reshape([BN, D]).permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(i), phase)
            acc = warpgroup_mma(p16, v_tile.index(i).reshape([BN, D]), acc, is_async=True)
            scores = warpgroup_mma_wait(1, [scores])
            mbarrier.arrive(k_free.index(j))
            p, m, total, keep = _softmax(scores, m, total, s0, t, low, t0, all_from, scale2, col, BN)
            p16 = gl.convert_layout(p.to(dtype), p_layout)
            mbarrier.wait(v_full.index(i), phase)  # long complete; across this ptxas does not move the wait for acc before the softmax
            acc, p16 = warpgroup_mma_wait(0, [acc, p16])
            mbarrier.arrive(v_free.index(i))
            acc = acc * gl.convert_layout(keep, o_row)[:, None]
            i = j
            phase = n // STAGES & 1
        mbarrier.wait(v_full.index(i), phase)
        acc = warpgroup_mma(p16, v_tile.index(i).reshape([BN, D]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(v_free.index(i))
        q.store((acc / gl.convert_layout(total, o_row)[:, None]).to(dtype))  # nobody reads these queries again
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(o_rows, [batch, t0 + half * QUERIES, h, 0], q_tile.index(mine))
        gl.store(lse_ptr + (wide * H + h + lane % PACK) * T + t, m + gl.log2(total), mask=t < T)
        n += 1
        count += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "H", "R", "B", "window", "tiles"])
def attention_forward(
    q_rows, k_rows, v_rows, o_rows, start_ptr, lse_ptr, T, H, R, B, window, tiles, scale2, STAGES: gl.constexpr, DOCUMENTS: gl.constexpr
):  # fmt: skip
    """o (B, T, H, D), and the base-2 logarithm of the softmax sums (B, H, T). tiles: of queries in a row."""
    dtype: gl.constexpr = q_rows.dtype
    q_block: gl.constexpr = q_rows.block_type.shape
    k_block: gl.constexpr = k_rows.block_type.shape
    q_tile = gl.allocate_shared_memory(dtype, [4, 1, q_block[1], q_block[2], q_block[3]], q_rows.layout)
    k_tile = gl.allocate_shared_memory(dtype, [STAGES, 1, k_block[1], 1, k_block[3]], k_rows.layout)
    v_tile = gl.allocate_shared_memory(dtype, [STAGES, 1, k_block[1], 1, k_block[3]], v_rows.layout)
    q_full, q_free = barriers(4, 1), barriers(4, 1)
    k_full, k_free = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_free = barriers(STAGES, 1), barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (_multiply, (
                0, o_rows, start_ptr, lse_ptr, q_tile, k_tile, v_tile, q_full, q_free, k_full, k_free, v_full, v_free,
                T, H, B, window, tiles, scale2, DOCUMENTS,
            )),
            (_multiply, (
                1, o_rows, start_ptr, lse_ptr, q_tile, k_tile, v_tile, q_full, q_free, k_full, k_free, v_full, v_free,
                T, H, B, window, tiles, scale2, DOCUMENTS,
            )),
            (_load, (
                q_rows, k_rows, v_rows, start_ptr, q_tile, k_tile, v_tile, q_full, q_free, k_full, k_free, v_full, v_free,
                T, H, R, B, window, tiles, DOCUMENTS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
