"""`python -m danceopd.cli`, as `python -m danceopd`."""

import sys

from danceopd.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
