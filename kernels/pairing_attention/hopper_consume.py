"""The partitions of ``hopper.py`` that multiply: four warps with half of a block's keys each."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtrain.kernels.pairing_attention import config

HALF = gl.constexpr(config.HALF)  # what a consumer owns of the keys, and of dQ's part
KEYS = gl.constexpr(2 * config.HALF)  # of a block
STAGES = gl.constexpr(2)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def part_of_queries(keys, d_scores, stage, half: gl.constexpr, D: gl.constexpr):  # type: ignore[no-untyped-def]
    """A half of dQ's part, ``[64, 64]`` of ``[D, rows]``, from all keys' dS; not awaited."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    square: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    element: gl.constexpr = keys.dtype
    # 128 bytes wide, tiles lie side by side: at D 128 those of keys, else those of dS.
    if D == KEYS:
        panels = keys._reinterpret(element, [4, HALF, HALF], square)
        first, second = panels.index(half), panels.index(2 + half)
        below, above = d_scores.index(2 * stage), d_scores.index(2 * stage + 1)
    else:
        panels = d_scores._reinterpret(element, [STAGES * 4, HALF, HALF], square)
        first, second = keys.index(0).reshape([HALF, HALF]), keys.index(1).reshape([HALF, HALF])
        below, above = panels.index(4 * stage + half), panels.index(4 * stage + 2 + half)
    part = gl.zeros([HALF, HALF], gl.float32, layout)
    part = warpgroup_mma(first.permute((1, 0)), below, part, use_acc=False, is_async=True)
    return warpgroup_mma(second.permute((1, 0)), above, part, is_async=True)


@gluon.jit
def hand_over(part, dq_part, half: gl.constexpr, step, full, empty):  # type: ignore[no-untyped-def]
    """A half of dQ's part of ``step`` to the warp that adds it."""
    mbarrier.wait(empty, step & 1 ^ 1)
    dq_part.index(half).store(part)
    fence_async_shared()
    mbarrier.arrive(full)


@gluon.jit
def consume(  # type: ignore[no-untyped-def]
    d_key, d_value, count, high, steps, start, target, before, keys, width, scale, out_time,
    q_tiles, do_tiles, k_tile, v_tile, norms, means, d_scores, dq_part,
    owned, full, empty, ds_full, ds_empty, dq_full, dq_empty,
    half: gl.constexpr,
    BM: gl.constexpr,
    D: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """dK and dV of half of the keys, and a half of each step's part of dQ."""
    element: gl.constexpr = q_tiles.dtype
    flat: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    start += half * HALF
    column = start + gl.arange(0, HALF, gl.SliceLayout(1, flat))
    if CAUSAL:
        whole = (start + HALF - 1 - before + BM - 1) // BM * BM  # rows from here on see all keys
        edge = column - before
    else:
        whole = gl.where(start + HALF > keys, high * BM, 0)
        edge = column
    keys_tile = k_tile.index(half).reshape([HALF, D])
    values_tile = v_tile.index(half).reshape([HALF, D])
    d_keys = gl.zeros([HALF, D], gl.float32, wide)
    d_values = gl.zeros([HALF, D], gl.float32, wide)
    nothing = gl.zeros([HALF, BM], gl.float32, flat)
    # Where a step has few exponentials dQ's part runs before them, else behind all else: as was measured.
    EARLY: gl.constexpr = D == KEYS
    mbarrier.wait(owned, 0)
    for step in range(steps):
        stage = step % STAGES
        row = (high - 1 - step // count) * BM
        rows = q_tiles.index(stage).reshape([BM, D])
        slopes = do_tiles.index(stage).reshape([BM, D])
        # dQ's part is of the step before; in the first, of what happens to be there, and it goes nowhere.
        if EARLY:
            mbarrier.wait(ds_full.index(stage ^ 1), (step - 1) // STAGES & 1, pred=step > 0)
            part = part_of_queries(k_tile, d_scores, stage ^ 1, half, D)
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        scores = warpgroup_mma(keys_tile, rows.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if EARLY:
            part = warpgroup_mma_wait(1, [part])
            if step > 0:
                mbarrier.arrive(ds_empty.index(stage ^ 1))
                hand_over(part, dq_part, half, step - 1, dq_full, dq_empty)
        slope = warpgroup_mma(values_tile, slopes.permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        norm = norms.index(stage).load(gl.SliceLayout(0, flat)) * scale
        weights = gl.exp2(scores * scale + norm[None, :])
        if row < whole:
            if CAUSAL:
                seen = edge[:, None] <= (row + gl.arange(0, BM, gl.SliceLayout(0, flat)))[None, :]
            else:
                seen = (edge < keys)[:, None] & (gl.arange(0, BM, gl.SliceLayout(0, flat)) >= 0)[None, :]
            weights = gl.where(seen, weights, 0.0)
        left = gl.convert_layout(weights.to(element), operand)
        d_values = warpgroup_mma(left, slopes, d_values, is_async=True)
        slope = warpgroup_mma_wait(1, [slope])
        mean = means.index(stage).load(gl.SliceLayout(0, flat))
        found = (weights * (slope + mean[None, :])).to(element)
        mbarrier.wait(ds_empty.index(stage), step // STAGES & 1 ^ 1)
        d_scores.index(2 * stage + half).store(found)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(stage))
        d_keys = warpgroup_mma(gl.convert_layout(found, operand), rows, d_keys, is_async=True)
        if EARLY:
            d_keys, d_values = warpgroup_mma_wait(0, [d_keys, d_values])
            mbarrier.arrive(empty.index(stage))
        else:
            mbarrier.wait(ds_full.index(stage ^ 1), (step - 1) // STAGES & 1, pred=step > 0)
            part = part_of_queries(k_tile, d_scores, stage ^ 1, half, D)
            d_keys, d_values = warpgroup_mma_wait(2, [d_keys, d_values])
            mbarrier.arrive(empty.index(stage))
            part = warpgroup_mma_wait(0, [part])
            if step > 0:
                mbarrier.arrive(ds_empty.index(stage ^ 1))
                hand_over(part, dq_part, half, step - 1, dq_full, dq_empty)
    if steps > 0:
        stage = (steps - 1) % STAGES
        mbarrier.wait(ds_full.index(stage), (steps - 1) // STAGES & 1)
        part = warpgroup_mma_wait(0, [part_of_queries(k_tile, d_scores, stage, half, D)])
        hand_over(part, dq_part, half, steps - 1, dq_full, dq_empty)
    token = start + gl.arange(0, HALF, gl.SliceLayout(1, wide))
    across = gl.arange(0, D, gl.SliceLayout(0, wide))
    target += token.to(gl.int64)[:, None] * out_time + across[None, :]
    # Widths are eights, which lets two values be stored at once.
    inside = (token < keys)[:, None] & (across < width // 8 * 8)[None, :]
    # ``scale`` has log2(e) in it, for the scores.
    gl.store(d_key + target, (d_keys * (scale / LOG2E)).to(d_key.dtype.element_ty), mask=inside)
    gl.store(d_value + target, d_values.to(d_value.dtype.element_ty), mask=inside)
