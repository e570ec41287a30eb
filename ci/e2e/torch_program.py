"""A small PyTorch program as its author would write it: a transformers model behind HTTP, learning while it serves.

usage: torch_program.py MODEL_DIR SOCKET PORT
"""
import http.server
import json
import sys

import apollod
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Chat(http.server.BaseHTTPRequestHandler):
    """GET /health; POST /v1/chat/completions, greedy."""

    def do_GET(self):
        self.answer({"model": model_dir})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        ids = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=body["max_tokens"], do_sample=False)[0, ids["input_ids"].shape[1]:]
        ended = out[-1].item() == tokenizer.eos_token_id
        text = tokenizer.decode(out, skip_special_tokens=True)
        self.answer({"choices": [{"message": {"content": text}, "finish_reason": "stop" if ended else "length"}]})

    def answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


model_dir, socket, port = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_dir)
with apollod.reading(model_dir):        # no sync may write the files while they are loaded
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    exported = apollod.export(model, socket=socket)
with exported:
    http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Chat).serve_forever()
