"""The PyTorch program (program.py) and apollod beside it, as the parts use them."""
import json
import os
import pathlib
import signal
import subprocess
import sys

from report import ROOT, Broken, Failed

from daemon import Daemon
from harness import free_port, http, require, stat_of, tail, wait_until

HERE = pathlib.Path(__file__).resolve().parent
ANSWER_TOKENS_MAX = 64
START_LIMIT_S = 120


class Nursery:
    """program.py, from which programs are forked."""

    def __init__(self, options):
        self.log = options.work / "programs.log"
        # The plugin as it lies in the tree or in the folder that was carried here.
        path = os.pathsep.join(filter(None, [str(ROOT / "ipc/vllm_plugin/src"), os.environ.get("PYTHONPATH")]))
        # Memory from the virtual-memory functions has no handle.
        env = dict(os.environ, PYTHONPATH=path, HF_HUB_OFFLINE="1", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:False")
        self.process = subprocess.Popen([sys.executable, HERE / "program.py", "--device", options.device],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"),
                                        text=True, env=env)

    def start(self, **told):
        """Process id of a new program."""
        print(json.dumps(told), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise Broken(f"no program starts:\n{tail(self.log)}")
        return int(line)

    def stop(self):
        """Ends it and every program."""
        self.process.stdin.close()
        self.process.wait(20)


class Program:
    """A program that serves and offers a model; `start` and `kill` it as often as you like."""

    def __init__(self, nursery, model, folder):
        self.nursery, self.model, self.socket, self.log = nursery, model, folder / "weights.sock", nursery.log
        self.port, self.pid = free_port(), None
        self.base = f"http://127.0.0.1:{self.port}"

    def start(self):
        """Start a process. `wait_ready` waits for it."""
        self.pid = self.nursery.start(model=str(self.model), socket=str(self.socket), port=self.port)

    def wait_ready(self):
        def answers():
            require(stat_of(self.pid), f"the program ended:\n{tail(self.log)}")
            try:
                return http(f"{self.base}/health", limit_s=5)[0] == 200
            except OSError:
                return False
        wait_until("the program serves", answers, START_LIMIT_S, 0.05)

    def kill(self):
        pid, self.pid = self.pid, None
        os.kill(pid, signal.SIGKILL)
        wait_until("the killed program is gone", lambda: not stat_of(pid), 20, 0.01)

    def check_same_process(self):
        require(stat_of(self.pid), f"the program ended:\n{tail(self.log)}")

    def get(self, path):
        status, body = http(self.base + path)
        require(status == 200, f"GET {path} answered {status}: {str(body)[:300]}")
        return body

    def ask(self, question):
        """(greedy answer, why it ended)."""
        body = dict(messages=[{"role": "user", "content": question}], max_tokens=ANSWER_TOKENS_MAX)
        status, answer = http(f"{self.base}/v1/chat/completions", body)
        require(status == 200, f"the program answered {status}: {str(answer)[:300]}")
        choice = answer["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]

    def generate(self, ids, tokens):
        """(token ids, ms of each)."""
        status, answer = http(f"{self.base}/generate", dict(ids=ids, tokens=tokens))
        require(status == 200, f"the program answered {status}: {str(answer)[:300]}")
        return answer["ids"], answer["ms"]

    def stop(self):
        if self.pid and stat_of(self.pid):
            self.kill()


def daemon(options, folder, program, **sections):
    """apollod beside a program, training on the chosen device."""
    folder.mkdir(parents=True, exist_ok=True)
    started = Daemon(options, folder, program.model, {"socket": str(program.socket)}, **sections)
    try:
        started.wait_attached()
    except Failed:
        print(tail(started.log, 40), flush=True)
        raise
    return started


def gpu_memory_mb():
    """Memory in use on the first GPU, as nvidia-smi says; Broken where there is none."""
    try:
        text = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=20, check=True).stdout
        return int(text.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as e:
        raise Broken(f"nvidia-smi does not say how much memory is in use: {e}") from e


def second_process(manifest):
    """{tensor: digest} as another process sees it that opens the same handles."""
    done = subprocess.run([sys.executable, HERE / "second_process.py"], input=json.dumps(manifest), text=True,
                          capture_output=True, timeout=60)
    require(done.returncode == 0, f"the second process failed:\n{done.stderr[-1500:]}")
    return json.loads(done.stdout)
