"""Settings of the server, as dataclasses that a TOML file fills.

Every limit of the guard is here with the reason for its default.  Knows nothing of the
code that uses it.  A file has one table per section; `[shadow]` sets `ShadowConfig`, and
so on; the keys of `ServerConfig` itself stand at the top.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import files
from runtime.drift.config import DriftConfig
from runtime.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

MEMORY_POLICIES = ("availability-preserving", "resource-preserving", "availability", "resource")


@dataclass(frozen=True)
class EngineConfig:
    """How engines run.

    threads      intra-op threads of the live engine; 0 = the cores this process may use, at most 4
    concurrency  runs at the same time per model; the threads are shared out between them
    nice         priority of the thread that loads, checks and shadows a candidate (0..19)
    load_timeout seconds within which a candidate must be loaded and checked
    hang         seconds after which a run that has not ended is taken for one that never will: far beyond the
                 slowest run on a busy machine, because a version is rolled back for it; 0 = never
    device       "cpu", or "cuda" where onnxruntime-gpu is installed
    host_code    load version-compatible TensorRT plans: they bring machine code for this process, so only
                 signed versions are then loaded (security.trusted_keys)
    """

    threads: int = 0
    concurrency: int = 1
    nice: int = 10
    load_timeout: float = 120.0
    hang: float = 15.0
    device: str = "cpu"
    host_code: bool = False


@dataclass(frozen=True)
class QueueConfig:
    """What happens to requests while the engine is busy.

    limit        requests that may wait per model; the next one gets RESOURCE_EXHAUSTED.  Load generators send
                 with 64 hands; a frame of 1024x2048 is 6 MB, so that a full queue holds less than 1 GB
    policy       "fifo", or "latest": a new frame of the same source replaces the waiting one
    timeout      seconds a request may wait when it names no timeout itself; 0 = for ever
    max_batch    requests that one run may take together (engines with a batch dimension)
    batch_delay  seconds to wait for a fuller batch
    """

    limit: int = 128
    policy: str = "fifo"
    timeout: float = 0.0
    max_batch: int = 1
    batch_delay: float = 0.0


@dataclass(frozen=True)
class GuardConfig:
    """The checks between SUBMITTED and VERIFIED.

    min_golden_agreement  share of golden pixels on which the engine must give the manifest's label
    max_golden_confidence mean absolute difference of confidence on the golden frames, in bytes (0..255)
    require_golden        refuse a version of the graph contract that brings no golden frames
    min_golden_bits       share of golden pixels whose whole field of edge bits must be the manifest's; weak
                          alone, because most pixels are no edge, hence ...
    min_golden_overlap    ... edge pixels in both over edge pixels in either: float32 gives 1, half precision
                          over .99, and a shift by a pixel under .6
    max_golden_edges      mean absolute difference of the edge maps on the golden frames, in bytes (0..255)
    golden_bytes          memory that a version's golden frames and their answers may take
    max_dominance         share of pixels that one class may take, unless the reference gives it that much too
    max_edge_share        share of pixels that may be edges of one class, likewise; labels of radius 2 take
                          under .15 of a street scene, and an untrained head half of it or all
    shown_edge_share      an edge class counts as shown by the reference from this share of pixels on
    shown_share           a class counts as shown by the reference from this share of pixels on ...
    vanished_share        ... and as vanished below this fraction of the share it had there
    max_vanished          fraction of the shown classes that may vanish on golden frames
    max_latency_ratio     candidate's run time over the live engine's, measured interleaved
    latency_slack_ms      added to the limit, so that tiny engines are not refused for noise
    latency_budget_ms     absolute limit; 0 = none
    memory_budget_bytes   for all engines together; 0 = what the machine has left, less memory_reserve_bytes
    memory_factor         memory an engine takes, as a multiple of its file (measured 2.5 to 2.8)
    memory_policy         TensorFlow Serving's two: "availability-preserving" keeps the previous version warm;
                          "resource-preserving" gives it up to make room (short: "availability", "resource")
    """

    min_golden_agreement: float = 0.98
    max_golden_confidence: float = 4.0
    require_golden: bool = True
    min_golden_bits: float = 0.98
    min_golden_overlap: float = 0.8
    max_golden_edges: float = 4.0
    golden_bytes: int = 512 << 20
    max_dominance: float = 0.98
    max_edge_share: float = 0.6
    shown_edge_share: float = 0.001
    shown_share: float = 0.05
    vanished_share: float = 0.02
    max_vanished: float = 0.0
    max_latency_ratio: float = 2.5
    latency_slack_ms: float = 3.0
    latency_budget_ms: float = 0.0
    memory_budget_bytes: int = 0
    memory_reserve_bytes: int = 64 << 20
    memory_factor: float = 3.0
    memory_policy: str = "availability-preserving"

    @property
    def resource_preserving(self) -> bool:
        return self.memory_policy.startswith("resource")


@dataclass(frozen=True)
class ShadowConfig:
    """The checks on sampled live frames.

    A good adapted model disagrees with the live one on many pixels: that is what it is for.
    What separates it from rubbish is that it still has *something* to do with the live one
    (agreement above chance), is not speckled, and uses several classes.  Hence these limits
    are loose and those of collapse and finiteness are not.

    enabled          False: decide by the golden frames alone, and say so
    frames           decide after this many frames ...
    timeout          ... or after this many seconds, with at least min_frames
    min_frames       fewer than this at the timeout: decide by the golden frames alone, and say so
    idle_timeout     no frame at all for this many seconds: as above
    duty             share of the time that the shadow may compute, so that it leaves the cores to the answers
    min_agreement    share of pixels with the live version's label
    min_kappa        Cohen's kappa of the two (agreement beyond chance)
    max_speckle      neighbouring pixels with different labels, as a multiple of the live version's, plus
    speckle_slack
    min_confidence   mean confidence as a fraction of the live version's
    max_vanished     fraction of the classes shown by the live version that may vanish
    max_latency_ratio CPU time of the candidate over the live engine's on the same frames
    edge_tolerance   edges match within this fraction of the diagonal (the Cityscapes protocol's)
    min_edge_kappa   share of the live version's edges that the candidate has too, or the other way round,
                     beyond chance; one direction is enough, because a better detector finds more or fewer
    max_mixed        share of the live version's edges in classes that the candidate mostly calls another one
    """

    enabled: bool = True
    frames: int = 24
    timeout: float = 20.0
    min_frames: int = 4
    idle_timeout: float = 3.0
    duty: float = 0.5
    min_agreement: float = 0.15
    min_kappa: float = 0.03
    max_speckle: float = 3.0
    speckle_slack: float = 0.05
    min_confidence: float = 0.6
    max_vanished: float = 0.67
    max_latency_ratio: float = 3.0
    edge_tolerance: float = 0.0035
    min_edge_kappa: float = 0.2
    max_mixed: float = 0.67


@dataclass(frozen=True)
class WatchConfig:
    """The watch window after a flip; what it sees rolls the version back.

    seconds            length of the window; 0 = no window
    max_fps            answers looked at per second
    min_frames         looked-at answers (or errors) before anything is decided
    max_error_share    requests that the engine failed
    max_bad_share      looked-at answers that are collapsed or not finite
    max_latency_ratio  median run time over the median before the flip
    min_confidence     mean confidence as a fraction of the mean before the flip
    """

    seconds: float = 30.0
    max_fps: float = 5.0
    min_frames: int = 5
    max_error_share: float = 0.05
    max_bad_share: float = 0.5
    max_latency_ratio: float = 4.0
    min_confidence: float = 0.5


@dataclass(frozen=True)
class SwapConfig:
    """The turn of a candidate.

    freeze_wait  seconds that a candidate waits for an unfreeze before it is refused; 0 = refused at once
    max_pending  submissions of one model that may wait for their turn
    """

    freeze_wait: float = 0.0
    max_pending: int = 8


@dataclass(frozen=True)
class TapConfig:
    """The tap.

    queue        frames kept per subscriber
    subscribers  how many may subscribe
    opt_in       only frames whose request says collect = true; otherwise all but those that say false
    """

    queue: int = 8
    subscribers: int = 8
    opt_in: bool = False


@dataclass(frozen=True)
class TracingConfig:
    """OpenTelemetry traces of inference requests (extra "tracing"); off until an endpoint is named.

    endpoint     OTLP/gRPC receiver, "http://HOST:4317", or "https://..." for TLS; empty = no traces, no cost
    rate         share of requests that begin a trace here; a caller's `traceparent` decides for its own
    service      service.name of the spans
    queue        spans that may wait for the receiver; more are dropped
    timeout      seconds a delivery may take
    """

    endpoint: str = ""
    rate: float = 0.01
    service: str = "roadworthy"
    queue: int = 2048
    timeout: float = 5.0


@dataclass(frozen=True)
class SecurityConfig:
    """Who may call what.

    certificate, key   PEM files; both set = TLS
    client_ca          PEM file; set = clients must present a certificate signed by it (mTLS)
    tokens             {token: [roles]}; empty = no tokens needed.  Sent as "authorization: Bearer ..."
                       roles: "infer", "observe" (status, watch, drift, metadata), "tap" (live frames),
                       "adapt" (an adapter: tap, its connection, and submitting to the guarded swap),
                       "control" (the rest)
    trusted_keys       Ed25519 public keys (PEM files); set = unsigned or wrongly signed versions are refused
    """

    certificate: str = ""
    key: str = ""
    client_ca: str = ""
    tokens: dict[str, list[str]] = field(default_factory=dict)
    trusted_keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SharedMemoryConfig:
    """Memory of a client that the server maps (system and CUDA).

    allow   "on", "off", or "auto": on where only processes of this machine can connect (loopback, unix:).
            Whoever may infer can have the server read and write every object of /dev/shm that the server may
            open
    prefix  system objects whose name does not begin with this are refused; empty = any name
    """

    allow: str = "auto"
    prefix: str = ""


@dataclass(frozen=True)
class ServerConfig:
    """The whole.

    streams        streams of each kind that looks on (Watch, WatchRound) or infers at the same time; the tap,
                   swaps that are followed and adapters have limits of their own
    max_message    bytes of one message
    message_timeout  seconds within which the message of a call must be there
    drain          seconds that a stopping server waits for what is in flight
    read_only      serve what is live and change nothing: beside the server that has the repository, or from a
                   medium that is somebody else's
    keep_versions  how many versions of a model that rounds of adaptation made are kept, the newest; older
                   ones are deleted after each swap, but none that is live, warm or wanted by a group; 0 = all
                   stay, because what is deleted is gone
    models         which models of the repository to serve; empty = all
    groups         {name: [models]} that are answered and swapped together
    """

    repository: str = ""
    host: str = "127.0.0.1"
    port: int = 8001
    metrics_port: int = 8002
    streams: int = 32
    max_message: int = 64 << 20
    message_timeout: float = 30.0
    drain: float = 20.0
    read_only: bool = False
    keep_versions: int = 0
    models: list[str] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)
    engine: EngineConfig = field(default_factory=EngineConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    shadow: ShadowConfig = field(default_factory=ShadowConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    swap: SwapConfig = field(default_factory=SwapConfig)
    tap: TapConfig = field(default_factory=TapConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    shared_memory: SharedMemoryConfig = field(default_factory=SharedMemoryConfig)

    def __post_init__(self) -> None:
        _choice("queue.policy", self.queue.policy, ("fifo", "latest"))
        _choice("guard.memory_policy", self.guard.memory_policy, MEMORY_POLICIES)
        _choice("shared_memory.allow", self.shared_memory.allow, ("auto", "on", "off"))
        if "/" in self.shared_memory.prefix.removeprefix("/"):
            raise ConfigError(f"shared_memory.prefix = '{self.shared_memory.prefix}': names hold no '/'")
        if not 0.0 < self.message_timeout < math.inf:
            raise ConfigError(f"message_timeout = {self.message_timeout}: must be above 0")
        for name in self.models:
            if not _NAME.fullmatch(name) or ".." in name:
                raise ConfigError(f"models: '{name[:80]}' is no model name")
        _choice("engine.device", self.engine.device, ("cpu", "cuda"))
        for key, value, low in (
            ("engine.threads", self.engine.threads, 0),
            ("engine.concurrency", self.engine.concurrency, 1),
            ("engine.nice", self.engine.nice, 0),
            ("queue.limit", self.queue.limit, 0),
            ("queue.max_batch", self.queue.max_batch, 1),
            ("shadow.frames", self.shadow.frames, 1),
            ("streams", self.streams, 1),
            ("keep_versions", self.keep_versions, 0),
            ("tracing.queue", self.tracing.queue, 1),
            ("max_message", self.max_message, 1 << 16),
        ):
            if value < low:
                raise ConfigError(f"{key} = {value}: must be at least {low}")
        for key, value, low in (("port", self.port, 0), ("metrics_port", self.metrics_port, -1)):
            if not low <= value <= 65535:
                raise ConfigError(f"{key} = {value}: must be from {low} to 65535")
        if not self.engine.load_timeout > 0:
            raise ConfigError(f"engine.load_timeout = {self.engine.load_timeout}: must be above 0")
        _numbers(self)
        if not 0.0 <= self.engine.hang < math.inf:
            raise ConfigError(f"engine.hang = {self.engine.hang}: must be 0 or above")
        if not 0.0 < self.shadow.duty <= 1.0:
            raise ConfigError(f"shadow.duty = {self.shadow.duty}: must be above 0 and at most 1")
        if not 0.0 <= self.tracing.rate <= 1.0:
            raise ConfigError(f"tracing.rate = {self.tracing.rate}: must be from 0 to 1")
        if not 0.0 < self.tracing.timeout < math.inf:
            raise ConfigError(f"tracing.timeout = {self.tracing.timeout}: must be above 0")
        if self.tracing.endpoint and not self.tracing.endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"tracing.endpoint = '{self.tracing.endpoint}': must begin with http:// or, for TLS, https://"
            )
        if self.engine.host_code and not self.security.trusted_keys:
            raise ConfigError(
                "engine.host_code = true: a plan may then run code of its own in this server; "
                "set security.trusted_keys, so that only signed versions are loaded"
            )
        taken: dict[str, str] = {}
        for group, members in self.groups.items():
            _group(group, members)
            for member in members:
                if member in self.groups:
                    raise ConfigError(f"groups.{group}: '{member}' is a group itself; name its members")
                if taken.setdefault(member, group) != group:
                    raise ConfigError(
                        f"groups.{group}: '{member}' is in '{taken[member]}' already; a model is in one group"
                    )


def load(path: Path | str, **overrides: Any) -> ServerConfig:
    """Reads a TOML file; keyword `overrides` that are not None win over its top-level keys.

    Raises ConfigError (one line: file, key, remedy) for an unknown key, a wrong type or bad TOML.
    """
    try:
        data = tomllib.loads(files.read_file(path).decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error
    data.update({key: value for key, value in overrides.items() if value is not None})
    return from_dict(data, where=str(path))


def from_dict(data: dict[str, Any], *, where: str = "configuration") -> ServerConfig:
    """Builds a ServerConfig from nested dictionaries; raises ConfigError."""
    config = _build(ServerConfig, data, where)
    assert isinstance(config, ServerConfig)
    return config


def _build(cls: type[Any], data: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(sorted(hints))}"
            raise ConfigError(f"{where}: unknown key '{key}'{hint}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: '{key}' must be a table")
            values[key] = _build(typing.cast(type[Any], kind), value, f"{where}: [{key}]")
        else:
            values[key] = _scalar(key, value, kind, where)
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:  # a table whose dataclass belongs to another module
        raise ConfigError(f"{where}: {error}") from error


def _scalar(key: str, value: Any, kind: Any, where: str) -> Any:
    origin = typing.get_origin(kind) or kind
    if isinstance(origin, types.UnionType):
        return value
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: '{key}' must be of type {origin.__name__}, not {type(value).__name__}")
    if kind in (list[str], dict[str, list[str]]):
        lists = {key: value} if kind == list[str] else {f"{key}.{name}": each for name, each in value.items()}
        for name, each in lists.items():
            if not isinstance(each, list) or not all(isinstance(text, str) for text in each):
                raise ConfigError(f"{where}: '{_hidden(name)}' must be a list of texts")
    return value


def _hidden(name: str) -> str:
    """A token is a secret, also in the words about its line."""
    return f"{name[:10]}…" if name.startswith("tokens.") else name


_SHARES = {
    "guard": (
        "min_golden_agreement",
        "min_golden_bits",
        "min_golden_overlap",
        "max_dominance",
        "max_edge_share",
        "shown_edge_share",
        "shown_share",
        "vanished_share",
        "max_vanished",
    ),
    "shadow": ("min_agreement", "min_kappa", "min_edge_kappa", "max_vanished", "edge_tolerance", "max_mixed"),
    "watch": ("max_error_share", "max_bad_share"),
}


def unlikely(config: ServerConfig) -> list[str]:
    """A line for each limit that cannot be meant: below 0, or a share above 1.  It holds all the same."""
    lines = []
    for table, shares in _SHARES.items():
        for name, value in vars(getattr(config, table)).items():
            if isinstance(value, bool | str):
                continue
            least = -1 if name.endswith("kappa") else 0
            most = 1 if name in shares else math.inf
            if not least <= value <= most:
                upto = f"from {least} to 1" if name in shares else "0 or above"
                lines.append(f"{table}.{name} = {value}: {upto} is meant; versions may be refused for it")
    return lines


def _numbers(config: ServerConfig) -> None:
    """Raises ConfigError for NaN: no check would refuse anything by it."""
    for table in _SHARES:
        for name, value in vars(getattr(config, table)).items():
            if value != value:
                raise ConfigError(f"{table}.{name} = nan: must be a number")


def _group(group: str, members: list[str]) -> None:
    for name in (group, *members):
        if not _NAME.fullmatch(name) or ".." in name:
            raise ConfigError(f"groups.{group[:80]}: '{name[:80]}' is no model name")
    if len(members) < 2 or len(set(members)) != len(members):
        raise ConfigError(f"groups.{group}: {members}: a group has two or more different models")
    if group in members:
        raise ConfigError(f"groups.{group}: a group cannot be its own member; give it another name")


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key} = '{value}': must be one of {', '.join(choices)}")
