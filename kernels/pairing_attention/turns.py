"""Blocks that add to the same tile in global memory one after the other, as a counter beside it says.

A counter starts at 0 and holds how many additions to its tile are done; the block whose turn it is adds
through TMA, in L2, and passes the turn on when that has arrived. All threads of a block call these together.
In Triton's interpreter, which knows no PTX, runs one block at a time and has no addition through TMA, plain
loads and stores take their place.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def done_before(counter):  # type: ignore[no-untyped-def]
    """What ``counter`` holds: asked early, used late, so that the way to L2 and back is hidden.

    It is no acquire, which would empty the L1 in each step. None is needed where the turn has come already:
    this block reads nothing of the tile, its addition happens in L2, after the load that it depends on, and
    those before it had arrived there before the counter rose.
    """
    if INTERPRETED:
        found = tl.load(counter)
    else:
        found = tl.inline_asm_elementwise(
            "ld.relaxed.gpu.global.b32 $0, [$1];",
            "=r,l",
            [counter],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return found


@triton.jit
def await_turn(counter, turn, found):  # type: ignore[no-untyped-def]
    """Wait until ``counter`` is ``turn``, unless ``found`` was; returns 0.

    Add the result to the coordinates of what must not happen before. Each warp polls for itself, so that it
    does not matter which of them issue an addition.
    """
    if INTERPRETED:
        zero = tl.load(counter) - turn  # it has come, where blocks run one by one: else the sum goes astray
    else:
        zero = tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            .reg .b32 v;
            setp.ge.s32 p, $3, $2;
            @p bra READY;
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
            "=r,l,r,r",
            [counter, turn, found],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return zero


@triton.jit
def add_tile(desc, row, value):  # type: ignore[no-untyped-def]
    """Add ``value`` at ``[row, 0]`` of ``desc``; the turn must be this block's."""
    if INTERPRETED:
        desc.store([row, 0], desc.load([row, 0]) + value)
    else:
        desc.atomic_add([row, 0], value)


@triton.jit
def pass_turn(counter, done):  # type: ignore[no-untyped-def]
    """Let ``counter`` be ``done`` once this block's additions have arrived; nothing happens if it is 0."""
    if INTERPRETED:
        if done > 0:
            tl.store(counter, done)
    else:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            .reg .b32 v;
            cp.async.bulk.wait_group 0;
            bar.sync 0;
            mov.u32 v, %tid.x;
            setp.ne.u32 p, v, 0;
            @p bra DONE;
            setp.eq.s32 p, $2, 0;
            @p bra DONE;
            st.release.gpu.global.b32 [$1], $2;
            DONE:
            bar.warp.sync 0xffffffff;
            mov.u32 $0, 0;
            }
            """,
            "=r,l,r",
            [counter, done],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
