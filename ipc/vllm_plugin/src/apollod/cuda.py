"""CUDA: where parameters lie, and the handles by which another process opens that memory.

torch's allocator puts many tensors into one allocation of the driver. The driver is asked for the allocation of
each tensor (cuMemGetAddressRange) and gives one handle per allocation (cuIpcGetMemHandle). Memory from the
virtual-memory functions has no such handle and is refused.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .errors import ExportError

#: CUpointer_attribute: whether cuIpcGetMemHandle can share the memory at a pointer.
IS_LEGACY_CUDA_IPC_CAPABLE = 10
#: CUpointer_attribute: the device that a pointer belongs to.
DEVICE_ORDINAL = 9
#: sizeof(CUipcMemHandle)
IPC_HANDLE_BYTES = 64


class Driver(Protocol):
    """What is asked of the CUDA driver, about device pointers. The device's context must be current."""

    def is_ipc_capable(self, pointer: int) -> bool:
        """Whether the allocation at ``pointer`` can be shared by a handle."""

    def address_range(self, pointer: int) -> tuple[int, int]:
        """Base and size in bytes of the allocation that ``pointer`` lies in."""

    def ipc_handle(self, base: int) -> bytes:
        """The handle of the allocation at ``base``."""

    def device_uuid(self, pointer: int) -> str:
        """The device that ``pointer`` belongs to, as ``GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx``."""


@dataclass(frozen=True)
class Span:
    """A tensor's bytes on the device."""

    name: str
    pointer: int
    bytes: int


@dataclass(frozen=True)
class Place:
    """Where a span lies: index of its allocation, first byte in it."""

    allocation: int
    offset: int


def places(spans: Sequence[Span], driver: Driver) -> tuple[list[dict[str, Any]], list[Place]]:
    """Allocations as the manifest lists them, each once, and the place of each span, in order."""
    allocations: list[dict[str, Any]] = []
    index_of_base: dict[int, int] = {}
    found: list[Place] = []
    for span in spans:
        if span.bytes == 0:
            found.append(Place(0, 0))
            continue
        if not driver.is_ipc_capable(span.pointer):
            raise ExportError(
                f"tensor `{span.name}` lies in memory that has no CUDA IPC handle; start the server without "
                "sleep mode (--enable-sleep-mode), without --enable-cumem-allocator, and with "
                "PYTORCH_CUDA_ALLOC_CONF=backend:native,expandable_segments:False"
            )
        base, size = driver.address_range(span.pointer)
        if span.pointer + span.bytes > base + size:
            raise ExportError(f"tensor `{span.name}` reaches beyond the {size} bytes of its CUDA allocation")
        if base not in index_of_base:
            index_of_base[base] = len(allocations)
            allocations.append(
                {
                    "kind": "cuda_ipc",
                    "handle": driver.ipc_handle(base).hex(),
                    "bytes": size,
                    "device": driver.device_uuid(base),
                }
            )
        found.append(Place(index_of_base[base], span.pointer - base))
    return allocations, found


class CudaDriver:
    """The driver of this machine, ``libcuda.so.1``."""

    def __init__(self, library: Any = None) -> None:
        """``library`` is the loaded driver; by default it is looked up by its name."""
        try:
            self._cuda = library if library is not None else ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise ExportError(f"the CUDA driver cannot be loaded: {error}") from error

    def is_ipc_capable(self, pointer: int) -> bool:
        return self._attribute(IS_LEGACY_CUDA_IPC_CAPABLE, pointer) != 0

    def address_range(self, pointer: int) -> tuple[int, int]:
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(pointer))
        return base.value, size.value

    def ipc_handle(self, base: int) -> bytes:
        handle = (ctypes.c_ubyte * IPC_HANDLE_BYTES)()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
        return bytes(handle)

    def device_uuid(self, pointer: int) -> str:
        device, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(self._attribute(DEVICE_ORDINAL, pointer)))
        self._call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)
        digits = bytes(uuid).hex()
        return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"

    def _attribute(self, attribute: int, pointer: int) -> int:
        # The attributes asked for here are written as a bool or an int; eight zeroed bytes hold either.
        value = ctypes.c_uint64(0)
        self._call("cuPointerGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_uint64(pointer))
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        result = getattr(self._cuda, function)(*arguments)
        if result != 0:
            name = ctypes.c_char_p()
            self._cuda.cuGetErrorName(ctypes.c_int(result), ctypes.byref(name))
            raise ExportError(f"{function} failed with {(name.value or b'an unknown error').decode()} ({result})")
