"""``README.md`` of an export: what it is, what was trained on what, and how it is loaded."""

import os
from dataclasses import dataclass

from vlmtune import __version__
from vlmtune.apps.record import ExportRecord
from vlmtune.families import Family


@dataclass(frozen=True)
class ModelCard:
    """What a model card says.

    Attributes:
        kind: 'adapter' (PEFT), 'full' (trained in full) or 'merged' (base and adapter in one).
        family: says which classes load it.
        base: folder or hub id of the base model.
        record: how it was trained; None where that is not known.
    """

    kind: str
    family: Family
    base: str
    record: ExportRecord | None = None

    def text(self) -> str:
        """The card as Markdown with a YAML header."""
        sections = [self._header(), self._title(), self._parts(), self._training(), self._loading()]
        return '\n\n'.join(section for section in sections if section) + '\n'

    @property
    def _base_id(self) -> str | None:
        """The hub id of the base; a folder has none, and hubs refuse a card that names one."""
        return None if os.path.isdir(os.path.expanduser(self.base)) or self.base.count('/') != 1 else self.base

    @property
    def _base_name(self) -> str:
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

    def _loading(self) -> str:
        auto = 'AutoModelForImageTextToText' if self.family.has_vision else 'AutoModelForCausalLM'
        processor = 'AutoProcessor' if self.family.has_vision else 'AutoTokenizer'
        name = 'processor' if self.family.has_vision else 'tokenizer'
        here = 'path/to/this/folder'
        rows = self.record.vocab_size if self.record else None
        quantization = self.record.quantization if self.record else None
        lines = [f'from transformers import {auto}, {processor}', '']
        if self.kind == 'adapter':
            lines = ['from peft import PeftModel', *lines]
            lines += [f"base = {auto}.from_pretrained('{self._base_name}', dtype='auto')"]
            lines += [f'base.resize_token_embeddings({rows})'] if rows else []
            lines += [f"model = PeftModel.from_pretrained(base, '{here}')"]
        else:
            lines += [f"model = {auto}.from_pretrained('{here}', dtype='auto')"]
        lines += [f"{name} = {processor}.from_pretrained('{here}')"]
        merge = f'vlmtune convert merge {self._base_name} {here} OUT'
        note = ''
        if self.kind == 'adapter':
            note = f'\n\n`{merge}` writes a model that needs no PEFT.'
            if quantization:
                note += f' It also repeats the {quantization} quantisation that the adapter was trained on.'
        return '## How to load\n\n```python\n' + '\n'.join(lines) + '\n```' + note
