"""Makes the goldens of LLaVA from parts with XTuner, which lies elsewhere: ``make_llava_parts.py XTUNER INTERNVL``.

XTUNER is a clone of https://github.com/InternLM/xtuner at v0.1.23, INTERNVL one of OpenGVLab/InternVL there, whose
``internlm2`` folder holds the code of the InternLM2 repositories; COMMITS names both. It takes an environment with
transformers 4.42.4, peft 0.11.1, accelerate, mmengine and einops. XTuner's ``LLaVAModel`` joins a tiny InternLM2 and
a tiny CLIP with random weights, answers once as it is and once with random adapters on both, and writes three folders.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import peft
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

COMMITS = {
    'https://github.com/InternLM/xtuner': '94a4fcb0f53d63ceb85334bb456c073251669ccb',
    'https://github.com/OpenGVLab/InternVL': '2410d1dbf208f0e799459aff9376e5747dbf41a2',
}
HERE = Path(__file__).parent
SEED, VOCAB, SIDE = 7, 320, 42
SIZES = ((30, 51), (52, 23), (40, 40), (9, 80), (43, 42))  # height, width
IMAGE = -200  # XTuner's mark of an image among token ids
LLM: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, bias=False, rope_theta=1000000,
    bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
TOWER: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=14,
    projection_dim=32,
)  # fmt: skip
FOLDERS = {'llm_adapter': 'adapter_', 'visual_encoder_adapter': 'adapter_', 'projector': ''}


@torch.no_grad()
def amplify(model: torch.nn.Module, factor: float) -> None:
    """Fresh weights are so small that errors hardly show."""
    for parameter in model.parameters():
        if parameter.min() == parameter.max():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if parameter.ndim > 1:
            parameter.mul_(factor)


def make_cases() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(SEED)

    def text(length: int) -> list[int]:
        return torch.randint(5, VOCAB, (length,), generator=random).tolist()

    rows = {
        'one_image': [*text(4), IMAGE, *text(9)],
        'several_images': [*text(3), IMAGE, *text(5), IMAGE, *text(4)],
        'several_turns': [*text(4), IMAGE, *text(24)],
        'text_only': text(14),
    }
    return {
        name: (torch.tensor(ids), torch.randn(ids.count(IMAGE), 3, SIDE, SIDE, generator=random))
        for name, ids in rows.items()
    }


def run(model: Any, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    data = dict(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]).bool())
    if len(pixels):
        data |= dict(pixel_values=pixels, position_ids=torch.arange(len(ids))[None])
    with torch.no_grad():
        return model.eval()(data, mode='tensor').logits[0]


def make_pixels(xtuner: Path) -> dict[str, torch.Tensor]:
    """Images padded to squares by the official function, and what CLIP's image processor makes of them."""
    spec = importlib.util.spec_from_file_location('utils', xtuner / 'xtuner/dataset/utils.py')
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    processor = CLIPImageProcessor(size={'shortest_edge': SIDE}, crop_size={'height': SIDE, 'width': SIDE})
    random = numpy.random.default_rng(SEED)
    found = {}
    for height, width in SIZES:
        pixels = random.integers(0, 256, (height, width, 3), dtype=numpy.uint8)
        square = official.expand2square(Image.fromarray(pixels), tuple(int(x * 255) for x in processor.image_mean))
        found[f'images/{height}x{width}'] = torch.from_numpy(pixels)
        found[f'pixels/{height}x{width}'] = processor.preprocess(square, return_tensors='pt')['pixel_values'][0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('xtuner', type=Path)
    parser.add_argument('internvl', type=Path)
    arguments = parser.parse_args()
    sys.path[:0] = [str(arguments.xtuner), str(arguments.internvl / 'internvl_chat/internvl/model')]
    import xtuner.model.llava as official
    from internlm2.configuration_internlm2 import InternLM2Config
    from internlm2.modeling_internlm2 import InternLM2ForCausalLM

    official.dispatch_modules = lambda model: None  # it puts kernels for GPUs in place

    def build(**adapters: Any) -> Any:
        torch.manual_seed(SEED)
        llm = InternLM2ForCausalLM(InternLM2Config(**LLM, attn_implementation='eager'))
        tower = CLIPVisionModel(CLIPVisionConfig(**TOWER))
        amplify(llm, 4.5)
        amplify(tower, 4.0)
        parts = {'llm': dict(llm.state_dict()), 'visual_encoder': dict(tower.state_dict())}
        frozen = dict(freeze_llm=True, freeze_visual_encoder=True, use_activation_checkpointing=False)
        model = official.LLaVAModel(llm, tower, **frozen, **adapters)
        amplify(model.projector, 3.0)
        return model, parts

    plain, parts = build()
    tensors = {
        f'weights/{part}/{name}': tensor
        for part, state in parts.items()
        for name, tensor in state.items()
        if not name.endswith(('inv_freq', 'position_ids'))
    }
    tensors |= {f'weights/pth/{name}': tensor for name, tensor in plain.state_dict().items()}
    lora = dict(lora_dropout=0.05, bias='none')
    adapted, _ = build(
        llm_lora=peft.LoraConfig(r=4, lora_alpha=8, task_type='CAUSAL_LM', **lora),
        visual_encoder_lora=peft.LoraConfig(r=3, lora_alpha=12, **lora),
    )
    adapted.projector.load_state_dict(plain.projector.state_dict())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if 'lora_B' in name:
                parameter.normal_(0, 0.1)
    for name, (ids, pixels) in make_cases().items():
        tensors[f'inputs/{name}/input_ids'], tensors[f'inputs/{name}/pixel_values'] = ids, pixels
        tensors[f'logits/{name}'], tensors[f'adapted/{name}'] = run(plain, ids, pixels), run(adapted, ids, pixels)
    tensors |= make_pixels(arguments.xtuner)
    settings = {}
    with tempfile.TemporaryDirectory() as folder:
        adapted.to_hf(cfg=None, save_dir=folder, fp32=True, save_format='xtuner')
        for part, kind in FOLDERS.items():
            file = Path(folder, part, f'{kind}model.safetensors')
            tensors |= {f'folders/{part}/{name}': tensor for name, tensor in load_file(file).items()}
            settings[part] = json.loads(Path(folder, part, f'{kind}config.json').read_text())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / 'llava_parts.safetensors')
    note = {
        'code': [f'{name.removeprefix("https://github.com/")}@{commit}' for name, commit in COMMITS.items()],
        'config': {'model_type': 'llava_parts'},
        'repositories': COMMITS,
        'files': ['xtuner/model/llava.py', 'internvl_chat/internvl/model/internlm2/modeling_internlm2.py'],
        'seed': SEED,
        'versions': dict(transformers=transformers.__version__, peft=peft.__version__, torch=torch.__version__),
        'how': 'make_llava_parts.py: LLaVAModel in float32 and eager attention, one row at a time, mode="tensor"; then '
        'with random adapters, which its to_hf wrote into folders',
        'llm': LLM,
        'visual_encoder': TOWER,
        'folders': settings,
        'pth_with_adapters': [name for name in adapted.state_dict() if '.lora_' in name][:1],
    }
    (HERE / 'llava_parts.json').write_text(json.dumps(note, indent=1) + '\n')


if __name__ == '__main__':
    main()
