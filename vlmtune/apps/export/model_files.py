"""A model in files of transformers: its weights, written tensor by tensor, and its settings."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from vlmtune.data import Processor
from vlmtune.evaluation import stop_tokens
from vlmtune.layouts import Weight
from vlmtune.layouts.weights import INDEX_FILES
from vlmtune.models.lazy_model import LazyModel, in_files, units
from vlmtune.models.loading import GENERATION_FILE
from vlmtune.utils.json_files import write_json
from vlmtune.utils.pretrained import read_source_json
from vlmtune.utils.tensor_file import layout_of, write_tensors

_PATTERN = 'model{suffix}.safetensors'


def save_model(model: LazyModel, folder: Path, *, base: str, max_shard_size: str) -> None:
    """Write weights, config and generation config into a folder that already has the processor files.

    The tokens that the chat template ends an answer with are added to the generation config, so that every program
    stops where the model was trained to stop.
    """
    write_weights(model, folder, max_shard_size=max_shard_size)
    config = model.outline.config
    config.dtype = str(model.dtype).removeprefix('torch.')
    config.architectures = [type(model.outline).__name__]
    config.save_pretrained(folder)
    text = config.get_text_config()
    settings = read_source_json(base, GENERATION_FILE) or {
        name: getattr(text, name, None) for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')
    }
    old = settings.get('eos_token_id')
    first = [] if old is None else [old] if isinstance(old, int) else list(old)
    processor = Processor(str(folder))
    processor.save(folder)  # in both forms, the older and the newer
    stop = list(dict.fromkeys([*first, *stop_tokens(processor, old)]))
    settings = {**settings, 'eos_token_id': stop[0] if len(stop) == 1 else stop or None}
    write_json(folder / GENERATION_FILE, {name: value for name, value in settings.items() if value is not None})


def write_weights(model: LazyModel, folder: Path, *, max_shard_size: str) -> None:
    """Write ``model.safetensors``, or several files and their index.

    Besides what one layer needs, nothing is held in memory.

    Args:
        model: in the dtype to write.
        folder: of the files.
        max_shard_size: of one file, such as '5GB'; one that holds a single larger tensor is larger.
    """
    homes: dict[str, tuple[str, ...]] = {}
    outlines: dict[str, Tensor] = {}
    for unit in units(model):
        for name, tensor in in_files(model, unit).items():
            homes[name], outlines[name] = unit, tensor

    def read(names: list[str]) -> Iterator[Tensor]:
        ready: dict[str, Tensor] = {}
        for name in names:
            if name not in ready:
                ready = in_files(model, homes[name], read=True)
            yield ready.pop(name)

    _write(outlines, read, folder, max_shard_size=max_shard_size)


def write_files(weights: Mapping[str, Weight], folder: Path, *, max_shard_size: str) -> None:
    """The same for weights under the names that they have in the files."""
    outlines = {name: torch.empty(w.shape, dtype=w.dtype, device='meta') for name, w in weights.items()}
    _write(outlines, lambda names: (weights[name].read() for name in names), folder, max_shard_size=max_shard_size)


def _write(
    outlines: Mapping[str, Tensor], read: Callable[[list[str]], Iterator[Tensor]], folder: Path, *, max_shard_size: str
) -> None:
    split = split_torch_state_dict_into_shards(dict(outlines), filename_pattern=_PATTERN, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        layout = {name: layout_of(outlines[name]) for name in names}
        tensors = zip(names, read(names), strict=True)
        write_tensors(folder / file, tensors, layout=layout, metadata={'format': 'pt'})
    if split.is_sharded:
        count = sum(tensor.numel() for tensor in outlines.values())
        index = dict(metadata={**split.metadata, 'total_parameters': count}, weight_map=split.tensor_to_filename)
        write_json(folder / INDEX_FILES[0], index)
