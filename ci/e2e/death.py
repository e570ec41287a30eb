"""The death of a server among steps: writing stops, the daemon waits, and no example is lost."""
import os
import pathlib
import select
import signal
import time

from daemon import chat
from harness import Failed, Memory, require, say, wait_until

QUIET_S = 0.1     # after the kill
EXAMPLES = 60     # enough to be at work when the server is killed


def kill_among_steps(options, daemon, server):
    """Kill the process that holds the weights while steps are applied to them, and see that the daemon stops writing and
    waits. Returns the examples that were posted, of which some are still to be trained by a server that comes back."""
    holder = daemon.status()["server_pid"]
    ids = daemon.post([chat(options.question, options.answer)] * EXAMPLES)
    memory = weights_of(holder)
    first = memory.bytes()
    wait_until("the weights move", lambda: memory.bytes() != first, 30, interval_s=0.01)
    dead, last = kill_and_watch(holder, memory)
    require(last <= QUIET_S, f"the weights still changed {last:.3f} s after the server was killed (dead after {dead:.3f} s)")
    wait_until("the daemon waits for a server", lambda: daemon.status()["state"] == "waiting_for_server", 30)
    states = [daemon.example(example_id)[0] for example_id in ids]
    untrained = sum(state in ("queued", "training") for state in states)
    say(f"process {holder} was killed with {untrained} of {len(ids)} examples untrained; it was dead after "
        f"{1e3 * dead:.0f} ms, the last change of the weights was seen after {1e3 * last:.0f} ms")
    require(untrained > 0, "every example was trained before the server was killed, so this proves nothing")
    lost = [s for s in states if s not in ("queued", "training", "trained")]
    require(not lost, f"examples are {lost}")
    late = daemon.post([chat(options.question, options.answer)])
    server.stop()
    return ids + late


def kill_and_watch(pid, memory):
    """Kill a process. Returns when it was dead and when the memory changed last, in seconds from the kill. Between the
    kill and the death the kernel takes the process's own memory down."""
    with open(os.pidfd_open(pid)) as process:
        dying = select.poll()
        dying.register(process, select.POLLIN)
        started, before, dead, last = time.monotonic(), memory.bytes(), None, 0.0
        os.kill(pid, signal.SIGKILL)
        while (now := time.monotonic() - started) < 2:
            if dead is None and dying.poll(0):
                dead = now
            if (seen := memory.bytes()) != before:
                before, last = seen, now
            time.sleep(0.002)
    require(dead is not None, f"process {pid} is still not dead {now:.1f} s after SIGKILL")
    return dead, last


def weights_of(pid):
    """The memory in which process `pid` shares its weights."""
    for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(entry).startswith("/memfd:apollod-weights"):
            return Memory(entry)
    raise Failed(f"process {pid} shares no weights")
