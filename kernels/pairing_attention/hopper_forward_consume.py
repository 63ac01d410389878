"""The partitions of ``hopper_forward.py`` that multiply: four warps with half of a tile's rows each."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtrain.kernels.pairing_attention import config

HALF = gl.constexpr(config.HALF)  # rows of a consumer
ROWS = gl.constexpr(2 * config.HALF)  # of a tile
READY = gl.constexpr(2)  # tiles whose number and queries are there
LN2 = gl.constexpr(0.6931471805599453)
_BEGIN = gl.constexpr(8)  # and 9: barriers of the hardware; Triton's own are numbered from 0, one a partition


@gluon.jit
def place_of(number, tiles, section, pairs, before, keys, BN: gl.constexpr, CAUSAL: gl.constexpr):  # type: ignore[no-untyped-def]
    """First row, pair and batch of a tile, and how many tiles of keys its rows see.

    ``section`` pairs (of all batches) work through all their tiles before the next do, and those tiles come
    first that see the most keys.
    """
    tile = number // section % tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    head = number // section // tiles * section + number % section
    last = keys
    if CAUSAL:
        last = gl.minimum((tile + 1) * ROWS + before, keys)
    return tile * ROWS, head % pairs, head // pairs, gl.cdiv(last, BN)


@gluon.jit
def drawn(turn, numbers, full):  # type: ignore[no-untyped-def]
    """The number of the tile of ``turn``, once its queries are there too."""
    mbarrier.wait(full.index(turn % READY), turn // READY & 1)
    return gl.max(numbers.index(turn % READY).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def await_begin(half: gl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until the other consumer has begun its products."""
    gl.inline_asm_elementwise(
        "bar.sync $1, 256; mov.u32 $0, 0;", "=r,r", [_BEGIN + half], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def let_begin(half: gl.constexpr):  # type: ignore[no-untyped-def]
    """Let consumer ``half`` begin its next products."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, 256; mov.u32 $0, 0;", "=r,r", [_BEGIN + half], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def scores_of(queries, keys):  # type: ignore[no-untyped-def]
    """``[64, keys]``, not awaited."""
    count: gl.constexpr = keys.shape[0]
    flat: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, count, 16])
    nothing = gl.zeros([HALF, count], gl.float32, flat)
    return warpgroup_mma(queries, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def add_values(total, part, values):  # type: ignore[no-untyped-def]
    """``total`` with ``part [64, keys]`` times values, not awaited."""
    operand: gl.constexpr = gl.DotOperandLayout(0, total.type.layout, 2)
    left = gl.convert_layout(part.to(values.dtype), operand)
    return warpgroup_mma(left, values, total, is_async=True)


@gluon.jit
def only_seen(scores, row, start, keys, CAUSAL: gl.constexpr):  # type: ignore[no-untyped-def]
    """Scores with minus infinity where a row does not see a key; ``row`` are the last keys that rows see."""
    column = start + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    seen = column[None, :] <= (row if CAUSAL else gl.zeros_like(row) + keys - 1)[:, None]
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def sums_of(part):  # type: ignore[no-untyped-def]
    """Sums over rows of ``part``, but for eight columns: each thread adds up what it has."""
    return gl.sum(part.reshape([part.shape[0], part.shape[1] // 8, 8]), 1)


@gluon.jit
def over_keys(  # type: ignore[no-untyped-def]
    total, part, highest, weight, first, end, steps, step, queries, k_tiles, v_tiles,
    k_full, k_empty, v_full, v_empty, row, keys, scale,
    half: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Tiles of keys ``[first, end)``: scores of each, and values of the one before it.

    ``part`` are the weights of the last tile, as scaled by ``highest`` as ``total`` is; its values are left.
    """
    for tile in range(first, end):
        stage = step % STAGES
        earlier = (step - 1) % STAGES
        await_begin(half)
        scores = scores_of(queries, k_tiles.index(stage).reshape([BN, D]))
        mbarrier.wait(v_full.index(earlier), (step - 1) // STAGES & 1)
        total = add_values(total, part, v_tiles.index(earlier).reshape([BN, D]))
        let_begin(1 - half)
        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(k_empty.index(stage))
        if MASKED:
            scores = only_seen(scores, row, tile * BN, keys, CAUSAL)
        # Each row sees key 0, which comes first, so that ``higher`` is finite.
        higher = gl.maximum(highest, gl.max(scores, 1) * scale)
        part = gl.exp2(scores * scale - higher[:, None])
        decay = gl.exp2(highest - higher)
        found = sums_of(part)
        weight = weight * gl.convert_layout(decay, gl.SliceLayout(1, found.type.layout))[:, None] + found
        highest = higher
        step += 1
        # Here rather than before the next scores: ptxas moves no exponentials over this wait, as it does over
        # that for products, which would then end before they begin.
        mbarrier.wait(k_full.index(step % STAGES), step // STAGES & 1, pred=tile + 1 < steps)
        total = warpgroup_mma_wait(0, [total])
        mbarrier.arrive(v_empty.index(earlier))
        total = total * gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))[:, None]
    return total, part, highest, weight, step


@gluon.jit
def consume(  # type: ignore[no-untyped-def]
    o_desc, logsumexp, total_tiles, tiles, section, pairs, sequence, before, keys, scale,
    numbers, q_tiles, k_tiles, v_tiles, o_tile, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    half: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of half of the rows of each tile."""
    flat: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    output = o_tile.index(half)
    if half == 1:
        let_begin(0)
    step = 0
    turn = 0
    number = drawn(0, numbers, q_full)
    while number < total_tiles:
        first, pair, batch, steps = place_of(number, tiles, section, pairs, before, keys, BN, CAUSAL)
        first += half * HALF
        rows = first + gl.arange(0, HALF, gl.SliceLayout(1, flat))
        whole = keys // BN  # tiles of keys that all rows see
        if CAUSAL:
            whole = gl.minimum((first + before + 1) // BN, steps)
        slot = turn % READY
        queries = q_tiles.index(2 * slot + half).reshape([HALF, D])
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), step // STAGES & 1)
        await_begin(half)
        scores = scores_of(queries, k_tiles.index(stage).reshape([BN, D]))
        let_begin(1 - half)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_empty.index(stage))
        if whole == 0:
            scores = only_seen(scores, rows + before, 0, keys, CAUSAL)
        highest = gl.max(scores, 1) * scale
        part = gl.exp2(scores * scale - highest[:, None])
        weight = sums_of(part)
        total = gl.zeros([HALF, D], gl.float32, wide)
        step += 1
        mbarrier.wait(k_full.index(step % STAGES), step // STAGES & 1, pred=steps > 1)
        total, part, highest, weight, step = over_keys(
            total, part, highest, weight, 1, whole, steps, step, queries, k_tiles, v_tiles,
            k_full, k_empty, v_full, v_empty, rows + before, keys, scale, half, BN, D, STAGES, CAUSAL, False,
        )  # fmt: skip
        total, part, highest, weight, step = over_keys(
            total, part, highest, weight, gl.maximum(whole, 1), steps, steps, step, queries, k_tiles, v_tiles,
            k_full, k_empty, v_full, v_empty, rows + before, keys, scale, half, BN, D, STAGES, CAUSAL, True,
        )  # fmt: skip
        mbarrier.arrive(q_empty.index(slot))
        stage = (step - 1) % STAGES
        mbarrier.wait(v_full.index(stage), (step - 1) // STAGES & 1)
        total = add_values(total, part, v_tiles.index(stage).reshape([BN, D]))
        whole_weight = gl.convert_layout(gl.sum(weight, 1), gl.SliceLayout(1, flat))
        line = (batch * pairs + pair).to(gl.int64) * sequence + rows
        gl.store(logsumexp + line, (highest + gl.log2(whole_weight)) * LN2, mask=rows < sequence)
        total = warpgroup_mma_wait(0, [total])
        mbarrier.arrive(v_empty.index(stage))
        total = total * gl.convert_layout(1.0 / whole_weight, gl.SliceLayout(1, wide))[:, None]
        tma.store_wait(0)
        output.reshape([HALF, D]).store(total.to(output.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [batch, pair, first, 0], output)
        turn += 1
        number = drawn(turn, numbers, q_full)
    tma.store_wait(0)
