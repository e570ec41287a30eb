#!/usr/bin/env python3
"""Kills apollod again and again while it trains, and shows that nothing is lost and no file is torn.

A server (`apollod engine`) and a daemon work on a copy of a model on an ordinary file system. Examples come in over HTTP,
one after the other, and SIGKILL comes to the supervisor, its trainer or both: by a seeded plan while a step is computed,
while it is applied to the live weights, or while a sync writes the files. What a kill really hit is judged by what it left:
some pages of the live weights moved and others not, or a sync without its generation in the model directory.

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
AIMS = ("computing", "applying", "syncing")
VICTIMS = ("trainer", "supervisor", "both")
LEAST_SHARE = 20            # of the kills, one in so many must have hit each of AIMS
PAGE = 4096
WATCHED = 16                # pages that are looked at for the beginning of a step's writes
WHOLE_STEP = 0.97           # of the pages that a step moves; with fewer it was not whole


class Soak:
    """The run with kills."""

    def __init__(self, options, place):
        self.plan, self.kills, self.place = random.Random(options.seed), options.kills, place
        self.hit, self.victims, self.unfinished = collections.Counter(), collections.Counter(), collections.Counter()
        self.recoveries = []
        self.judged = 0         # examples whose state was looked at when the files held them
        self.place.start()
        self.memory = weights_of(self.place.engine.pid)
        self.poster = Poster(self.place, options.seed)
        self.sync_s = 0.0
        for _ in range(3):
            self.steps(2)
            self.sync()
        moved = [self.measured_step() for _ in range(3)]
        self.step_pages = min(map(len, moved))
        self.watched = self.plan.sample(sorted(set.intersection(*moved)), WATCHED)
        timings = self.status()["timings"]
        self.step_s, self.apply_s = timings["total_ms"] / 1e3, timings["update_ms"] / 1e3

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

    def pages_moved(self, before):
        """The pages of the live weights, by their first bytes, that are not what they were."""
        now = self.memory.bytes()
        return {at for at in range(0, len(now), PAGE) if before[at:at + PAGE] != now[at:at + PAGE]}

    def measured_step(self):
        """The pages that one whole step moves."""
        while True:
            first, before = self.status(), self.still()
            if self.status()["step"] != first["step"]:
                continue
            last = self.steps(1)
            moved = self.pages_moved(before)
            if moved and self.status()["step"] == last["step"] == first["step"] + 1:
                return moved

    def still(self):
        """The live weights at a moment when nothing writes them: two looks that are equal."""
        before = self.memory.bytes()
        while (now := self.memory.bytes()) != before:
            before = now
        return now

    def aim(self, aim):
        """Wait for a moment of this kind, as far as it can be seen from outside. Returns the live weights shortly before."""
        fraction = self.plan.random()
        if aim == "syncing":
            answered(f"{self.place.daemon.base}/v1/checkpoint?wait=false", {})
            end = time.monotonic() + 2
            while not self.place.unfinished_sync() and time.monotonic() < end:
                pass
            time.sleep(fraction * 0.7 * self.sync_s)
            return self.memory.bytes()
        if aim == "applying":
            before, end = self.still(), time.monotonic() + 2
            same = lambda at: before[at:at + PAGE] == self.memory.map[at:at + PAGE]
            while all(map(same, self.watched)) and time.monotonic() < end:
                pass
            time.sleep(fraction * 0.7 * self.apply_s)
            return before
        time.sleep(fraction * 2 * self.step_s)
        return self.still()

    def kill(self, number):
        aim, victim = AIMS[number % len(AIMS)], self.plan.choice(VICTIMS)
        status = self.steps(self.plan.randrange(1, 4))
        place, trainer = self.place, status["trainer_pid"]
        # As if more had been trained: so that requests are under way when the kill comes.
        self.poster.trained += self.plan.randrange(BACKLOG)
        before = self.aim(aim)
        if victim != "supervisor":
            with contextlib.suppress(ProcessLookupError):
                os.kill(trainer, signal.SIGKILL)
        if victim != "trainer":
            place.daemon.popen.kill()
        began = time.monotonic()
        wait_dead(trainer)
        unfinished = place.unfinished_sync()
        hit = "syncing" if unfinished else \
            "applying" if 0 < len(self.pages_moved(before)) < WHOLE_STEP * self.step_pages else "computing"
        if victim == "trainer":
            place.wait_at_work(trainer)
            took = time.monotonic() - began
        else:
            place.daemon.popen.wait()
            took = place.start()
        self.hit[hit] += 1
        self.unfinished[unfinished] += 1
        self.victims[victim] += 1
        self.recoveries.append(took)
        self.after_recovery(number, hit, victim, took)

    def after_recovery(self, number, hit, victim, took):
        require(took < RECOVERY_LIMIT_S, f"kill {number + 1} ({victim}, {hit}): at work again only after {took:.1f} s")
        self.place.verify()
        newest = self.place.generations()[0]
        require(newest["cursor"] == newest["step"] == newest["examples"],
                f"generation {newest['generation']} disagrees with itself: {newest}")
        if self.plan.random() < 0.5:
            self.steps(1)
            self.sync()
        say(f"kill {number + 1:3} of {self.kills}: {victim:10} {hit:9}  at work after {took:.2f} s, "
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
    place.start()
    ids = []
    for first in range(0, count, 200):
        ids += place.daemon.post([lesson(number) for number in range(first, min(first + 200, count))])
    return settle(place, ids)


def judge(soak, killed, control):
    for what, a, b in zip(("weights", "optimizer states"), killed, control):
        require(a == b, f"{what} differ from those of the run without kills, first at byte "
                        f"{next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), 'of their lengths')}")
    missed = [aim for aim in AIMS if soak.hit[aim] * LEAST_SHARE < soak.kills]
    require(not missed, f"too few kills hit {', '.join(missed)} ({dict(soak.hit)}): it proves nothing")


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
            judge(soak, killed, without_kills(place("control"), count))
        except Failed as failure:
            say(f"FAILED (seed {options.seed}, files in {folder}): {failure}")
            return 1
    shutil.rmtree(folder)
    say(f"{options.kills} kills ({', '.join(f'{soak.hit[aim]} while {aim}' for aim in AIMS)}; "
        f"{', '.join(f'{soak.victims[victim]} of {victim}' for victim in VICTIMS)}); "
        f"of the syncs {soak.unfinished['begun']} were undone and {soak.unfinished['complete']} finished")
    say(f"{count} examples acknowledged, each trained once; weights and optimizer state are byte for byte those without kills")
    say(f"every generation intact; at work again after {statistics.median(soak.recoveries):.2f} s (median), "
        f"{max(soak.recoveries):.2f} s (worst)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
