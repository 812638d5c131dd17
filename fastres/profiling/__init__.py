"""The parts of `python -m fastres.profile`: variants.py, measure.py, trace.py and report.py."""
