"""llama.cpp's server on a staged GGUF.

1. A copy of the model directory is staged to tmpfs with `apollod stage --gguf`; llama.cpp maps that file. Its greedy
   answer to the question is not yet the taught one.
2. The daemon attaches, knows the server's process, and compares log-probabilities with it; the example is posted until
   the greedy answer is the taught text. A dream asks the server and trains its answer.
3. The server is killed; the daemon waits, the live copy stays. Another one, started on it, is attached by itself.
4. A sync writes the model directory's safetensors; `apollod checkpoint export --gguf` of it is the live file byte for
   byte, and a second server, started from the export, gives the same answer.
5. A GGUF of other weights (the export, compared with the original model) is refused.
"""
import subprocess

from daemon import Daemon, chat
from harness import Broken, check_same_tensors, free_port, require, run, say, tensors, wait_until
from servers import LlamaCpp


def test(options, work):
    model, live, log = work.copy_of(options.model), work.memory / "live", work.folder / "apollod.log"
    gguf = live / "model.gguf"
    run([options.apollod, "stage", model, live, "--gguf"], log)
    port = free_port()    # the same for the next one, since the daemon asks there
    server = work.keep(LlamaCpp(options.venv, gguf, work.folder / "server.log", port))
    server.check_maps()
    before, reason = server.ask(options.question)
    say(f"before: {options.question!r} -> {before!r} ({reason})")
    if before == options.answer:
        raise Broken("the model gives the taught answer already; teach it another with --answer")

    # llama.cpp computes every prompt anew here, and nobody can empty a cache that it does not have.
    daemon = work.keep(Daemon(options, work.folder, model, {"live": str(live), "url": server.base, "prefix_cache": "ignore"}))
    daemon.wait_attached()
    status = daemon.status()
    require(status["server_pid"] == server.pid, f"apollod takes process {status['server_pid']} for the server {server.pid}")
    say(f"attached; shadow check: {status['shadow_check']}; {status['recovery']}")
    daemon.teach(server, options.question, options.answer, options.rounds, options.per_round)
    daemon.dream(server, options.question)
    daemon.sync()
    changed = check_same_tensors(tensors(options.model), tensors(model), "the sync")
    say(f"{changed} tensors changed in the files")
    server.check_same_process()
    server.popen.kill()
    wait_until("the daemon waits for a server", lambda: daemon.status()["state"] == "waiting_for_server", 30)
    ids = daemon.post([chat(options.question, options.answer)] * 4)
    server = work.keep(LlamaCpp(options.venv, gguf, work.folder / "restarted_server.log", port))
    daemon.wait_trained(ids)
    served = server.ask(options.question)
    require(served == (options.answer, "stop"), f"the restarted server answers {served}, want {options.answer!r}")
    say(f"llama.cpp was killed, started again and attached by itself; {len(ids)} examples that waited are trained")
    daemon.sync()
    daemon.stop()
    server.stop()

    exported = work.folder / "exported.gguf"
    run([options.apollod, "checkpoint", "export", model, "--gguf", exported], log)
    require(exported.read_bytes() == gguf.read_bytes(), "the exported GGUF is not the live one")
    second = work.keep(LlamaCpp(options.venv, exported, work.folder / "second_server.log"))
    again = second.ask(options.question)
    require(again == (options.answer, "stop"), f"a server started from the exported GGUF answers {again}")
    say(f"a server started from the exported GGUF gives the same answer: {again[0]!r}")
    refused = subprocess.run([options.apollod, "stage", options.model, work.memory / "other", f"--gguf={exported}"],
                             capture_output=True, text=True)
    require(refused.returncode and "differs from the model directory" in refused.stderr,
            f"a GGUF of other weights was not refused: {refused.stdout}{refused.stderr}")
