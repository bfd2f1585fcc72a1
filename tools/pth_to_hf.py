"""``vlmtune convert pth_to_hf``, for those who work in a checkout."""

import sys

from vlmtune.cli import main

if __name__ == '__main__':
    sys.exit(main(['convert', 'pth_to_hf', *sys.argv[1:]]))
