"""``vlmtune check-data``, for those who work in a checkout."""

import sys

from vlmtune.cli import main

if __name__ == '__main__':
    sys.exit(main(['check-data', *sys.argv[1:]]))
