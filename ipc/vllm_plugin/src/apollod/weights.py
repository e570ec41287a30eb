"""A model's weights, made shareable where they are (CUDA) or moved to where they can be shared (CPU)."""

import torch

from .cuda import CudaDriver, Driver, Span, places
from .manifest import TensorEntry, Weights, span_bytes
from .memory import SharedMemory
from .parameters import parameters_of


class SharedWeights:
    """Keeps what others open a model's weights by."""

    def __init__(self) -> None:
        self._memory: SharedMemory | None = None

    def share(self, model: torch.nn.Module) -> Weights:
        """Makes the parameters of ``model`` shareable and describes them.

        May be called again when parameters were replaced. Raises ExportError with the name of the first
        parameter that cannot be shared; nothing was moved then.
        """
        device = next(iter(parameters_of(model).values())).device
        if device.type == "cuda":
            return cuda_weights(model, device, CudaDriver())
        if self._memory is None or not self._memory.holds(model):
            self.close()
            self._memory = SharedMemory(model)
        return self._memory.weights(model)

    def close(self) -> None:
        """Ends the offer. The parameters stay where they are, and usable."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def cuda_weights(model: torch.nn.Module, device: torch.device, driver: Driver) -> Weights:
    """Describes parameters on ``device``."""
    named = parameters_of(model)
    spans = [
        Span(name, tensor.data_ptr(), span_bytes(tensor.shape, tensor.stride(), tensor.itemsize))
        for name, tensor in named.items()
    ]
    with torch.cuda.device(device):
        # Makes the device's context current in this thread; and what was written is there for others to see.
        torch.cuda.synchronize(device)
        allocations, found = places(spans, driver)
    return Weights(
        allocations=allocations,
        tensors=[
            TensorEntry.of(name, tensor, place.allocation, place.offset)
            for (name, tensor), place in zip(named.items(), found, strict=True)
        ],
    )
