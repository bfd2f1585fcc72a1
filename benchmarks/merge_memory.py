"""What merging an adapter holds in memory, and how long it takes next to copying the files.

python benchmarks/merge_memory.py [--layers 24] [--shard 1GB] [--folder DIR]

A Qwen2.5-VL of random bfloat16 weights, 4.3 GB with 24 layers, with an adapter of rank 16 on all linear layers of its
language model. Every merge runs in a process of its own. Memory is what the process's anonymous memory (RssAnon, read
every 2 ms) grew by at its peak over that after the imports; the limit is the largest file written plus the largest
tensor in float32. The files are in the page cache when they are read, and on the disk when a time ends, on both sides.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from safetensors.torch import save_file
from torch import nn

from vlmtune.apps.export.merge import merge
from vlmtune.apps.export.model_files import write_weights
from vlmtune.apps.export.record import ExportRecord, write_record
from vlmtune.layouts import Weight, open_weights, read_config
from vlmtune.models.lazy_model import LazyModel
from vlmtune.models.loading import build_outline
from vlmtune.testing import write_tiny_model

RANK = 16
SIZES: dict[str, Any] = dict(
    hidden_size=2048, intermediate_size=11008, num_attention_heads=16, num_key_value_heads=2, vocab_size=151_936
)
CASES = dict(lora=None, qlora='nf4')


def write_base(folder: Path, *, layers: int, shard: str) -> None:
    """A model of that many layers, written piece by piece."""
    text = dict(SIZES, num_hidden_layers=layers)
    text['rope_parameters'] = dict(rope_type='default', mrope_section=[16, 24, 24], rope_theta=1e6)
    write_tiny_model('qwen2_5_vl', folder)
    settings = json.loads((folder / 'config.json').read_text())
    settings['text_config'] |= text
    settings['text_config'] = {k: v for k, v in settings['text_config'].items() if k != 'layer_types'}
    settings['vision_config']['out_hidden_size'] = SIZES['hidden_size']
    settings |= dict(dtype='bfloat16', tie_word_embeddings=True)
    (folder / 'config.json').write_text(json.dumps(settings))
    (folder / 'model.safetensors').unlink()
    outline = build_outline(read_config(str(folder)), dtype=torch.bfloat16)
    pieces: dict[int, Weight] = {}
    weights = {
        name: pieces.setdefault(id(tensor), Weight(tuple(tensor.shape), torch.bfloat16, folder, _random(tensor.shape)))
        for name, tensor in outline.state_dict(keep_vars=True).items()
    }
    write_weights(LazyModel(outline, weights, torch.bfloat16), folder, max_shard_size=shard)


def _random(shape: torch.Size) -> Any:
    return lambda: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def write_adapter(base: Path, folder: Path, *, quantization: str | None) -> None:
    """An adapter of that base, as pth_to_hf writes one."""
    folder.mkdir()
    outline = build_outline(read_config(str(base)))
    tensors = {}
    for name, module in outline.named_modules():
        if isinstance(module, nn.Linear) and 'language_model.layers' in name:
            place = f'base_model.model.{name}'
            tensors[f'{place}.lora_A.weight'] = torch.randn(RANK, module.in_features) * 0.02
            tensors[f'{place}.lora_B.weight'] = torch.randn(module.out_features, RANK) * 0.02
    save_file(tensors, folder / 'adapter_model.safetensors', {'format': 'pt'})
    settings = dict(peft_type='LORA', r=RANK, lora_alpha=2 * RANK, task_type='CAUSAL_LM')
    settings['target_modules'] = r'model\.language_model\.layers\..*_proj'
    (folder / 'adapter_config.json').write_text(json.dumps(settings))
    write_record(ExportRecord('qwen2_5_vl', quantization=quantization), folder)


def anonymous_mib() -> float:
    """RssAnon of this process."""
    found = re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())
    return int(found[1]) / 1024 if found else 0.0


def measure(base: str, adapter: str, output: str, shard: str) -> dict[str, float]:
    """One merge, in this process."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_mib())

    before = anonymous_mib()
    threading.Thread(target=watch, daemon=True).start()
    started = time.perf_counter()
    merge(base, adapter, output, max_shard_size=shard, device='cpu')
    seconds = time.perf_counter() - started
    done.set()
    return dict(mib=peak[0] - before, seconds=seconds)


def copy_seconds(base: Path, target: Path) -> float:
    """``cp`` of the files of weights, until they are on the disk."""
    target.mkdir()
    started = time.perf_counter()
    for file in sorted(base.glob('*.safetensors')):
        subprocess.run(['cp', str(file), str(target)], check=True)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def limit_mib(folder: Path) -> tuple[float, float]:
    """The largest file of a model, and its largest tensor in float32."""
    largest = max(torch.Size(weight.shape).numel() for weight in open_weights(folder).values())
    return max(file.stat().st_size for file in folder.glob('*.safetensors')) / 2**20, 4 * largest / 2**20


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--layers', type=int, default=24)
    parser.add_argument('--shard', default='1GB', help='--max-shard-size')
    parser.add_argument('--folder', help='where 9 GB are free; default: that of temporary files')
    parser.add_argument('--one', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    print(f'# Merging\n\nmachine: {describe_machine()}; torch {torch.__version__}\n')
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_base(folder / 'base', layers=args.layers, shard=args.shard)
        size = sum(file.stat().st_size for file in (folder / 'base').glob('*.safetensors'))
        print(f'{size / 1e9:.2f} GB, {args.layers} layers, --max-shard-size {args.shard}\n')
        print('| what | anonymous | limit: file + tensor | of the limit | time | of cp |\n|---|---|---|---|---|---|')
        for case, quantization in CASES.items():
            subprocess.run('cat base/*.safetensors > /dev/null', shell=True, cwd=folder, check=True)
            cp = copy_seconds(folder / 'base', folder / 'copy')
            subprocess.run(['rm', '-r', str(folder / 'copy')], check=True)
            write_adapter(folder / 'base', folder / case, quantization=quantization)
            output = folder / 'merged'
            command = [
                sys.executable,
                __file__,
                '--one',
                *map(str, (folder / 'base', folder / case, output, args.shard)),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            file, tensor = limit_mib(output)
            subprocess.run(['rm', '-r', str(output)], check=True)
            print(
                f'| {case} | {found["mib"]:.0f} MiB | {file:.0f} + {tensor:.0f} MiB '
                f'| {100 * found["mib"] / (file + tensor):.0f} % | {found["seconds"]:.1f} s '
                f'| {found["seconds"] / cp:.2f} x {cp:.1f} s |',
                flush=True,
            )


if __name__ == '__main__':
    main()
