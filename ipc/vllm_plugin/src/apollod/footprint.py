"""Where a model's parameters lay when it was exported, so that replaced ones are noticed."""

import torch

from .parameters import parameters_of


class Footprint:
    """Keeps the memory of a model's parameters from being used for anything else as long as it lives."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = {name: parameter.detach() for name, parameter in parameters_of(model).items()}

    def is_of(self, model: torch.nn.Module) -> bool:
        """Whether every parameter of then is where and what it was. Compares addresses, reads no memory."""
        try:
            now = dict(model.named_parameters(remove_duplicate=False))
            return all(name in now and _place(now[name]) == _place(then) for name, then in self._tensors.items())
        except RuntimeError:
            return False  # The model is changed by another thread, or has tensors without an address.

    def overlaps(self, model: torch.nn.Module) -> bool:
        """Whether a parameter of ``model`` lies in a storage of these."""
        return not _storages(self._tensors).isdisjoint(_storages(parameters_of(model)))


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _storages(tensors: dict[str, torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()}
