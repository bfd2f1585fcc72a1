"""``vlmtune verify-model``."""

import argparse
from typing import Any

from vlmtune.verbs.options import add_device, add_verb, given


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'verify-model', run_verify_model, 'load a checkpoint strictly and print what it answers')
    verb.add_argument('path', metavar='PATH', help='a folder or a hub id, in any layout that is known')
    verb.add_argument(
        '--dtype', choices=('float32', 'bfloat16', 'float16', 'auto'), default='float32', help='to compute in (float32)'
    )
    add_device(verb)
    verb.add_argument(
        '--json', action='store_const', const='json', default='text', dest='output', help='print one JSON document'
    )


def run_verify_model(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.export.verify_model import verify_model

    verify_model(**given(arguments))
