"""`python -m flowtrain` is the `flowtrain` command."""

from flowtrain.cli.train import main

if __name__ == "__main__":
    main()
