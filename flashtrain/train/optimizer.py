"""AdamW on this rank's shards, with fp32 masters, global-norm clipping, warm-up and cosine decay."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flashtrain.comm import ops
from flashtrain.errors import UserError
from flashtrain.parallel.apply import is_tensor_sharded, sum_over_tensor
from flashtrain.parallel.mesh import DATA, TENSOR


class AdamW:
    """AdamW (arXiv 1711.05101) over the local shards of a parallelised model.

    Moments, masters and accumulated gradients are fp32 tensors of the local shards' shapes. A parameter
    that is fp32 is its own master; one of a narrower dtype is rounded from its master after each step.
    Matrices decay, vectors (norm weights, biases) do not. Working on local tensors rather than DTensors
    makes one fused update of all of them possible, whatever meshes they live on.
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
        self._locals = {name: _local(p.detach()) for name, p in self.parameters.items()}
        self._masters = {
            name: shard if shard.dtype == torch.float32 else shard.float()
            for name, shard in self._locals.items()
        }
        self._gradients: dict[str, Tensor] = {}
        decaying = [m for name, m in self._masters.items() if self.parameters[name].dim() > 1]
        others = [m for name, m in self._masters.items() if self.parameters[name].dim() <= 1]
        self._adamw = torch.optim.AdamW(
            [
                {"params": decaying, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        for master in self._masters.values():
            self._adamw.state[master] = {
                "step": torch.zeros((), device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def accumulate(self) -> None:
        """Take in the gradients of one backward pass. fp32 gradients go on adding up where they are."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient = _local(parameter.grad)
            if gradient.dtype == torch.float32:
                self._gradients[name] = gradient
                continue
            if name in self._gradients:
                self._gradients[name] += gradient
            else:
                self._gradients[name] = gradient.float()
            parameter.grad = None

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """The accumulated fp32 gradients of this rank's shards, by parameter."""
        return self._gradients

    def step(
        self, learning_rate: float, update: int, accept: Callable[[float], bool] = lambda norm: True
    ) -> float:
        """Clip, update, clear the gradients; return the norm that they had before clipping.

        ``update`` counts the updates from 1 and sets the bias correction. Where ``accept`` refuses the norm,
        which is the same bits on every rank, nothing but the gradients changes. Collective over the mesh.
        """
        gradients = self._gradients
        partial = [g for name, g in gradients.items() if not is_tensor_sharded(self.parameters[name])]
        sum_over_tensor(partial, self.mesh)
        norm = self._global_norm()
        if accept(norm):
            if norm > self.config.clip_norm:
                torch._foreach_mul_(list(gradients.values()), self.config.clip_norm / norm)
            self._update(learning_rate, update)
        for parameter in self.parameters.values():
            parameter.grad = None
        self._gradients = {}
        return norm

    def _update(self, learning_rate: float, update: int) -> None:
        for name, master in self._masters.items():
            master.grad = self._gradients.get(name)
            self._adamw.state[master]["step"].fill_(update - 1)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        for name, master in self._masters.items():
            master.grad = None
            if self._locals[name] is not master:
                self._locals[name].copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Moments, and the masters where they are not the parameters; sharded like the parameters."""
        return {name: self._like(parameter, tensor) for name, parameter, tensor in self._state()}

    def _state(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, parameter in self.parameters.items():
            master = self._masters[name]
            for kind in ("exp_avg", "exp_avg_sq"):
                yield f"{name}.{kind}", parameter, self._adamw.state[master][kind]
            if self._locals[name] is not master:
                yield f"{name}.master", parameter, master

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

    def _global_norm(self) -> float:
        """Norm of all gradients of the whole model, the same bits on every rank."""
        device = next(iter(self._masters.values())).device
        squares = torch.zeros(1, 2, dtype=torch.float64, device=device)  # tensor-sharded, replicated
        for name, gradient in self._gradients.items():
            # In fp64, so that it makes no difference into which parameters a matrix is cut.
            square = torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
            squares[0, 0 if is_tensor_sharded(self.parameters[name]) else 1] += square
        for dimension in (TENSOR, DATA):
            ranks = self.mesh[dimension]
            # Over the data dimension FSDP2 has sharded every parameter.
            if ranks.size() > 1:
                everyone = ops.all_gather(squares, ranks.get_group().group_name, "gradient norm")
                squares = squares.clone()
                squares[0, 0] = everyone[:, 0].sum()
                if dimension == DATA:
                    squares[0, 1] = everyone[:, 1].sum()
        return float(squares.sum().sqrt().float())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
