"""``vlmtune train``."""

import argparse
import os
import shlex
from typing import Any

from vlmtune.utils.errors import Stopped, UserError
from vlmtune.verbs.options import add_overrides, add_verb, positive

NPROC_VARIABLE = 'NPROC_PER_NODE'
"""How many processes ``train`` starts where --nproc does not say."""


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
    verb.add_argument('--seed', type=int, metavar='N')
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
        train(
            arguments.config,
            work_dir=arguments.work_dir,
            resume=arguments.resume,
            overrides=overrides,
            seed=arguments.seed,
            launcher=arguments.launcher,
            deepspeed=arguments.deepspeed,
            reset_optimizer=arguments.reset_optimizer,
            dry_run=arguments.dry_run,
        )
    except Stopped as stop:
        if arguments.launcher != 'none':  # who launched us knows the command
            raise
        raise Stopped(f'{stop}\nto go on: {resume_command(arguments)}', exit_code=stop.exit_code) from stop
    return 0


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


def train_command(arguments: argparse.Namespace) -> list[str]:
    """The command of one of the processes that ``--nproc`` starts."""
    command = ['train', arguments.config, '--launcher', 'pytorch', *given(arguments, 'work_dir', 'seed', 'deepspeed')]
    if arguments.resume:
        command += ['--resume'] if arguments.resume is True else ['--resume', arguments.resume]
    command += ['--reset-optimizer'] if arguments.reset_optimizer else []
    command += ['--dry-run'] if arguments.dry_run else []
    command += ['--debug'] if arguments.debug else []
    return command + (['--cfg-options', *arguments.cfg_options] if arguments.cfg_options else [])


def resume_command(arguments: argparse.Namespace) -> str:
    """What to type to go on with a run that was stopped."""
    names = ('nproc', 'max_restarts', 'work_dir', 'seed', 'deepspeed')
    command = ['vlmtune', 'train', arguments.config, *given(arguments, *names), '--resume']
    return shlex.join(command + (['--cfg-options', *arguments.cfg_options] if arguments.cfg_options else []))


def given(arguments: argparse.Namespace, *names: str) -> list[str]:
    """The options that were given, as words of a command line."""
    values = {f'--{name.replace("_", "-")}': getattr(arguments, name) for name in names}
    return [word for option, value in values.items() if value is not None for word in (option, str(value))]
