"""Two ranks load models in pieces and whole, and write what they found to FOLDER/RANK.json.

They are forked from one process, which pays for the imports once. ``python sharded_ranks.py FOLDER``
"""

import gc
import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.optim import SGD
from transformers.integrations import is_deepspeed_zero3_enabled

from vlmtune.engine import PartwiseOptimWrapperConstructor
from vlmtune.engine.flops import ModelFlops
from vlmtune.engine.memory import Load, MemoryModel
from vlmtune.engine.sharded_loading import sharded_weights
from vlmtune.models import SupervisedFinetune
from vlmtune.models.sharded import gathered, is_sharded, logical_shape
from vlmtune.testing import write_tiny_model

FOLDER = Path(sys.argv[1])
SHAPE = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=14, num_attention_heads=8, vocab_size=4096)
LORA = dict(llm='lora', embeddings='full', lm_head='full')


def anonymous(process):
    """Bytes of anonymous memory of a process."""
    status = Path(f'/proc/{process}/status').read_text()
    return 1024 * int(status.split('RssAnon:')[1].split()[0])


@contextmanager
def peak_memory(found):
    """Bytes by which anonymous memory grows at most, as another process sees it: this one may hold the lock."""
    gc.collect()
    process, stop = os.getpid(), FOLDER / f'stop_{os.getpid()}_{time.time()}'
    before, (here, there) = anonymous(process), os.pipe()
    if not (child := os.fork()):
        most = before
        while os.getppid() == process and not stop.exists():
            most = max(most, anonymous(process))
            time.sleep(0.001)
        os.write(there, str(most - before).encode())
        os._exit(0)
    try:
        yield
    finally:
        stop.touch()
        os.waitpid(child, 0)
        found.append(int(os.read(here, 100)))


def load(name, *, stage=3, tune=LORA, vocab_size=None):
    """A model as the Runner makes it."""
    torch.manual_seed(0)
    cfg = dict(strategy=dict(config={'zero_optimization': {'stage': stage}}), model=dict(dtype='float32', tune=tune))
    with sharded_weights(cfg):
        return SupervisedFinetune(str(FOLDER / name), tune=tune, dtype='float32', vocab_size=vocab_size)


def memory_of_loading():
    """Peaks, sharded and whole."""
    peaks = []
    with peak_memory(peaks):
        model = load('large', tune=dict(llm='full'))
    sizes = [4 * logical_shape(p).numel() for p in model.parameters()]
    del model
    gc.collect()
    dist.barrier()
    with peak_memory(peaks):
        load('large', stage=2, tune=dict(llm='full'))
    return dict(peak=peaks[0], plain_peak=peaks[1], whole=sum(sizes), largest=max(sizes))


def sizes():
    """What is counted of a sharded model and of a whole one."""
    found = {}
    for kind, stage in (('sharded', 3), ('plain', 2)):
        model = load('llama', stage=stage)
        groups = PartwiseOptimWrapperConstructor(
            dict(optimizer=dict(type=SGD, lr=1.0, weight_decay=0.1))
        ).parameter_groups(model)
        counted = dict(
            report=[str(row) for row in model.report()],
            flops=str(ModelFlops(model).parts),
            memory=list(MemoryModel(model, state_bytes=8).estimate(Load(100, 0, 50))),
            groups=[[g['name'], g['weight_decay'], len(g['params'])] for g in groups],
        )
        for name, value in counted.items():
            found.setdefault(name, {})[kind] = value
        if stage == 3:
            fresh = {id(p) for name, p in model.named_parameters() if 'lora_' in name}
            found['left'] = [n for n, p in model.named_parameters() if not is_sharded(p) and id(p) not in fresh]
    return found


def apart(name, **options):
    """The largest difference between the weights in pieces, put together, and the whole ones."""
    sharded, plain = (load(name, stage=stage, **options) for stage in (3, 2))
    others, largest = dict(plain.named_parameters()), 0.0
    for key, parameter in sharded.named_parameters():
        with gathered([parameter]):
            largest = max(largest, float((parameter - others[key]).abs().max()))
    return largest


def check(rank):
    """All of it."""
    dist.init_process_group('gloo', store=dist.FileStore(str(FOLDER / 'store'), 2), rank=rank, world_size=2)
    deepspeed.init_distributed()
    found = dict(memory_of_loading(), **sizes())
    found['apart'] = dict(
        llama=apart('llama'), qwen3_vl_moe=apart('qwen3_vl_moe'), tied=apart('tied', vocab_size=1000)
    )  # the last grows
    found['zero3_is_over'] = not is_deepspeed_zero3_enabled()
    (FOLDER / f'{rank}.json').write_text(json.dumps(found))
    dist.barrier()


if __name__ == '__main__':
    torch.set_num_threads(1)
    for made, family, settings in (
        ('large', 'qwen2', SHAPE),
        ('llama', 'llama', {}),
        ('qwen3_vl_moe', 'qwen3_vl_moe', {}),
        ('tied', 'qwen2', dict(tie_word_embeddings=True)),
    ):
        write_tiny_model(family, FOLDER / made, dtype='bfloat16' if made == 'large' else 'float32', **settings)
    gc.collect()
    if not (child := os.fork()):
        check(1)
        os._exit(0)
    check(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
