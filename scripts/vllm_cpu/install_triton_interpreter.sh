#!/usr/bin/env bash
# Put Triton and a CPU backend that only interprets into a directory.   usage: install_triton_interpreter.sh VENV DIRECTORY
# 1 GB. It stays out of vLLM's own environment, where its presence would change what vLLM does: whoever wants model
# runner V2 on CPU says PYTHONPATH=DIRECTORY TRITON_INTERPRET=1. See triton_interpreter/.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:?usage: install_triton_interpreter.sh VENV DIRECTORY}
directory=${2:?usage: install_triton_interpreter.sh VENV DIRECTORY}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp -r "$here/triton_interpreter" "$build/backend"   # an in-place build leaves its droppings in the checkout
"$venv/bin/pip" install -q --no-deps --target "$directory" triton==3.9.0
"$venv/bin/pip" install -q --no-deps --no-build-isolation --target "$directory" "$build/backend"
