"""A PyTorch program of our own that offers its model with `apollod.export`.

1. The program serves the model directory; its greedy answer to the question is not yet the taught one.
2. The daemon attaches through the socket; the example is posted until the greedy answer is the taught text.
3. A sync writes the model directory. The program is killed among steps: the weights' memory no longer changes, examples
   wait. Started again from the model directory, it is attached by itself, every example is trained, and it gives the
   same answer.
"""
from daemon import Daemon
from death import kill_among_steps
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
    ids = kill_among_steps(options, daemon, server)
    server = work.keep(TorchProgram(options.venv, model, work.folder / "second_server.log", socket))
    daemon.wait_trained(ids)
    say(f"the program was started again and attached by itself; all {len(ids)} examples are trained")
    again = server.ask(options.question)
    require(again == (options.answer, "stop"), f"the program started from the model directory answers {again}")
