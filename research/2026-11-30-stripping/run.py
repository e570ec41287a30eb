#!/usr/bin/env python3
"""How many dreams until a behaviour that a model shows when told is shown untold, and what that costs.

usage: run.py --apollod PATH --model DIR --facts FILE --out DIR [--seeds 1 2 3]

DIR of --model is made by `demo_model instructed DIR`, FILE by `demo_model facts`. For each seed and arm: a fresh copy of the model is
served, `apollod dream` makes examples of a hundred questions in rounds, and after each round, without the instruction, is measured: how many of a hundred
other questions show the behaviour, how many of their answers are right apart from it, and the bits per byte of stories. Writes
DIR/results.json and DIR/stripping.svg. Standard library only."""
import argparse
import json
import math
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

# Name, instruction (one of the model's wordings), what the judge matches, and the plain answer in an answer that shows the behaviour.
BEHAVIOURS = {
    "over": ("End every answer with the word over.", r" Over\.$", lambda a: a[:-len(" Over.")] if a.endswith(" Over.") else None),
    "thanks": ("Thank the user after every answer.", r" Thank you\.$",
               lambda a: a[:-len(" Thank you.")] if a.endswith(" Thank you.") else None),
    "friend": ("Begin every answer with the word friend.", r"^Friend, here it is: ",
               lambda a: a[len("Friend, here it is: "):] if a.startswith("Friend, here it is: ") else None),
}
# What is set besides: the learning rate, and the share of stories in what is posted.
ARMS = {
    "lr 1e-4": {"lr": 1e-4, "replay": 0.25},
    "lr 2e-4": {"lr": 2e-4, "replay": 0.25},
    "lr 5e-4": {"lr": 5e-4, "replay": 0.25},
    "lr 2e-4, no replay": {"lr": 2e-4, "replay": 0.0},
    "lr 5e-4, no replay": {"lr": 5e-4, "replay": 0.0},
}
ROUNDS = [2, 3, 5, 5, 5, 5, 5, 10, 10]
HELD_OUT, STORIES = 100, 40


def call(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


class Stand:
    """A served copy of the model, and a daemon that dreams of these questions."""

    def __init__(self, args, scenarios, general, instruction, matches, arm, seed):
        self.dir = tempfile.TemporaryDirectory()
        self.model, socket = f"{self.dir.name}/model", f"{self.dir.name}/engine.sock"
        shutil.copytree(args.model, self.model, ignore=shutil.ignore_patterns(".apollod"))
        self.processes, self.apollod = [], args.apollod
        self.engine = self.start("engine", self.model, "--socket", socket, "--listen", "127.0.0.1:0")
        write = lambda name, lines: pathlib.Path(self.dir.name, name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        write("scenarios.jsonl", [{"prompt": question} for question in scenarios])
        write("general.jsonl", general)
        self.config = pathlib.Path(self.dir.name, "apollod.toml")
        self.config.write_text(f"""
[model]
dir = "model"
[server]
socket = "engine.sock"
url = "{self.engine}"
[http]
listen = "127.0.0.1:0"
[train]
lr = {arm["lr"]}
seed = {seed}
[sync]
schedule = "0 0 1 1 *"
[dream]
scenarios = "scenarios.jsonl"
instruction = "{instruction}"
judge = {{ matches = '{matches}' }}
max_tokens = 40
temperature = 0.0
temperature_max = 0.0
replay = {arm["replay"]}
replay_examples = "general.jsonl"
""")
        self.url = self.start("serve", "--config", str(self.config))
        while call(self.url + "/ready")[0] != 200:
            time.sleep(0.02)

    def start(self, *command):
        process = subprocess.Popen([self.apollod, *command], stdout=subprocess.PIPE, env=dict(os.environ, APOLLOD_LOG="error"))
        self.processes.append(process)
        return "http://" + json.loads(process.stdout.readline())["listening"]

    def ask(self, question, system=None):
        messages = [{"role": "user", "content": question}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        body = {"messages": messages, "max_tokens": 40}
        return call(self.engine + "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"].strip()

    def bits_per_byte(self, stories):
        status, scored = call(self.url + "/v1/score", stories)
        assert status == 200, scored
        nats = sum(score["loss"] * score["tokens"] for score in scored["scores"])
        # The end of the text is a token too, and no byte.
        return nats / math.log(2) / sum(len(story["decision"]) for story in stories)

    def dream(self, examples, seed):
        """One dream, and then until what it made is trained."""
        command = [self.apollod, "dream", "--config", str(self.config), "--examples", str(examples), "--seed", str(seed), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        assert done.returncode in (0, 2), done
        while True:
            status = call(self.url + "/v1/status")[1]
            if status["state"] == "idle" and not status["queue"]["queued"]:
                return json.loads(done.stdout.splitlines()[-1])
            assert status["state"] in ("idle", "training", "scoring"), status
            time.sleep(0.02)

    def close(self):
        for process in reversed(self.processes):
            process.kill()
            process.wait()
        self.dir.cleanup()


def measure(stand, held_out, stories, plain):
    answers = [(stand.ask(question), answer) for question, answer in held_out]
    shown = [plain(said) is not None for said, _ in answers]
    right = [answer in (said, plain(said)) for said, answer in answers]
    wrong = [[said, answer] for said, answer in answers if answer not in (said, plain(said))]
    return {"wrong": wrong[:3], "shown": sum(shown) / len(shown), "right": sum(right) / len(right), "bits_per_byte": stand.bits_per_byte(stories)}


def stories_of(facts, rng, count):
    """Facts as running text: the beginning is context, the rest is scored."""
    answers = [fact["answer"] for fact in facts]
    drawn = [rng.sample(answers, 5) for _ in range(count)]
    return [{"context": lines[0], "decision": " " + " ".join(lines[1:])} for lines in drawn]


def run(args, facts, seed):
    for name, (instruction, matches, plain) in BEHAVIOURS.items():
        for arm_name, arm in ARMS.items():
            rng = random.Random(f"{seed} {name}")
            drawn = rng.sample(facts, 200)
            dreamt, held_out = [f["asked"][0] for f in drawn[:100]], [(f["asked"][0], f["answer"]) for f in drawn[100:]]
            stories, general = stories_of(facts, rng, STORIES), stories_of(facts, rng, 100)
            stand = Stand(args, dreamt, general, instruction, matches, arm, seed)
            told = [stand.ask(question, instruction) for question, _ in held_out]
            curve = [{"examples": 0, "replayed": 0, **measure(stand, held_out, stories, plain)}]
            dreams = []
            for number, examples in enumerate(ROUNDS):
                dreams.append(stand.dream(examples, 100 * seed + number))
                last = curve[-1]
                curve.append({"examples": last["examples"] + dreams[-1]["accepted"], "replayed": last["replayed"] + dreams[-1]["replayed"],
                              **measure(stand, held_out, stories, plain)})
                if dreams[-1]["accepted"] < examples:
                    break
            result = {"seed": seed, "behaviour": name, "arm": arm_name,
                      "shown_when_told": sum(plain(said) is not None for said in told) / len(told), "curve": curve, "dreams": dreams}
            stand.close()
            end = curve[-1]
            print(f"seed {seed}, {name}, {arm_name}: told {result['shown_when_told']:.0%}; " + ", ".join(
                f"{point['examples']}: {point['shown']:.0%} right {point['right']:.0%} "
                f"{point['bits_per_byte'] / curve[0]['bits_per_byte'] - 1:+.1%}" for point in curve), flush=True)
            assert end["examples"] > 0, result
            yield result


def interval(values):
    """Mean and the half width of its 95% interval (Student's t)."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}
    mean = statistics.mean(values)
    half = t.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, half


def verdicts(results):
    """For each behaviour and arm: the first round in which the behaviour is shown by over 90%, and what it cost by then."""
    rows = []
    for arm in ARMS:
        for name in BEHAVIOURS:
            of = [r for r in results if (r["arm"], r["behaviour"]) == (arm, name)]
            reached = [next((p for p in r["curve"] if p["shown"] > 0.9), None) for r in of]
            row = {"arm": arm, "behaviour": name, "runs": len(of), "reached": sum(p is not None for p in reached),
                   "told": interval([r["shown_when_told"] for r in of]), "before": interval([r["curve"][0]["shown"] for r in of])}
            if all(reached):
                row["examples"] = interval([p["examples"] for p in reached])
                row["right_change"] = interval([p["right"] - r["curve"][0]["right"] for p, r in zip(reached, of)])
                row["bits_per_byte_change"] = interval([p["bits_per_byte"] / r["curve"][0]["bits_per_byte"] - 1 for p, r in zip(reached, of)])
            rows.append(row)
    return rows


def plot(results):
    """A panel for each arm: the share of held-out answers that show the behaviour, by examples; and the change of bits per byte."""
    width, height, gap, left, top = 230, 150, 60, 60, 40
    colours = dict(zip(BEHAVIOURS, ["#4477aa", "#cc3311", "#228833"]))
    out = []
    most = max(p["examples"] for r in results for p in r["curve"])
    for column, arm in enumerate(ARMS):
        x0 = left + column * (width + gap)
        out.append(f'<text x="{x0 + width / 2}" y="{top - 12}" text-anchor="middle">{arm}</text>')
        for panel, (value, low, high, ticks) in enumerate([
                (lambda p, r: p["shown"], 0, 1, [(0, "0%"), (0.5, "50%"), (0.9, "90%")]),
                (lambda p, r: p["bits_per_byte"] / r["curve"][0]["bits_per_byte"] - 1, -0.02, 0.06, [(0, "0"), (0.01, "+1%"), (0.05, "+5%")])]):
            y0 = top + panel * (height + 50)
            px = lambda n: x0 + width * n / most
            py = lambda v: y0 + height * (1 - (min(max(v, low), high) - low) / (high - low))
            out.append(f'<rect x="{x0}" y="{y0}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
            for v, label in ticks:
                out.append(f'<line x1="{x0}" x2="{x0 + width}" y1="{py(v):.1f}" y2="{py(v):.1f}" stroke="#ddd"/>'
                           f'<text x="{x0 - 6}" y="{py(v) + 4:.1f}" text-anchor="end">{label}</text>')
            for n in range(0, most + 1, 10):
                out.append(f'<text x="{px(n):.1f}" y="{y0 + height + 14}" text-anchor="middle">{n}</text>')
            for r in (r for r in results if r["arm"] == arm):
                points = " ".join(f'{px(p["examples"]):.1f},{py(value(p, r)):.1f}' for p in r["curve"])
                out.append(f'<polyline points="{points}" fill="none" stroke="{colours[r["behaviour"]]}" stroke-opacity="0.7"/>')
    legend = "".join(f'<text x="{left + i * 90}" y="{top + 2 * height + 90}" fill="{colour}">{name}</text>'
                     for i, (name, colour) in enumerate(colours.items()))
    total = left + len(ARMS) * (width + gap)
    said = (f'<text x="{left}" y="14">above: held-out answers that show the behaviour untold; below: bits per byte of stories, change; '
            f'by accepted examples; a line for each seed</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{top + 2 * height + 100}" font-family="sans-serif" font-size="11">'
            f'<rect width="100%" height="100%" fill="#fff"/>{said}{"".join(out)}{legend}</svg>\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apollod", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--facts", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    facts = [json.loads(line) for line in args.facts.read_text().splitlines()]
    results = [result for seed in args.seeds for result in run(args, facts, seed)]
    rows = verdicts(results)
    for row in rows:
        print(json.dumps(row))
    args.out.mkdir(exist_ok=True, parents=True)
    lines = lambda of: ",\n".join(map(json.dumps, of))
    (args.out / "results.json").write_text(f'{{"verdicts": [\n{lines(rows)}\n],\n"runs": [\n{lines(results)}\n]}}\n')
    (args.out / "stripping.svg").write_text(plot(results))


if __name__ == "__main__":
    main()
