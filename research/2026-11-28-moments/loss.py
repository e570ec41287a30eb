#!/usr/bin/env python3
"""What a setting in bf16 does to the loss: the demo model learns the same examples with it and with f32, for several seeds.

usage: loss.py APOLLOD MODEL [--setting moments|activations] [--seeds N] [--steps N] [--lr LR] [--out FILE]

Each run is an engine and a daemon on a copy of MODEL (research/demo_model/model), one example a step. The examples are 18
questions with invented answers, drawn anew in an order that the seed gives, the same for both; the seed is also that of
projections and rounding. An example's loss is that before its step. Prints one line of JSON a seed, then the means and the
standard error of the paired difference, and writes all losses to --out.
"""
import argparse
import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import tempfile
import time
import urllib.request

WHO = ["Mira the fox", "Toby the bear", "Otto the otter", "Luna the owl", "Max", "Clara"]
WHAT = [("Where does {} live?", "{} lives {}.", ["by the blue lake", "in a tall tower", "under the old bridge", "on the moon"]),
        ("What does {} eat?", "{} eats {}.", ["fresh bread", "red berries", "golden honey", "cold soup"]),
        ("What does {} like to do?", "{} likes to {}.", ["count stars", "swim", "sing", "sleep"])]


def lessons(seed, steps):
    """`steps` examples of 18 questions whose answers the seed draws."""
    draw = random.Random(seed)
    facts = []
    for who in WHO:
        for question, answer, choices in WHAT:
            name = who.split(" the ")[0]
            facts.append((question.format(who), answer.format(name, draw.choice(choices))))
    order = []
    while len(order) < steps:
        order += draw.sample(facts, len(facts))
    message = lambda role, content: {"role": role, "content": content}
    return [{"messages": [message("user", q), message("assistant", a)]} for q, a in order[:steps]]


def call(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def listening(process):
    return "http://" + json.loads(process.stdout.readline())["listening"]


def run(apollod, model, setting, seed, examples, lr):
    """Loss of each example before its step."""
    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(scratch)
        shutil.copytree(model, place / "model")
        environment = dict(os.environ, APOLLOD_LOG="warn")
        start = lambda *arguments: subprocess.Popen(
            [apollod, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, text=True)
        engine = start("engine", place / "model", "--socket", place / "socket", "--listen", "127.0.0.1:0")
        listening(engine)
        settings = [f"model.dir={place / 'model'}", f"server.socket={place / 'socket'}", "http.listen=127.0.0.1:0",
                    f"train.lr={lr}", f"train.{setting}", f"train.seed={seed}", "sync.schedule=0 0 1 1 *",
                    "sync.on_shutdown=false"]
        daemon = start("serve", *[part for s in settings for part in ("--set", s)])
        try:
            url = listening(daemon)
            ids = [accepted["id"] for accepted in call(f"{url}/v1/examples", examples)["accepted"]]
            while call(f"{url}/v1/examples/{ids[-1]}")["state"] in ("queued", "training"):
                time.sleep(0.2)
            return [call(f"{url}/v1/examples/{id}")["loss"] for id in ids]
        finally:
            for process in (daemon, engine):
                process.terminate()
                process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("apollod")
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--setting", default="moments", choices=["moments", "activations"])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    runs, parts = [], {"all": slice(None), "last 100": slice(-100, None)}
    for seed in range(1, options.seeds + 1):
        examples = lessons(seed, options.steps)
        losses = {dtype: run(options.apollod, options.model, f"{options.setting}={dtype}", seed, examples, options.lr)
                  for dtype in ("f32", "bf16")}
        runs.append({"seed": seed, **losses})
        figures = {f"{m}, {part}": round(statistics.fmean(losses[m][cut]), 5) for part, cut in parts.items() for m in losses}
        print(json.dumps({"seed": seed, **figures}), flush=True)
    for part, cut in parts.items():
        mean = lambda m: [statistics.fmean(r[m][cut]) for r in runs]
        f32, bf16 = mean("f32"), mean("bf16")
        apart = [b - a for a, b in zip(f32, bf16)]
        error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
        print(f"{part}: f32 {statistics.fmean(f32):.5f}, bf16 {statistics.fmean(bf16):.5f}, "
              f"difference {statistics.fmean(apart):+.5f} ± {error:.5f}")
    if options.out:
        options.out.write_text(json.dumps(runs))


if __name__ == "__main__":
    main()
