#!/usr/bin/env python3
"""llama.cpp's HTTP server on one GGUF file, in this process.

usage: llama_server.py MODEL.gguf --port PORT [--host 127.0.0.1] [--ctx 512] [--threads 2] [--no-cache-prompt]

The package xllamacpp brings llama.cpp's own server (the code of `llama-server`) as a wheel, so nothing is compiled. The
file is mapped, which is llama.cpp's default: what somebody writes into it is served. Prints {"listening": URL} and runs
until SIGTERM or SIGINT.
"""

import argparse
import json
import signal
import threading

import xllamacpp


def parameters(options):
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames = [options.host]
    params.port = options.port
    params.n_ctx = options.ctx
    params.n_parallel = 1
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.cache_prompt = options.cache_prompt
    # No copies of earlier prompts' keys and values beside those of the last one.
    params.cache_ram_mib = 0
    params.warmup = False
    params.fit_params = False
    params.use_jinja = True
    return params


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ctx", type=int, default=512, help="tokens of context")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-cache-prompt", dest="cache_prompt", action="store_false",
                        help="compute every prompt anew: keys and values of older weights are never used again")
    options = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server = xllamacpp.Server(parameters(options))
    print(json.dumps({"listening": server.listening_address}), flush=True)
    ended.wait()


if __name__ == "__main__":
    main()
