"""python -m danceopd: the same as `danceopd`."""

import sys

from danceopd.cli import main

if __name__ == "__main__":
    sys.exit(main())
