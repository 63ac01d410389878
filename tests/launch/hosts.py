"""Two hosts on one machine: each with its own network, process numbers and name, joined by one cable.

Made of Linux namespaces by unshare and nsenter (util-linux) and pyroute2; a user who is not root gets them
inside a user namespace, where the kernel allows that.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

NAMES = ("node0", "node1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")

_CABLE = """
import sys
from pyroute2 import IPRoute
with IPRoute() as net:
    net.link("add", ifname="eth0", kind="veth", peer={"ifname": "eth0", "net_ns_pid": int(sys.argv[1])})
"""
_PLUG = """
import socket, sys
from pyroute2 import IPRoute
address, name = sys.argv[1:]
socket.sethostname(name)
with IPRoute() as net:
    (card,), (loop,) = net.link_lookup(ifname="eth0"), net.link_lookup(ifname="lo")
    net.addr("add", index=card, address=address, prefixlen=24)
    net.link("set", index=loop, state="up")
    net.link("set", index=card, state="up")
"""
_SWITCH = """
import sys
from pyroute2 import IPRoute
with IPRoute() as net:
    net.link("set", index=net.link_lookup(ifname="eth0")[0], state=sys.argv[1])
"""


class NamespacesForbidden(Exception):
    """The kernel, or a container around this process, allows no namespaces."""


class Hosts:
    """The two hosts, alive inside ``with``; leaving it kills whatever runs on them."""

    def __enter__(self) -> "Hosts":
        self._user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
        self._holders: list[subprocess.Popen[Any]] = []
        try:
            self._pids = [self._start()]
            # Both networks must belong to one user namespace for a cable between them.
            inside = ["nsenter", "--target", str(self._pids[0]), "--user", "--preserve-credentials"]
            self._pids.append(self._start(inside if self._user else []))
            self._names = tempfile.NamedTemporaryFile("w", suffix=".hosts")
            self._names.write("127.0.0.1 localhost\n")
            self._names.writelines(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True))
            self._names.flush()
            self._python(0, _CABLE, str(self._pids[1]), parts=("--net",))
            for host, (address, name) in enumerate(zip(ADDRESSES, NAMES, strict=True)):
                self._python(host, _PLUG, address, name, parts=("--net", "--uts"))
                bind = ["mount", "--bind", self._names.name, "/etc/hosts"]
                subprocess.run([*self._enter(host, ("--mount",)), *bind], check=True, timeout=60)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for holder in self._holders:
            for process in _below(holder):
                # Killing the first process of a namespace kills all the others in it.
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            holder.kill()
            holder.wait()

    def command(self, host: int, words: list[str]) -> list[str]:
        """``words`` as a command line that runs on ``host``."""
        return [*self._enter(host, ("--net", "--uts", "--pid", "--mount")), *words]

    def cut(self) -> None:
        """Pull the cable out: packets vanish, and nobody is told."""
        self._python(1, _SWITCH, "down", parts=("--net",))

    def mend(self) -> None:
        self._python(1, _SWITCH, "up", parts=("--net",))

    def _start(self, inside: list[str] | None = None) -> int:
        """Start what holds a host's namespaces; its first process, by the number that it has here."""
        new = [] if inside else self._user
        namespaces = ["--net", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
        holder = subprocess.Popen(
            [*(inside or []), "unshare", *new, *namespaces, "sleep", "infinity"],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._holders.append(holder)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if holder.poll() is not None:
                raise NamespacesForbidden(holder.stderr.read().strip() if holder.stderr else "")
            for child in _below(holder):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.name() == "sleep":
                        return child.pid
            time.sleep(0.02)
        raise AssertionError("the namespaces did not come up")

    def _enter(self, host: int, parts: tuple[str, ...]) -> list[str]:
        user = ["--user", "--preserve-credentials"] if self._user else []
        return ["nsenter", "--target", str(self._pids[host]), *user, *parts]

    def _python(self, host: int, program: str, *words: str, parts: tuple[str, ...]) -> None:
        done = subprocess.run(
            [*self._enter(host, parts), sys.executable, "-c", program, *words],
            capture_output=True, text=True, timeout=60, cwd=Path("/"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def _below(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """The processes that ``process`` and those below it have started."""
    try:
        return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    except psutil.NoSuchProcess:
        return []
