"""`python -m flowtrain` is the `flowtrain` command."""

from flowtrain.cli.start import flowtrain

if __name__ == "__main__":
    flowtrain()
