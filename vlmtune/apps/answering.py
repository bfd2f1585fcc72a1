"""A model that answers: weights, adapter, processor and the way it draws tokens."""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from vlmtune.apps.adapters import ADAPTER_CONFIG, attach_adapter, base_of, find_adapter
from vlmtune.apps.export import base_dtype, load_processor
from vlmtune.apps.record import ExportRecord, read_record
from vlmtune.data import Processor
from vlmtune.evaluation import generate
from vlmtune.layouts import read_config
from vlmtune.models import load_model
from vlmtune.models.loading import parse_dtype
from vlmtune.structures import Conversation
from vlmtune.utils.device import find_device
from vlmtune.utils.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

_QUANTIZATIONS = {None: None, 4: 'nf4', 8: 'int8'}


def generation_settings(
    *, max_new_tokens: int, temperature: float | None, top_p: float | None, top_k: int | None
) -> dict[str, Any]:
    """Settings of transformers' ``generate``; without a temperature it is greedy.

    Raises:
        ConfigError: a number out of range, or top_p or top_k without a temperature.
    """
    checks = (
        ('--max-new-tokens', max_new_tokens, max_new_tokens >= 1, 'a positive integer'),
        ('--temperature', temperature, temperature is None or temperature >= 0, '0 (greedy) or more'),
        ('--top-p', top_p, top_p is None or 0 < top_p <= 1, 'above 0 and at most 1'),
        ('--top-k', top_k, top_k is None or top_k >= 0, '0 (no limit) or more'),
    )
    for name, value, is_valid, expected in checks:
        if not is_valid:
            raise ConfigError(f'{name} {value}: expected {expected}')
    if not temperature:
        if top_k or (top_p is not None and top_p < 1):
            raise ConfigError('--top-p and --top-k need a --temperature above 0; without one the answer is greedy')
        return dict(max_new_tokens=max_new_tokens, do_sample=False)
    limits = dict(top_p=1.0 if top_p is None else top_p, top_k=top_k or 0)
    return dict(max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature, **limits)


class PieceStreamer(TextStreamer):
    """Passes an answer on, word by word, and keeps it: what is there when the user stops it is the answer.

    Args:
        processor: decodes.
        write: gets every piece; white space before the first word is left out.
    """

    def __init__(self, processor: Processor, write: Callable[[str], None]) -> None:
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ''
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers."""
        new = text if self.text else text.lstrip()
        self.text += new
        if new:
            self._write(new)


@dataclass(frozen=True)
class Answerer:
    """A model, its processor and the settings of its answers."""

    model: PreTrainedModel
    processor: Processor
    autocast_dtype: torch.dtype | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def answer(self, conversation: Conversation, write: Callable[[str], None]) -> str:
        """The answer; its pieces go to ``write`` as they come. Ctrl-C ends it early and leaves what was said.

        Raises:
            DataError: the conversation does not fit the chat template, or an image is gone.
        """
        streamer = PieceStreamer(self.processor, write)
        try:
            generate(
                self.model,
                self.processor,
                [conversation],
                autocast_dtype=self.autocast_dtype,
                streamer=streamer,
                **self.settings,
            )
        except KeyboardInterrupt:
            logger.debug('the answer was stopped after %d characters', len(streamer.text))
        return streamer.text.strip()


def load_answerer(
    model: str, *, adapter: str | None = None, bits: int | None = None, settings: dict[str, Any] | None = None
) -> Answerer:
    """Load a model, or a model and an adapter, onto the best device there is.

    An adapter that was trained on a quantised base gets such a base, unless ``bits`` says otherwise.

    Args:
        model: a folder or a hub id; the folder of an adapter means its base and the adapter.
        adapter: of PEFT; its processor files win over the model's.
        bits: None, 4 or 8.
        settings: of ``generate``.

    Raises:
        UserError: something cannot be loaded.
    """
    if bits not in _QUANTIZATIONS:
        raise ConfigError(f'--bits {bits}: expected 4 or 8')
    model, adapter = _split_adapter_folder(model, adapter)
    config = read_config(model)
    source = find_adapter(adapter) if adapter else None
    device, dtype, quantization = find_device(), base_dtype(config), _QUANTIZATIONS[bits]
    record = _quantized_record(source) if quantization is None else None
    if record is not None:
        dtype, quantization = parse_dtype(record.dtype), record.quantization
    loaded, _ = load_model(model, dtype=dtype, quantization=quantization, device=device)
    if quantization is None:
        loaded = loaded.to(device)  # type: ignore[arg-type]
    if source is not None:
        attach_adapter(loaded, source)  # in place
    loaded.eval()
    name = f' ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else ''
    shown = ', '.join(
        filter(None, [str(dtype).removeprefix('torch.'), quantization, f'adapter {source}' if source else None])
    )
    logger.info('%s on %s%s: %s', model, device, name, shown)
    return Answerer(loaded, load_processor(model, over=source), dtype if source else None, dict(settings or {}))


def _split_adapter_folder(model: str, adapter: str | None) -> tuple[str, str | None]:
    folder = Path(model).expanduser()
    if adapter is not None or not (folder / ADAPTER_CONFIG).is_file() or (folder / 'config.json').is_file():
        return model, adapter
    base = base_of(folder)
    if base is None:
        raise CheckpointError(f'{model} is an adapter that names no base model; give the base, and --adapter {model}')
    return base, model


def _quantized_record(adapter: Path | None) -> ExportRecord | None:
    """The record of an adapter that was trained on a quantised base, where such a base can be had."""
    record = read_record(adapter) if adapter is not None else None
    if record is None or record.quantization is None:
        return None
    if importlib.util.find_spec('bitsandbytes') is None:
        logger.warning(
            'the adapter was trained on an %s base; without bitsandbytes answers differ', record.quantization
        )
        return None
    logger.info('the adapter was trained on an %s base, so the base is quantised', record.quantization)
    return record
