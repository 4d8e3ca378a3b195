"""Networks that say how a coupling scales and shifts."""
