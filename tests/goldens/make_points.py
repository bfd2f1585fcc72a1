"""Makes points_reader.* and points_1_5.*: what the official code of POINTS computes with tiny random weights.

To be run where transformers 4.55.2 is installed, the version that the model's page names, and the Pillow of the tests
(another one may resize in other steps), with three folders: the Python files of the model repository, a checkout of
WePOINTS, and the tokenizer.json of the tiny model 'points'. The classes are used as they are; only what they fix in
their code is put in their place for the run: eager attention for flash attention, and the width of the tiny tower for
1280.
"""

import argparse
import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

SEED = 0
TEXT = {'vocab_size': 448, 'hidden_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4}
LLMS: dict[str, dict[str, Any]] = {
    'points_reader': TEXT
    | {
        'model_type': 'qwen2',
        'intermediate_size': 128,
        'num_key_value_heads': 2,
        'rope_theta': 1000000.0,
        'rms_norm_eps': 1e-06,
        'max_position_embeddings': 2048,
        'tie_word_embeddings': True,
    },
    'points_1_5': TEXT
    | {
        'model_type': 'custom_llama',
        'num_layers': 2,
        'num_kv_heads': 2,
        'ffn_hidden_size': 128,
        'hidden_act': 'swiglu',
        'norm_type': 'rms_norm',
        'layernorm_epsilon': 1e-05,
        'rotary_emb_base': 1000000.0,
        'rotary_pct': 1.0,
        'rotary_compress': 1.0,
        'max_position_embeddings': 2048,
        'qkv_proj_bias': True,
        'out_proj_bias': False,
        'mlp_fc1_bias': False,
        'mlp_fc2_bias': False,
        'tie_word_embeddings': False,
    },
}
VISION = {
    'model_type': 'qwen2_vl',
    'depth': 2,
    'embed_dim': 32,
    'hidden_size': 48,
    'num_heads': 4,
    'mlp_ratio': 2,
    'hidden_act': 'quick_gelu',
    'in_channels': 3,
    'patch_size': 14,
    'spatial_merge_size': 2,
    'temporal_patch_size': 2,
}
PIXELS = {'min_pixels': 784, 'max_pixels': 784 * 8}
IMAGE, TWO_IMAGES = [('image', (61, 90))], [('image', (61, 90)), ('image', (40, 33))]
CASES: dict[str, list[tuple[str, list[tuple[str, Any]]]]] = {
    'one_image': [('user', [*IMAGE, ('text', 'Read the receipt and answer with the total.')])],
    'several_images': [('user', [*TWO_IMAGES, ('text', 'Which picture shows a red square?')])],
    'several_turns': [
        ('user', [*IMAGE, ('text', 'What is in the picture?')]),
        ('assistant', [('text', 'A blue square.')]),
        ('user', [('text', 'And here?'), ('image', (30, 100))]),
        ('assistant', [('text', 'A circle.')]),
        ('user', [('text', 'Sure?')]),
    ],
    'text_only': [('user', [('text', 'How many shapes are there?')])],
}


def load_official(folder: Path, wepoints: Path) -> Any:
    """The model's module, as part of a package, for some files import each other relatively."""
    sys.path[:0] = [str(folder), str(folder.parent), str(wepoints)]
    return importlib.import_module(f'{folder.name}.modeling_pointsv15_chat')


def build(module: Any, config: dict[str, Any]) -> Any:
    """The official model with random weights, amplified so that every one of them shows in the logits."""
    tower = module.Qwen2VisionTransformerForNavitPOINTS
    module.Qwen2VisionTransformerForNavitPOINTS = tower_maker = type('Tower', (), {})
    tower_maker._from_config = staticmethod(functools.partial(_eager, tower))  # type: ignore[attr-defined]
    merger = module.PatchMerger
    module.PatchMerger = lambda width, context_dim: merger(width, context_dim=config['vision_config']['embed_dim'])
    if hasattr(module, 'Qwen2ForCausalLM'):
        module.Qwen2ForCausalLM = functools.partial(_eager_llm, module.Qwen2ForCausalLM)
    official = module.POINTSV15ChatConfig(**json.loads(json.dumps(config)))
    torch.manual_seed(SEED)
    model = module.POINTSV15ChatModel(official).float().eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim == 1 else 2.0 / parameter[0].numel() ** 0.5
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.min() < 1 else 1 + noise)  # norms stay around one
        embeddings = model.llm.get_input_embeddings() or model.llm.lm.embed_in
        embeddings.weight.copy_(0.25 * torch.randn(embeddings.weight.shape, generator=generator))
    return model


def _eager(tower: Any, config: Any, **_: Any) -> Any:
    return tower._from_config(config, attn_implementation='eager')


def _eager_llm(llm: Any, config: Any) -> Any:
    config._attn_implementation = 'eager'
    return llm(config)


def make_images(case: str, folder: Path) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """The messages of a case in the official form, and its images."""
    random = np.random.default_rng(len(case))
    messages, images = [], []
    for role, parts in CASES[case]:
        content: list[dict[str, Any]] = []
        for kind, value in parts:
            if kind == 'image':
                images.append(random.integers(0, 256, (*value, 3), dtype=np.uint8))
                path = folder / f'{case}_{len(images)}.png'
                Image.fromarray(images[-1]).save(path)
                content.append({'type': 'image', 'image': str(path)})
            else:
                content.append({'type': 'text', 'text': value})
        messages.append({'role': role, 'content': content})
    return messages, images


@torch.no_grad()
def run(
    model: Any, module: Any, messages: list[dict[str, Any]], tokenizer: Any
) -> tuple[str, dict[str, torch.Tensor], torch.Tensor]:
    """Prompt, inputs and logits; the official ``generate`` puts the features in place, its LLM runs once over all."""
    processor = module.Qwen2VLImageProcessor(**PIXELS)
    prompt, images, grids = model.construct_prompt(messages, processor)
    ids = tokenizer(prompt, return_tensors='pt')['input_ids']
    inputs = {'input_ids': ids}
    if not images:
        return prompt, inputs, model.llm(input_ids=ids).logits
    pixels = torch.stack([torch.as_tensor(patch) for patch in images])
    grid = torch.as_tensor(np.concatenate(grids, axis=0))
    model.llm.generate = lambda inputs_embeds, attention_mask, **_: (
        model.llm(inputs_embeds=inputs_embeds, attention_mask=attention_mask).logits
    )
    logits = model.generate(
        input_ids=ids,
        image_grid_thws=grid,
        attention_mask=torch.ones_like(ids),
        image_features=[model.process_images(pixels, grid)],
        image_token_id=tokenizer.convert_tokens_to_ids('<|image_pad|>'),
    )
    return prompt, inputs | {'pixel_values': pixels.float(), 'image_grid_thw': grid.long()}, logits


def main() -> None:
    """Writes the two files beside this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('name', choices=sorted(LLMS))
    parser.add_argument('official', type=Path, help='folder with modeling_pointsv15_chat.py')
    parser.add_argument('wepoints', type=Path, help='checkout of WePOINTS')
    parser.add_argument('tokenizer', type=Path, help='folder with tokenizer.json')
    parser.add_argument('--source', nargs='+', default=[], help='repository@commit of the code, for the note')
    arguments = parser.parse_args()
    config = {
        'architectures': ['POINTSV15ChatModel'],
        'model_type': 'pointsv1.5_chat',
        'llm_config': LLMS[arguments.name],
        'vision_config': VISION,
    }
    module = load_official(arguments.official, arguments.wepoints)
    model = build(module, config)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(arguments.tokenizer / 'tokenizer.json'))
    tied = config['llm_config']['tie_word_embeddings']  # type: ignore[index]
    tensors = {
        f'weights/{name}': tensor.clone().contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == 'llm.lm_head.weight')
    }
    note: dict[str, Any] = {'code': arguments.source, 'config': config, 'preprocessor': PIXELS, 'seed': SEED}
    note['versions'] = {m.__name__: m.__version__ for m in (torch, transformers)} | {'pillow': PIL.__version__}
    note['how'] = ' '.join((__doc__ or '').split('\n\n')[1].split())
    note['prompts'] = {}
    scratch = arguments.official.parent
    for case, turns in CASES.items():
        messages, images = make_images(case, scratch)
        prompt, inputs, logits = run(model, module, messages, tokenizer)
        note['prompts'][case] = {'messages': turns, 'text': prompt}
        tensors |= {f'inputs/{case}/{name}': tensor.contiguous() for name, tensor in inputs.items()}
        tensors |= {f'images/{case}/{i}': torch.from_numpy(image) for i, image in enumerate(images)}
        tensors[f'logits/{case}'] = logits.float().contiguous()
        print(case, tuple(logits.shape), float(logits.std()), float(logits.abs().max()))
    here = Path(__file__).resolve().parent / arguments.name
    save_file(tensors, here.with_suffix('.safetensors'))
    here.with_suffix('.json').write_text(json.dumps(note, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
