"""The benchmark suite: `pytest bench/ --benchmark-only`, `python -m bench.report`, `python -m bench.counts`."""
