# Short names for what is done often; .ci/run is what must pass.
default:
    @just --list
# the main job, end to end
demo:
    cargo run --release -- demo
# all tests
test:
    cargo test --workspace
# what has to hold before a change lands
ci:
    .ci/run
# one training step by phase, beside the machine's floor
bench shape="qwen3-0.6b":
    cargo run --release -- bench step --shape {{shape}} --context 512 --decision 32 --rank 256 --dtype bf16 --steps 5
# the same beside PyTorch + apollo-torch, in turn; needs a quiet machine and, for PyTorch, some minutes and 1.8 GB
bench-peer out="target/bench-peer" *args:
    cargo build --release --locked
    research/peer/bench.py --apollod target/release/apollod --out {{out}} {{args}}
# look for inputs that break what is read from outside, so many seconds for each target
fuzz seconds="120":
    ci/fuzz.py --seconds {{seconds}}
# kill the daemon and its trainer again and again; nothing may be lost and no file torn
soak kills="500":
    cargo build --release --locked
    python3 ci/soak.py target/release/apollod --kills {{kills}}
# licences and advisories of the dependencies
deny:
    cargo deny check
# what a machine with a GPU and without Rust needs, in one folder; there: FOLDER/ci/gpu.sh --out DIR
gpu-build folder="target/gpu":
    ci/gpu_build.py {{folder}}
# the PTX of the kernels, made anew
kernels:
    ci/kernels.py --write
# bugs planted in the checkpoint protocol, and which tests notice each
mutants *args:
    ci/mutants.py {{args}}
