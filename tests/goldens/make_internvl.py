"""Makes the goldens of InternVL2 with the official code, which lies elsewhere: ``make_internvl.py CHECKOUT``.

CHECKOUT is a clone of https://github.com/OpenGVLab/InternVL at the commit named below. It takes an environment with
transformers 4.37.2, sentencepiece 0.1.99, tokenizers 0.15.1, einops, peft 0.10.0, timm with torchvision, and the
Pillow of the tests: another one may resize in other steps. Tiny models with random weights answer prompts that the
official templates build; their images are cut by the official function.
"""

import argparse
import ast
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL
import sentencepiece
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer

COMMIT = '2410d1dbf208f0e799459aff9376e5747dbf41a2'
HERE = Path(__file__).parent
SEED = 5
TILE, MAX_TILES = 28, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_TOKENS = '<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>'.split()
CHAT_TOKENS = ['<|im_start|>', '<|im_end|>']
PHI3_TOKENS = ['<|system|>', '<|user|>', '<|assistant|>', '<|end|>']
TEXTS = [
    'What is in this picture?',
    'A bowl of noodles with egg.',
    'Which one is spicy?',
    '第二张图片里有什么？',
    '一碗面。',
]
CORPUS = [
    *TEXTS,
    'system user assistant',
    '你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL',
] * 4
CASES = {  # pairs of (question, answer), the last one open; sizes (width, height) of the images in order of their marks
    'one_image': ([('<image>\nWhat is in this picture?', None)], [(90, 60)]),
    'several_images': ([('Image-1: <image>\nImage-2: <image>\n第二张图片里有什么？', None)], [(40, 40), (50, 110)]),
    'several_turns': ([('<image>\nWhat is in this picture?', 'A bowl of noodles with egg.'),
                       ('Which one is spicy?', '一碗面。'), ('And now <the> rest?', None)], [(61, 33)]),
    'text_only': ([('Which one is spicy?', 'A bowl.'), ('第二张图片里有什么？', None)], []),
}  # fmt: skip
VISION = dict(
    architectures=['InternVisionModel'], model_type='intern_vit_6b', hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=2, image_size=TILE, patch_size=7, hidden_act='gelu', num_channels=3,
    layer_norm_eps=1e-6, drop_path_rate=0.0, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
SMALL = dict(norm_type='layer_norm', qkv_bias=True, qk_normalization=False, initializer_factor=1.0)
LARGE = dict(norm_type='rms_norm', qkv_bias=False, qk_normalization=True, initializer_factor=0.1)
TEXT = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=2048, rms_norm_eps=1e-5, hidden_act='silu', tie_word_embeddings=False)  # fmt: skip


def official_functions(path: Path, names: set[str]) -> dict:
    """Functions of a file whose imports are not wanted."""
    tree = ast.parse(path.read_text('utf-8'))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    scope: dict = {}
    exec(compile(tree, str(path), 'exec'), scope)
    return scope


def pieces(folder: Path, *, prefix: bool) -> str:
    """A tokenizer.model; ``prefix``: a space is put before every text."""
    made = io.BytesIO()  # a file would be named in the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=made, vocab_size=400, model_type='bpe', byte_fallback=True,
        character_coverage=1.0, add_dummy_prefix=prefix, remove_extra_whitespaces=False,
        normalization_rule_name='identity', hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / 'spm.model').write_bytes(made.getvalue())
    return str(folder / 'spm.model')


def internlm2_tokenizer(folder: Path):
    from internvl.model.internlm2.tokenization_internlm2 import InternLM2Tokenizer

    tokenizer = InternLM2Tokenizer(pieces(folder, prefix=False), padding_side='right')
    tokenizer.add_special_tokens({'additional_special_tokens': CHAT_TOKENS})
    tokenizer.add_tokens(IMAGE_TOKENS, special_tokens=True)
    return tokenizer


def llama_tokenizer(folder: Path, *, bos: bool, legacy: bool, chat_tokens: list[str]):
    file = pieces(folder, prefix=True)
    tokenizer = transformers.LlamaTokenizer(file, add_bos_token=bos, legacy=legacy, padding_side='right')
    added = [transformers.AddedToken(token, rstrip=not legacy, normalized=False) for token in chat_tokens]
    tokenizer.add_special_tokens({'additional_special_tokens': added})
    tokenizer.add_tokens(IMAGE_TOKENS, special_tokens=True)
    return tokenizer


def yi_tokenizer(folder: Path):
    return llama_tokenizer(folder, bos=False, legacy=True, chat_tokens=CHAT_TOKENS)


def phi3_tokenizer(folder: Path):
    """Its control tokens swallow the white space behind them."""
    return llama_tokenizer(folder, bos=True, legacy=False, chat_tokens=PHI3_TOKENS)


def qwen2_tokenizer(folder: Path):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(CORPUS, vocab_size=320, min_frequency=2, show_progress=False)
    bpe.save_model(str(folder))
    tokenizer = transformers.Qwen2Tokenizer(str(folder / 'vocab.json'), str(folder / 'merges.txt'))
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|endoftext|>', *CHAT_TOKENS]})
    tokenizer.add_tokens(IMAGE_TOKENS, special_tokens=True)
    return tokenizer


MODELS = {
    'internvl2_2b': dict(template='internlm2-chat', vision=SMALL, tokenizer=internlm2_tokenizer, llm=dict(
        architectures=['InternLM2ForCausalLM'], model_type='internlm2', bias=False, rope_theta=1000000,
        rope_scaling=dict(type='dynamic', factor=2.0), bos_token_id=1, eos_token_id=2, pad_token_id=2)),
    'internvl2_1b': dict(
        template='Hermes-2', vision=SMALL, tokenizer=qwen2_tokenizer, second_last_layer=['one_image'], llm=dict(
        architectures=['Qwen2ForCausalLM'], model_type='qwen2', rope_theta=1000000.0, rms_norm_eps=1e-6,
        use_sliding_window=False, sliding_window=32768, max_window_layers=24)),
    'internvl2_40b': dict(template='Hermes-2', vision=LARGE, cases=['one_image'], tokenizer=yi_tokenizer, llm=dict(
        architectures=['LlamaForCausalLM'], model_type='llama', rope_theta=5000000.0)),
    'internvl2_4b': dict(
        template='phi3-chat', vision=SMALL, cases=['one_image', 'text_only'], tokenizer=phi3_tokenizer, llm=dict(
        architectures=['Phi3ForCausalLM'], model_type='phi3', rope_theta=10000.0, num_key_value_heads=4,
        resid_pdrop=0.0, original_max_position_embeddings=64, sliding_window=None,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rope_scaling=dict(type='su', short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                          long_factor=[1.0, 1.3, 1.9, 2.7, 3.6, 5.0]))),
}  # fmt: skip


def fill(model: torch.nn.Module) -> None:
    """Weights that let an error show: activations of about 1, logits up to 3."""
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1 and 'embed' not in name:
            noise *= (0.8 if name.endswith(('output.weight', 'lm_head.weight')) else 1.6) / weight[0].numel() ** 0.5
        elif weight.ndim == 1:
            noise *= 0.2
        weight.data = noise + (0.8 if weight.ndim == 1 and not name.endswith('bias') else 0.0)


def pixels(images: list[Image.Image], cut) -> tuple[torch.Tensor, list[int]]:
    tiles = [cut(image, min_num=1, max_num=MAX_TILES, image_size=TILE, use_thumbnail=True) for image in images]
    arrays = np.stack([np.asarray(tile, np.float32) for of_one in tiles for tile in of_one]) / 255
    normal = (torch.from_numpy(arrays) - torch.tensor(MEAN)) / torch.tensor(STD)
    return normal.permute(0, 3, 1, 2).contiguous(), [len(of_one) for of_one in tiles]


def prompt_of(turns, template_name: str) -> str:
    from internvl.conversation import get_conv_template

    template = get_conv_template(template_name)
    for question, answer in turns:
        template.append_message(template.roles[0], question)
        template.append_message(template.roles[1], answer)
    return template.get_prompt()


def make(name: str, cut) -> None:
    from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel

    spec, tensors = MODELS[name], {}
    with tempfile.TemporaryDirectory() as temp:
        folder, saved = Path(temp), Path(temp) / 'saved'
        tokenizer = spec['tokenizer'](folder)
        tokenizer.save_pretrained(saved)
        files = {path.name: path.read_bytes() for path in sorted(saved.iterdir()) if path.suffix != '.py'}
    config = dict(
        architectures=['InternVLChatModel'], model_type='internvl_chat', template=spec['template'],
        auto_map={'AutoModel': 'modeling_internvl_chat.InternVLChatModel'}, downsample_ratio=0.5,
        dynamic_image_size=True, force_image_size=TILE, max_dynamic_patch=MAX_TILES, min_dynamic_patch=1,
        pad2square=False, ps_version='v2', select_layer=-1, use_backbone_lora=0, use_llm_lora=0, use_thumbnail=True,
        vision_config={**VISION, **spec['vision']}, llm_config={**TEXT, **spec['llm'], 'vocab_size': len(tokenizer)},
    )  # fmt: skip
    model = InternVLChatModel(InternVLChatConfig(**json.loads(json.dumps(config)))).eval()
    fill(model)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>')
    prompts = {}
    cases = {case: CASES[case] for case in spec.get('cases', CASES)}
    for case, (turns, sizes) in cases.items():
        random = np.random.default_rng(len(case))
        images = [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        values, counts = pixels(images, cut) if images else (torch.zeros(1, 3, TILE, TILE), [])
        prompts[case] = prompt_of(turns, spec['template'])
        query = prompts[case]
        for count in counts:
            query = query.replace('<image>', '<img>' + '<IMG_CONTEXT>' * model.num_image_token * count + '</img>', 1)
        ids = tokenizer(query, return_tensors='pt').input_ids
        with torch.no_grad():
            flags = torch.full((len(values), 1), int(bool(images)))
            logits = model(values, ids, torch.ones_like(ids), image_flags=flags).logits
        tensors |= {f'inputs/{case}/input_ids': ids[0], f'logits/{case}': logits[0]}
        tensors |= {f'inputs/{case}/image_{i}': torch.from_numpy(np.array(image)) for i, image in enumerate(images)}
        tensors |= {f'inputs/{case}/pixel_values': values} if images else {}
        if case in spec.get('second_last_layer', ()):
            model.select_layer = -2
            with torch.no_grad():
                tensors[f'second_last_layer/{case}'] = model(
                    values, ids, torch.ones_like(ids), image_flags=flags
                ).logits[0]
            model.select_layer = -1
        print(name, case, tuple(ids.shape), counts, 'logits', float(logits.std()), float(logits.abs().max()))
    tensors |= {f'weights/{key}': value for key, value in model.state_dict().items()}
    tensors |= {f'files/{key}': torch.tensor(list(value), dtype=torch.uint8) for key, value in files.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, HERE / f'{name}.safetensors')
    note = dict(
        repository='https://github.com/OpenGVLab/InternVL', commit=COMMIT, config=config, seed=SEED,
        files=['internvl_chat/internvl/model', 'internvl_chat/internvl/conversation.py',
               'internvl_chat/internvl/train/dataset.py'],
        versions=dict(torch=torch.__version__, transformers=transformers.__version__,
                      sentencepiece=sentencepiece.__version__, pillow=PIL.__version__),
        how='A tiny InternVLChatModel with random weights, prompts of the official templates, images cut by the '
            'official dynamic_preprocess; float32 on the CPU. Made by tests/goldens/make_internvl.py.',
        prompts=prompts, cases={case: dict(turns=turns, sizes=sizes) for case, (turns, sizes) in cases.items()},
    )  # fmt: skip
    (HERE / f'{name}.json').write_text(json.dumps(note, indent=1, ensure_ascii=False) + '\n', 'utf-8')


class Probe:
    """An image of a size, which notes to what it is resized first."""

    def __init__(self, *size: int) -> None:
        self.size, self.resized = size, None

    def resize(self, size: tuple[int, int]) -> 'Probe':
        self.resized = self.resized or size
        return self

    def crop(self, box: tuple[int, ...]) -> 'Probe':
        return self


def make_tile_choices(cut) -> None:
    """The official number of columns and rows over many sizes: (most tiles, width, height, columns, rows)."""
    random = np.random.default_rng(SEED)
    sizes = [(w, h) for w in range(40, 1400, 40) for h in range(40, 1400, 40)]
    sizes += [tuple(size) for size in random.integers(20, 3000, (3000, 2)).tolist()]
    found = []
    for most in (1, 2, 4, 6, 12):
        for size in sizes:
            probe = Probe(*size)
            cut(probe, min_num=1, max_num=most, image_size=448, use_thumbnail=True)
            found.append((most, *size, *(side // 448 for side in probe.resized)))
    save_file({'choices': torch.tensor(found, dtype=torch.int16)}, HERE / 'internvl2_tiles.safetensors')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('checkout', type=Path)
    checkout = parser.parse_args().checkout / 'internvl_chat'
    sys.path.insert(0, str(checkout))
    cut = official_functions(
        checkout / 'internvl/train/dataset.py', {'dynamic_preprocess', 'find_closest_aspect_ratio'}
    )
    for name in MODELS:
        make(name, cut['dynamic_preprocess'])
    make_tile_choices(cut['dynamic_preprocess'])
