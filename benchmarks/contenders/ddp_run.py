"""The packed loop of loop_run.py under bare DistributedDataParallel: what several ranks could do at most.

torchrun --standalone --nproc-per-node N benchmarks/contenders/ddp_run.py WORKLOAD MAX_LENGTH
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import LEARNING_RATE, MAX_NORM
from loop_run import pack, prepare
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2_5_VLForConditionalGeneration

MICRO_BATCHES = 2  # of a step, over all ranks


def main() -> None:
    """Train one epoch; the first rank prints tokens and seconds."""
    directory, max_length = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group('gloo')
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    bare = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory / 'model', dtype=torch.float32).train()
    packs = pack(prepare(directory, bare), max_length)
    packs = packs[: len(packs) // MICRO_BATCHES * MICRO_BATCHES]
    model = DistributedDataParallel(Learner(bare))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    seconds, tokens = 0.0, 0
    for number in range(0, len(packs), MICRO_BATCHES):
        group = packs[number : number + MICRO_BATCHES]
        batches = [
            {name: torch.cat([s[name] for s in samples], -1 if name == 'positions' else 0) for name in samples[0]}
            for samples in group
        ]
        learned = sum(int((batch['labels'][1:] != -100).sum()) for batch in batches)
        dist.barrier()
        started = time.perf_counter()
        mine = batches[rank::ranks]
        for at, batch in enumerate(mine):
            with contextlib.nullcontext() if at == len(mine) - 1 else model.no_sync():
                (model(batch) * (ranks / learned)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        if number >= 2 * MICRO_BATCHES:  # the first steps warm up
            seconds += time.perf_counter() - started
            tokens += sum(len(batch['ids']) for batch in batches)
    if rank == 0:
        print(json.dumps(dict(tokens=tokens, seconds=seconds)))
    dist.destroy_process_group()


class Learner(torch.nn.Module):
    """The summed loss, in one forward, as DistributedDataParallel wants it."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Float32 scalar."""
        hidden = self.model.model(
            input_ids=batch['ids'][None], pixel_values=batch['pixels'], image_grid_thw=batch['grid'],
            position_ids=batch['positions'][:, None], use_cache=False,
        )[0]  # fmt: skip
        targets = batch['labels'][1:]
        keep = targets != -100
        return F.cross_entropy(self.model.lm_head(hidden[0, :-1][keep]), targets[keep], reduction='sum')


if __name__ == '__main__':
    main()
