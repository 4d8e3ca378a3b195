"""Parts of scripts/torture.py, which tests/scripts/test_torture.py also uses."""
