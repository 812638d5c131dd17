"""One thread, here and in every process that a test starts: bitwise equal sums need an equal number of threads."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
