#!/usr/bin/env python3
"""Kills apollod again and again while it trains, and shows that nothing is lost and no file is torn.

A server (`apollod engine`) and a daemon work on a copy of a model on an ordinary file system. Examples come in over HTTP,
one after the other, and SIGKILL comes to the supervisor, its trainer or both: by a seeded plan while a step is computed,
while it is applied to the live weights, or while a sync writes the files. What a kill really hit is judged by what it left:
live weights that are not those between two steps of the run without kills, or the beginning of a sync in the model directory.

- No acknowledged example is lost, and each is trained once: a request that was not answered is sent again under its key, and
  in the end cursor, step and number of trained examples are the number of examples that were posted.
- No generation is torn: after every recovery `apollod checkpoint verify` must find every byte as its generation says.
- Steps are the same bytes whatever dies, so weights and optimizer state must equal, byte for byte, those of a run without
  kills over the same examples.
- From its start, or the trainer's death, the daemon is at work again within 5 s.

usage: soak.py APOLLOD [--kills N] [--seed S]. Standard library only.
"""
import argparse
import collections
import contextlib
import hashlib
import os
import pathlib
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "ci" / "e2e"), str(ROOT / "ci" / "soak")]

from death import weights_of
from harness import Failed, http, require, say, wait_until
from place import Place, answered, wait_dead
from poster import BACKLOG, Poster, lesson

RECOVERY_LIMIT_S = 5
CLASSES = ("computing", "applying", "syncing")
AIMS = ("applying", "syncing", "computing")
VICTIMS = ("trainer", "supervisor", "both")
LEAST_SHARE = 50            # of the kills, one in so many must have hit each of CLASSES
LOOKS, LOOK = 64, 64        # places in the live weights that are watched for the beginning of a step's writes, and their bytes


def digest(memory):
    return hashlib.blake2b(memory.bytes(), digest_size=16).digest()


class Soak:
    """The run with kills."""

    def __init__(self, options, place):
        self.plan, self.kills, self.place = random.Random(options.seed), options.kills, place
        self.victims, self.unfinished, self.recoveries = collections.Counter(), collections.Counter(), []
        self.left = []          # digests of the live weights that a trainer left behind outside of a sync
        self.judged = 0         # examples whose state was looked at when the files held them
        self.place.start()
        self.memory = weights_of(self.place.engine.pid)
        self.poster = Poster(self.place, options.seed)
        self.sync_s = 0.0
        for _ in range(3):
            self.steps(2)
            self.sync()
        self.step_s = self.status()["timings"]["total_ms"] / 1e3
        self.looks = [self.plan.randrange(len(self.memory.map) - LOOK) for _ in range(LOOKS)]

    def status(self):
        status = self.place.status()
        require(status, "the daemon does not answer")
        self.poster.trained = status["step"]
        if self.poster.failed:
            raise self.poster.failed
        return status

    def steps(self, count):
        """Wait for so many steps more."""
        until = self.status()["step"] + count
        return wait_until(f"step {until}", lambda: (s := self.status())["step"] >= until and s, 60, 0.003)

    def sync(self):
        """Write a generation, and look at every example that it holds."""
        began = time.monotonic()
        status, body = http(f"{self.place.daemon.base}/v1/checkpoint", {})
        require(status == 200, f"POST /v1/checkpoint answered {status}: {body}")
        self.sync_s = max(0.9 * self.sync_s, time.monotonic() - began)
        cursor = self.status()["cursor"]
        for example in self.poster.ids[self.judged:cursor]:
            state, _ = self.place.daemon.example(example)
            require(state == "trained", f"generation {body['generation']} holds example {example}, which is {state}")
        self.judged = cursor

    def aim(self, aim):
        """Wait for a moment of this kind, as far as it can be seen from outside."""
        fraction, end = self.plan.random(), time.monotonic() + 2
        if aim == "syncing":
            written = lambda: (self.place.model / "model.safetensors").stat().st_mtime_ns
            before, among = written(), self.plan.random() < 0.5
            answered(f"{self.place.daemon.base}/v1/checkpoint?wait=false", {})
            while not (written() != before if among else self.place.unfinished_sync()) and time.monotonic() < end:
                pass
            time.sleep(fraction * (0.1 if among else 0.5) * self.sync_s)
        elif aim == "applying":
            look = lambda: [self.memory.map[at:at + LOOK] for at in self.looks]
            first = look()
            while look() == first and time.monotonic() < end:
                pass
        else:
            time.sleep(fraction * 2 * self.step_s)

    def kill(self, number):
        aim, victim = AIMS[number % len(AIMS)], self.plan.choice(VICTIMS)
        status = self.steps(self.plan.randrange(1, 4))
        place, trainer = self.place, status["trainer_pid"]
        # As if more had been trained: so that requests are under way when the kill comes.
        self.poster.trained += self.plan.randrange(BACKLOG)
        files = place.weights()
        self.aim(aim)
        if victim != "supervisor":
            with contextlib.suppress(ProcessLookupError):
                os.kill(trainer, signal.SIGKILL)
        if victim != "trainer":
            place.daemon.popen.kill()
        began = time.monotonic()
        wait_dead(trainer)
        unfinished = place.unfinished_sync()
        if unfinished == "begun" and place.weights() != files:
            unfinished = "in the files"
        if not unfinished:
            self.left.append(digest(self.memory))
        if victim == "trainer":
            place.wait_at_work(trainer)
            took = time.monotonic() - began
        else:
            place.daemon.popen.wait()
            took = place.start()
        self.unfinished[unfinished] += 1
        self.victims[victim] += 1
        self.recoveries.append(took)
        self.after_recovery(number, victim, unfinished, took)

    def after_recovery(self, number, victim, unfinished, took):
        require(took < RECOVERY_LIMIT_S, f"kill {number + 1} of {victim}: at work again only after {took:.1f} s")
        self.place.verify()
        newest = self.place.generations()[0]
        require(newest["cursor"] == newest["step"] == newest["examples"],
                f"generation {newest['generation']} disagrees with itself: {newest}")
        if self.plan.random() < 0.5:
            self.steps(1)
            self.sync()
        left = f"sync {unfinished}" if unfinished else "no sync"
        say(f"kill {number + 1:3} of {self.kills}: {victim:10} {left:17}  at work after {took:.2f} s, "
            f"generation {newest['generation']}, cursor {newest['cursor']}, {len(self.poster.ids)} acknowledged")

    def run(self):
        """Returns the number of examples, weights and state."""
        for number in range(self.kills):
            self.kill(number)
        ids = self.poster.finish()
        final = settle(self.place, ids)
        say(f"{self.poster.again} requests were sent again because nobody had answered")
        return len(ids), final


def settle(place, ids):
    """Wait for all of these, sync, stop, and judge what the files say. Returns weights and state."""
    wait_until(f"{len(ids)} examples are trained", lambda: (place.status() or {}).get("step", 0) >= len(ids), 300, 0.02)
    states = collections.Counter(place.daemon.example(example)[0] for example in ids)
    require(states == {"trained": len(ids)}, f"of {len(ids)} acknowledged examples: {dict(states)}")
    place.daemon.sync()
    place.verify()
    newest, final = place.generations()[0], place.bytes()
    for key in ("cursor", "step", "examples"):
        require(newest[key] == len(ids), f"{len(ids)} examples were acknowledged, but the files say {key} {newest[key]}")
    place.stop()
    return final


def without_kills(place, count):
    """The same examples, one by one. Returns weights and state, and the live weights' digests before and after each."""
    place.start()
    memory = weights_of(place.engine.pid)
    ids, between = [], {digest(memory)}
    for number in range(count):
        ids += place.daemon.post([lesson(number)])
        wait_until("a step", lambda: place.status()["step"] > number, 60, 0.002)
        between.add(digest(memory))
    return settle(place, ids), between


def judge(soak, killed, control, between):
    """Compare with the run without kills. Returns how many kills hit what."""
    for what, a, b in zip(("weights", "optimizer states"), killed, control):
        require(a == b, f"{what} differ from those of the run without kills, first at byte "
                        f"{next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), 'of their lengths')}")
    computing = sum(left in between for left in soak.left)
    hit = dict(computing=computing, applying=len(soak.left) - computing, syncing=soak.kills - len(soak.left))
    missed = [kind for kind in CLASSES if hit[kind] * LEAST_SHARE < soak.kills]
    require(soak.unfinished["in the files"], "no sync was cut short while it wrote the files: it proves nothing")
    require(not missed, f"too few kills hit {', '.join(missed)} ({hit}): it proves nothing")
    return hit


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("apollod", type=pathlib.Path, help="the apollod binary")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(1, 2**31))
    parser.add_argument("--work", type=pathlib.Path, help="folder on the file system to be tried (default: a temporary one)")
    options = parser.parse_args()
    options.apollod, options.set = options.apollod.resolve(), []
    say(f"seed {options.seed}, {options.kills} kills")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="apollod-soak-", dir=options.work))
    with contextlib.ExitStack() as stack:
        def place(name):
            made = Place(options, folder / name)
            stack.callback(made.stop)
            return made
        try:
            soak = Soak(options, place("kills"))
            count, killed = soak.run()
            hit = judge(soak, killed, *without_kills(place("control"), count))
        except Failed as failure:
            say(f"FAILED (seed {options.seed}, files in {folder}): {failure}")
            return 1
    shutil.rmtree(folder)
    say(f"{options.kills} kills ({', '.join(f'{hit[kind]} while {kind}' for kind in CLASSES)}; "
        f"{', '.join(f'{soak.victims[victim]} of {victim}' for victim in VICTIMS)}); "
        f"of the syncs {soak.unfinished['begun']} had not reached the files, {soak.unfinished['in the files']} were among them, "
        f"{soak.unfinished['published']} were published")
    say(f"{count} examples acknowledged, each trained once; weights and optimizer state are byte for byte those without kills")
    say(f"every generation intact; at work again after {statistics.median(soak.recoveries):.2f} s (median), "
        f"{max(soak.recoveries):.2f} s (worst)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
