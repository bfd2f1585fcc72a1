"""The memory estimate of ``train --dry-run`` against what a step really takes, on a CPU.

A Qwen2 of 12 layers, width 768 and a vocabulary of 32,000 with random weights, one packed row of 1,536 tokens, half of
them learned, fused AdamW. Every setting runs in a process of its own; "measured" is the peak of resident memory over
the second step less what was resident before the model was loaded, "estimated" the sum that ``engine/memory.py`` gives.
Freed memory is handed back at once: glibc would keep much of it, and that is counted as resident, too.

python benchmarks/memory_estimate.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

TOKENS = 1536
LORA = dict(tune=dict(llm='lora'), lora=dict(r=16))
SETTINGS: dict[str, dict[str, Any]] = {
    'full': dict(tune=dict(llm='full'), dtype='float32'),
    'full, checkpointing': dict(tune=dict(llm='full'), dtype='float32', gradient_checkpointing=True),
    'LoRA': dict(LORA, dtype='float32'),
    'LoRA, checkpointing': dict(LORA, dtype='float32', gradient_checkpointing=True),
    'LoRA, bfloat16': dict(LORA, dtype='bfloat16'),
}
MIB = 2**20
RETURN_FREED = {'MALLOC_MMAP_THRESHOLD_': '131072'}  # bytes; glibc raises it by itself unless it is given


def write_model(path: Path) -> None:
    """Random weights in float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: PLC0415  (only the parent needs it)

    config = Qwen2Config(
        vocab_size=32_000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(path)


def resident() -> int:
    """Bytes of this process now."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096


class Peak(threading.Thread):
    """The highest resident memory while it runs, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.over = 0, False

    def run(self) -> None:
        """Until ``over``."""
        while not self.over:
            self.bytes = max(self.bytes, resident())
            time.sleep(0.001)


def measure(path: str, settings: dict[str, Any]) -> dict[str, float]:
    """Estimated and measured bytes of one setting."""
    import peft  # noqa: F401, PLC0415  (LoRA loads it; its code is not the model's)

    from vlmtune.engine.memory import Load, MemoryModel, state_bytes_per_weight  # noqa: PLC0415
    from vlmtune.models import SupervisedFinetune  # noqa: PLC0415

    optimizer_settings: dict[str, Any] = dict(lr=1e-5, fused=True)
    before = resident()
    model = SupervisedFinetune(path, **settings).train()
    state_bytes = state_bytes_per_weight(dict(type=torch.optim.AdamW, **optimizer_settings))
    load = Load(tokens=TOKENS, patches=0, supervised=TOKENS // 2)
    estimated = MemoryModel(model, state_bytes=state_bytes).estimate(load).total
    optimizer = torch.optim.AdamW(model.named_trainable().values(), **optimizer_settings)
    ids = torch.randint(0, 32_000, (1, TOKENS))
    labels = torch.where(torch.arange(TOKENS) < TOKENS // 2, -100, ids)
    for step in range(2):
        peak = Peak()
        if step:
            peak.start()
        model(labels=labels, input_ids=ids, position_ids=torch.arange(TOKENS)[None]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        peak.over = True
    return dict(estimated=estimated, measured=peak.bytes - before)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], SETTINGS[options.one[1]])))
        return
    print(f'# Memory estimate\n\nmachine: {describe_machine()}; torch {torch.__version__}\n')
    print('| tuning | estimated, MiB | measured, MiB | estimate is |\n|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for name in SETTINGS:
            command = [sys.executable, __file__, '--one', folder, name]
            environment = {**os.environ, **RETURN_FREED}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found = json.loads(done.stdout.splitlines()[-1])
            error = found['estimated'] / found['measured'] - 1
            print(
                f'| {name} | {found["estimated"] / MIB:.0f} | {found["measured"] / MIB:.0f} | {error:+.0%} |',
                flush=True,
            )


if __name__ == '__main__':
    main()
