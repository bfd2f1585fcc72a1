"""``vlmtune convert``."""

import argparse
from typing import Any

from vlmtune.apps.export.output_folder import check_output, check_shard_size
from vlmtune.utils.errors import ConfigError
from vlmtune.verbs.options import add_device, add_verb, given, positive


def add_to(verbs: Any) -> None:
    """The verbs of this file."""
    convert = verbs.add_parser('convert', help='turn checkpoints into Hugging Face models')
    kinds = convert.add_subparsers(title='kinds', metavar='KIND', required=True)
    verb = add_verb(kinds, 'pth_to_hf', run_pth_to_hf, 'write a checkpoint as a PEFT adapter or a full model')
    verb.add_argument('config', metavar='CONFIG')
    verb.add_argument('checkpoint', metavar='CKPT', help='a directory iter_N.pth')
    verb.add_argument('output', metavar='OUT')
    _add_export_options(verb, formats=('hf', 'original', 'projector'))
    verb = add_verb(kinds, 'merge', run_merge, 'merge a PEFT adapter into its base model')
    verb.add_argument('base', metavar='BASE')
    verb.add_argument('adapter', metavar='ADAPTER')
    verb.add_argument('output', metavar='OUT')
    verb.add_argument('--is-clip', action='store_true', help='BASE is a vision encoder, CLIP or SigLIP')
    _add_export_options(verb, formats=('hf', 'original'))
    verb = add_verb(kinds, 'quantize', run_quantize, 'write a model with 4-bit weights, for serving')
    verb.add_argument('model', metavar='DIR', help='a merged or full model')
    verb.add_argument('output', metavar='OUT')
    verb.add_argument('--method', choices=('awq', 'gptq'), required=True, help='whose files to write')
    verb.add_argument('--data', metavar='CONFIG', help='tune the rounding on rows of its training data')
    verb.add_argument('--samples', type=positive, default=128, help='rows of those (128)')
    verb.add_argument('--max-length', type=positive, default=2048, help='tokens that rows are joined to (2048)')
    verb.add_argument('--group-size', type=positive, default=128, help='weights that share a scale (128)')


def _add_export_options(verb: argparse.ArgumentParser, *, formats: tuple[str, ...]) -> None:
    verb.add_argument('--max-shard-size', default='5GB', metavar='SIZE', help='of one safetensors file (5GB)')
    dtype = verb.add_mutually_exclusive_group()
    dtype.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), help="of the weights (the model's own)")
    dtype.add_argument('--fp32', action='store_const', const='float32', dest='dtype', help='short for --dtype float32')
    add_device(verb)
    verb.add_argument(
        '--format',
        choices=formats,
        dest='file_format',
        help='hf (for Auto classes, where transformers has the family) or original (the files and names of the base)'
        + ('; projector (of a LLaVA, alone)' if 'projector' in formats else ''),
    )


def _check(arguments: argparse.Namespace) -> None:
    """Before the slow imports: what needs no model to be refused."""
    check_shard_size(arguments.max_shard_size)
    check_output(arguments.output)


def run_pth_to_hf(arguments: argparse.Namespace) -> None:
    _check(arguments)
    from vlmtune.apps.export.convert import pth_to_hf

    pth_to_hf(**given(arguments))


def run_merge(arguments: argparse.Namespace) -> None:
    if arguments.is_clip and arguments.file_format is not None:
        raise ConfigError('--is-clip writes the names of the base; leave --format out')
    _check(arguments)
    if arguments.is_clip:
        from vlmtune.apps.export.merge_clip import merge_clip

        merge_clip(**given(arguments, 'is_clip', 'device', 'file_format'))
        return
    from vlmtune.apps.export.merge import merge

    merge(**given(arguments, 'is_clip'))


def run_quantize(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    from vlmtune.apps.export.quantize import quantize

    quantize(**given(arguments))
