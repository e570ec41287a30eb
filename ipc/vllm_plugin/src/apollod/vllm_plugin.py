"""The vLLM plugin: found by vLLM through its entry point, active if ``APOLLOD_SOCKET`` is set.

In each worker syncs are kept out while the weights are loaded (``reading``), and the CPU's packing of weights is
replaced (``vllm_worker``). In the engine's process the workers
are asked for their weights once they are loaded; from there they are lent out, beside the engine that is to be
held and whose cache is to be invalidated (``vllm_engine``). No file of vLLM is changed.
"""

import functools
import logging
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .errors import ExportError
from .manifest import Weights, document
from .reading import reading
from .server import WeightServer
from .vllm_engine import EngineControl
from .vllm_worker import Shared, keep_weights_live, marked, share

logger = logging.getLogger("vllm.apollod")

#: Calls to the workers that replace weights or their memory.
REPLACING = frozenset(
    (
        "load_model",
        "reload_weights",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "sleep",
        "wake_up",
    )
)
#: Those after which the weights are there again.
COMPLETING = frozenset(("load_model", "reload_weights", "finish_weight_update", "wake_up"))


def register() -> None:
    """vLLM calls this in every one of its processes."""
    socket = os.environ.get("APOLLOD_SOCKET")
    if not socket:
        if multiprocessing.parent_process() is None:
            logger.info("apollod: not active; set APOLLOD_SOCKET to a socket's path to offer the weights to a trainer")
        return
    for hook in (_hook_loader, _hook_worker, functools.partial(_hook_engine, socket)):
        try:
            hook()
        except (ImportError, AttributeError) as error:
            logger.error("apollod: this version of vLLM is not supported, the weights are not offered: %s", error)


def _hook_loader() -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load, iterate = BaseModelLoader.load_model, DefaultModelLoader.get_all_weights
    if getattr(load, "of_apollod", False):
        return

    @functools.wraps(load)
    def load_whole(loader: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        with reading(model_config.model):
            return load(loader, vllm_config, model_config, *args, **kwargs)

    @functools.wraps(iterate)
    def iterate_whole(loader: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        # A reload asks for these alone.
        with reading(model_config.model):
            yield from iterate(loader, model_config, *args, **kwargs)

    BaseModelLoader.load_model = marked(load_whole)
    DefaultModelLoader.get_all_weights = marked(iterate_whole)


def _hook_worker() -> None:
    from vllm.model_executor.layers import utils

    if not getattr(utils.dispatch_cpu_unquantized_gemm, "of_apollod", False):
        utils.dispatch_cpu_unquantized_gemm = marked(keep_weights_live(utils.dispatch_cpu_unquantized_gemm))


def _hook_engine(socket: str) -> None:
    from vllm.v1.engine.core import EngineCore

    initialize = EngineCore._initialize_kv_caches
    if getattr(initialize, "of_apollod", False):
        return

    @functools.wraps(initialize)
    def initialize_and_offer(engine: Any, *args: Any, **kwargs: Any) -> Any:
        # The model is loaded, and not yet compiled or run.
        exporter = _guarded(EngineExport, engine, socket)
        result = initialize(engine, *args, **kwargs)
        if exporter is not None:
            _guarded(exporter.offer)
        return result

    EngineCore._initialize_kv_caches = marked(initialize_and_offer)


class EngineExport:
    """Offers the weights of one engine's workers."""

    def __init__(self, engine: Any, socket: str) -> None:
        _refuse_replicas(engine)
        self._config = engine.vllm_config
        self._rpc: Callable[..., Any] = engine.model_executor.collective_rpc
        #: Our own descriptor of memory that a worker in another process holds.
        self._memory: int | None = None
        self._weights: Weights | None = self._collect()
        self._controls = EngineControl(engine).controls
        self._server = WeightServer(socket)
        engine.model_executor.collective_rpc = self._watched(self._rpc)
        engine.shutdown = self._closing(engine.shutdown)

    def offer(self) -> None:
        """Offers the weights as they are now, as a new load."""
        from vllm import __version__

        weights = self._weights or self._collect()
        self._weights = None
        manifest = document(
            weights,
            model_dir=_model_dir(self._config),
            world_size=self._config.parallel_config.world_size,
            server=("vllm", __version__),
            controls=self._controls.names(),
        )
        self._server.offer(manifest, self._controls)
        logger.info("apollod: weights are offered on %s", self._server.path)

    def _collect(self) -> Weights:
        """The weights of rank 0, held by this process too. Raises ExportError with the worker's refusal."""
        _model_dir(self._config)
        shared = next(answer for answer in self._rpc(share) if answer is not None)
        assert isinstance(shared, Shared)
        if shared.weights is None:
            raise ExportError(shared.refusal)
        return replace(shared.weights, allocations=[self._own(entry) for entry in shared.weights.allocations])

    def _own(self, allocation: dict[str, Any]) -> dict[str, Any]:
        """The allocation as one of this process, which is the one that a trainer talks to and watches."""
        if allocation["kind"] != "file" or allocation["path"].startswith(f"/proc/{os.getpid()}/"):
            return allocation
        memory = os.open(allocation["path"], os.O_RDWR | os.O_CLOEXEC)
        if self._memory is not None:
            os.close(self._memory)
        self._memory = memory
        return {**allocation, "path": f"/proc/{os.getpid()}/fd/{memory}"}

    def _watched(self, rpc: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(rpc)
        def watched(method: Any, *args: Any, **kwargs: Any) -> Any:
            name = method if isinstance(method, str) else None
            if name in REPLACING:
                self._server.withdraw(f"the server is replacing its weights ({name})")
            result = rpc(method, *args, **kwargs)
            if name in COMPLETING:
                _guarded(self.offer)
            return result

        return watched

    def _closing(self, shutdown: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(shutdown)
        def close_and_shut_down(*args: Any, **kwargs: Any) -> Any:
            _guarded(self._server.close)
            return shutdown(*args, **kwargs)

        return close_and_shut_down


def _refuse_replicas(engine: Any) -> None:
    parallel = engine.vllm_config.parallel_config
    replicated = (
        parallel.data_parallel_size > 1
        or getattr(parallel, "data_parallel_index", 0) > 0
        or getattr(engine, "has_coordinator", False)
    )
    if replicated:
        raise ExportError("data parallel replicas hold weights of their own; serve with --data-parallel-size 1")


def _model_dir(config: Any) -> str:
    model = config.model_config.model
    if not os.path.isdir(model):
        raise ExportError(f"{model} is not a directory; download the model and serve the directory")
    return model


def _guarded(function: Callable[..., Any], *args: Any) -> Any:
    """The result; None after a failure, which is logged. A server that cannot be trained still serves."""
    try:
        return function(*args)
    except ExportError as error:
        logger.error("apollod: the weights are not offered: %s", error)
    except Exception:
        logger.exception("apollod: the weights are not offered")
    return None
