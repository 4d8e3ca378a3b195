"""Flows with known answers, built from checkpoints by name (trust=[analytic])."""
