"""``vlmtune train``."""

import argparse
import shlex
from typing import Any

from vlmtune.utils.errors import Stopped
from vlmtune.verbs.options import NPROC_VARIABLE, add_overrides, add_verb, as_words, given, positive, processes, seed


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'train', run_train, 'train as a config says')
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
    add_overrides(verb)
    verb.add_argument('--seed', type=seed, metavar='N')
    verb.add_argument('--launcher', choices=('none', 'pytorch', 'slurm'), default='none', help='who started us')
    verb.add_argument('--deepspeed', metavar='NAME', help='zero1, zero2, zero3, zero2_offload, zero3_offload or a file')
    verb.add_argument(
        '--nproc',
        type=positive,
        metavar='N',
        help=f'start N processes on this machine through torchrun (or ${NPROC_VARIABLE})',
    )
    verb.add_argument(
        '--max-restarts',
        type=positive,
        metavar='K',
        help='with --nproc: when a process fails, start all again, up to K times, from the newest checkpoint',
    )
    verb.add_argument('--dry-run', action='store_true', help='check config and data, say what would happen, and stop')


def run_train(arguments: argparse.Namespace) -> int:
    from vlmtune.config import load_config, parse_cfg_options

    overrides = parse_cfg_options(arguments.cfg_options)
    nproc = processes(arguments)
    if nproc > 1:
        from vlmtune.apps.launch import launch

        cfg = load_config(arguments.config, overrides)  # its mistakes are better told before anything starts
        code = launch(
            train_command(arguments),
            nproc=nproc,
            max_restarts=arguments.max_restarts or 0,
            requeue_exit_code=cfg.get('requeue_exit_code'),
            debug=arguments.debug,
        )
        if code > 1:  # 1: a process has failed and told why
            raise Stopped(f'to go on: {resume_command(arguments)}', exit_code=code)
        return code
    from vlmtune.apps.train import train

    try:
        train(**given(arguments, 'cfg_options', 'nproc', 'max_restarts'), overrides=overrides)
    except Stopped as stop:
        if arguments.launcher != 'none':  # who launched us knows the command
            raise
        raise Stopped(f'{stop}\nto go on: {resume_command(arguments)}', exit_code=stop.exit_code) from stop
    return 0


def train_command(arguments: argparse.Namespace) -> list[str]:
    """The command of one of the processes that ``--nproc`` starts."""
    words = as_words(arguments, 'work_dir', 'seed', 'deepspeed')
    command = ['train', arguments.config, '--launcher', 'pytorch', *words, *_resume_words(arguments)]
    command += ['--dry-run'] if arguments.dry_run else []
    command += ['--debug'] if arguments.debug else []
    return command + (['--cfg-options', *arguments.cfg_options] if arguments.cfg_options else [])


def _resume_words(arguments: argparse.Namespace) -> list[str]:
    words = [] if not arguments.resume else ['--resume'] if arguments.resume is True else ['--resume', arguments.resume]
    return words + (['--reset-optimizer'] if arguments.reset_optimizer else [])


def resume_command(arguments: argparse.Namespace) -> str:
    """What to type to go on with a run that was stopped; a dry run has saved nothing and is begun again."""
    names = ('nproc', 'max_restarts', 'work_dir', 'seed', 'deepspeed')
    going_on = [*_resume_words(arguments), '--dry-run'] if arguments.dry_run else ['--resume']
    command = ['vlmtune', 'train', arguments.config, *as_words(arguments, *names), *going_on]
    return shlex.join(command + (['--cfg-options', *arguments.cfg_options] if arguments.cfg_options else []))
