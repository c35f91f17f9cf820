"""Print the requirements of a vLLM wheel that a CPU-only text environment needs.   usage: cpu_requirements.py WHEEL"""

import email
import sys
import zipfile

from packaging.requirements import Requirement

CUDA_ONLY = {"torchvision", "torchaudio", "torchcodec"}
# torch is pinned by us; the wheel of xgrammar asks for triton, which CPU does not need.
INSTALLED_APART = {"torch", "xgrammar"}

with zipfile.ZipFile(sys.argv[1]) as wheel:
    metadata_name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(metadata_name))

for line in metadata.get_all("Requires-Dist") or []:
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        continue
    if requirement.name.lower() not in CUDA_ONLY | INSTALLED_APART:
        requirement.marker = None
        print(requirement)
