"""Launches of the pairing-attention kernels."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashtrain.kernels.descriptors import heads_descriptor
from flashtrain.kernels.layout import heads_like
from flashtrain.kernels.pairing_attention.backward import (
    attention_gradient_kernel,
    attention_prepare_kernel,
    attention_round_kernel,
)
from flashtrain.kernels.pairing_attention.config import (
    HALF,
    Config,
    Tiles,
    config_of,
    gradients_section_of,
    section_of,
    splits_of,
)
from flashtrain.kernels.pairing_attention.forward import attention_kernel
from flashtrain.kernels.pairing_attention.maps import maps_of
from flashtrain.kernels.sizes import cdiv, next_power_of_2, processors

_LOG2E = 1.4426950408889634


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_of: tuple[int, ...],
    key_of: tuple[int, ...],
    causal: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``reference.pairing_attention``; ``config`` in place of the measured one."""
    sizes = _Sizes(query, key, query_of, key_of, causal)
    chosen = config or config_of(query.dtype, query.shape[3])
    tiles = chosen.forward
    out = heads_like(query, sizes.pairs)
    logsumexp = torch.empty(
        sizes.batch, sizes.pairs, sizes.sequence, dtype=torch.float32, device=query.device
    )
    if chosen.partitioned:
        _forward_hopper(sizes, tiles, query, key, value, out, logsumexp)
        return out, logsumexp
    section = section_of(sizes.pairs, sizes.keys, sizes.width, sizes.itemsize)
    grid = (section, cdiv(sizes.sequence, tiles.rows), sizes.batch * (sizes.pairs // section))
    attention_kernel[grid](
        sizes.described(query, tiles.rows),
        sizes.described(key, tiles.columns),
        sizes.described(value, tiles.columns),
        out,
        logsumexp,
        sizes.maps.query_of,
        sizes.maps.key_of,
        sizes.pairs,
        section,
        sizes.sequence,
        sizes.keys,
        sizes.width,
        sizes.scale,
        *out.stride()[:3],
        BM=tiles.rows,
        BN=tiles.columns,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        **sizes.constants,
    )
    return out, logsumexp


def _forward_hopper(
    sizes: "_Sizes", tiles: Tiles, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor
) -> None:
    from flashtrain.kernels.pairing_attention import hopper_forward
    from flashtrain.kernels.pairing_attention.hopper import with_layout

    owned, heads = [HALF, tiles.columns, tiles.columns, HALF], sizes.batch * sizes.pairs
    described = [sizes.described(x, rows) for x, rows in zip((query, key, value, out), owned, strict=True)]
    total = heads * cdiv(sizes.sequence, tiles.rows)
    # Pairs of one KV head read it together, and mostly lie side by side.
    tokens = max(1, sizes.keys * key.shape[1] // sizes.pairs)
    hopper_forward.attention_hopper[(min(total, processors(query.device)),)](
        *map(with_layout, described),
        logsumexp,
        sizes.maps.query_of,
        sizes.maps.key_of,
        torch.zeros(1, dtype=torch.int32, device=query.device),
        sizes.pairs,
        section_of(heads, tokens, sizes.width, sizes.itemsize),
        total,
        sizes.sequence,
        sizes.keys,
        sizes.scale,
        BN=tiles.columns,
        D=sizes.constants["D"],
        STAGES=tiles.stages,
        CAUSAL=sizes.constants["CAUSAL"],
        num_warps=tiles.warps,
    )


def backward(
    d_out: Tensor,
    d_logsumexp: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_of: tuple[int, ...],
    key_of: tuple[int, ...],
    causal: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    sizes = _Sizes(query, key, query_of, key_of, causal)
    chosen = config or config_of(query.dtype, query.shape[3])
    tiles = chosen.backward
    rows, depth = tiles.columns, sizes.constants["D"]
    if d_out.stride(3) != 1:
        d_out = d_out.contiguous()
    heads, number = query.shape[1], cdiv(sizes.sequence, rows)
    memory: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    norms, means = torch.empty(2, sizes.batch, sizes.pairs, number * rows, **memory)
    sums = torch.empty(sizes.batch * heads * number * depth, rows, **memory)
    counters = torch.empty(1 + sizes.batch * heads * number, dtype=torch.int32, device=query.device)
    attention_prepare_kernel[(number, sizes.pairs, sizes.batch)](
        d_out,
        out,
        None if d_logsumexp is None else d_logsumexp.contiguous(),
        logsumexp,
        norms,
        means,
        sums,
        counters,
        sizes.maps.visits,
        sizes.sequence,
        sizes.width,
        sizes.scale,
        sizes.pairs,
        heads,
        key.shape[1],
        *d_out.stride()[:3],
        *out.stride()[:3],
        BM=rows,
        D=depth,
        HAS_SLOPE=d_logsumexp is not None,
        num_warps=4,
    )
    parts = _Parts.of(sizes, key, key_of, tiles)
    d_key, d_value = (parts.memory(x) for x in (key, value))
    owned = HALF if chosen.partitioned else tiles.rows
    described = [
        sizes.described(query, rows),
        sizes.described(key, owned),
        sizes.described(value, owned),
        sizes.described(d_out, rows),
    ]
    rest = (
        d_key,
        d_value,
        counters,
        sizes.maps.visits,
        sizes.pairs,
        heads,
        key.shape[1],
        parts.splits,
        parts.blocks,
        parts.section,
        sizes.sequence,
        sizes.keys,
        sizes.width,
        sizes.scale,
        *d_key.stride()[:4],
    )
    grid = (parts.blocks * cdiv(sizes.keys, tiles.rows),)
    if chosen.partitioned:
        from flashtrain.kernels.pairing_attention import hopper

        described += [
            TensorDescriptor(sums, list(sums.shape), list(sums.stride()), [HALF, HALF]),
            TensorDescriptor(norms, [norms.numel()], [1], [rows]),
            TensorDescriptor(means, [means.numel()], [1], [rows]),
        ]
        hopper.attention_gradient_hopper[grid](
            *map(hopper.with_layout, described),
            *rest,
            BM=rows,
            D=depth,
            CAUSAL=causal,
            num_warps=tiles.warps,
        )
    else:
        attention_gradient_kernel[grid](
            *described,
            TensorDescriptor(sums, list(sums.shape), list(sums.stride()), [depth, rows]),
            norms,
            means,
            *rest,
            BM=rows,
            BN=tiles.rows,
            STAGES=tiles.stages,
            num_warps=tiles.warps,
            **sizes.constants,
        )
    d_query = heads_like(query, heads)
    attention_round_kernel[(number, heads, sizes.batch)](
        sums,
        d_query,
        sizes.sequence,
        sizes.width,
        sizes.scale,
        *d_query.stride()[:3],
        BM=rows,
        D=depth,
        num_warps=4,
    )
    if sizes.maps.idle:
        d_query[:, sizes.maps.idle] = 0
    return d_query, parts.added(d_key, key), parts.added(d_value, value)


class _Parts(NamedTuple):
    """Into how many blocks the sum over the pairs of a KV head is cut, how many there are for a tile of keys,
    and how many of these are at work at a time."""

    splits: int
    blocks: int
    section: int

    @classmethod
    def of(cls, sizes: "_Sizes", key: Tensor, key_of: tuple[int, ...], tiles: Tiles) -> "_Parts":
        heads, available = sizes.batch * key.shape[1], processors(key.device)
        most = max(map(key_of.count, set(key_of)))
        splits = splits_of(heads * cdiv(sizes.keys, tiles.rows), most, available)
        # Heads that add to one dQ wait for each other's tiles of keys, so they must be in one section.
        unit = key.shape[1] * splits if sizes.maps.shared else 1
        blocks = heads * splits
        return cls(splits, blocks, gradients_section_of(blocks // unit, unit, tiles.columns, available))

    def memory(self, x: Tensor) -> Tensor:
        """Memory for a gradient, ``[splits, B, heads, tokens, D]``: fp32 where parts are to be added."""
        batch, heads, tokens, width = x.shape
        if self.splits == 1:
            return heads_like(x, heads).unsqueeze(0)
        parts = torch.empty(self.splits, tokens, batch, heads, width, dtype=torch.float32, device=x.device)
        return parts.permute(0, 2, 3, 1, 4)

    def added(self, parts: Tensor, x: Tensor) -> Tensor:
        """The gradient of ``x``, from what ``memory`` holds."""
        return parts[0] if self.splits == 1 else parts.sum(0).to(x.dtype)


class _Sizes:
    """What the launches of one call share."""

    def __init__(
        self, query: Tensor, key: Tensor, query_of: tuple[int, ...], key_of: tuple[int, ...], causal: bool
    ) -> None:
        self.batch, _, self.sequence, self.width = query.shape
        self.keys, self.pairs = key.shape[2], len(query_of)
        self.scale = self.width**-0.5 * _LOG2E
        self.maps = maps_of(query.shape[1], key.shape[1], query_of, key_of, query.device)
        self.itemsize = query.itemsize
        self.constants: dict[str, Any] = {
            "D": max(16, next_power_of_2(self.width)),
            "CAUSAL": causal,
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        }

    def described(self, x: Tensor, rows: int) -> TensorDescriptor:
        """``x [B, n, tokens, D]`` for TMA, ``rows`` of one head at a time."""
        return heads_descriptor(x, rows, self.constants["D"])
