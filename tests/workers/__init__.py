"""Programs that tests run in other processes, as `python -m tests.workers.NAME`."""
