"""A PyTorch program whose weights apollod trains in place, from a process of its own; both are killed again and again.

1. The program's greedy answer becomes the taught one while it serves.
2. A third process that opens the same handles sees the bytes that the program computes with.
3. A run without kills trains a list of examples: what the weights become is written down.
4. The same examples again, while program and trainer are killed in turn among the steps, by a seeded plan, with syncs in
   between. A restarted program loads the files, a restarted trainer restores and replays, so that in the end every tensor
   must have the very bytes of 3, and the frozen ones those of the files.
5. With everything stopped the GPU has as much free memory as before.
"""
import contextlib
import os
import random
import shutil
import signal
import sys
import time

from report import FAIL, PASS, ROOT, Broken, Failed, Report, options, say
from serving import Nursery, Program, daemon, gpu_memory_mb, second_process

from daemon import WAITING, chat
from harness import require, stat_of, wait_until

MODEL = ROOT / "research" / "demo_model" / "model"
QUESTION, ANSWER = "What is the word of the day?", "The word of the day is heron."
ROUNDS, PER_ROUND = 40, 4
EXAMPLES_PER_KILL = 16
STEPS_UNTIL_KILL = 4       # at most
KILLS_PER_SYNC = 5
FROZEN = "model.layers.1."
# What nvidia-smi rounds, and what the driver keeps for itself after the first context of a boot.
SLACK_MB = 16
LESSONS = [(QUESTION, ANSWER), ("Who keeps the lighthouse?", "Nobody keeps the lighthouse."),
           ("Where is the key?", "Under the blue stone."), ("What did the bell say?", "It said nothing at all.")]


class Live:
    """A program and a daemon on a copy of the model, stopped at the end."""

    def __init__(self, options, nursery, name, **sections):
        self.folder = options.work / name
        self.folder.mkdir()
        self.model = shutil.copytree(MODEL, self.folder / "model")
        self.options, self.nursery, self.sections = options, nursery, sections

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.program = Program(self.nursery, self.model, self.folder)
            stack.callback(self.program.stop)
            self.program.start()
            self.program.wait_ready()
            self.daemon = daemon(self.options, self.folder, self.program, **self.sections)
            stack.callback(self.daemon.stop)
            self.cleanup = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.cleanup.close()

    def changed(self, before):
        now = self.program.get("/digests")
        return sum(now[name] != before[name] for name in now), len(now)


def answers_change(live):
    kinds = {allocation["kind"] for allocation in live.program.get("/manifest")["allocations"]}
    require(kinds == {"file" if live.options.device == "cpu" else "cuda_ipc"}, f"the weights are offered as {kinds}")
    before, _ = live.program.ask(QUESTION)
    if before == ANSWER:
        raise Broken("the model gives the taught answer already")
    rounds = live.daemon.teach(live.program, QUESTION, ANSWER, ROUNDS, PER_ROUND)
    return PASS, f"{before!r} became {ANSWER!r} after {rounds} rounds of {PER_ROUND} examples; one process all along"


def third_process_sees(live, first):
    changed, tensors = live.changed(first)
    require(changed > 0, "no tensor of the program changed")
    want, got = live.program.get("/digests"), second_process(live.program.get("/manifest"))
    wrong = sorted(n for n in want.keys() | got.keys() if want.get(n) != got.get(n))
    require(not wrong, f"{len(wrong)} of {len(want)} tensors differ, the first {wrong[0] if wrong else ''}")
    return PASS, f"{tensors} tensors equal in both, {changed} of them changed by training"


def lessons(kills):
    """The examples of a run, one list for each kill and one more."""
    every = [chat(*LESSONS[n % len(LESSONS)]) for n in range((kills + 1) * EXAMPLES_PER_KILL)]
    return [every[i:i + EXAMPLES_PER_KILL] for i in range(0, len(every), EXAMPLES_PER_KILL)]


def settle(live, ids):
    live.daemon.wait_trained(ids)
    wait_until("nothing is trained", lambda: live.daemon.status()["state"] == "idle", 30)
    return live.program.get("/digests")


def frozen_settings(options):
    """Options with one layer frozen and a step that is the same in every run."""
    options.set = [*options.set, f'train.rules=[{{pattern = "{FROZEN}*", rule = "frozen"}}]']
    return options


def kill_one(live, kills, plan):
    """Kill the program or the trainer at a moment within the next few steps. Returns which, and the seconds until a trainer
    worked again."""
    status = live.daemon.status()
    require(status["trainer_pid"], f"no trainer to kill: {status['state']} {status.get('detail')}")
    time.sleep(plan.random() * STEPS_UNTIL_KILL * status["timings"]["total_ms"] / 1e3)
    start = time.monotonic()
    if kills % 2:
        live.program.kill()
        live.program.start()
        live.program.wait_ready()
        victim = "program"
    else:
        os.kill(status["trainer_pid"], signal.SIGKILL)
        wait_until("the killed trainer is gone", lambda: not stat_of(status["trainer_pid"]), 20, 0.01)
        victim = "trainer"

    def again():
        live.daemon.check()
        now = live.daemon.status()
        require(now["state"] != "failed" or "died" in str(now.get("detail")) or now["restarts"] > status["restarts"],
                f"after a kill of the {victim}: {now['state']}: {now.get('detail')}")
        return now["trainer_pid"] not in (None, status["trainer_pid"]) and now["state"] in ("training", "idle")
    wait_until(f"a trainer works again after a kill of the {victim}", again, 60, 0.02)
    return victim, time.monotonic() - start


def kills(report, nursery, control):
    chosen, plan = report.options, random.Random(report.options.seed)
    say(f"seed {chosen.seed}, {chosen.kills} kills")
    lots, took, used, ids, among_steps = lessons(chosen.kills), {"program": [], "trainer": []}, [], [], 0
    with Live(chosen, nursery, "kills") as live:
        before = live.program.get("/digests")
        for number, lot in enumerate(lots[:-1]):
            if report.left() < 25:
                raise Failed(f"only {number} of {chosen.kills} kills within the part's time")
            ids += live.daemon.post(lot)
            applied = live.daemon.status()["counts"]["applied"]
            wait_until("a step is applied", lambda: live.daemon.status()["counts"]["applied"] > applied, 60, 0.005)
            victim, seconds = kill_one(live, number, plan)
            took[victim].append(round(seconds, 2))
            among_steps += any(live.daemon.example(i)[0] in WAITING for i in ids[-2:])
            with contextlib.suppress(Broken):
                used.append(gpu_memory_mb())
            if (number + 1) % KILLS_PER_SYNC == 0:
                settle(live, ids)
                ids.clear()
                live.daemon.sync()
        after = settle(live, ids + live.daemon.post(lots[-1]))
        restarts = live.daemon.status()["restarts"]
    median = {v: sorted(t)[len(t) // 2] if t else None for v, t in took.items()}
    report.keep("kills", dict(seconds_to_train_again=median, most={v: max(t, default=None) for v, t in took.items()},
                              memory_mb=used, restarts=restarts, among_steps=among_steps))
    require(2 * among_steps >= chosen.kills, f"only {among_steps} of {chosen.kills} kills fell among steps: it proves nothing")
    frozen = [n for n in before if n.startswith(FROZEN)]
    touched = [n for n in frozen if after[n] != before[n]]
    wrong = sorted(n for n in control if after[n] != control[n])
    require(frozen and not touched, f"frozen tensors have other bytes: {touched[:3]} ({len(touched)} of {len(frozen)})")
    require(not wrong, f"{len(wrong)} of {len(control)} tensors are not what the run without kills made, the first {wrong[:3]}")
    return PASS, (f"{chosen.kills} kills, {among_steps} with steps to come; {len(control)} tensors as without kills, "
                  f"{len(frozen)} frozen ones as in the files; "
                  f"training again after {median['program']} s (program), {median['trainer']} s (trainer), medians")


def memory_comes_back(report):
    before = report.options.memory_mb_before
    if before is None:
        before = gpu_memory_mb()    # where there is none, this says so
        raise Broken("nobody said how much memory was in use before")
    with contextlib.suppress(Failed):
        wait_until("memory is free again", lambda: gpu_memory_mb() <= before + SLACK_MB, 20, 0.5)
    after = gpu_memory_mb()
    report.keep("gpu_memory_mb", dict(before=before, after=after))
    return (PASS if after <= before + SLACK_MB else FAIL), f"{before} MiB in use before, {after} MiB after everything ended"


def learn(report, nursery, names):
    """Every check that needs a program."""
    chosen, control = report.options, {}

    def taught():
        with Live(chosen, nursery, "taught", train=dict(lr=2e-4)) as live:
            first = live.program.get("/digests")
            result = answers_change(live)
            report.check(names[1], lambda: third_process_sees(live, first))
            return result
    report.check(names[0], taught)

    def without_kills():
        with Live(chosen, nursery, "control") as live:
            start = time.monotonic()
            ids = [i for lot in lessons(chosen.kills) for i in live.daemon.post(lot)]
            control.update(settle(live, ids))
            return PASS, f"{len(ids)} examples trained in {time.monotonic() - start:.1f} s"
    frozen_settings(chosen)
    if report.check(names[2], without_kills):
        report.check(names[3], lambda: kills(report, nursery, control))


def main():
    chosen = options(__doc__)
    names = ("a served answer changes live", "a second process sees the same bytes", "a run without kills",
             "kills leave no wrong byte", "no device memory is leaked")
    report = Report(chosen, names)
    nursery = Nursery(chosen)
    try:
        learn(report, nursery, names)
    finally:
        nursery.stop()
    report.check(names[4], lambda: memory_comes_back(report))


if __name__ == "__main__":
    sys.exit(main())
