"""Model FLOPs utilisation (MFU): model FLOPs per second of a rank, over the peak of its card (Chowdhery et al. 2022,
"PaLM", arXiv:2204.02311, appendix B). What a step's model FLOPs are is said in `nn.flops`."""

from __future__ import annotations

import torch

TERA = 1e12

PEAK_TFLOPS = {
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H200": 989.4,
    "NVIDIA L40S": 362.05,
}
"""Name, as `torch.cuda.get_device_name` gives it -> dense bf16 TFLOP/s of the tensor cores, with fp32 sums. From the
data sheets of NVIDIA (A100, H100, H200, L40S, HGX B200; figures with sparsity are halved) and, of the RTX 4090, from
appendix A of the Ada whitepaper. A name that is not here has no peak: parts of a card (MIG) and variants have less."""


def peak_flop_per_s(device: torch.device, dtype: torch.dtype, peak_tflops: float | None = None) -> float | None:
    """Returns the peak of a card: what was said, or of a known card in bf16; None where it is not known.

    `dtype`: of the products. Those of fp32 have other peaks, which only `peak_tflops` says.
    """
    if peak_tflops is not None:
        return peak_tflops * TERA
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    known = PEAK_TFLOPS.get(torch.cuda.get_device_name(device))
    return None if known is None else known * TERA
