"""Where the server listens: addresses as people write them and as gRPC takes them, and why one cannot be had.

A host is a name, an IPv4 address, an IPv6 address with or without brackets, "unix:PATH" or
"unix-abstract:NAME".  Knows neither gRPC nor the server.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat

from runtime.errors import ConfigError

_UNIX = ("unix:", "unix-abstract:")
_LONGEST = 107  # bytes of the path of a socket
_EVERYWHERE = ("", "0.0.0.0", "::")


def is_unix(host: str) -> bool:
    return host.startswith(_UNIX)


def bare(host: str) -> str:
    """Without the brackets of an IPv6 address."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def joined(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 address in brackets; a socket of the file system has no port."""
    if is_unix(host):
        return host
    plain = bare(host)
    return f"[{plain}]:{port}" if ":" in plain else f"{plain or '0.0.0.0'}:{port}"


def target(host: str, port: int) -> str:
    """What a client on this machine connects to."""
    reachable = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
    return joined(reachable.get(bare(host), host), port)


def beside(host: str) -> str:
    """The host of a port that belongs to a server at `host`, without brackets."""
    return "127.0.0.1" if is_unix(host) else bare(host) or "0.0.0.0"


def is_local(host: str) -> bool:
    """Whether only processes of this machine can connect.  False for a name that cannot be resolved."""
    if is_unix(host):
        return True
    plain = bare(host)
    if plain in _EVERYWHERE:
        return False
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(plain, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return False
    return all(_loopback(address) for address in found)


def _loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def check(host: str, port: int) -> None:
    """Raises ConfigError for what is wrong before anything is bound: an unknown name, an impossible path, a
    socket at which another server answers.
    """
    where = f"cannot listen on {joined(host, port)}"
    if host.startswith("unix:"):
        _check_path(where, _path(host))
    elif is_unix(host):
        _check_abstract(where, host.removeprefix("unix-abstract:"))
    elif not is_unix(host) and bare(host) not in _EVERYWHERE:
        try:
            socket.getaddrinfo(bare(host), port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"{where}: the host cannot be resolved ({why}); check its name") from error


def why_not(host: str, port: int) -> ConfigError:
    """The reason why `host` could not be bound, found out by binding it."""
    where, code = f"cannot listen on {joined(host, port)}", 0
    if not is_unix(host):
        code = _bind(bare(host) or "0.0.0.0", port)
    if code == errno.EADDRINUSE:
        return ConfigError(f"{where}; is another server there? choose another port")
    if code == errno.EADDRNOTAVAIL:
        return ConfigError(f"{where}: this machine has no such address; see 'ip address'")
    if code in (errno.EACCES, errno.EPERM):
        return ConfigError(f"{where}: not permitted; choose a port from 1024 on")
    why = os.strerror(code) if code else "gRPC refuses it"
    return ConfigError(f"{where}: {why}; choose another address")


def _bind(host: str, port: int) -> int:
    """The errno of binding; 0 if it succeeds."""
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return errno.EADDRNOTAVAIL
    for family, kind, protocol, _, address in entries:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
        except OSError as error:
            return error.errno or errno.EINVAL
    return 0


def _path(host: str) -> str:
    path = host.removeprefix("unix:")
    return path.removeprefix("//") if path.startswith("///") else path


def _check_abstract(where: str, name: str) -> None:
    if not name:  # the kernel would choose one, which no client could know
        raise ConfigError(f"{where}: a name belongs behind 'unix-abstract:'")
    if len(os.fsencode(name)) > _LONGEST:
        raise ConfigError(f"{where}: the name of a socket has at most {_LONGEST} bytes; choose a shorter one")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(b"\0" + os.fsencode(name))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"{where}; is another server there? choose another name") from error
            raise ConfigError(f"{where}: {error.strerror or error}; choose another name") from error


def _check_path(where: str, path: str) -> None:
    if not path:
        raise ConfigError(f"{where}: a path belongs behind 'unix:'")
    if len(os.fsencode(path)) > _LONGEST:
        raise ConfigError(f"{where}: the path of a socket has at most {_LONGEST} bytes; choose a shorter one")
    parent = os.path.dirname(path) or "."
    if not os.path.isdir(parent):
        raise ConfigError(f"{where}: {parent} is not a directory; make it")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{where}: {parent} cannot be written; check its permissions")
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{where}: {path} is there and is no socket; remove it or choose another path")
    # gRPC removes a socket that is there, and with it the way to a server that answers.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                return
        raise ConfigError(f"{where}; is another server there? stop that one or choose another path")
