"""Two ranks, forked from one warm process for each case, in which the second one comes to harm.

``python failing_ranks.py RECIPE IMAGES FOLDER CASE...`` writes ``FOLDER/CASE.R.json`` for every rank R that lives:
``[class of the error, message, whether the first rank tells the same, seconds of the run]``.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import peft  # noqa: F401  # what a run imports late, here once for all
import torch

from vlmtune.apps.train import train
from vlmtune.data import SupervisedDataset
from vlmtune.engine.strategies import DDPStrategy

BAD = 11  # the second micro-batch of the second rank at iteration 3
MARK = 3  # a token that stands nowhere else


def bad_sample(harm):
    """``harm`` is called with the tensors of the bad sample where it is loaded."""
    load = SupervisedDataset.__getitem__

    def getitem(self, key):
        tensors = load(self, key)
        if key.sample == BAD and key.supervised:
            harm(tensors)
        return tensors

    SupervisedDataset.__getitem__ = getitem


def vanish():
    """The image of the bad sample goes while the one before it is loaded."""
    load = SupervisedDataset.__getitem__

    def getitem(self, key):
        if key.sample == BAD - 2:
            for image in self.samples[BAD].images:
                Path(self.image_folder, image.path).unlink(missing_ok=True)
        return load(self, key)

    SupervisedDataset.__getitem__ = getitem


def die_in_forward():
    """The second rank is killed in the first forward pass of iteration 3."""
    forward, calls = DDPStrategy.forward, iter(range(10**6))

    def wrapped(self, batch):
        if self.rank == 1 and next(calls) == 4:
            kill_myself()
        return forward(self, batch)

    DDPStrategy.forward = wrapped


def nan_loss():
    """The loss of the bad sample is not a number."""
    bad_sample(lambda tensors: tensors['input_ids'].__setitem__(0, MARK))
    forward = DDPStrategy.forward

    def wrapped(self, batch):
        loss = forward(self, batch)
        return loss * float('nan') if (batch['input_ids'] == MARK).any() else loss

    DDPStrategy.forward = wrapped


def disk_trouble(tensors):
    raise OSError(5, 'Input/output error', '/data/images')


def kill_myself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


SETTINGS = dict(pack_to_max_length=False, shuffle=False, max_epochs=1, save_steps=1, lora_dropout=0.0)
CASES = dict(
    vanished=(vanish, {'dataloader_num_workers': 1}),
    killed_worker=(lambda: bad_sample(kill_myself), {'dataloader_num_workers': 2}),
    hung_worker=(
        lambda: bad_sample(lambda _: time.sleep(1000)), {'dataloader_num_workers': 1, 'train_dataloader.timeout': 5}
    ),
    disk_trouble=(lambda: bad_sample(disk_trouble), {}),
    nan=(nan_loss, {}),
    nan_skipped=(nan_loss, {'train_cfg.max_skipped_steps': 1}),
    killed_rank=(die_in_forward, {}),
    uneven=(lambda: None, {'accumulative_counts': 3, 'save_steps': 1000}),
)  # fmt: skip


def run_rank(rank, *, port, recipe, folder, case):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    prepare, settings = CASES[case]
    prepare()
    told = ['', '', False]
    overrides = {**SETTINGS, 'image_folder': str(folder / f'{case}_images'), **settings}
    try:
        train(str(recipe), work_dir=str(folder / case), launcher='pytorch', overrides=overrides)
    except Exception as error:
        told = [type(error).__name__, str(error), getattr(error, 'told_by_first_rank', False)]
    (folder / f'{case}.{rank}.json').write_text(json.dumps(told))
    os._exit(0)  # the ranks were forked: nothing of the parent's is to be cleaned up


def main(recipe, images, folder, *cases):
    context = multiprocessing.get_context('fork')
    for case in cases:
        shutil.copytree(images, Path(folder, f'{case}_images'))
        with socket.create_server(('127.0.0.1', 0)) as free:
            port = free.getsockname()[1]
        options = dict(port=port, recipe=Path(recipe), folder=Path(folder), case=case)
        ranks = [context.Process(target=run_rank, args=(rank,), kwargs=options) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=100)
            process.kill()


if __name__ == '__main__':
    main(*sys.argv[1:])
