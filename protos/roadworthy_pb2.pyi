from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Account(_message.Message):
    __slots__ = ("accepted", "answered", "rejected", "in_flight")
    class RejectedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    accepted: int
    answered: int
    rejected: _containers.ScalarMap[str, int]
    in_flight: int
    def __init__(self, accepted: _Optional[int] = ..., answered: _Optional[int] = ..., rejected: _Optional[_Mapping[str, int]] = ..., in_flight: _Optional[int] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("model", "ready", "reason", "live", "previous", "pinned", "frozen", "frozen_reason", "candidate", "candidate_state", "watching", "memory_bytes", "account", "drift", "drift_since", "adapter", "phase", "progress", "collection", "groups")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    FROZEN_REASON_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_STATE_FIELD_NUMBER: _ClassVar[int]
    WATCHING_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    DRIFT_SINCE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    model: str
    ready: bool
    reason: str
    live: int
    previous: int
    pinned: bool
    frozen: bool
    frozen_reason: str
    candidate: int
    candidate_state: str
    watching: bool
    memory_bytes: int
    account: Account
    drift: str
    drift_since: float
    adapter: str
    phase: str
    progress: float
    collection: bool
    groups: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., ready: bool = ..., reason: _Optional[str] = ..., live: _Optional[int] = ..., previous: _Optional[int] = ..., pinned: bool = ..., frozen: bool = ..., frozen_reason: _Optional[str] = ..., candidate: _Optional[int] = ..., candidate_state: _Optional[str] = ..., watching: bool = ..., memory_bytes: _Optional[int] = ..., account: _Optional[_Union[Account, _Mapping]] = ..., drift: _Optional[str] = ..., drift_since: _Optional[float] = ..., adapter: _Optional[str] = ..., phase: _Optional[str] = ..., progress: _Optional[float] = ..., collection: bool = ..., groups: _Optional[_Iterable[str]] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("server", "version", "uptime_seconds", "draining", "account", "models", "groups")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    server: str
    version: str
    uptime_seconds: float
    draining: bool
    account: Account
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    groups: _containers.RepeatedCompositeFieldContainer[GroupStatus]
    def __init__(self, server: _Optional[str] = ..., version: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., draining: bool = ..., account: _Optional[_Union[Account, _Mapping]] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[GroupStatus, _Mapping]]] = ...) -> None: ...

class VersionsRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class VersionInfo(_message.Message):
    __slots__ = ("version", "state", "reason", "created", "pack", "parent", "round", "manifest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    PACK_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    state: str
    reason: str
    created: str
    pack: str
    parent: str
    round: str
    manifest: str
    def __init__(self, version: _Optional[int] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., created: _Optional[str] = ..., pack: _Optional[str] = ..., parent: _Optional[str] = ..., round: _Optional[str] = ..., manifest: _Optional[str] = ...) -> None: ...

class VersionsResponse(_message.Message):
    __slots__ = ("versions", "history")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[VersionInfo]
    history: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, versions: _Optional[_Iterable[_Union[VersionInfo, _Mapping]]] = ..., history: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class PruneRequest(_message.Message):
    __slots__ = ("model", "keep")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    model: str
    keep: int
    def __init__(self, model: _Optional[str] = ..., keep: _Optional[int] = ...) -> None: ...

class PruneResponse(_message.Message):
    __slots__ = ("deleted", "kept")
    DELETED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    deleted: _containers.RepeatedScalarFieldContainer[int]
    kept: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, deleted: _Optional[_Iterable[int]] = ..., kept: _Optional[_Iterable[int]] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class FreezeRequest(_message.Message):
    __slots__ = ("model", "reason")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    model: str
    reason: str
    def __init__(self, model: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("time", "model", "version", "state", "check", "reason", "detail", "group")
    TIME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    time: float
    model: str
    version: int
    state: str
    check: str
    reason: str
    detail: str
    group: str
    def __init__(self, time: _Optional[float] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., state: _Optional[str] = ..., check: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., group: _Optional[str] = ...) -> None: ...

class FramesRequest(_message.Message):
    __slots__ = ("model", "max_fps", "source")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_FPS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    model: str
    max_fps: float
    source: str
    def __init__(self, model: _Optional[str] = ..., max_fps: _Optional[float] = ..., source: _Optional[str] = ...) -> None: ...

class TappedFrame(_message.Message):
    __slots__ = ("time", "source", "model", "version", "height", "width", "frame", "labels", "confidence", "dropped", "edge_bits", "collect", "latitude", "longitude")
    TIME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    EDGE_BITS_FIELD_NUMBER: _ClassVar[int]
    COLLECT_FIELD_NUMBER: _ClassVar[int]
    LATITUDE_FIELD_NUMBER: _ClassVar[int]
    LONGITUDE_FIELD_NUMBER: _ClassVar[int]
    time: float
    source: str
    model: str
    version: int
    height: int
    width: int
    frame: bytes
    labels: bytes
    confidence: bytes
    dropped: int
    edge_bits: bytes
    collect: bool
    latitude: float
    longitude: float
    def __init__(self, time: _Optional[float] = ..., source: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., frame: _Optional[bytes] = ..., labels: _Optional[bytes] = ..., confidence: _Optional[bytes] = ..., dropped: _Optional[int] = ..., edge_bits: _Optional[bytes] = ..., collect: bool = ..., latitude: _Optional[float] = ..., longitude: _Optional[float] = ...) -> None: ...

class MemberVersion(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class SubmitGroupRequest(_message.Message):
    __slots__ = ("group", "members")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    group: str
    members: _containers.RepeatedCompositeFieldContainer[MemberVersion]
    def __init__(self, group: _Optional[str] = ..., members: _Optional[_Iterable[_Union[MemberVersion, _Mapping]]] = ...) -> None: ...

class GroupRequest(_message.Message):
    __slots__ = ("group",)
    GROUP_FIELD_NUMBER: _ClassVar[int]
    group: str
    def __init__(self, group: _Optional[str] = ...) -> None: ...

class GroupsRequest(_message.Message):
    __slots__ = ("group",)
    GROUP_FIELD_NUMBER: _ClassVar[int]
    group: str
    def __init__(self, group: _Optional[str] = ...) -> None: ...

class GroupMember(_message.Message):
    __slots__ = ("model", "live", "previous")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    model: str
    live: int
    previous: int
    def __init__(self, model: _Optional[str] = ..., live: _Optional[int] = ..., previous: _Optional[int] = ...) -> None: ...

class GroupStatus(_message.Message):
    __slots__ = ("group", "ready", "reason", "generation", "previous", "members", "candidate", "candidate_state", "watching")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_STATE_FIELD_NUMBER: _ClassVar[int]
    WATCHING_FIELD_NUMBER: _ClassVar[int]
    group: str
    ready: bool
    reason: str
    generation: int
    previous: int
    members: _containers.RepeatedCompositeFieldContainer[GroupMember]
    candidate: str
    candidate_state: str
    watching: bool
    def __init__(self, group: _Optional[str] = ..., ready: bool = ..., reason: _Optional[str] = ..., generation: _Optional[int] = ..., previous: _Optional[int] = ..., members: _Optional[_Iterable[_Union[GroupMember, _Mapping]]] = ..., candidate: _Optional[str] = ..., candidate_state: _Optional[str] = ..., watching: bool = ...) -> None: ...

class GroupsResponse(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[GroupStatus]
    def __init__(self, groups: _Optional[_Iterable[_Union[GroupStatus, _Mapping]]] = ...) -> None: ...

class DriftSignal(_message.Message):
    __slots__ = ("name", "value", "reference", "statistic", "threshold", "alarms", "frames", "alarmed", "deviation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    STATISTIC_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    ALARMED_FIELD_NUMBER: _ClassVar[int]
    DEVIATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    reference: float
    statistic: float
    threshold: float
    alarms: int
    frames: int
    alarmed: bool
    deviation: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ..., reference: _Optional[float] = ..., statistic: _Optional[float] = ..., threshold: _Optional[float] = ..., alarms: _Optional[int] = ..., frames: _Optional[int] = ..., alarmed: bool = ..., deviation: _Optional[float] = ...) -> None: ...

class DriftSource(_message.Message):
    __slots__ = ("source", "state", "since", "frames", "signals", "alarms", "reason")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    source: str
    state: str
    since: float
    frames: int
    signals: _containers.RepeatedCompositeFieldContainer[DriftSignal]
    alarms: int
    reason: str
    def __init__(self, source: _Optional[str] = ..., state: _Optional[str] = ..., since: _Optional[float] = ..., frames: _Optional[int] = ..., signals: _Optional[_Iterable[_Union[DriftSignal, _Mapping]]] = ..., alarms: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class DriftResponse(_message.Message):
    __slots__ = ("model", "state", "reason", "since", "version", "reference", "frames", "dropped", "sources", "alarms", "ignored", "failed", "false_alarm_hours")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    IGNORED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    FALSE_ALARM_HOURS_FIELD_NUMBER: _ClassVar[int]
    model: str
    state: str
    reason: str
    since: float
    version: int
    reference: bool
    frames: int
    dropped: int
    sources: _containers.RepeatedCompositeFieldContainer[DriftSource]
    alarms: int
    ignored: int
    failed: int
    false_alarm_hours: float
    def __init__(self, model: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., since: _Optional[float] = ..., version: _Optional[int] = ..., reference: bool = ..., frames: _Optional[int] = ..., dropped: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[DriftSource, _Mapping]]] = ..., alarms: _Optional[int] = ..., ignored: _Optional[int] = ..., failed: _Optional[int] = ..., false_alarm_hours: _Optional[float] = ...) -> None: ...

class RoundProgress(_message.Message):
    __slots__ = ("round", "stage", "step", "of", "loss", "progress", "started", "seconds_left", "portion", "trigger", "version")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    PORTION_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    round: int
    stage: str
    step: int
    of: int
    loss: float
    progress: float
    started: float
    seconds_left: float
    portion: int
    trigger: str
    version: int
    def __init__(self, round: _Optional[int] = ..., stage: _Optional[str] = ..., step: _Optional[int] = ..., of: _Optional[int] = ..., loss: _Optional[float] = ..., progress: _Optional[float] = ..., started: _Optional[float] = ..., seconds_left: _Optional[float] = ..., portion: _Optional[int] = ..., trigger: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class ClassHealth(_message.Message):
    __slots__ = ("name", "predicted", "labelled", "threshold")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    LABELLED_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    name: str
    predicted: float
    labelled: float
    threshold: float
    def __init__(self, name: _Optional[str] = ..., predicted: _Optional[float] = ..., labelled: _Optional[float] = ..., threshold: _Optional[float] = ...) -> None: ...

class PseudoLabelHealth(_message.Message):
    __slots__ = ("round", "frames", "labelled", "classes")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    LABELLED_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    round: int
    frames: int
    labelled: float
    classes: _containers.RepeatedCompositeFieldContainer[ClassHealth]
    def __init__(self, round: _Optional[int] = ..., frames: _Optional[int] = ..., labelled: _Optional[float] = ..., classes: _Optional[_Iterable[_Union[ClassHealth, _Mapping]]] = ...) -> None: ...

class CollectionState(_message.Message):
    __slots__ = ("on", "kept", "dropped", "bytes", "limit_bytes", "seen", "refused")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ON_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    on: bool
    kept: int
    dropped: int
    bytes: int
    limit_bytes: int
    seen: int
    refused: _containers.ScalarMap[str, int]
    def __init__(self, on: bool = ..., kept: _Optional[int] = ..., dropped: _Optional[int] = ..., bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ..., seen: _Optional[int] = ..., refused: _Optional[_Mapping[str, int]] = ...) -> None: ...

class BudgetState(_message.Message):
    __slots__ = ("seconds", "seconds_limit", "memory_bytes", "memory_limit_bytes", "joules", "joules_limit", "paused")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LIMIT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    JOULES_FIELD_NUMBER: _ClassVar[int]
    JOULES_LIMIT_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    seconds_limit: float
    memory_bytes: int
    memory_limit_bytes: int
    joules: float
    joules_limit: float
    paused: str
    def __init__(self, seconds: _Optional[float] = ..., seconds_limit: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., memory_limit_bytes: _Optional[int] = ..., joules: _Optional[float] = ..., joules_limit: _Optional[float] = ..., paused: _Optional[str] = ...) -> None: ...

class RoundOutcome(_message.Message):
    __slots__ = ("round", "state", "reason", "version", "finished")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    round: int
    state: str
    reason: str
    version: int
    finished: float
    def __init__(self, round: _Optional[int] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., version: _Optional[int] = ..., finished: _Optional[float] = ...) -> None: ...

class CommandResult(_message.Message):
    __slots__ = ("id", "accepted", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: int
    accepted: bool
    reason: str
    def __init__(self, id: _Optional[int] = ..., accepted: bool = ..., reason: _Optional[str] = ...) -> None: ...

class AdapterReport(_message.Message):
    __slots__ = ("model", "name", "pid", "version", "time", "phase", "progress", "round", "pseudo_labels", "collection", "budget", "last", "result", "note", "detail")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PSEUDO_LABELS_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    model: str
    name: str
    pid: int
    version: str
    time: float
    phase: str
    progress: float
    round: RoundProgress
    pseudo_labels: PseudoLabelHealth
    collection: CollectionState
    budget: BudgetState
    last: RoundOutcome
    result: CommandResult
    note: str
    detail: str
    def __init__(self, model: _Optional[str] = ..., name: _Optional[str] = ..., pid: _Optional[int] = ..., version: _Optional[str] = ..., time: _Optional[float] = ..., phase: _Optional[str] = ..., progress: _Optional[float] = ..., round: _Optional[_Union[RoundProgress, _Mapping]] = ..., pseudo_labels: _Optional[_Union[PseudoLabelHealth, _Mapping]] = ..., collection: _Optional[_Union[CollectionState, _Mapping]] = ..., budget: _Optional[_Union[BudgetState, _Mapping]] = ..., last: _Optional[_Union[RoundOutcome, _Mapping]] = ..., result: _Optional[_Union[CommandResult, _Mapping]] = ..., note: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("server", "interval")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    server: str
    interval: float
    def __init__(self, server: _Optional[str] = ..., interval: _Optional[float] = ...) -> None: ...

class StartRound(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class CancelRound(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetCollection(_message.Message):
    __slots__ = ("on",)
    ON_FIELD_NUMBER: _ClassVar[int]
    on: bool
    def __init__(self, on: bool = ...) -> None: ...

class AdapterCommand(_message.Message):
    __slots__ = ("id", "time", "welcome", "start_round", "cancel_round", "set_collection")
    ID_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    START_ROUND_FIELD_NUMBER: _ClassVar[int]
    CANCEL_ROUND_FIELD_NUMBER: _ClassVar[int]
    SET_COLLECTION_FIELD_NUMBER: _ClassVar[int]
    id: int
    time: float
    welcome: Welcome
    start_round: StartRound
    cancel_round: CancelRound
    set_collection: SetCollection
    def __init__(self, id: _Optional[int] = ..., time: _Optional[float] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., start_round: _Optional[_Union[StartRound, _Mapping]] = ..., cancel_round: _Optional[_Union[CancelRound, _Mapping]] = ..., set_collection: _Optional[_Union[SetCollection, _Mapping]] = ...) -> None: ...

class StartRoundRequest(_message.Message):
    __slots__ = ("model", "reason")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    model: str
    reason: str
    def __init__(self, model: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class CollectionRequest(_message.Message):
    __slots__ = ("model", "on")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    model: str
    on: bool
    def __init__(self, model: _Optional[str] = ..., on: bool = ...) -> None: ...

class AdapterState(_message.Message):
    __slots__ = ("name", "pid", "peer", "connected", "disconnected", "reported", "reports", "report", "commands_waiting", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    DISCONNECTED_FIELD_NUMBER: _ClassVar[int]
    REPORTED_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_WAITING_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    pid: int
    peer: str
    connected: float
    disconnected: float
    reported: float
    reports: int
    report: AdapterReport
    commands_waiting: int
    reason: str
    def __init__(self, name: _Optional[str] = ..., pid: _Optional[int] = ..., peer: _Optional[str] = ..., connected: _Optional[float] = ..., disconnected: _Optional[float] = ..., reported: _Optional[float] = ..., reports: _Optional[int] = ..., report: _Optional[_Union[AdapterReport, _Mapping]] = ..., commands_waiting: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class AdaptationResponse(_message.Message):
    __slots__ = ("model", "adapters", "last", "collection", "command", "waiting")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    model: str
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterState]
    last: AdapterState
    collection: bool
    command: CommandResult
    waiting: bool
    def __init__(self, model: _Optional[str] = ..., adapters: _Optional[_Iterable[_Union[AdapterState, _Mapping]]] = ..., last: _Optional[_Union[AdapterState, _Mapping]] = ..., collection: bool = ..., command: _Optional[_Union[CommandResult, _Mapping]] = ..., waiting: bool = ...) -> None: ...
