"""The same work on NVFlare's simulator, a plain Flower app, a bare PyTorch loop and pneumofed: `python -m benchmarks.peers`."""
