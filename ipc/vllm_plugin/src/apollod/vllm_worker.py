"""vLLM's worker, which holds the weights: keeps them live, shares them and says what merged ones hold."""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .errors import ExportError
from .manifest import Weights
from .weights import SharedWeights

logger = logging.getLogger("vllm.apollod")

#: One per process: a worker process has one model.
_shared = SharedWeights()


@dataclass(frozen=True)
class Shared:
    """What a worker answers: weights, or why there are none."""

    weights: Weights | None = None
    refusal: str | None = None


def keep_weights_live(pack: Callable[..., None]) -> Callable[..., None]:
    """Replaces ``dispatch_cpu_unquantized_gemm``, which packs a copy of each weight and drops the weight."""

    def use_weight_itself(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.is_meta or layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        elif layer.weight.ndim == 3 and layer.weight.size(1) == 1 and _convolve_with_weights_themselves():
            pass
        else:
            pack(layer, remove_weight)  # Its kernel wants it packed; `share` refuses it.

    return use_weight_itself


def _convolve_with_weights_themselves() -> bool:
    """Tells vLLM's convolutions, where they are kernels of AVX-512 or Arm, that the weight is not packed.

    False if this version of vLLM has others: they get what they want, and the server goes on.
    """
    try:
        from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

        kernels = {name: getattr(gdn_attention, name) for name in ("_causal_conv1d_fwd_cpu", "_causal_conv1d_update_cpu")}
    except (ImportError, AttributeError):
        return False
    for name, convolve in kernels.items():
        if not hasattr(convolve, "of_apollod"):
            setattr(gdn_attention, name, marked(unpacked(convolve)))
    return True


def unpacked(convolve: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``convolve``, given a weight of [channels, 1, width] as the model has it."""

    @functools.wraps(convolve)
    def convolve_unpacked(*, weight: torch.Tensor, is_weight_packed: bool, **rest: Any) -> torch.Tensor:
        return convolve(weight=weight.flatten(1), is_weight_packed=False, **rest)

    return convolve_unpacked


def marked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a hook as set, since vLLM may load a plugin more than once in a process."""
    function.of_apollod = True  # type: ignore[attr-defined]
    return function


def share(wrapper: Any) -> Shared | None:
    """Runs in every worker, by ``collective_rpc``. None from all but rank 0."""
    worker = getattr(wrapper, "worker", wrapper)
    try:
        if worker.rank != 0:
            logger.info("apollod: rank %s offers no weights; rank 0 answers for all", worker.rank)
            return None
        model = worker.model_runner.get_model()
        refuse_transformed(model, worker.vllm_config)
        shared = _shared.share(model)
        tensors = [replace(tensor, name=_hf_name(tensor.name)) for tensor in shared.tensors]
        whole = worker.vllm_config.parallel_config.world_size == 1
        return Shared(replace(shared, tensors=tensors, packing=list(packing_of(model, check_sizes=whole))))
    except ExportError as error:
        return Shared(refusal=str(error))
    except Exception as error:  # Nothing that goes wrong here may stop the server.
        logger.exception("apollod: the weights cannot be shared")
        return Shared(refusal=f"{type(error).__name__}: {error}")


def refuse_transformed(model: torch.nn.Module, vllm_config: Any) -> None:
    """Raises ExportError if the server computes with something else than the model's own weights."""
    if quantization := vllm_config.model_config.quantization:
        raise ExportError(f"the model is quantized ({quantization}); serve the unquantized model")
    for name, module in model.named_modules():
        method = type(getattr(module, "quant_method", None)).__name__
        if method != "NoneType" and not method.startswith("Unquantized"):
            raise ExportError(f"module `{name}` is quantized ({method}); serve the unquantized model")
        if hasattr(module, "_cpu_unpacked_conv_weight"):
            raise ExportError(f"tensor `{name}.weight` was packed for vLLM's CPU convolution")
        if hasattr(module, "w13_weight"):
            _refuse_packed_experts(name, module)
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and vllm_config.compilation_config.inductor_compile_config.get("max_autotune"):
        raise ExportError("max_autotune freezes the weights into the compiled model; do not set it")


def _refuse_packed_experts(name: str, module: torch.nn.Module) -> None:
    """Most kernels want the experts' weights in an order of their own, under the same names and often in the same shape."""
    backend = getattr(getattr(getattr(module, "quant_method", None), "unquantized_backend", None), "name", "unknown")
    if backend in ("TRITON", "BATCHED_TRITON"):
        return
    on_cpu = "serve it from a program that calls apollod.export, or with `apollod engine`"
    advice = on_cpu if backend == "CPU" else "start vLLM with --moe-backend triton"
    raise ExportError(f"the experts of `{name}` are packed for vLLM's {backend} kernel; {advice}")


def packing_of(model: torch.nn.Module, check_sizes: bool) -> Iterator[dict[str, Any]]:
    """What each merged linear layer holds, as the model's ``packed_modules_mapping`` says.

    With ``check_sizes`` the rows must be those that the layer counts; a shard has fewer.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        sizes = getattr(module, "output_sizes", None)
        if sizes is None or not hasattr(module, "weight"):
            continue
        parent, _, merged = _hf_name(name).rpartition(".")
        parts = _parts(modules, name, merged)
        if parts is None:
            logger.info("apollod: %s does not say what `%s` holds", type(model).__name__, name)
            continue
        for kind in ("weight", "bias"):
            tensor = getattr(module, kind, None)
            if tensor is None:
                continue
            if check_sizes and sum(sizes) != tensor.shape[0]:
                raise ExportError(f"tensor `{name}.{kind}` has {tensor.shape[0]} rows, its parts {list(sizes)}")
            prefix = f"{parent}." if parent else ""
            yield {
                "merged": f"{prefix}{merged}.{kind}",
                "parts": [f"{prefix}{part}.{kind}" for part in parts],
            }


def _parts(modules: dict[str, torch.nn.Module], name: str, merged: str) -> list[str] | None:
    """The parts of a merged layer by the nearest enclosing module that names them."""
    while True:
        mapping = getattr(modules.get(name), "packed_modules_mapping", None) or {}
        if merged in mapping:
            return list(mapping[merged])
        if not name:
            return None
        name = name.rpartition(".")[0]


def _hf_name(name: str) -> str:
    """Without the wrapper that LoRA puts around a layer."""
    return name.replace(".base_layer", "")
