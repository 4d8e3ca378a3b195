"""Builds, loads, trains and summarizes runs from plain configs. This package does not import Hydra."""
