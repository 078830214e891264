"""The checks of `pneumofed site preflight`, one module a kind."""
