"""Never imported: code that mypy must refuse (`# wrong`) between code that it must accept.

`# wrong in 11` is refused for TensorRT 11 only, `# wrong in 10.12` for the oldest release only.
tests/tensorrt/test_stubs.py compares line by line.
"""
# ruff: noqa: B018

from __future__ import annotations

import numpy as np
import tensorrt as trt


def right(data: bytes, weights: dict[str, np.ndarray]) -> bytes:
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    assert network is not None
    assert config is not None
    assert profile is not None
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(data):
        raise RuntimeError([error.desc() for i in range(parser.num_errors) if (error := parser.get_error(i))])
    profile.set_shape("frame", (1, 4), [2, 4], trt.Dims((3, 4)))
    profile.set_shape("frame", np.array([1, 4]), (np.int64(2), 4), (3, 4))
    index: int = config.add_optimization_profile(profile)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    config.builder_optimization_level = 5
    memory = builder.build_serialized_network(network, config)
    assert memory is not None
    engine = trt.Runtime(logger).deserialize_cuda_engine(memory)
    assert engine is not None
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.STATIC)
    assert context is not None
    context.set_input_shape("frame", (1, 4))
    context.set_input_shape("frame", [1, index])
    context.set_tensor_address("frame", 256)
    context.execute_async_v3(7)
    context.execute_async_v3(stream_handle=7)
    refitter = trt.Refitter(engine, logger)
    for name in refitter.get_all_weights():
        refitter.set_named_weights(name, trt.Weights(weights[name]))
        refitter.set_named_weights(name, weights[name], trt.TensorLocation.HOST)
    shapes: list[trt.Dims] = engine.get_tensor_profile_shape("frame", 0)
    return bytes(memory) + bytes(len(shapes[0]))


class RightMonitor(trt.IProgressMonitor):
    def __init__(self) -> None:
        trt.IProgressMonitor.__init__(self)

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

    def step_complete(self, phase_name: str, step: int) -> bool:
        return True

    def phase_finish(self, phase_name: str) -> None: ...


class RightAllocator(trt.IOutputAllocator):
    def reallocate_output_async(
        self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
    ) -> int:
        return memory

    def notify_shape(self, tensor_name: str, shape: trt.Dims) -> None: ...


def flags_and_names(config: trt.IBuilderConfig, builder: trt.Builder, engine: trt.ICudaEngine) -> None:
    config.set_flag(trt.BuilderFlag.FP16)  # wrong in 11
    config.set_flag(trt.BuilderFlag.INT8)  # wrong in 11
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)  # wrong in 11
    config.set_flag(trt.BuilderFlag.REFIT_SOME)  # wrong
    config.set_flag("REFIT")  # wrong
    config.set_flag(4)  # wrong
    config.set_flag(trt.TacticSource.JIT_CONVOLUTIONS)  # wrong
    config.int8_calibrator  # wrong in 11
    config.max_workspace_size = 1 << 30  # wrong
    config.set_memory_pool_limit(1 << 30, trt.MemoryPoolType.WORKSPACE)  # wrong
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1e9)  # wrong
    config.set_memory_pool_limit(trt.MemoryPoolType.SCRATCH, 1)  # wrong
    config.builder_optimization_level = "5"  # wrong
    config.builder_optimisation_level = 5  # wrong
    config.profiling_verbosity = "DETAILED"  # wrong
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE  # wrong
    config.add_optimization_profile()  # wrong
    config.create_timing_cache()  # wrong
    config.set_timing_cache(b"", False)  # wrong
    config.progress_monitor = print  # wrong
    trt.SerializationFlag.INCLUDE_REFIT  # wrong in 10.12
    builder.build_engine(None, config)  # wrong
    builder.max_batch_size = 4  # wrong
    builder.platform_has_fast_fp16  # wrong in 11
    builder.create_network(flags="STRONGLY_TYPED")  # wrong
    builder.create_network().num_inputs  # wrong
    trt.NetworkDefinitionCreationFlag.STRONG  # wrong
    trt.Logger(verbosity=trt.Logger.WARNING)  # wrong
    trt.Logger("WARNING")  # wrong
    trt.Builder()  # wrong
    trt.IBuilderConfig()  # wrong
    engine.device_memory_size  # wrong in 11
    engine.create_execution_context_without_device_memory()  # wrong in 11
    engine.num_bindings  # wrong
    engine.get_binding_shape(0)  # wrong
    engine.get_tensor_name("frame")  # wrong
    engine.get_tensor_mode(0)  # wrong
    engine.get_tensor_profile_shape(0, "frame")  # wrong
    engine.get_tensor_profile_shape("frame")  # wrong
    engine.refittable()  # wrong
    engine.create_execution_context().name  # wrong
    engine.serialize().nbytes  # wrong
    engine.get_engine_stat("TOTAL_WEIGHTS_SIZE")  # wrong


def running(context: trt.IExecutionContext, runtime: trt.Runtime, data: bytes) -> None:
    context.execute_async_v2([1, 2], 7)  # wrong
    context.execute_async_v3()  # wrong
    context.execute_async_v3("7")  # wrong
    context.execute_async_v3(7.0)  # wrong
    context.execute_async_v3(stream=7)  # wrong
    context.set_tensor_address("frame")  # wrong
    context.set_tensor_address(256, "frame")  # wrong
    context.set_tensor_address("frame", None)  # wrong
    context.set_input_shape("frame", (1.0, 4.0))  # wrong
    context.set_input_shape("frame", 1, 4)  # wrong
    context.set_input_shape((1, 4), "frame")  # wrong
    context.set_binding_shape(0, (1, 4))  # wrong
    context.set_device_memory(256)  # wrong
    context.set_optimization_profile_async(0)  # wrong
    shape: list[int] = context.get_tensor_shape("frame")  # wrong
    missing: bool = context.infer_shapes()  # wrong
    runtime.deserialize_cuda_engine(data).num_layers  # wrong
    runtime.deserialize_cuda_engine("model.plan")  # wrong
    runtime.deserialize_engine(data)  # wrong
    del shape, missing


def refitting(engine: trt.ICudaEngine, logger: trt.Logger, array: np.ndarray) -> None:
    refitter = trt.Refitter(logger, engine)  # wrong
    refitter = trt.Refitter(engine)  # wrong
    refitter.set_named_weights("w")  # wrong
    refitter.set_named_weights(array, "w")  # wrong
    refitter.set_named_weights("w", [1.0, 2.0])  # wrong
    refitter.set_named_weights("w", array, "HOST")  # wrong
    refitter.refit_cuda_engine_async()  # wrong
    refitter.refit()  # wrong
    names: set[str] = refitter.get_all_weights()  # wrong
    trt.Weights(trt.DataType.FLOAT, array)  # wrong
    trt.DataType.FLOAT32  # wrong
    trt.nptype("FLOAT")  # wrong
    del names


def parsing(network: trt.INetworkDefinition, logger: trt.Logger) -> None:
    parser = trt.OnnxParser(logger, network)  # wrong
    parser.parse("model.onnx")  # wrong
    parser.get_error(0).desc()  # wrong
    parser.num_errors()  # wrong
    parser.errors  # wrong
    network.get_input("frame")  # wrong
    network.get_input(0).shape  # wrong
    network.mark_weights_refittable()  # wrong
    network.mark_weights_refitable("w")  # wrong


class WrongMonitor(trt.IProgressMonitor):
    def phase_start(self, phase_name: str, num_steps: int) -> None: ...  # wrong

    def step_complete(self, phase_name: str, step: str) -> bool:  # wrong
        return True

    def phase_finish(self) -> None: ...  # wrong


class WrongLogger(trt.ILogger):
    def log(self, msg: str) -> None: ...  # wrong


class WrongProfiler(trt.IProfiler):
    def report_layer_time(self, layer_name: str, ms: str) -> None: ...  # wrong
