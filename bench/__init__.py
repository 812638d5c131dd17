"""The benchmark suite: `pytest bench/ --benchmark-only`, `python -m bench.report`, `python -m bench.counts`."""

import fastres as fastres  # first, because a signal is to end a command in one line from here on
