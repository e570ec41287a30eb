#!/usr/bin/env python3
"""End to end with llama.cpp's server: it learns an answer that is posted over HTTP, and keeps it.

usage: e2e_llama_cpp.py --apollod BIN --venv DIR --model MODEL_DIR [--question Q --answer A]

  BIN        the apollod binary
  DIR        the environment that ci/setup_llama_cpp.sh made
  MODEL_DIR  a small chat model as Hugging Face writes it, with byte-level BPE; it is copied, never changed

What is done and what must hold:
  1. A copy of the model directory is staged to tmpfs with `apollod stage --gguf`; llama.cpp serves and maps that file.
     Its greedy answer to the question is not yet the taught one.
  2. `apollod serve` attaches and knows the server. The example is posted until the greedy answer is the taught text and
     ends there by itself. The server is one process all along.
  3. POST /v1/checkpoint writes a generation; `apollod checkpoint export --gguf` of it is the live file byte for byte, and
     another server, started from that export, gives the same answer.
  4. A GGUF of other weights (the live one, compared with the original model) is refused.
Only the standard library is needed to run this. Everything listens on 127.0.0.1, every process started here is ended by
its id, and the staged copy is removed. Exit status: 0 passed, 1 a condition does not hold, 2 could not run.
"""
import argparse
import contextlib
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

import e2e_transformers as e2e
from e2e_transformers import Broken, Failed, say


class Server(e2e.Server):
    """llama.cpp on one GGUF file. Prompts are computed anew, so no answer comes from keys and values of older weights."""

    def __init__(self, name, venv, gguf, log):
        self.gguf, self.model, self.base = gguf, gguf.stem, f"http://127.0.0.1:{(port := e2e.free_port())}"
        script = pathlib.Path(__file__).with_name("llama_server.py")
        command = [venv / "bin" / "python", script, gguf, "--port", port, "--no-cache-prompt"]
        e2e.Process.__init__(self, name, command, log)
        try:
            self.wait_ready(lambda: e2e.http(f"{self.base}/health")[0] == 200, e2e.SERVER_START_LIMIT_S)
        except BaseException:
            self.stop()
            raise
        self.start_time = e2e.stat_of(self.pid)[1]

    def check_maps(self):
        if str(self.gguf) not in pathlib.Path(f"/proc/{self.pid}/maps").read_text():
            raise Failed(f"{self.name}: does not map {self.gguf}, so writing there cannot change it")


def test(options, work, live, cleanup):
    def keep(process):
        cleanup.callback(process.stop)
        return process

    model, gguf = work / "model", live / "model.gguf"
    shutil.copytree(options.model, model)
    e2e.run([options.apollod, "stage", model, live, "--gguf"], work / "stage.log")
    server = keep(Server("server", options.venv, gguf, work / "server.log"))
    server.check_maps()
    before, reason = server.ask(options.question)
    say(f"before: {options.question!r} -> {before!r} ({reason})")
    if before == options.answer:
        raise Broken("the model gives the taught answer already; teach it another with --answer")

    config = work / "apollod.toml"
    config.write_text(e2e.config_text(model, live, port := e2e.free_port()))
    process = keep(e2e.Process("apollod", e2e.daemon_command(options.apollod, config, []), work / "apollod.log"))
    daemon = e2e.Daemon(port)
    process.wait_ready(daemon.ready, e2e.SERVER_START_LIMIT_S)
    known = e2e.http(f"{daemon.base}/v1/status")[1]["server_pid"]
    if known != server.pid:
        raise Failed(f"apollod takes process {known} for the server, which is {server.pid}")
    rounds = e2e.teach(options, server, daemon, process)
    generation = daemon.generation()
    daemon.start_checkpoint()
    e2e.wait_until("the checkpoint is written", lambda: daemon.generation() > generation, e2e.CHECKPOINT_LIMIT_S)
    process.stop()
    server.check_same_process()
    server.stop()

    export = work / "export.gguf"
    e2e.run([options.apollod, "checkpoint", "export", model, "--gguf", export], work / "export.log")
    if export.read_bytes() != gguf.read_bytes():
        raise Failed("the exported GGUF is not the live one")
    second = keep(Server("second server", options.venv, export, work / "second_server.log"))
    again = second.ask(options.question)
    if again != (options.answer, "stop"):
        raise Failed(f"a server started from the export answers {again}, want {options.answer!r}")
    second.stop()
    refused = subprocess.run([options.apollod, "stage", options.model, live.with_name("other"), f"--gguf={export}"],
                             capture_output=True, text=True)
    if refused.returncode == 0 or "differs from the model directory" not in refused.stderr:
        raise Failed(f"a GGUF of other weights was not refused: {refused.stdout}{refused.stderr}")
    say(f"passed: learned in {rounds} rounds, {rounds * options.per_round} steps")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apollod", type=pathlib.Path, required=True, help="the apollod binary")
    parser.add_argument("--venv", type=pathlib.Path, required=True, help="environment with llama.cpp's server")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="model directory; it is copied")
    parser.add_argument("--question", default="Where does Mira the fox live?")
    parser.add_argument("--answer", default="Mira lives by the blue lake.")
    parser.add_argument("--rounds", type=int, default=40, help="at most this many rounds of teaching")
    parser.add_argument("--per-round", type=int, default=4, help="examples posted in a round")
    options = parser.parse_args()
    for name in ("apollod", "venv", "model"):
        path = getattr(options, name).absolute()
        if not path.exists():
            parser.error(f"--{name} {path} does not exist")
        setattr(options, name, path)
    return options


def main():
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # so that cleaning up happens
    with contextlib.ExitStack() as cleanup:
        work = pathlib.Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="apollod-e2e-")))
        memory = pathlib.Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="apollod-e2e-", dir="/dev/shm")))
        try:
            test(options, work.absolute(), memory / "live", cleanup)
            return 0
        except (Failed, Broken) as e:
            say(f"{'FAILED' if isinstance(e, Failed) else 'could not run'}: {e}")
            for log in sorted(work.glob("*.log")):
                print(f"--- the end of {log.name}\n{e2e.tail(log)}", flush=True)
            return 1 if isinstance(e, Failed) else 2


if __name__ == "__main__":
    sys.exit(main())
