"""`python -m flowtrain` is the `flowtrain` command."""

from flowtrain.cli.entry_points import flowtrain

if __name__ == "__main__":
    flowtrain()
