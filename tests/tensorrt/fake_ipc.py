"""libcuda's calls for memory of other processes, in host memory, enforcing the documented rules.

Arguments are the ctypes objects that the real functions take.  Each allocation is of "another process",
unless it is made with `own`: it has a handle, and an address only while it is open.  A copy to the device has
arrived once the default stream was waited for.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from tests.tensorrt.fakes import rule

INVALID_VALUE, INVALID_DEVICE, INVALID_CONTEXT, INVALID_HANDLE = 1, 101, 201, 400


class Ipc:
    def __init__(self, devices: int = 1) -> None:
        self.devices = devices
        self.exported: dict[bytes, Any] = {}
        self.open: dict[int, Any] = {}  # address -> allocation
        self.counts: dict[int, int] = {}  # address -> how often it is open
        self.own: set[bytes] = set()  # handles of the process that opens them
        self.copying: list[Callable[[], Any]] = []
        self.retained: list[int] = []
        self._current = threading.local()
        self.gone = False  # the device fell off the bus: every copy fails

    def allocate(self, content: bytes, *, own: bool = False) -> bytes:
        """A client's allocation: its handle.  `own`: the client is the server's process."""
        handle = bytes([len(self.exported) + 1]) * 63 + b"\0"
        if own:
            self.own.add(handle)
        self.exported[handle] = (ctypes.c_char * len(content)).from_buffer_copy(content)
        return handle

    def content(self, handle: bytes) -> bytes:
        return bytes(self.exported[handle])

    def _there(self) -> None:
        rule(getattr(self._current, "context", None), "no context is current on this thread")

    def _inside(self, address: int, size: int) -> bool:
        return any(at <= address and address + size <= at + len(memory) for at, memory in self.open.items())

    # ------------------------------------------------------------------------------------- libcuda
    def cuDeviceGet(self, device: Any, ordinal: Any) -> int:
        if not 0 <= ordinal.value < self.devices:
            return INVALID_DEVICE
        device._obj.value = ordinal.value
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        self.retained.append(device.value)
        context._obj.value = 0xC0 + device.value
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self._current.context = context.value
        return 0

    def cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: Any) -> int:
        self._there()
        rule(ctypes.sizeof(handle) == 64, "a CUipcMemHandle has 64 bytes")
        rule(flags.value == 1, "CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS is the only flag")
        name = ctypes.string_at(ctypes.byref(handle), 64)
        memory = self.exported.get(name)
        if memory is None:
            return INVALID_HANDLE
        if name in self.own:
            return INVALID_CONTEXT
        at = ctypes.addressof(memory)
        self.open[at] = memory
        self.counts[at] = self.counts.get(at, 0) + 1  # the same address again, as the documentation says
        address._obj.value = at
        return 0

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: Any) -> int:
        self._there()
        memory = self.open.get(address.value)
        if memory is None:
            return INVALID_VALUE
        base._obj.value, size._obj.value = address.value, len(memory)
        return 0

    def cuMemcpyDtoH_v2(self, target: Any, address: Any, size: Any) -> int:
        self.cuStreamSynchronize(ctypes.c_void_p(0))
        if code := self._refused(address.value, size.value):
            return code
        ctypes.memmove(target.value, address.value, size.value)
        return 0

    def cuMemcpyHtoD_v2(self, address: Any, source: Any, size: Any) -> int:
        if code := self._refused(address.value, size.value):
            return code
        staged = ctypes.string_at(source.value, size.value)
        self.copying.append(lambda: ctypes.memmove(address.value, staged, len(staged)))
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:
        self._there()
        rule(stream.value is None, "not the default stream")
        work, self.copying = self.copying, []
        for copy in work:
            copy()
        return 0

    def _refused(self, device: int, size: int) -> int:
        self._there()
        if self.gone:
            return INVALID_VALUE
        rule(self._inside(device, size), f"{size} bytes at {device:#x} are not inside what is open")
        return 0

    def cuIpcCloseMemHandle(self, address: Any) -> int:
        self._there()
        at = address.value
        if at not in self.open:
            return INVALID_VALUE
        self.counts[at] -= 1
        if not self.counts[at]:
            del self.open[at]
        return 0
