"""What the verbs share: how one is added, and options that several have."""

import argparse
import os
from typing import Any

from vlmtune.utils.errors import UserError

NPROC_VARIABLE = 'NPROC_PER_NODE'
"""How many processes a verb starts where --nproc does not say."""


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


def add_device(verb: argparse.ArgumentParser) -> None:
    """``--device``."""
    verb.add_argument('--device', choices=('cuda', 'cpu', 'auto'), default='auto')


def given(arguments: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """What a command line holds for its verb alone, by the names of the options, ``left_out`` aside."""
    return {name: value for name, value in vars(arguments).items() if name not in ('run', 'debug', *left_out)}


def as_words(arguments: argparse.Namespace, *names: str) -> list[str]:
    """The options that were given, as words of a command line."""
    values = {f'--{name.replace("_", "-")}': getattr(arguments, name) for name in names}
    return [word for option, value in values.items() if value is not None for word in (option, str(value))]


def processes(arguments: argparse.Namespace) -> int:
    """How many processes we have to start ourselves, for a verb that has --launcher and --nproc.

    Raises:
        UserError: both a launcher and --nproc are given, or the variable is no number.
    """
    if arguments.launcher != 'none':
        if arguments.nproc:
            raise UserError(f'--nproc starts the processes itself; leave out --launcher {arguments.launcher}')
        return 1
    text = os.environ.get(NPROC_VARIABLE, '1')
    if not arguments.nproc and not (text.isdecimal() and int(text) > 0):
        raise UserError(f'{NPROC_VARIABLE} holds {text!r}, expected a positive integer')
    nproc = arguments.nproc or int(text)
    if getattr(arguments, 'max_restarts', None) and nproc == 1:
        raise UserError('--max-restarts starts processes again that --nproc has started; give --nproc N with N > 1')
    return nproc


def positive(text: str) -> int:
    """The type of an option that counts.

    Raises:
        ArgumentTypeError: it is no positive integer.
    """
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f'expected a positive integer, got {text!r}')
    return number


def seed(text: str) -> int:
    """The type of an option that holds a seed.

    Raises:
        ArgumentTypeError: numpy does not take it.
    """
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f'expected an integer, 0 to {2**32 - 1}, got {text!r}')
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
