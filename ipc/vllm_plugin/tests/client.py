"""A trainer's side of the socket, for tests."""

import json
import mmap
import os
import socket
from typing import Any

import torch

from apollod.manifest import DTYPES

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Client:
    """One connection. ``ask`` sends a request and returns the answer; None at the end of the stream."""

    def __init__(self, path: os.PathLike[str] | str, timeout_s: float = 20) -> None:
        self.stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.stream.settimeout(timeout_s)
        self.stream.connect(str(path))
        self.reader = self.stream.makefile("rb")

    def ask(self, request: Any) -> Any:
        return self.send(json.dumps(request).encode() + b"\n")

    def send(self, line: bytes) -> Any:
        self.stream.sendall(line)
        return self.read()

    def read(self) -> Any:
        line = self.reader.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        self.reader.close()
        self.stream.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Mapped:
    """A manifest's file memory, mapped as a trainer maps it: a tensor by its name."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        (allocation,) = manifest["allocations"]
        assert allocation["kind"] == "file"
        fd = os.open(allocation["path"], os.O_RDWR)
        try:
            self.memory = mmap.mmap(fd, allocation["bytes"])
        finally:
            os.close(fd)
        self.entries = {entry["name"]: entry for entry in manifest["tensors"]}

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        storage = torch.frombuffer(self.memory, dtype=torch.uint8).untyped_storage()
        flat = torch.empty(0, dtype=TORCH_DTYPES[entry["dtype"]])
        return flat.set_(storage, entry["offset"] // flat.itemsize, entry["shape"], entry["strides"])
