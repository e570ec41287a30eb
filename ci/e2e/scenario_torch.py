"""A PyTorch program of our own that offers its model with `apollod.export`.

1. The program serves the model directory; its greedy answer to the question is not yet the taught one.
2. The daemon attaches through the socket; the example is posted until the greedy answer is the taught text.
3. A sync writes the model directory; the program, started anew from it, gives the same answer.
"""
from daemon import Daemon
from harness import Broken, check_same_tensors, require, say, tensors
from servers import TorchProgram


def test(options, work):
    model, socket = work.copy_of(options.model), work.folder / "weights.sock"
    server = work.keep(TorchProgram(options.venv, model, work.folder / "server.log", socket))
    before, reason = server.ask(options.question)
    say(f"before: {options.question!r} -> {before!r} ({reason})")
    if before == options.answer:
        raise Broken("the model gives the taught answer already; teach it another with --answer")

    daemon = work.keep(Daemon(options, work.folder, model, {"socket": str(socket)}))
    daemon.wait_attached()
    say(f"shadow check: {daemon.status()['shadow_check']}")
    daemon.teach(server, options.question, options.answer, options.rounds, options.per_round)
    daemon.sync()
    changed = check_same_tensors(tensors(options.model), tensors(model), "the sync")
    say(f"{changed} tensors changed in the files")
    daemon.stop()
    server.check_same_process()
    server.stop()

    second = work.keep(TorchProgram(options.venv, model, work.folder / "second_server.log", socket))
    again = second.ask(options.question)
    require(again == (options.answer, "stop"), f"the program started from the model directory answers {again}")
    say(f"the program started from the model directory gives the same answer: {again[0]!r}")
