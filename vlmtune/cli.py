"""The command line. Heavy imports stand inside the verbs, so that ``--help`` and ``list-cfg`` answer at once."""

import argparse
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from vlmtune import __version__
from vlmtune.utils.errors import Stopped, UserError
from vlmtune.utils.log_format import LINE
from vlmtune.verbs import (
    chat,
    configs,
    convert,
    data,
    demo,
    doctor,
    export,
    import_config,
    push,
    report,
    serve,
    test,
    train,
    verify,
)

# in the order of the help
_GROUPS = (train, test, data, report, convert, verify, chat, demo, export, serve, push, configs, import_config, doctor)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # a write tells no name
_WAYS_OUT = {
    **dict.fromkeys(_FULL, 'make room, or write elsewhere'),
    **dict.fromkeys((errno.EACCES, errno.EPERM), 'change who may read and write there, or choose another place'),
    errno.ENAMETOOLONG: 'give a shorter one',
}
"""{error of the file system: what to do}"""
_NO_HOME = 'Could not determine home directory.'  # pathlib's
_NOT_SHOWN = (
    'Image size .* exceeds limit',  # Pillow's; data/images.py has a limit of its own
    '`torch.distributed.* is deprecated',  # DeepSpeed calls those at every step, on every rank
    r'Detected call of `scheduler.step\(\)` before',  # mmengine does not see DeepSpeed's steps
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0, 1 for a failure, 2 for a wrong command line, 130 for Ctrl-C; of a training that a signal has ended 143, 130, or
    what the config says.
    """
    arguments = build_parser().parse_args(argv)
    for warning in _NOT_SHOWN:
        warnings.filterwarnings('ignore', warning)
    with _log_on_terminal(arguments.debug):
        code = _run(arguments)
        if code:
            _leave_other_ranks(code)
    return code


def _run(arguments: argparse.Namespace) -> int:
    try:
        code = arguments.run(arguments) or 0
        sys.stdout.flush()  # a closed pipe shows here
        return code
    except BrokenPipeError:  # `vlmtune list-cfg | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Stopped as stop:
        if _rank() == 0:
            print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        _complain('interrupted')
        return 130
    except UserError as error:
        if _rank() == 0 or arguments.debug or not error.told_by_first_rank:
            _complain(str(error), debug=arguments.debug)
    except Exception as error:
        hint = '' if arguments.debug else ' (run again with --debug for the traceback)'
        _complain(_way_out(error) or f'{type(error).__name__}: {error}{hint}', debug=arguments.debug)
    return 1


def _way_out(error: Exception) -> str | None:
    """What to do about a failure that may come from anywhere and is no mistake of the program."""
    if isinstance(error, OSError) and error.errno in _WAYS_OUT and (error.filename or error.errno in _FULL):
        place = f' ({error.filename})' if error.filename else ''
        return f'{error.strerror}{place}; {_WAYS_OUT[error.errno]}'
    if isinstance(error, RuntimeError) and str(error) == _NO_HOME:
        return 'a path begins with ~ and a user that this machine does not know; write ~/ or the whole path'
    return None


def _rank() -> int:
    rank = os.environ.get('RANK', '0')
    return int(rank) if rank.isdecimal() else 0


def _leave_other_ranks(code: int) -> None:
    """End here if connections to other ranks are open: Python would wait for them, and they for us."""
    distributed: Any = sys.modules.get('torch.distributed')
    if distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _complain(message: str, *, debug: bool = False) -> None:
    if debug:
        traceback.print_exc()
    rank = _rank()
    print(f'error on rank {rank}: {message}' if rank else f'error: {message}', file=sys.stderr)


@contextmanager
def _log_on_terminal(debug: bool) -> Iterator[None]:
    """Shows what the library logs, of the first process only."""
    logger, terminal = logging.getLogger('vlmtune'), logging.StreamHandler()
    terminal.setFormatter(LINE)
    terminal.setLevel(logging.WARNING if _rank() else logging.NOTSET)
    level = logger.level
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.addHandler(terminal)
    try:
        yield
    finally:
        logger.removeHandler(terminal)
        logger.setLevel(level)


class _Parser(argparse.ArgumentParser):
    """One line for a wrong command line, as for any other failure; options are not abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{'allow_abbrev': False, **options})

    def error(self, message: str) -> NoReturn:
        """Ends the process with code 2."""
        self.exit(2, f'error: {message}; see `{self.prog} --help`\n')


def build_parser() -> argparse.ArgumentParser:
    """Every verb and option."""
    parser = _Parser(prog='vlmtune', description='Fine-tune vision-language models from one Python config file.')
    parser.add_argument('--version', action='version', version=f'vlmtune {__version__}')
    parser.add_argument('--debug', action='store_true', help='show tracebacks and debug messages')
    verbs = parser.add_subparsers(title='verbs', metavar='VERB', required=True, parser_class=_Parser)
    for group in _GROUPS:
        group.add_to(verbs)
    return parser
