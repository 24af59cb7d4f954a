#!/usr/bin/env bash
# All figures of one GPU (H100 or H200) in at most 9 minutes, the most important first.
#
#   OUT=DIR [REF=DIR] [LIMIT=530] bash benchmarks/gpu.sh      from the top of the checkout
#   python -m benchmarks.gpu_stages collect OUT/results.jsonl  then: benchmarks/results/gpu.json
#
# REF   a checkout of the PyTorch reference, to be timed beside ours
# LIMIT seconds in all; a stage that does not fit is recorded as skipped, one that dies as failed
# TINY  1: the smallest model, to rehearse it on a CPU (JAX_PLATFORMS=cpu TINY=1)
#
# Needs Python 3.11 or newer with jax (0.10 or newer) and its CUDA plugin; with REF also torch,
# transformers, safetensors, imageio, tqdm, pillow. The stage "latency" imports the whole policy,
# with orbax-checkpoint and pillow: it fails alone where they are missing.
#
# What else the machine lacks is carried in .whl/, which is installed without a network. Where flax,
# optax, chex, einops, absl-py, numpy and PyYAML are there, these are missing, all pure Python:
#
#   pip download --no-deps --only-binary=:all: -d .whl \
#       ml-collections==1.1.0 ftfy==6.3.1 wcwidth==0.2.13
#
# and where they are not, these as well (msgpack and PyYAML are compiled: for the machine's Python):
#
#   pip download --no-deps --only-binary=:all: -d .whl flax==0.12.8 optax==0.2.8 chex==0.1.92 \
#       einops==0.8.2 absl-py==2.5.1 toolz typing_extensions etils rich pygments markdown-it-py mdurl
set -u
: "${OUT:?directory for the results}"
export OUT TINY=${TINY:-} REF=${REF:-}
PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-530}
mkdir -p "$OUT"

if compgen -G '.whl/*.whl' > /dev/null; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
        .whl/*.whl || exit 1
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
# No other process shares the card. Compilation is measured, except in a rehearsal.
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=.92 JAX_ENABLE_COMPILATION_CACHE=false
if [ "$TINY" = 1 ]; then
    export JAX_ENABLE_COMPILATION_CACHE=true JAX_COMPILATION_CACHE_DIR=$OUT/cache
fi
if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total --format=csv |
        tee "$OUT/card.csv"
fi

run_stage() {  # name, seconds it should take; prints its line
    local left=$((LIMIT - SECONDS)) limit line
    if [ "$left" -lt "$2" ]; then
        echo "{\"stage\": \"$1\", \"skipped\": \"$left s are left of $LIMIT, it needs $2\"}"
        return
    fi
    limit=$((2 * $2 < left && ! ${TINY:-0} ? 2 * $2 : left))
    line=$(timeout -k 5 "$limit" "$PYTHON" -m benchmarks.gpu_stages run "$1" \
        2>> "$OUT/log.txt" < /dev/null | tail -n 1)
    [[ $line == '{'* ]] || line="{\"stage\": \"$1\", \"failed\": \"it printed nothing in $limit s\"}"
    echo "$line"
}

main() {
    local entry
    : > "$OUT/results.jsonl"
    : > "$OUT/log.txt"
    for entry in $("$PYTHON" -m benchmarks.gpu_stages list | tr ' ' :); do
        run_stage "${entry%:*}" "${entry#*:}" | tee -a "$OUT/results.jsonl"
    done
    exit  # nothing is read from this file any more: it may change while it runs
}

main
