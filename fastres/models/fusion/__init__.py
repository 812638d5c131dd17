"""The parts of fastres.fuse: tracing forwards, finding patterns, and the modules that compute a pattern at once."""
