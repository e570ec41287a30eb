"""What training costs the server beside it: tokens per second and the time of a token, alone and at three duty cycles.

The program generates one answer after the other, greedily, one token at a time. A duty cycle d is kept by posting an
example every (time of a step / d); at 100% the queue is never empty. The time of a step is measured first, beside the
program, since both share the GPU.
"""
import random
import shutil
import statistics
import sys
import threading
import time

import torch

from report import MEASURED, ROOT, Broken, Report, options
from serving import Nursery, Program, daemon

from harness import require, wait_until

DUTY_CYCLES = (0.25, 0.5, 1.0)
SECONDS_EACH = 7.0
PROMPT, TOKENS, CONTEXT, DECISION = 64, 64, 512, 32
SHAPES = {
    "cuda": dict(hidden_size=1024, num_hidden_layers=28, intermediate_size=3072, num_attention_heads=16,
                 num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    "cpu": dict(hidden_size=128, num_hidden_layers=2, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
                head_dim=32, vocab_size=1280, tie_word_embeddings=True),
}


def random_model(options):
    """A model directory of random weights in bf16, with the tokenizer of the demo model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    on = "cuda" if options.device == "cuda" else "cpu"
    config = Qwen3Config(**SHAPES[on], max_position_embeddings=4096, rms_norm_eps=1e-6, eos_token_id=1, bos_token_id=0)
    torch.manual_seed(options.seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(on):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    folder = options.work / "random_model"
    model.to("cpu").save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "research/demo_model/model" / file, folder)
    return folder, config.vocab_size


class Load:
    """A client that asks for one answer after the other."""

    def __init__(self, program, vocab, seconds, seed):
        self.tokens_ms, dice = [], random.Random(seed)
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            _, ms = program.generate([dice.randrange(vocab) for _ in range(PROMPT)], TOKENS)
            self.tokens_ms += ms[1:]        # the first is the prompt's
        self.seconds = time.monotonic() - start

    def figures(self):
        ordered = sorted(self.tokens_ms)
        return dict(tokens_per_s=len(ordered) / self.seconds, p50_ms=statistics.median(ordered),
                    p99_ms=ordered[int(0.99 * (len(ordered) - 1))], most_ms=ordered[-1], tokens=len(ordered))


def example(dice, vocab):
    ids = lambda n: [dice.randrange(vocab) for _ in range(n)]
    return dict(context_ids=ids(CONTEXT), decision_ids=ids(DECISION))


def step_seconds(trainer, vocab, dice):
    """Median time of a step while the program generates, too."""
    times = []
    for _ in range(4):
        trainer.wait_trained(trainer.post([example(dice, vocab)]))
        times.append(trainer.status()["timings"]["total_ms"] / 1e3)
    return statistics.median(times[1:])


class Poster(threading.Thread):
    """Posts examples at a rate until told to stop."""

    def __init__(self, trainer, vocab, interval_s, seed):
        super().__init__(daemon=True)
        self.trainer, self.vocab, self.interval_s, self.dice = trainer, vocab, interval_s, random.Random(seed)
        self.over, self.posted = threading.Event(), 0

    def run(self):
        due = time.monotonic()
        while not self.over.is_set():
            due = max(due + self.interval_s, time.monotonic() - 1)
            self.trainer.post([example(self.dice, self.vocab)])
            self.posted += 1
            self.over.wait(max(0.0, due - time.monotonic()))


def at(report, program, trainer, vocab, duty, alone):
    dice = random.Random(report.options.seed + round(100 * duty))
    seconds = step_seconds(trainer, vocab, dice)
    before = trainer.status()["counts"]["applied"]
    # At 100% more is posted than can be trained.
    poster = Poster(trainer, vocab, seconds / (duty if duty < 1 else 2), dice.random())
    poster.start()
    load = Load(program, vocab, SECONDS_EACH, report.options.seed)
    applied = trainer.status()["counts"]["applied"] - before
    poster.over.set()
    poster.join(10)
    found = load.figures() | dict(steps_per_s=applied / load.seconds, step_ms=1e3 * seconds,
                                  duty=applied * seconds / load.seconds)
    report.keep(f"duty {duty}", found)
    require(applied > 0, "no step was applied meanwhile")
    if duty < max(DUTY_CYCLES):
        wait_until("the queue is empty", lambda: trainer.status()["state"] == "idle", 60)
    part = found["tokens_per_s"] / alone["tokens_per_s"]
    return MEASURED, (f"{found['tokens_per_s']:.1f} tokens/s ({100 * part:.0f}% of alone), "
                      f"p50 {found['p50_ms']:.1f}, p99 {found['p99_ms']:.1f} ms (alone {alone['p99_ms']:.1f}), "
                      f"{found['steps_per_s']:.1f} steps/s of {found['step_ms']:.1f} ms")


def main():
    chosen = options(__doc__)
    names = ["alone", "attached and idle", *(f"training at {100 * d:.0f}%" for d in DUTY_CYCLES)]
    report = Report(chosen, [f"serving: {name}" for name in names])
    model, vocab = random_model(chosen)
    nursery = Nursery(chosen)
    program = Program(nursery, model, chosen.work)
    trainer, alone = None, {}
    try:
        program.start()
        program.wait_ready()
        Load(program, vocab, 2, 0)      # warms up

        def measure(name):
            found = Load(program, vocab, SECONDS_EACH, chosen.seed).figures()
            report.keep(name, found)
            alone.setdefault("tokens_per_s", found["tokens_per_s"])
            alone.setdefault("p99_ms", found["p99_ms"])
            return MEASURED, f"{found['tokens_per_s']:.1f} tokens/s, p50 {found['p50_ms']:.1f}, p99 {found['p99_ms']:.1f} ms"
        report.check("serving: alone", lambda: measure("alone"))

        def idle():
            nonlocal trainer
            trainer = daemon(chosen, chosen.work, program, train=dict(lr=1e-6, max_tokens=1024))
            return measure("attached and idle")
        report.check("serving: attached and idle", idle)
        for duty in DUTY_CYCLES:
            def training():
                if trainer is None or not alone:
                    raise Broken("apollod is not attached")
                return at(report, program, trainer, vocab, duty, alone)
            report.check(f"serving: training at {100 * duty:.0f}%", training)
    finally:
        if trainer:
            trainer.stop()
        program.stop()
        nursery.stop()


if __name__ == "__main__":
    sys.exit(main())
