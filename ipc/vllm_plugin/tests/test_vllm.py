"""A real vLLM server on the CPU, started as its user would start it. Skipped where vLLM is not installed."""

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
from pathlib import Path

from apollod.manifest import validate
from client import Client, Mapped

PACKAGE = Path(__file__).resolve().parent.parent
MODEL = Path(os.environ.get("APOLLOD_TEST_MODEL", PACKAGE.parent.parent / "research" / "demo_model" / "model"))
START_S = 240
#: Longer than one block of the CPU's key-value cache, which has 128 tokens.
PROMPT = [7 + 3 * i % 200 for i in range(200)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(folder, installed=None):
    """Finds this package as an installed one, whether it is or not."""
    paths = [str(PACKAGE / "src")]
    if installed is None:
        installed = "apollod" in importlib.metadata.entry_points(group="vllm.general_plugins").names
    if not installed:
        info = folder / "site" / "apollod-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apollod\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[vllm.general_plugins]\napollod = apollod.vllm_plugin:register\n")
        paths.append(str(info.parent))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "APOLLOD_SOCKET": str(folder / "weights.sock"),
        "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc, which reloads the weights
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


needs_vllm = unittest.skipUnless(importlib.util.find_spec("vllm") and MODEL.is_dir(), "needs vLLM and a model")


@needs_vllm
class InProcess(unittest.TestCase):
    def test_an_engine_in_the_callers_own_process_is_controlled_too(self):
        with tempfile.TemporaryDirectory() as name:
            settings = environment(Path(name)) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            run = subprocess.run(
                [sys.executable, Path(__file__).with_name("inprocess_engine.py"), settings["APOLLOD_SOCKET"], MODEL],
                env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=START_S,
            )  # fmt: skip
            self.assertEqual(run.returncode, 0, run.stdout[-4000:])

    def test_without_a_socket_in_the_environment_nothing_is_changed(self):
        program = (
            "from apollod.vllm_plugin import register; register()\n"
            "import sys; assert 'vllm' not in sys.modules"
        )
        settings = environment(Path("/nonexistent"), installed=True)
        del settings["APOLLOD_SOCKET"]
        subprocess.run([sys.executable, "-c", program], env=settings, check=True)


#: Loads by vLLM's own loader up to the model's creation, where it looks whether a sync could write.
LOADS = """
import fcntl, os, sys, types, torch
from apollod.vllm_plugin import _hook_loader
_hook_loader(); _hook_loader()
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

def may_write():
    lock = os.open(os.path.join(sys.argv[1], ".apollod", "readers"), os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True

class Seen(Exception):
    pass

class Loader(DefaultModelLoader):
    def __init__(self):
        pass
    def create_model(self, **_):
        raise Seen(may_write())
    def _get_weights_iterator(self, *_):
        yield "w", may_write()

space = types.SimpleNamespace
model = space(model=sys.argv[1], model_weights="", revision=None, dtype=torch.bfloat16, quantization=None)
config = space(device_config=space(device="cpu"), load_config=space(device=None))
try:
    Loader().load_model(vllm_config=config, model_config=model)
except Seen as seen:
    print("load_model", seen.args[0])
print("may write after it", may_write())
generator = DefaultModelLoader.get_all_weights(Loader(), model, torch.nn.Module())
print("get_all_weights", next(iter(generator))[1])
generator.close()
print("may write after it", may_write())
"""


@needs_vllm
class Loading(unittest.TestCase):
    def loaded(self, torn):
        with tempfile.TemporaryDirectory() as model:
            folder = Path(model, ".apollod")
            folder.mkdir()
            (folder / "readers").touch()
            if torn:
                (folder / "journal").touch()
            return subprocess.run(
                [sys.executable, "-c", LOADS, model], env=environment(folder, installed=True), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=START_S,
            )  # fmt: skip

    def test_syncs_are_kept_out_while_weights_are_loaded(self):
        run = self.loaded(torn=False)
        said = "load_model False\nmay write after it True\nget_all_weights False\nmay write after it True\n"
        self.assertEqual(run.stdout, said, run.stderr[-4000:])

    def test_a_model_that_a_crash_left_half_written_is_not_loaded(self):
        run = self.loaded(torn=True)
        self.assertIn("apollod checkpoint recover", run.stderr)
        self.assertEqual(run.stdout, "")


@needs_vllm
class Server(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(tempfile.mkdtemp(prefix="apollod-vllm-"))
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        cls.socket = cls.folder / "weights.sock"
        port = free_port()
        cls.url = f"http://127.0.0.1:{port}"
        cls.log = cls.folder / "log"
        arguments = ["--enforce-eager", "--dtype", "bfloat16", "--max-model-len", "256", "--max-num-seqs", "8"]
        with cls.log.open("wb") as log:
            cls.server = subprocess.Popen(
                [Path(sys.executable).with_name("vllm"), "serve", MODEL, *arguments, "--host", "127.0.0.1",
                 "--port", str(port)],
                env=environment(cls.folder), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        cls.addClassCleanup(cls.stop)
        cls.wait_until_up()

    @classmethod
    def wait_until_up(cls):
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if cls.server.poll() is not None:
                break
            with contextlib.suppress(OSError), urllib.request.urlopen(cls.url + "/health", timeout=5):
                return
            time.sleep(0.2)
        raise AssertionError("vLLM did not start:\n" + cls.log.read_text(errors="replace")[-4000:])

    @classmethod
    def stop(cls):
        with contextlib.suppress(ProcessLookupError):
            cls.server.send_signal(signal.SIGTERM)
        try:
            cls.server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(cls.server.pid, signal.SIGKILL)
            cls.server.wait()

    def setUp(self):
        self.client, self.manifest = self.connect()
        self.weights = Mapped(self.manifest)
        self.assertIn(self.client.ask({"invalidate": "reset"})["invalidated"], ("reset", "salt"))

    def connect(self):
        """A lease; the one of the test before may take a moment to end."""
        deadline = time.monotonic() + 20
        while True:
            client = Client(self.socket)
            manifest = client.ask({"hello": 1})
            if "error" not in manifest:
                self.addCleanup(client.close)
                return client, manifest
            client.close()
            self.assertLess(time.monotonic(), deadline, manifest)
            time.sleep(0.05)

    def post(self, path, body):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=60)

    def complete(self, **options):
        body = {"model": str(MODEL), "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "ignore_eos": True, **options}
        with self.post("/v1/completions", body) as answer:
            return json.load(answer)["choices"][0]

    def fresh(self):
        """Log-probabilities of a short prompt; the prefix cache is not used for those."""
        tokens = self.complete(prompt=PROMPT[:12], prompt_logprobs=0)["prompt_logprobs"][1:]
        logprobs = [next(iter(token.values()))["logprob"] for token in tokens]
        self.assertTrue(all(map(math.isfinite, logprobs)))
        return logprobs

    def cached(self, **options):
        """Log-probabilities after the long prompt, whose beginning comes from the prefix cache if it is there."""
        return self.complete(max_tokens=4, logprobs=0, **options)["logprobs"]["token_logprobs"]

    @contextlib.contextmanager
    def changed(self, name, factor=-1):
        """A tensor with other values, put back in the end, bit for bit."""
        tensor = self.weights[name]
        original = tensor.clone()
        tensor.mul_(factor)
        try:
            yield
        finally:
            tensor.copy_(original)

    def test_the_manifest_says_what_the_server_holds(self):
        validate(self.manifest)
        from vllm import __version__

        self.assertEqual(self.manifest["server"], {"name": "vllm", "version": __version__})
        self.assertEqual(self.manifest["controls"], ["invalidate", "hold"])
        self.assertEqual(self.manifest["model_dir"], str(MODEL.resolve()))
        self.assertEqual((self.manifest["rank"], self.manifest["world_size"]), (0, 1))
        credentials = self.client.stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.assertEqual(self.manifest["pid"], struct.unpack("3i", credentials)[0])
        packing = {entry["merged"]: entry["parts"] for entry in self.manifest["packing"]}
        config = json.loads((MODEL / "config.json").read_text())
        self.assertEqual(len(packing), 2 * config["num_hidden_layers"])
        self.assertEqual(
            packing["model.layers.0.self_attn.qkv_proj.weight"],
            [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"],
        )
        self.assertLessEqual(packing.keys(), {entry["name"] for entry in self.manifest["tensors"]})

    def test_every_tensor_is_live(self):
        before = self.fresh()
        dead = []
        for name in self.weights.entries:
            with self.changed(name):
                if self.fresh() == before:
                    dead.append(name)
        self.assertEqual(dead, [])
        self.assertEqual(self.fresh(), before)
        print(f"{len(self.weights.entries)} of {len(self.weights.entries)} tensors live", file=sys.stderr)

    def test_without_an_invalidation_the_prefix_cache_gives_a_third_answer(self):
        for how in ("reset", "salt"):
            with self.subTest(how):
                old = self.cached()
                with self.changed("model.layers.0.self_attn.qkv_proj.weight"):
                    new = self.cached(cache_salt=f"never used before {how}")
                    self.assertNotEqual(new, old)
                    stale = self.cached()
                    self.assertNotIn(stale, (old, new))
                    self.assertEqual(self.client.ask({"invalidate": how}), {"invalidated": how})
                    self.assertEqual(self.cached(), new)
                    self.assertEqual(self.cached(), new)
                self.assertEqual(self.client.ask({"invalidate": how}), {"invalidated": how})
                self.assertEqual(self.cached(), old)

    def test_a_reset_that_running_requests_forbid_becomes_a_salt(self):
        old = self.cached()
        with self.changed("model.layers.0.self_attn.qkv_proj.weight"), self.generating() as tokens:
            tokens.wait_for(3)
            self.assertEqual(self.client.ask({"invalidate": "reset"}), {"invalidated": "salt"})
            new = self.cached()
            self.assertEqual(self.cached(cache_salt="never used before"), new)
            self.assertNotEqual(new, old)

    @contextlib.contextmanager
    def generating(self):
        tokens = Tokens(self)
        try:
            yield tokens
        finally:
            tokens.stop()

    def test_a_hold_stops_the_tokens_and_a_release_lets_them_flow(self):
        with self.generating() as tokens:
            tokens.wait_for(3)
            self.assertEqual(self.client.ask({"hold": 20_000}), {"held": True})
            time.sleep(0.2)  # What was computed before still comes out.
            self.assertEqual(tokens.counted_in(0.7), 0)
            self.assertIn(self.client.ask({"invalidate": "reset"})["invalidated"], ("reset", "salt"))
            self.assertEqual(tokens.counted_in(0.2), 0)
            self.assertEqual(self.client.ask({"release": True}), {"released": True})
            tokens.wait_for(3)

            self.assertEqual(self.client.ask({"hold": 100}), {"held": True})
            tokens.wait_for(3)
            self.assertEqual(self.client.ask({"release": True}), {"released": False})

            self.assertEqual(self.client.ask({"hold": 20_000}), {"held": True})
            self.client.close()
            tokens.wait_for(3)

    def test_an_idle_engine_answers_at_once(self):
        time.sleep(0.3)
        started = time.monotonic()
        self.assertEqual(self.client.ask({"invalidate": "reset"}), {"invalidated": "reset"})
        self.assertEqual(self.client.ask({"hold": 10_000}), {"held": True})
        self.assertEqual(self.client.ask({"release": True}), {"released": True})
        self.assertLess(time.monotonic() - started, 1)

    def test_a_reload_ends_the_lease_and_is_another_epoch(self):
        before = self.fresh()
        self.weights["model.norm.weight"].mul_(-1)
        self.assertNotEqual(self.fresh(), before)
        gone = threading.Thread(target=lambda: (self.client.read(), self.client.close()))
        gone.start()
        self.post("/collective_rpc", {"method": "reload_weights"}).close()
        gone.join(10)
        self.assertFalse(gone.is_alive())
        _, manifest = self.connect()
        self.assertNotEqual(manifest["epoch"], self.manifest["epoch"])
        self.weights = Mapped(manifest)
        self.assertEqual(self.fresh(), before)
        for name in ("model.norm.weight", "model.layers.0.self_attn.qkv_proj.weight", "model.embed_tokens.weight"):
            with self.changed(name):
                self.assertNotEqual(self.fresh(), before, name)


class Tokens:
    """Counts the tokens of completions that are streamed one after the other."""

    def __init__(self, server):
        self.server = server
        self.count = 0
        self.running = True
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        body = {"model": str(MODEL), "prompt": PROMPT[:20], "max_tokens": 200, "ignore_eos": True, "stream": True}
        while self.running:
            with self.server.post("/v1/completions", body) as lines:
                for line in lines:
                    self.count += line.startswith(b"data: {")
                    if not self.running:
                        break

    def counted_in(self, seconds):
        before = self.count
        time.sleep(seconds)
        return self.count - before

    def wait_for(self, number, timeout_s=20):
        before, deadline = self.count, time.monotonic() + timeout_s
        while self.count < before + number:
            self.server.assertLess(time.monotonic(), deadline, "no token came")
            time.sleep(0.005)

    def stop(self):
        self.running = False
        self.thread.join()


if __name__ == "__main__":
    unittest.main()
