"""The inference servers, each started as its users start it."""
import json
import pathlib

from harness import Failed, Process, free_port, http, require, stat_of

START_LIMIT_S = 300
ANSWER_TOKENS_MAX = 64


class Server(Process):
    """An OpenAI-compatible server of one model."""

    health = "/health"

    def __init__(self, name, command, log, model, port, env=None):
        self.model, self.base = model, f"http://127.0.0.1:{port}"
        super().__init__(name, command, log, env=dict(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", **(env or {})))
        self.wait_ready(lambda: http(f"{self.base}{self.health}")[0] == 200, START_LIMIT_S)
        self.start_time = stat_of(self.pid)[1]

    def check_same_process(self):
        self.check()
        require(stat_of(self.pid)[1] == self.start_time, f"{self.name}: process {self.pid} is another one now")

    def post(self, path, body, raw=False):
        status, answer = http(f"{self.base}{path}", body, raw=raw)
        require(status == 200, f"{self.name}: POST {path} answered {status}: {str(answer)[:500]}")
        return answer

    def ask(self, question, stream=False):
        """(greedy answer, why it ended)."""
        body = dict(model=self.model, messages=[{"role": "user", "content": question}], temperature=0,
                    max_tokens=ANSWER_TOKENS_MAX, stream=stream)
        text = self.post("/v1/chat/completions", body, raw=True)
        if not stream:
            choice = json.loads(text)["choices"][0]
            return choice["message"].get("content") or "", choice["finish_reason"]
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        ends = [c["finish_reason"] for c in choices if c.get("finish_reason")]
        return "".join(c["delta"].get("content") or "" for c in choices), ends[-1] if ends else None


class TransformersServe(Server):
    """`transformers serve`, which maps the safetensors files of its model directory."""

    def __init__(self, venv, model, log):
        # Naming the model at the start loads it before the port answers, keeps it loaded (no idle timeout), and fixes
        # the only name that requests may use: this path. --dtype auto takes the files' type; any other would copy.
        port = free_port()
        command = [venv / "bin" / "transformers", "serve", model, "--host", "127.0.0.1", "--port", port,
                   "--device", "cpu", "--dtype", "auto"]
        super().__init__("transformers serve", command, log, str(model), port)

    def check_maps(self):
        """The weights are views of the files only if the process has mapped every one of them."""
        maps = pathlib.Path(f"/proc/{self.pid}/maps").read_text()
        missing = [f.name for f in sorted(pathlib.Path(self.model).glob("*.safetensors")) if str(f) not in maps]
        require(not missing, f"{self.name}: does not map {', '.join(missing)}, so writing there cannot change it")


class Vllm(Server):
    """`vllm serve` on the CPU with the plugin `apollod`, which offers the weights on a Unix socket."""

    def __init__(self, venv, model, log, socket, *flags, port=None):
        port = port or free_port()
        # One process of the engine instead of two starts sooner: importing vLLM takes 25 s in each.
        command = [venv / "bin" / "vllm", "serve", model, "--host", "127.0.0.1", "--port", port, "--dtype", "bfloat16",
                   "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8",
                   "--distributed-executor-backend", "uni", *flags]
        # The CPU backend's own settings: memory of the cache in GiB; no pinning of threads to cores.
        env = dict(APOLLOD_SOCKET=str(socket), VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
                   VLLM_NO_USAGE_STATS="1")
        super().__init__("vllm", command, log, str(model), port, env)

    def complete(self, prompt, tokens=1):
        """The greedy continuation of a prompt given as token ids: [ids, log-probability of each]."""
        body = dict(model=self.model, prompt=prompt, temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True,
                    return_tokens_as_token_ids=True)
        found = self.post("/v1/completions", body)["choices"][0]["logprobs"]
        return [int(token.removeprefix("token_id:")) for token in found["tokens"]], found["token_logprobs"]

    def prompt_logprobs(self, prompt):
        """Log-probabilities of prompt[1..], each given the tokens before it. Such a request reads no cached prefix."""
        body = dict(model=self.model, prompt=prompt, temperature=0, max_tokens=1, prompt_logprobs=0)
        rows = self.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return [row[str(token)]["logprob"] for token, row in zip(prompt[1:], rows[1:])]


class LlamaCpp(Server):
    """llama.cpp's own server on one GGUF file, which it maps. Prompts are computed anew, so no answer comes from keys and
    values of older weights."""

    def __init__(self, venv, gguf, log, port=None):
        port, self.gguf = port or free_port(), gguf
        script = pathlib.Path(__file__).parent.parent / "llama_server.py"
        command = [venv / "bin" / "python", script, gguf, "--port", port, "--no-cache-prompt"]
        super().__init__("llama.cpp", command, log, gguf.stem, port)

    def check_maps(self):
        maps = pathlib.Path(f"/proc/{self.pid}/maps").read_text()
        require(str(self.gguf) in maps, f"{self.name}: does not map {self.gguf}, so writing there cannot change it")


class TorchProgram(Server):
    """A PyTorch program of our own that offers its model with `apollod.export`."""

    def __init__(self, venv, model, log, socket):
        port = free_port()
        script = pathlib.Path(__file__).parent / "torch_program.py"
        super().__init__("torch program", [venv / "bin" / "python", script, model, socket, port], log, str(model), port)
