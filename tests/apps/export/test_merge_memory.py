"""A merge holds a layer, not the model."""

import re
import threading
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from vlmtune.apps.export.merge import merge
from vlmtune.testing import write_tiny_model

SIZES = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12)  # 95 MB in bfloat16


def anonymous_mib() -> float:
    found = re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())
    assert found
    return int(found[1]) / 1024


def peak_mib(base: Path, adapter: Path, output: Path) -> float:
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_mib())

    watching = threading.Thread(target=watch)
    before = anonymous_mib()
    watching.start()
    try:
        merge(str(base), str(adapter), str(output), device='cpu', max_shard_size='20MB')
    finally:
        done.set()
        watching.join()
    return peak[0] - before


def test_memory_does_not_grow_with_the_model(tmp_path):
    settings = LoraConfig(r=4, target_modules='all-linear')
    peaks = []
    for name, sizes in (('small', {**SIZES, 'num_hidden_layers': 2}), ('large', SIZES)):
        base = write_tiny_model('llama', tmp_path / name, dtype='bfloat16', **sizes)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path / f'{name}-lora')
        peaks.append(peak_mib(base, tmp_path / f'{name}-lora', tmp_path / f'{name}-merged'))
    shards = [path.stat().st_size for path in (tmp_path / 'large-merged').glob('*.safetensors')]
    assert sum(shards) > 90e6
    largest = 4 * SIZES['hidden_size'] * SIZES['intermediate_size'] / 2**20  # MiB in float32
    assert peaks[1] <= max(shards) / 2**20 + largest + 16  # of tokenizers and the like
