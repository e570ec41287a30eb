"""A model on the CPU whose weights lie in memory of the CUDA driver that is found: for a driver that simulates one.

`apollod.export` then does what it does on a GPU: it asks the driver for the allocations and their handles.
"""
import ctypes
import sys

import torch

import apollod
from apollod.cuda import CudaDriver, Span, places
from apollod.manifest import TensorEntry, Weights, span_bytes
from apollod.parameters import parameters_of
from driver import Driver

ALIGNMENT_BYTES = 512      # as torch's allocator places tensors
TENSORS_PER_ALLOCATION = 8


class SimulatedWeights:
    """Takes the place of apollod.weights.SharedWeights."""

    def share(self, model):
        driver, spans, named = Driver(), [], parameters_of(model)
        # A tied parameter has two names and one place.
        unique = list({id(tensor): tensor for tensor in named.values()}.values())
        for start in range(0, len(unique), TENSORS_PER_ALLOCATION):
            self._move(driver, unique[start:start + TENSORS_PER_ALLOCATION])
        for name, tensor in named.items():
            spans.append(Span(name, tensor.data_ptr(), span_bytes(tensor.shape, tensor.stride(), tensor.itemsize)))
        allocations, found = places(spans, CudaDriver())
        entries = zip(named.items(), found, strict=True)
        return Weights(allocations=allocations,
                       tensors=[TensorEntry.of(n, t, place.allocation, place.offset) for (n, t), place in entries])

    def close(self):
        pass

    def _move(self, driver, tensors):
        sizes = [-(-t.numel() * t.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for t in tensors]
        base = driver.alloc(sum(sizes))
        memory = (ctypes.c_ubyte * sum(sizes)).from_address(base)
        offset = 0
        for tensor, size in zip(tensors, sizes):
            home = torch.frombuffer(memory, dtype=tensor.dtype, offset=offset, count=tensor.numel()).view(tensor.shape)
            home.copy_(tensor.data)
            tensor.data = home
            offset += size


def install():
    sys.modules["apollod.export"].SharedWeights = SimulatedWeights
