"""Makes minicpmv.*: what the official code of MiniCPM-V-2 computes with tiny random weights.

To be run where transformers 4.40.2, timm 0.9.10, torchvision, sentencepiece and the Pillow of the tests (another one
may resize in other steps) are installed, with the folder of a checkpoint: its Python files and its config.json; its
weights are not read. The classes are used as they are. A tiny vision transformer is registered with timm beside the
real one, and ``generate`` of the one object is replaced to catch the prompt and the pictures that ``chat`` makes.
"""

import argparse
import importlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import sentencepiece
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

# torchvision's compiled operations are not needed, but timm asks for their names.
OPERATIONS = torch.library.Library('torchvision', 'DEF')
for operation in ('nms', 'qnms'):
    OPERATIONS.define(f'{operation}(Tensor dets, Tensor scores, float limit) -> Tensor')
import timm  # noqa: E402

SEED = 0
TINY = {
    'hidden_size': 128,
    'intermediate_size': 64,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'dim_model_base': 64,
    'query_num': 16,
    'scale_resolution': 84,
    'max_slice_nums': 6,
    'vision_encoder': 'vit_test_patch14_siglip_84',
}
CORPUS = [
    'What is in the picture? A red square and a blue circle.',
    'Read the receipt and answer with the total. 12.50',
    '这张图片里有什么?一个红色的方块。',
    'And what is left of it? Nothing.',
]
SYMBOLS = [f'<{mark}{name}>' for name in 'image ref box quad point slice'.split() for mark in ('', '/')]
TURNS = [
    {'role': 'user', 'content': 'What is in the picture?'},
    {'role': 'assistant', 'content': 'A red square.'},
    {'role': 'user', 'content': '这里呢?\nAnd what is left of it?'},
]
# Sizes (width, height): cut into slices, scaled up whole, higher than wide.
SIZES = {'wide': (200, 110), 'small': (60, 45), 'high': (70, 190)}


@timm.models.register_model
def vit_test_patch14_siglip_84(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
    """The real tower's kind, small."""
    shape = dict(img_size=84, patch_size=14, embed_dim=32, depth=3, num_heads=4, mlp_ratio=3.7362)
    kwargs = {name: value for name, value in kwargs.items() if not name.startswith('pretrained')}
    return timm.models.VisionTransformer(**shape, class_token=False, global_pool='map', **kwargs)


def tiny_tokenizer(folder: Path) -> None:
    """tokenizer.model: byte pairs with bytes for unknown characters; the symbols are pieces, as in the real one."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=written,
        model_type='bpe',
        vocab_size=360,
        byte_fallback=True,
        user_defined_symbols=SYMBOLS,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / 'tokenizer.model').write_bytes(written.getvalue())


def pictures() -> dict[str, Image.Image]:
    """Smooth noise: a resize with another filter, or by another size, shows."""
    random = np.random.default_rng(SEED)
    coarse = {name: random.integers(0, 256, (h // 9, w // 9, 3), np.uint8) for name, (w, h) in SIZES.items()}
    return {name: Image.fromarray(c).resize(SIZES[name], Image.Resampling.BILINEAR) for name, c in coarse.items()}


def randomise(model: torch.nn.Module) -> None:
    """Weights of a size that shows errors, in bfloat16 as in the real checkpoint."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name == 'resampler.pos_embed':
                value = weight
            elif weight.ndim == 1:
                value = weight + 0.2 * noise
            elif name == 'llm.lm_head.weight':
                value = 2 * noise / weight[0].numel() ** 0.5
            elif 'embed' in name or name == 'resampler.query':
                value = 0.5 * noise if 'llm' not in name else 0.1 * noise
            else:
                value = 1.2 * noise / weight[0].numel() ** 0.5
            weight.copy_(value.bfloat16().float())


def run(model: Any, tokenizer: Any, prompt: str, shown: list[Image.Image]) -> tuple[dict[str, Any], torch.Tensor]:
    """The inputs that the official code makes of a prompt and pictures, and its logits."""
    inputs = model._convert_to_tensors(tokenizer, prompt)
    pixels = [model.transform(picture) for picture in shown]
    found = {'input_ids': inputs['input_ids'][0].int()}
    found |= {f'slice_{i}': ((p * 0.5 + 0.5) * 255).round().to(torch.uint8) for i, p in enumerate(pixels)}
    length = torch.arange(inputs['input_ids'].shape[1])[None]
    data = dict(inputs, image_bound=[inputs['image_bound']], pixel_values=[pixels], position_ids=length)
    with torch.no_grad():
        return found, model(data, use_cache=False).logits[0]


def chat_case(model: Any, tokenizer: Any, image: Image.Image | None, turns: list[dict]) -> tuple[str, list]:
    """The prompt and the pictures that ``chat`` hands to ``generate``."""
    caught: dict[str, Any] = {}

    def generate(**kwargs: Any) -> tuple[list[str], None]:
        caught.update(kwargs)
        return [''], None

    model.generate = generate
    model.chat(image, turns, None, tokenizer)
    return caught['data_list'][0], caught['img_list'][0]


def build(code: Path, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The official model and tokenizer, and the config."""
    sys.path.insert(0, str(code.parent))
    modelling = importlib.import_module(f'{code.name}.modeling_minicpmv')
    config = json.loads((code / 'config.json').read_text()) | TINY
    tiny_tokenizer(folder)
    for name in ('tokenizer_config.json', 'special_tokens_map.json'):
        (folder / name).write_text((code / name).read_text())
    settings = json.loads((folder / 'tokenizer_config.json').read_text())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
    added = settings['added_tokens_decoder'].values()
    settings['added_tokens_decoder'] = {str(pieces.piece_to_id(token['content'])): token for token in added}
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    tokenizer = modelling.LlamaTokenizerWrapper.from_pretrained(folder)
    config['vocab_size'] = len(tokenizer)
    torch.manual_seed(SEED)
    model = modelling.MiniCPMV(modelling.MiniCPMVConfig(**config)).eval()
    randomise(model)
    return model, tokenizer, {'config': config, 'tokenizer_config': settings}


class Shape:
    """An image of which only the size is asked."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def copy(self) -> 'Shape':
        return self

    def resize(self, size: tuple[int, int], _: Any) -> 'Shape':
        return Shape(size)

    def crop(self, box: tuple[int, int, int, int]) -> 'Shape':
        return Shape((box[2] - box[0], box[3] - box[1]))


def plans(slice_image: Any) -> torch.Tensor:
    """int16[2000, 10]: width, height, most slices, side of a view, then what the official code makes of these.

    Those are width and height of the whole view, columns and rows of slices, width and height of a slice.
    """
    random = np.random.default_rng(SEED)
    rows = []
    for width, height in np.exp(random.uniform(1, 9, (2000, 2))).astype(int).tolist():
        most, side = ((9, 448), (9, 448), (1, 448), (4, 448), (6, 84), (2, 336))[int(random.integers(6))]
        whole, slices, _ = slice_image(Shape((width, height)), most, side, 14)
        cut = (len(slices[0]), len(slices), *slices[0][0].size) if slices else (0, 0, 0, 0)
        rows.append((width, height, most, side, *whole.size, *cut))
    return torch.tensor(rows, dtype=torch.int16)


def main() -> None:
    """Writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('code', type=Path, help='folder with the Python files of a checkpoint and its config.json')
    parser.add_argument('source', help='public repository@commit of that folder')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, files = build(arguments.code.resolve(), Path(folder))
        spm = np.fromfile(Path(folder) / 'tokenizer.model', np.uint8)
    shown = pictures()
    two = [model.get_slice_image_placeholder(shown[name], tokenizer) for name in ('small', 'high')]
    prompt = ''.join(f'{text}\n' for _, text in two)
    cases = {
        'one_image': chat_case(model, tokenizer, shown['wide'], TURNS[:1]),
        'several_images': (f'<用户>{prompt}{TURNS[2]["content"]}<AI>', [p for parts, _ in two for p in parts]),
        'several_turns': chat_case(model, tokenizer, shown['small'], TURNS),
        'text_only': chat_case(model, tokenizer, None, TURNS[2:]),
    }
    tensors = {f'weights/{name}': tensor.bfloat16() for name, tensor in model.state_dict().items()}
    tensors['files/tokenizer.model'] = torch.from_numpy(spm)
    tensors['plans'] = plans(sys.modules[type(model).__module__].slice_image)
    tensors |= {f'pictures/{name}': torch.from_numpy(np.array(picture)) for name, picture in shown.items()}
    for case, (text, parts) in cases.items():
        found, logits = run(model, tokenizer, text, parts)
        tensors |= {f'inputs/{case}/{name}': tensor for name, tensor in found.items()}
        tensors[f'logits/{case}'] = logits
        print(case, len(found['input_ids']), len(parts), float(logits.std()))
    here = Path(__file__).parent
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, here / 'minicpmv.safetensors')
    note = {
        'code': f'{arguments.source} modeling_minicpmv.py, modeling_minicpm.py, resampler.py, configuration_minicpm.py',
        **files,
        'turns': TURNS,
        'seed': SEED,
        'versions': {m.__name__: m.__version__ for m in (torch, transformers, timm, sentencepiece)}
        | {'pillow': PIL.__version__},
        'how': ' '.join((__doc__ or '').split()),
    }
    (here / 'minicpmv.json').write_text(json.dumps(note, indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
    main()
