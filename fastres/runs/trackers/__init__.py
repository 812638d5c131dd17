"""Trackers: services that show a run's metrics beside its own files."""
