"""``export(model)``: any PyTorch program."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .errors import ExportError
from .footprint import Footprint
from .manifest import document
from .server import Controls, WeightServer
from .weights import SharedWeights

Score = Callable[[list[int]], list[float]]

REPLACED = "the model's parameters were replaced after it was exported; export it again"


class Export:
    """A running offer of a model's weights. Close it, or use it as a context manager."""

    def __init__(self, server: WeightServer, weights: SharedWeights) -> None:
        self._server = server
        self._weights = weights

    @property
    def socket(self) -> Path:
        """The path of the socket."""
        return self._server.path

    def leased_by(self) -> int | None:
        """The process that has the lease."""
        return self._server.leased_by()

    def close(self) -> None:
        """Ends the lease and removes the socket. The model stays usable."""
        self._server.close()
        self._weights.close()
        _open.pop(self, None)

    def _offer(self, model: torch.nn.Module, model_dir: Path, controls: Controls) -> None:
        manifest = document(self._weights.share(model), model_dir=model_dir, controls=controls.names())
        footprint = _open[self] = Footprint(model)
        self._server.offer(manifest, controls, lambda: None if footprint.is_of(model) else REPLACED)

    def __enter__(self) -> "Export":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


#: Exports that are not closed, and what they keep.
_open: dict[Export, Footprint] = {}
#: One export at a time, so that no two can take the same parameters.
_exporting = threading.Lock()


def export(
    model: torch.nn.Module,
    socket: str | os.PathLike[str] | None = None,
    model_dir: str | os.PathLike[str] | None = None,
    score: Score | None = None,
) -> Export:
    """Offers the parameters of ``model`` to a trainer, which will change them while the model is used.

    On a CPU the parameters are moved into shared memory; on a GPU they stay where they are. Keep the model's
    parameters from then on: when one is replaced (``load_state_dict`` does not, ``.to`` does) the lease ends and
    no other is given until the export is closed, which keeps the old memory, and the model is exported again.

    socket: default ``$APOLLOD_SOCKET``, else ``$XDG_RUNTIME_DIR/apollod.sock`` or ``/tmp/apollod-UID.sock``.
    model_dir: the directory that the model was loaded from; default the one that a transformers model names.
    score: token ids to the log-probability of each but the first; default the model's own for transformers.

    Raises ExportError if a parameter cannot be trained in place or is exported already, or the socket cannot be had.
    """
    directory = _model_dir(model, model_dir)
    with _exporting:
        _refuse_exported(model)
        exported = Export(
            WeightServer(socket or os.environ.get("APOLLOD_SOCKET") or _default_socket()), SharedWeights()
        )
        try:
            exported._offer(model, directory, Controls(score=score or _default_score(model)))
        except BaseException:
            exported.close()
            raise
    print(f"apollod: weights are offered on {exported.socket}", file=sys.stderr, flush=True)
    return exported


def _refuse_exported(model: torch.nn.Module) -> None:
    for other, footprint in tuple(_open.items()):
        if footprint.overlaps(model):
            raise ExportError(f"the model is already exported on {other.socket}; close that first")


def _default_socket() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "apollod.sock") if runtime else Path(f"/tmp/apollod-{os.getuid()}.sock")


def _model_dir(model: torch.nn.Module, given: str | os.PathLike[str] | None) -> Path:
    named = given if given is not None else getattr(getattr(model, "config", None), "_name_or_path", None)
    if not named:
        raise ExportError("say which directory the model was loaded from: export(model, model_dir=…)")
    if not Path(named).is_dir():
        raise ExportError(f"{named} is not a directory; download the model and pass export(model, model_dir=…)")
    return Path(named)


def _default_score(model: Any) -> Score | None:
    """The scores of a transformers causal model; None for another."""
    if not hasattr(getattr(model, "config", None), "_name_or_path"):
        return None

    def score(ids: list[int]) -> list[float]:
        tokens = torch.tensor([ids], device=next(model.parameters()).device)
        with torch.no_grad():
            logprobs = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(-1, tokens[0, 1:, None])[:, 0].tolist()

    return score
