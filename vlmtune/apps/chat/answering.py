"""A model that answers: weights, adapter, processor and the way it draws tokens."""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vlmtune.apps.chat.pieces import PieceStreamer
from vlmtune.apps.export.adapters import attach_adapter, find_adapter, refuse_checkpoint
from vlmtune.apps.export.options import base_dtype
from vlmtune.apps.export.processor_files import load_processor
from vlmtune.apps.export.record import ExportRecord, read_record
from vlmtune.data import Processor
from vlmtune.data.templates import TEMPLATES
from vlmtune.evaluation import generate
from vlmtune.evaluation.generation import encode_prompt, expected_of
from vlmtune.evaluation.stopping import as_stop_strings
from vlmtune.layouts import find_source, read_config
from vlmtune.models import load_model
from vlmtune.models.loading import parse_dtype
from vlmtune.structures import Conversation, Message, TextPart
from vlmtune.utils.adapter_folder import split_adapter
from vlmtune.utils.device import find_device
from vlmtune.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_MOST_TOKENS = 512  # of an answer, where nobody says
_SAMPLING = ('temperature', 'top_p', 'top_k')
_QUANTIZATIONS = {None: None, 4: 'nf4', 8: 'int8'}


def generation_settings(
    *,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None = None,
    stop_words: Sequence[str] = (),
) -> dict[str, Any]:
    """Settings of ``generate``; without a temperature it is greedy.

    Raises:
        ConfigError: a number out of range, top_p or top_k without a temperature, or an empty stop word.
    """
    limits: dict[str, Any] = dict(top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty)
    for name, value in dict(limits, max_new_tokens=max_new_tokens, temperature=temperature or None).items():
        if expected := expected_of(name, value):
            raise ConfigError(f'--{name.replace("_", "-")} {value}: expected {expected}')
    settings: dict[str, Any] = dict(max_new_tokens=max_new_tokens, do_sample=bool(temperature))
    if repetition_penalty not in (None, 1):
        settings['repetition_penalty'] = repetition_penalty
    if stop_strings := as_stop_strings(stop_words, name='--stop-words'):
        settings['stop_strings'] = stop_strings
    if not temperature:
        if top_k or (top_p is not None and top_p < 1):
            raise ConfigError('--top-p and --top-k need a --temperature above 0; without one the answer is greedy')
        return settings
    return settings | dict(temperature=temperature, top_p=1.0 if top_p is None else top_p, top_k=top_k or 0)


@dataclass(frozen=True)
class Answerer:
    """A model, its processor and the settings of its answers.

    Attributes:
        model: of transformers; an adapter is in it.
        processor: of the model.
        autocast_dtype: what to compute in; None: the dtype of the weights.
        settings: of ``generate``.
        adapted: PEFT's view of the model, which can switch the adapter off; None without one.
    """

    model: PreTrainedModel
    processor: Processor
    autocast_dtype: torch.dtype | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapted: Any = None

    def answer(
        self,
        conversation: Conversation,
        write: Callable[[str], None] = lambda _: None,
        *,
        settings: Mapping[str, Any] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> str:
        """The answer. Ctrl-C ends it early and leaves what was said.

        Args:
            conversation: ends with a user message.
            write: gets the pieces of the answer as they come; joined, they are the answer, but for white space at
                its end.
            settings: for this answer, over the answerer's own: of ``generate``, ``stop_strings`` included; see
                ``generation_settings``.
            should_stop: asked after every token; True ends the answer and leaves what was said.

        Raises:
            DataError: the conversation does not fit the chat template, or is too long for the model; an image is gone.
        """
        chosen = {**self.settings, **(settings or {})}
        if not chosen.get('do_sample'):  # the answerer's own may be those of sampling
            chosen = {name: value for name, value in chosen.items() if name not in _SAMPLING}
        chosen['max_new_tokens'] = self._room(conversation, wanted=chosen.get('max_new_tokens'))
        streamer = PieceStreamer(self.processor.tokenizer, write, stop_strings=chosen.get('stop_strings', ()))
        try:
            generate(
                self.model,
                self.processor,
                [conversation],
                autocast_dtype=self.autocast_dtype,
                streamer=streamer,
                should_stop=should_stop,
                **chosen,
            )
        except KeyboardInterrupt:
            logger.debug('the answer was stopped after %d characters', len(streamer.text))
        return streamer.text.strip()

    def _room(self, conversation: Conversation, *, wanted: int | None) -> int:
        """Tokens that an answer may have, in a model that was made for texts of a certain length.

        Raises:
            DataError: none is left.
        """
        most = getattr(self.model.config.get_text_config(), 'max_position_embeddings', None)
        wanted = _MOST_TOKENS if wanted is None else wanted
        if most is None:
            return wanted
        used = len(encode_prompt(self.processor, conversation))
        if used >= most:
            raise DataError(
                f'the conversation has {used} tokens, those of its images included, and the model takes {most}; '
                'begin a new one (/clear), with fewer or smaller images'
            )
        return min(wanted, most - used)


def load_answerer(
    model: str | Mapping[str, Any],
    *,
    adapter: str | None = None,
    bits: int | None = None,
    prompt_template: str | None = None,
    offload_folder: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Answerer:
    """Load a model, or a model and an adapter, onto the best device there is.

    An adapter that was trained on a quantised base gets such a base, unless ``bits`` says otherwise.

    Args:
        model: a folder or a hub id, or the parts of a LLaVA; the folder of an adapter means its base and the adapter.
        adapter: of PEFT; its processor files win over the model's.
        bits: None, 4 or 8.
        prompt_template: a name in ``vlmtune.data.templates``, for models that have no chat template of their own.
        offload_folder: weights that fit neither the device nor the memory go into files there.
        settings: of ``generate``.

    Raises:
        UserError: something cannot be loaded.
    """
    if bits not in _QUANTIZATIONS:
        raise ConfigError(f'--bits {bits}: expected 4 or 8')
    if isinstance(model, str):
        refuse_checkpoint(Path(model).expanduser())
        model, adapter = split_adapter(model, adapter)
    if adapter is not None and offload_folder is not None:
        raise ConfigError(
            f'--offload-folder {offload_folder}: no adapter can be put on weights that lie in files; merge it first '
            f'(vlmtune convert merge {model} {adapter} OUT) and chat with OUT'
        )
    name = find_source(model)
    config = read_config(name)
    source = find_adapter(adapter) if adapter else None
    processor = load_processor(name, over=source, prompt_template=prompt_template)  # cheaper than weights
    settings = dict(settings or {})
    if stop_strings := _stop_strings(processor, template=prompt_template, asked=settings.get('stop_strings', ())):
        settings['stop_strings'] = stop_strings
    device, dtype, quantization = find_device(), base_dtype(config), _QUANTIZATIONS[bits]
    record = _quantized_record(source) if quantization is None else None
    if record is not None:
        dtype, quantization = parse_dtype(record.dtype), record.quantization
    loaded, _ = load_model(name, dtype=dtype, quantization=quantization, device=device, offload_folder=offload_folder)
    if not any(hasattr(loaded, name) for name in ('hf_quantizer', 'hf_device_map')):  # else they lie where they should
        loaded = loaded.to(device)  # type: ignore[arg-type]
    adapted = attach_adapter(loaded, source) if source is not None else None  # in place
    loaded.eval()
    on = f'{device} ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else str(device)
    shown = [str(dtype).removeprefix('torch.'), quantization, f'adapter {source}' if source else None]
    logger.info('%s on %s: %s', name if isinstance(model, str) else Path(name).name, on, ', '.join(filter(None, shown)))
    return Answerer(loaded, processor, dtype if source else None, settings, adapted)


def _stop_strings(processor: Processor, *, template: str | None, asked: str | Sequence[str]) -> list[str]:
    """Those that are asked for, and what a named template closes answers with where the tokenizer reads it as text.

    Raises:
        ConfigError: the model has no chat template, and none is named; or a stop string is empty.
    """
    stops = as_stop_strings(asked)
    if not processor.tokenizer.chat_template:
        raise ConfigError(
            f'{processor.source} has no chat template; set prompt_template (--prompt-template) to one of '
            f'{", ".join(TEMPLATES)}'
        )
    turns = [('user', 'x'), ('assistant', 'y'), ('user', 'z')]
    probe = Conversation(tuple(Message(role, (TextPart(text),)) for role, text in turns))  # type: ignore[arg-type]
    try:
        rendered = processor.renderer.render(probe, add_generation_prompt=True)
    except DataError:  # a template of one question and one answer
        return stops
    closing = rendered.text[rendered.contents[1].end : rendered.contents[2].start].split()[:1]
    known = {*processor.tokenizer.all_special_tokens, *processor.tokenizer.get_added_vocab()}
    is_text = template is not None and closing and not any(closing[0].startswith(token) for token in known)
    return stops + (closing if is_text else [])


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
