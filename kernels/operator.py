"""Operators of torch's dispatcher that eager code calls past it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# With these alone nobody but a mode or a transform can want to see the call.
_PLAIN = frozenset({Tensor, Parameter, int, float, bool, list, tuple, type(None)})


class Operator:
    """A function that launches kernels, of a tensor and more, and the operator ``name`` that stands for it.

    ``traced`` is the operator, for what has to see one: compilers, tensors with a class of their own or
    without data, modes (as that of selective checkpoints) and transforms. In eager code the dispatcher's
    layers in Python would cost more than the kernels often do, so the function is called at once there,
    inside one autograd function where it has a gradient. Results are the same bits.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.traced = torch.library.custom_op(name, run, mutates_args=())
        self._run = run
        self._apply: Callable[..., Any] | None = None
        self.__doc__ = run.__doc__

    def __call__(self, *given: Any) -> Any:
        if torch.compiler.is_compiling() or seen(given):
            return self.traced(*given)
        if not torch.is_grad_enabled():
            return self._run(*given)
        # Without a gradient of its own it is for torch to say so, in a second derivative.
        return self.traced(*given) if self._apply is None else self._apply(*given)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Decorator: ``fake`` gives outputs of the same layout without computing them."""
        self.traced.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As of ``torch.library.custom_op``: both must be traceable."""
        self.traced.register_autograd(backward, setup_context=setup_context)
        run = self._run

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *given: Any) -> Any:
                output = run(*given)
                setup_context(ctx, given, output)
                return output

        Direct.backward = staticmethod(backward)  # type: ignore[method-assign]
        self._apply = Direct.apply


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: the function as operator ``name``; it mutates nothing, and no output is part of an input."""
    return lambda run: Operator(name, run)


def seen(given: tuple[Any, ...]) -> bool:
    """Whether more than the eager code that has these arguments wants to see a call: see ``Operator``."""
    return (
        not _PLAIN.issuperset(map(type, given))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or given[0].is_meta
    )
