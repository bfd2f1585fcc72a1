"""``vlmtune doctor``."""

import argparse
from typing import Any

from vlmtune.verbs.options import add_verb


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'doctor', run_doctor, 'print versions, devices, usable parts, and what is known to go wrong')
    verb.add_argument('--json', action='store_true', dest='as_json', help='print one JSON document')


def run_doctor(arguments: argparse.Namespace) -> int:
    from vlmtune.apps.doctor import doctor

    return doctor(as_json=arguments.as_json)
