"""Who may call what: TLS credentials and per-method authorisation by bearer token.

A method needs one of the roles of its row; a token has the roles of its line in the
configuration.  Health checks are open to everybody, because whoever restarts a server
holds no token.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from runtime.config import SecurityConfig
from runtime.errors import ConfigError

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


class Authorise(grpc.ServerInterceptor):  # type: ignore[misc]
    """UNAUTHENTICATED without a known token, PERMISSION_DENIED without the role."""

    def __init__(self, tokens: dict[str, list[str]]) -> None:
        self._tokens = [(token.encode(), frozenset(roles)) for token, roles in tokens.items()]

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        needed = roles_for(details.method)
        if not needed:
            return continuation(details)
        roles = self._roles(dict(details.invocation_metadata or ()).get("authorization", ""))
        if roles is None:
            message = 'a token is needed: send metadata "authorization: Bearer TOKEN"'
            return _refusal(continuation(details), grpc.StatusCode.UNAUTHENTICATED, message)
        if not roles.intersection(needed):
            message = f"this token may not call {details.method}: it needs the role {' or '.join(needed)}"
            return _refusal(continuation(details), grpc.StatusCode.PERMISSION_DENIED, message)
        return continuation(details)

    def _roles(self, header: Any) -> frozenset[str] | None:
        scheme, _, given = str(header).partition(" ")
        found = None
        for token, roles in self._tokens:  # all of them, in constant time each
            if hmac.compare_digest(token, given.strip().encode()) and scheme.lower() == "bearer":
                found = roles
        return found


def _refusal(handler: Any, code: Any, message: str) -> Any:
    """A handler of the same kind that says no; None (unknown method) stays None."""
    if handler is None:
        return None

    def unary(_request: Any, context: Any) -> Any:
        context.abort(code, message)

    def stream(_request: Any, context: Any) -> Any:
        context.abort(code, message)
        yield

    if handler.response_streaming:
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_stream_rpc_method_handler(stream)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(unary)
    return grpc.unary_unary_rpc_method_handler(unary)


def interceptors(config: SecurityConfig) -> tuple[Any, ...]:
    """Raises ConfigError for a role that does not exist."""
    for token, roles in config.tokens.items():
        for role in roles:
            if role not in ROLES:
                raise ConfigError(
                    f"security.tokens: '{token[:3]}…' has the role '{role}'; known: {', '.join(ROLES)}"
                )
    return (Authorise(config.tokens),) if config.tokens else ()


def credentials(config: SecurityConfig) -> Any:
    """Server credentials, or None without TLS.  Raises ConfigError: a file or its other half is missing."""
    if not (config.certificate or config.key):
        if config.client_ca:
            raise ConfigError("security.client_ca needs security.certificate and security.key; set both")
        return None
    if not (config.certificate and config.key):
        raise ConfigError("security.certificate and security.key belong together; set both")
    authority = _read("client_ca", config.client_ca) if config.client_ca else None
    pair = (_read("key", config.key), _read("certificate", config.certificate))
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)


def _read(key: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"security.{key}: {path}: {error.strerror}") from error
