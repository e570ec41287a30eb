"""vLLM's engine: held between two steps, and kept from using keys and values of older weights.

Everything is done to one engine object, in the process that it lives in; no class of vLLM is changed.
"""

import functools
import inspect
import logging
import secrets
from collections.abc import Callable
from typing import Any

import torch

from .gate import Gate
from .server import Controls

logger = logging.getLogger("vllm.apollod")

#: What runs a step, and whatever else of the engine touches its scheduler. Those that a version lacks are skipped.
STEPS = ("step", "step_with_batch_queue")
OTHER_PASSES = (
    "post_step",
    "add_request",
    "abort_requests",
    "reset_prefix_cache",
    "pause_scheduler",
    "resume_scheduler",
    "sleep",
    "wake_up",
    "collective_rpc",
    "_handle_client_request",
    "_notify_idle_state_callbacks",
)
#: How long an invalidation waits for the running step to end; then it salts. The trainer waits 5 s for the answer.
INVALIDATE_S = 2.0


class EngineControl:
    """Controls of one ``EngineCore``, made before its scheduler is."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._gate = Gate()
        #: Put in front of the cache salt of every later request; None until it is needed.
        self._salt: str | None = None
        self._salts = 0
        # Other processes may fill the same key-value store: a salt of theirs must never be one of ours.
        self._name = secrets.token_hex(8)
        self.controls = Controls(
            invalidate=self._invalidate if self._hook_requests() else None,
            **({"hold": self._hold, "release": self._gate.release} if self._hook_steps() else {}),
        )

    def _hook_steps(self) -> bool:
        steps = [name for name in STEPS if callable(getattr(self._engine, name, None))]
        if "step" not in steps:
            logger.warning("apollod: this vLLM's engine has no step(); it cannot be held")
            return False
        for name in (*steps, *OTHER_PASSES):
            if callable(method := getattr(self._engine, name, None)):
                setattr(self._engine, name, self._through_the_gate(method))
        return True

    def _through_the_gate(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def pass_gate(*args: Any, **kwargs: Any) -> Any:
            with self._gate.step():
                return method(*args, **kwargs)

        return pass_gate

    def _hook_requests(self) -> bool:
        """Salts requests before their blocks are hashed."""
        preprocess = getattr(self._engine, "preprocess_add_request", None)
        if not callable(preprocess):
            logger.warning("apollod: this vLLM's engine has no preprocess_add_request(): no invalidation")
            return False

        @functools.wraps(preprocess)
        def preprocess_salted(request: Any, *args: Any, **kwargs: Any) -> Any:
            if self._salt is not None:
                request.cache_salt = f"{self._salt}{request.cache_salt or ''}"
            return preprocess(request, *args, **kwargs)

        self._engine.preprocess_add_request = preprocess_salted
        return True

    def _invalidate(self, how: str) -> str:
        if how == "reset" and self._reset():
            return "reset"
        self._salts += 1
        self._salt = f"apollod-{self._name}-{self._salts}:"
        return "salt"

    def _reset(self) -> bool:
        """Empties the prefix cache, between two steps. False if requests have blocks in it, or the engine is busy."""
        with self._gate.between(INVALIDATE_S) as inside:
            if not inside:
                return False
            scheduler = getattr(self._engine, "scheduler", None)
            if scheduler is None:
                return True  # Still starting: nothing was cached yet.
            reset = scheduler.reset_prefix_cache
            connected = {"reset_connector": True} if "reset_connector" in inspect.signature(reset).parameters else {}
            return reset(**connected) is True

    def _hold(self, seconds: float) -> bool:
        return self._gate.hold(seconds, self._settle)

    def _settle(self) -> None:
        """Waits for the batches that are on their way while the engine is between two steps."""
        for batch in list(getattr(self._engine, "batch_queue", None) or ()):
            try:
                batch[0].result()
            except Exception:  # The engine asks for the same result, and deals with its failure.
                logger.debug("apollod: a batch failed while the engine was to be held", exc_info=True)
        if torch.cuda.is_available():
            self._engine.model_executor.collective_rpc(_synchronize)


def _synchronize(_worker: Any) -> None:
    torch.cuda.synchronize()
