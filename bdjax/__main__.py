"""`python -m bdjax` is the command line."""

from bdjax.cli import main

if __name__ == "__main__":
    main()
