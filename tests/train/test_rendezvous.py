"""Ranks of one attempt meet under a word of their own, whatever earlier attempts have left."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from flashtrain.errors import TransportError
from flashtrain.train.rendezvous import agree


def meet(shared: dist.Store, world: int, timeout: float = 20) -> set[str]:
    clients = [dist.TCPStore("127.0.0.1", shared.port, is_master=False) for _ in range(world)]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(world) as ranks:
        words = [ranks.submit(agree, clients[rank], rank, world, timeout) for rank in range(world)]
        return {word.result() for word in words}


def test_each_attempt_has_one_word_of_its_own() -> None:
    shared = dist.TCPStore("127.0.0.1", 0, is_master=True)
    words = [meet(shared, world) for world in (3, 3, 2, 4, 1)]
    assert [len(word) for word in words] == [1] * 5
    assert len(set.union(*words)) == 5


def test_what_dead_ranks_have_left_misleads_nobody() -> None:
    """An attempt in which rank 0 died before it answered, and one in which only rank 0 came."""
    shared = dist.TCPStore("127.0.0.1", 0, is_master=True)
    for rank in (1, 2):
        with pytest.raises(TransportError, match=f"rank {rank}: rank 0 did not answer within"):
            agree(shared, rank, 3, 0.1)
    with pytest.raises(TransportError, match="rank 0: rank 1 did not join within"):
        agree(shared, 0, 3, 0.2)
    assert len(meet(shared, 3)) == 1


def test_ranks_may_come_late() -> None:
    shared = dist.TCPStore("127.0.0.1", 0, is_master=True)
    meet(shared, 2)
    words = []
    first = threading.Thread(target=lambda: words.append(agree(shared, 0, 2, 20)))
    first.start()
    first.join(0.3)
    assert first.is_alive(), "rank 0 took a token of the attempt before for an answer"
    client = dist.TCPStore("127.0.0.1", shared.port, is_master=False)
    words.append(agree(client, 1, 2, 20))
    first.join()
    assert words[0] == words[1]
