"""``python -m lfm2_export``: the command line, where its script is not on the path or another program has its name."""

import sys

from lfm2_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
