"""What a fresh transformers run computes, in float32: a line of JSON in, a line of JSON out.

A request is {"model": DIR, "prompts": [[ids], …], "continue_by": n}; the files are read anew for each. For n = 0 the
answer has for each prompt the log-probabilities of ids[1..], each given the ids before it; otherwise its greedy
continuation by n tokens: [ids, log-probability of each].
"""
import json
import sys

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def logprobs(model, ids):
    """(length, vocabulary)"""
    return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)


def of_prompt(model, ids):
    return logprobs(model, ids)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()


def continuation(model, ids, count):
    new, values = [], []
    for _ in range(count):
        value, token = logprobs(model, ids + new)[-1].max(0)
        new.append(token.item())
        values.append(value.item())
    return new, values


for line in sys.stdin:
    request = json.loads(line)
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    count = request["continue_by"]
    answer = [continuation(model, ids, count) if count else of_prompt(model, ids) for ids in request["prompts"]]
    print(json.dumps(answer), flush=True)
