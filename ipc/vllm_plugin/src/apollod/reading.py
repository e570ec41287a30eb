"""Loading a model directory that ``apollod serve`` writes its syncs into, in place.

``.apollod/readers`` in the directory is there for its lock (flock) alone: who loads the model holds it shared, and a
sync holds it exclusively while it writes. So whoever has it shared and finds a journal knows that a crash left the
files between two generations. A reader writes nothing. Where there is no file to lock, because no trainer ever opened
the directory, or it may not be opened, a reader looks before and after whether something was written.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Between two looks.
_LOOK_S = 0.05
#: How long a trainer that starts may take to begin to recover what a crash left.
_RECOVERY_S = 5.0


class TornModelError(RuntimeError):
    """The files of the model are not those of one generation. The message says what to do."""


@contextmanager
def reading(model_dir: str | os.PathLike[str], wait: float = 600.0) -> Iterator[None]:
    """Keeps syncs out of ``model_dir`` while the model is loaded from it; waits for one that is running.

    Hold it until the parameters are copied or moved out of the files, which libraries map: with ``apollod.export``
    until that has returned. Anything but a directory on this machine is not locked.

    Raises TornModelError if a crash left the files half written, if a sync does not end within ``wait`` seconds, or, at
    the end, if there was nothing to lock and a sync came in between.
    """
    folder = Path(model_dir, ".apollod")
    lock = _locked(folder, wait)
    before = _generation(folder)
    try:
        yield
        if lock is None and (_torn(folder) or _generation(folder) != before):
            raise TornModelError(f"{model_dir} was written while it was loaded; load it again")
    finally:
        if lock is not None:
            # Closing is not enough: a child that was forked meanwhile has it open still.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def _locked(folder: Path, wait: float) -> int | None:
    """The lock, held, of files that are whole; None where there is none."""
    began, torn_since = time.monotonic(), None
    while True:
        lock = _open(folder / "readers")
        free = lock is None or _try_lock(lock)
        if free and not _torn(folder):
            return lock
        if lock is not None:
            os.close(lock)
        now = time.monotonic()
        torn_since = (torn_since or now) if free and lock is not None else None
        if torn_since is not None and now - torn_since > min(wait, _RECOVERY_S):
            model = folder.parent
            raise TornModelError(
                f"a crash left the files of {model} half written; start the trainer, or run "
                f"`apollod checkpoint recover {model}`, and load the model again"
            )
        if now - began > wait:
            raise TornModelError(f"a sync into {folder.parent} has not ended for {wait:g} s; load the model again")
        time.sleep(_LOOK_S)


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _torn(folder: Path) -> bool:
    return (folder / "journal").exists()


def _generation(folder: Path) -> int:
    """The number of the current generation. The first one is the files as they were."""
    numbers = (path.stem for path in (folder / "generations").glob("*.json"))
    return max((int(number) for number in numbers if number.isdigit()), default=0)
