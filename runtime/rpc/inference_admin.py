"""The calls of the inference service that are not inference: repository, configuration, statistics,
shared memory, settings.  Codes and words are Triton's, recorded in tests/peers."""

from __future__ import annotations

import logging
import re
from typing import Any

from protos import inference_pb2 as pb
from protos import model_config_pb2 as config_pb
from runtime.errors import Code, ServiceError
from runtime.events import State
from runtime.rpc.base import typed
from runtime.rpc.message_dict import clean
from runtime.service import Service
from runtime.serving import batching
from runtime.serving.counters import StatisticsSnapshot
from runtime.serving.frame_group import GroupSlot
from runtime.serving.request import parse_version
from runtime.shared_memory import cuda
from runtime.tensors import TensorSpec

log = logging.getLogger("roadworthy")
_TRACE = {
    "trace_level": ["OFF"],
    "trace_rate": ["1000"],
    "trace_count": ["-1"],
    "log_frequency": ["0"],
    "trace_file": [""],
    "trace_mode": ["triton"],
}
_LOG_FLAGS = ("log_error", "log_warning", "log_info")


class RepositoryEdge:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._log: dict[str, Any] = {
            "log_file": "",
            "log_info": True,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": "default",
        }

    def methods(self) -> dict[str, Any]:
        calls = {
            "ModelConfig": self.model_config,
            "ModelStatistics": self.model_statistics,
            "RepositoryIndex": self.index,
            "RepositoryModelLoad": self.load,
            "RepositoryModelUnload": self.unload,
            "SystemSharedMemoryStatus": self.shm_status,
            "SystemSharedMemoryRegister": self.shm_register,
            "SystemSharedMemoryUnregister": self.shm_unregister,
            "CudaSharedMemoryStatus": self.cuda_status,
            "CudaSharedMemoryRegister": self.cuda_register,
            "CudaSharedMemoryUnregister": self.cuda_unregister,
            "TraceSetting": self.trace,
            "LogSettings": self.log_settings,
        }
        return {
            name: typed(function, getattr(pb, f"{name}Request"), getattr(pb, f"{name}Response"))
            for name, function in calls.items()
        }

    # -- configuration and statistics ------------------------------------------------

    def model_config(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        slot = self._service.slot(request.name, request.version)
        spec = slot.engine.spec
        config = config_pb.ModelConfig(
            name=request.name,
            platform=platform(spec.kind),
            backend="" if spec.kind == "group" else spec.kind,
            input=[
                config_pb.ModelInput(name=t.name, data_type=_config_type(t), dims=t.shape)
                for t in spec.inputs
            ],
            output=[
                config_pb.ModelOutput(name=t.name, data_type=_config_type(t), dims=t.shape)
                for t in spec.outputs
            ],
        )
        if isinstance(slot, GroupSlot):
            _ensemble(config, slot)
        elif (declared := self._service.models.declared(request.name)) is not None:
            _declared(config, declared, batched=spec.batched)
        return pb.ModelConfigResponse(config=config)

    def model_statistics(
        self, request: pb.ModelStatisticsRequest, context: Any
    ) -> pb.ModelStatisticsResponse:
        number = parse_version(request.version)
        hosts = self._service.models.served()
        if request.name:
            host = hosts.get(request.name)
            if host is None or host.live is None:
                raise _invalid(f"requested model '{request.name}' is not available")
            hosts = {request.name: host}
        response = pb.ModelStatisticsResponse()
        for name, host in sorted(hosts.items()):
            for slot in host.loaded():
                if number in (None, slot.version):
                    now = host.statistics_of(slot.version).snapshot()
                    response.model_stats.append(_statistics(name, slot.version, now))
        if number is not None and request.name and not response.model_stats:
            raise _invalid(f"requested model version is not available for model '{request.name}'")
        return response

    # -- repository ------------------------------------------------------------------

    def index(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        _no_repository_name(request.repository_name)
        response = pb.RepositoryIndexResponse()
        hosts = self._service.models.hosts()
        for name in self._service.repository.models():
            host = hosts.get(name)
            loaded = {slot.version for slot in host.loaded()} if host is not None else set()
            for version in self._service.repository.versions(name):
                if version in loaded:
                    response.models.add(name=name, version=str(version), state="READY")
                elif not request.ready:
                    reason = host.reason if host is not None and host.live is None else "not loaded"
                    response.models.add(name=name, version=str(version), state="UNAVAILABLE", reason=reason)
        for name, group in self._service.models.groups().items():
            live = group.host.live
            if live is not None:
                response.models.add(name=name, version=str(live.version), state="READY")
            elif not request.ready:
                response.models.add(name=name, state="UNAVAILABLE", reason=group.host.reason)
        return response

    def load(self, request: pb.RepositoryModelLoadRequest, context: Any) -> pb.RepositoryModelLoadResponse:
        """The newest version of the repository goes through the guarded swap; OK when it is live.

        `config` takes the place of config.pbtxt until the next load, as far as that is read here
        (max_batch_size, dynamic_batching).  `file:` is refused: a version is what was published and verified.
        """
        _no_repository_name(request.repository_name)
        model = request.model_name
        failure = ServiceError(
            Code.INTERNAL, f"failed to load '{model}', failed to poll from model repository", "load"
        )
        for key, value in request.parameters.items():
            expected = "string_param" if key == "config" else "bytes_param"
            if key != "config" and not key.startswith("file:"):
                raise _invalid(f"unrecognized load parameter '{key}'.")
            if value.WhichOneof("parameter_choice") != expected:
                raise _invalid(f"invalid value type for load parameter '{key}', expected {expected}.")
        override = None
        if "config" in request.parameters:
            try:
                override = batching.override(request.parameters["config"].string_param, model)
            except ValueError as error:
                why = clean(str(error), 200)
                log.warning("load of '%s': its config cannot be used: %s", clean(model, 80), why)
                raise failure from None
        if any(key.startswith("file:") for key in request.parameters):
            if override is None:  # Triton wants one
                raise failure
            raise ServiceError(
                Code.UNIMPLEMENTED,
                f"failed to load '{model}': 'file:' is not taken: versions are immutable and verified; "
                "publish one with export.build and load that",
                "load",
            )
        self._load(model, failure)
        if model in self._service.models.hosts():
            self._service.models.override(model, override)
        return pb.RepositoryModelLoadResponse()

    def _load(self, model: str, failure: ServiceError) -> None:
        group = self._service.models.groups().get(model)
        if group is not None:  # its members are loaded by their own names
            group.reload()
            if group.host.reason:
                raise _invalid(f"failed to load '{model}': {group.host.reason}")
            return
        try:
            controller = self._service.models.controller(model)
        except ServiceError:
            raise failure from None
        if controller.host.live is None and controller.host.unloaded:
            controller.reload()
            if controller.host.live is None:
                raise _invalid(f"failed to load '{model}': {controller.host.reason}")
        version = controller.retention.newest_eligible()
        live = controller.host.live
        if version is None or (live is not None and live.version >= version):
            return
        event = self._service.admin.submit(model, version).result()
        if event.state is not State.LIVE:
            raise _invalid(f"failed to load '{model}', version {version}: {event.check}: {event.reason}")

    def unload(
        self, request: pb.RepositoryModelUnloadRequest, context: Any
    ) -> pb.RepositoryModelUnloadResponse:
        _no_repository_name(request.repository_name)
        controller = self._service.models.controllers().get(request.model_name)
        if controller is not None:
            controller.unload()
        elif (group := self._service.models.groups().get(request.model_name)) is not None:
            group.unload()
        return pb.RepositoryModelUnloadResponse()

    # -- shared memory ---------------------------------------------------------------

    def shm_status(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Any
    ) -> pb.SystemSharedMemoryStatusResponse:
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._service.regions.status(request.name):
            entry = response.regions[region.name]
            entry.name, entry.key = region.name, region.key
            entry.offset, entry.byte_size = region.offset, region.byte_size
        return response

    def shm_register(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Any
    ) -> pb.SystemSharedMemoryRegisterResponse:
        self._service.regions.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    def shm_unregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Any
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        self._service.regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def cuda_status(
        self, request: pb.CudaSharedMemoryStatusRequest, context: Any
    ) -> pb.CudaSharedMemoryStatusResponse:
        response = pb.CudaSharedMemoryStatusResponse()
        for region in self._service.regions.status(request.name, "cuda"):
            entry = response.regions[region.name]
            entry.name, entry.device_id, entry.byte_size = region.name, region.device_id, region.byte_size
        return response

    def cuda_register(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: Any
    ) -> pb.CudaSharedMemoryRegisterResponse:
        def make() -> cuda.CudaRegion:
            return cuda.open_region(request.name, request.raw_handle, request.device_id, request.byte_size)

        self._service.regions.add(request.name, make)
        return pb.CudaSharedMemoryRegisterResponse()

    def cuda_unregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: Any
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        self._service.regions.unregister(request.name, "cuda")
        return pb.CudaSharedMemoryUnregisterResponse()

    # -- settings --------------------------------------------------------------------

    def trace(self, request: pb.TraceSettingRequest, context: Any) -> pb.TraceSettingResponse:
        """Triton's settings of traces, as far as they mean something here: `[tracing]` says whether and where
        to, `trace_level` OFF or TIMESTAMPS switches them, `trace_rate` N traces one request in N.
        """
        if request.model_name and request.model_name not in self._service.models.hosts():
            raise _invalid(f"Request for unknown model : {request.model_name}")
        for key, setting in request.settings.items():
            values = list(setting.value)
            for number in ("trace_rate", "trace_count", "log_frequency"):
                if key == number and values and not re.fullmatch(r"-?[0-9]{1,18}", values[0]):
                    raise _invalid(f"Unable to parse '{key}', got: {values[0]}")
        now = self._trace_settings()
        tracing = self._service.tracing
        changes: dict[str, float] = {}  # nothing is changed before everything is known to be possible
        for key, setting in request.settings.items():
            values = list(setting.value)
            if key not in now or values == now[key]:
                continue
            if tracing is None and values:
                message = f"traces are not collected by this server; '{key}' stays {now[key][0]!r}"
                raise ServiceError(Code.UNIMPLEMENTED, message, "invalid")
            if tracing is None:
                continue
            if request.model_name:
                message = "traces are set for all models at once; leave out model_name"
                raise ServiceError(Code.UNIMPLEMENTED, message, "invalid")
            if key == "trace_level" and values in ([], ["OFF"], ["TIMESTAMPS"]):
                changes["on"] = float(values != ["OFF"])
            elif key == "trace_rate" and (not values or int(values[0]) > 0):
                changes["rate"] = 1 / int(values[0]) if values else tracing.configured_rate
            elif values:
                message = f"'{key}' stays {now[key][0]!r}; trace_level and trace_rate can be set"
                raise ServiceError(Code.UNIMPLEMENTED, message, "invalid")
        if tracing is not None:
            tracing.on, tracing.rate = bool(changes.get("on", tracing.on)), changes.get("rate", tracing.rate)
        response = pb.TraceSettingResponse()
        for key, value in self._trace_settings().items():
            response.settings[key].value.extend(value)
        return response

    def _trace_settings(self) -> dict[str, list[str]]:
        tracing = self._service.tracing
        if tracing is None:
            return _TRACE
        rate = str(round(1 / tracing.rate)) if tracing.rate > 0 else "0"
        level = ["TIMESTAMPS" if tracing.on else "OFF"]
        return {**_TRACE, "trace_level": level, "trace_rate": [rate], "trace_mode": ["opentelemetry"]}

    def log_settings(self, request: pb.LogSettingsRequest, context: Any) -> pb.LogSettingsResponse:
        changed = dict(self._log)
        for key, setting in request.settings.items():
            if key not in changed:
                continue
            kind = {bool: "bool", int: "uint32", str: "string"}[type(changed[key])]
            if setting.WhichOneof("parameter_choice") != f"{kind}_param":
                word = {"bool": "boolean", "uint32": "unsigned integer", "string": "string"}[kind]
                raise _invalid(f"expect {word} for '{key}'")
            value = getattr(setting, f"{kind}_param")
            if key == "log_format" and value not in ("default", "ISO8601"):
                raise _invalid(f"invalid argument for log_format, got: {value}")
            if key in ("log_file", "log_format") and value != changed[key]:
                message = f"'{key}' is set by who starts the server, not over the network"
                raise ServiceError(Code.UNIMPLEMENTED, message, "invalid")
            changed[key] = value
        if changed != self._log:
            self._log = changed
            log.setLevel(_level(changed))
        response = pb.LogSettingsResponse()
        for key, value in self._log.items():
            setting = response.settings[key]
            if isinstance(value, bool):
                setting.bool_param = value
            elif isinstance(value, int):
                setting.uint32_param = value
            else:
                setting.string_param = value
        return response


def platform(kind: str) -> str:
    """Triton's word for what runs a model."""
    words = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan", "group": "ensemble"}
    return words.get(kind, kind)


def _ensemble(config: config_pb.ModelConfig, slot: GroupSlot) -> None:
    """The members as the steps of an ensemble: perf_analyzer asks for their statistics then."""
    for model, member in slot.members.items():
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=member.version)
        for tensor in member.engine.spec.inputs:
            step.input_map[tensor.name] = tensor.name
        for tensor in member.engine.spec.outputs:
            step.output_map[tensor.name] = tensor.name


def _level(settings: dict[str, Any]) -> int:
    if settings["log_verbose_level"]:
        return logging.DEBUG
    for flag, level in (
        ("log_info", logging.INFO),
        ("log_warning", logging.WARNING),
        ("log_error", logging.ERROR),
    ):
        if settings[flag]:
            return level
    return logging.CRITICAL


def _declared(config: Any, declared: Any, *, batched: bool) -> None:
    """What config.pbtxt says, whole, as Triton gives it back; but what can be seen of the engine holds: its
    tensors and their types, and shapes that the file does not narrow.  Triton's dimensions are those behind
    the batch.
    """
    seen = config_pb.ModelConfig()
    seen.CopyFrom(config)
    config.CopyFrom(declared)
    config.name, config.platform, config.backend = seen.name, seen.platform, seen.backend
    batched = batched and declared.max_batch_size > 0
    config.max_batch_size = declared.max_batch_size if batched else 0
    for into, tensors, declarations in (
        (config.input, seen.input, declared.input),
        (config.output, seen.output, declared.output),
    ):
        said = {tensor.name: tensor for tensor in declarations}
        del into[:]
        for tensor in tensors:
            merged = into.add()
            if tensor.name in said:
                merged.CopyFrom(said[tensor.name])
            whole = not batched or merged.is_shape_tensor
            dims = list(tensor.dims) if whole else list(tensor.dims)[1:]
            if not _narrows(merged.dims, dims):
                merged.dims[:] = dims
            merged.name, merged.data_type = tensor.name, tensor.data_type


def _narrows(said: Any, seen: list[int]) -> bool:
    """Whether dimensions are those of the engine, or fix some that it leaves free."""
    return len(said) == len(seen) and all(own in (-1, one) for one, own in zip(said, seen, strict=True))


def _config_type(tensor: TensorSpec) -> config_pb.DataType:
    name = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    return config_pb.DataType.Value(f"TYPE_{name}")


def _statistics(name: str, version: int, now: StatisticsSnapshot) -> pb.ModelStatistics:
    stages = now.stages

    def duration(count: int, ns: int) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=count, ns=ns)

    return pb.ModelStatistics(
        name=name,
        version=str(version),
        last_inference=now.last_inference_ms,
        inference_count=now.inferences,
        execution_count=now.executions,
        inference_stats=pb.InferStatistics(
            success=duration(now.success, now.success_ns),
            fail=duration(now.fail, now.fail_ns),
            queue=duration(now.success, stages.queue),
            compute_input=duration(now.success, stages.compute_input),
            compute_infer=duration(now.success, stages.compute_infer),
            compute_output=duration(now.success, stages.compute_output),
            cache_hit=duration(0, 0),
            cache_miss=duration(0, 0),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=size,
                compute_input=duration(count, first),
                compute_infer=duration(count, second),
                compute_output=duration(count, third),
            )
            for size, (count, first, second, third) in sorted(now.batches.items())
        ],
    )


def _no_repository_name(name: str) -> None:
    if name:
        message = "'repository_name' specification is not supported"
        raise ServiceError(Code.UNIMPLEMENTED, message, "invalid")


def _invalid(message: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, message, "invalid")
