#!/usr/bin/env bash
# Build arctic-inference, vLLM's suffix decoding, into an environment that has torch.   usage: install_arctic_inference.sh VENV
# PyPI has its source alone, and that asks for another torch: so it is built with the environment's own, and with build
# tools that stay out of it. Half a minute with a C++ compiler. Without one nothing is installed, and that is said.
set -euo pipefail
venv=${1:?usage: install_arctic_inference.sh VENV}
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
without() { echo "arctic-inference is not installed in $venv ($1): tests of suffix decoding against it will be skipped" >&2; exit 0; }

command -v "${CXX:-c++}" > /dev/null || without "no C++ compiler: ${CXX:-c++}"
headers=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$headers/Python.h" ] || without "no $headers/Python.h: this Python came without its headers"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
pip install -q --no-warn-conflicts --target "$build/tools" cmake nanobind==2.9.2 wheel setuptools==78.1.1 grpcio-tools
PYTHONPATH="$build/tools" PATH="$build/tools/bin:$PATH" \
  pip wheel -q --no-deps --no-build-isolation --wheel-dir "$build" arctic-inference==0.1.1 || without "see the error above"
pip install -q --no-deps "$build"/arctic_inference-*.whl
