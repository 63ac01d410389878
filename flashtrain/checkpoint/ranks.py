"""Steps that all ranks take together: either all go on or all raise the same error.

Ranks tell each other JSON, as bytes in tensors: the object collectives of torch.distributed unpickle what
a peer sends, which would let whoever reaches one rank's port run code on all of them.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashtrain.errors import UserError

# A rank that sends more than this is taken to be broken: nobody can hold that many for every rank.
_MOST_BYTES = 1 << 30


class Ranks:
    """The ranks of a process group, or this process alone when torch.distributed is not initialised.

    What an action returns must be JSON; tuples come back as lists. An action that raises does so before
    its results are exchanged, so no rank is left waiting. A UserError is raised with its message on every
    rank; any other exception is raised as it is on its own rank and as a RuntimeError that quotes it on
    the others. If several ranks fail, the lowest one counts.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.world = dist.get_world_size(group) if self.distributed else 1
        on_cpu = not self.distributed or "cpu:" in dist.get_backend_config(group)
        self._device = torch.device("cpu" if on_cpu else "cuda")

    def every(self, action: Callable[[], Any]) -> list[Any]:
        """Run ``action`` on every rank; return what each returned, in rank order, on every rank."""
        text, error = _attempt(action)
        outcomes = [json.loads(one) for one in self._gather(text)]
        for rank, outcome in enumerate(outcomes):
            self._raise(rank, outcome, error)
        return [outcome["value"] for outcome in outcomes]

    def first(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` on rank 0 alone; return its result on every rank."""
        text, error = _attempt(action) if self.rank == 0 else ("", None)
        outcome = json.loads(self._broadcast(text))
        self._raise(0, outcome, error)
        return outcome["value"]

    def _raise(self, rank: int, outcome: dict[str, Any], error: Exception | None) -> None:
        if "message" not in outcome:
            return
        if rank == self.rank and error is not None:
            raise error
        if outcome["by_user"]:
            raise UserError(outcome["message"])
        raise RuntimeError(f"rank {rank}: {outcome['message']}")

    def _gather(self, text: str) -> list[str]:
        if not self.distributed:
            return [text]
        mine = _bytes(text)
        size = torch.tensor([mine.numel()], device=self._device)
        sizes = [torch.zeros_like(size) for _ in range(self.world)]
        dist.all_gather(sizes, size, group=self.group)
        longest = _checked(max(int(size) for size in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8, device=self._device)
        padded[: mine.numel()] = mine
        everyone = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(everyone, padded, group=self.group)
        return [_text(part[: int(size)]) for part, size in zip(everyone, sizes, strict=True)]

    def _broadcast(self, text: str) -> str:
        if not self.distributed:
            return text
        size = torch.tensor([len(text.encode())], device=self._device)
        dist.broadcast(size, group=self.group, group_src=0)
        payload = torch.empty(_checked(int(size)), dtype=torch.uint8, device=self._device)
        if self.rank == 0:
            payload.copy_(_bytes(text))
        dist.broadcast(payload, group=self.group, group_src=0)
        return _text(payload)


def _attempt(action: Callable[[], Any]) -> tuple[str, Exception | None]:
    """What the other ranks are told, as JSON, and the error if there was one."""
    try:
        return json.dumps({"value": action()}), None
    except UserError as error:
        return json.dumps({"by_user": True, "message": str(error)}), error
    except Exception as error:
        return json.dumps({"by_user": False, "message": f"{type(error).__name__}: {error}"}), error


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _text(payload: Tensor) -> str:
    return payload.cpu().numpy().tobytes().decode()


def _checked(size: int) -> int:
    if not 0 < size <= _MOST_BYTES:
        raise RuntimeError(f"a rank announced a message of {size} bytes; ranks are out of step")
    return size
