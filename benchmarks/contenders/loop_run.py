"""A packed training loop written by hand for this one model: what a good engineer gets without a framework.

Samples are processed up front by transformers' image processor and tokenizer, packed first-fit decreasing, kept apart
by restarting positions, and the loss is computed on supervised positions only.

python benchmarks/contenders/loop_run.py WORKLOAD MAX_LENGTH
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import LEARNING_RATE, MAX_NORM, THREADS, answer, resident_mib
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
from workload import read_rows

IMAGE_TOKEN = 5


def prepare(directory: Path, model: Qwen2_5_VLForConditionalGeneration) -> list[dict[str, torch.Tensor]]:
    """Token ids, labels, positions and pixels of every sample."""
    tokenizer = AutoTokenizer.from_pretrained(directory / 'model')
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(directory / 'model')
    samples = []
    for path, question, reply in read_rows(directory):
        pixels = image_processor(images=[Image.open(path).convert('RGB')], return_tensors='pt')
        grid = pixels['image_grid_thw']
        content = [{'type': 'image'}, {'type': 'text', 'text': question}]
        prompt = tokenizer.apply_chat_template(
            [{'role': 'user', 'content': content}], tokenize=False, add_generation_prompt=True
        )
        prompt = prompt.replace('<|image_pad|>', '<|image_pad|>' * (int(grid.prod()) // 4))
        before = tokenizer(prompt)['input_ids']
        ids = torch.tensor(before + tokenizer(f'{reply}<|im_end|>\n')['input_ids'])
        labels = ids.clone()
        labels[: len(before)] = -100
        labels[-1] = -100  # the line break behind the answer
        positions, _ = model.model.get_rope_index(
            ids[None], mm_token_type_ids=(ids == IMAGE_TOKEN).int()[None], image_grid_thw=grid
        )
        text = torch.arange(len(ids))[None]
        samples.append(dict(
            ids=ids, labels=labels, positions=torch.cat([text, positions[:, 0]]),
            pixels=pixels['pixel_values'], grid=grid,
        ))  # fmt: skip
    return samples


def pack(samples: list[dict[str, torch.Tensor]], max_length: int) -> list[list[dict[str, torch.Tensor]]]:
    """First-fit decreasing."""
    packs: list[list[dict[str, torch.Tensor]]] = []
    for sample in sorted(samples, key=lambda s: -len(s['ids'])):
        for other in packs:
            if sum(len(s['ids']) for s in other) + len(sample['ids']) <= max_length:
                other.append(sample)
                break
        else:
            packs.append([sample])
    return packs


def main() -> None:
    """Train one epoch and print the figures."""
    directory, max_length = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(THREADS)
    baseline = resident_mib()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory / 'model', dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    started = time.perf_counter()
    packs = pack(prepare(directory, model), max_length)
    batches = [
        {name: torch.cat([s[name] for s in samples], -1 if name == 'positions' else 0) for name in samples[0]}
        for samples in packs
    ]
    in_steps = time.perf_counter()
    for batch in batches:
        hidden = model.model(
            input_ids=batch['ids'][None], pixel_values=batch['pixels'], image_grid_thw=batch['grid'],
            position_ids=batch['positions'][:, None], use_cache=False,
        )[0]  # fmt: skip
        targets = batch['labels'][1:]
        keep = targets != -100
        loss = F.cross_entropy(model.lm_head(hidden[0, :-1][keep]), targets[keep])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    ended = time.perf_counter()
    samples = sum(len(samples) for samples in packs)
    answer(
        baseline_mib=baseline, step_seconds=ended - in_steps, total_seconds=ended - started, steps=len(packs),
        samples=samples,
    )  # fmt: skip


if __name__ == '__main__':
    main()
