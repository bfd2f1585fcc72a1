"""``vlmtune chat``."""

import argparse
from typing import Any

from vlmtune.verbs.options import add_verb, positive


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'chat', run_chat, 'talk with a model about images')
    verb.add_argument('model', metavar='MODEL')
    verb.add_argument('--adapter', metavar='A', help='a PEFT adapter on top of MODEL')
    verb.add_argument('--image', nargs='+', action='extend', default=[], dest='images', metavar='FILE')
    verb.add_argument('--prompt', metavar='TEXT', help='answer this and stop; without it, a conversation')
    verb.add_argument('--system', metavar='S')
    verb.add_argument(
        '--example',
        nargs=3,
        action='append',
        default=[],
        dest='examples',
        metavar=('IMAGE', 'QUESTION', 'ANSWER'),
        help="show an answered turn first; '@FILE' is the text in FILE, QUESTION '' that of --prompt; may be repeated",
    )
    verb.add_argument('--max-new-tokens', type=positive, default=512, metavar='N')
    verb.add_argument('--temperature', type=float, default=0.0, metavar='T', help='0 (the default) is greedy')
    verb.add_argument('--top-p', type=float, default=1.0, metavar='P')
    verb.add_argument('--top-k', type=int, default=0, metavar='K', help='0 (the default) is no limit')
    verb.add_argument('--seed', type=int, metavar='N')
    verb.add_argument('--bits', type=int, choices=(4, 8), help='load quantised')
    verb.add_argument('--boxes', action='store_true', help='print the boxes of an answer in pixels of the image')
    verb.add_argument('--draw-boxes', metavar='FILE', help='draw the boxes of an answer on the image, into FILE')


def run_chat(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.chat import chat

    names = ['adapter', 'images', 'prompt', 'system', 'examples', 'max_new_tokens', 'temperature', 'top_p', 'top_k']
    names += ['seed', 'bits', 'boxes', 'draw_boxes']
    chat(arguments.model, **{name: getattr(arguments, name) for name in names})
