"""What the Gluon kernels share: barriers and copies in shared memory, and the keys of a tile of queries."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """`number` barriers in shared memory, each complete after `arrivals`."""
    found = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(found.index(i), count=arrivals)
    return found


@gluon.jit
def fetch(rows, batch, time, head, full, tile):
    """Begin to copy the block of `rows` at (batch, time, head) to `tile`; when it has come, barrier `full` is complete."""
    mbarrier.expect(full, rows.block_type.nbytes)
    tma.async_copy_global_to_shared(rows, [batch, time, head, 0], full, tile)


@gluon.jit
def keys_of(tile, start_ptr, T, H, window, tiles, PACK: gl.constexpr, QUERIES: gl.constexpr, DOCUMENTS: gl.constexpr):
    """Batch row, first head and first query of a tile; its first key, the first that every query sees, the end of its keys."""
    h = tile % (H // PACK) * PACK
    rest = tile // (H // PACK)
    t0 = rest % tiles * QUERIES
    batch = rest // tiles
    end = gl.minimum(t0 + QUERIES, T)
    first = t0 - window + 1
    all_from = t0 + QUERIES - window
    if DOCUMENTS:
        row = start_ptr + batch.to(gl.int64) * T
        first = gl.maximum(first, gl.load(row + t0))
        all_from = gl.maximum(all_from, gl.load(row + end - 1))
    return batch, h, t0, gl.maximum(first, 0), all_from, end
