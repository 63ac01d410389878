"""Tests use no network. This file must not import the guard, or it would install what it tests."""

import socket

import pytest

from tests.distributed import run_distributed


def _connect(rank: int, world: int) -> str:
    with pytest.raises(PermissionError) as caught:
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    return str(caught.value)


def test_tests_cannot_use_the_network() -> None:
    """Neither here nor in the ranks that tests start; 192.0.2.0/24 is for documentation and leads nowhere."""
    assert "must not use the network" in _connect(0, 1)
    with pytest.raises(PermissionError, match=r"look-up of example\.org"):
        socket.create_connection(("example.org", 80), timeout=1)
    with pytest.raises(PermissionError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.sendto(b"", ("192.0.2.1", 9))
    assert "192.0.2.1" in run_distributed(_connect, 1)[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "", None, b"127.0.0.1"])
def test_this_machine_is_local(host: str | bytes | None) -> None:
    from tests.offline import is_local

    assert is_local(host)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
