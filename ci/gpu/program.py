"""A PyTorch program that serves a transformers model and offers its weights by `apollod.export`, made to be killed often.

usage: program.py --device cuda|cpu|simulated

The first process only imports what the program needs. On each line that it reads, a JSON object of "model" (a directory),
"socket" and "port", it forks one that loads the model and serves it, and prints that one's process id: a start in a second
and not in ten. At the end of the input it ends, and all of them with it. `simulated`: torch computes on the CPU, and the
weights lie where the CUDA driver that is found as libcuda.so.1 says.

HTTP: GET /health; POST /v1/chat/completions, greedy; POST /generate {"ids", "tokens"} -> {"ids", "ms": of each token};
GET /digests -> {tensor: digest}; GET /manifest, for a second process.
"""
import argparse
import ctypes
import http.server
import json
import os
import signal
import sys
import threading
import time

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")     # asking for a GPU must not start CUDA before the fork
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import apollod
from driver import digest

PR_SET_PDEATHSIG = 1
transformers.logging.disable_progress_bar()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu", "simulated"), required=True)
    parser.add_argument("--serve", help="serve this line in this process")
    return parser.parse_args()


class Model:
    """The model, one request at a time."""

    def __init__(self, folder, device):
        self.device = "cuda" if device == "cuda" else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(self.device).eval()
        self.lock = threading.Lock()

    def generate(self, ids, tokens, end=None):
        """Greedy: the tokens, and how many ms each took. Stops after `end`."""
        out, ms, past, step = [], [], None, torch.tensor([ids], device=self.device)
        with self.lock, torch.no_grad():
            while len(out) < tokens and (not out or out[-1] != end):
                start = time.perf_counter()
                answer = self.model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
                past, step = answer.past_key_values, answer.logits[:, -1].argmax(-1, keepdim=True)
                out.append(step.item())
                ms.append(1e3 * (time.perf_counter() - start))
        return out, ms

    def chat(self, messages, tokens):
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        end = self.tokenizer.eos_token_id
        out, _ = self.generate(ids, tokens, end)
        return self.tokenizer.decode(out, skip_special_tokens=True), "stop" if out[-1] == end else "length"

    def digests(self):
        """As the manifest names the tensors: a tied one under each of its names."""
        parameters = self.model.named_parameters(remove_duplicate=False)
        return {name: digest(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()) for name, p in parameters}


class Requests(http.server.BaseHTTPRequestHandler):
    model = manifest = None
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer({"/health": dict, "/digests": self.model.digests, "/manifest": self.manifest}[self.path]())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/generate":
            out, ms = self.model.generate(body["ids"], body["tokens"])
            return self.answer({"ids": out, "ms": ms})
        text, reason = self.model.chat(body["messages"], body["max_tokens"])
        self.answer({"choices": [{"message": {"content": text}, "finish_reason": reason}]})

    def answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def serve(line, device):
    told = json.loads(line)
    if device == "simulated":
        import simulated
        simulated.install()
    with apollod.reading(told["model"]):
        Requests.model = Model(told["model"], device)
        exported = apollod.export(Requests.model.model, socket=told["socket"], model_dir=told["model"])
    with exported:
        Requests.manifest = staticmethod(lambda: exported._server._offer.manifest)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", told["port"]), Requests)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        server.serve_forever()


def child(line, device):
    """The forked process: dies with its parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        if device == "cuda":
            torch.zeros(1, device="cuda")
    except RuntimeError as e:
        # Something that was imported had started CUDA, which does not survive a fork: the slow way, with the same id.
        print(f"not by a fork: {e}", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, __file__, "--device", device, "--serve", line])
    serve(line, device)


def main():
    options = arguments()
    if options.serve:
        return serve(options.serve, options.device)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)     # ended children leave nothing behind
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 0
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                child(line, options.device)
            except SystemExit:
                pass
            except BaseException:
                sys.excepthook(*sys.exc_info())
                status = 1
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
