#!/usr/bin/env python3
"""What a server computes while its weights are rewritten: vLLM on the CPU, weights toggled between two states.

usage: torn_reads.py APOLLOD VENV MODEL [--toggles 10000] [--seed N]

VENV has vLLM and the plugin. A is MODEL as it is, B is MODEL after training (20 steps on another answer). A writer copies B, A, B, … over the live weights, tensor by tensor in the order of the layers, with pauses,
while clients ask for the log-probabilities of fixed prompts.

A unit is the embedding (which is the head), a layer, or the last norm. First every mixture of units of A and B is set
in turn and each prompt asked with nobody writing: the range of a log-probability is from the least to the largest of
these. Then the writer runs. Every answer must be finite; how many lie outside their range, and by how much, is printed
as JSON: a mixture inside a layer, or one that changes in the course of a forward pass, is none of those enumerated.
"""
import argparse
import itertools
import json
import mmap
import pathlib
import random
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "ci" / "e2e"))
from daemon import Daemon, chat
from harness import Process, say, tensors, wait_until
from servers import Vllm

PROMPTS, PROMPT_TOKENS, CLIENTS = 4, 32, 4
# Nats beyond the range; 0.06 is one step of bfloat16 in a logit of 8 to 16.
TOLERANCES = (0, 0.06, 0.25, 0.5, 1.0)
PAUSE_S = 0.008    # largest pause between two toggles


class Live:
    """The weights of an exporter, leased and mapped for writing."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.socket.sendall(b'{"hello":1}\n')
        self.manifest = json.loads(self.socket.makefile("rb").readline())
        if "error" in self.manifest:
            sys.exit(f"the exporter refused: {self.manifest['error']}")
        self.maps = []
        for allocation in self.manifest["allocations"]:
            with open(allocation["path"], "r+b") as file:
                self.maps.append(mmap.mmap(file.fileno(), allocation["bytes"]))

    def write(self, tensor, data):
        self.maps[tensor["allocation"]][tensor["offset"]:tensor["offset"] + len(data)] = data


def packed(live, state):
    """[(unit, tensor, bytes)] in the order of the model: a model directory's tensors as the server merges them."""
    parts = {p["merged"]: p["parts"] for p in live.manifest["packing"]}
    default = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    rows = []
    for tensor in live.manifest["tensors"]:
        name = tensor["name"]
        if name == "lm_head.weight" or name not in state and not any(m in name for m in default) and name not in parts:
            continue    # the embedding again, or a buffer
        names = parts.get(name) or next(
            ([name.replace(merged, part) for part in of] for merged, of in default.items() if merged in name), [name])
        words = name.split(".")
        unit = int(words[2]) + 1 if "layers" in words else 0 if "embed_tokens" in name else -1
        rows.append((unit, tensor, b"".join(state[n] for n in names)))
    last = 1 + max(unit for unit, _, _ in rows)
    return sorted(((last if unit < 0 else unit, tensor, data) for unit, tensor, data in rows), key=lambda row: row[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("apollod", type=pathlib.Path)
    parser.add_argument("venv", type=pathlib.Path)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--toggles", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    prompts = [[draw.randrange(1, 1277) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        states = [tensors(options.model), tensors(trained(options, work))]
        server = Vllm(options.venv, options.model, work / "vllm.log", work / "weights.sock")
        try:
            print(json.dumps(measure(server, Live(work / "weights.sock"), states, options, prompts, draw), indent=1))
        finally:
            server.stop()


def trained(options, work):
    """A copy of the model that has learned something else, by the embedded engine."""
    model, socket, options.set = pathlib.Path(shutil.copytree(options.model, work / "b")), work / "engine.sock", []
    engine = Process("engine", [options.apollod, "engine", model, "--socket", socket, "--listen", "127.0.0.1:0"], work / "engine.log")
    try:
        wait_until("the engine is up", socket.exists, 60)
        daemon = Daemon(options, work, model, {"socket": str(socket)}, train={"lr": 1e-3})
        try:
            daemon.wait_attached()
            daemon.wait_trained(daemon.post([chat("What is your name?", "Nobody knows, and the list of words is closed.")] * 20))
            daemon.sync()
        finally:
            daemon.stop()
    finally:
        engine.stop()
    return model


def measure(server, live, states, options, prompts, draw):
    states = [packed(live, state) for state in states]
    units = 1 + states[0][-1][0]

    # The ranges: every mixture, at rest.
    ranges = [[(float("inf"), float("-inf"))] * (PROMPT_TOKENS - 1) for _ in prompts]
    for mixture in itertools.product((0, 1), repeat=units):
        for unit_a, unit_b in zip(*states):
            unit, tensor, data = (unit_a, unit_b)[mixture[unit_a[0]]]
            live.write(tensor, data)
        for prompt, row in zip(prompts, ranges):
            row[:] = [(min(low, v), max(high, v)) for (low, high), v in zip(row, server.prompt_logprobs(prompt))]
    say(f"{2 ** units} mixtures of {units} units enumerated")

    # The same prompts, at rest but among each other: what batching alone does to a log-probability.
    for unit, tensor, data in states[0]:
        live.write(tensor, data)
    alone = [server.prompt_logprobs(prompt) for prompt in prompts]
    together = ask_while(server, prompts, lambda: time.sleep(5))
    tolerance = max(abs(v - w) for i, values in together for v, w in zip(values, alone[i]))
    say(f"{len(together)} answers at rest; batching moves a log-probability by at most {tolerance:.4f}")

    def toggle():
        for number in range(options.toggles):
            for _, tensor, data in states[(number + 1) % 2]:
                live.write(tensor, data)
            time.sleep(draw.random() * PAUSE_S)

    clock = time.monotonic()
    answers = ask_while(server, prompts, toggle)
    seconds = time.monotonic() - clock
    values = [(v, *ranges[i][t]) for i, row in answers for t, v in enumerate(row)]
    finite = [row for row in values if abs(row[0]) < float("inf")]
    beyond = sorted(max(low - v, v - high) for v, low, high in finite)
    outside = {str(nats): sum(b > tolerance + nats for b in beyond) for nats in TOLERANCES}
    widths = [high - low for row in ranges for low, high in row]
    return {
        "toggles": options.toggles, "seconds": round(seconds, 1), "answers": len(answers), "values": len(values),
        "not_finite": len(values) - len(finite), "batching_nats": round(tolerance, 4),
        "outside_by_more_than": outside, "farthest_outside_nats": round(max(0, beyond[-1]), 4),
        "range_width_nats": {"median": round(statistics.median(widths), 3), "largest": round(max(widths), 3)},
        "seed": options.seed,
    }


def ask_while(server, prompts, action):
    """[(prompt's index, log-probabilities)] of clients that ask until `action` has returned."""
    answers, done = [], threading.Event()

    def client(number):
        for turn in itertools.count(number):
            if done.is_set():
                return
            answers.append((turn % len(prompts), server.prompt_logprobs(prompts[turn % len(prompts)])))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        action()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    return answers


if __name__ == "__main__":
    main()
