"""One training step on a GPU: packed against padded, with MFU and memory.

A Qwen2.5-VL in the shape of the 3B and of the 7B model with random weights, LoRA and full, rows of one 640 x 480
picture (391 image tokens) and a log-normal answer (median 90 words), in bf16 with gradient checkpointing. Packed rows
of 4,096 and 16,384 tokens against padded batches of about as many tokens. MFU is that of the log
(vlmtune/engine/flops.py), the median of all steps but the first three. A run that does not fit is reported as such.

python benchmarks/gpu_step.py [--shapes 3b 7b] [--attention sdpa varlen] [--steps 10]
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

CONTENDERS = Path(__file__).parent / 'contenders'
sys.path.insert(0, str(CONTENDERS))
from workload import Kind, write_files, write_rows  # noqa: E402  (a script's neighbour, not a package)

MARK = 0.45  # MFU on an H200-class card (dense bf16 peak 989 TFLOP/s)
ROWS = Kind(heights=(480,), widths=(640,), mean=4.5, sigma=0.8, longest=900, rows=400)
SETTINGS = dict(
    max_length=4096, dataloader_num_workers=4, vision='frozen', dtype='bfloat16', gradient_checkpointing=True, lr=1e-5,
    max_epochs=None,
)  # fmt: skip
_ROPE = {'rope_type': 'default', 'rope_theta': 1_000_000.0, 'mrope_section': [16, 24, 24]}
_VISION = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, spatial_merge_size=2,
    temporal_patch_size=2, fullatt_block_indexes=[7, 15, 23, 31], window_size=112,
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    'tiny': dict(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1,
                 num_key_value_heads=1, vocab_size=2048, tie_word_embeddings=True, max_position_embeddings=32768),
    '3b': dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768),
    '7b': dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False, max_position_embeddings=32768),
}  # fmt: skip


def write_model(path: Path, shape: str) -> None:
    """Random weights in bf16; norms and scales of a fresh model, so that activations stay finite."""
    text = SHAPES[shape]
    vision = {**_VISION, **(dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, fullatt_block_indexes=[1])
                            if shape == 'tiny' else {})}  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={**text, 'rope_parameters': _ROPE, 'use_cache': False},
        vision_config={**vision, 'out_hidden_size': text['hidden_size']},
        tie_word_embeddings=text['tie_word_embeddings'],
        image_token_id=5, video_token_id=text['vocab_size'] - 1, vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device('cuda' if torch.cuda.is_available() else 'cpu'):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    write_files(path)


def run(workload: Path, **settings: Any) -> str:
    """Train a few steps in a process of its own; the cells of a row."""
    work_dir = Path(tempfile.mkdtemp(dir=workload))
    overrides = [f'{name}={value}' for name, value in {**SETTINGS, **settings}.items()]
    command = [
        sys.executable, '-m', 'vlmtune', 'train', str(CONTENDERS / 'vlmtune_config.py'), '--work-dir',
        str(work_dir), '--cfg-options', f'workload={workload}', *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith('error')), 'failed')
        print(done.stderr[-2000:], file=sys.stderr)
        return f'{reason.split(";")[0][:80]} | | | |'
    lines = [json.loads(line) for path in work_dir.rglob('metrics.jsonl') for line in path.read_text().splitlines()]

    def median(name: str) -> float:
        return statistics.median(line.get(name, float('nan')) for line in lines[3:])

    return (
        f'{median("tokens_per_second"):,.0f} | {median("learned_tokens_per_second"):,.0f} | {median("tflops"):.0f} | '
        f'{median("mfu"):.1%} | {lines[-1]["memory_mib"] / 1024:.1f} |'
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shapes', nargs='+', choices=list(SHAPES), default=['3b', '7b'])
    parser.add_argument('--attention', nargs='+', default=['sdpa', 'varlen'])
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--cpu', action='store_true', help='run without a GPU, to see that the script works')
    arguments = parser.parse_args()
    print(f'# A step on a GPU\n\nmachine: {describe_machine()}; torch {torch.__version__}')
    if not torch.cuda.is_available() and not arguments.cpu:
        print('\nNo GPU was at hand: not run. The mark is an MFU of at least 45 % on an H200-class card.')
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    print(f'\ndevice: {device}; {arguments.steps} steps, the first three do not count; mark: MFU {MARK:.0%}\n')
    print('| shape | tuning | attention | rows | tokens/s | learned tokens/s | TFLOP/s | MFU | peak GiB |')
    print('|---|---|---|---|---|---|---|---|---|')
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            workload = Path(scratch)
            write_model(workload / 'model', shape)
            write_rows(workload, ROWS)
            steps = arguments.steps
            for llm, attention, length in itertools.product(('lora', 'full'), arguments.attention, (4096, 16384)):
                packed = run(workload, llm=llm, attn_implementation=attention, max_length=length, max_steps=steps)
                print(f'| {shape} | {llm} | {attention} | packed {length} | {packed}', flush=True)
            for llm, batch in itertools.product(('lora', 'full'), (7, 28)):
                padded = run(workload, llm=llm, pack_to_max_length=False, batch_size=batch, max_steps=steps)
                print(f'| {shape} | {llm} | {arguments.attention[0]} | padded, batch {batch} | {padded}', flush=True)


if __name__ == '__main__':
    main()
