"""Runs on every rank of a torchrun: strategies without a Runner, many checks in one process start.

``zero_ranks.py FOLDER NAME...`` runs the named checks and writes ``FOLDER/NAME_RANK.json``, which the tests read. A
check returns plain values; the functions are made into checks at the end of the file.
"""

import json
import sys
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.optim import SGD
from zero_bench import (
    ADAFACTOR,
    ADAM,
    CPU_ADAM,
    EIGHT_BIT,
    FOLDER,
    LORA,
    MOMENTUM,
    QLORA,
    Bench,
    different_files,
    whole_states,
)

from vlmtune.utils.errors import CheckpointError


def resume(kind, **options):
    """Four steps at once, and two, a save, and two more from there in a fresh engine."""
    whole = Bench(kind, **options)
    start = whole.weights()
    norms = whole.learn(1, 2)
    at_two = whole.save('at_two')
    norms += whole.learn(3, 4)
    end = whole.save('end')
    resumed = Bench(kind, **options).load(at_two)
    again = resumed.learn(3, 4)
    different = different_files(end, resumed.save('resumed'))
    moved = max(float((value - start[name]).abs().max()) for name, value in whole.weights().items())
    return dict(different=different, norms=norms, again=again, moved=moved, files=sorted(p.name for p in end.iterdir()))


def cross(source, *targets, then=None, **options):
    """What one strategy saved, loaded by others and saved again: the same values, however cut; then one more step."""
    first = Bench(source, **options)
    first.learn(1, 2)
    folder = first.save('source')
    layout = first.strategy.trainable_layout()
    expected, weights = whole_states(folder, layout), first.weights()
    first.learn(3)
    after = first.weights()
    found = {}
    for target in targets:
        bench = Bench(target, **(options if then is None else dict(options, optimizer=then))).load(folder)
        states = whole_states(bench.save('target'), layout)
        loaded = bench.weights()
        norms = bench.learn(3)
        found[target] = dict(
            keys=sorted(expected) == sorted(states),
            states=sum(not torch.equal(states[key], expected[key]) for key in expected),
            weights=sum(not torch.equal(loaded[name], weights[name]) for name in weights),
            goes_on=max(float((value - after[name]).abs().max()) for name, value in bench.weights().items()),
            norms=norms,
        )
    return dict(found=found, states=len(expected), nonzero=sum(bool(value.any()) for value in expected.values()))


def cross_ranks(kind):
    """What ``cross_zero2`` saved with two ranks, by as many as there are now, and that by one."""
    bench = Bench(kind).load(FOLDER / 'source')
    layout = bench.strategy.trainable_layout()
    expected = whole_states(FOLDER / 'source', layout)
    more = bench.save('more')
    back = Bench('single').load(more).save('back')
    found = [whole_states(folder, layout) for folder in (more, back)]
    weights = [(folder / 'model.safetensors').read_bytes() for folder in (FOLDER / 'source', more, back)]
    return dict(
        ranks=bench.world,
        files=len([*more.glob('optimizer_*')]),
        states=[sum(not torch.equal(states[key], expected[key]) for key in expected) for states in found],
        weights=len(set(weights)),
    )


def equal_to_one(kinds, **options):
    """Several ranks against one process with as many more micro-batches."""
    one = Bench('single', **options)
    norms = one.learn(1, 2, 3)
    weights, found = one.weights(), {}
    for kind in kinds:
        bench = Bench(kind, **options)
        theirs = bench.learn(1, 2, 3)
        distance = max(float((value - weights[name]).abs().max()) for name, value in bench.weights().items())
        relative = max(abs(a - b) / a for a, b in zip(norms, theirs, strict=True))
        found[kind] = dict(distance=distance, norms=relative, their=theirs)
    return dict(found=found, norms=norms)


def dropped(kind, factor=1.0, stop_after=None, **options):
    """Step 2 with all its micro-batches dropped, then step 3: as if step 2 had not been."""
    plain = Bench(kind, **options)
    plain.learn(1, 3)
    expected = plain.save('plain')
    bench = Bench(kind, **options)
    bench.learn(1)
    before = bench.weights()
    bench.backward(2, factor=factor, stop_after=stop_after)
    bench.strategy.drop_gradients()
    untouched = all(torch.equal(value, before[name]) for name, value in bench.weights().items())
    bench.learn(3)
    return dict(untouched=untouched, different=different_files(expected, bench.save('dropped')))


def not_finite(kind, **options):
    """Step 2 with a gradient that is not finite on one rank, then step 3: as if step 2 had not been."""
    plain = Bench(kind, **options)
    plain.learn(1, 3)
    expected = plain.save('plain')
    found = {}
    for factor in ('nan', 'inf'):
        bench = Bench(kind, **options)
        bench.learn(1)
        norm = bench.learn(2, factor=float(factor))[0]
        bench.learn(3)
        found[factor] = dict(norm=str(norm), different=different_files(expected, bench.save('skipped')))
    return found


def float16(kind, **options):
    """A step that overflows because of the loss scale: dropped, the scale lowered; then a resume with that scale."""
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed would refuse a CPU without fast float16
    bench = Bench(kind, dtype='float16', **options)
    first = bench.learn(1)[0]
    before, scale = bench.weights(), bench.strategy.scaler_state()['scale']
    seen, scales = [], []
    for _ in range(3):  # DeepSpeed lowers the scale at the second overflow, unless told otherwise
        norm = bench.learn(2, factor=1e4)[0]
        seen.append([str(norm), bench.strategy.lowered_loss_scale])
        scales.append(bench.strategy.scaler_state()['scale'] / scale)
    kept = all(torch.equal(value, before[name]) for name, value in bench.weights().items())
    folder, state = bench.save('at_two'), json.loads(json.dumps(bench.strategy.scaler_state()))
    norm = bench.learn(3)[0]
    lowered, expected = bench.strategy.lowered_loss_scale, bench.save('end')
    resumed = Bench(kind, dtype='float16', **options).load(folder)
    resumed.strategy.load_scaler_state(state)
    resumed.learn(3)
    different = different_files(expected, resumed.save('resumed'))
    same_scale = bench.strategy.scaler_state() == resumed.strategy.scaler_state()
    return dict(first=first, seen=seen, scales=scales, kept=kept, norm=norm, lowered=lowered, different=different,
                same_scale=same_scale, state=state)  # fmt: skip


def groups(kind, **options):
    bench = Bench(kind, **options)
    wrapper = bench.strategy.optim_wrapper
    inner = bench.strategy.model.optimizer.optimizer
    seen = {group['name']: [group['lr'], group['weight_decay']] for group in inner.param_groups}
    bench.learn(1)
    return dict(groups=seen, logged=wrapper.get_lr(), names=[group['name'] for group in wrapper.param_groups])


def raises(kind, source, **options):
    """The message of a load that cannot be."""
    folder = Bench(source, **options)
    folder.learn(1)
    path = folder.save('source')
    bench = Bench(kind, **options)
    before = bench.weights()
    try:
        bench.strategy.load_optimizer(path)
    except CheckpointError as error:
        same = all(torch.equal(value, before[name]) for name, value in bench.weights().items())
        return dict(message=str(error), untouched=same)
    return dict(message='')


ALL = ('ddp', 'zero1', 'zero2', 'zero2_offload', 'zero3', 'zero3_offload')
BFLOAT16 = dict(dtype='bfloat16', tune=LORA)
NF4 = dict(dtype='bfloat16', tune=QLORA, quantization='nf4')
PLAIN = dict(optimizer=dict(type=SGD, lr=0.5))
CHECKS = {
    **{f'resume_{kind}': partial(resume, kind) for kind in ALL},
    **{f'resume_{kind}_bfloat16': partial(resume, kind, **BFLOAT16) for kind in ALL},
    **{f'resume_{kind}_momentum': partial(resume, kind, optimizer=MOMENTUM) for kind in ALL},
    **{f'resume_{kind}_8bit': partial(resume, kind, optimizer=EIGHT_BIT) for kind in ('single', *ALL)},
    **{f'resume_{kind}_nf4': partial(resume, kind, **NF4) for kind in ('ddp', 'zero1', 'zero2')},
    **{f'resume_{kind}_cpu_adam': partial(resume, kind, optimizer=CPU_ADAM) for kind in ALL if 'offload' in kind},
    **{f'resume_{kind}_adafactor': partial(resume, kind, optimizer=ADAFACTOR) for kind in ('ddp', 'zero2')},
    'cross_zero2': partial(cross, 'zero2', 'ddp', 'zero3', 'single'),
    'cross_zero3': partial(cross, 'zero3', 'zero2_offload', 'zero1', 'single', tune=LORA),
    'cross_single': partial(cross, 'single', 'zero2', 'zero3', optimizer=MOMENTUM),
    'cross_cpu_adam': partial(cross, 'zero2_offload', 'zero2', optimizer=CPU_ADAM, then=ADAM),
    'cross_to_cpu_adam': partial(cross, 'single', 'zero3_offload', then=CPU_ADAM),
    'cross_bfloat16': partial(cross, 'zero2', 'zero3', 'ddp', **BFLOAT16),
    **{f'cross_ranks_{kind}': partial(cross_ranks, kind) for kind in ('zero2', 'zero3')},
    'equal': partial(equal_to_one, ALL, **PLAIN),
    'equal_unclipped': partial(equal_to_one, ALL, max_norm=None, **PLAIN),
    'equal_nf4': partial(equal_to_one, ('ddp', 'zero1', 'zero2'), tune=QLORA, quantization='nf4', **PLAIN),
    **{f'dropped_{kind}': partial(dropped, kind) for kind in ALL},
    **{f'dropped_{kind}_bfloat16': partial(dropped, kind, **BFLOAT16) for kind in ALL},
    **{f'dropped_{kind}_nan': partial(dropped, kind, factor=float('nan')) for kind in ALL},
    **{f'dropped_{kind}_early': partial(dropped, kind, stop_after=1) for kind in ALL},
    **{f'not_finite_{kind}': partial(not_finite, kind) for kind in ALL},
    **{f'not_finite_{kind}_bfloat16': partial(not_finite, kind, **BFLOAT16) for kind in ALL},
    **{f'not_finite_{kind}_unclipped': partial(not_finite, kind, max_norm=None, **BFLOAT16) for kind in ALL},
    **{f'float16_{kind}': partial(float16, kind) for kind in ('single', *ALL)},
    **{f'groups_{kind}': partial(groups, kind) for kind in ALL if kind != 'ddp'},
    'raises_8bit': partial(raises, 'zero2', 'ddp', optimizer=EIGHT_BIT),
    'raises_8bit_back': partial(raises, 'ddp', 'zero3', optimizer=EIGHT_BIT),
    'raises_adafactor': partial(raises, 'zero2', 'ddp', optimizer=ADAFACTOR),
}
if __name__ == '__main__':
    dist.init_process_group('gloo', timeout=timedelta(seconds=90))
    torch.set_num_threads(1)
    for check in sys.argv[2:]:
        result = CHECKS[check]()
        (FOLDER / f'{check}_{dist.get_rank()}.json').write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()
