"""`transformers serve` on a live copy.

1. A copy of the model directory is staged to tmpfs with `apollod stage`; `transformers serve` serves the staged copy and
   maps its safetensors files. Its greedy answer to the question is not yet the taught one.
2. The daemon attaches; the example is posted until the greedy answer is the taught text and ends there by itself. The
   streamed answer is the same. A dream asks the server and trains its answer.
3. A sync writes a generation: every tensor of the model directory equals the live one byte for byte, and is no longer
   what it was.
4. A second server, started from the model directory alone, gives the same answer.
"""
from daemon import Daemon
from harness import Broken, check_same_tensors, require, run, say, tensors
from servers import TransformersServe


def test(options, work):
    model, live = work.copy_of(options.model), work.memory / "live"
    run([options.apollod, "stage", model, live], work.folder / "stage.log")
    server = work.keep(TransformersServe(options.venv, live, work.folder / "server.log"))
    server.check_maps()
    before, reason = server.ask(options.question)
    say(f"before: {options.question!r} -> {before!r} ({reason})")
    if before == options.answer:
        raise Broken("the model gives the taught answer already; teach it another with --answer")

    daemon = work.keep(Daemon(options, work.folder, model, {"live": str(live), "prefix_cache": "ignore"}))
    daemon.wait_attached()
    daemon.teach(server, options.question, options.answer, options.rounds, options.per_round)
    streamed = server.ask(options.question, stream=True)
    require(streamed == (options.answer, "stop"), f"the streamed answer is {streamed}, want {options.answer!r}")
    daemon.dream(server, options.question)
    daemon.sync()
    check_files_equal_live(options.model, model, live)
    daemon.stop()
    server.check_same_process()
    server.stop()

    second = work.keep(TransformersServe(options.venv, model, work.folder / "second_server.log"))
    again = second.ask(options.question)
    require(again == (options.answer, "stop"), f"a server started from the model directory answers {again}")
    say(f"a server started from the model directory gives the same answer: {again[0]!r}")


def check_files_equal_live(original, model, live):
    """The model directory holds the live bytes, and these are not what they were. A tied head that the file repeats may
    be missing from the live copy."""
    before, files, now = tensors(original), tensors(model), tensors(live)
    changed = check_same_tensors(before, files, "the sync")
    require(not now.keys() - files.keys(), f"live tensors without a file: {sorted(now.keys() - files.keys())}")
    absent = files.keys() - now.keys() - {"lm_head.weight"}
    require(not absent, f"tensors that are not live: {sorted(absent)}")
    differing = sorted(name for name in now if now[name] != files[name])
    require(not differing, f"{len(differing)} of {len(now)} tensors of the files differ from the live ones: {differing[:5]}")
    say(f"files equal the live weights: {len(now)} tensors, {changed} of them changed by training")
