"""The parts of fastres.fuse: tracing a forward, finding its patterns, and modules that compute them in one operation."""
