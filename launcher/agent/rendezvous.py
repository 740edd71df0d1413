"""The store's address: sockets on rank 0's host, and proof by the other hosts that they can be dialled.

The port is never guessed: the socket that was dialled is the very one that the store then serves. Standard library
only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable
from pathlib import Path

BACKLOG = 4096
RELEASE_TIMEOUT_S = 1.0
_SIOCGIFADDR = 0x8915


def open_listener(address: str, port: int) -> socket.socket:
    """Bind `address` alone (the store is unauthenticated: it must not listen where nobody of ours is).

    A fixed port may still be held for a moment by the store of the attempt before, which has just been killed.
    """
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while True:
        try:
            return _listen(address, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _listen(address: str, port: int) -> socket.socket:
    family, _, _, _, sockaddr = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(sockaddr)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def answer(listener: socket.socket, token: str) -> None:
    """Tell every caller that has dialled `listener` who we are."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.sendall(token.encode())


def dial(addresses: Iterable[tuple[str, int]], token: str, timeout_s: float) -> tuple[dict[str, str], dict[str, str]]:
    """Try all addresses at once; return the local interface by which each answered, and the errors of the rest."""
    interfaces: dict[str, str] = {}
    errors: dict[str, str] = {}

    def attempt(address: str, port: int) -> None:
        try:
            interfaces[address] = _dial_one(address, port, token, timeout_s)
        except OSError as error:
            errors[address] = error.strerror or str(error)

    threads = [threading.Thread(target=attempt, args=pair, daemon=True) for pair in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return interfaces, errors


def _dial_one(address: str, port: int, token: str, timeout_s: float) -> str:
    """The interface. The token matters: behind the same private address another machine may listen."""
    expected, found = token.encode(), b""
    with socket.create_connection((address, port), timeout=timeout_s) as connection:
        while len(found) < len(expected):
            part = connection.recv(len(expected) - len(found))
            if not part:
                break
            found += part
        if found != expected:
            raise OSError("another program answers there")
        return interface_of(connection.getsockname()[0])


def interface_of(address: str) -> str:
    """The name of the interface that has this local address; "" when none has."""
    if address.startswith("127.") or address == "::1":
        return "lo"
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        with contextlib.suppress(OSError):
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                fields = line.split()
                if fields[0] == packed:
                    return fields[5]
        return ""
    return {found: name for name, found in _ipv4_addresses()}.get(address, "")


def candidate_addresses() -> list[str]:
    """Where other hosts may find this one, best first: as SSH found us, then every interface that is not loopback."""
    found = []
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if len(connection) == 4:
        found.append(connection[2].removeprefix("::ffff:"))
    virtual = ("docker", "veth", "virbr", "br-", "cni", "flannel", "tun", "tap")
    own = [item for item in _ipv4_addresses() if not item[1].startswith("127.")]
    found += [address for _, address in sorted(own, key=lambda item: item[0].startswith(virtual))]
    return list(dict.fromkeys(found))


def _ipv4_addresses() -> list[tuple[str, str]]:
    """(interface, address) of every interface that has an IPv4 address."""
    result = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                result.append((name, socket.inet_ntoa(reply[20:24])))
    return result
