"""``README.md`` of an export: what it is, what was trained on what, and how it is loaded."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from vlmtune import __version__
from vlmtune.apps.export.record import ExportRecord
from vlmtune.families import Family
from vlmtune.layouts import Layout, find_layout, open_weights, read_config
from vlmtune.layouts.view import TEMPLATE_FILE
from vlmtune.utils.hub import is_modelscope, looks_like_id
from vlmtune.utils.pretrained import find_folder, read_source_json

Kind: TypeAlias = Literal['adapter', 'full', 'merged']
_HERE = 'path/to/this/folder'
_ENGINES = f"""Each of these serves it on port 8000, if it knows the architecture in `config.json`:

```
vllm serve {_HERE}
python -m sglang.launch_server --port 8000 --model-path {_HERE}
lmdeploy serve api_server --server-port 8000 {_HERE}
```"""
_HOLE = re.compile(r'\.?\{\w+\}\.?')  # of a pattern of names


@dataclass(frozen=True)
class ModelCard:
    """What a model card says.

    Attributes:
        kind: 'adapter' (PEFT), 'full' (trained in full) or 'merged' (base and adapter in one).
        family: says which classes load it.
        base: folder or hub id of the base model.
        record: how it was trained; None where that is not known.
        base_layout: of the base model; None is that of transformers.
        is_original: written in the layout of the base.
        fused: names that one weight of the base has where the trained model has several.
        note: of an original: sentences about files that are no copies.
        own_template: it was trained with another chat template than that of the base.
        parts: folders or hub ids of the models that the base was put together of.
    """

    kind: Kind
    family: Family
    base: str
    record: ExportRecord | None = None
    base_layout: Layout | None = None
    is_original: bool = False
    fused: tuple[str, ...] = ()
    own_template: bool = False
    note: str = ''
    parts: tuple[str, ...] = ()

    def text(self) -> str:
        """The card as Markdown with a YAML header."""
        sections = [self._header(), self._title(), self._parts(), self._training(), self._metrics(), self._loading()]
        return '\n\n'.join(section for section in sections if section) + '\n'

    @property
    def _base_id(self) -> str | None:
        """The hub id of the base; a folder has none, and hubs refuse a card that names one."""
        return self.base if _is_id(self.base) else None

    @property
    def _base_name(self) -> str:
        if self.parts:
            return ' + '.join(name if _is_id(name) else os.path.basename(os.path.abspath(name)) for name in self.parts)
        return self._base_id or os.path.basename(os.path.abspath(self.base))

    def _header(self) -> str:
        lines = ['---']
        if self._base_id:
            lines += [f'base_model: {self._base_id}']
        lines += [f'library_name: {"peft" if self.kind == "adapter" else "transformers"}']
        lines += [f'pipeline_tag: {"image-text-to-text" if self.family.has_vision else "text-generation"}']
        tags = ['vlmtune', *(['lora'] if self.kind != 'full' else [])]
        return '\n'.join([*lines, 'tags:', *(f'- {tag}' for tag in tags), '---'])

    def _title(self) -> str:
        what = {
            'adapter': f'A PEFT LoRA adapter for `{self._base_name}`',
            'full': f'`{self._base_name}`, fine-tuned',
            'merged': f'`{self._base_name}` with a LoRA adapter merged into its weights',
        }[self.kind]
        return f'# {self._base_name} fine-tuned\n\n{what}. Made with vlmtune {__version__}.'

    def _parts(self) -> str:
        if self.record is None:
            return ''
        rows = [f'| {part} | {mode} | {count:,} |' for part, (mode, count) in self.record.parts.items()]
        return '\n'.join(['| part | mode | trained weights |', '|---|---|---:|', *rows, '', 'Other parts were frozen.'])

    def _training(self) -> str:
        record = self.record
        if record is None:
            return ''
        facts = [
            ('config', f'`{record.config}`' if record.config else None),
            ('data', ', '.join(f'`{name}`' for name in record.data)),
            ('optimizer steps', record.iteration),
            ('base in training', f'quantised, {record.quantization}' if record.quantization else None),
            (
                'tokens',
                f'{record.vocab_size} rows in the embeddings, more than the base' if record.vocab_size else None,
            ),
        ]
        lines = [f'- {name}: {value}' for name, value in facts if value]
        return '\n'.join(['## Training', '', *lines])

    def _metrics(self) -> str:
        measured = dict(self.record.metrics) if self.record else {}
        names = list(dict.fromkeys(name for metrics in measured.values() for name in metrics))
        if not names:
            return ''
        lines = ['## Metrics', '', f'| | {" | ".join(measured)} |', f'|---|{"---:|" * len(measured)}']
        for name in names:
            values = (f'{metrics[name]:.4g}' if name in metrics else '' for metrics in measured.values())
            lines.append(f'| {name} | {" | ".join(values)} |')
        return '\n'.join(lines)

    def _loading(self) -> str:
        if self.is_original:
            how = self._original_loading()
        elif self.kind == 'adapter' and self.base_layout is not None:
            how = self._split_adapter_loading()
        elif self.family.model is not None:
            how = f'`vlmtune chat {_HERE}`.'
        else:
            how = self._auto_loading()
            if self.kind != 'adapter':
                how += f'\n\n{_ENGINES}'
        return f'## How to load\n\n{how}'

    def _auto_loading(self) -> str:
        auto = 'AutoModelForImageTextToText' if self.family.has_vision else 'AutoModelForCausalLM'
        processor = 'AutoProcessor' if self.family.has_vision else 'AutoTokenizer'
        name = 'processor' if self.family.has_vision else 'tokenizer'
        rows = self.record.vocab_size if self.record else None
        lines = [f'from transformers import {auto}, {processor}', '']
        if self.kind == 'adapter':
            lines = ['from peft import PeftModel', *lines]
            lines += [f"base = {auto}.from_pretrained('{self._base_name}', dtype='auto')"]
            lines += [f'base.resize_token_embeddings({rows})'] if rows else []
            lines += [f"model = PeftModel.from_pretrained(base, '{_HERE}')"]
        else:
            lines += [f"model = {auto}.from_pretrained('{_HERE}', dtype='auto')"]
        lines += [f"{name} = {processor}.from_pretrained('{_HERE}')"]
        note = ''
        if self.kind == 'adapter':
            note = f'\n\n`{self._merge}` writes a model that needs no PEFT.{self._quantization_note}'
        return '```python\n' + '\n'.join(lines) + '\n```' + note

    def _split_adapter_loading(self) -> str:
        """Of an adapter on weights that the files of the base have under other names, some of them in one."""
        assert self.base_layout is not None
        joined = ', '.join(f'`{name}`' for name in self.fused)
        why = f'`{self._base_name}` lies in the layout of {self.base_layout.name}, with other names'
        why += f' and with {joined} where this adapter has an update for each of several matrices' if joined else ''
        forms = '`--format original` (the files of the base, for its own code and the engines that know it)'
        if self.family.model is None:
            forms += ' or `--format hf` (for the Auto classes of transformers)'
        return (
            f'This adapter does not fit the files of its base model: {why}. PEFT and serving engines cannot put it on '
            f'them. Merge it:\n\n```\n{self._merge} --format original\n```\n\n{forms} writes a model that needs no '
            f'adapter.{self._quantization_note}\n\n`vlmtune chat {self._base_name} --adapter {_HERE}` answers without '
            'merging.'
        )

    def _original_loading(self) -> str:
        assert self.base_layout is not None
        serving = f'\n\n{self.base_layout.serving}' if self.base_layout.serving else ''
        template = (
            ' It was trained with another chat template than that of the base: pass `chat_template.jinja` to programs '
            'that do not read it by themselves.'
        )
        return (
            f'This is `{self._base_name}` with other weights: all other files are copies, and names, shapes and dtypes '
            'of the weights are the same. What loads the one loads the other: the code that comes with it, and the '
            f'engines that know it.{self.note}{template if self.own_template else ""}\n\n`vlmtune chat {_HERE}` '
            f'answers without running that code.{serving}'
        )

    @property
    def _merge(self) -> str:
        return f'vlmtune convert merge {self._base_name} {_HERE} OUT'

    @property
    def _quantization_note(self) -> str:
        quantization = self.record.quantization if self.record else None
        return (
            f' It also repeats the {quantization} quantisation that the adapter was trained on.' if quantization else ''
        )


def _is_id(name_or_path: str) -> bool:
    """A name of the Hugging Face hub: it refuses a card with another."""
    is_folder = os.path.isdir(os.path.expanduser(name_or_path))
    return looks_like_id(name_or_path) and not is_modelscope(name_or_path) and not is_folder


def _template(folder: Path) -> bytes | None:
    file = folder / TEMPLATE_FILE
    return file.read_bytes() if file.is_file() else None


def _fused_names(base: str, layout: Layout) -> tuple[str, ...]:
    """What the base calls its weights that are several of the trained model, without their places in it."""
    names = layout.name_map(read_config(base))
    matches = map(names.match, (layout.open_weights or open_weights)(find_folder(base)))
    rules = dict.fromkeys(match.rule for match in matches if match is not None and len(match.native) > 1)
    return tuple(dict.fromkeys([*filter(None, _HOLE.split(rule.original))][-1] for rule in rules))


def write_card(
    folder: Path,
    kind: Kind,
    *,
    family: Family,
    base: str,
    record: ExportRecord | None,
    is_original: bool = False,
    note: str = '',
) -> None:
    """Write ``README.md`` of an export into a folder that has all other files."""
    layout = find_layout(base)
    parts = (read_source_json(base, 'config.json') or {}).get('parts', {})
    chosen = ('llm_name_or_path', 'visual_encoder_name_or_path')
    card = ModelCard(
        kind,
        family,
        base,
        record,
        base_layout=layout,
        is_original=is_original,
        fused=() if layout is None else _fused_names(base, layout),
        note=note,
        own_template=is_original and _template(folder) != _template(find_folder(base)),
        parts=tuple(str(parts[name]) for name in chosen if name in parts),
    )
    (folder / 'README.md').write_text(card.text(), 'utf-8')
