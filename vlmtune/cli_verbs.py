"""What each verb of the command line does. Heavy imports stand inside, so that the other verbs answer at once."""

import argparse
import os
import shlex
from typing import Any

from vlmtune.apps.configs import copy_config, list_configs
from vlmtune.utils.errors import Stopped, UserError

NPROC_VARIABLE = 'NPROC_PER_NODE'
"""How many processes ``train`` starts where --nproc does not say."""


def run_train(arguments: argparse.Namespace) -> int:
    from vlmtune.config import load_config, parse_cfg_options

    overrides = parse_cfg_options(arguments.cfg_options)
    nproc = _processes(arguments)
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


def _processes(arguments: argparse.Namespace) -> int:
    """How many processes we have to start ourselves.

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
    if arguments.max_restarts and nproc == 1:
        raise UserError('--max-restarts starts processes again that --nproc has started; give --nproc N with N > 1')
    return nproc


def train_command(arguments: argparse.Namespace) -> list[str]:
    """The command of one of the processes that ``--nproc`` starts."""
    command = ['train', arguments.config, '--launcher', 'pytorch', *_given(arguments, 'work_dir', 'seed', 'deepspeed')]
    if arguments.resume:
        command += ['--resume'] if arguments.resume is True else ['--resume', arguments.resume]
    command += ['--reset-optimizer'] if arguments.reset_optimizer else []
    command += ['--dry-run'] if arguments.dry_run else []
    command += ['--debug'] if arguments.debug else []
    return command + (['--cfg-options', *arguments.cfg_options] if arguments.cfg_options else [])


def resume_command(arguments: argparse.Namespace) -> str:
    """What to type to go on with a run that was stopped."""
    names = ('nproc', 'max_restarts', 'work_dir', 'seed', 'deepspeed')
    command = ['vlmtune', 'train', arguments.config, *_given(arguments, *names), '--resume']
    return shlex.join(command + (['--cfg-options', *arguments.cfg_options] if arguments.cfg_options else []))


def _given(arguments: argparse.Namespace, *names: str) -> list[str]:
    values = {f'--{name.replace("_", "-")}': getattr(arguments, name) for name in names}
    return [word for option, value in values.items() if value is not None for word in (option, str(value))]


def run_check_data(arguments: argparse.Namespace) -> int:
    from vlmtune.apps.check_data import check_data
    from vlmtune.config import parse_cfg_options

    overrides = parse_cfg_options(arguments.cfg_options)
    return check_data(arguments.config, overrides=overrides, as_json=arguments.as_json, decode=arguments.decode)


def run_browse_data(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.browse_data import browse_data
    from vlmtune.config import parse_cfg_options

    overrides = parse_cfg_options(arguments.cfg_options)
    browse_data(
        arguments.config, out=arguments.out, count=arguments.count, indices=arguments.indices, overrides=overrides
    )


def run_pth_to_hf(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.convert import pth_to_hf

    pth_to_hf(arguments.config, arguments.checkpoint, arguments.output, **_export_options(arguments))


def run_merge(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.merge import merge

    merge(arguments.base, arguments.adapter, arguments.output, **_export_options(arguments))


def _export_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ('max_shard_size', 'dtype', 'device', 'file_format')
    return {name: getattr(arguments, name) for name in names}


def run_verify_model(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.verify_model import verify_model

    verify_model(arguments.path, dtype=arguments.dtype, device=arguments.device, output=arguments.output)


def run_chat(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.chat import chat

    names = ['adapter', 'images', 'prompt', 'system', 'examples', 'max_new_tokens', 'temperature', 'top_p', 'top_k']
    names += ['seed', 'bits', 'boxes', 'draw_boxes']
    chat(arguments.model, **{name: getattr(arguments, name) for name in names})


def run_list_cfg(arguments: argparse.Namespace) -> None:
    list_configs(arguments.pattern)


def run_copy_cfg(arguments: argparse.Namespace) -> None:
    copy_config(arguments.name, arguments.directory)


def run_print_cfg(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.print_config import print_config
    from vlmtune.config import parse_cfg_options

    print_config(arguments.config, overrides=parse_cfg_options(arguments.cfg_options))
