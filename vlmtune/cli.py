"""The command line. Heavy imports stand inside the verbs, so that ``--help`` and ``list-cfg`` answer at once."""

import argparse
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from vlmtune import __version__, cli_verbs
from vlmtune.utils.errors import Stopped, UserError

_HANDLER = 'vlmtune terminal'
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of a disk
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
    _log_to_terminal(arguments.debug)
    for warning in _NOT_SHOWN:
        warnings.filterwarnings('ignore', warning)
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
        if isinstance(error, OSError) and error.errno in _FULL:
            place = f' ({error.filename})' if error.filename else ''
            _complain(f'{error.strerror}{place}; make room, or write elsewhere', debug=arguments.debug)
            return 1
        hint = '' if arguments.debug else ' (run again with --debug for the traceback)'
        _complain(f'{type(error).__name__}: {error}{hint}', debug=arguments.debug)
    return 1


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


def _log_to_terminal(debug: bool) -> None:
    """Shows what the library logs, of the first process only."""
    logging.getLogger('bitsandbytes').setLevel(
        logging.ERROR
    )  # peft imports it in every LoRA run; it warns about kernels
    logger = logging.getLogger('vlmtune')
    for handler in [handler for handler in logger.handlers if handler.name == _HANDLER]:
        logger.removeHandler(handler)
    terminal = logging.StreamHandler()
    terminal.name = _HANDLER
    terminal.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s', '%m/%d %H:%M:%S'))
    terminal.setLevel(logging.WARNING if _rank() else logging.NOTSET)
    logger.addHandler(terminal)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)


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
    _add_train(verbs)
    _add_data_verbs(verbs)
    _add_convert(verbs)
    _add_verify(verbs)
    _add_chat(verbs)
    _add_config_verbs(verbs)
    return parser


def _add_verb(verbs: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help)
    verb.add_argument('--debug', action='store_true', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    verb.set_defaults(run=run)
    return verb


def _add_overrides(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        default=[],
        metavar='K=V',
        help='override settings and deeper keys: lr=1e-5 tune.llm=full model.lora.r=8',
    )


def _add_train(verbs: Any) -> None:
    verb = _add_verb(verbs, 'train', cli_verbs.run_train, 'train as a config says')
    verb.add_argument('config', metavar='CONFIG', help='a .py file, or the name of a built-in config')
    verb.add_argument('--work-dir', metavar='D', help='where checkpoints and logs go (work_dirs/<config>)')
    verb.add_argument(
        '--resume',
        nargs='?',
        const=True,
        default=False,
        metavar='CKPT',
        help='continue from CKPT, or from the newest checkpoint of the work dir; starts fresh if there is none',
    )
    verb.add_argument(
        '--reset-optimizer', action='store_true', help="with --resume: all but the optimizer's state, which starts anew"
    )
    _add_overrides(verb)
    verb.add_argument('--seed', type=int, metavar='N')
    verb.add_argument('--launcher', choices=('none', 'pytorch', 'slurm'), default='none', help='who started us')
    verb.add_argument('--deepspeed', metavar='NAME', help='zero1, zero2, zero3, zero2_offload, zero3_offload or a file')
    verb.add_argument(
        '--nproc',
        type=_positive,
        metavar='N',
        help=f'start N processes on this machine through torchrun (or ${cli_verbs.NPROC_VARIABLE})',
    )
    verb.add_argument(
        '--max-restarts',
        type=_positive,
        metavar='K',
        help='with --nproc: when a process fails, start all again, up to K times, from the newest checkpoint',
    )
    verb.add_argument('--dry-run', action='store_true', help='check config and data, say what would happen, and stop')


def _add_data_verbs(verbs: Any) -> None:
    verb = _add_verb(verbs, 'check-data', cli_verbs.run_check_data, 'check every row and image of the training data')
    verb.add_argument('config', metavar='CONFIG', help='a .py file, or the name of a built-in config')
    verb.add_argument('--json', action='store_true', dest='as_json', help='print one JSON document, not tables')
    verb.add_argument('--decode', action='store_true', help='decode every pixel of every image')
    _add_overrides(verb)
    verb = _add_verb(verbs, 'browse-data', cli_verbs.run_browse_data, 'look at samples as the model gets them')
    verb.add_argument('config', metavar='CONFIG', help='a .py file, or the name of a built-in config')
    target = verb.add_mutually_exclusive_group(required=True)
    target.add_argument('--out', metavar='PAGE', help='write an HTML page that needs nothing else')
    target.add_argument('--text', action='store_true', help='print to the terminal')
    verb.add_argument('-n', '--count', type=_positive, default=20, metavar='N', help='how many samples (20)')
    verb.add_argument('--indices', type=int, nargs='+', metavar='I', help='these samples instead of chosen ones')
    _add_overrides(verb)


def _add_convert(verbs: Any) -> None:
    convert = verbs.add_parser('convert', help='turn checkpoints into Hugging Face models')
    kinds = convert.add_subparsers(title='kinds', metavar='KIND', required=True, parser_class=_Parser)
    verb = _add_verb(
        kinds, 'pth_to_hf', cli_verbs.run_pth_to_hf, 'write a checkpoint as a PEFT adapter or a full model'
    )
    verb.add_argument('config', metavar='CONFIG')
    verb.add_argument('checkpoint', metavar='CKPT', help='a directory iter_N.pth')
    verb.add_argument('output', metavar='OUT')
    _add_export_options(verb)
    verb = _add_verb(kinds, 'merge', cli_verbs.run_merge, 'merge a PEFT adapter into its base model')
    verb.add_argument('base', metavar='BASE')
    verb.add_argument('adapter', metavar='ADAPTER')
    verb.add_argument('output', metavar='OUT')
    _add_export_options(verb)


def _add_export_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument('--max-shard-size', default='5GB', metavar='SIZE', help='of one safetensors file (5GB)')
    dtype = verb.add_mutually_exclusive_group()
    dtype.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), help="of the weights (the model's own)")
    dtype.add_argument('--fp32', action='store_const', const='float32', dest='dtype', help='short for --dtype float32')
    verb.add_argument('--device', choices=('cuda', 'cpu', 'auto'), default='auto')
    verb.add_argument(
        '--format',
        choices=('hf', 'original'),
        dest='file_format',
        help='hf (for Auto classes, where transformers has the family) or original (the files and names of the base)',
    )


def _add_verify(verbs: Any) -> None:
    verb = _add_verb(
        verbs, 'verify-model', cli_verbs.run_verify_model, 'load a checkpoint strictly and print what it answers'
    )
    verb.add_argument('path', metavar='PATH', help='a folder or a hub id, in any layout that is known')
    verb.add_argument(
        '--dtype', choices=('float32', 'bfloat16', 'float16', 'auto'), default='float32', help='to compute in (float32)'
    )
    verb.add_argument('--device', choices=('cuda', 'cpu', 'auto'), default='auto')
    verb.add_argument(
        '--json', action='store_const', const='json', default='text', dest='output', help='print one JSON document'
    )


def _add_chat(verbs: Any) -> None:
    verb = _add_verb(verbs, 'chat', cli_verbs.run_chat, 'talk with a model about images')
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
    verb.add_argument('--max-new-tokens', type=_positive, default=512, metavar='N')
    verb.add_argument('--temperature', type=float, default=0.0, metavar='T', help='0 (the default) is greedy')
    verb.add_argument('--top-p', type=float, default=1.0, metavar='P')
    verb.add_argument('--top-k', type=int, default=0, metavar='K', help='0 (the default) is no limit')
    verb.add_argument('--seed', type=int, metavar='N')
    verb.add_argument('--bits', type=int, choices=(4, 8), help='load quantised')
    verb.add_argument('--boxes', action='store_true', help='print the boxes of an answer in pixels of the image')
    verb.add_argument('--draw-boxes', metavar='FILE', help='draw the boxes of an answer on the image, into FILE')


def _add_config_verbs(verbs: Any) -> None:
    verb = _add_verb(verbs, 'list-cfg', cli_verbs.run_list_cfg, 'list the built-in configs')
    verb.add_argument('-p', '--pattern', metavar='PATTERN', help='part of the name, or with wildcards: "*_qlora"')
    verb = _add_verb(verbs, 'copy-cfg', cli_verbs.run_copy_cfg, 'copy a built-in config')
    verb.add_argument('name', metavar='NAME')
    verb.add_argument('directory', metavar='DIR')
    verb = _add_verb(verbs, 'print-cfg', cli_verbs.run_print_cfg, 'print a config with everything resolved')
    verb.add_argument('config', metavar='CONFIG', help='a .py file, or the name of a built-in config')
    _add_overrides(verb)


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f'expected a positive integer, got {text!r}')
    return number
