"""The SSH transport on paramiko: one connection and one channel per host, bastions shared.

Host keys are checked against the user's known_hosts, and what is unknown, changed or revoked is refused: `dstrain
hosts trust` pins a key on purpose. Agent and X11 forwarding are never asked for. Every wait has a timeout.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import paramiko

from dstrain.launcher.hostfile import Host
from dstrain.launcher.transport import ConnectOptions
from dstrain.launcher.transport.known_hosts import (
    RefuseUnknown,
    UnknownKeyError,
    fingerprint,
    is_revoked,
    load_known_keys,
)
from dstrain.launcher.transport.local import COMPLAINT_BYTES
from dstrain.launcher.transport.proxy_command import ProgramStream, open_program
from dstrain.launcher.transport.ssh_config import SshTarget, resolve
from dstrain.runtime.spec.errors import AuthenticationError, HostError, HostKeyError, UnreachableError

WINDOW_BYTES = 16 << 20
PACKET_BYTES = 1 << 17
NO_STATUS = -1  # what a channel has before, or without, an exit status
KEEPALIVE_S = 15
IDLE_WAKE_S = 5.0  # paramiko's reader looks up ten times a second by default: half the cost of a quiet job
TRANSPORT_END_S = 0.5  # between the end of a channel and the end of the connection that broke it
FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")  # one pass in C instead of cipher and HMAC

Stream = socket.socket | paramiko.Channel  # a Channel of a bastion's has what a Transport needs of a socket


class ParamikoConnection:
    """One channel. paramiko's own thread fills its buffer; our reader empties it."""

    def __init__(self, client: paramiko.SSHClient, channel: paramiko.Channel) -> None:
        self._client, self._channel = client, channel
        self._lock = threading.Lock()

    def read(self) -> bytes:
        try:
            return self._channel.recv(1 << 18)
        except (OSError, EOFError):
            return b""

    def write(self, data: bytes) -> None:
        with self._lock:
            self._channel.sendall(data)

    def close(self) -> None:
        self._channel.close()
        _close(self._client)

    def program_ended(self) -> bool:
        """An exit status, or a transport that is still there a moment later (a signal leaves no status)."""
        transport, deadline = self._client.get_transport(), time.monotonic() + TRANSPORT_END_S
        while self._channel.exit_status == NO_STATUS:
            if transport is None or not transport.is_active():
                return False
            if time.monotonic() > deadline:
                return True
            time.sleep(0.02)
        return True

    def complaint(self) -> str:
        said = b""
        with contextlib.suppress(OSError):
            if self._channel.recv_stderr_ready():
                said = self._channel.recv_stderr(COMPLAINT_BYTES)
        transport = self._client.get_transport()
        return said.decode(errors="replace").strip() or (_said_on_the_way(transport.sock) if transport else "")


def _close(client: paramiko.SSHClient) -> None:
    """At once. The reader may sleep for IDLE_WAKE_S: closing a Channel wakes it, closing a socket does not."""
    transport = client.get_transport()
    if transport is not None and isinstance(transport.sock, socket.socket):
        with contextlib.suppress(OSError):
            transport.sock.shutdown(socket.SHUT_RDWR)
    client.close()


def _said_on_the_way(stream: Stream | None) -> str:
    said = stream.complaint() if isinstance(stream, ProgramStream) else ""
    return f"its ProxyCommand said: {said}" if said else ""


def connect_paramiko(host: Host, command: str, options: ConnectOptions) -> ParamikoConnection:
    """Log in and start `command`. Raises HostError; only what may pass by itself is tried again."""
    target = resolve(host)
    for attempt in range(options.attempts):
        try:
            client = _login(host, target, options)
            break
        except UnreachableError:
            if attempt + 1 == options.attempts:
                raise
            time.sleep(random.uniform(0.2, 0.6) * 2**attempt)  # jitter: hosts do not come back in step
    transport = client.get_transport()
    assert transport is not None
    with translated(host, target, options, transport.sock):
        try:
            transport.set_keepalive(KEEPALIVE_S)
            channel = transport.open_session(WINDOW_BYTES, PACKET_BYTES, timeout=options.timeout_s)
            channel.exec_command(command)
        except BaseException:
            _close(client)
            raise
    return ParamikoConnection(client, channel)


def _login(host: Host, target: SshTarget, options: ConnectOptions) -> paramiko.SSHClient:
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(RefuseUnknown())
    with translated(host, target, options):
        load_known_keys(client.get_host_keys(), target)
        stream = open_stream(host, target, options)
    with translated(host, target, options, stream):
        try:
            client.connect(
                target.key_alias or target.hostname,
                22 if target.key_alias else target.port,  # only names the key: the stream is open already
                username=target.user,
                key_filename=[key for key in target.keys if Path(key).is_file()],  # type: ignore[arg-type]  # or a list
                allow_agent=not target.identities_only,
                look_for_keys=False,
                sock=stream,
                timeout=options.timeout_s,
                banner_timeout=options.timeout_s,
                auth_timeout=options.timeout_s,
                channel_timeout=options.timeout_s,
                transport_factory=_fast_transport,  # type: ignore[arg-type]  # the stubs miss the keyword arguments
            )
            transport = client.get_transport()
            assert transport is not None
            if is_revoked(transport.get_remote_server_key(), target):
                raise HostKeyError(host.name, "its host key is revoked in known_hosts", "find out who answers there")
            stream.settimeout(IDLE_WAKE_S)
        except BaseException:
            client.close()
            stream.close()
            raise
    return client


def _fast_transport(sock: socket.socket, **options: object) -> paramiko.Transport:
    transport = paramiko.Transport(sock, default_window_size=WINDOW_BYTES, **options)  # type: ignore[arg-type]
    security = transport.get_security_options()
    fast = [cipher for cipher in FAST_CIPHERS if cipher in security.ciphers]
    security.ciphers = [*fast, *(cipher for cipher in security.ciphers if cipher not in fast)]
    return transport


def open_stream(host: Host, target: SshTarget, options: ConnectOptions) -> Stream:
    """The byte stream to the host's sshd: through its bastions, its ProxyCommand, or straight."""
    if target.jumps:
        return _through_bastion(host, target, options)
    if target.proxy_command:
        return open_program(host, target, target.proxy_command)
    try:
        stream = socket.create_connection((target.hostname, target.port), timeout=options.timeout_s)
    except socket.gaierror as error:
        fix = "check the name, or give addr=IP in the hostfile"
        raise UnreachableError(host.name, f"the name {target.hostname} is unknown ({error.strerror})", fix) from None
    except ConnectionRefusedError:
        where = f"{target.hostname}:{target.port}"
        fix = "start sshd there, or give port=N in the hostfile"
        raise UnreachableError(host.name, f"{where} refused the connection", fix) from None
    except OSError as error:
        reason = f"no answer within {options.timeout_s:.0f} s" if isinstance(error, TimeoutError) else error.strerror
        fix = "is the host up, and does the way to it work (ping, firewall)?"
        raise UnreachableError(host.name, f"{target.hostname}:{target.port}: {reason}", fix) from None
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


@dataclass
class _Bastion:
    """One way through bastions, shared by all hosts behind it; an error is shared too."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    client: paramiko.SSHClient | None = None
    error: HostError | None = None


_bastions: defaultdict[tuple[str, ...], _Bastion] = defaultdict(_Bastion)


def parse_jump(text: str) -> Host:
    """`[user@]host[:port]` of a ProxyJump, an IPv6 address in brackets; names are ssh_config's."""
    match = re.fullmatch(r"(?:ssh://)?(?:(?P<user>[^@]+)@)?(?P<host>\[[^]]+\]|[^:\[\]]+)(?::(?P<port>\d+))?/?", text)
    if match is None or match["host"].startswith("-"):
        raise UnreachableError(text, "this ProxyJump cannot be read", "write [user@]host[:port] in ssh_config")
    return Host(match["host"].strip("[]"), user=match["user"], port=int(match["port"]) if match["port"] else None)


def _through_bastion(host: Host, target: SshTarget, options: ConnectOptions) -> paramiko.Channel:
    """A channel of the last bastion's transport, which all hosts behind it share."""
    bastion = _bastions[target.jumps]
    with bastion.lock:
        if bastion.error is not None:
            raise bastion.error
        transport = bastion.client.get_transport() if bastion.client else None
        if transport is None or not transport.is_active():
            try:
                bastion.client = _login_to_bastion(target.jumps, options)
            except HostError as error:
                bastion.error = error
                raise
    transport = bastion.client.get_transport() if bastion.client else None
    assert transport is not None
    where, origin = (target.hostname, target.port), ("127.0.0.1", 0)
    return transport.open_channel("direct-tcpip", where, origin, timeout=options.timeout_s)


def _login_to_bastion(jumps: tuple[str, ...], options: ConnectOptions) -> paramiko.SSHClient:
    host = parse_jump(jumps[-1])
    target = resolve(host)
    if len(jumps) > 1:
        target = replace(target, jumps=jumps[:-1])
    return _login(host, target, options)


@contextmanager
def translated(host: Host, target: SshTarget, options: ConnectOptions, stream: Stream | None = None) -> Iterator[None]:
    """paramiko's errors as ours: the only place that knows them. `stream`: the way, which may have words of its own."""
    name, where = host.name, f"{target.hostname}:{target.port}"
    try:
        yield
    except HostError:
        raise
    except UnknownKeyError as error:
        fix = f"compare the fingerprint with the host's own, then: dstrain hosts trust {name}"
        raise HostKeyError(name, f"its host key is unknown ({fingerprint(error.key)})", fix) from None
    except paramiko.BadHostKeyException as error:
        cause = f"its host key has CHANGED (now {fingerprint(error.key)})"
        fix = f"another machine may be answering; if the host was set up anew: ssh-keygen -R '{target.key_name}'"
        raise HostKeyError(name, cause, fix) from None
    except paramiko.PasswordRequiredException:
        fix = "add it to your agent: ssh-add"
        raise AuthenticationError(name, "the private key has a passphrase", fix) from None
    except paramiko.AuthenticationException as error:
        keys = ", ".join(key for key in target.keys if Path(key).is_file()) or "none"
        fix = f"copy your key there (ssh-copy-id {target.user}@{name}), or give user= / key= in the hostfile"
        raise AuthenticationError(
            name, f"{target.user}@{where} did not let us in (keys tried: {keys}, and the agent's; {error})", fix
        ) from None
    except paramiko.ChannelException as error:
        fix = "look at the bastion's AllowTcpForwarding and at the address behind it"
        raise UnreachableError(name, f"a channel to {where} was refused ({error})", fix) from None
    except (paramiko.SSHException, EOFError, OSError) as error:
        reason = str(error) or type(error).__name__
        if "not found in known_hosts" in reason:
            raise HostKeyError(name, reason, f"dstrain hosts trust {name}") from None
        fix = f"try: ssh -p {target.port} {target.user}@{target.hostname}"
        reason = "; ".join(filter(None, (reason, _said_on_the_way(stream))))
        raise UnreachableError(name, f"{where} broke off the login: {reason}", fix) from None
