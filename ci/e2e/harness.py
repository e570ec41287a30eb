"""What every scenario needs: processes, HTTP, waiting, and the tensors of a model directory. Standard library only."""
import contextlib
import json
import mmap
import os
import pathlib
import signal
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request

STOP_LIMIT_S = 30


class Failed(Exception):
    """A condition of the test does not hold."""


class Broken(Exception):
    """The test could not be run."""


started = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - started:6.1f}s] {text}", flush=True)


def require(condition, complaint):
    if not condition:
        raise Failed(complaint)


def http(url, body=None, limit_s=120, raw=False, headers=()):
    """(status, parsed JSON or text). GET, or POST of a JSON body. URLError if nobody listens."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json", **dict(headers)})
    try:
        with urllib.request.urlopen(request, timeout=limit_s) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as e:
        status, text = e.code, e.read().decode(errors="replace")
    if raw:
        return status, text
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def tail(path, lines=25):
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def run(command, log):
    """Run `command` to its end, its output in `log`."""
    with log.open("a") as out:
        status = subprocess.run([str(c) for c in command], stdout=out, stderr=subprocess.STDOUT).returncode
    if status != 0:
        raise Failed(f"{' '.join(map(str, command))} exited with status {status}:\n{tail(log)}")


def wait_until(what, condition, limit_s, interval_s=0.1):
    """Poll `condition` until it returns something true, and return that."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(interval_s)
    raise Failed(f"{what}: not within {limit_s} s")


# ---- processes ------------------------------------------------------------------------------------------------------


def stat_of(pid):
    """(parent's id, start time in clock ticks) of a process, or None if it is gone or a zombie."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(fields[1]), int(fields[19]))


def descendants(pid):
    """{pid: start time} of the processes below `pid`."""
    stats = {int(p): s for p in os.listdir("/proc") if p.isdigit() and (s := stat_of(p))}
    found, level = {}, {pid}
    while level := {p for p, (parent, _) in stats.items() if parent in level and p not in found}:
        found |= {p: stats[p][1] for p in level}
    return found


class Process:
    """A child process with its log. `stop` ends it and whatever it has started, by id."""

    def __init__(self, name, command, log, env=None):
        self.name, self.log = name, log
        self.popen = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=log.open("w"), stderr=subprocess.STDOUT,
            env=dict(os.environ, **(env or {})))
        self.pid = self.popen.pid
        say(f"{name}: process {self.pid}, log {log.name}")

    def check(self):
        if self.popen.poll() is not None:
            raise Failed(f"{self.name} ended with status {self.popen.returncode}:\n{tail(self.log)}")

    def wait_ready(self, ready, limit_s):
        def answers():
            self.check()
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                return ready()
        try:
            wait_until(f"{self.name} is ready", answers, limit_s, interval_s=0.3)
        except BaseException:
            self.stop()
            raise

    def stop(self):
        below = descendants(self.pid)
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                say(f"{self.name}: did not end within {STOP_LIMIT_S} s of SIGTERM; killed")
                self.popen.kill()
                self.popen.wait()
        end = time.monotonic() + 5
        while left := [p for p, start in below.items() if (s := stat_of(p)) and s[1] == start]:
            if time.monotonic() > end:
                say(f"{self.name}: left {left} behind; killed")
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.1)


# ---- weights --------------------------------------------------------------------------------------------------------


def tensors(folder):
    """{name: bytes} of the safetensors files of a model directory."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                found[name] = data[start + entry["data_offsets"][0]:start + entry["data_offsets"][1]]
    if not found:
        raise Broken(f"{folder} holds no safetensors files")
    return found


def check_same_tensors(before, now, what):
    """Both hold the same names, and some bytes differ."""
    require(before.keys() == now.keys(), f"{what} changed which tensors there are: {sorted(before.keys() ^ now.keys())}")
    changed = sum(before[name] != now[name] for name in now)
    require(changed, f"{what} changed no tensor")
    return changed


class Memory:
    """A read-only view of memory that another process shares by a file, kept after that process has ended."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def bytes(self):
        return bytes(self.map)
