#!/usr/bin/env python3
"""Speed of vLLM on the CPU alone, and while apollod trains its weights in each update mode.

usage: update_modes.py APOLLOD VENV MODEL [--seconds 30] [--clients 4]

VENV has vLLM and the plugin. Clients stream completions all the time; apollod, in the modes that have one, is given
examples all the time. JSON on stdout: tokens per second of all clients, and inter-token latency (the time between two
tokens of a stream, without the first).
"""
import argparse
import json
import pathlib
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
import types
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "ci" / "e2e"))
from daemon import Daemon
from harness import http, say
from servers import Vllm

PROMPT_TOKENS, ANSWER_TOKENS = 32, 96
CONTEXT, DECISION = 128, 16    # tokens of an example


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("apollod", type=pathlib.Path)
    parser.add_argument("venv", type=pathlib.Path)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    options.set = []
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    draw = random.Random(1)
    ids = lambda n: [draw.randrange(1, vocabulary - 3) for _ in range(n)]
    results = {}
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        model = pathlib.Path(shutil.copytree(options.model, work / "model"))
        server = Vllm(options.venv, model, work / "vllm.log", work / "weights.sock")
        try:
            stream(server, ids, 5, options.clients)    # warm
            results["alone"] = stream(server, ids, options.seconds, options.clients)
            for mode in ("hogwild", "between"):
                daemon = Daemon(options, work, model, {"socket": str(work / "weights.sock"), "url": server.base, "update": mode},
                                train={"lr": 1e-6, "threads": 1})
                try:
                    daemon.wait_attached()
                    results[mode] = while_training(daemon, ids, lambda: stream(server, ids, options.seconds, options.clients))
                    daemon.sync()    # so that the next one finds live weights and files alike
                finally:
                    daemon.stop()
            results["alone again"] = stream(server, ids, options.seconds, options.clients)
        finally:
            server.stop()
    print(json.dumps(results, indent=1))


def while_training(daemon, ids, action):
    """`action` while examples never run out; with what the trainer did in that time."""
    done = threading.Event()

    def feed():
        while not done.is_set():
            if daemon.status()["queue"]["queued"] < 20:
                daemon.post([{"context_ids": ids(CONTEXT), "decision_ids": ids(DECISION)} for _ in range(20)])
            time.sleep(0.2)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        time.sleep(1)
        first, clock = daemon.status()["step"], time.monotonic()
        result = action()
        status = daemon.status()
        result["steps_per_s"] = round((status["step"] - first) / (time.monotonic() - clock), 2)
        result["last_step_ms"] = status["timings"]
        return result
    finally:
        done.set()
        feeder.join()
        http(f"{daemon.base}/v1/pause", {})


def stream(server, ids, seconds, clients):
    gaps, counts, end = [], [], time.monotonic() + seconds

    def client():
        while time.monotonic() < end:
            body = dict(model=server.model, prompt=ids(PROMPT_TOKENS), max_tokens=ANSWER_TOKENS, temperature=1, ignore_eos=True, stream=True)
            request = urllib.request.Request(f"{server.base}/v1/completions", data=json.dumps(body).encode(),
                                             headers={"content-type": "application/json"})
            last = None
            with urllib.request.urlopen(request) as response:
                for line in response:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.monotonic()
                    if now > end:
                        return
                    if last is not None:
                        gaps.append(now - last)
                    counts.append(1)
                    last = now

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cuts = statistics.quantiles(gaps, n=1000, method="inclusive")
    result = {"tokens_per_s": round(len(counts) / seconds, 1), "itl_ms": {
        "median": round(1e3 * cuts[499], 2), "p99": round(1e3 * cuts[989], 2), "p99.9": round(1e3 * cuts[998], 2), "largest": round(1e3 * max(gaps), 1)}}
    say(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
