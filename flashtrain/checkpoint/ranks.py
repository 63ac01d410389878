"""Steps that all ranks take together: either all go on or all raise the same error.

Ranks tell each other JSON, as bytes in tensors: the object collectives of torch.distributed unpickle what
a peer sends, which would let whoever reaches one rank's port run code on all of them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashtrain.errors import TransportError, UserError, first_line

# A rank that sends more than this is taken to be broken: nobody can hold that many for every rank.
_MOST_BYTES = 1 << 30


class Ranks:
    """The ranks of a process group, or this process alone when torch.distributed is not initialised.

    What an action returns must be JSON; tuples come back as lists. An action that raises does so before
    its results are exchanged, so no rank is left waiting. A UserError is raised with its message on every
    rank; any other exception is raised as it is on its own rank and as a RuntimeError that quotes it on
    the others. If several ranks fail, the lowest one counts. Raises TransportError, naming the peer, if a
    rank does not answer within the time-out of the group.
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
        peers = [rank for rank in range(self.world) if rank != self.rank]
        return self._swap(text, to=peers, source=peers)

    def _broadcast(self, text: str) -> str:
        if self.rank == 0:
            self._swap(text, to=range(1, self.world), source=[])
            return text
        return self._swap("", to=[], source=[0])[0]

    def _swap(self, text: str, to: Sequence[int], source: Sequence[int]) -> list[str]:
        """Send ``text`` to some ranks and receive one from others; by rank, this one's own included.

        Point to point, because of a collective that fails nobody can say which rank has not answered.
        """
        mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0)
        size = torch.tensor([mine.numel()], device=self._device)
        sizes = {peer: torch.zeros_like(size) for peer in source}
        self._move(size, to, sizes)
        if not all(0 < int(announced) <= _MOST_BYTES for announced in sizes.values()):
            raise TransportError(f"rank {self.rank}: checkpoint: ranks are out of step: {sizes}")
        payloads = {
            peer: torch.empty(int(announced), dtype=torch.uint8, device=self._device)
            for peer, announced in sizes.items()
        }
        self._move(mine.to(self._device), to, payloads)
        texts = {peer: payload.cpu().numpy().tobytes().decode() for peer, payload in payloads.items()}
        return [text for _, text in sorted({**texts, self.rank: text}.items())]

    def _move(self, mine: Tensor, to: Sequence[int], landing: Mapping[int, Tensor]) -> None:
        """Send ``mine [n]`` to each rank of ``to``, fill each ``landing [n]`` from its rank; wait for all."""
        peers = [*to, *landing]
        batch = [dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer) for peer in to]
        batch += [
            dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer)
            for peer, tensor in landing.items()
        ]
        peer = next(iter(peers), self.rank)
        try:
            # NCCL answers for the whole batch with one handle.
            works = dist.batch_isend_irecv(batch) if batch else []
            for awaited, work in zip(peers, works, strict=False):
                peer = awaited
                work.wait()
        except RuntimeError as error:
            reason = first_line(error)
            raise TransportError(f"rank {self.rank}: checkpoint: peer rank {peer}: {reason}") from error


def _attempt(action: Callable[[], Any]) -> tuple[str, Exception | None]:
    """What the other ranks are told, as JSON, and the error if there was one."""
    try:
        return json.dumps({"value": action()}), None
    except UserError as error:
        return json.dumps({"by_user": True, "message": str(error)}), error
    except Exception as error:
        return json.dumps({"by_user": False, "message": f"{type(error).__name__}: {error}"}), error
