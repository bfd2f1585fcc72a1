"""``vlmtune chat``."""

import argparse
from typing import Any

from vlmtune.utils.errors import ConfigError
from vlmtune.verbs.options import add_verb, given, positive, seed

_LEFT_OUT = {
    'lagent': 'lagent agents answer without the images of this chat; serve the model (`vlmtune serve`), which lagent '
    'and other agent frameworks can call',
    'with_plugins': 'the plugins belong to the MOSS models, which are not among the families here, and run what the '
    'model writes',
}


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'chat', run_chat, 'talk with a model about images')
    verb.add_argument('model', metavar='MODEL', help='a folder or a hub id; that of an adapter brings its base along')
    verb.add_argument('--adapter', metavar='A', help='a PEFT adapter on top of MODEL')
    verb.add_argument('--llava', metavar='DIR', help='a LLaVA folder of XTuner (projector, ...); MODEL is then its LLM')
    verb.add_argument('--visual-encoder', metavar='V', help='of --llava, where its folder holds none')
    verb.add_argument('--visual-select-layer', type=int, default=-2, metavar='N', help='of --visual-encoder (-2)')
    verb.add_argument('--image', nargs='+', action='extend', default=[], dest='images', metavar='FILE')
    verb.add_argument('--prompt', metavar='TEXT', help='answer this and stop; without it, a conversation')
    system = verb.add_mutually_exclusive_group()
    system.add_argument('--system', metavar='S', help="system message; '@FILE' is the text in FILE")
    system.add_argument('--system-template', metavar='NAME', help='a system message by name: coder, lawyer, sql, ...')
    verb.add_argument(
        '--prompt-template', metavar='NAME', help='for a model without a chat template: chatml, vicuna, ...'
    )
    verb.add_argument('--bot-name', metavar='NAME', help='{bot_name} in system messages; stands before answers')
    verb.add_argument(
        '--example',
        nargs=3,
        action='append',
        default=[],
        dest='examples',
        metavar=('IMAGE', 'QUESTION', 'ANSWER'),
        help="show an answered turn first; '@FILE' is the text in FILE, QUESTION '' that of --prompt; may be repeated",
    )
    _add_answers(verb)
    verb.add_argument('--bits', type=int, choices=(4, 8), help='load quantised')
    verb.add_argument('--offload-folder', metavar='DIR', help='for weights that fit neither the GPUs nor the memory')
    verb.add_argument('--boxes', action='store_true', help='print the boxes of an answer in pixels of the image')
    verb.add_argument('--draw-boxes', metavar='FILE', help='draw the boxes of an answer on the image, into FILE')
    verb.add_argument('--lagent', action='store_true', help=argparse.SUPPRESS)
    verb.add_argument('--with-plugins', nargs='*', help=argparse.SUPPRESS)


def _add_answers(verb: argparse.ArgumentParser) -> None:
    verb.add_argument('--no-streamer', action='store_true', help='print answers when they are complete')
    verb.add_argument(
        '--stop-words', nargs='+', action='extend', default=[], metavar='W', help='end an answer, and are cut from it'
    )
    for name in ('--command-stop-word', '--answer-stop-word'):
        verb.add_argument(name, action='append', dest='stop_words', metavar='W', help='one more of --stop-words')
    verb.add_argument('--max-new-tokens', type=positive, default=512, metavar='N')
    verb.add_argument('--temperature', type=float, default=0.0, metavar='T', help='0 (the default) is greedy')
    verb.add_argument('--top-p', type=float, default=1.0, metavar='P')
    verb.add_argument('--top-k', type=int, default=0, metavar='K', help='0 (the default) is no limit')
    verb.add_argument('--repetition-penalty', type=float, default=1.0, metavar='R', help='1 (the default) is none')
    verb.add_argument('--seed', type=seed, metavar='N')


def run_chat(arguments: argparse.Namespace) -> None:
    for name, reason in _LEFT_OUT.items():
        if getattr(arguments, name) not in (None, False):
            raise ConfigError(f'--{name.replace("_", "-")} is left out: {reason}')
    from vlmtune.apps.chat import chat

    chat(**given(arguments, *_LEFT_OUT))
