"""A module's parameters, and which of them cannot be trained in place."""

import torch

from .errors import ExportError
from .manifest import DTYPES


def parameters_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every parameter by name; a tied one under each of its names. All on one device, all trainable in place.

    Raises ExportError with the name of the first that is not.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if not named:
        raise ExportError(f"{type(model).__name__} has no parameters")
    for name, parameter in named.items():
        if reason := _reason_against(parameter):
            raise ExportError(f"tensor `{name}` {reason}")
    first, device = next((name, parameter.device) for name, parameter in named.items())
    for name, parameter in named.items():
        if parameter.device != device:
            raise ExportError(
                f"tensor `{name}` is on {parameter.device} and `{first}` on {device}; "
                "put the whole model on one device (no offloading, no device_map over several)"
            )
    if device.type not in ("cpu", "cuda"):
        raise ExportError(f"the model is on {device}; only CPU and CUDA memory can be shared")
    return named


def _reason_against(tensor: torch.Tensor) -> str | None:
    if torch.nn.parameter.is_lazy(tensor):
        return "is not initialized; run the model once before it is exported"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {type(tensor).__name__}, not a plain tensor; load the model unquantized and unsharded"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}; only strided tensors can be shared"
    if tensor.is_meta:
        return "is on the meta device; load the weights first"
    if tensor.dtype not in DTYPES:
        return f"has dtype {tensor.dtype}, which cannot be trained in place; load it in bfloat16, float16 or float32"
    if any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return "is expanded: several of its elements are one; make it contiguous"
    return None
