"""Saving and loading a checkpoint: seconds and bytes, against torch.save of the same tensors.

A Qwen2.5-VL of random weights, in float32 with AdamW, trained for one step in full and with LoRA. The limit is
`torch.save` of the trained weights and the optimizer's state with one `fsync`, and `torch.load(weights_only=True)` of
that file; a checkpoint also has hashes of all its files, random generators, processor and config.

python benchmarks/checkpoint_speed.py [--hidden 768] [--layers 4] [--rounds 3] [--folder DIR]
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlmtune.config import load_config
from vlmtune.engine import Runner

CONTENDERS = Path(__file__).parent / 'contenders'
sys.path.insert(0, str(CONTENDERS))
from workload import VOCABULARY, Kind, write_files, write_rows  # noqa: E402  (a script's neighbour, not a package)

ROWS = Kind(heights=(56,), widths=(56,), mean=2.0, sigma=0.5, longest=30, rows=8)
NOTES = """
Seconds are medians. Files are in the page cache when they are read, on both sides; saving ends when they are on disk.
Loading is `--resume`: hashes are checked, weights, moments, schedules and positions are put back.
"""


class TimedRunner(Runner):
    """Keeps the seconds of its resume."""

    seconds = 0.0

    def load_or_resume(self) -> None:
        """As ever."""
        started = time.perf_counter()
        super().load_or_resume()
        self.seconds = time.perf_counter() - started


def write_model(path: Path, *, hidden: int, layers: int) -> None:
    """Random weights."""
    text = dict(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=8192,
        rope_parameters={'rope_type': 'default', 'rope_theta': 10000.0, 'mrope_section': [8, 12, 12]},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=64, out_hidden_size=hidden, intermediate_size=128, num_heads=2, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2, fullatt_block_indexes=[1], window_size=112,
    )  # fmt: skip
    special = dict(
        image_token_id=5, video_token_id=VOCABULARY - 1, vision_start_token_id=3, vision_end_token_id=4
    )  # fmt: skip
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    write_files(path)


def build(workload: Path, work_dir: Path, mode: str, **more: Any) -> TimedRunner:
    """A run of one step."""
    settings = dict(workload=str(workload), llm=mode, vision='full' if mode == 'full' else 'frozen')
    cfg = load_config(str(CONTENDERS / 'vlmtune_config.py'), {**settings, 'max_epochs': None, 'max_steps': 1})
    cfg.work_dir = str(work_dir)
    cfg.log_level = 'WARNING'
    cfg.update(more)
    return TimedRunner.from_cfg(cfg)


def seconds_of(action: Callable[[], object], rounds: int) -> float:
    """The median."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def save_limit(state: dict[str, Any], path: Path) -> None:
    """torch.save, on disk when it returns."""
    with path.open('wb') as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def measure(workload: Path, folder: Path, mode: str, rounds: int) -> str:
    """A line of the table for ours and one for the limit."""
    runner = build(workload, folder / f'{mode}_run', mode)
    runner.train()
    saved = folder / f'{mode}_saved'
    save = seconds_of(lambda: runner.save_checkpoint(str(saved), 'iter_1.pth'), rounds)
    weights = {name: p.detach() for name, p in runner.model.named_trainable().items()}
    state = dict(weights=weights, optimizer=runner.optim_wrapper.optimizer.state_dict())
    limit = folder / f'{mode}.pt'
    limit_save = seconds_of(lambda: save_limit(state, limit), rounds)
    limit_load = seconds_of(lambda: torch.load(limit, map_location='cpu', weights_only=True), rounds)
    loads = []
    for number in range(rounds):
        again = build(workload, folder / f'{mode}_again{number}', mode, resume=str(saved / 'iter_1.pth'))
        again.train()
        loads.append(again.seconds)
    size = sum(path.stat().st_size for path in (saved / 'iter_1.pth').rglob('*') if path.is_file())
    load = statistics.median(loads)
    share = f'{limit_save / save:.2f} | {limit_load / load:.2f}'
    return '\n'.join((
        f'| {mode}, vlmtune | {size / 1e6:,.1f} | {save:.2f} | {load:.2f} | {share} |',
        f'| {mode}, torch.save | {limit.stat().st_size / 1e6:,.1f} | {limit_save:.2f} | {limit_load:.2f} | 1 | 1 |',
    ))  # fmt: skip


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--hidden', type=int, default=768)
    parser.add_argument('--layers', type=int, default=4)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument(
        '--folder', type=Path, help='on the disk to be measured; the default is that of temporary files'
    )
    options = parser.parse_args()
    result = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # libraries write to stdout, too, and that is the committed result
    show = partial(print, file=result, flush=True)
    show(f'# Checkpoints\n\nmachine: {describe_machine()}; torch {torch.__version__}\n')
    show('| what | MB | save, s | load, s | speed of save, limit is 1 | speed of load |\n|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        workload = Path(scratch, 'workload')
        write_model(workload / 'model', hidden=options.hidden, layers=options.layers)
        write_rows(workload, ROWS)
        for mode in ('full', 'lora'):
            show(measure(workload, Path(scratch), mode, options.rounds))
    show(NOTES)


if __name__ == '__main__':
    main()
