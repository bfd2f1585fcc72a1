"""How lines of the log look, on the terminal and in files."""

import logging

LINE = logging.Formatter('%(asctime)s - vlmtune - %(levelname)s - %(message)s', '%m/%d %H:%M:%S')
