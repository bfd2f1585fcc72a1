"""``vlmtune list-cfg``, ``copy-cfg`` and ``print-cfg``."""

import argparse
from typing import Any

from vlmtune.apps.configs import copy_config, list_configs
from vlmtune.verbs.options import add_overrides, add_verb


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    verb = add_verb(verbs, 'list-cfg', run_list_cfg, 'list the built-in configs')
    verb.add_argument('-p', '--pattern', metavar='PATTERN', help='part of the name, or with wildcards: "*_qlora_*"')
    verb = add_verb(verbs, 'copy-cfg', run_copy_cfg, 'copy a built-in config')
    verb.add_argument('name', metavar='NAME')
    verb.add_argument('directory', metavar='DIR')
    verb = add_verb(verbs, 'print-cfg', run_print_cfg, 'print a config with everything resolved')
    verb.add_argument('config', metavar='CONFIG', help='a .py file, or the name of a built-in config')
    add_overrides(verb)


def run_list_cfg(arguments: argparse.Namespace) -> None:
    list_configs(arguments.pattern)


def run_copy_cfg(arguments: argparse.Namespace) -> None:
    copy_config(arguments.name, arguments.directory)


def run_print_cfg(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.print_config import print_config
    from vlmtune.config import parse_cfg_options

    print_config(arguments.config, overrides=parse_cfg_options(arguments.cfg_options))
