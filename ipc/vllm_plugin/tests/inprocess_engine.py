"""Run by test_vllm.py: an engine in the caller's own process, which has no thread of its own. usage: SOCKET MODEL"""

import sys
import threading
import time
from pathlib import Path

from client import Client, Mapped
from vllm import LLM, SamplingParams

PROMPT = [7 + 3 * i % 200 for i in range(200)]


def main(socket: str, model: str) -> None:
    llm = LLM(model, enforce_eager=True, dtype="bfloat16", max_model_len=256, max_num_seqs=8)
    sampling = SamplingParams(max_tokens=4, temperature=0, logprobs=0, ignore_eos=True)

    def answer() -> list[float]:
        (output,) = llm.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
        return [next(iter(token.values())).logprob for token in output.outputs[0].logprobs]

    with Client(socket) as client:
        manifest = client.ask({"hello": 1})
        assert manifest["controls"] == ["invalidate", "hold"], manifest["controls"]
        weight = Mapped(manifest)["model.layers.0.self_attn.qkv_proj.weight"]
        for how in ("reset", "salt"):
            old = answer()
            weight.mul_(-1)
            stale = answer()
            assert client.ask({"invalidate": how}) == {"invalidated": how}
            assert answer() not in (old, stale)
            weight.mul_(-1)
            assert client.ask({"invalidate": how}) == {"invalidated": how}
            assert answer() == old

        assert client.ask({"hold": 1000}) == {"held": True}
        started = time.monotonic()
        answer()
        assert time.monotonic() - started > 0.8
        assert client.ask({"release": True}) == {"released": False}

        gone = threading.Thread(target=lambda: (client.read(), client.close()))
        gone.start()
        llm.collective_rpc("reload_weights")
        gone.join()
    with Client(socket) as client:
        assert client.ask({"hello": 1})["epoch"] != manifest["epoch"]
    llm.llm_engine.engine_core.shutdown()
    assert not Path(socket).exists()


if __name__ == "__main__":
    main(*sys.argv[1:])
