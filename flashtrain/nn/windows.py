"""Which tokens of a block go to attention, and which to the SSM: FlowHN's routing (arXiv 2505.19472).

Attention gets one window of the sequence, the SSM the rest in order. Where the window lies is a function
of the depth and of the sequence's length, not of the data.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flashtrain.errors import UserError

Strategy = Literal["none", "alternating", "fixed", "circulating"]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows of attention by depth and length; edges are multiples of ``align``.

    ``alternating``: the second half in even blocks, the first in odd ones. ``fixed``: the first or last
    part. ``circulating``: from the last part of block 0 to the first and round again. Its windows are
    ``even``, at least three and evenly spaced, which may overlap: as each block has the same share of
    tokens and the borders move, every token reaches all later ones after three blocks. Or ``disjoint``: then
    the last window takes what is left, and for shares of a half and more the two parts never meet.
    """

    strategy: Strategy
    side: Literal["first", "last"] = "first"
    steps: Literal["even", "disjoint"] = "even"
    align: int = 128

    def window(self, layer: int, tokens: int, share: float) -> tuple[int, int]:
        """``(a0, a1)``: attention of block ``layer`` has the tokens a0 to a1-1 of ``tokens``.

        ``share`` is the part of the tokens that it should have. Raises UserError where multiples of
        ``align`` leave one of the two branches none, though its share is not zero.
        """
        if self.strategy == "none":
            return 0, tokens
        width = self._width(tokens, 0.5 if self.strategy == "alternating" else share)
        if width in (0, tokens):
            return 0, width
        match self.strategy:
            case "alternating":
                return (width, tokens) if layer % 2 == 0 else (0, width)
            case "fixed":
                return (0, width) if self.side == "first" else (tokens - width, tokens)
        if self.steps == "disjoint":
            count = math.ceil(tokens / width)
            place = (count - 1 - layer) % count
            return place * width, tokens if place == count - 1 else (place + 1) * width
        count = max(3, math.ceil(1 / share - 1e-9))
        place = (count - 1 - layer) % count
        start = self._aligned((tokens - width) * place / (count - 1))
        return start, start + width

    def _width(self, tokens: int, share: float) -> int:
        if tokens % self.align:
            raise UserError(
                f"{tokens} tokens are no multiple of model.layout.align {self.align}: choose another"
            )
        width = self._aligned(share * tokens)
        if (width == 0) != (share == 0) or (width == tokens) != (share == 1):
            raise UserError(
                f"attention's share {share:.3g} of {tokens} tokens, in steps of model.layout.align "
                f"{self.align}, is {width}, which leaves one branch no token: lower model.layout.align"
            )
        return width

    def _aligned(self, tokens: float) -> int:
        return round(tokens / self.align) * self.align


def balanced_share(attention: Callable[[int], float], ssm: Callable[[int], float], tokens: int) -> float:
    """The share of ``tokens`` at which both branches cost the same, to one token.

    ``attention(n)`` and ``ssm(n)`` are the FLOPs of one token among n. With ``w`` tokens for attention it
    solves ``w · attention(w) = (tokens - w) · ssm(tokens - w)``, by bisection: the left side grows with w,
    the right side falls.
    """

    def surplus(width: int) -> float:
        rest = tokens - width
        return width * attention(max(width, 1)) - rest * ssm(max(rest, 1))

    below, above = 0, tokens
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if surplus(middle) < 0 else (below, middle)
    return above / tokens
