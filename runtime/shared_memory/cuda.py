"""CUDA shared memory: a client's device memory, opened by its handle, read and written for requests.

A client exports an allocation with `cuIpcGetMemHandle` and registers the 64 bytes; the server maps it into
the device's primary context and copies tensors between it and host memory, where engines take them.  The
driver is called directly, so this needs NVIDIA's driver and nothing else.

Not executed on a CUDA device: checked against a driver of fakes that enforces the documented rules, and by
`tests/gpu` where there is a device.  Where there is none, registering is refused in Triton's words.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from typing import Any

import numpy as np

from runtime.engines.cuda.context import CudaError, probe
from runtime.engines.cuda.gate import GATE
from runtime.errors import Code, ServiceError
from runtime.shared_memory.system import Memory, ShmRef
from runtime.tensors import Array

HANDLE = 64  # bytes of a CUipcMemHandle
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the one flag there is
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


class OwnHandle(CudaError):
    """The handle is of this process's own memory, and CUDA opens a handle in another process only."""


class Handle(ctypes.Structure):
    """CUipcMemHandle, passed by value."""

    _fields_ = [("reserved", ctypes.c_char * HANDLE)]


class Driver:
    """The few calls of libcuda that this takes.  `library` is for tests.

    Raises CudaError from the first call that fails; CUDA's current context is one a thread, so each operation
    makes the device's primary context current on the thread it is called on.
    """

    def __init__(self, library: Any = None) -> None:
        if library is None:
            probe()  # asks, in order, whether there is a driver and a device
            library = ctypes.CDLL("libcuda.so.1")
        self._cuda = library
        self._lock = threading.Lock()
        self._contexts: dict[int, ctypes.c_void_p] = {}

    def open(self, device: int, handle: bytes) -> tuple[int, int]:
        """(address, bytes from there to the end of its allocation) of a client's memory.

        Raises OwnHandle if this process made the handle, CudaError for everything else.
        """
        if len(handle) != HANDLE:
            raise CudaError(f"a handle of {len(handle)} bytes; a CUipcMemHandle has {HANDLE}")
        with GATE.change():
            return self._open(device, handle)

    def _open(self, device: int, handle: bytes) -> tuple[int, int]:
        self._enter(device)
        address = ctypes.c_uint64()
        value = Handle()
        ctypes.memmove(ctypes.byref(value), handle, HANDLE)
        flags = ctypes.c_uint(_LAZY_PEER_ACCESS)
        code = self._cuda.cuIpcOpenMemHandle_v2(ctypes.byref(address), value, flags)
        if code == _INVALID_CONTEXT:
            # `_enter` has just made a context current, so this code has one meaning left.
            raise OwnHandle(
                "the handle was made by the server's own process, and CUDA opens a handle in another process "
                "only: run the client as a process of its own, or send the tensors inside the request"
            )
        self._judge("cuIpcOpenMemHandle_v2", code)
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        try:
            self._ask("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        except CudaError:
            self._ask("cuIpcCloseMemHandle", address)
            raise
        return address.value, base.value + size.value - address.value

    def download(self, device: int, target: Array, address: int) -> None:
        pointer = ctypes.c_void_p(target.ctypes.data)
        with GATE.run():
            self._enter(device)
            self._ask("cuMemcpyDtoH_v2", pointer, ctypes.c_uint64(address), ctypes.c_size_t(target.nbytes))

    def upload(self, device: int, address: int, source: Array) -> None:
        pointer = ctypes.c_void_p(source.ctypes.data)
        with GATE.run():
            self._enter(device)
            self._ask("cuMemcpyHtoD_v2", ctypes.c_uint64(address), pointer, ctypes.c_size_t(source.nbytes))
            # A copy from pageable memory returns as soon as the source may be changed.  The client's streams
            # wait for nothing of ours, so the copy must have arrived before the client gets its answer.
            self._ask("cuStreamSynchronize", ctypes.c_void_p(0))

    def close(self, device: int, address: int) -> None:
        with GATE.change():
            self._enter(device)
            self._ask("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def _enter(self, device: int) -> None:
        """The primary context is retained once, and kept: engines on the device use the same one."""
        with self._lock:
            context = self._contexts.get(device)
            if context is None:
                number = ctypes.c_int()
                self._ask("cuDeviceGet", ctypes.byref(number), ctypes.c_int(device))
                context = ctypes.c_void_p()
                self._ask("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
                self._contexts[device] = context
        self._ask("cuCtxSetCurrent", context)

    def _ask(self, function: str, *arguments: Any) -> None:
        self._judge(function, getattr(self._cuda, function)(*arguments))

    @staticmethod
    def _judge(function: str, code: int) -> None:
        if code:
            raise CudaError(f"the CUDA driver refuses {function} with error {code}")


class CudaRegion(Memory):
    """`byte_size` bytes of a client's device memory."""

    kind = "cuda"

    def __init__(self, name: str, device_id: int, byte_size: int, address: int, driver: Driver) -> None:
        super().__init__(name, byte_size)
        self.device_id = device_id
        self._address = address
        self._driver = driver

    def read(self, place: ShmRef) -> Array:
        self.check(place)
        content = np.empty(place.byte_size, np.uint8)
        try:
            self._driver.download(self.device_id, content, self._address + place.offset)
        except CudaError as error:
            raise self._failed(error) from error
        return content

    def write(self, place: ShmRef, content: bytes | memoryview) -> None:
        self.check(ShmRef(place.region, place.offset, max(1, len(content))))
        source = np.frombuffer(content, np.uint8)
        if not source.size:
            return
        try:
            self._driver.upload(self.device_id, self._address + place.offset, source)
        except CudaError as error:
            raise self._failed(error) from error

    def _failed(self, error: CudaError) -> ServiceError:
        message = f"cuda shared memory region '{self.name}': {error}; register it again"
        return ServiceError(Code.INTERNAL, message, "shared-memory")

    def _close(self) -> None:
        with contextlib.suppress(CudaError):  # the client's process, and with it the memory, may be gone
            self._driver.close(self.device_id, self._address)


_lock = threading.Lock()
_driver: Driver | None = None


def driver() -> Driver:
    """The process's one driver.  Raises CudaError where there is no device."""
    global _driver
    with _lock:
        if _driver is None:
            _driver = Driver()
        return _driver


def open_region(name: str, handle: bytes, device_id: int, byte_size: int) -> CudaRegion:
    """Raises ServiceError(INVALID_ARGUMENT), in Triton's words, for what cannot be opened or is too small.

    If the server's own process made the handle, the remedy follows Triton's words.
    """
    failure = ServiceError(
        Code.INVALID_ARGUMENT, "failed to register shared memory region: invalid args", "shared-memory"
    )
    if byte_size < 1 or not 0 <= device_id < 1 << 31:
        raise failure
    try:
        cuda = driver()
        address, size = cuda.open(device_id, handle)
    except OwnHandle as error:
        raise ServiceError(failure.code, f"{failure.message}: {error}", failure.reason) from error
    except CudaError as error:
        raise failure from error
    if byte_size > size:
        cuda.close(device_id, address)
        raise failure
    return CudaRegion(name, device_id, byte_size, address, cuda)
