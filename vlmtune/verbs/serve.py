"""``vlmtune serve``."""

import argparse
from typing import Any

from vlmtune.verbs.options import add_verb, given, port, positive


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'serve', run_serve, 'check an export and serve it with an OpenAI-compatible API')
    verb.add_argument('directory', metavar='DIR', help='a model that vlmtune convert wrote')
    verb.add_argument('--engine', choices=('transformers', 'vllm'), default='transformers', help='(transformers)')
    verb.add_argument('--host', default='127.0.0.1', metavar='H', help='to listen on (127.0.0.1: this machine only)')
    verb.add_argument('--port', type=port, default=8000, metavar='N', help='to listen on (8000)')
    verb.add_argument('--config', metavar='CONFIG', help='of the run: vLLM gets the limits of its longest sample')
    verb.add_argument('--max-new-tokens', type=positive, default=512, metavar='N', help='room for an answer (512)')
    verb.add_argument('--no-check', action='store_false', dest='check', help='do not look at the export first')
    verb.add_argument('--print', action='store_true', dest='show', help='print the command, start nothing')
    verb.add_argument(
        '--engine-options',
        nargs=argparse.REMAINDER,
        default=[],
        dest='options',
        metavar='...',
        help='more options of the server, as they are; comes last',
    )


def run_serve(arguments: argparse.Namespace) -> int:
    from vlmtune.apps.serve import serve

    return serve(**given(arguments))
