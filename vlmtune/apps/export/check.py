"""``vlmtune export --check``: an export is loaded as others load it, and compared with what was trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from vlmtune.apps.chat.answering import load_answerer
from vlmtune.apps.export.adapter_rules import describe, verdicts
from vlmtune.apps.export.adapters import find_adapter, refuse_checkpoint
from vlmtune.apps.export.check_inputs import Finding, ask, compare_inputs, compare_settings
from vlmtune.apps.export.processor_files import image_differences
from vlmtune.apps.export.reference import Reference, trained_reference
from vlmtune.data import Processor
from vlmtune.data.processor_files import IMAGE_FILE
from vlmtune.evaluation.generation import stop_tokens
from vlmtune.families import Family, find_family
from vlmtune.layouts import find_layout, open_weights, read_config
from vlmtune.models import load_model
from vlmtune.models.loading import GENERATION_FILE, auto_class
from vlmtune.utils.adapter_folder import ADAPTER_CONFIG, adapter_settings, adapter_weights, is_adapter
from vlmtune.utils.device import find_device
from vlmtune.utils.pretrained import check_source, load_pretrained, read_source_json

_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""How far logits may be from those of the trained model, as a share of the largest: rounding of weights and sums."""
_QUANTISED_LIMIT = 0.1  # where the trained model rounds its activations
_NOTHING_LEARNED = 1e-5


@dataclass(frozen=True)
class Loaded:
    """An export, as others load it."""

    model: Any
    processor: Processor
    autocast_dtype: torch.dtype | None = None


def check_export(folder: str, *, trained: tuple[str, str] | None = None) -> int:
    """Load an export, compare it, and print what was found.

    Args:
        folder: a model or an adapter.
        trained: config and ``iter_N.pth`` that it was made of; without them, it is only compared with itself.

    Returns:
        1 if something is wrong, else 0.

    Raises:
        UserError: the export cannot be loaded at all, or the checkpoint cannot.
    """
    is_wrong = False
    for finding in findings(folder, trained=trained):
        is_wrong |= finding.kind == 'wrong'
        print(f'{finding.kind:<6} {finding.what}: {finding.text}', flush=True)
    print(f'{folder} {"is not what it should be" if is_wrong else "holds"}')
    return int(is_wrong)


@torch.no_grad()
def findings(folder: str, *, trained: tuple[str, str] | None = None) -> Iterator[Finding]:
    """What is found; see ``check_export``."""
    path = Path(folder).expanduser()
    refuse_checkpoint(path)
    if not is_adapter(path):
        check_source(str(path) if path.is_dir() else folder)
    reference = None if trained is None else trained_reference(*trained)
    yield from (_check_adapter if is_adapter(path) else _check_model)(path, reference)


# ---- a model


def _check_model(path: Path, reference: Reference | None) -> Iterator[Finding]:
    config = read_config(str(path))
    family, layout = find_family(config.model_type), find_layout(str(path))
    is_plain = layout is None and family.model is None
    if getattr(config, 'quantization_config', None):
        yield from _check_quantised(path, reference, is_plain=is_plain)
        return
    model, report = _load(path, family=family, is_plain=is_plain)
    if not is_plain:
        why = f'the layout of {layout.name}' if layout is not None else f'{family.model_type}, which transformers lacks'
        yield Finding('note', 'classes', f'the files are in {why}; they were read without running code of theirs')
    yield from report
    processor = Processor(str(path))
    if reference is not None and (lost := _other_names(model, reference)):
        yield Finding('wrong', 'weights', lost)
        return
    if is_plain:
        yield from compare_inputs(path, processor if reference is None else reference.processor)
    elif reference is not None:
        yield from compare_settings(processor, reference.processor)
    yield from _check_files(path, model.generation_config.eos_token_id, processor, is_plain=is_plain)
    if not is_plain and reference is not None and image_differences(reference.processor, processor):
        processor = reference.processor  # logits are to tell about the weights
    loaded = Loaded(model.to(find_device()), processor)
    yield from _check_logits(loaded, reference)


def _check_quantised(path: Path, reference: Reference | None, *, is_plain: bool) -> Iterator[Finding]:
    """Weights of AWQ, GPTQ and the like: what computes with them may be installed elsewhere only, with the server."""
    processor, count = Processor(str(path)), len(open_weights(path))
    text = f'{count} tensors; they are quantised, so neither they nor logits are compared, only the files beside them'
    yield Finding('note', 'weights', text)
    if is_plain:
        yield from compare_inputs(path, processor if reference is None else reference.processor)
    stop = (read_source_json(str(path), GENERATION_FILE) or {}).get('eos_token_id')
    yield from _check_files(path, stop, processor, is_plain=is_plain)


def _load(path: Path, *, family: Family, is_plain: bool) -> tuple[Any, list[Finding]]:
    if not is_plain:
        model, _ = load_model(str(path), dtype='auto', refuse_unknown=True)  # type: ignore[arg-type]
        return model, [_weights_ok(model, 'strictly')]
    options: dict[str, Any] = dict(dtype='auto', output_loading_info=True)
    model, info = load_pretrained(auto_class(family), str(path), has_weights=True, **options)
    kinds = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    wrong = [f'{len(names)} {kind.replace("_", " ")} (first: {names[0]})' for kind, names in kinds.items()]
    if wrong:
        return model, [Finding('wrong', 'weights', f'{auto_class(family).__name__} finds {", ".join(wrong)}')]
    return model, [_weights_ok(model, f'by {auto_class(family).__name__}')]


def _weights_ok(model: Any, how: str) -> Finding:
    count = len(model.state_dict())
    return Finding('ok', 'weights', f'{count} tensors, loaded {how}: none is missing, unknown or of another shape')


def _other_names(model: Any, reference: Reference) -> str:
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in reference.shapes.items():
        if found.get(name) != shape:
            return f'{name} is {found.get(name, "missing")}, in the trained model {shape}; it is of another base'
    more = sorted(set(found) - set(reference.shapes))
    return f'{more[0]} is not in the trained model' if more else ''


def _check_files(
    path: Path, stop: int | list[int] | None, processor: Processor, *, is_plain: bool
) -> Iterator[Finding]:
    own = {stop} if isinstance(stop, int) else set(stop or ())
    lacks = sorted(set(stop_tokens(processor)) - own)
    if lacks:
        names = ', '.join(map(str, processor.tokenizer.convert_ids_to_tokens(lacks)))
        kind: Literal['wrong', 'note'] = 'wrong' if is_plain else 'note'  # elsewhere the file is that of the base
        yield Finding(kind, 'stop tokens', f'eos_token_id of generation_config.json lacks {names}; answers may go on')
    else:
        yield Finding('ok', 'stop tokens', f'generation_config.json ends answers with {sorted(own)}')
    if is_plain and processor.family.has_vision and read_source_json(str(path), IMAGE_FILE) is None:
        yield Finding('wrong', 'files', f'{IMAGE_FILE} is missing, which older programs read')


# ---- an adapter


def _check_adapter(path: Path, reference: Reference | None) -> Iterator[Finding]:
    find_adapter(str(path))
    settings = adapter_settings(path)
    if not (base := settings.get('base_model_name_or_path')):
        yield Finding('wrong', 'base', f'{ADAPTER_CONFIG} names no base model; set base_model_name_or_path')
        return
    family = find_family(read_config(base).model_type)
    with safe_open(adapter_weights(path), 'pt') as file:
        names = list(file.keys())
    answerer = load_answerer(str(path))
    yield Finding('ok', 'weights', f'{len(names)} tensors, put on {base} by PEFT: none is missing or without a place')
    yield from _check_logits(Loaded(answerer.model, answerer.processor, answerer.autocast_dtype), reference)
    for verdict in verdicts(describe(settings, names, family=family, is_fused=find_layout(base) is not None)):
        if verdict.reasons:
            text = f'{"; ".join(verdict.reasons)}. Merge it: vlmtune convert merge {base} {path} OUT'
        else:
            text = f'its loader takes this adapter as it is; options {" ".join(verdict.options)}'
        yield Finding('note' if verdict.reasons else 'ok', verdict.engine, text)


# ---- logits


def _check_logits(loaded: Loaded, reference: Reference | None) -> Iterator[Finding]:
    found = ask(loaded.model, loaded.processor, autocast_dtype=loaded.autocast_dtype)
    if any(not bool(torch.isfinite(logits).all()) for logits in found):
        yield Finding('wrong', 'logits', 'some are not finite')
        return
    if reference is None:
        yield Finding('note', 'logits', 'finite; give --trained CONFIG CKPT to compare them with the trained model')
        return
    shapes = [[tuple(logits.shape) for logits in group] for group in (found, reference.logits)]
    if shapes[0] != shapes[1]:
        yield Finding('wrong', 'logits', f'of shape {shapes[0]}, of the trained model {shapes[1]}: other prompts')
        return
    dtypes = (next(loaded.model.parameters()).dtype, reference.dtype)
    yield _distance(found, reference, limit=max(_LIMITS[dtype] for dtype in dtypes))


def _distance(found: list[Tensor], reference: Reference, *, limit: float) -> Finding:
    after = torch.cat(reference.logits)
    scale = max(1.0, float(after.abs().max()))
    away = float((torch.cat(found) - after).abs().max()) / scale
    learned = float((torch.cat(reference.untrained) - after).abs().max()) / scale
    limit = max(limit, _QUANTISED_LIMIT) if reference.rounds_activations else limit
    same = int((torch.cat(found).argmax(-1) == after.argmax(-1)).sum())
    text = f'{away:.1e} away from those of the trained model (of the largest), which training moved by {learned:.1e}'
    if away > limit:
        return Finding('wrong', 'logits', f'{text}; expected at most {limit:.0e}: it is another model')
    if learned > _NOTHING_LEARNED and away > learned / 2:
        advice = 'what was learned is not in it, or was rounded away; export again, with --dtype float32'
        return Finding('wrong', 'logits', f'{text}: {advice}')
    return Finding('ok', 'logits', f'{text}; the next token is the same at {same} of {len(after)} places')
