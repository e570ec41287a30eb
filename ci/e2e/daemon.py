"""apollod itself: its command line, configuration and HTTP interface, as the scenarios use them."""
import itertools
import json
import subprocess

from harness import Failed, Process, free_port, http, require, say, wait_until

START_LIMIT_S = 120
TRAIN_LIMIT_S = 300         # of one round of examples
CHECKPOINT_LIMIT_S = 120
WAITING = ("queued", "training")    # states of an example that is still to come; any other but "trained" is a failure

numbers = itertools.count(1)


def chat(question, answer):
    """An example that teaches one answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


class Daemon(Process):
    """`apollod serve` on a model directory. `server` is the [server] table of its configuration."""

    def __init__(self, options, work, model, server, **sections):
        number = next(numbers)
        self.base = f"http://127.0.0.1:{(port := free_port())}"
        tables = {
            "model": {"dir": str(model)},
            "server": server,
            "http": {"listen": f"127.0.0.1:{port}"},
            # The schedule never comes: a sync happens when a scenario asks for one.
            "sync": {"schedule": "0 0 1 1 *", "on_shutdown": False},
            "train": {"lr": 2e-4},
        }
        for name, table in sections.items():
            tables[name] = {**tables.get(name, {}), **table}
        self.apollod, self.work = options.apollod, work
        self.config = config = work / f"apollod-{number}.toml"
        # A string, number or boolean in JSON is one in TOML.
        config.write_text("".join(
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
            for name, table in tables.items()))
        settings = [word for setting in options.set for word in ("--set", setting)]
        super().__init__("apollod", [options.apollod, "serve", "--config", config, *settings], work / f"apollod-{number}.log")

    def wait_attached(self):
        self.wait_ready(lambda: http(f"{self.base}/ready")[0] == 200, START_LIMIT_S)

    def status(self):
        status, body = http(f"{self.base}/v1/status")
        require(status == 200, f"GET /v1/status answered {status}: {body}")
        return body

    def post(self, examples):
        """Post examples. Returns their ids."""
        status, body = http(f"{self.base}/v1/examples", examples)
        ids = [accepted["id"] for accepted in body["accepted"]] if isinstance(body, dict) and "accepted" in body else None
        require(status == 202 and ids and len(ids) == len(examples),
                f"POST /v1/examples of {len(examples)} examples answered {status}: {body}")
        return ids

    def example(self, example_id):
        """State of an example ("queued", "training", "trained", …) and its loss, if it has one."""
        status, body = http(f"{self.base}/v1/examples/{example_id}")
        require(status == 200, f"GET /v1/examples/{example_id} answered {status}: {body}")
        return body["state"], body.get("loss")

    def wait_trained(self, ids, limit_s=TRAIN_LIMIT_S):
        """Wait until every example is trained. Returns their losses."""
        waiting, losses = list(ids), []

        def all_trained():
            self.check()
            for example_id in list(waiting):
                state, loss = self.example(example_id)
                if state == "trained":
                    waiting.remove(example_id)
                    losses.append(loss)
                elif state not in WAITING:
                    raise Failed(f"example {example_id} is {state!r}, want trained")
            return not waiting

        wait_until(f"{len(ids)} examples are trained", all_trained, limit_s)
        return losses

    def teach(self, server, question, answer, rounds, per_round):
        """Post and train until the served greedy answer is the taught one, from one and the same server process."""
        for number in range(1, rounds + 1):
            losses = self.wait_trained(self.post([chat(question, answer)] * per_round))
            server.check_same_process()
            served, reason = server.ask(question)
            shown = " ".join("?" if loss is None else f"{loss:.3f}" for loss in losses)
            say(f"round {number}: losses {shown}; served: {served!r} ({reason})")
            if served == answer and reason == "stop":
                return number
        raise Failed(f"after {rounds} rounds of {per_round} examples the server still answers {served!r}")

    def dream(self, server, question):
        """One dream of one question: the server's own answer to it becomes an example and is trained."""
        scenarios = self.work / "scenarios.jsonl"
        scenarios.write_text(json.dumps({"prompt": question}) + "\n")
        settings = {"server.url": server.base, "dream.model": server.model, "dream.scenarios": scenarios, "dream.instruction": "Be kind.",
                    "dream.judge": "{ max_chars = 500 }", "dream.skip_known": "false", "dream.max_tokens": 64, "dream.temperature": 0.1}
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        done = subprocess.run([self.apollod, "dream", "--config", self.config, "--examples", "1", "--json", *words], capture_output=True, text=True)
        require(done.returncode == 0, f"apollod dream: {done.stdout}{done.stderr}")
        made = [turn for turn in map(json.loads, done.stdout.splitlines()) if turn["outcome"] == "accepted"]
        require(len(made) == 1, f"apollod dream made {len(made)} examples, want 1: {done.stdout}")
        losses = self.wait_trained([made[0]["example"]])
        say(f"dreamt: {made[0]['asked']!r} -> {made[0]['answer']!r}, trained, loss {losses[0]:.3f}")

    def generation(self):
        """Number of the newest generation; 0 if there is none."""
        status, body = http(f"{self.base}/v1/checkpoints")
        require(status == 200, f"GET /v1/checkpoints answered {status}: {body}")
        generations = body["checkpoints"] if isinstance(body, dict) else body
        return max((g["generation"] for g in generations), default=0)

    def sync(self):
        """Write a generation and wait for it."""
        generation = self.generation()
        status, body = http(f"{self.base}/v1/checkpoint", {}, limit_s=CHECKPOINT_LIMIT_S)
        require(status in (200, 202), f"POST /v1/checkpoint answered {status}: {body}")
        written = wait_until("the checkpoint is written", lambda: (g := self.generation()) > generation and g, CHECKPOINT_LIMIT_S)
        say(f"generation {written} written")
