"""Context parallelism: each rank has a segment of the same sequences.

Segments are contiguous, in rank order, equally long. For parameters the ranks are data-parallel ones, that
see other tokens. What mixes tokens reaches beyond its segment: Mamba-2 passes states (``state_passing``),
attention gathers the keys and values of all segments and meets those up to its own segment's end (as Llama 3
was trained, arXiv 2407.21783, section 3.3.2). Causal queries of later segments meet more keys, so later ranks
have more to do. Positions are those of the whole sequence.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from flashtrain.comm import collectives, groups
from flashtrain.errors import UserError
from flashtrain.parallel.mesh import CONTEXT

if TYPE_CHECKING:

    class _Attention(nn.Module):
        """What the attention below ``SegmentAttention`` provides."""

        def extend(self, x: Tensor, rotary: Tensor, past: Any) -> Any: ...
        def _attend(self, heads: Any, documents: Any = None) -> Tensor: ...

    class _Model(nn.Module):
        """What the model below ``SegmentModel`` provides."""

        def _rotary(self, tokens: Tensor, before: int = 0) -> Tensor: ...
else:
    _Attention = _Model = object


def own_segment(tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's segment ``[B, S/W]`` of ``tokens [B, S]``; all of them without context parallelism."""
    if CONTEXT not in (mesh.mesh_dim_names or ()):
        return tokens
    return tokens.chunk(mesh[CONTEXT].size(), dim=1)[mesh[CONTEXT].get_local_rank()]


class SegmentAttention(_Attention):
    """Attention of a segment's queries; goes before the class of the attention (``GatherKeys``)."""

    context: str
    context_site: str = ""

    def extend(self, x: Tensor, rotary: Tensor, past: Any) -> Any:
        """See the class below; ``past`` must be None."""
        if past is not None:
            raise UserError("attention that gathers keys starts at the sequence's first token")
        return super().extend(x, rotary, None)

    def _attend(self, heads: Any, documents: Any = None) -> Tensor:
        if documents is not None:
            raise UserError("train.document_mask is true, but documents do not end where segments do")
        # [S, B, heads, D], as the projection lies in memory.
        key, value = (part.permute(2, 0, 1, 3) for part in (heads.key, heads.value))
        gathered = collectives.all_gather(torch.cat([key, value], dim=2), self.context, self.context_site)
        end = key.shape[0] * (groups.resolve(self.context).rank() + 1)
        key, value = gathered[:end].permute(1, 2, 0, 3).chunk(2, dim=1)
        return super()._attend(heads._replace(key=key, value=value))


class GatherKeys(ParallelStyle):
    """Have attention compute a segment's queries with keys and values of all segments before it, too."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        kind: Any = type(module)
        if not all(hasattr(kind, name) for name in ("_attend", "project")):
            raise UserError(f"GatherKeys applies to Attention, not to {kind.__name__}")
        if hasattr(kind, "passes"):
            raise UserError(
                "layers that share heads (model.sharing) need whole sequences: set parallel.context 1"
            )
        module.__class__ = type(f"Segment{kind.__name__}", (SegmentAttention, kind), {})
        cast(SegmentAttention, module).context = device_mesh.get_group().group_name
        return module


class SegmentModel(_Model):
    """A decoder of segments; goes before the decoder's class (``place``)."""

    segment: int

    def extend(self, tokens: Tensor, past: Any = None) -> Any:
        """Refused, as a segment's end is not the sequence's."""
        raise UserError("a model over segments cannot decode: load its checkpoint with parallel.context 1")

    def _rotary(self, tokens: Tensor, before: int = 0) -> Tensor:
        return super()._rotary(tokens, before + self.segment * tokens.shape[0])


def place(model: nn.Module, device_mesh: DeviceMesh) -> None:
    """Give ``model(tokens [S/W, B], ...)`` the positions of this rank's segment.

    Raises UserError for a model that is no decoder.
    """
    kind: Any = type(model)
    if not hasattr(kind, "_rotary"):
        raise UserError(f"parallel.context is of decoders, not of {kind.__name__}")
    model.__class__ = type(f"Segment{kind.__name__}", (SegmentModel, kind), {})
    cast(SegmentModel, model).segment = device_mesh.get_local_rank()


__all__ = ["GatherKeys", "own_segment", "place"]
