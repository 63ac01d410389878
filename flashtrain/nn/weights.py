"""Weights as a mixer computes with them: the share that is here, and what is made of them once a pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class OwnWeights(nn.Module):
    """A base of mixers whose weights are put together, or turned into others, before they are used.

    While ``one_pass`` is open each such value is computed once and its gradient, summed over the pieces, goes
    back once. Outside of it every use computes it anew: weights change between passes.
    """

    _found: dict[str, Tensor] | None = None

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Open for all the pieces of one forward pass."""
        self._found = {}
        try:
            yield
        finally:
            self._found = None

    def _own(self, name: str) -> Tensor:
        """A parameter ``own`` or ``owner.own``, or the share of it that is computed with here."""
        # As get_parameter finds it, which takes microseconds, and a pass reads many.
        owner, _, own = name.rpartition(".")
        module: Any = getattr(self, owner) if owner else self
        parameter: Tensor = module._parameters[own]
        return parameter

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if self._found is None:
            return compute()
        if name not in self._found:
            self._found[name] = compute()
        return self._found[name]
