"""What the checks of ``zero_ranks.py`` are made of: a strategy with a tiny model, and comparisons of what it saves."""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from bitsandbytes.optim import AdamW8bit
from deepspeed.ops.adam import DeepSpeedCPUAdam
from mmengine.optim import OptimWrapper
from torch.optim import SGD, Adafactor, AdamW

from vlmtune.engine import DDPStrategy, DeepSpeedStrategy, PartwiseOptimWrapperConstructor, SingleDeviceStrategy
from vlmtune.engine.optimizer_reader import FragmentRecord, SavedState
from vlmtune.models import SupervisedFinetune
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.tensor_file import write_tensors

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
FULL = dict(llm=dict(mode='full', lr=3e-3), embeddings='frozen', lm_head='full')
ADAFACTOR = dict(type=Adafactor, lr=1e-2)
QLORA = dict(llm='lora', embeddings='frozen', lm_head='frozen')
LORA = dict(llm='lora', embeddings='frozen', lm_head=dict(mode='full', lr=3e-3))
ADAM = dict(type=AdamW, lr=1e-2, weight_decay=0.1)
EIGHT_BIT = dict(type=AdamW8bit, lr=1e-2, weight_decay=0.1)
CPU_ADAM = dict(type=DeepSpeedCPUAdam, lr=1e-2, weight_decay=0.1)
MOMENTUM = dict(type=SGD, lr=0.5, momentum=0.9, weight_decay=0.1)
MICRO_BATCHES = 2  # of a step on one rank, where there are two ranks


class Bench:
    """A strategy with a tiny model and four micro-batches for every step, dealt to the ranks that it has."""

    def __init__(
        self, kind='single', *, dtype='float32', tune=FULL, optimizer=ADAM, max_norm=0.5, model='model', **more
    ):
        self.kind, self.world = kind, 1 if kind == 'single' else dist.get_world_size()
        options = dict(work_dir=str(FOLDER / 'work'), log_kwargs=dict(log_level='ERROR'))
        if kind == 'single':
            self.strategy = SingleDeviceStrategy(**options)
        elif kind == 'ddp':
            self.strategy = DDPStrategy(**options)
        else:
            self.strategy = DeepSpeedStrategy(config=more.pop('config', kind), **options)
        torch.manual_seed(0)  # after the strategy, which draws a seed
        net = SupervisedFinetune(str(FOLDER / model), tune=tune, lora=dict(r=4, dropout=0.0), dtype=dtype, **more)
        wrapper = dict(type=OptimWrapper, optimizer=optimizer, constructor=PartwiseOptimWrapperConstructor)
        if max_norm is not None:
            wrapper['clip_grad'] = dict(max_norm=max_norm)
        self.strategy.prepare(net, optim_wrapper=wrapper)

    def backward(self, step, *, factor=1.0, stop_after=None):
        """The micro-batches of a step; ``factor`` spoils its gradients on the last rank."""
        batches = [batch_of(step, number) for number in range(MICRO_BATCHES * dist.get_world_size())]
        tokens = sum(int((batch['labels'][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
        rank = dist.get_rank() if self.world > 1 else 0
        mine = batches[rank :: self.world]
        for number, batch in enumerate(mine[:stop_after]):
            with self.strategy.micro_step(last=number == len(mine) - 1):
                loss = self.strategy.forward(batch) * (self.strategy.gradient_scale / tokens)
                self.strategy.backward(loss * (factor if rank == self.world - 1 else 1.0))

    def learn(self, *steps, factor=1.0):
        norms = []
        for step in steps:
            self.backward(step, factor=factor)
            norms.append(self.strategy.optimizer_step())
        return norms

    def save(self, name):
        """Into a folder of all ranks; returns it when all have written."""
        folder = FOLDER / name
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        dist.barrier()
        weights = dict(self.strategy.trainable_state())
        if dist.get_rank() == 0:
            write_tensors(folder / 'model.safetensors', weights.items(), layout=self.strategy.trainable_layout())
        if self.world > 1 or dist.get_rank() == 0:
            self.strategy.save_optimizer(folder)
        dist.barrier()
        return folder

    def load(self, folder):
        self.strategy.load_trainable(folder / 'model.safetensors')
        self.strategy.load_optimizer(folder)
        return self

    def weights(self):
        return {name: weight.clone() for name, weight in self.strategy.trainable_state()}


def batch_of(step, number):
    """Rows of different lengths, of which different parts are supervised."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    ids = torch.randint(3, 400, (1, 12 + 5 * number), generator=generator)
    labels = ids.clone()
    labels[:, : 2 + number] = IGNORE_INDEX
    return dict(input_ids=ids, labels=labels)


def different_files(a, b):
    names = {path.name for path in a.iterdir()}
    assert names == {path.name for path in b.iterdir()}
    return sorted(name for name in names if (a / name).read_bytes() != (b / name).read_bytes())


def whole_states(folder, layout):
    """Every state of every parameter as one flat tensor, however it was cut."""
    with SavedState(folder) as saved:
        found = {}
        for name, entry in layout.items():
            numel = torch.Size(entry.shape).numel()
            record = saved.record_for([FragmentRecord(name, 0, numel, 0)])
            for key in record.keys:
                found[f'{name}/{key}'] = saved.stretches(key, [FragmentRecord(name, 0, numel, 0)], numel=numel)
            found |= {
                f'{name}/{key}': torch.tensor(float(value))
                for key, value in record.numbers.items()
                if value is not None
            }
    return found
