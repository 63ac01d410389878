"""Memory of the machine that the ranks of a group map together, for flags that processors and GPUs share."""

import mmap
import os
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor


class SharedPages:
    """``words [n]`` int32, zero at first, the same memory on every rank; freed with the last tensor on it.

    ``exchange`` gathers one string from every rank and is called once. Rank 0 makes an anonymous file, which
    the others open through ``/proc``. Use as a context manager and leave it when all ranks have made theirs:
    then the file has no name left. ``problem`` says why this rank could not map it, or nothing.
    """

    def __init__(self, words: int, rank: int, exchange: Callable[[str], list[str]]) -> None:
        self.words: Tensor | None = None
        self.problem = ""
        self._file = -1
        nbytes = -(-words * 4 // mmap.PAGESIZE) * mmap.PAGESIZE
        path = ""
        if rank == 0:
            try:
                self._file = os.memfd_create("flashtrain-flags", os.MFD_CLOEXEC)
                os.ftruncate(self._file, nbytes)
                path = f"/proc/{os.getpid()}/fd/{self._file}"
            except OSError as error:
                self.problem = str(error)
        path = exchange(path)[0]
        try:
            if rank != 0 and path:
                self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if path:
                memory = mmap.mmap(self._file, nbytes)
                self.words = torch.frombuffer(memory, dtype=torch.int32, count=words)
        except (OSError, ValueError) as error:
            self.problem = f"the flags of rank 0 cannot be mapped: {error}"

    def __enter__(self) -> "SharedPages":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
