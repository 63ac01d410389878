"""The host transport in a process that forks, runs out of things, handles signals, and ends."""

import ctypes
import mmap
import os
from pathlib import Path


from flashtrain.comm.transport.host import HostTransport


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
