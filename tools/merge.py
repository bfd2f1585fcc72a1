"""``vlmtune convert merge``, for those who work in a checkout."""

import sys

from vlmtune.cli import main

if __name__ == '__main__':
    sys.exit(main(['convert', 'merge', *sys.argv[1:]]))
