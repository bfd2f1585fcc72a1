"""``vlmtune chat``, for those who work in a checkout."""

import sys

from vlmtune.cli import main

if __name__ == '__main__':
    sys.exit(main(['chat', *sys.argv[1:]]))
