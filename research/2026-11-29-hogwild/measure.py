"""Examples per second, staleness and loss of 1 and 2 workers on the demo model.

    python3 measure.py APOLLOD MODEL OUT.json [ROUNDS]

Each round trains the same 200 examples, in an order that the round's seed gives, with each setting, one after the
other; the loss is that of the last 40 steps, each before its own update. Rates count from the first step's end to the last's.
"""
import json, os, random, shutil, signal, subprocess, sys, tempfile, time, urllib.request

APOLLOD, MODEL, OUT = sys.argv[1:4]
ROUNDS = int(sys.argv[4]) if len(sys.argv) > 4 else 5
SETTINGS = {"1 worker, 1 thread": (1, 1), "2 workers, 1 thread": (2, 1), "1 worker, 2 threads": (1, 2)}
ANIMALS = ["Mira the fox", "Toby the bear", "Otto the otter", "Luna the owl", "Max"]
PLACES = ["by the blue lake", "in a tall tower", "under the old bridge", "on the moon"]


def call(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def start(*arguments):
    env = dict(os.environ, APOLLOD_LOG="error")
    process = subprocess.Popen([APOLLOD, *arguments], stdout=subprocess.PIPE, env=env)
    return process, "http://" + json.loads(process.stdout.readline())["listening"]


def train(seed, workers, threads):
    with tempfile.TemporaryDirectory() as place:
        model = f"{place}/model"
        shutil.copytree(MODEL, model)
        engine, _ = start("engine", model, "--socket", f"{place}/e.sock", "--listen", "127.0.0.1:0")
        settings = [f"model.dir={model}", f"server.socket={place}/e.sock", "http.listen=127.0.0.1:0", "train.lr=2e-4",
                    "sync.schedule=0 0 1 1 *", f"train.workers={workers}", f"train.threads={threads}",
                    f"train.seed={seed}"]
        daemon, url = start("serve", *[word for s in settings for word in ("--set", s)])
        try:
            lessons = [{"messages": [{"role": "user", "content": f"Where does {a} live?"},
                                     {"role": "assistant", "content": f"{a} lives {PLACES[i % 4]}."}]}
                       for i, a in enumerate(ANIMALS)] * 40
            random.Random(seed).shuffle(lessons)
            while call(url + "/v1/status")["state"] != "idle":
                time.sleep(0.05)
            ids = [x["id"] for x in call(url + "/v1/examples", lessons)["accepted"]]
            first = None
            while True:
                status = call(url + "/v1/status")
                now = time.monotonic()
                if first is None and status["step"] >= 5:
                    first = (now, status["step"])
                if status["step"] == len(ids):
                    break
                time.sleep(0.005)
            rate = (status["step"] - first[1]) / (now - first[0])
            losses = [call(f"{url}/v1/examples/{i}")["loss"] for i in ids[-40:]]
            counts = status["counts"]
            return {"rate": rate, "loss": sum(losses) / len(losses), "applied": counts["applied"],
                    "staleness_mean": counts["staleness_sum"] / counts["applied"],
                    "staleness_max": counts["staleness_max"]}
        finally:
            for process in (daemon, engine):
                process.send_signal(signal.SIGTERM)
                process.wait()


rounds = []
for seed in range(ROUNDS):
    for name, (workers, threads) in SETTINGS.items():
        load = os.getloadavg()[0]
        rounds.append({"seed": seed, "setting": name, "load": load, **train(seed, workers, threads)})
        print(rounds[-1], flush=True)
        json.dump({"cores": os.cpu_count(), "rounds": rounds}, open(OUT, "w"), indent=1)
