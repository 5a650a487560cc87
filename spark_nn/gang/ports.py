"""A port for a framework's own server, which asks nobody who they are and often listens on every address there is.

The port is taken before the server starts, and shared with it alone. On the machine's other addresses, and on all but
loopback where the whole gang is on one machine, sockets of ours listen on the same port behind a filter that lets
nothing through: the kernel hands a connection to the socket with the nearer address, so none gets past them to a server
that listens everywhere.
"""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import socket
import struct
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"

_SO_ATTACH_FILTER = 26
_DROP = struct.pack("HBBI", 6, 0, 0, 0)  # a filter of one instruction: take no byte of any packet
_SIOCGIFADDR = 0x8915
_ATTEMPTS = 20


class Port:
    """A port that is kept for a server of this process until it is closed.

    Parameters
    ----------
    host : str
        The address of this machine to be reached at, in numbers (see :func:`numeric`).

    Attributes
    ----------
    number : int
        The port.
    """

    def __init__(self, host: str) -> None:
        ipaddress.ip_address(host)  # by a name its own address would not be known from the others
        self.host = host
        self._guards: list[socket.socket] = []
        for attempt in range(_ATTEMPTS):
            self._kept = _bound(host, 0)
            self.number = int(self._kept.getsockname()[1])
            try:
                for address in local_addresses():
                    if address[0] != host and not _is_loopback(address[0]):
                        self._guards.append(_guard(address, self.number))
            except OSError:  # somebody has this port on another address
                self.close()
                if attempt == _ATTEMPTS - 1:
                    raise
                continue
            return

    @property
    def address(self) -> str:
        """Where others reach it, as ``host:port``."""
        return f"[{self.host}]:{self.number}" if ":" in self.host else f"{self.host}:{self.number}"

    def listening(self) -> socket.socket:
        """The socket itself, for a server that takes one; it listens."""
        self._kept.listen(128)
        return self._kept

    def close(self) -> None:
        """Give the port back."""
        for each in (self._kept, *self._guards):
            each.close()
        self._guards = []


def local_addresses() -> list[tuple[Any, ...]]:
    """The addresses of this machine as ``bind`` takes them, with port 0; none on systems other than Linux."""
    found: list[tuple[Any, ...]] = []
    with suppress(OSError):
        lines = Path("/proc/net/fib_trie").read_text().splitlines()
        for before, line in pairwise(lines):
            if line.strip() == "/32 host LOCAL" and (address := (before.split()[-1], 0)) not in found:
                found.append(address)
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, index = line.split()[:2]
            name = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
            found.append((name, 0, 0, int(index, 16)))
    return found


def numeric(host: str) -> str:
    """The address, in numbers, that a name of a machine leads to."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def interface_of(host: str) -> str | None:
    """Name of the network interface that has an IPv4 address, None where it is not to be found."""
    if _is_loopback(host) and sys.platform == "linux":
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == host:
                    return name
    return None


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"


def _bound(host: str, port: int, *rest: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if ":" in host:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port, *rest))
    except BaseException:
        sock.close()
        raise
    return sock


def _guard(address: tuple[Any, ...], port: int) -> socket.socket:
    """A socket that keeps strangers from whoever listens on this port of every address."""
    host, _, *rest = address
    sock = _bound(host, port, *rest)
    try:
        program = ctypes.create_string_buffer(_DROP)
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program)))
        sock.listen(1)
    except BaseException:
        sock.close()
        raise
    return sock
