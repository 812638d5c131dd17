"""Run a command and print what it imported: `python -m tests.workers.imported MODULE ARGUMENTS...`.

The last line on stdout is JSON: the exit status and the names of the imported modules.
"""

from __future__ import annotations

import json
import runpy
import sys


def main() -> None:
    """Run the module as `python -m` does, and print the status and the modules."""
    module, *sys.argv[1:] = sys.argv[1:]
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    print("\n" + json.dumps({"status": status, "modules": sorted(sys.modules)}))


if __name__ == "__main__":
    main()
