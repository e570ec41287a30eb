#!/usr/bin/env python3
"""End to end with a real server: it learns an answer that is posted over HTTP while it serves, and keeps it.

usage: run.py SCENARIO --apollod BIN --venv DIR --model MODEL_DIR [--set train.lr=1e-3 …] [--keep DIR]

  SCENARIO   transformers   `transformers serve` on a staged copy          (environment: ci/setup_transformers.sh)
             vllm           `vllm serve` with the plugin                   (environment: ci/setup_vllm_cpu.sh)
             torch          a PyTorch program that calls apollod.export    (the same environment)
             llama          `llama_cpp.server` on a staged GGUF            (environment: ci/setup_llama_cpp.sh)
  BIN        the apollod binary
  MODEL_DIR  a small chat model as Hugging Face writes it, with tokenizer and chat template; it is copied, never changed

What each scenario does and requires stands at the top of its file in this folder. Common to all: the greedy answer to
the question becomes the taught text, the server is one process all along, and a server that is started from the synced
files gives the same answer. Only the standard library is needed to run this. Everything listens on 127.0.0.1, every
process started here is ended by its id. Exit status: 0 passed, 1 a condition does not hold, 2 could not run.
"""
import argparse
import contextlib
import importlib
import pathlib
import shutil
import signal
import sys
import tempfile

from harness import Broken, Failed, say, tail

SCENARIOS = {name: f"scenario_{name}" for name in ("transformers", "vllm", "torch", "llama")}


class Work:
    """Where a scenario keeps its files, and what is to be stopped at its end."""

    def __init__(self, folder, memory, cleanup):
        self.folder, self.memory, self.cleanup = folder, memory, cleanup

    def keep(self, process):
        """Stop this process at the end of the scenario, whatever happens."""
        self.cleanup.callback(process.stop)
        return process

    def copy_of(self, model, name="model"):
        """A copy of a model directory that may be written."""
        return pathlib.Path(shutil.copytree(model, self.folder / name))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--apollod", type=pathlib.Path, required=True, help="the apollod binary")
    parser.add_argument("--venv", type=pathlib.Path, required=True, help="the server's environment")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="model directory; it is copied")
    parser.add_argument("--question", default="What is the word of the day?")
    parser.add_argument("--answer", default="The word of the day is heron.")
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
    scenario = importlib.import_module(SCENARIOS[options.scenario])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # so that cleaning up happens
    with contextlib.ExitStack() as cleanup:
        folder = options.keep or pathlib.Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="apollod-e2e-")))
        folder.mkdir(parents=True, exist_ok=not options.keep)
        memory = pathlib.Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="apollod-e2e-", dir="/dev/shm")))
        try:
            scenario.test(options, Work(folder.absolute(), memory, cleanup))
            say(f"{options.scenario}: passed")
            return 0
        except (Failed, Broken) as e:
            say(f"{options.scenario}: {'FAILED' if isinstance(e, Failed) else 'could not run'}: {e}")
            for log in sorted(folder.glob("*.log")):
                print(f"--- the end of {log.name}\n{tail(log)}", flush=True)
            return 1 if isinstance(e, Failed) else 2


if __name__ == "__main__":
    sys.exit(main())
