"""Two-dimensional toy densities that are known exactly."""
