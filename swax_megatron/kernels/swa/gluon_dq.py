"""dq of sliding-window attention for Hopper, in Gluon.

The same function as `triton_kernels.attention_dq`, whose legend holds here. Programs stay and walk over tiles of 128 rows, a row a
(time, head) pair of PACK heads that share a key/value head. One warp loads ahead of two warp groups that multiply, 64 rows each.

q_rows, do_rows, dq_rows, k_rows, v_rows: tensor descriptors of (B, T, heads, D) in blocks (1, 64 / PACK, PACK, D) and
(1, BN, 1, D); past the end they read zeros and write nothing.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .gluon_common import barriers, fetch, keys_of


@gluon.jit
def _load(
    q_rows, do_rows, k_rows, v_rows, start_ptr, q_tile, do_tile, k_tile, v_tile,
    q_full, q_free, do_full, do_free, k_full, k_free, v_full, v_free, T, H, R, B, window, tiles, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: q and do of each tile, then its blocks of keys and values, as room becomes free."""
    QUERIES: gl.constexpr = q_tile.shape[2]
    PACK: gl.constexpr = q_tile.shape[3]
    STAGES: gl.constexpr = k_tile.shape[0]
    BN: gl.constexpr = k_tile.shape[2]
    n = 0
    count = 0
    for tile in range(gl.program_id(0), B * (H // PACK) * tiles, gl.num_programs(0)):
        batch, h, t0, first, _, end = keys_of(tile, start_ptr, T, H, window, tiles, PACK, 2 * QUERIES, DOCUMENTS)
        for half in gl.static_range(2):
            i = count % 2 * 2 + half
            free = (count // 2 & 1) ^ 1
            mbarrier.wait(do_free.index(i), free)
            fetch(do_rows, batch, t0 + half * QUERIES, h, do_full.index(i), do_tile.index(i))
            mbarrier.wait(q_free.index(i), free)
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
def _multiply(
    half, dq_rows, o_ptr, start_ptr, lse_ptr, dot_ptr, q_tile, do_tile, k_tile, v_tile,
    q_full, q_free, do_full, do_free, k_full, k_free, v_full, v_free, T, H, B, window, tiles, scale, scale2, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """One warp group: dq and <do, o> of half of each tile's rows."""
    QUERIES: gl.constexpr = q_tile.shape[2]
    PACK: gl.constexpr = q_tile.shape[3]
    ROWS: gl.constexpr = QUERIES * PACK
    D: gl.constexpr = q_tile.shape[4]
    STAGES: gl.constexpr = k_tile.shape[0]
    BN: gl.constexpr = k_tile.shape[2]
    dtype: gl.constexpr = q_tile.dtype
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    q_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, q_mma, 2)
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row: gl.constexpr = gl.SliceLayout(1, s_mma)
    col: gl.constexpr = gl.SliceLayout(0, s_mma)
    lane = gl.arange(0, ROWS, layout=row)
    o_lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, flat))
    dd = gl.arange(0, D, layout=gl.SliceLayout(0, flat))
    none = gl.full([ROWS, BN], 0.0, gl.float32, s_mma)
    n = 0
    count = 0
    for tile in range(gl.program_id(0), B * (H // PACK) * tiles, gl.num_programs(0)):
        batch, h, tile0, first, all_from, end = keys_of(tile, start_ptr, T, H, window, tiles, PACK, 2 * QUERIES, DOCUMENTS)
        t0 = tile0 + half * QUERIES
        wide = batch.to(gl.int64)
        t_o = t0 + o_lane // PACK
        o_at = ((wide * T + t_o) * H + h + o_lane % PACK)[:, None] * D + dd[None, :]
        o = gl.load(o_ptr + o_at, mask=(t_o < T)[:, None], other=0.0)
        mine = count % 2 * 2 + half
        phase_q = count // 2 & 1
        q = q_tile.index(mine).reshape([ROWS, D])
        do = do_tile.index(mine).reshape([ROWS, D])
        t = t0 + lane // PACK
        at = (wide * H + h + lane % PACK) * T + t
        lse = gl.load(lse_ptr + at, mask=t < T, other=0.0)
        low = t - window + 1
        if DOCUMENTS:
            low = gl.maximum(low, gl.load(start_ptr + wide * T + t, mask=t < T, other=0))
        mbarrier.wait(do_full.index(mine), phase_q)
        dot = gl.convert_layout(gl.sum(do.load(flat).to(gl.float32) * o.to(gl.float32), 1), row)
        gl.store(dot_ptr + at, dot, mask=t < T)
        tma.store_wait(0)  # the last tile's dq has left the place of its queries
        mbarrier.arrive(q_free.index((count + 1) % 2 * 2 + half), pred=count > 0)
        mbarrier.wait(q_full.index(mine), phase_q)
        dq = gl.full([ROWS, D], 0.0, gl.float32, q_mma)
        for s0 in range(first, end, BN):
            i = n % STAGES
            phase = n // STAGES & 1
            n += 1
            k = k_tile.index(i).reshape([BN, D])
            mbarrier.wait(k_full.index(i), phase)
            scores = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(i), phase)
            dp = warpgroup_mma(do, v_tile.index(i).reshape([BN, D]).permute((1, 0)), none, use_acc=False, is_async=True)
            p = warpgroup_mma_wait(1, [scores])
            p = gl.exp2(p * scale2 - lse[:, None])
            if (s0 < all_from) | (s0 + BN - 1 > tile0):
                s = s0 + gl.arange(0, BN, layout=col)
                p = gl.where((s[None, :] <= t[:, None]) & (s[None, :] >= low[:, None]), p, 0.0)
            mbarrier.wait(v_full.index(i), phase)  # long complete; across this ptxas does not move the wait for dp before the exponentials
            dp = warpgroup_mma_wait(0, [dp])
            mbarrier.arrive(v_free.index(i))
            ds = gl.convert_layout((p * (dp - dot[:, None])).to(dtype), p_layout)
            dq = warpgroup_mma(ds, k, dq, is_async=True)
            dq = warpgroup_mma_wait(0, [dq])
            mbarrier.arrive(k_free.index(i))
        mbarrier.arrive(do_free.index(mine))
        q.store((dq * scale).to(dtype))  # nobody reads these queries again
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(dq_rows, [batch, t0, h, 0], q_tile.index(mine))
        count += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "H", "R", "B", "window", "tiles"])
def attention_dq(
    q_rows, do_rows, k_rows, v_rows, dq_rows, o_ptr, start_ptr, lse_ptr, dot_ptr, T, H, R, B, window, tiles, scale, scale2,
    STAGES: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """dq (B, T, H, D), and <do, o> of every query, which `attention_dkv` needs as well: (B, H, T). tiles: of queries in a row."""
    dtype: gl.constexpr = q_rows.dtype
    q_block: gl.constexpr = q_rows.block_type.shape
    k_block: gl.constexpr = k_rows.block_type.shape
    q_tile = gl.allocate_shared_memory(dtype, [4, 1, q_block[1], q_block[2], q_block[3]], q_rows.layout)
    do_tile = gl.allocate_shared_memory(dtype, [4, 1, q_block[1], q_block[2], q_block[3]], do_rows.layout)
    k_tile = gl.allocate_shared_memory(dtype, [STAGES, 1, k_block[1], 1, k_block[3]], k_rows.layout)
    v_tile = gl.allocate_shared_memory(dtype, [STAGES, 1, k_block[1], 1, k_block[3]], v_rows.layout)
    q_full, q_free = barriers(4, 1), barriers(4, 1)
    do_full, do_free = barriers(4, 1), barriers(4, 1)
    k_full, k_free = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_free = barriers(STAGES, 1), barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (_multiply, (
                0, dq_rows, o_ptr, start_ptr, lse_ptr, dot_ptr, q_tile, do_tile, k_tile, v_tile,
                q_full, q_free, do_full, do_free, k_full, k_free, v_full, v_free, T, H, B, window, tiles, scale, scale2, DOCUMENTS,
            )),
            (_multiply, (
                1, dq_rows, o_ptr, start_ptr, lse_ptr, dot_ptr, q_tile, do_tile, k_tile, v_tile,
                q_full, q_free, do_full, do_free, k_full, k_free, v_full, v_free, T, H, B, window, tiles, scale, scale2, DOCUMENTS,
            )),
            (_load, (
                q_rows, do_rows, k_rows, v_rows, start_ptr, q_tile, do_tile, k_tile, v_tile,
                q_full, q_free, do_full, do_free, k_full, k_free, v_full, v_free, T, H, R, B, window, tiles, DOCUMENTS,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
