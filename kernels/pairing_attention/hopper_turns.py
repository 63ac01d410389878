"""``turns.py`` for one warp of a block that adds to dQ out of shared memory (Gluon)."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin


@builtin
def add_shared(desc, place, source, _semantic=None):  # type: ignore[no-untyped-def]
    """Begin to add ``source`` in shared memory to the tile at ``place`` of ``desc``, through TMA."""
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, place, source.handle
    )


@gluon.jit
def await_turn(counter, turn):  # type: ignore[no-untyped-def]
    """Wait until ``counter`` is ``turn``; returns 0, to be added to what must not happen before."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        .reg .b32 v;
        POLL:
        ld.acquire.gpu.global.b32 v, [$1];
        setp.ge.s32 p, v, $2;
        @p bra READY;
        nanosleep.u32 20;
        bra POLL;
        READY:
        fence.proxy.async.global;
        mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [counter, turn],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def pass_turn(counter, done):  # type: ignore[no-untyped-def]
    """Let ``counter`` be ``done`` once this warp's additions have arrived."""
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        .reg .b32 v;
        cp.async.bulk.wait_group 0;
        bar.warp.sync 0xffffffff;
        mov.u32 v, %laneid;
        setp.ne.u32 p, v, 0;
        @p bra DONE;
        st.release.gpu.global.b32 [$1], $2;
        DONE:
        bar.warp.sync 0xffffffff;
        mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [counter, done],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
