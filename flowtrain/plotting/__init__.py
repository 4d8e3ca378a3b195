"""Figures of flows, runs and evaluations."""
