"""What the parts of a run on a GPU have in common: their options, and how they say what came out.

A part is a list of checks. Each ends as one of
  PASS, FAIL    a condition held, or did not
  MET, MISSED   a figure reached its target, or did not
  MEASURED      a figure that has no target
  CANNOT RUN    nothing was found out; never counted as passed
The part's file is written after every check, so that a part that is cut off keeps what it has found out.
"""
import argparse
import json
import pathlib
import signal
import subprocess
import sys
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "e2e"))
from harness import Broken, Failed, say, tail

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PASS, FAIL, MET, MISSED, MEASURED, CANNOT_RUN = "PASS", "FAIL", "MET", "MISSED", "MEASURED", "CANNOT RUN"


class Report:
    """Runs checks and keeps what they say. `checks` names all of them, in order: what never ran is known by that."""

    def __init__(self, options, checks):
        self.options, self.end = options, time.monotonic() + options.seconds
        self.found = {name: dict(status=CANNOT_RUN, detail="the part ended before this") for name in checks}
        self.data = {}
        # The end of a part's time is an exception like any other, so that what it started is stopped.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        self._write()

    def check(self, name, function):
        """`function` returns (status, detail). Returns whether it found out something good."""
        assert name in self.found, name
        start = time.monotonic()
        try:
            status, detail = function()
        except Failed as e:
            status, detail = FAIL, str(e)
        except Broken as e:
            status, detail = CANNOT_RUN, str(e)
        except SystemExit:
            self._settle(name, CANNOT_RUN, "cut off at the end of the part's time", start)
            raise
        except Exception as e:
            traceback.print_exc()
            status, detail = CANNOT_RUN, f"{type(e).__name__}: {e}"
        self._settle(name, status, detail, start)
        return status in (PASS, MET, MEASURED)

    def target(self, met):
        """MET or MISSED on a GPU; elsewhere a figure proves nothing."""
        return (MET if met else MISSED) if self.options.device == "cuda" else MEASURED

    def left(self):
        """Seconds until the part is cut off."""
        return self.end - time.monotonic()

    def keep(self, name, value):
        """A figure for results.json."""
        self.data[name] = value
        self._write()

    def _settle(self, name, status, detail, start):
        self.found[name] = dict(status=status, detail=detail, seconds=round(time.monotonic() - start, 1))
        say(f"{status}: {name}: {detail}")
        self._write()

    def _write(self):
        text = json.dumps(dict(checks=self.found, data=self.data), indent=1)
        self.options.out.write_text(text)


def options(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--build", type=pathlib.Path, required=True, help="what ci/gpu_build.py made")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="a folder for files of its own")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the part's JSON goes")
    parser.add_argument("--device", choices=("cuda", "simulated", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, default=600, help="after which the part is cut off")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--memory-mb-before", type=int, help="memory in use on the GPU before anything was started")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shapes", default="qwen3-0.6b,qwen3-8b")
    found = parser.parse_args()
    found.apollod = found.build / "bin" / "apollod"
    # The daemon goes where the weights are; the other commands are told.
    found.on_device = [] if found.device == "cpu" else ["--device", "cuda"]
    found.set = []
    return found


def output_of(command, limit_s, env=None):
    """Standard output of a command. Broken if there is no such command or flag, Failed if it fails."""
    command = [str(c) for c in command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=env)
    except OSError as e:
        raise Broken(f"{command[0]}: {e}") from e
    except subprocess.TimeoutExpired as e:
        raise Broken(f"{' '.join(command)}: not within {limit_s:.0f} s") from e
    if done.returncode != 0:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
        # 2 is what a command line that is not understood ends with.
        raise (Broken if done.returncode == 2 else Failed)(f"{' '.join(command)} exited with {done.returncode}:\n{end}")
    return done.stdout


def json_line(text):
    """The last line that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise Broken(f"no JSON in:\n{text[-2000:]}")
