"""`python -m worldline` is the `worldline` command."""

import sys

from worldline.cli import main

if __name__ == "__main__":
    sys.exit(main())
