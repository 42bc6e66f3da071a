"""Who may call what: TLS credentials and per-method authorisation by bearer token.

A method needs one of the roles of its row; a token has the roles of its line in the
configuration.  Health checks are open to everybody, because whoever restarts a server
holds no token.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import ssl
import sys
from collections.abc import Iterable
from typing import Any

import grpc

from common import files
from runtime.config import SecurityConfig
from runtime.errors import ConfigError
from runtime.listen import bare, is_local

ROLES = ("infer", "observe", "tap", "adapt", "control")
_READ = ("infer", "observe", "adapt", "control")
_INFERENCE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("ModelInfer", "ModelStreamInfer"), ("infer",)),
    **dict.fromkeys(
        ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig"), _READ
    ),
    **dict.fromkeys(("ModelStatistics", "RepositoryIndex"), _READ),
    # Shared memory belongs to who sends frames.
    **dict.fromkeys(
        (
            f"{kind}SharedMemory{verb}"
            for kind in ("System", "Cuda")
            for verb in ("Status", "Register", "Unregister")
        ),
        ("infer",),
    ),
}
_CONTROL: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("Status", "Versions", "Watch", "Groups", "Drift", "Adaptation", "WatchRound"),
        ("observe", "adapt", "control"),
    ),
    "SubscribeFrames": ("tap", "adapt"),
    # An adapter offers versions to the guarded swap, which judges them; it does not promote.  It may take
    # away old ones that adapters made.
    **dict.fromkeys(("Adapter", "Submit", "SubmitGroup", "Prune"), ("adapt", "control")),
}
_OPEN = "/grpc.health.v1.Health/"
_REFLECTION = "/grpc.reflection."


def roles_for(method: str) -> tuple[str, ...]:
    """The roles of which a caller of `method` ("/package.Service/Call") needs one; () = open to all."""
    service, _, call = method.rpartition("/")
    if method.startswith(_OPEN):
        return ()
    if method.startswith(_REFLECTION):
        return _READ
    if service == "/inference.GRPCInferenceService":
        return _INFERENCE.get(call, ("control",))
    return _CONTROL.get(call, ("control",))


class Tokens:
    """Which token has which roles.  `refusal` runs on gRPC's serving thread."""

    def __init__(self, config: SecurityConfig) -> None:
        self._tokens: tuple[tuple[bytes, frozenset[str]], ...] = ()
        self.replace(config)

    def replace(self, config: SecurityConfig) -> None:
        """Takes other tokens, from the next call on.  Raises ConfigError, and keeps the old ones, for a role
        that does not exist, for a token that nobody could send, and for no tokens where there were some.
        """
        for token, roles in config.tokens.items():
            if not token or not token.isascii() or not token.isprintable() or " " in token:
                what = "an empty token" if not token else f"the token '{token[:3]}…'"
                remedy = "a token has visible ASCII characters, for example of 'openssl rand -hex 32'"
                raise ConfigError(f"security.tokens: {what} cannot be used: {remedy}")
            for role in roles:
                if role not in ROLES:
                    raise ConfigError(
                        f"security.tokens: '{token[:3]}…' has the role '{role}'; known: {', '.join(ROLES)}"
                    )
        if self._tokens and not config.tokens:  # a file that was cut short must not open the server
            raise ConfigError("security.tokens: there are none any more; start again to serve without tokens")
        self._tokens = tuple((token.encode(), frozenset(roles)) for token, roles in config.tokens.items())

    def refusal(self, method: str, metadata: Any) -> tuple[Any, str, str] | None:
        """UNAUTHENTICATED without a known token, PERMISSION_DENIED without the role; None = may call."""
        tokens = self._tokens
        needed = roles_for(method) if tokens else ()
        if not needed:
            return None
        roles = _roles(tokens, dict(metadata or ()).get("authorization", ""))
        if roles is None:
            message = 'a token is needed: send metadata "authorization: Bearer TOKEN"'
            return grpc.StatusCode.UNAUTHENTICATED, message, "unauthenticated"
        if not roles.intersection(needed):
            message = f"this token may not call {method}: it needs the role {' or '.join(needed)}"
            return grpc.StatusCode.PERMISSION_DENIED, message, "permission"
        return None


def _roles(tokens: Iterable[tuple[bytes, frozenset[str]]], header: Any) -> frozenset[str] | None:
    scheme, _, given = str(header).partition(" ")
    found = None
    for token, roles in tokens:  # all of them, in constant time each
        if hmac.compare_digest(token, given.strip().encode()) and scheme.lower() == "bearer":
            found = roles
    return found


class Certificates:
    """The server's certificate, its key and the authority of its clients, as they are read from their files.

    Raises ConfigError for a file that is missing, damaged or belongs to another one.
    """

    def __init__(self, config: SecurityConfig) -> None:
        self._mutual = bool(config.client_ca)
        self._now = _configuration(config)
        self._next: Any = None

    def credentials(self) -> Any:
        """Of a gRPC server; a new connection gets what `take` was given last."""
        return grpc.dynamic_ssl_server_credentials(self._now, self._fetch, self._mutual)

    def take(self, other: Certificates) -> None:
        """Those of `other`, for connections from now on."""
        self._next = other._now

    def _fetch(self) -> Any:
        """gRPC asks at each connection; None = as before."""
        new, self._next = self._next, None
        return new


def certificates(config: SecurityConfig) -> Certificates | None:
    """None without TLS.  Raises ConfigError: a file is missing, damaged or without its other half."""
    if not (config.certificate or config.key):
        if config.client_ca:
            raise ConfigError("security.client_ca needs security.certificate and security.key; set both")
        return None
    if not (config.certificate and config.key):
        raise ConfigError("security.certificate and security.key belong together; set both")
    return Certificates(config)


def _configuration(config: SecurityConfig) -> Any:
    key, chain = _read("key", config.key), _read("certificate", config.certificate)
    authority = _read("client_ca", config.client_ca) if config.client_ca else None
    _check_pair(config, key, chain)
    if authority is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=authority.decode())
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"security.client_ca: {config.client_ca}: holds no certificate in PEM form; name another file"
            ) from error
    return grpc.ssl_server_certificate_configuration([(key, chain)], authority)


def _check_pair(config: SecurityConfig, key: bytes, chain: bytes) -> None:
    """Refuses, with the reason, what gRPC would refuse without one."""
    encrypted = False

    def password() -> bytes:
        nonlocal encrypted
        encrypted = True
        return b""

    with contextlib.ExitStack() as stack:
        names = [config.certificate, config.key]
        if sys.platform == "linux":  # the bytes that were read, not what the paths hold by now
            for number, content in enumerate((chain, key)):
                descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
                stack.callback(os.close, descriptor)
                os.write(descriptor, content)
                names[number] = f"/proc/self/fd/{descriptor}"
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(names[0], names[1], password)
        except (ssl.SSLError, ValueError) as error:
            where = f"security.certificate ({config.certificate}) and security.key ({config.key})"
            if encrypted:
                raise ConfigError(f"{where}: the key is encrypted; name one that is not") from error
            if "KEY_VALUES_MISMATCH" in str(error):
                raise ConfigError(f"{where}: the key belongs to another certificate") from error
            raise ConfigError(
                f"{where}: not a certificate and its private key in PEM form; name other files"
            ) from error


def exposed(config: SecurityConfig, host: str) -> str:
    """What whoever reads the log should know of a server that other machines reach; "" = nothing."""
    if is_local(host):
        return ""
    known = bool(config.tokens) or bool(config.client_ca)
    if known and config.certificate:
        return ""
    where = f"this server listens on {bare(host) or '0.0.0.0'}, beyond this machine,"
    if not known:
        return f"{where} without tokens: whoever reaches it may call everything; set security.tokens and TLS"
    return f"{where} without TLS: tokens can be read on the way; set security.certificate and security.key"


def _read(key: str, path: str) -> bytes:
    try:
        return files.read_file(path)
    except OSError as error:
        raise ConfigError(f"security.{key}: {path}: {error.strerror}") from error
