"""``vlmtune export``."""

import argparse
from typing import Any

from vlmtune.verbs.options import add_verb


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'export', run_export, 'check what vlmtune convert wrote')
    verb.add_argument(
        '--check', required=True, metavar='DIR', dest='directory', help='load a model or an adapter as others load it'
    )
    verb.add_argument(
        '--trained', nargs=2, metavar=('CONFIG', 'CKPT'), help='compare it with the iter_N.pth that it was made of'
    )


def run_export(arguments: argparse.Namespace) -> int:
    from vlmtune.apps.export.check import check_export

    return check_export(arguments.directory, trained=tuple(arguments.trained) if arguments.trained else None)
