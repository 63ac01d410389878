"""Where the ranks of one attempt of a run meet."""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from flashtrain.errors import TransportError

_POLL = 0.02  # seconds


def agent_store(timeout: float) -> dist.Store | None:
    """A store for the ranks of this attempt alone; None where torchrun's agent keeps none for its workers.

    Collective over the ranks that torchrun started. torchrun lets the workers of all attempts share one
    store (torch 2.6 and later), where a restarted rank may read the addresses of ranks that are dead, so it
    joins them under a prefix that rank 0 has just made up. A restart count would not do: each host's agent
    has its own. ``timeout`` is in seconds; raises TransportError when it is over and ranks are missing.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    patience = timedelta(seconds=timeout)
    shared = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience
    )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return dist.PrefixStore(agree(shared, rank, world, timeout), shared)


def agree(shared: dist.Store, rank: int, world: int, timeout: float) -> str:
    """A word that is new and the same for all ranks that call this now, over a store with old entries.

    Rank r leaves a token of its own, rank 0 answers each token with the word, and r acknowledges the word.
    Whatever an earlier attempt has left is a token that nobody waits for, or an answer to one.
    ``timeout`` is in seconds; raises TransportError, naming a missing rank, when it is over.
    """
    deadline = time.monotonic() + timeout
    if rank != 0:
        token = uuid.uuid4().hex
        shared.set(f"join/{rank}", token)
        try:
            shared.wait([f"answer/{token}"], timedelta(seconds=timeout))
        except dist.DistStoreError as error:
            raise TransportError(f"rank {rank}: rank 0 did not answer within {timeout:g} s") from error
        word = _read(shared, f"answer/{token}")
        shared.set(f"acknowledged/{word}/{rank}", "")
        return word
    word, answered, missing = f"attempt-{uuid.uuid4().hex}", dict[int, str](), list(range(1, world))
    while missing:
        for peer in missing:
            if shared.check([f"join/{peer}"]) and (token := _read(shared, f"join/{peer}")) != answered.get(
                peer
            ):
                shared.set(f"answer/{token}", word)
                answered[peer] = token
        missing = [peer for peer in missing if not shared.check([f"acknowledged/{word}/{peer}"])]
        if missing and time.monotonic() > deadline:
            raise TransportError(f"rank 0: rank {missing[0]} did not join within {timeout:g} s")
        if missing:
            time.sleep(_POLL)
    return word


def _read(store: dist.Store, key: str) -> str:
    value: str | bytes = store.get(key)  # bytes, whatever torch's stubs say
    return value if isinstance(value, str) else value.decode()
