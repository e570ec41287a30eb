"""CPU: a model's parameters in one piece of shared memory.

Every tensor starts at a multiple of 64 bytes of one memfd that is sealed against being resized, so that no
reader of it can meet SIGBUS. Tensors whose bytes overlap (tied weights, views) keep sharing them. The memory
lives as long as a tensor in it, the descriptor that others open it by as long as the object.
"""

import fcntl
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .errors import ExportError
from .manifest import TensorEntry, Weights, span_bytes
from .parameters import parameters_of

ALIGNMENT_BYTES = 64


class SharedMemory:
    """The memory of one model's parameters. ``close`` ends the offer, not the memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Moves the parameters of ``model``, which must be on the CPU, and whatever else shares their bytes.

        At no time is more than one group of overlapping tensors held twice.
        """
        named = parameters_of(model)
        groups = _groups(_tensors_at_the_same_places(model, named))
        self._bytes = max(sum(_aligned(group.bytes) for group in groups), ALIGNMENT_BYTES)
        self._fd = _sealed_memory(self._bytes)
        memory = mmap.mmap(self._fd, self._bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._address = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
        offset = 0
        while groups:
            group = groups.pop()
            group.move(memory, offset)
            offset += _aligned(group.bytes)

    def holds(self, model: torch.nn.Module) -> bool:
        """Whether every parameter of ``model`` still lies in this memory."""
        return all(
            parameter.numel() == 0 or 0 <= self._offset(parameter) < self._bytes
            for parameter in parameters_of(model).values()
        )

    def weights(self, model: torch.nn.Module) -> Weights:
        """Describes the parameters, which must lie here."""
        return Weights(
            allocations=[{"kind": "file", "path": f"/proc/{os.getpid()}/fd/{self._fd}", "bytes": self._bytes}],
            tensors=[
                TensorEntry.of(name, parameter, 0, self._offset(parameter) if parameter.numel() else 0)
                for name, parameter in parameters_of(model).items()
            ],
        )

    def close(self) -> None:
        """Closes the descriptor. The parameters stay where they are."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _offset(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr() - self._address


@dataclass
class _Group:
    """Tensors of one storage whose bytes overlap."""

    storage: torch.UntypedStorage
    #: First byte in the storage, and the byte after the last.
    start: int
    end: int
    members: list[torch.Tensor]

    @property
    def bytes(self) -> int:
        return self.end - self.start

    def move(self, memory: mmap.mmap, offset: int) -> None:
        """Copies the bytes to ``offset`` and points every member at them."""
        source = torch.empty(0, dtype=torch.uint8).set_(self.storage, self.start, (self.bytes,), (1,))
        home = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=self.bytes)
        home.copy_(source)
        for tensor in self.members:
            first = tensor.storage_offset() - self.start // tensor.itemsize
            view = torch.empty(0, dtype=tensor.dtype)
            tensor.data = view.set_(home.untyped_storage(), first, tensor.size(), tensor.stride())


def _groups(tensors: Iterator[torch.Tensor]) -> list[_Group]:
    """Disjoint groups, in no particular order."""
    spans = [_span(tensor) for tensor in tensors]
    spans.sort(key=lambda span: (span.storage.data_ptr(), span.start, span.end))
    groups: list[_Group] = []
    for span in spans:
        last = groups[-1] if groups else None
        if last is None or last.storage.data_ptr() != span.storage.data_ptr() or last.end <= span.start:
            groups.append(span)
            continue
        if last.members[0].dtype != span.members[0].dtype:
            raise ExportError(
                f"two tensors of types {last.members[0].dtype} and {span.members[0].dtype} share memory; "
                "make one of them a copy"
            )
        last.end = max(last.end, span.end)
        last.members += span.members
    return groups


def _span(tensor: torch.Tensor) -> _Group:
    start = tensor.storage_offset() * tensor.itemsize
    end = start + span_bytes(tensor.shape, tensor.stride(), tensor.itemsize)
    return _Group(tensor.untyped_storage(), start, end, [tensor])


def _tensors_at_the_same_places(
    model: torch.nn.Module, named: dict[str, torch.nn.Parameter]
) -> Iterator[torch.Tensor]:
    """The parameters, and every buffer and plain attribute of a module that shares a storage with one."""
    storages = {parameter.untyped_storage().data_ptr() for parameter in named.values()}
    seen: set[int] = set()
    for tensor in (*named.values(), *_other_tensors(model)):
        if id(tensor) in seen or tensor.numel() == 0 or tensor.device.type != "cpu":
            continue
        if tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in storages:
            seen.add(id(tensor))
            yield tensor


def _other_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


def _sealed_memory(size: int) -> int:
    fd = os.memfd_create("apollod-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise ExportError(f"no shared memory of {size} bytes: {error}") from error
    return fd


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
