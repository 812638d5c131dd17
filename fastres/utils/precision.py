"""The precisions by name, and the test whether a device computes faster in bf16 than in fp32."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def is_faster_in_bf16(device: torch.device) -> tuple[bool, str]:
    """Return True if the device computes faster in bf16 than in fp32, and the reason in words.

    avx512_bf16 multiplies twice as fast as fp32 on AMD's CPUs. On an Intel Xeon (family 6, model 207) it has half of
    fp32's rate, and three networks trained 1.2 to 1.4 times as fast in fp32: docs/EXPERIMENTS.md.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"compute capability {major}.{minor}"
        return (True, name) if major >= 8 else (False, f"{name} is below 8.0, the first with bf16")
    if torch.cpu._is_amx_tile_supported():
        return True, "the CPU has AMX"
    if not torch.cpu._is_avx512_bf16_supported():
        return False, "the CPU has neither avx512_bf16 nor AMX"
    if _is_intels():
        return False, "the CPU has no AMX, and Intel's avx512_bf16 is slower than fp32"
    return True, "the CPU has avx512_bf16"


def _is_intels() -> bool:
    """Return True if Intel made this machine's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else platform.processor()
    return "GenuineIntel" in text
