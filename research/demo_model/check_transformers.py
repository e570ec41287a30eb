"""Loads model/ with transformers and compares its greedy answers with results.json's samples.

usage: check_transformers.py DIR   (DIR holds model/ and results.json; needs torch and transformers)
"""

import json
import pathlib
import sys

import torch
import transformers

root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
torch.set_num_threads(1)
tokenizer = transformers.AutoTokenizer.from_pretrained(root / "model")
model = transformers.AutoModelForCausalLM.from_pretrained(root / "model", dtype="auto")
print("transformers", transformers.__version__, type(model).__name__, type(tokenizer).__name__, model.dtype)

samples = json.loads((root / "results.json").read_text())["samples"]
wrong = 0
for question, wanted in samples.items():
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=40)
    new = output[0, inputs["input_ids"].shape[1] :]
    said = tokenizer.decode(new, skip_special_tokens=True)
    stopped = new[-1].item() == model.generation_config.eos_token_id
    if said != wanted or not stopped:
        wrong += 1
        print(f"{question}\n  want {wanted}\n  got  {said} (stopped: {stopped})")

messages = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
]
rendered = tokenizer.apply_chat_template(messages, tokenize=False)
assert rendered == (
    "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello!<|im_end|>\n"
), rendered
print(f"{len(samples) - wrong} of {len(samples)} answers equal")
sys.exit(wrong > 0)
