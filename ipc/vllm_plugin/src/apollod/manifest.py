"""The manifest, version 1: what a server says about its weights.

``allocations`` are spans of memory, ``tensors`` lie in them (offset in bytes, shape and strides in elements),
``packing`` says which tensors of the model a merged one holds.
"""

import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import ExportError

VERSION = 1
#: The element types that can be trained in place, by torch's spelling.
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
ITEM_BYTES = {name: dtype.itemsize for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in an allocation."""

    name: str
    dtype: str
    shape: list[int]
    #: In elements.
    strides: list[int]
    #: Index into the allocations.
    allocation: int
    #: First byte in the allocation.
    offset: int

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, allocation: int, offset: int) -> "TensorEntry":
        """Describes ``tensor``, whose first element lies ``offset`` bytes into ``allocation``."""
        return cls(name, DTYPES[tensor.dtype], list(tensor.shape), list(tensor.stride()), allocation, offset)


@dataclass(frozen=True)
class Weights:
    """Where a model's tensors lie. Plain data, so that it can travel between processes."""

    #: ``{"kind": "file", "path", "bytes"}`` or ``{"kind": "cuda_ipc", "handle", "bytes", "device"}``.
    allocations: list[dict[str, Any]]
    tensors: list[TensorEntry]
    #: ``{"merged": name, "parts": [Hugging Face names in row order]}``.
    packing: list[dict[str, Any]] = field(default_factory=list)


def document(
    weights: Weights,
    *,
    model_dir: str | os.PathLike[str],
    world_size: int = 1,
    server: tuple[str, str] | None = None,
    controls: Sequence[str] = (),
) -> dict[str, Any]:
    """The manifest of a new load of ``weights``, held by this process, with a new epoch.

    Raises ExportError if a trainer would refuse it.
    """
    manifest: dict[str, Any] = {
        "version": VERSION,
        "epoch": secrets.token_hex(16),
        "pid": os.getpid(),
        "model_dir": str(Path(model_dir).resolve()),
        "rank": 0,
        "world_size": world_size,
        "allocations": weights.allocations,
        "tensors": [asdict(tensor) for tensor in weights.tensors],
        "packing": weights.packing,
        "controls": list(controls),
    }
    if server is not None:
        manifest["server"] = {"name": server[0], "version": server[1]}
    validate(manifest)
    return manifest


def validate(manifest: dict[str, Any]) -> None:
    """Checks ranges, alignment and duplicates as the trainer will. Raises ExportError on the first mistake."""
    allocations = manifest["allocations"]
    for index, allocation in enumerate(allocations):
        if allocation["bytes"] <= 0:
            raise ExportError(f"allocation {index} has {allocation['bytes']} bytes")
    _unique("allocation", [entry.get("path") or entry["handle"] for entry in allocations])
    _unique("tensor", [tensor["name"] for tensor in manifest["tensors"]])
    _unique("packing", [packing["merged"] for packing in manifest["packing"]])
    for tensor in manifest["tensors"]:
        _validate_tensor(tensor, allocations)


def span_bytes(shape: Sequence[int], strides: Sequence[int], item_bytes: int) -> int:
    """Bytes from the first element to the end of the last one that the strides reach."""
    if 0 in shape:
        return 0
    return (sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1) * item_bytes


def _validate_tensor(tensor: dict[str, Any], allocations: list[dict[str, Any]]) -> None:
    where = f"tensor `{tensor['name']}`"
    item_bytes = ITEM_BYTES.get(tensor["dtype"])
    if item_bytes is None:
        raise ExportError(f"{where}: dtype `{tensor['dtype']}` cannot be trained in place")
    if len(tensor["shape"]) != len(tensor["strides"]):
        raise ExportError(f"{where} has shape {tensor['shape']} but strides {tensor['strides']}")
    if not 0 <= tensor["allocation"] < len(allocations):
        raise ExportError(f"{where} lies in allocation {tensor['allocation']}, which is not listed")
    size = allocations[tensor["allocation"]]["bytes"]
    end = tensor["offset"] + span_bytes(tensor["shape"], tensor["strides"], item_bytes)
    if tensor["offset"] < 0 or end > size:
        raise ExportError(f"{where} at byte {tensor['offset']} does not lie in its allocation of {size} bytes")
    if tensor["offset"] % item_bytes:
        raise ExportError(f"{where} starts at byte {tensor['offset']}, not a multiple of {item_bytes}")


def _unique(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ExportError(f"{what} `{name}` is listed twice")
        seen.add(name)
