"""`python -m speculators` is the `speculators` command."""

import sys

from speculators.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
