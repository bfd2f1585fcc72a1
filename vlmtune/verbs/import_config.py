"""``vlmtune import-config``."""

import argparse
from typing import Any

from vlmtune.verbs.options import add_verb


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'import-config', run_import, 'turn an XTuner config of a LLaVA or InternVL into one of ours')
    verb.add_argument('source', metavar='XTUNER_CONFIG', help='a .py file; it is parsed and never run')
    verb.add_argument('output', metavar='OUT', help='a .py file that does not exist')


def run_import(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.import_config import import_config

    import_config(arguments.source, arguments.output)
