"""Launches of the pairing-attention kernels."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashtrain.kernels.layout import heads_like
from flashtrain.kernels.pairing_attention.backward import delta_kernel, keys_gradient_kernel
from flashtrain.kernels.pairing_attention.config import Config, config_of, section_of, splits_of
from flashtrain.kernels.pairing_attention.forward import attention_kernel
from flashtrain.kernels.pairing_attention.queries import queries_gradient_kernel

_LOG2E = 1.4426950408889634


class Maps(NamedTuple):
    """Heads of each pair, and of each head its pairs (offsets ``[n + 1]``, then pairs); int32."""

    query_of: Tensor
    key_of: Tensor
    by_query: Tensor
    by_key: Tensor


@lru_cache(maxsize=64)
def maps_of(
    n_q: int, n_kv: int, query_of: tuple[int, ...], key_of: tuple[int, ...], device: torch.device
) -> Maps:
    """The maps of these pairs of ``n_q`` query heads and ``n_kv`` KV heads on ``device``."""

    def lists(heads: tuple[int, ...], count: int) -> list[int]:
        found = [[pair for pair, own in enumerate(heads) if own == head] for head in range(count)]
        offsets = [0]
        for pairs in found:
            offsets.append(offsets[-1] + len(pairs))
        return offsets + [pair for pairs in found for pair in pairs]

    lines = (list(query_of), list(key_of), lists(query_of, n_q), lists(key_of, n_kv))
    return Maps(*(torch.tensor(line, dtype=torch.int32, device=device) for line in lines))


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
    tiles = (config or config_of(query.dtype, query.shape[3])).forward
    out = heads_like(query, sizes.pairs)
    logsumexp = torch.empty(
        sizes.batch, sizes.pairs, sizes.sequence, dtype=torch.float32, device=query.device
    )
    section = sizes.section(sizes.pairs)
    grid = (section, triton.cdiv(sizes.sequence, tiles.rows), sizes.batch * (sizes.pairs // section))
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
    if d_out.stride(3) != 1:
        d_out = d_out.contiguous()
    delta = torch.empty_like(logsumexp)
    rows = chosen.forward.rows
    delta_kernel[(triton.cdiv(sizes.sequence, rows), sizes.pairs, sizes.batch)](
        d_out,
        out,
        None if d_logsumexp is None else d_logsumexp.contiguous(),
        delta,
        sizes.sequence,
        sizes.width,
        sizes.pairs,
        *d_out.stride()[:3],
        *out.stride()[:3],
        BM=rows,
        D=sizes.constants["D"],
        HAS_SLOPE=d_logsumexp is not None,
        num_warps=4,
    )
    tiles = chosen.keys
    walk = sizes.walk(key, key_of, tiles.rows)
    d_key, d_value = (walk.outputs(x) for x in (key, value))
    keys_gradient_kernel[walk.grid](
        sizes.described(query, tiles.columns),
        sizes.described(key, tiles.rows),
        sizes.described(value, tiles.rows),
        sizes.described(d_out, tiles.columns),
        logsumexp,
        delta,
        d_key,
        d_value,
        sizes.maps.query_of,
        sizes.maps.by_key,
        *sizes.scalars(walk, d_key),
        BM=tiles.columns,
        BN=tiles.rows,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        **sizes.constants,
    )
    d_key, d_value = walk.added(d_key, key), walk.added(d_value, value)
    tiles = chosen.queries
    walk = sizes.walk(query, query_of, tiles.rows)
    d_query = walk.outputs(query)
    queries_gradient_kernel[walk.grid](
        sizes.described(query, tiles.rows),
        sizes.described(key, tiles.columns),
        sizes.described(value, tiles.columns),
        sizes.described(d_out, tiles.rows),
        logsumexp,
        delta,
        d_query,
        sizes.maps.key_of,
        sizes.maps.by_query,
        *sizes.scalars(walk, d_query),
        BM=tiles.rows,
        BN=tiles.columns,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        **sizes.constants,
    )
    return walk.added(d_query, query), d_key, d_value


class _Walk(NamedTuple):
    """How blocks share out the heads of one side of the pairs, and the sum over the pairs of each."""

    grid: tuple[int, int, int]
    heads: int
    section: int
    splits: int

    def outputs(self, x: Tensor) -> Tensor:
        """Memory for a gradient, ``[splits, B, heads, tokens, D]``: fp32 where parts are to be added."""
        if self.splits == 1:
            return heads_like(x, self.heads).unsqueeze(0)
        batch, heads, tokens, width = x.shape
        parts = torch.empty(self.splits, tokens, batch, heads, width, dtype=torch.float32, device=x.device)
        return parts.permute(0, 2, 3, 1, 4)

    def added(self, parts: Tensor, x: Tensor) -> Tensor:
        """The gradient of ``x``, from what ``outputs`` holds."""
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
            "D": max(16, triton.next_power_of_2(self.width)),
            "CAUSAL": causal,
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        }

    def section(self, heads: int) -> int:
        return section_of(heads, self.keys, self.width, self.itemsize)

    def walk(self, x: Tensor, heads_of: tuple[int, ...], rows: int) -> _Walk:
        """Blocks of ``rows`` tokens of each head of ``x``, which is in the pairs as ``heads_of`` says."""
        heads = x.shape[1]
        tiles = triton.cdiv(x.shape[2], rows)
        most = max(heads_of.count(head) for head in range(heads))
        splits = splits_of(self.batch * heads * tiles, most, _processors(x.device))
        section = self.section(heads)
        return _Walk((section, tiles * splits, self.batch * (heads // section)), heads, section, splits)

    def scalars(self, walk: _Walk, out: Tensor) -> tuple[Any, ...]:
        """The arguments after the pointers of both backward kernels."""
        sizes = self.sequence, self.keys, self.width, self.scale
        return self.pairs, walk.heads, walk.section, walk.splits, *sizes, *out.stride()[:4]

    def described(self, x: Tensor, rows: int) -> TensorDescriptor:
        """``x [B, n, tokens, D]`` for TMA, ``rows`` of one head at a time."""
        if any(s * x.itemsize % 16 or not s for s in x.stride()[:3]) or x.stride(3) != 1 or x.data_ptr() % 16:
            x = x.contiguous()
        # What TMA does not take, a dimension of one element may have.
        strides = [s if n > 1 else x.shape[3] for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
        return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, self.constants["D"]])


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
