"""``vlmtune test``, for those who work in a checkout."""

import sys

from vlmtune.cli import main

if __name__ == '__main__':
    sys.exit(main(['test', *sys.argv[1:]]))
