#!/usr/bin/env bash
# Everything that is measured on a GPU, with one command: the tests that need one, then the speed of orchd beside
# llama-bench and llama-server of the same build. Arguments go to `python -m benchmarks.gpu`; `--device cpu --quick` tries
# it out without a GPU. Needs `make BACKEND=cuda setup` before, and nothing from a network after that.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[[ -x $python ]] || { echo "gpu.sh: there is no .venv; run: make setup" >&2; exit 2; }

device=gpu:0
previous=
for argument in "$@"; do
  [[ $previous == --device ]] && device=$argument
  [[ $argument == --device=* ]] && device=${argument#--device=}
  previous=$argument
done

if [[ ! -x ${ORCHD_PEER_BIN:-build/peer/bin}/llama-bench ]]; then
  echo "==> Building llama-server and llama-bench of the same llama.cpp"
  PATH="$PWD/.venv/bin:$PATH" cmake --build build --target llama_server
fi

# Models are written once and kept.
export ORCHD_TEST_MODELS=${ORCHD_TEST_MODELS:-$PWD/build/bench/models}
export ORCHD_TEST_DEVICE=$device
export CUDA_DEVICE_ORDER=PCI_BUS_ID

echo "==> Tests on $device"
tests=0
"$python" -m pytest -q -m gpu tests/gpu || tests=$?

echo "==> Speed on $device"
speed=0
"$python" -m benchmarks.gpu "$@" || speed=$?

echo "==> tests: $( ((tests)) && echo failed || echo passed ), goals: $( ((speed)) && echo missed || echo met )"
exit $((tests || speed))
