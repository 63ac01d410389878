"""Waiting for and raising 32-bit flags inside a kernel, as one block (not one thread).

A flag is a word of device memory that holds the epoch of the last arrival; it is up when
``(int)(flag - epoch) >= 0``, so epochs may wrap. All threads of a block call these together. A wait also ends
when the word ``stop`` is not zero: what was waited for will never come. That word may lie in host memory, so
it is read once in 65,536 polls: where every block read it once in 64, arrivals slowed down up to tenfold.
In Triton's interpreter, which knows no PTX and runs one block at a time, plain loads and stores take the
place of these.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def wait_flag(flag, epoch, stop, needed):  # type: ignore[no-untyped-def]
    """Wait until ``flag`` is up if ``needed`` is not 0; returns 0.

    Add the result to the coordinates of the loads that need the data: the software pipeliner moves loads
    ahead of statements that they do not depend on. One warp polls, so that 132 blocks do not crowd out the
    tiles' own traffic. The acquire orders the generic proxy alone; TMA reads through the async proxy, hence
    the fence.
    """
    if INTERPRETED:
        while (needed != 0) & (tl.atomic_add(flag, 0) - epoch < 0) & (tl.load(stop) == 0):
            pass
        zero = 0
    else:
        zero = tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            .reg .b32 v, n;
            setp.eq.s32 p, $4, 0;
            @p bra READY;
            mov.u32 v, %tid.x;
            setp.ge.u32 p, v, 32;
            @p bra JOIN;
            mov.u32 n, 0;
            POLL:
            ld.acquire.sys.global.b32 v, [$1];
            sub.s32 v, v, $2;
            setp.ge.s32 p, v, 0;
            @p bra JOIN;
            nanosleep.u32 20;
            add.u32 n, n, 1;
            and.b32 v, n, 65535;
            setp.ne.u32 p, v, 0;
            @p bra POLL;
            ld.relaxed.sys.global.b32 v, [$3];
            setp.eq.u32 p, v, 0;
            @p bra POLL;
            JOIN:
            bar.sync 0;
            fence.proxy.async;
            READY:
            mov.u32 $0, 0;
            }
            """,
            "=r,l,r,l,r",
            [flag, epoch, stop, needed],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return zero


@triton.jit
def wait_peers(flags, stride, world, rank, epoch, stop, needed):  # type: ignore[no-untyped-def]
    """Wait until ``flags[stride * peer]`` is up for every peer below ``world`` but ``rank``; returns 0.

    Nothing happens if ``needed`` is 0. Lane p of one warp polls the flag of peer p: at most 32 ranks. What
    follows reads with ordinary loads, which the acquire and the barrier order.
    """
    if INTERPRETED:
        for peer in range(world):
            waiting = (needed != 0) & (peer != rank)
            while waiting & (tl.atomic_add(flags + stride * peer, 0) - epoch < 0) & (tl.load(stop) == 0):
                pass
        zero = 0
    else:
        zero = tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            .reg .b32 t, v, n;
            .reg .b64 a;
            setp.eq.s32 p, $7, 0;
            @p bra READY;
            mov.u32 t, %tid.x;
            setp.ge.u32 p, t, 32;
            @p bra JOIN;
            setp.ge.u32 p, t, $3;
            @p bra GATHERED;
            setp.eq.u32 p, t, $4;
            @p bra GATHERED;
            mul.lo.u32 v, t, $2;
            mul.wide.u32 a, v, 4;
            add.u64 a, a, $1;
            mov.u32 n, 0;
            POLL:
            ld.acquire.sys.global.b32 v, [a];
            sub.s32 v, v, $5;
            setp.ge.s32 p, v, 0;
            @p bra GATHERED;
            nanosleep.u32 20;
            add.u32 n, n, 1;
            and.b32 v, n, 65535;
            setp.ne.u32 p, v, 0;
            @p bra POLL;
            ld.relaxed.sys.global.b32 v, [$6];
            setp.eq.u32 p, v, 0;
            @p bra POLL;
            GATHERED:
            bar.warp.sync 0xffffffff;
            JOIN:
            bar.sync 0;
            READY:
            mov.u32 $0, 0;
            }
            """,
            "=r,l,r,r,r,r,l,r",
            [flags, stride, world, rank, epoch, stop, needed],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return zero


@triton.jit
def arrive(counter, expected, ready, epoch, needed):  # type: ignore[no-untyped-def]
    """Count this block at ``counter`` if ``needed`` is not 0; the last of ``expected`` sets ``ready``.

    Everything that the blocks stored before, through TMA as well, is visible to whoever sees the flag, copy
    engines and streams that wait for a value included. The counter returns to 0 by itself. (Triton's own
    wait after a TMA store only covers the read of shared memory.)
    """
    if INTERPRETED:
        if (needed != 0) and (tl.atomic_add(counter, 1) == expected - 1):
            tl.store(counter, 0)
            tl.store(ready, epoch)
    else:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            .reg .b32 v, l;
            setp.eq.s32 p, $5, 0;
            @p bra DONE;
            cp.async.bulk.wait_group 0;
            bar.sync 0;
            mov.u32 v, %tid.x;
            setp.ne.u32 p, v, 0;
            @p bra DONE;
            fence.proxy.async;
            sub.u32 l, $2, 1;
            atom.acq_rel.gpu.global.inc.u32 v, [$1], l;
            setp.ne.u32 p, v, l;
            @p bra DONE;
            st.release.sys.global.b32 [$3], $4;
            DONE:
            bar.warp.sync 0xffffffff;
            mov.u32 $0, 0;
            }
            """,
            "=r,l,r,l,r,r",
            [counter, expected, ready, epoch, needed],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def deliver(counter, expected, directory, column, epoch, begin, end, rank, WORLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Count this block; the last raises flag ``column`` at peers ``[begin, end)`` but ``rank``.

    What the blocks stored in peers' memory before, not through TMA, is visible to whoever sees the flag.
    ``directory`` ``[3, WORLD]``: of each peer the landing buffer, the first flag that this rank raises there,
    and the first word in which a watchdog there looks for the same. One thread a peer, so that no flag waits
    for another's.
    """
    if INTERPRETED:
        if tl.atomic_add(counter, 1) == expected - 1:
            tl.store(counter, 0)
            for peer in range(begin, end):
                if peer != rank:
                    for table in range(1, 3):
                        flag = tl.load(directory + table * WORLD + peer).to(tl.pointer_type(tl.int32))
                        tl.store(flag + column, epoch)
    else:
        table = directory.to(tl.pointer_type(tl.int32))  # all pointers of one type
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred p, q;
            .reg .b32 t, v, l;
            .reg .b64 a, b, c;
            mov.u32 t, %tid.x;
            setp.ne.u32 q, t, t;
            bar.sync 0;
            setp.ne.u32 p, t, 0;
            @p bra COUNTED;
            fence.acq_rel.sys;
            sub.u32 l, $2, 1;
            atom.acq_rel.gpu.global.inc.u32 v, [$1], l;
            setp.eq.u32 q, v, l;
            COUNTED:
            bar.warp.sync 0xffffffff;
            bar.red.or.pred q, 0, q;
            @!q bra DONE;
            setp.lt.u32 p, t, $6;
            @p bra DONE;
            setp.ge.u32 p, t, $7;
            @p bra DONE;
            setp.eq.u32 p, t, $8;
            @p bra DONE;
            mul.wide.u32 c, $4, 4;
            add.u32 v, t, $9;
            mul.wide.u32 a, v, 8;
            add.u64 a, a, $3;
            ld.global.b64 b, [a];
            add.u64 b, b, c;
            st.release.sys.global.b32 [b], $5;
            mul.wide.u32 b, $9, 8;
            add.u64 a, a, b;
            ld.global.b64 b, [a];
            add.u64 b, b, c;
            st.release.sys.global.b32 [b], $5;
            DONE:
            bar.warp.sync 0xffffffff;
            mov.u32 $0, 0;
            }
            """,
            "=r,l,r,l,r,r,r,r,r,r",
            [counter, expected, table, column, epoch, begin, end, rank, WORLD],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def raise_flag(flag, epoch):  # type: ignore[no-untyped-def]
    """Set ``flag`` to ``epoch`` for copy engines and peers; nothing stored before is implied."""
    if INTERPRETED:
        tl.store(flag, epoch)
    else:
        tl.inline_asm_elementwise(
            "st.release.sys.global.b32 [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [flag, epoch],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def settle():  # type: ignore[no-untyped-def]
    """Everything that this block has stored, through TMA as well, is visible to its own loads."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; fence.proxy.async; bar.sync 0; mov.u32 $0, 0;",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
