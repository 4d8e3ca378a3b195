"""Runs the command `flowtrain` for `python -m flowtrain`."""

from flowtrain.cli.entry_points import flowtrain

if __name__ == "__main__":
    flowtrain()
