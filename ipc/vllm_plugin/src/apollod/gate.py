"""Between two steps: how other threads stop an engine that runs in a thread of its own.

The engine's thread passes the gate around everything that touches its state (``step``). Another thread gets in
when the engine is outside (``between``), before the engine's next pass, and can leave the gate shut behind it
for a while (``hold``). A hold ends by itself, so that a trainer that dies never stops a server.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Gate:
    """Lets one thread in at a time; threads that ask by ``between`` go before the engine."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        #: The thread inside, and how many passes it has nested.
        self._inside: int | None = None
        self._depth = 0
        #: Threads that wait in ``between``.
        self._waiting = 0
        #: Until when the engine is held, by the monotonic clock.
        self._held_until: float | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """The engine's pass. Waits for holds and for those who want in between; may be nested."""
        self._enter_step()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def between(self, timeout_s: float) -> Iterator[bool]:
        """Yields whether the engine was outside within ``timeout_s``, and keeps it there in the body."""
        with self._changed:
            self._waiting += 1
            inside = self._changed.wait_for(lambda: self._inside is None, timeout_s)
            self._waiting -= 1
            if inside:
                self._inside, self._depth = threading.get_ident(), 1
            else:
                self._changed.notify_all()
        try:
            yield inside
        finally:
            if inside:
                self._leave()

    def hold(self, timeout_s: float, settle: Callable[[], None] = lambda: None) -> bool:
        """Holds the engine for ``timeout_s``, after at most as long for its step to end.

        ``settle`` waits for what a step has left running. False if the time was over before: nothing is held.
        """
        deadline = time.monotonic() + timeout_s
        with self.between(timeout_s) as inside:
            if not inside:
                return False
            settle()
            now = time.monotonic()
            if now >= deadline:
                return False
            self._held_until = now + timeout_s
            return True

    def release(self) -> bool:
        """Ends a hold. False if none was left."""
        with self._changed:
            held = self._held_for() is not None
            self._held_until = None
            self._changed.notify_all()
            return held

    def _enter_step(self) -> None:
        thread = threading.get_ident()
        with self._changed:
            if self._inside == thread:
                self._depth += 1
                return
            # One look at the clock a round: a hold that ended between two would be waited for without end.
            while (left := self._held_for()) is not None or self._inside is not None or self._waiting:
                self._changed.wait(left)
            self._inside, self._depth = thread, 1

    def _leave(self) -> None:
        with self._changed:
            self._depth -= 1
            if self._depth == 0:
                self._inside = None
                self._changed.notify_all()

    def _held_for(self) -> float | None:
        """Seconds left of a hold; None without one."""
        if self._held_until is None:
            return None
        left = self._held_until - time.monotonic()
        return left if left > 0 else None
