"""`python -m polarity`."""

import sys

from polarity.cli import main

if __name__ == "__main__":
    sys.exit(main())
