"""Work dirs as runs leave them, without a run: what ``vlmtune report`` reads."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

_CONFIG = """from torch.optim import AdamW

lr = {lr}
train_dataloader = dict(dataset=dict(image_folder={images!r}, max_length=256), batch_size=16)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr={lr}))
"""
_COLOURS = ('red', 'green', 'blue')


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A file of JSON lines; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def tiny_step(number: int, **others: Any) -> dict[str, Any]:
    """A line of ``metrics.jsonl``."""
    speed = dict(tokens_per_second=5000.0 + number, learned_tokens_per_second=700.0, samples=16.0, memory_mib=2048.0)
    times = dict(time=0.5, data_time=0.05, vision_time=0.1, llm_time=0.3, optimizer_time=0.05, data_time_share=0.1)
    return dict(step=number, epoch=0, loss=6 / number, grad_norm=1 / number, lr=1e-4) | speed | times | others


def tiny_prediction(index: int, answer: str, reference: str, **others: Any) -> dict[str, Any]:
    """A line of ``predictions.jsonl``; its picture is ``<index>.png``."""
    asked = dict(where=f'test.jsonl:{index + 1}', question=f'Question {index}?', references=[reference])
    images = dict(images=[f'{index}.png'], image_sizes=[[400 + 100 * index, 300]], image_tokens=4 + index)
    spent = dict(prompt_tokens=20, output_tokens=3, seconds=0.25 + index / 10, finish='stop')
    return dict(index=index, prediction=answer, scores={}) | asked | images | spent | others


def write_tiny_run(folder: Path, *, steps: int = 60, lr: float = 1e-4) -> Path:
    """A whole run with a test of three answers, two of them wrong; pictures lie in ``pictures`` beside the folder.

    Args:
        folder: the work dir, made here.
        steps: of the run; it is validated every twenty.
        lr: its learning rate.
    """
    pictures = folder.parent / 'pictures'
    pictures.mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate(_COLOURS):
        Image.new('RGB', (400 + 100 * i, 300), colour).save(pictures / f'{i}.png')
    log = folder / '20260101_000000'
    write_lines(log / 'metrics.jsonl', [tiny_step(i + 1, lr=lr) for i in range(steps)])
    (log / 'config.py').write_text(_CONFIG.format(lr=lr, images=str(pictures)))
    parts = [dict(part='llm', mode='lora', parameters=76096, trainable=1792, lr=lr)]
    (log / 'parts.json').write_text(json.dumps(parts))
    validated = [
        dict(iteration=i, epoch=0, loss=6 / i, cer=1 / i, seconds=1.0, samples=4) for i in range(20, steps, 20)
    ]
    write_lines(folder / 'validation.jsonl', validated)
    asked = dict(input='What is it?', images=[str(pictures / '0.png')])
    chats = [dict(iteration=i, answer=f'answer {i}', **asked) for i in (0, 20, 40, steps)]
    write_lines(folder / 'evaluate_chat.jsonl', chats)
    answers = [
        tiny_prediction(0, 'a red square', 'a red square', scores={'anls': 1.0}),
        tiny_prediction(1, 'a grey square', 'a green square', scores={'anls': 0.7}),
        tiny_prediction(2, 'nothing', 'a blue square', scores={'anls': 0.0}, finish='length'),
    ]
    write_lines(folder / 'test' / f'iter_{steps}' / 'predictions.jsonl', answers)
    speed = [dict(size='up to 512 x 512', samples=3, seconds=0.35, output_tokens=3.0, tokens_per_second=8.57)]
    summary = dict(metrics=dict(anls=0.5667), samples=3, generation=dict(max_new_tokens=9), skipped=[], speed=speed)
    (folder / 'test' / f'iter_{steps}' / 'metrics.json').write_text(json.dumps(summary))
    return folder
