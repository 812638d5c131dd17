"""Import modules and print the changes as JSON: `python -m tests.workers.import_everything MODULE...`.

The result maps each environment variable and each switch of torch that changed to [before, after].
"""

from __future__ import annotations

import importlib
import json
import os
import sys

import torch
import torch._dynamo.config


def switches() -> dict[str, object]:
    """Return the process-wide settings that an import must not change."""
    return {
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "fill_uninitialized_memory": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "default dtype": str(torch.get_default_dtype()),
        "number of threads": torch.get_num_threads(),
        "dynamo.optimize_ddp": torch._dynamo.config.optimize_ddp,
        "dynamo.recompile_limit": torch._dynamo.config.recompile_limit,
        **{f"${name}": value for name, value in os.environ.items()},
    }


def main(modules: list[str]) -> None:
    """Import the modules one after another and print the changed settings."""
    before = switches()
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != "trackio":  # a tracker's package, which is not among the tools for development
                raise
    after = switches()
    names = sorted(before.keys() | after.keys())
    changed = {n: [before.get(n), after.get(n)] for n in names if before.get(n) != after.get(n)}
    print(json.dumps(changed))


if __name__ == "__main__":
    main(sys.argv[1:])
