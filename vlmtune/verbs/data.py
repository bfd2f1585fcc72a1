"""``vlmtune check-data`` and ``vlmtune browse-data``."""

import argparse
from typing import Any

from vlmtune.verbs.options import add_overrides, add_verb, given, positive


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'check-data', run_check_data, 'check every row and image of the training data')
    verb.add_argument('config', metavar='CONFIG', help='a .py file, or the name of a built-in config')
    verb.add_argument('--json', action='store_true', dest='as_json', help='print one JSON document, not tables')
    verb.add_argument('--decode', action='store_true', help='decode every pixel of every image')
    add_overrides(verb)
    verb = add_verb(verbs, 'browse-data', run_browse_data, 'look at samples as the model gets them')
    verb.add_argument('config', metavar='CONFIG', help='a .py file, or the name of a built-in config')
    target = verb.add_mutually_exclusive_group(required=True)
    target.add_argument('--out', metavar='PAGE', help='write an HTML page that needs nothing else')
    target.add_argument('--text', action='store_true', help='print to the terminal')
    verb.add_argument('-n', '--count', type=positive, default=20, metavar='N', help='how many samples (20)')
    verb.add_argument('--indices', type=int, nargs='+', metavar='I', help='these samples instead of chosen ones')
    add_overrides(verb)


def run_check_data(arguments: argparse.Namespace) -> int:
    from vlmtune.apps.data.check_data import check_data
    from vlmtune.config import parse_cfg_options

    overrides = parse_cfg_options(arguments.cfg_options)
    return check_data(**given(arguments, 'cfg_options'), overrides=overrides)


def run_browse_data(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.data.browse_data import browse_data
    from vlmtune.config import parse_cfg_options

    overrides = parse_cfg_options(arguments.cfg_options)
    browse_data(**given(arguments, 'cfg_options', 'text'), overrides=overrides)
