"""``vlmtune convert``."""

import argparse
from typing import Any

from vlmtune.verbs.options import add_verb


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    convert = verbs.add_parser('convert', help='turn checkpoints into Hugging Face models')
    kinds = convert.add_subparsers(title='kinds', metavar='KIND', required=True)
    verb = add_verb(kinds, 'pth_to_hf', run_pth_to_hf, 'write a checkpoint as a PEFT adapter or a full model')
    verb.add_argument('config', metavar='CONFIG')
    verb.add_argument('checkpoint', metavar='CKPT', help='a directory iter_N.pth')
    verb.add_argument('output', metavar='OUT')
    _add_export_options(verb)
    verb = add_verb(kinds, 'merge', run_merge, 'merge a PEFT adapter into its base model')
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


def run_pth_to_hf(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.convert import pth_to_hf

    pth_to_hf(arguments.config, arguments.checkpoint, arguments.output, **_export_options(arguments))


def run_merge(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.merge import merge

    merge(arguments.base, arguments.adapter, arguments.output, **_export_options(arguments))


def _export_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ('max_shard_size', 'dtype', 'device', 'file_format')
    return {name: getattr(arguments, name) for name in names}
