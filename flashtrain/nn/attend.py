"""Causal attention over heads that are projected and rotated already, by the backend that is chosen."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashtrain.errors import UserError
from flashtrain.nn import attention_kernels as kernels

Backend = Literal["auto", "cudnn", "flash", "fa", "triton", "efficient", "math"]


class Heads(NamedTuple):
    """What attention takes: ``query [B, H, S, D]``, ``key`` and ``value [B, kv heads, T, D]``, T >= S.

    Positions are in query and key already. The S queries are those of the last S of the T tokens.
    """

    query: Tensor
    key: Tensor
    value: Tensor


class Documents(NamedTuple):
    """Where documents begin and end in a batch whose sequences are packed with several of them.

    ``bounds``: int32 ``[documents + 1]`` on the device of the heads. Tokens are counted sequence by sequence
    through the batch: it begins with 0, ends with B·S and holds every multiple of S. ``longest`` in tokens.
    """

    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, tokens: Tensor, boundary: int, device: torch.device | None = None) -> "Documents":
        """Documents of ``tokens [B, S]`` that each end with the token ``boundary``, which is theirs."""
        begins = torch.ones_like(tokens, dtype=torch.bool)
        begins[:, 1:] = tokens[:, :-1] == boundary
        starts = begins.flatten().nonzero().flatten()
        bounds = torch.cat([starts, starts.new_tensor([tokens.numel()])]).int()
        return cls(bounds.to(device or tokens.device), int(bounds.diff().max()))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How attention runs in this process; the same on every rank, since backends differ in their bits.

    ``backend``: cudnn; flash, torch's FlashAttention 2; fa, the package flash-attn (4, 3 or 2, whichever is
    installed); triton, the kernels of ``model.pairing`` for grouped queries, deterministic always; efficient,
    torch's memory-efficient one; math, which holds all scores in memory. On the CPU
    there are auto and math. auto: a run on GPUs measures those that take its heads and keeps the fastest;
    elsewhere the first of them in that order. ``deterministic``: a backward pass with fixed orders of
    summation; torch does not offer it for cudnn, which then takes triton's.
    """

    backend: Backend = "auto"
    deterministic: bool = True


_settings = Settings()


def configure(new: Settings) -> None:
    """Set how attention runs from here on."""
    global _settings
    _settings = new


def settings() -> Settings:
    """The settings in force."""
    return _settings


def attend(heads: Heads, documents: Documents | None = None) -> Tensor:
    """Causal attention ``[B, H, S, D]``; query head h meets KV head ``h // (H / kv heads)``.

    With ``documents`` a query meets the keys of its own document alone; S is then T. Raises UserError if
    ``Settings.backend`` names one that does not take these heads.
    """
    query, key, _ = heads
    if documents is None and query.shape[2] == 1 < key.shape[2]:
        return _masked(heads, None)  # a token that is decoded meets all keys
    backend, fixed = _settings.backend, _settings.deterministic
    if backend == "auto":
        if query.device.type != "cuda":
            return _plain(heads, documents)
        return run(candidates(heads, documents is not None, fixed)[0], heads, documents, fixed)
    if (reason := why_not(backend, heads, documents is not None, fixed)) is not None:
        raise UserError(f"attention.backend is {backend}, but {reason}")
    return run(backend, heads, documents, fixed)


def run(name: str, heads: Heads, documents: Documents | None, deterministic: bool) -> Tensor:
    """``attend`` by the backend called ``name``."""
    bounds, longest = (None, heads.query.shape[2]) if documents is None else documents
    match name:
        case "cudnn":
            return kernels.cudnn(*heads, deterministic)
        case "flash":
            return kernels.flash(*heads, bounds, longest, deterministic)
        case "fa":
            return kernels.flash_package(*heads, bounds, longest, deterministic)
        case "triton":
            return kernels.triton(*heads)
        case "efficient":
            return kernels.efficient(heads.query, *_expanded(heads), deterministic)
    with sdpa_kernel(SDPBackend.MATH):
        return _plain(heads, documents)


def candidates(heads: Heads, documents: bool, deterministic: bool) -> list[str]:
    """Backends that take ``heads`` on a GPU, in the order of preference; math only where no other does."""
    names = ("cudnn", "fa", "flash", "triton", "efficient")
    found = [name for name in names if why_not(name, heads, documents, deterministic) is None]
    return found or ["math"]


def why_not(name: str, heads: Heads, documents: bool, deterministic: bool) -> str | None:
    """Why a backend cannot run ``heads`` where they are, with ``documents`` or not; None if it can."""
    dtype, width = heads.query.dtype, heads.query.shape[-1]
    if name == "math":
        return None
    if heads.query.device.type == "cpu":
        return "the CPU has auto and math alone"
    if name in ("cudnn", "efficient") and heads.query.shape[2] < heads.key.shape[2]:
        return (
            "it counts causal queries from the first key, and there are more keys: use flash, triton or math"
        )
    half = dtype in (torch.bfloat16, torch.float16)
    if not half and (name != "efficient" or dtype != torch.float32):
        return f"it takes no {str(dtype).removeprefix('torch.')}: use math"
    if width % 8 or width > kernels.WIDEST[name]:
        return f"it takes heads of up to {kernels.WIDEST[name]} in steps of 8, not of {width}: use math"
    if name in ("cudnn", "triton", "efficient") and documents:
        return "it knows no documents: use flash or math"
    if name == "triton" or (name == "cudnn" and deterministic):
        return kernels.refusal(dtype, width)
    if name == "fa" and kernels.package() is None:
        return "the package flash-attn cannot be imported: use flash"
    return None


def _plain(heads: Heads, documents: Documents | None) -> Tensor:
    """By torch's own choice among its kernels."""
    new, all_tokens = heads.query.shape[2], heads.key.shape[2]
    if documents is None and new < all_tokens:
        return _masked(heads, _earlier(new, all_tokens, heads.query.device))
    if documents is None:
        return scaled_dot_product_attention(heads.query, *_expanded(heads), is_causal=new > 1)
    batch, _, sequence, _ = heads.query.shape
    place = torch.arange(batch * sequence, device=documents.bounds.device, dtype=torch.int32)
    document = torch.searchsorted(documents.bounds, place, right=True).view(batch, 1, sequence, 1)
    same = document == document.transpose(2, 3)
    return _masked(heads, same & _earlier(sequence, sequence, same.device))


def _masked(heads: Heads, mask: Tensor | None) -> Tensor:
    key, value = _expanded(heads)
    return scaled_dot_product_attention(heads.query, key, value, attn_mask=mask)


def _earlier(new: int, all_tokens: int, device: torch.device) -> Tensor:
    """Which of ``all_tokens`` keys each of the last ``new`` queries meets: bool ``[new, all_tokens]``."""
    return torch.ones(new, all_tokens, dtype=torch.bool, device=device).tril(all_tokens - new)


def _expanded(heads: Heads) -> tuple[Tensor, Tensor]:
    """Keys and values with a copy for each query head, for what does not take groups of query heads.

    SDPA's ``enable_gqa`` would take them, but falls to math where its other kernels do not.
    """
    group = heads.query.shape[1] // heads.key.shape[1]
    if group == 1:
        return heads.key, heads.value
    return heads.key.repeat_interleave(group, dim=1), heads.value.repeat_interleave(group, dim=1)
