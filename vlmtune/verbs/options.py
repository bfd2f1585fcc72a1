"""What the verbs share: how one is added, and options that several have."""

import argparse
from typing import Any


def add_verb(verbs: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    """A verb; ``run(arguments)`` does it and returns its exit code, or None for 0."""
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help)
    verb.add_argument('--debug', action='store_true', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    verb.set_defaults(run=run)
    return verb


def add_overrides(verb: argparse.ArgumentParser) -> None:
    """``--cfg-options``."""
    verb.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        default=[],
        metavar='K=V',
        help='override settings and deeper keys: lr=1e-5 tune.llm=full model.lora.r=8',
    )


def given(arguments: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """What a command line holds for its verb alone, by the names of the options, ``left_out`` aside."""
    return {name: value for name, value in vars(arguments).items() if name not in ('run', 'debug', *left_out)}


def positive(text: str) -> int:
    """The type of an option that counts.

    Raises:
        ArgumentTypeError: it is no positive integer.
    """
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f'expected a positive integer, got {text!r}')
    return number


def port(text: str) -> int:
    """The type of an option that names a port.

    Raises:
        ArgumentTypeError: it is none.
    """
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f'expected a port, 0 to 65535, got {text!r}')
    return number
