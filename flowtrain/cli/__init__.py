"""The commands: Hydra composition, overrides and help. The only part that imports Hydra."""
