"""The parts of `fastres profile`: variants.py, measure.py, trace.py, report.py; limits.py and verdict.py."""
