"""Ranks as threads, each with a GPU made of threads: see ``csrc/tests/fake_driver.cpp``.

Work on a fake stream runs later, as on a GPU: a test issues copies to it, looks at the results when it has
synchronised, and never touches tensors from the host in between.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.comm.transport.messages import clear_flags
from flashtrain.comm.transport.nvlink import NvlinkTransport
from flashtrain.comm.transport.symmetric import SymmetricBuffer

SOURCE = Path(__file__).resolve().parents[3] / "csrc" / "tests" / "fake_driver.cpp"


@cache
def driver() -> str:
    """Path of the fake driver, compiled at first use."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None and os.environ.get("FLASHTRAIN_REQUIRE_EXT", "0") in ("", "0"):
        pytest.skip("there is no C++ compiler")
    assert compiler is not None, "FLASHTRAIN_REQUIRE_EXT is set, but there is no C++ compiler"
    library = Path(tempfile.mkdtemp(prefix="flashtrain-fake-driver-")) / "libcuda.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    return str(library)


@cache
def _library() -> Any:
    library = ctypes.CDLL(driver())
    library.fake_stream.restype = ctypes.c_void_p
    library.fake_copy.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64]
    library.fake_function.restype = ctypes.c_void_p
    for name in ("fake_write", "fake_await"):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32]
    for name in ("fake_begin_capture", "fake_end_capture", "fake_replay", "fake_follow"):
        getattr(library, name).argtypes = [ctypes.c_void_p] * (1 + (name in ("fake_replay", "fake_follow")))
    library.fake_end_capture.restype = ctypes.c_void_p
    for name in ("fake_sleep", "fake_synchronize"):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_uint32][: 1 + (name == "fake_sleep")]
    return library


# A driver keeps memory that a peer has mapped, and an allocator what a stream still works on; threads would
# crash on it.
_mapped: list[Any] = []


def delay(microseconds: int, slowness: int = 1) -> None:
    """Let every entry of every stream begin late by a random time up to ``microseconds``.

    On the streams of copy engines, and in some kernels, by up to ``slowness`` times as much.
    """
    _library().fake_delay(microseconds, slowness)


def function(name: str) -> int:
    """Handle of a kernel in miniature, as of one that somebody else has loaded."""
    handle: int = _library().fake_function(name.encode())
    return handle


class Stream:
    """What a rank computes on."""

    def __init__(self) -> None:
        self.handle: int = _library().fake_stream()

    def copy(self, to: Tensor, source: Tensor) -> None:
        assert to.nbytes == source.nbytes
        assert to.is_contiguous()
        assert source.is_contiguous()
        _library().fake_copy(self.handle, to.data_ptr(), source.data_ptr(), to.nbytes)

    def write(self, address: int, value: int) -> None:
        _library().fake_write(self.handle, address, value)

    def await_word(self, address: int, value: int) -> None:
        _library().fake_await(self.handle, address, value)

    def sleep(self, microseconds: int) -> None:
        _library().fake_sleep(self.handle, microseconds)

    @contextmanager
    def capture(self) -> Iterator["Graph"]:
        """What the stream is given meanwhile becomes the graph."""
        graph = Graph()
        _library().fake_begin_capture(self.handle)
        try:
            yield graph
        finally:
            graph.handle = _library().fake_end_capture(self.handle)
        assert graph.handle is not None, "a stream was not joined"

    def follow(self, earlier: "Stream") -> None:
        _library().fake_follow(self.handle, earlier.handle)

    def replay(self, graph: "Graph") -> None:
        _library().fake_replay(graph.handle, self.handle)

    def synchronize(self) -> None:
        _library().fake_synchronize(self.handle)


class Graph:
    """What was captured; it lives for ever."""

    handle: int | None = None


class Ranks:
    """``world`` ranks of one process that share memory and agree at a barrier."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world)
        self.board: list[Any] = [None] * world

    def exchange(self, rank: int, own: Any) -> list[Any]:
        self.board[rank] = own
        self.barrier.wait(60)
        everyone = list(self.board)
        self.barrier.wait(60)
        return everyone

    def words(self) -> int:
        """Of one table of flags."""
        words: int = import_module("flashtrain._core").flag_table_words(self.world)
        return words

    def allocate(self, rank: int, nbytes: int) -> SymmetricBuffer:
        memory = torch.full((nbytes,), 0xEE, dtype=torch.uint8)
        _mapped.append(memory)
        return SymmetricBuffer(memory, tuple(self.exchange(rank, memory.data_ptr())))

    def connect(self, rank: int, stream: Stream, timeout: float = 30.0, **options: Any) -> NvlinkTransport:
        def allocate(nbytes: int) -> SymmetricBuffer:
            return self.allocate(rank, nbytes)

        last = options.pop("flags", options.get("epoch", 0))
        words = self.words()
        table = allocate(words * 4)
        clear_flags(table.memory.view(torch.int32), self.world, last)
        host_tables = torch.empty(self.world * words, dtype=torch.int32)
        _mapped.append(host_tables)
        clear_flags(host_tables, self.world, last)
        host_tables = self.exchange(rank, host_tables)[0]
        return NvlinkTransport(
            rank,
            self.world,
            timeout,
            host_tables=host_tables,
            device_table=table,
            allocate=allocate,
            exchange=lambda text: self.exchange(rank, text),
            quiesce=stream.synchronize,
            stream=lambda: stream.handle,
            **{"arena_bytes": 1 << 30, "driver": driver(), **options},
        )

    def run(self, main: Callable[[int, "Ranks"], Any]) -> list[Any]:
        """Call ``main(rank, self)`` in a thread a rank; return the results, raise the first failure."""
        results: list[Any] = [None] * self.world
        failures: list[BaseException] = []

        def thread(rank: int) -> None:
            try:
                results[rank] = main(rank, self)
            except BaseException as error:
                failures.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(self.world)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(120)
            assert not one.is_alive(), "a rank hangs"
        if failures:
            raise next((e for e in failures if not isinstance(e, threading.BrokenBarrierError)), failures[0])
        return results
