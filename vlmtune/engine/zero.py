"""Where DeepSpeed's ZeRO keeps what belongs to a parameter. Reads its objects; does not import it."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vlmtune.engine.optimizer_reader import FragmentRecord
from vlmtune.engine.optimizer_state import Unit


def is_stage_3(zero: Any) -> bool:
    """Whether this is the optimizer of stage 3."""
    return hasattr(zero, 'fp32_partitioned_groups_flat')


def zero_units(zero: Any, names: dict[int, str]) -> list[Unit]:
    """The float32 partitions of this rank, which the optimizer inside updates.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        names: of the trained parameters, by ``id``.
    """
    if not is_stage_3(zero):
        flats, groups = zero.single_partition_of_fp32_groups, zero.bit16_groups
        fragments: Iterator = (_fragments_of_stage_1_and_2(group, names) for group in groups)
    else:
        flats, groups = zero.fp32_partitioned_groups_flat, zero.fp16_groups
        ranks = (zero._get_sub_group_partition_rank(number) for number in range(len(groups)))
        fragments = (_fragments_of_stage_3(group, names, rank=rank) for group, rank in zip(groups, ranks, strict=True))
    return [Unit(flat, tuple(found)) for flat, found in zip(flats, fragments, strict=True)]


def _fragments_of_stage_1_and_2(group: Sequence[Any], names: dict[int, str]) -> Iterator[FragmentRecord]:
    """A group is laid out flat and cut into one partition per rank; the cut may go through a parameter."""
    for parameter in group:
        mapping = parameter._hp_mapping
        if mapping is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield FragmentRecord(names[id(parameter)], start=here.start, numel=here.numel, offset=there.start)


def _fragments_of_stage_3(group: Sequence[Any], names: dict[int, str], *, rank: int) -> Iterator[FragmentRecord]:
    """Each parameter is cut into equal partitions, the last one padded; those of a group lie one behind the other."""
    offset = 0
    for parameter in group:
        size = parameter.partition_numel()
        numel = min(size, parameter.ds_numel - rank * size)
        if numel > 0:
            yield FragmentRecord(names[id(parameter)], start=rank * size, numel=numel, offset=offset)
        offset += size


def refresh_weights(zero: Any) -> None:
    """Copy the float32 partitions into the weights that compute, on all ranks."""
    if not is_stage_3(zero):
        zero.update_lp_params()
        return
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        zero.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
        zero._unflatten_partitioned_parameters(number)
    if zero.persistent_parameters:  # small ones that every rank keeps whole
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def drop_gradients(zero: Any) -> None:
    """Forget what backward passes have added since the last step: as DeepSpeed does when a step overflows."""
    if is_stage_3(zero):
        zero.zero_grad(set_to_none=True)  # and the next micro-batch is the first one, which overwrites partitions
        zero.averaged_gradients = {}
        if zero.offload_optimizer:
            zero.reset_cpu_buffers()
        return
    zero.micro_step_id = -1
    zero.zero_grad(set_to_none=True)
    for number in [*zero.averaged_gradients]:
        zero.averaged_gradients[number] = None
        zero.all_grad_tensors[number] = None
    if zero.cpu_offload:
        zero._offload_accumulated_param_ids = set()
        zero.reset_cpu_buffers()


def scaler_state(zero: Any) -> dict[str, Any]:
    """The dynamic loss scaler's state, in the words of ``StepOptimWrapper.scaler_state``."""
    scaler = zero.loss_scaler
    if not scaler.dynamic:
        return {}
    good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
    return dict(scale=float(scaler.cur_scale), good_steps=good_steps, hysteresis=scaler.cur_hysteresis)


def load_scaler_state(zero: Any, state: dict[str, Any]) -> None:
    """Set what ``scaler_state`` returned; a run in another dtype left none."""
    scaler = zero.loss_scaler
    if scaler.dynamic and state:
        scaler.cur_scale = float(state['scale'])
        scaler.last_overflow_iter, scaler.cur_iter = -1, int(state['good_steps'])
        scaler.cur_hysteresis = int(state.get('hysteresis', scaler.delayed_shift))


def full_weight(fragments: Sequence[tuple[FragmentRecord, torch.Tensor]], *, numel: int, device: torch.device) -> Any:
    """A weight in float32, [numel], from what all ranks hold of it; collective.

    Summed as integers of the same bits: adding a zero would turn -0.0 into 0.0.
    """
    bits = torch.zeros(numel, dtype=torch.int32, device=device)
    for fragment, values in fragments:
        bits[fragment.start :][: fragment.numel] = values.float().view(torch.int32).to(device)
    torch.distributed.all_reduce(bits)
    return bits.view(torch.float32)
