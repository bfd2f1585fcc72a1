"""``vlmtune push``."""

import argparse
from typing import Any

from vlmtune.verbs.options import add_verb


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'push', run_push, 'upload an export to the Hugging Face hub or to ModelScope')
    verb.add_argument('directory', metavar='DIR', help='a model or an adapter that vlmtune convert wrote')
    verb.add_argument('repository', metavar='REPO', help='org/name; made if it is not there')
    verb.add_argument('--private', action='store_true', help='only you can see it')
    verb.add_argument('--to', choices=('hub', 'modelscope'), default='hub', help='where (hub, or its HF_ENDPOINT)')


def run_push(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.export.push import push

    push(arguments.directory, arguments.repository, private=arguments.private, to=arguments.to)
