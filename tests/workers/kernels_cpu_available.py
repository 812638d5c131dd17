"""Print whether the C++ norm and convolutions are available here, then the OpenMP libraries that the process has."""

from __future__ import annotations

from pathlib import Path

import torch

from fastres_kernels.cpu import batchnorm, convolution


def main() -> None:
    print(*batchnorm.available())
    print(*convolution.available(torch.bfloat16))
    lines = Path("/proc/self/maps").read_text().splitlines()
    print(*{line.split()[-1] for line in lines if "omp" in line.split("/")[-1]})


if __name__ == "__main__":
    main()
