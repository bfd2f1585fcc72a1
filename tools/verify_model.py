"""``vlmtune verify-model``, for those who work in a checkout."""

import sys

from vlmtune.cli import main

if __name__ == '__main__':
    sys.exit(main(['verify-model', *sys.argv[1:]]))
