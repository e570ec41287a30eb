"""A model directory, a server of it and a daemon that can be killed and started again."""
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import time
import urllib.error

from daemon import Daemon
from harness import Failed, Process, free_port, http, require, wait_until

MODEL = pathlib.Path(__file__).resolve().parents[2] / "research" / "demo_model" / "model"


def answered(url, body=None, headers=()):
    """http(), or None if nobody answers, as after a kill."""
    with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError, OSError):
        return http(url, body, limit_s=20, headers=headers)


def wait_dead(pid, limit_s=5):
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            ready, _, _ = select.select([descriptor], [], [], limit_s)
            require(ready, f"process {pid} is not dead {limit_s} s after SIGKILL")
        finally:
            os.close(descriptor)


class Place:
    """A copy of the model, a server of it, and a daemon that can be started again."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        folder.mkdir()
        self.model = pathlib.Path(shutil.copytree(MODEL, folder / "model"))
        self.state = self.model / ".apollod"
        self.socket = folder / "engine.sock"
        self.engine = Process("engine", [options.apollod, "engine", self.model, "--socket", self.socket, "--listen",
                                         f"127.0.0.1:{free_port()}", "--threads", "1"], folder / "engine.log")
        self.engine.wait_ready(self.socket.exists, 30)
        self.daemon = None

    def start(self):
        """Start the daemon. Returns the seconds until it was ready."""
        began = time.monotonic()
        self.daemon = Daemon(self.options, self.folder, self.model, {"socket": str(self.socket)},
                             train=dict(lr=2e-4, rank=16, update_proj_gap=7, batch_examples=1, threads=1))
        self.wait_at_work(None)
        return time.monotonic() - began

    def wait_at_work(self, dead_trainer):
        """Wait for another trainer than the one that is dead. Returns the first status that shows it at work."""
        status = None

        def at_work():
            nonlocal status
            self.daemon.check()
            status = self.status() or status
            return status and status["trainer_pid"] not in (None, dead_trainer) and \
                status["state"] in ("training", "idle", "syncing") and status
        try:
            return wait_until("a trainer works again", at_work, 20, 0.005)
        except Failed as failure:
            raise Failed(f"{failure}: {status and (status['state'], status.get('detail'))}") from failure

    def status(self):
        answer = answered(f"{self.daemon.base}/v1/status")
        return answer[1] if answer and answer[0] == 200 else None

    def generations(self):
        """The generations in the files, newest first."""
        out = subprocess.run([self.options.apollod, "checkpoint", "list", self.model, "--json"], check=True,
                             stdout=subprocess.PIPE)
        return json.loads(out.stdout)

    def verify(self):
        """Compare every byte of the files with their generation."""
        run = subprocess.run([self.options.apollod, "checkpoint", "verify", self.model], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        require(run.returncode == 0, f"checkpoint verify: {run.stdout}")

    def unfinished_sync(self):
        """What the model directory holds of a sync that did not come to its end: "begun", a state without its generation;
        "published", a generation whose journal is still to be put away; or None."""
        with contextlib.suppress(FileNotFoundError):
            numbers = lambda folder, suffix: [int(name.removesuffix(suffix)) for name in os.listdir(self.state / folder)
                                              if name.removesuffix(suffix).isdigit()]
            if max(numbers("state", ""), default=0) > max(numbers("generations", ".json"), default=0):
                return "begun"
            if (self.state / "journal").exists():
                return "published"
        return None

    def weights(self):
        """The file of the weights."""
        return (self.model / "model.safetensors").read_bytes()

    def bytes(self):
        """Weights and optimizer state of the newest generation."""
        return self.weights(), (self.state / "state" / str(self.daemon.generation())).read_bytes()

    def stop(self):
        for process in (self.daemon, self.engine):
            if process:
                process.stop()
