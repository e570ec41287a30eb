"""`llama_cpp.server` on a staged GGUF.

1. A copy of the model directory is staged to tmpfs as a GGUF; `llama_cpp.server` maps it. Its greedy answer to the
   question is not yet the taught one.
2. The daemon attaches; the example is posted until the greedy answer is the taught text.
3. A sync writes the model directory's safetensors; `apollod checkpoint export --gguf` writes a GGUF from them; a second
   server, started from that file, gives the same answer.
"""
from daemon import Daemon
from harness import Broken, check_same_tensors, require, run, say, tensors
from servers import LlamaCpp


def test(options, work):
    model, live, log = work.copy_of(options.model), work.memory / "live", work.folder / "apollod.log"
    run([options.apollod, "stage", model, live, "--gguf"], log)
    server = work.keep(LlamaCpp(options.venv, live / "model.gguf", work.folder / "server.log"))
    before, reason = server.ask(options.question)
    say(f"before: {options.question!r} -> {before!r} ({reason})")
    if before == options.answer:
        raise Broken("the model gives the taught answer already; teach it another with --answer")

    daemon = work.keep(Daemon(options, work.folder, model, {"live": str(live)}))
    daemon.wait_attached()
    daemon.teach(server, options.question, options.answer, options.rounds, options.per_round)
    daemon.sync()
    changed = check_same_tensors(tensors(options.model), tensors(model), "the sync")
    say(f"{changed} tensors changed in the files")
    daemon.stop()
    server.check_same_process()
    server.stop()

    exported = work.folder / "exported.gguf"
    run([options.apollod, "checkpoint", "export", "--model", model, "--gguf", exported], log)
    second = work.keep(LlamaCpp(options.venv, exported, work.folder / "second_server.log"))
    again = second.ask(options.question)
    require(again == (options.answer, "stop"), f"a server started from the exported GGUF answers {again}")
    say(f"a server started from the exported GGUF gives the same answer: {again[0]!r}")
