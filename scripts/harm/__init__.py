"""The parts of scripts/torture.py, which tests/test_fuzz.py draws on too."""
