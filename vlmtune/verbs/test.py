"""``vlmtune test``."""

import argparse
import shlex
from typing import Any

from vlmtune.utils.errors import Stopped
from vlmtune.verbs.options import add_overrides, add_verb, as_words, given, positive, processes


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'test', run_test, 'answer the questions of a test set and score the answers')
    verb.add_argument('config', metavar='CONFIG', help='a .py file, or the name of a built-in config')
    verb.add_argument(
        'checkpoint', metavar='CKPT', nargs='?', help='iter_N.pth, an exported folder, a base model (the one of CONFIG)'
    )
    verb.add_argument('--out', metavar='D', help='where answers and scores go (<work dir>/test/<name of CKPT>)')
    verb.add_argument('--work-dir', metavar='D', help='of the run (work_dirs/<config>)')
    verb.add_argument('--limit', type=positive, metavar='N', help='ask only the first N questions')
    verb.add_argument('--batch-size', type=positive, metavar='B', help='questions that are answered together')
    verb.add_argument('--launcher', choices=('none', 'pytorch', 'slurm'), default='none', help='who started us')
    verb.add_argument('--nproc', type=positive, metavar='N', help='start N processes on this machine')
    add_overrides(verb)


def run_test(arguments: argparse.Namespace) -> int:
    from vlmtune.config import parse_cfg_options

    overrides = parse_cfg_options(arguments.cfg_options)
    nproc = processes(arguments)
    if nproc > 1:
        from vlmtune.apps.launch import launch
        from vlmtune.apps.test import read_test_config

        read_test_config(arguments.config, overrides=overrides)  # its mistakes are better told before anything starts
        code = launch([*command(arguments), '--launcher', 'pytorch'], nproc=nproc, debug=arguments.debug)
        if code > 1:  # 1: a process has failed and told why
            again = shlex.join(['vlmtune', *command(arguments), '--nproc', str(nproc)])
            raise Stopped(f'to go on: {again}', exit_code=code)
        return code
    from vlmtune.apps.test import evaluate

    evaluate(**given(arguments, 'cfg_options', 'nproc'), overrides=overrides)
    return 0


def command(arguments: argparse.Namespace) -> list[str]:
    """The same command, but for who starts how many processes."""
    words = ['test', arguments.config, *([] if arguments.checkpoint is None else [arguments.checkpoint])]
    words += as_words(arguments, 'out', 'work_dir', 'limit', 'batch_size')
    words += ['--debug'] if arguments.debug else []
    return words + (['--cfg-options', *arguments.cfg_options] if arguments.cfg_options else [])
