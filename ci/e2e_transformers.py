#!/usr/bin/env python3
"""End to end with a real server: `transformers serve` learns an answer that is posted over HTTP, and keeps it.

usage: e2e_transformers.py --apollod BIN --venv DIR --model MODEL_DIR [--question Q --answer A] [--set train.lr=1e-3 …]

  BIN        the apollod binary
  DIR        the environment that ci/setup_transformers.sh made
  MODEL_DIR  a small chat model as Hugging Face writes it, with tokenizer and chat template; it is copied, never changed

What is done and what must hold:
  1. A copy of the model directory is staged to tmpfs with `apollod stage`; `transformers serve` serves the staged copy
     and maps its safetensors files. Its greedy answer to the question is not yet the taught one.
  2. `apollod serve` attaches. The example is posted to /v1/examples, polled until trained, and the server asked again,
     until its greedy answer is the taught text and ends there by itself; at most --rounds times. The streamed answer is
     the same. The server is one process all along.
  3. POST /v1/checkpoint writes a generation: every tensor of the model directory equals the live one byte for byte, and
     is no longer what it was.
  4. A second server, started from the model directory alone, gives the same answer.
Only the standard library is needed to run this. Everything listens on 127.0.0.1, every process started here is ended by
its id, and the staged copy is removed. Exit status: 0 passed, 1 a condition does not hold, 2 could not run.
"""
import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

SERVER_START_LIMIT_S = 180
TRAIN_LIMIT_S = 300         # of one round of examples
CHECKPOINT_LIMIT_S = 120
STOP_LIMIT_S = 30
ANSWER_TOKENS_MAX = 64


class Failed(Exception):
    """A condition of the test does not hold."""


class Broken(Exception):
    """The test could not be run."""


started = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - started:6.1f}s] {text}", flush=True)


# ---- what depends on apollod's command line, configuration and HTTP interface --------------------------------------


def stage(apollod, model, live, log):
    run([apollod, "stage", model, live], log)


def config_text(model, live, port):
    """apollod.toml. A string in JSON is a string in TOML."""
    return f"""
[model]
dir = {json.dumps(str(model))}
[server]
live = {json.dumps(str(live))}
[http]
listen = "127.0.0.1:{port}"
[train]
lr = 2e-4
[sync]
schedule = "0 0 1 1 *"    # only when this test asks
on_shutdown = false
"""


def daemon_command(apollod, config, settings):
    return [apollod, "serve", "--config", config, *(word for setting in settings for word in ("--set", setting))]


class Daemon:
    """Client of apollod's HTTP interface."""

    def __init__(self, port):
        self.base = f"http://127.0.0.1:{port}"

    def ready(self):
        return http(f"{self.base}/ready")[0] == 200

    def post_examples(self, question, answer, count):
        """Post the same example `count` times. Returns their ids."""
        example = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        status, body = http(f"{self.base}/v1/examples", [example] * count)
        ids = [accepted["id"] for accepted in body["accepted"]] if isinstance(body, dict) and "accepted" in body else None
        if status != 202 or not ids or len(ids) != count:
            raise Failed(f"POST /v1/examples of {count} examples answered {status}: {body}")
        return ids

    def example(self, example_id):
        """State of an example ("queued", "training", "trained", …) and its loss, if it has one."""
        status, body = http(f"{self.base}/v1/examples/{example_id}")
        if status != 200:
            raise Failed(f"GET /v1/examples/{example_id} answered {status}: {body}")
        return body["state"], body.get("loss")

    def generation(self):
        """Number of the newest generation; 0 if there is none."""
        status, body = http(f"{self.base}/v1/checkpoints")
        if status != 200:
            raise Failed(f"GET /v1/checkpoints answered {status}: {body}")
        generations = body["checkpoints"] if isinstance(body, dict) else body
        return max((g["generation"] for g in generations), default=0)

    def start_checkpoint(self):
        status, body = http(f"{self.base}/v1/checkpoint", {}, limit_s=CHECKPOINT_LIMIT_S)
        if status not in (200, 202):
            raise Failed(f"POST /v1/checkpoint answered {status}: {body}")


WAITING = ("queued", "training")    # states of an example that is still to come; any other but "trained" is a failure

# ---- processes and HTTP ---------------------------------------------------------------------------------------------


def http(url, body=None, limit_s=120, raw=False):
    """(status, parsed JSON or text). GET, or POST of a JSON body. URLError if nobody listens."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
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
        say(f"{name}: process {self.pid}, log {log}")

    def check(self):
        if self.popen.poll() is not None:
            raise Failed(f"{self.name} ended with status {self.popen.returncode}:\n{tail(self.log)}")

    def wait_ready(self, ready, limit_s):
        def answers():
            self.check()
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                return ready()
        wait_until(f"{self.name} is ready", answers, limit_s, interval_s=0.3)

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


class Server(Process):
    """`transformers serve` on one model directory."""

    def __init__(self, name, venv, model, log):
        self.model, self.base = str(model), f"http://127.0.0.1:{(port := free_port())}"
        # Naming the model at the start loads it before the port answers, keeps it loaded (no idle timeout), and fixes
        # the only name that requests may use: this path. --dtype auto takes the files' type; any other would copy.
        command = [venv / "bin" / "transformers", "serve", model, "--host", "127.0.0.1", "--port", port,
                   "--device", "cpu", "--dtype", "auto"]
        super().__init__(name, command, log, env=dict(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1"))
        try:
            self.wait_ready(lambda: http(f"{self.base}/health")[0] == 200, SERVER_START_LIMIT_S)
        except BaseException:
            self.stop()
            raise
        self.start_time = stat_of(self.pid)[1]

    def check_same_process(self):
        self.check()
        if stat_of(self.pid)[1] != self.start_time:
            raise Failed(f"{self.name}: process {self.pid} is another one now")

    def check_maps(self):
        """The weights are views of the files only if the process has mapped every one of them."""
        maps = pathlib.Path(f"/proc/{self.pid}/maps").read_text()
        missing = [f.name for f in sorted(pathlib.Path(self.model).glob("*.safetensors")) if str(f) not in maps]
        if missing:
            raise Failed(f"{self.name}: does not map {', '.join(missing)}, so writing there cannot change it")

    def ask(self, question, stream=False):
        """(greedy answer, why it ended)."""
        body = dict(model=self.model, messages=[{"role": "user", "content": question}], temperature=0,
                    max_tokens=ANSWER_TOKENS_MAX, stream=stream)
        status, text = http(f"{self.base}/v1/chat/completions", body, raw=True)
        if status != 200:
            raise Failed(f"{self.name}: answered {status}: {text[:500]}")
        if not stream:
            choice = json.loads(text)["choices"][0]
            return choice["message"].get("content") or "", choice["finish_reason"]
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        ends = [c["finish_reason"] for c in choices if c.get("finish_reason")]
        return "".join(c["delta"].get("content") or "" for c in choices), ends[-1] if ends else None


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


def check_files_equal_live(original, model, live):
    """The model directory holds the live bytes, and these are not what they were. A tied head that the file repeats may
    be missing from the live copy."""
    before, files, now = tensors(original), tensors(model), tensors(live)
    if files.keys() != before.keys():
        raise Failed(f"the sync changed which tensors there are: {sorted(files.keys() ^ before.keys())}")
    if extra := now.keys() - files.keys():
        raise Failed(f"live tensors without a file: {sorted(extra)}")
    if absent := files.keys() - now.keys() - {"lm_head.weight"}:
        raise Failed(f"tensors that are not live: {sorted(absent)}")
    if differing := sorted(name for name in now if now[name] != files[name]):
        raise Failed(f"{len(differing)} of {len(now)} tensors of the files differ from the live ones: {differing[:5]}")
    changed = sum(now[name] != before[name] for name in now)
    if not changed:
        raise Failed("no tensor was changed")
    say(f"files equal the live weights: {len(now)} tensors, {changed} of them changed by training")


# ---- the test -------------------------------------------------------------------------------------------------------


def teach(options, server, daemon, process):
    """Post and train until the served greedy answer is the taught one."""
    for round_number in range(1, options.rounds + 1):
        waiting, losses = daemon.post_examples(options.question, options.answer, options.per_round), []

        def all_trained():
            process.check()
            for example_id in list(waiting):
                state, loss = daemon.example(example_id)
                if state == "trained":
                    waiting.remove(example_id)
                    losses.append(loss)
                elif state not in WAITING:
                    raise Failed(f"example {example_id} is {state!r}, want trained")
            return not waiting

        wait_until(f"round {round_number} is trained", all_trained, TRAIN_LIMIT_S)
        server.check_same_process()
        answer, reason = server.ask(options.question)
        shown = " ".join("?" if loss is None else f"{loss:.3f}" for loss in losses)
        say(f"round {round_number}: losses {shown}; served: {answer!r} ({reason})")
        if answer == options.answer and reason == "stop":
            return round_number
    raise Failed(f"after {options.rounds} rounds of {options.per_round} examples the server still answers {answer!r}")


def test(options, work, live, cleanup):
    def keep(process):
        cleanup.callback(process.stop)
        return process

    model = work / "model"
    shutil.copytree(options.model, model)
    stage(options.apollod, model, live, work / "stage.log")
    say(f"staged {options.model} to {live}")

    server = keep(Server("server", options.venv, live, work / "server.log"))
    server.check_maps()
    before, reason = server.ask(options.question)
    say(f"before: {options.question!r} -> {before!r} ({reason})")
    if before == options.answer:
        raise Broken("the model gives the taught answer already; teach it another with --answer")
    if options.unrelated:
        unrelated = server.ask(options.unrelated)[0]
        say(f"before: {options.unrelated!r} -> {unrelated!r}")

    port = free_port()
    config = work / "apollod.toml"
    config.write_text(config_text(model, live, port))
    process = keep(Process("apollod", daemon_command(options.apollod, config, options.set), work / "apollod.log"))
    daemon = Daemon(port)
    process.wait_ready(daemon.ready, SERVER_START_LIMIT_S)

    rounds = teach(options, server, daemon, process)
    streamed = server.ask(options.question, stream=True)
    if streamed != (options.answer, "stop"):
        raise Failed(f"the streamed answer is {streamed}, want {options.answer!r}")
    if options.unrelated:
        now = server.ask(options.unrelated)[0]
        say(f"unrelated question: {'the same answer' if now == unrelated else f'answer is now {now!r}'}")
        if options.unrelated_must_hold and now != unrelated:
            raise Failed(f"the answer to {options.unrelated!r} was {unrelated!r} and is {now!r}")

    generation = daemon.generation()
    daemon.start_checkpoint()
    written = wait_until("the checkpoint is written", lambda: (g := daemon.generation()) > generation and g, CHECKPOINT_LIMIT_S)
    say(f"generation {written} written")
    check_files_equal_live(options.model, model, live)
    process.stop()
    server.check_same_process()
    server.stop()

    second = keep(Server("second server", options.venv, model, work / "second_server.log"))
    again = second.ask(options.question)
    if again != (options.answer, "stop"):
        raise Failed(f"a server started from the model directory answers {again}, want {options.answer!r}")
    say(f"a server started from the model directory gives the same answer: {again[0]!r}")
    second.stop()
    say(f"passed: learned in {rounds} rounds, {rounds * options.per_round} steps")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apollod", type=pathlib.Path, required=True, help="the apollod binary")
    parser.add_argument("--venv", type=pathlib.Path, required=True, help="environment with transformers serve")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="model directory; it is copied")
    parser.add_argument("--question", default="What is the word of the day?")
    parser.add_argument("--answer", default="The word of the day is heron.")
    parser.add_argument("--unrelated", help="a question whose answer is shown before and after")
    parser.add_argument("--unrelated-must-hold", action="store_true", help="and must be the same")
    parser.add_argument("--rounds", type=int, default=40, help="at most this many rounds of teaching")
    parser.add_argument("--per-round", type=int, default=4, help="examples posted in a round")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="setting for apollod")
    parser.add_argument("--keep", type=pathlib.Path, help="new folder for the model copy, configuration and logs, which then stay")
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
        work = options.keep or pathlib.Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="apollod-e2e-")))
        work.mkdir(parents=True, exist_ok=not options.keep)
        memory = pathlib.Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="apollod-e2e-", dir="/dev/shm")))
        try:
            test(options, work.absolute(), memory / "live", cleanup)
            return 0
        except (Failed, Broken) as e:
            say(f"{'FAILED' if isinstance(e, Failed) else 'could not run'}: {e}")
            for log in sorted(work.glob("*.log")):
                print(f"--- the end of {log.name}\n{tail(log)}", flush=True)
            return 1 if isinstance(e, Failed) else 2


if __name__ == "__main__":
    sys.exit(main())
