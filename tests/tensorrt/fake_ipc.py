"""libcuda's calls for memory of other processes, in host memory, enforcing the documented rules.

Arguments are the ctypes objects that the real functions take.  Each allocation is of "another process": it
has a handle, and an address only while it is open.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from tests.tensorrt.fakes import rule

INVALID_VALUE, INVALID_DEVICE, MAP_FAILED, INVALID_HANDLE = 1, 101, 205, 400


class Ipc:
    def __init__(self, devices: int = 1) -> None:
        self.devices = devices
        self.exported: dict[bytes, Any] = {}
        self.open: dict[int, Any] = {}  # address -> allocation
        self.retained: list[int] = []
        self._current = threading.local()
        self.gone = False  # the device fell off the bus: every copy fails

    def allocate(self, content: bytes) -> bytes:
        """A client's allocation: its handle."""
        handle = bytes([len(self.exported) + 1]) * 63 + b"\0"
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
        memory = self.exported.get(ctypes.string_at(ctypes.byref(handle), 64))
        if memory is None:
            return INVALID_HANDLE
        at = ctypes.addressof(memory)
        if at in self.open:
            return MAP_FAILED
        self.open[at] = memory
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
        return self._copy(target.value, address.value, address.value, size.value)

    def cuMemcpyHtoD_v2(self, address: Any, source: Any, size: Any) -> int:
        return self._copy(address.value, source.value, address.value, size.value)

    def _copy(self, target: int, source: int, device: int, size: int) -> int:
        self._there()
        if self.gone:
            return INVALID_VALUE
        rule(self._inside(device, size), f"{size} bytes at {device:#x} are not inside what is open")
        ctypes.memmove(target, source, size)
        return 0

    def cuIpcCloseMemHandle(self, address: Any) -> int:
        self._there()
        return 0 if self.open.pop(address.value, None) is not None else INVALID_VALUE
