"""Invertible maps between base and data, each with its log-determinant."""
