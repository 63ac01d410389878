"""AdamW on this rank's shards, with fp32 masters, global-norm clipping, warm-up and cosine decay."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flashtrain.comm import collectives
from flashtrain.errors import UserError
from flashtrain.kernels.adamw.op import optimizer
from flashtrain.kernels.adamw.slot import Hyperparameters, Slot
from flashtrain.kernels.weight_gradient import WeightGradient, add_each
from flashtrain.nn.linear import Linear
from flashtrain.parallel.apply import sum_over_tensor, tensor_sharded
from flashtrain.parallel.mesh import TENSOR, token_ranks


class AdamW:
    """AdamW (arXiv 1711.05101) over the local shards of a parallelised model.

    Moments, masters and accumulated gradients are fp32 tensors of the local shards' shapes. A parameter
    that is fp32 is its own master; one of a narrower dtype is rounded from its master in each step, and the
    products that make its gradient add it up in fp32 (``main_grad``), except under FSDP2, whose reduced
    gradients are of the parameter's dtype and stay so if they are of one pass. Matrices decay, vectors (norm
    weights, biases) do not. Working on local tensors rather than DTensors makes one fused update of all of
    them possible, whatever meshes they live on.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """``warmup`` in steps; ``final_share`` is the last learning rate over the peak ``learning_rate``."""

        learning_rate: float = 3e-4
        warmup: int = 100
        final_share: float = 0.1
        weight_decay: float = 0.1
        beta1: float = 0.9
        beta2: float = 0.95
        epsilon: float = 1e-8
        clip_norm: float = 1.0

        def validate(self) -> None:
            for name in ("learning_rate", "clip_norm", "epsilon"):
                if not getattr(self, name) > 0:
                    raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must be above 0")
            for name in ("learning_rate", "epsilon", "final_share", "weight_decay"):
                if getattr(self, name) == math.inf:
                    raise UserError(f"optimizer.{name} is inf; it must be finite")
            for name in ("warmup", "final_share", "weight_decay", "beta1", "beta2"):
                if not getattr(self, name) >= 0:
                    raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must not be negative")
            for name in ("beta1", "beta2"):
                if not getattr(self, name) < 1:
                    raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must be below 1")

        def learning_rate_at(self, step: int, steps: int) -> float:
            """Learning rate of ``step`` in 1..steps: linear warm-up, then half a cosine."""
            if step <= self.warmup:
                return self.learning_rate * step / self.warmup
            progress = (step - self.warmup) / max(1, steps - self.warmup)
            cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
            return self.learning_rate * (self.final_share + (1.0 - self.final_share) * cosine)

    def __init__(self, model: nn.Module, mesh: DeviceMesh, config: Config) -> None:
        self.config, self.mesh = config, mesh
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Of what ranks of the tensor dimension hold parts, each adds its own to the norm: these come first.
        self._sharded = tensor_sharded(model)
        sharded = [name for name in self.parameters if name in self._sharded]
        self._order = [*sharded, *(name for name in self.parameters if name not in self._sharded)]
        self._slots = {name: _slot(self.parameters[name]) for name in self._order}
        self._kernels = optimizer(list(self._slots.values()), len(sharded))
        self._main: dict[str, WeightGradient] = {}
        # Else gradients belong to FSDP2, which reduces them in the weights' dtype.
        if token_ranks(mesh).size() == 1:
            self._main = main_gradients(model, self.parameters)
        self._gradients: dict[str, Tensor] = {}

    def accumulate(self) -> None:
        """Take in the gradients of one backward pass. fp32 gradients go on adding up where they are."""
        narrow: dict[WeightGradient, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient = _local(parameter.grad)
            if gradient.dtype == torch.float32:
                self._gradients[name] = gradient
                continue
            if name in self._main:
                narrow[self._main[name]] = gradient
            elif name in self._gradients:
                self._gradients[name] = self._gradients[name].float().add_(gradient)
            else:
                self._gradients[name] = gradient  # the update reads it as it is
            parameter.grad = None
        add_each(narrow)
        self._gradients |= {name: main.total for name, main in self._main.items() if main.filled}

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """The accumulated gradients of this rank's shards, by parameter: fp32, or else of one pass."""
        return self._gradients

    def step(self, learning_rate: float, update: int, limit: float = sys.float_info.max) -> Tensor:
        """Clip, update, clear the gradients; the norm that they had before clipping, an fp64 scalar.

        ``update`` counts the updates from 1 and sets the bias correction. Where the norm, the same bits on
        every rank, is above ``limit`` or not finite, nothing but the gradients changes. On a GPU that is
        decided there, and the host does not wait. Collective over the mesh.
        """
        replicated = {name: g for name, g in self._gradients.items() if name not in self._sharded}
        if self.mesh[TENSOR].size() > 1:
            replicated = {name: gradient.float() for name, gradient in replicated.items()}
            sum_over_tensor(list(replicated.values()), self.mesh)
            self._gradients |= replicated
        gradients = [self._contiguous(name) for name in self._order]
        norm = self._global_norm(self._kernels.squares(gradients))
        accepted = norm <= min(limit, sys.float_info.max)
        factor = torch.where(norm > self.config.clip_norm, self.config.clip_norm / norm, 1.0)
        self._kernels.update(gradients, factor, accepted, self._values(learning_rate, update))
        for parameter in self.parameters.values():
            parameter.grad = None
        for main in self._main.values():
            main.clear()
        self._gradients = {}
        return norm

    def _contiguous(self, name: str) -> Tensor | None:
        gradient = self._gradients.get(name)
        return None if gradient is None else gradient.contiguous()

    def _values(self, learning_rate: float, update: int) -> Hyperparameters:
        config = self.config
        return Hyperparameters(
            rate=learning_rate,
            beta1=config.beta1,
            beta2=config.beta2,
            epsilon=config.epsilon,
            decay=config.weight_decay,
            update=update,
        )

    def set_to_means(self, means: Mapping[str, Sequence[str]]) -> None:
        """Set parameters, by name, to the means of others of the same shape and sharding; moments stay.

        Masters are added in the order given and divided once, so ranks need nothing of each other and the
        bits are those of any mesh; weights are rounded from them. Data parallelism must hold no gathered
        weights meanwhile.
        """
        found: dict[str, Tensor] = {}
        for name, (first, *others) in means.items():
            total = self._slots[first].master.clone()
            for other in others:
                total += self._slots[other].master
            found[name] = total / (1 + len(others))
        for name, mean in found.items():
            slot = self._slots[name]
            slot.master.copy_(mean)
            if slot.weight is not slot.master:
                slot.weight.copy_(mean)

    def state(self) -> dict[str, Tensor]:
        """Moments, and the masters where they are not the parameters; sharded like the parameters."""
        return {name: self._like(parameter, tensor) for name, parameter, tensor in self._state()}

    def _state(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, parameter in self.parameters.items():
            slot = self._slots[name]
            yield f"{name}.exp_avg", parameter, slot.mean
            yield f"{name}.exp_avg_sq", parameter, slot.variance
            if slot.weight is not slot.master:
                yield f"{name}.master", parameter, slot.master

    @staticmethod
    def _like(parameter: Tensor, local: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            return local
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def _global_norm(self, squares: Tensor) -> Tensor:
        """Norm of all gradients of the whole model, the same bits on every rank.

        ``squares [2]``: of the tensor-sharded and of the replicated gradients of this rank.
        """
        squares = squares.view(1, 2)
        for ranks, sharded in ((self.mesh[TENSOR], False), (token_ranks(self.mesh), True)):
            # Over the ranks that see other tokens FSDP2 has sharded every parameter.
            if ranks.size() > 1:
                everyone = collectives.all_gather(squares, ranks.get_group().group_name, "gradient norm")
                squares = squares.clone()
                squares[0, 0] = everyone[:, 0].sum()
                if sharded:
                    squares[0, 1] = everyone[:, 1].sum()
        # Rounded, so that the order in which squares were added makes no difference.
        return squares.sum().sqrt().float().double()


def _slot(parameter: Tensor) -> Slot:
    weight = _local(parameter.detach())
    master = weight if weight.dtype == torch.float32 else weight.float()
    moments = torch.zeros_like(master), torch.zeros_like(master)
    # Matrices decay, vectors do not.
    return Slot(weight, master, *moments, decays=parameter.dim() > 1)


def main_gradients(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, WeightGradient]:
    """Give each of ``parameters`` narrower than fp32 a ``main_grad``: an fp32 sum of its gradients.

    What reads it adds its products to it; gradients that still come through autograd, in the parameter's
    dtype, are added by ``accumulate``. Plain linear layers of ``model`` become ones that read it.
    """
    given: dict[str, WeightGradient] = {}
    for name, parameter in parameters.items():
        local = _local(parameter.detach())
        if local.dtype in (torch.bfloat16, torch.float16):
            given[name] = parameter.main_grad = WeightGradient(local)  # type: ignore[attr-defined]
    for module in model.modules():
        if given and type(module) is nn.Linear:
            module.__class__ = Linear
    return given


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
