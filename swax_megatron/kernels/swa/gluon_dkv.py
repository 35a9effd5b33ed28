"""dk and dv of sliding-window attention for Hopper, in Gluon, without atomics.

The same function as `triton_kernels.attention_dkv`, whose legend holds here. Programs stay and walk over tiles of BN keys of a key/value
head; one warp loads ahead of two warp groups that multiply, BN / 2 keys each.

q_rows, do_rows, k_rows, v_rows, dk_rows, dv_rows: tensor descriptors of (B, T, heads, D) in blocks (1, BM, 1, D), (1, BN, 1, D) and
(1, BN / 2, 1, D); past the end they read zeros and write nothing.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .gluon_common import barriers, fetch


@gluon.jit
def _queries(tile, end_ptr, T, G, window, tiles, BM: gl.constexpr, BN: gl.constexpr, DOCUMENTS: gl.constexpr):
    """Batch row, key head and first key of a tile; its first block of queries and how many."""
    g = tile % G
    rest = tile // G
    s0 = rest % tiles * BN
    batch = rest // tiles
    end = gl.minimum(s0 + BN - 1 + window, T)
    if DOCUMENTS:
        end = gl.minimum(end, gl.load(end_ptr + batch.to(gl.int64) * T + gl.minimum(s0 + BN, T) - 1))
    begin = s0 // BM * BM
    return batch, g, s0, begin, (end - begin + BM - 1) // BM


@gluon.jit
def _load(
    q_rows, do_rows, k_rows, v_rows, end_ptr, lse_ptr, dot_ptr, q_tile, do_tile, k_tile, v_tile, lse_tile, dot_tile,
    k_full, k_free, q_full, do_full, row_full, free, T, H, R, G, B, window, tiles, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: each tile's keys and values, then every block of queries of the R heads, as room becomes free."""
    STAGES: gl.constexpr = q_tile.shape[0]
    BM: gl.constexpr = q_tile.shape[2]
    HALF: gl.constexpr = k_tile.shape[2]
    lane = gl.arange(0, BM, layout=gl.BlockedLayout([BM // 32], [32], [1], [0]))
    n = 0
    count = 0
    for tile in range(gl.program_id(0), B * G * tiles, gl.num_programs(0)):
        batch, g, s0, begin, blocks = _queries(tile, end_ptr, T, G, window, tiles, BM, 2 * HALF, DOCUMENTS)
        for half in gl.static_range(2):
            mbarrier.wait(k_free.index(half), (count & 1) ^ 1)
            mbarrier.expect(k_full.index(half), 2 * k_rows.block_type.nbytes)
            tma.async_copy_global_to_shared(k_rows, [batch, s0 + half * HALF, g, 0], k_full.index(half), k_tile.index(half))
            tma.async_copy_global_to_shared(v_rows, [batch, s0 + half * HALF, g, 0], k_full.index(half), v_tile.index(half))
        count += 1
        row = (batch.to(gl.int64) * H + g * R) * T
        lse = gl.load(lse_ptr + row + begin + lane, mask=begin + lane < T, other=0.0)
        dot = gl.load(dot_ptr + row + begin + lane, mask=begin + lane < T, other=0.0)
        t0 = begin
        h = g * R
        for step in range(0, R * blocks):
            i = n % STAGES
            mbarrier.wait(free.index(i), (n // STAGES & 1) ^ 1)
            fetch(q_rows, batch, t0, h, q_full.index(i), q_tile.index(i))
            fetch(do_rows, batch, t0, h, do_full.index(i), do_tile.index(i))
            lse_tile.index(i).store(lse)
            dot_tile.index(i).store(dot)
            mbarrier.arrive(row_full.index(i))
            n += 1
            h = g * R + (step + 1) // blocks  # begin to read the next block's rows; after the last one nothing
            t0 = begin + (step + 1) % blocks * BM
            row = (batch.to(gl.int64) * H + h) * T
            there = (t0 + lane < T) & (step + 1 < R * blocks)
            lse = gl.load(lse_ptr + row + t0 + lane, mask=there, other=0.0)
            dot = gl.load(dot_ptr + row + t0 + lane, mask=there, other=0.0)


@gluon.jit
def _multiply(
    half, dk_rows, dv_rows, end_ptr, q_tile, do_tile, k_tile, v_tile, lse_tile, dot_tile,
    k_full, k_free, q_full, do_full, row_full, free, T, R, G, B, window, tiles, scale, scale2, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """One warp group: dk and dv of half of each tile's keys."""
    STAGES: gl.constexpr = q_tile.shape[0]
    BM: gl.constexpr = q_tile.shape[2]
    HALF: gl.constexpr = k_tile.shape[2]
    D: gl.constexpr = k_tile.shape[4]
    dtype: gl.constexpr = k_tile.dtype
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])  # of scores, (key, query)
    k_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # of dk and dv
    p_layout: gl.constexpr = gl.DotOperandLayout(0, k_mma, 2)
    col: gl.constexpr = gl.SliceLayout(0, s_mma)
    k = k_tile.index(half).reshape([HALF, D])
    v = v_tile.index(half).reshape([HALF, D])
    none = gl.full([HALF, BM], 0.0, gl.float32, s_mma)
    lane = gl.arange(0, BM, layout=col)
    n = 0
    count = 0
    for tile in range(gl.program_id(0), B * G * tiles, gl.num_programs(0)):
        batch, g, tile0, begin, blocks = _queries(tile, end_ptr, T, G, window, tiles, BM, 2 * HALF, DOCUMENTS)
        s0 = tile0 + half * HALF
        s = s0 + gl.arange(0, HALF, layout=gl.SliceLayout(1, s_mma))
        s_end = gl.minimum(s + window, T)  # queries from s up to here see the key
        all_end = gl.minimum(s0 + window, T)  # queries before this see the first key, if it is not after them
        if DOCUMENTS:
            row = end_ptr + batch.to(gl.int64) * T
            s_end = gl.minimum(s_end, gl.load(row + s, mask=s < T, other=0))
            all_end = gl.minimum(all_end, gl.load(row + gl.minimum(s0, T - 1)))
        dk = gl.full([HALF, D], 0.0, gl.float32, k_mma)
        dv = gl.full([HALF, D], 0.0, gl.float32, k_mma)
        mbarrier.wait(k_full.index(half), count & 1)
        for step in range(0, R * blocks):
            t0 = begin + step % blocks * BM
            i = n % STAGES
            phase = n // STAGES & 1
            n += 1
            q = q_tile.index(i).reshape([BM, D])
            do = do_tile.index(i).reshape([BM, D])
            mbarrier.wait(q_full.index(i), phase)
            if (t0 + BM > s0) & (t0 < s0 + HALF - 1 + window):
                scores = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
                mbarrier.wait(row_full.index(i), phase)
                lse = lse_tile.index(i).load(col)
                mbarrier.wait(do_full.index(i), phase)
                dp = warpgroup_mma(v, do.permute((1, 0)), none, use_acc=False, is_async=True)
                p = warpgroup_mma_wait(1, [scores])
                p = gl.exp2(p * scale2 - lse[None, :])
                if (t0 < s0 + HALF - 1) | (t0 + BM > all_end):
                    t = t0 + lane
                    p = gl.where((t[None, :] >= s[:, None]) & (t[None, :] < s_end[:, None]), p, 0.0)
                dv = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), do, dv, is_async=True)
                dot = dot_tile.index(i).load(col)
                mbarrier.wait(do_full.index(i), phase)  # long complete; across this ptxas moves no wait before the exponentials
                dp = warpgroup_mma_wait(1, [dp])
                ds = (p * (dp - dot[None, :])).to(dtype)
                dk = warpgroup_mma(gl.convert_layout(ds, p_layout), q, dk, is_async=True)
                dk, dv = warpgroup_mma_wait(0, [dk, dv])
            else:
                mbarrier.wait(row_full.index(i), phase)
                mbarrier.wait(do_full.index(i), phase)
            mbarrier.arrive(free.index(i))
        k.store((dk * scale).to(dtype))  # nobody reads these keys and values again
        v.store(dv.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(dk_rows, [batch, s0, g, 0], k_tile.index(half))
        tma.async_copy_shared_to_global(dv_rows, [batch, s0, g, 0], v_tile.index(half))
        tma.store_wait(0)
        mbarrier.arrive(k_free.index(half))
        count += 1


@gluon.jit(do_not_specialize=["T", "H", "R", "G", "B", "window", "tiles"])
def attention_dkv(
    q_rows, do_rows, k_rows, v_rows, dk_rows, dv_rows, end_ptr, lse_ptr, dot_ptr, T, H, R, G, B, window, tiles, scale, scale2,
    STAGES: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """dk and dv (B, T, G, D), over all query heads that share a key/value head. tiles: of keys in a row."""
    dtype: gl.constexpr = q_rows.dtype
    q_block: gl.constexpr = q_rows.block_type.shape
    k_block: gl.constexpr = k_rows.block_type.shape
    q_tile = gl.allocate_shared_memory(dtype, [STAGES, 1, q_block[1], 1, q_block[3]], q_rows.layout)
    do_tile = gl.allocate_shared_memory(dtype, [STAGES, 1, q_block[1], 1, q_block[3]], do_rows.layout)
    k_tile = gl.allocate_shared_memory(dtype, [2, 1, k_block[1], 1, k_block[3]], k_rows.layout)
    v_tile = gl.allocate_shared_memory(dtype, [2, 1, k_block[1], 1, k_block[3]], v_rows.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_tile = gl.allocate_shared_memory(gl.float32, [STAGES, q_block[1]], flat)
    dot_tile = gl.allocate_shared_memory(gl.float32, [STAGES, q_block[1]], flat)
    k_full, k_free = barriers(2, 1), barriers(2, 1)
    q_full, do_full = barriers(STAGES, 1), barriers(STAGES, 1)
    row_full, free = barriers(STAGES, 1), barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (_multiply, (
                0, dk_rows, dv_rows, end_ptr, q_tile, do_tile, k_tile, v_tile, lse_tile, dot_tile,
                k_full, k_free, q_full, do_full, row_full, free, T, R, G, B, window, tiles, scale, scale2, DOCUMENTS,
            )),
            (_multiply, (
                1, dk_rows, dv_rows, end_ptr, q_tile, do_tile, k_tile, v_tile, lse_tile, dot_tile,
                k_full, k_free, q_full, do_full, row_full, free, T, R, G, B, window, tiles, scale, scale2, DOCUMENTS,
            )),
            (_load, (
                q_rows, do_rows, k_rows, v_rows, end_ptr, lse_ptr, dot_ptr, q_tile, do_tile, k_tile, v_tile, lse_tile, dot_tile,
                k_full, k_free, q_full, do_full, row_full, free, T, H, R, G, B, window, tiles, DOCUMENTS,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
