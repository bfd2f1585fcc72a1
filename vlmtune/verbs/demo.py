"""``vlmtune demo``."""

import argparse
from typing import Any

from vlmtune.verbs.options import add_verb, given, port, positive


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'demo', run_demo, 'talk with a model about pictures in a browser')
    verb.add_argument('model', metavar='MODEL', help='a folder or a hub id; of an adapter: its base and the adapter')
    verb.add_argument('--adapter', metavar='A', help='a PEFT adapter on top of MODEL')
    verb.add_argument(
        '--compare',
        nargs='?',
        const='',
        metavar='BASE',
        help="show another model's or adapter's answers beside; without BASE those of the adapter's base, loaded once",
    )
    verb.add_argument('--examples', metavar='DIR', help='pictures and questions to click: DIR/*.png, DIR/prompts.txt')
    verb.add_argument('--system', metavar='S', default='', help='system message; can be changed on the page')
    verb.add_argument('--max-new-tokens', type=positive, default=512, metavar='N')
    verb.add_argument('--bits', type=int, choices=(4, 8), help='load quantised')
    verb.add_argument('--host', default='127.0.0.1', metavar='H', help='address to listen on (127.0.0.1)')
    verb.add_argument('--port', type=port, default=7860, metavar='P', help='7860; 0: any that is free')


def run_demo(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.demo import demo

    demo(**given(arguments))
