"""The precisions by name, and the test whether a device computes in bf16."""

from __future__ import annotations

import torch

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def computes_in_bf16(device: torch.device) -> tuple[bool, str]:
    """Return True if the device computes in bf16 rather than emulating it, and the reason in words."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"compute capability {major}.{minor}"
        return (True, name) if major >= 8 else (False, f"{name} is below 8.0, the first with bf16")
    if torch.cpu._is_amx_tile_supported():
        return True, "the CPU has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return True, "the CPU has avx512_bf16"
    return False, "the CPU has neither avx512_bf16 nor AMX"
