"""The host transport in a process that forks, runs out of things, handles signals, and ends."""

import ctypes
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flashtrain.comm.schedule import all_gather
from flashtrain.comm.transport import host
from flashtrain.comm.transport.host import HostTransport
from flashtrain.errors import TransportError
from tests.comm.transport.driving import connect, drive, message
from tests.distributed import run_distributed


def _ranges(name: str) -> list[range]:
    """Addresses at which this process has ``name`` mapped."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
    ends = (line.split()[0].split("-") for line in lines)
    return [range(int(first, 16), int(last, 16)) for first, last in ends]


def test_a_forked_child_keeps_what_it_has_where_the_parent_has_a_transport() -> None:
    transport = HostTransport(0, 1, 1.0, lambda text: [text])
    shared = _ranges("memfd:flashtrain")
    assert shared
    child = os.fork()
    if child == 0:
        own = [mmap.mmap(-1, 1 << 16) for _ in range(500)]
        addresses = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in own]
        inside = [one for one, at in zip(own, addresses, strict=True) if any(at in hole for hole in shared)]
        transport.shutdown()
        del transport
        for one in inside:
            one[0] = 1  # a segmentation fault if it is no longer mapped
        os._exit(0 if inside else 1)
    assert os.waitpid(child, 0)[1] == 0
    transport.shutdown()


def _has_no_file_left(rank: int, world: int) -> None:
    transport = connect(rank, world)
    schedule = all_gather((4, 4), rank)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    else:
        time.sleep(0.3)  # longer than the waiting rank goes without a look whether this one lives
    drive(transport, schedule)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    dist.barrier()
    transport.shutdown()


def test_a_rank_that_can_open_no_file_takes_no_peer_for_dead() -> None:
    run_distributed(_has_no_file_left, 2)


def _has_no_thread_left(rank: int, world: int) -> None:
    transport = connect(rank, world)
    expect = message(1 - rank, rank)[1]
    exchange = transport.open(all_gather((4, 4), rank), "no thread")
    library, usual, vast = (
        ctypes.CDLL(None),
        ctypes.create_string_buffer(128),
        ctypes.create_string_buffer(128),
    )
    library.pthread_getattr_default_np(usual)
    library.pthread_getattr_default_np(vast)
    library.pthread_attr_setstacksize(vast, ctypes.c_size_t(1 << 47))  # as much memory as there are addresses
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert library.pthread_setattr_default_np(vast) == 0
    try:
        with pytest.raises(TransportError, match="Resource temporarily unavailable"), exchange:
            exchange.transfer(0, {}, {expect: torch.zeros(4)})
    finally:
        library.pthread_setattr_default_np(usual)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    dist.barrier()
    transport.shutdown()


def test_where_no_thread_can_be_had_signals_still_come() -> None:
    run_distributed(_has_no_thread_left, 2)


class _Interruption(RuntimeError):
    pass


def _is_interrupted(rank: int, world: int) -> None:
    transport = connect(rank, world)
    expect = message(1, 0)[1]
    if rank == 0:

        def handle(*_: object) -> None:
            raise _Interruption("a worker of the data loader has died")

        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        exchange = transport.open(all_gather((4, 4), rank), "interrupted")
        exchange.transfer(0, {}, {expect: torch.zeros(4)})
        with pytest.raises(_Interruption, match="a worker of the data loader has died"):
            exchange.wait(1, expect)
        exchange._abort()
    dist.barrier()
    transport.shutdown()


def test_what_a_signal_handler_raises_is_no_failure_of_a_peer() -> None:
    run_distributed(_is_interrupted, 2)


def test_the_interpreter_ends_while_threads_wait() -> None:
    """Threads on one processor that run when nothing else can: they leave their wait during the end."""
    script = (
        "import atexit, importlib.util, os, sys, threading, time\n"
        "spec = importlib.util.spec_from_file_location('_core', sys.argv[1])\n"
        "core = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(core)\n"
        "first, second = (core.HostTransport(rank, 2, 4096) for rank in range(2))\n"
        "first.connect(1, second.address); second.connect(0, first.address); first.start()\n"
        "request = first.receive(first.open('end'), 0, 1, 0, 0, 0, 0)\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "threading.excepthook = lambda _: None\n"
        "def waits():\n"
        "    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
        "    first.wait(request, 60)\n"
        "class Late:\n"
        "    def __del__(self, sleep=time.sleep): sleep(0.1)\n"
        "late = Late()\n"
        "[threading.Thread(target=waits, daemon=True).start() for _ in range(60)]\n"
        "time.sleep(0.1)\n"
        "atexit.register(first.shutdown)\n"
        "sys.setswitchinterval(100)\n"
    )
    for _ in range(4):  # any may be the one in which a thread is late
        command = [sys.executable, "-S", "-c", script, host._core.__file__]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
