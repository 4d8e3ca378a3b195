"""The parts of scripts/torture.py, which tests/scripts/test_torture.py uses."""
