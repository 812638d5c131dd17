"""Print whether the C++ kernels are available here and why, then the OpenMP libraries that the process has loaded."""

from __future__ import annotations

from pathlib import Path

from fastres_kernels.cpu import ops


def main() -> None:
    print(*ops.available())
    lines = Path("/proc/self/maps").read_text().splitlines()
    print(*{line.split()[-1] for line in lines if "omp" in line.split("/")[-1]})


if __name__ == "__main__":
    main()
