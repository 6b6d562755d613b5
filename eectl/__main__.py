"""`python -m eectl` and `torchrun -m eectl` are the same program as `eectl`."""

from eectl.cli.app import main

if __name__ == "__main__":
    main()
