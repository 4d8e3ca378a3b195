"""From a plain config to a result: build, load, run. Imports no Hydra."""
