"""Importing this module keeps Python code of this process, and of its forks, away from the network.

Connections to this machine itself are allowed: ranks meet there. What asks for anything else fails at once
with a message that names the address, whether or not the machine has a network.
"""

import ipaddress
import socket
import sys
from typing import Any

_OWN_NAMES = {None, "", "localhost", socket.gethostname(), socket.getfqdn()}


def is_local(host: Any) -> bool:
    """Whether ``host``, a name or an address, is this machine."""
    if host in _OWN_NAMES:
        return True
    name = host.decode() if isinstance(host, bytes) else str(host)
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        # Sockets of other families (files, the kernel) have addresses that are no tuples of host and port.
        if isinstance(address, tuple) and isinstance(address[0], str) and not is_local(address[0]):
            raise PermissionError(f"tests must not use the network: connection to {address}")
    elif event == "socket.getaddrinfo" and not is_local(arguments[0]):
        raise PermissionError(f"tests must not use the network: look-up of {arguments[0]}")


sys.addaudithook(_refuse)
