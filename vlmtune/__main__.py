"""``python -m vlmtune`` is the command ``vlmtune``."""

import sys

from vlmtune.cli import main

if __name__ == '__main__':
    sys.exit(main())
