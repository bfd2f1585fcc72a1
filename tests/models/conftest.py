"""Every family that can be trained, tiny, with four samples: one image, text only, two images, three turns."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vlmtune.data import (
    Collator,
    Processor,
    SupervisedDataset,
    chat_template_map_fn,
    llava_map_fn,
    load_rows,
)
from vlmtune.models import SupervisedFinetune
from vlmtune.ops import finish_images

_LINEAR = dict(
    layer_types=['linear_attention', 'full_attention'],
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
# Families without a tiny model of their own; what sets each apart from a Llama is switched on.
_TEXT = {
    'mistral': dict(sliding_window=16),  # shorter than the samples
    'gemma': dict(head_dim=16),
    'granite': dict(logits_scaling=2.0, embedding_multiplier=1.5, residual_multiplier=0.8, attention_multiplier=0.3),
    'gemma3_text': dict(head_dim=16, sliding_window=16, layer_types=['sliding_attention', 'full_attention']),
    'olmo2': {},
    'phi3': dict(sliding_window=16),
    'smollm3': dict(no_rope_layers=[1, 0]),
    'lfm2': dict(layer_types=['conv', 'full_attention']),
    'qwen3_5_text': _LINEAR,
    'qwen3_next': {**_LINEAR, 'mlp_only_layers': [0, 1]},
    'granitemoehybrid': dict(
        layer_types=['mamba', 'attention'],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        shared_intermediate_size=64,
    ),
}


@dataclass
class Case:
    """A tiny model's directory, its processor, and samples for it."""

    path: Path
    processor: Processor
    samples: list[dict[str, torch.Tensor]]

    def batch(self, *indices: int, pack: bool = True) -> dict[str, torch.Tensor]:
        """All samples, or those of the indices, as one batch."""
        tokenizer = self.processor.tokenizer
        collate = Collator(self.processor.family, pad_token_id=tokenizer.pad_token_id, pack=pack)
        return collate([self.samples[i] for i in indices or range(len(self.samples))])

    def build(self, **settings: Any) -> SupervisedFinetune:
        """The model; everything trains in full float32 unless the settings say otherwise."""
        vision = dict(vision_encoder='full', projector='full') if self.processor.family.has_vision else {}
        return SupervisedFinetune(
            str(self.path), **{'tune': dict(llm='full', **vision), 'dtype': 'float32', **settings}
        )


def _write_text_model(model_type: str, path: Path, *, tokenizer_of: Path, amplify: float) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    roles = {f'{role}_token_id': getattr(tokenizer, f'{role}_token_id') for role in ('bos', 'eos', 'pad')}
    settings = {**shape, 'num_key_value_heads': 2, 'vocab_size': len(tokenizer) + 3, **roles, **_TEXT[model_type]}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
        for parameter in model.parameters():
            parameter.mul_(amplify if parameter.ndim > 1 else 1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _first_with_image(row: dict[str, Any]) -> dict[str, Any]:
    """The row with one question: the first that shows an image, or the first."""
    turns = row['conversations']
    at = next((i for i, turn in enumerate(turns) if '<image>' in turn['value']), 0)
    return {**row, 'conversations': turns[at : at + 2]}


@pytest.fixture(scope='session')
def case(tiny_model, tiny_data, tmp_path_factory) -> Callable[..., Case]:
    """``case('llava')``: what a family needs to be trained, amplified so that leaks show; made once."""
    known: dict[str, Case] = {}

    def factory(name: str, *, amplify: float = 4.0, **overrides: Any) -> Case:
        key = repr((name, amplify, sorted(overrides.items())))
        if key not in known:
            if name in _TEXT:
                folder = tmp_path_factory.mktemp(name)
                path = _write_text_model(name, folder, tokenizer_of=tiny_model('llama'), amplify=amplify)
            else:
                path = tiny_model(name, amplify=amplify, **overrides)
            processor = Processor(str(path), prompt_template='vicuna' if name in ('llava', 'llava_next') else None)
            data = tiny_data('llava', rows=4, images=processor.family.has_vision)
            rows = load_rows(data.data_path)
            dataset = SupervisedDataset(
                [_first_with_image(row) for row in rows] if name == 'paligemma' else rows,
                processor=processor,
                dataset_map_fn=llava_map_fn,
                template_map_fn=chat_template_map_fn,
                image_folder=str(data.image_folder),
            )
            frames = getattr(processor.image_processor, 'temporal_patch_size', 1)
            samples = [finish_images(dataset[i], frames=frames) for i in range(len(dataset))]
            known[key] = Case(path, processor, samples)
        return known[key]

    return factory
