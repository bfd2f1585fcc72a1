"""Weights of a checkpoint: where they lie, and how they become those of the native model and those of the original.

Nothing is read that is not asked for, and nothing in the files is run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from vlmtune.layouts.layout import Layout
from vlmtune.layouts.names import Match
from vlmtune.utils.errors import ModelError, one_line
from vlmtune.utils.pretrained import read_source_json
from vlmtune.utils.safe_torch import legacy_weights

_DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
    'I64': torch.int64, 'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8, 'BOOL': torch.bool,
}  # fmt: skip
INDEX_FILES = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')


@dataclass(frozen=True)
class Weight:
    """A weight in a file.

    Attributes:
        shape, dtype: of the whole.
        file: in which it lies.
        read: gives it; a tensor that may share memory with the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], Tensor]


def open_weights(folder: Path) -> dict[str, Weight]:
    """All weights of a model folder by name: safetensors, or where there are none, .bin files.

    Raises:
        ModelError: there are none, a file of the index is missing, or one cannot be read.
        CheckpointError: a .bin file is broken or could run code.
    """
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return _indexed(folder, folder / name)
    files = sorted(folder.glob('*.safetensors')) or sorted(folder.glob('pytorch_model*.bin'))
    if not files:
        raise ModelError(f'{folder} holds no weights; expected *.safetensors or pytorch_model*.bin')
    return {name: weight for file in files for name, weight in open_file(file).items()}


def _indexed(folder: Path, index: Path) -> dict[str, Weight]:
    places = (read_source_json(str(folder), index.name) or {}).get('weight_map')
    if not isinstance(places, Mapping):
        raise ModelError(f'{index} cannot be read; expected a json object with a weight_map')
    files = sorted({str(file) for file in places.values()})
    if missing := [file for file in files if not _is_file_in(folder, file)]:
        raise ModelError(
            f'{folder} lacks {one_line(missing[0])}, one of {len(files)} files that {index.name} names; download it'
        )
    found = {name: weight for file in files for name, weight in open_file(folder / file).items()}
    if absent := sorted(set(places) - set(found)):
        name = absent[0]
        raise ModelError(f'{folder / places[name]} lacks {one_line(name)}, which {index.name} says is in it')
    return found


def _is_file_in(folder: Path, name: str) -> bool:
    try:
        return Path(name).name == name and (folder / name).is_file()
    except OSError:  # a name that is too long for any file
        return False


def open_file(file: Path) -> dict[str, Weight]:
    """All weights of a safetensors or legacy file by name.

    Raises:
        ModelError: it is no file, or a safetensors file that cannot be read.
        CheckpointError: another one is broken or could run code.
    """
    if not file.is_file():
        raise ModelError(f'{file} is no file, or a link to none; download it again')
    if file.suffix == '.safetensors':
        return _open_safetensors(file)
    tensors = legacy_weights(file)
    return {
        name: Weight(tuple(tensor.shape), tensor.dtype, file, partial(tensors.__getitem__, name))
        for name, tensor in tensors.items()
    }


def _open_safetensors(path: Path) -> dict[str, Weight]:
    try:
        with safe_open(path, 'pt') as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Weight(tuple(s.get_shape()), _DTYPES[s.get_dtype()], path, partial(_read, path, name))
                for name, s in slices.items()
            }
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f'{path} cannot be read as a safetensors file ({str(error)[:160]})') from error
    except KeyError as error:
        raise ModelError(f'{path} holds values of type {error}, which no model of ours has') from error


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, 'pt') as file:
        return file.get_tensor(name)


# ---- from the original


def to_native(
    weights: Mapping[str, Weight],
    *,
    layout: Layout,
    config: PreTrainedConfig,
    expected: Mapping[str, torch.Size],
    tied: frozenset[str] = frozenset(),
) -> dict[str, Tensor]:
    """The weights of the native model, in the dtypes of the file. Fused ones are copied, others are those of the file.

    Args:
        weights: of the original.
        layout: of the original.
        config: native.
        expected: name -> shape of every weight of the native model.
        tied: those of ``expected`` that are other weights under a second name; the original may leave them out.

    Raises:
        ModelError: a weight is missing, unknown or of another shape; the first of each kind is named.
    """
    found: dict[str, Tensor] = {}
    for match, weight in _placed(weights, layout=layout, config=config, expected=expected, tied=tied):
        found.update(zip(match.native, match.rule.split(weight.read()), strict=True))
    return found


def open_native(
    weights: Mapping[str, Weight],
    *,
    layout: Layout,
    config: PreTrainedConfig,
    expected: Mapping[str, torch.Size],
    tied: frozenset[str] = frozenset(),
) -> dict[str, Weight]:
    """What ``to_native`` gives, each to be read when it is needed; takes and raises the same."""
    found: dict[str, Weight] = {}
    for match, weight in _placed(weights, layout=layout, config=config, expected=expected, tied=tied):
        for place, name in enumerate(match.native):
            read = partial(_read_part, weight, match.rule.split, place)
            found[name] = replace(weight, shape=tuple(expected[name]), read=read)
    return found


def _read_part(weight: Weight, split: Callable[[Tensor], Sequence[Tensor]], place: int) -> Tensor:
    return split(weight.read())[place]


def _placed(
    weights: Mapping[str, Weight],
    *,
    layout: Layout,
    config: PreTrainedConfig,
    expected: Mapping[str, torch.Size],
    tied: frozenset[str],
) -> list[tuple[Match, Weight]]:
    """The weights of the original that have a place in the native model, and which."""
    names = layout.name_map(config)
    placed: list[tuple[Match, Weight]] = []
    unknown: list[str] = []
    for original, weight in weights.items():
        match = names.match(original)
        if match is None or any(name not in expected for name in match.native):
            if not names.is_kept(original):
                unknown.append(original)
            continue
        if not weight.dtype.is_floating_point:
            raise ModelError(
                f'{weight.file}: {original} holds {str(weight.dtype).removeprefix("torch.")}, as quantised checkpoints '
                'do; expected floating-point weights'
            )
        for name, shape in zip(match.native, native_shapes(match.rule.split, weight), strict=True):
            if shape != tuple(expected[name]):
                raise ModelError(
                    f'{weight.file}: {original} is {weight.shape}, which makes {name} {shape}; config.json asks for '
                    f'{tuple(expected[name])}'
                )
        placed.append((match, weight))
    found = {name for match, _ in placed for name in match.native}
    missing = sorted(name for name in expected if name not in found and name not in tied)
    if missing or unknown:
        folders = {str(weight.file.parent) for weight in weights.values()}
        raise ModelError(_misfit(layout, sorted(folders), unknown, missing))
    return placed


def native_shapes(split: Callable[[Tensor], object], weight: Weight) -> list[tuple[int, ...]]:
    """The shapes of what a weight is here; those it cannot be split into are the shape it has."""
    try:
        return [tuple(part.shape) for part in split(torch.empty(weight.shape, device='meta'))]  # type: ignore[attr-defined]
    except RuntimeError:
        return [weight.shape]


def _misfit(layout: Layout, folders: list[str], unknown: list[str], missing: list[str]) -> str:
    kinds = []
    if unknown:
        kinds.append(f'{len(unknown)} weights are unknown (first: {one_line(sorted(unknown)[0])})')
    if missing:
        kinds.append(f'{len(missing)} are missing (first, by the name here: {missing[0]})')
    where = ' and '.join(folders)
    return f'the weights in {where} are no {layout.name} as config.json describes it: {" and ".join(kinds)}'


# ---- to the original


def to_original(
    tensors: Mapping[str, Tensor], *, source: Mapping[str, Weight], layout: Layout, config: PreTrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the original with the values of a native model: names, shapes and dtypes of the source.

    Args:
        tensors: of the native model, also under the second names of tied weights (``state_dict``).
        source: the original that the model was made from; what it keeps for itself is copied.
        layout: of the source.
        config: native.

    Raises:
        ModelError: a weight changed its shape, or has no place in the original.
    """
    names = layout.name_map(config)
    for original, weight in source.items():
        match = names.match(original)
        if match is None or any(name not in tensors for name in match.native):
            if not names.is_kept(original):
                raise ModelError(f'{weight.file}: {original} is nothing that a {layout.name} holds')
            yield original, weight.read()
            continue
        tensor = match.rule.join([tensors[name] for name in match.native])
        if tuple(tensor.shape) != weight.shape:
            raise ModelError(
                f'{original} was {weight.shape} and is {tuple(tensor.shape)} now, which the original layout has no '
                'place for; write --format hf'
            )
        yield original, tensor.to(weight.dtype).contiguous()
