"""Flows whose density is known. Checkpoints build them by name (trust=[analytic])."""
