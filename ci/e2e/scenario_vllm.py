"""`vllm serve` on the CPU with the plugin.

1. vLLM serves the model directory with the plugin; its greedy answer to the question is not yet the taught one.
2. Prefix cache. A daemon that ignores it trains: a prompt that vLLM has seen before then gets log-probabilities that
   are neither the old model's nor the new one's. A second daemon, with the default policy, trains on, and the same
   prompt gets the new model's. The new model's are those of a fresh transformers run from the synced directory.
3. The example is posted until the greedy answer is the taught text. vLLM's processes are the same all along.
4. After a sync, log-probabilities of held-out prompts equal those of a fresh transformers run from the model directory.
5. vLLM's engine is killed among steps: 100 ms later the weights' memory no longer changes. Examples that are posted now
   wait. vLLM is started again, the daemon attaches by itself, and every example is trained.

With a model that has recurrent layers (make_model.py) 1, 3 and 4 alone: vLLM holds their projections merged in its own way. The
rest does not depend on the model.
"""
import json
import os
import pathlib
import random
import statistics
import subprocess
import time

from daemon import Daemon, chat
from death import kill_among_steps
from harness import Broken, check_same_tensors, descendants, free_port, require, say, tail, tensors
from servers import Vllm

# Of tokens drawn at random, whose log-probabilities are around -12 nats: vLLM computes in bfloat16, where a logit of
# that size has steps of 0.06, the reference in float32. On the demo model the mean is 0.03, the largest 0.24.
MEAN_ERROR_MAX = 0.06
ERROR_MAX = 0.5
# Of the most probable token (around -1): there the two differ by 0.01.
UNLIKE = 0.15
PROMPTS = 8
PROMPT_TOKENS = 40
# A cached prefix is whole blocks of tokens. It must be long enough to matter and leave room for the continuation.
CACHED_TOKENS = 300
ANSWER_TOKENS = 8
# Blocks of 32 tokens, so that the prompts above fill several.
FLAGS = ("--block-size", "32", "--enable-prefix-caching")


def test(options, work):
    model, socket = work.copy_of(options.model), work.folder / "weights.sock"
    reference = work.keep(Reference(options.venv, work.folder / "reference.log"))
    port = free_port()    # the same for the second server, since the daemon asks there
    server = work.keep(start(options, work, model, socket, port))
    processes = descendants(server.pid)
    before, reason = server.ask(options.question)
    say(f"before: {options.question!r} -> {before!r} ({reason})")
    if before == options.answer:
        raise Broken("the model gives the taught answer already; teach it another with --answer")

    hybrid = "linear_attention" in json.loads((model / "config.json").read_text()).get("layer_types", [])
    if not hybrid:
        prefix_cache(options, work, model, socket, server, reference)

    daemon = work.keep(attached(options, work, model, server, socket))
    daemon.teach(server, options.question, options.answer, options.rounds, options.per_round)
    daemon.sync()
    check_same_tensors(tensors(options.model), tensors(model), "the sync")
    held_out(reference, options.model, model, server)
    require(descendants(server.pid) == processes, f"vLLM's processes were {processes} and are {descendants(server.pid)}")
    server.check_same_process()
    if hybrid:
        return

    ids = kill_among_steps(options, daemon, server)
    server = work.keep(start(options, work, model, socket, port))
    daemon.wait_trained(ids)
    daemon.check()
    say(f"vLLM was started again and attached by itself; all {len(ids)} examples are trained")
    again = server.ask(options.question)
    require(again == (options.answer, "stop"), f"the restarted vLLM answers {again}, want {options.answer!r}")


def start(options, work, model, socket, port):
    number = len(list(work.folder.glob("vllm-*.log"))) + 1
    return Vllm(options.venv, model, work.folder / f"vllm-{number}.log", socket, *FLAGS, port=port)


def attached(options, work, model, server, socket, **settings):
    daemon = Daemon(options, work.folder, model, {"socket": str(socket), "url": server.base, **settings})
    daemon.wait_attached()
    say(f"attached; shadow check: {daemon.status()['shadow_check']}")
    return daemon


# ---- log-probabilities ----------------------------------------------------------------------------------------------


class Reference:
    """A transformers process beside the server. Files in, log-probabilities out."""

    def __init__(self, venv, log):
        script = pathlib.Path(__file__).parent / "reference.py"
        self.log = log
        self.popen = subprocess.Popen([venv / "bin" / "python", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=log.open("w"), text=True, env=dict(os.environ, HF_HUB_OFFLINE="1"))

    def __call__(self, model, prompts, continue_by=0):
        """The log-probabilities of each prompt, or its greedy continuation as `Vllm.complete` gives it."""
        self.popen.stdin.write(json.dumps({"model": str(model), "prompts": prompts, "continue_by": continue_by}) + "\n")
        self.popen.stdin.flush()
        line = self.popen.stdout.readline()
        if not line:
            raise Broken(f"the reference failed:\n{tail(self.log)}")
        return json.loads(line)

    def stop(self):
        self.popen.stdin.close()
        self.popen.wait()


def random_prompts(count, tokens):
    """Token ids from a fixed seed; the demo model has 1277 ordinary tokens."""
    draw = random.Random(20261121)
    return [[draw.randrange(1, 1277) for _ in range(tokens)] for _ in range(count)]


def distance(got, want):
    """(mean, largest) absolute difference of two lists of lists."""
    errors = [abs(g - w) for a, b in zip(got, want, strict=True) for g, w in zip(a, b, strict=True)]
    return statistics.fmean(errors), max(errors)


def held_out(reference, original, model, server):
    """The server computes with what the files hold now, and no longer with what they held."""
    prompts = random_prompts(PROMPTS, PROMPT_TOKENS)
    served = [server.prompt_logprobs(prompt) for prompt in prompts]
    now, old = distance(served, reference(model, prompts)), distance(served, reference(original, prompts))
    say(f"held-out log-probabilities, |served - transformers|: mean {now[0]:.4f}, largest {now[1]:.4f}; "
        f"to the model before training: mean {old[0]:.4f}, largest {old[1]:.4f}")
    require(now[0] <= MEAN_ERROR_MAX and now[1] <= ERROR_MAX, f"want a mean of at most {MEAN_ERROR_MAX}, a largest of {ERROR_MAX}")
    require(old[0] > 3 * now[0], "the served model is as near to the old files as to the new ones")


# ---- prefix cache ---------------------------------------------------------------------------------------------------


def prefix_cache(options, work, model, socket, server, reference):
    prompts = random_prompts(PROMPTS, CACHED_TOKENS)

    def served():
        return [server.complete(prompt, ANSWER_TOKENS) for prompt in prompts]

    def expected(files):
        return reference(files, prompts, ANSWER_TOKENS)

    before = served()    # and vLLM now holds keys and values of every prompt
    require(differing(before, expected(options.model)) == 0, "the served model is not the one in the files")

    ignoring = work.keep(attached(options, work, model, server, socket, prefix_cache="ignore"))
    train_a_little(options, ignoring)
    ignoring.sync()
    ignoring.stop()
    stale, new = served(), expected(model)
    third = sum(unlike(s, b) and unlike(s, n) for s, b, n in zip(stale, before, new))
    texts = sum(s[0] not in (b[0], n[0]) for s, b, n in zip(stale, before, new))
    say(f'prefix_cache = "ignore": {third} of {PROMPTS} known prompts get log-probabilities of neither model '
        f"({texts} of them another text), {differing(stale, new)} not the new model's")
    require(third > 0, "a prefix cache of the old model made no difference, so this proves nothing")

    for policy in ("reset", "salt"):
        daemon = work.keep(attached(options, work, model, server, socket, prefix_cache=policy, prefix_cache_interval=1.0))
        train_a_little(options, daemon)
        time.sleep(1.5)    # the interval, in which the last steps may still wait for their turn
        daemon.sync()
        daemon.stop()
        fresh, new = served(), expected(model)
        say(f'prefix_cache = "{policy}": {differing(fresh, new)} of {PROMPTS} known prompts do not get the new model\'s answer')
        require(differing(fresh, new) == 0, f"a prompt is answered from an old prefix although the policy is {policy}")


def unlike(one, other):
    """Whether the log-probabilities of two first tokens (each the most probable one) are of different models."""
    return abs(one[1][0] - other[1][0]) > UNLIKE


def differing(answers, wanted):
    return sum(unlike(a, w) for a, w in zip(answers, wanted, strict=True))


def train_a_little(options, daemon):
    """Move the weights visibly, away from the answer that is to be taught later."""
    daemon.wait_trained(daemon.post([chat(options.question, "Nobody knows, and the list of words is closed.")] * 4))
