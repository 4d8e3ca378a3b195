"""Builds, loads, trains and summarizes runs from plain configs. Does not import Hydra."""
