"""Lends the weights out over a Unix socket, a line of JSON each way.

::

    trainer  {"hello":1}
    exporter the manifest, or {"error":"leased by pid 4711"} and the end of the connection
    trainer  {"ping":7}
    exporter {"pong":7,"epoch":"…"}
    trainer  {"invalidate":"reset"} or "salt"   older keys and values must not be used for new requests
    exporter {"invalidated":"reset"} or "salt"  what was done
    trainer  {"hold":5000}                      stop the engine between two of its steps for at most 5000 ms
    exporter {"held":true}                      false: the running step did not end in that time
    trainer  {"release":true}
    exporter {"released":true}                  false: the hold had ended by itself
    trainer  {"score":[5,17,3]}
    exporter {"logprobs":[-1.2,-0.3]}           ln p of ids[1..] given what stands before each
    exporter {"error":"…"}                      to any request that cannot be done; the connection stays

The open connection is the lease: one connection has it at a time, and it and its hold end with the connection.
The exporter ends it when the weights are no longer those of the manifest.
"""

import json
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ExportError

HELLO = 1
#: How long a connection may take to say hello, or to take an answer.
HANDSHAKE_S = 10.0
#: Longest request.
REQUEST_BYTES_MAX = 1 << 20
#: Longest path of a Unix socket.
SOCKET_PATH_BYTES_MAX = 107
#: Connections at a time; more are turned away.
CONNECTIONS_MAX = 16
HOLD_MS_MAX = 600_000
#: How long a trainer has to go when its lease is ended.
GOODBYE_S = 2.0
#: Pause after a connection that could not be accepted.
ACCEPT_PAUSE_S = 0.05


@dataclass(frozen=True)
class Controls:
    """What a trainer may ask of this program; None is what it cannot do."""

    #: Takes "reset" or "salt", returns what was done.
    invalidate: Callable[[str], str] | None = None
    #: Takes seconds, returns whether the engine is held.
    hold: Callable[[float], bool] | None = None
    #: Ends a hold; returns whether there still was one. Goes with ``hold``.
    release: Callable[[], bool] | None = None
    #: Takes token ids, returns the natural log-probability of each but the first.
    score: Callable[[list[int]], list[float]] | None = None

    def names(self) -> list[str]:
        """As the manifest lists them."""
        return [name for name in ("invalidate", "hold", "score") if getattr(self, name) is not None]


@dataclass(frozen=True)
class Offer:
    """What a trainer is told, and what it may ask for."""

    manifest: dict[str, Any]
    controls: Controls
    #: Why the manifest no longer holds; None while it does. Asked at hello and before every answer.
    stale: Callable[[], str | None]


class WeightServer:
    """Listens on a socket of mode 0600 and lends what is offered to one trainer at a time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Listens from now on. Raises ExportError if the path is too long, or taken."""
        self.path = Path(path).absolute()
        self._lock = threading.Lock()
        self._offer: Offer | None = None
        self._why_not = "no weights are offered yet"
        self._connections: set[_Connection] = set()
        self._lease: _Connection | None = None
        self._closed = False
        self._owner_pid = os.getpid()
        self._listener = _listen(self.path)
        threading.Thread(target=self._accept, name="apollod-accept", daemon=True).start()

    def offer(
        self, manifest: dict[str, Any], controls: Controls, stale: Callable[[], str | None] = lambda: None
    ) -> None:
        """Lends these weights from now on, while ``stale`` gives no reason not to. It is called by any thread."""
        with self._lock:
            self._offer = Offer(manifest, controls, stale)

    def withdraw(self, why: str) -> None:
        """Ends the lease and lends nothing until the next offer; ``why`` is what a trainer is told.

        Returns when the trainer has gone, or has had ``GOODBYE_S`` to go and as long again to be cut off.
        """
        with self._lock:
            self._offer, self._why_not = None, why
            lease = self._lease
        if lease is not None:
            lease.say_goodbye()

    def close(self) -> None:
        """Ends every connection and removes the socket. A second call does nothing.

        In a forked child it closes the child's descriptors; the socket and the connections are its parent's.
        """
        if os.getpid() != self._owner_pid:
            return self._close_inherited()
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        self.withdraw("this program is no longer offering its weights")
        self.path.unlink(missing_ok=True)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.cut()

    def leased_by(self) -> int | None:
        """The process that has the lease."""
        with self._lock:
            return None if self._lease is None else self._lease.pid

    def _close_inherited(self) -> None:
        # No lock: the one thread of a forked child may have inherited it locked.
        self._listener.close()
        for connection in self._connections:
            connection.forget()
        self._connections.clear()

    def _accept(self) -> None:
        while not self._closed:
            try:
                stream, _ = self._listener.accept()
                self._admit(stream)
            except (OSError, RuntimeError):  # Shut down, or out of descriptors or threads for the moment.
                time.sleep(ACCEPT_PAUSE_S)

    def _admit(self, stream: socket.socket) -> None:
        with self._lock:
            if len(self._connections) >= CONNECTIONS_MAX:
                return stream.close()
            connection = _Connection(self, stream)
            self._connections.add(connection)
        try:
            threading.Thread(target=connection.run, name="apollod-lease", daemon=True).start()
        except RuntimeError:
            self._ended(connection)
            stream.close()
            raise

    def _lend(self, connection: "_Connection") -> Offer | str:
        """The offer, or why it is refused."""
        with self._lock:
            if self._offer is None:
                return self._why_not
            if why := self._offer.stale():
                return why
            if self._lease is not None:
                return f"leased by pid {self._lease.pid}"
            self._lease = connection
            return self._offer

    def _ended(self, connection: "_Connection") -> None:
        with self._lock:
            self._connections.discard(connection)
            if self._lease is connection:
                self._lease = None


class _Connection:
    """One trainer, or one that would like to be."""

    def __init__(self, server: WeightServer, stream: socket.socket) -> None:
        self.pid = _peer_pid(stream)
        self._server = server
        self._stream = stream
        self._over = threading.Event()

    def say_goodbye(self) -> None:
        """Lets the trainer read the end of the stream and waits until it has closed its side."""
        self._shutdown(socket.SHUT_WR)
        if not self._over.wait(GOODBYE_S):
            self.cut()
            self._over.wait(GOODBYE_S)  # Its thread may still be at an answer.

    def cut(self) -> None:
        self._shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        """Closes this process's descriptor, without a word to the trainer."""
        if (descriptor := self._stream.detach()) >= 0:
            os.close(descriptor)

    def run(self) -> None:
        try:
            with self._stream, self._stream.makefile("rb") as reader:
                self._converse(reader)
        except OSError:
            pass  # The trainer has gone, or was cut off: it sees that itself.
        finally:
            self._server._ended(self)
            self._over.set()

    def _converse(self, reader: BinaryIO) -> None:
        self._stream.settimeout(HANDSHAKE_S)
        line = _read_line(reader)
        if line is None:
            return
        offer = self._server._lend(self) if (refused := _refuse_hello(line)) is None else refused
        if isinstance(offer, str):
            return self._write({"error": offer})
        try:
            self._write(offer.manifest)
            self._stream.settimeout(None)
            while (line := _read_line(reader)) is not None and not offer.stale():
                self._stream.sendall(_answer(line, offer))
        except _TooLong as error:
            self._write({"error": str(error)})
        finally:
            if offer.controls.release is not None:
                offer.controls.release()

    def _write(self, value: dict[str, Any]) -> None:
        self._stream.sendall(_line(value))

    def _shutdown(self, how: int) -> None:
        try:
            self._stream.shutdown(how)
        except OSError:
            pass  # It has ended already.


class _TooLong(Exception):
    pass


def _read_line(reader: BinaryIO) -> bytes | None:
    """One line without its end; None at the end of the stream, which a last unfinished line is part of."""
    line = reader.readline(REQUEST_BYTES_MAX)
    if line.endswith(b"\n"):
        return line[:-1]
    if len(line) == REQUEST_BYTES_MAX:
        raise _TooLong(f"a request has at most {REQUEST_BYTES_MAX} bytes")
    return None


def _request(line: bytes) -> tuple[str, Any]:
    """The name and the argument of a request. Raises ValueError if the line is none."""
    request = json.loads(line)
    if not isinstance(request, dict) or len(request) != 1:
        raise ValueError("want an object of one member, such as {\"ping\":1}")
    return next(iter(request.items()))


def _refuse_hello(line: bytes) -> str | None:
    try:
        name, version = _request(line)
    except (ValueError, RecursionError) as error:
        return f'want {{"hello":{HELLO}}}: {error}'
    if name != "hello":
        return f"say hello before {name}"
    if version != HELLO or isinstance(version, bool):
        return f"protocol version {version} is not spoken here, want {HELLO}"
    return None


def _answer(line: bytes, offer: Offer) -> bytes:
    """Does what is asked. Whatever goes wrong is the answer."""
    try:
        name, argument = _request(line)
        if name not in _REQUESTS:
            raise ValueError(f"`{name}` is not known; want one of {', '.join(_REQUESTS)}")
        return _line(_REQUESTS[name](argument, offer))
    except Exception as error:  # Scoring runs a foreign model: no failure of it may end the lease.
        return _line({"error": f"{error}" or type(error).__name__})


def _line(value: dict[str, Any]) -> bytes:
    """Raises ValueError on a number that JSON has no word for."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _ping(number: Any, offer: Offer) -> dict[str, Any]:
    if not _is_count(number):
        raise ValueError('want {"ping":n}')
    return {"pong": number, "epoch": offer.manifest["epoch"]}


def _invalidate(how: Any, offer: Offer) -> dict[str, Any]:
    if how not in ("reset", "salt"):
        raise ValueError('want {"invalidate":"reset"} or {"invalidate":"salt"}')
    return {"invalidated": _able(offer.controls.invalidate, "invalidate")(how)}


def _hold(milliseconds: Any, offer: Offer) -> dict[str, Any]:
    if not _is_count(milliseconds) or not 1 <= milliseconds <= HOLD_MS_MAX:
        raise ValueError(f'want {{"hold":ms}} with 1 to {HOLD_MS_MAX} ms')
    return {"held": _able(offer.controls.hold, "hold")(milliseconds / 1000)}


def _release(yes: Any, offer: Offer) -> dict[str, Any]:
    if yes is not True:
        raise ValueError('want {"release":true}')
    return {"released": _able(offer.controls.release, "hold")()}


def _score(ids: Any, offer: Offer) -> dict[str, Any]:
    if not isinstance(ids, list) or not ids or not all(_is_count(token) for token in ids):
        raise ValueError('want {"score":[ids]} with at least one token id')
    return {"logprobs": _able(offer.controls.score, "score")(ids)}


_REQUESTS: dict[str, Callable[[Any, Offer], dict[str, Any]]] = {
    "ping": _ping,
    "invalidate": _invalidate,
    "hold": _hold,
    "release": _release,
    "score": _score,
}


def _able(control: Callable[..., Any] | None, name: str) -> Callable[..., Any]:
    if control is None:
        raise ValueError(f"this program cannot {name}")
    return control


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _peer_pid(stream: socket.socket) -> int:
    credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[0]


def _listen(path: Path) -> socket.socket:
    """A listening socket that only this user can open, from the moment it exists."""
    size = len(os.fsencode(path))
    if size > SOCKET_PATH_BYTES_MAX:
        raise ExportError(f"{path} has {size} bytes; a socket's path has at most {SOCKET_PATH_BYTES_MAX}")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # On Linux the mode of the descriptor becomes that of the file that bind makes.
        os.fchmod(listener.fileno(), stat.S_IRUSR | stat.S_IWUSR)
        listener.bind(str(path))
        listener.listen(CONNECTIONS_MAX)
    except OSError as error:
        listener.close()
        raise ExportError(f"cannot serve on {path}: {error}") from error
    return listener


def _remove_stale(path: Path) -> None:
    """Removes a socket that nobody listens on any more."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ExportError(f"{path} is something else than a socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except OSError as error:
            raise ExportError(f"cannot find out who serves on {path}: {error}") from error
        else:
            raise ExportError(f"another program serves on {path}; stop it or choose another path")
