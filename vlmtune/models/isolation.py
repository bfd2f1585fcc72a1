"""The check at the start of every packed run: samples that share a row do not see each other.

Letters: B rows, L tokens, H hidden size, a and b the lengths of two samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmtune.models.attention import describe_attention
from vlmtune.models.modes import in_evaluation
from vlmtune.models.supervised_finetune import SupervisedFinetune
from vlmtune.utils.errors import ConfigError, TrainingError

Batch = Mapping[str, Tensor]

_NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # packed and alone, of the mean activation
_BY_LENGTH = ('dynamic', 'longrope')
_ADVICE = 'report it with the versions of transformers and torch, and set pack_to_max_length=False meanwhile'


@dataclass(frozen=True)
class IsolationReport:
    """What the check measured, all relative to the largest (``alone``: the mean) activation of the second sample.

    Attributes:
        attention: which implementation runs where.
        leak: largest change of the second sample when the first one changes; 0.0 in dense models.
        own: largest change of the first sample itself.
        alone: mean difference of the second sample packed and by itself.
    """

    attention: str
    leak: float
    own: float
    alone: float


def check_positions(text_config: Any, *, longest: int) -> None:
    """Tell whether rotary positions treat every sample of a row as they treat it alone.

    Some kinds (dynamic NTK, LongRoPE) choose their frequencies by the longest sample of a row. Up to the length that
    the model was first trained with there is only one choice.

    Args:
        text_config: of the language model.
        longest: tokens of the longest sample.

    Raises:
        ConfigError: a sample is long enough to change those that it is packed with.
    """
    found = getattr(text_config, 'rope_parameters', None) or {}
    for rope in [found, *(value for value in found.values() if isinstance(value, Mapping))]:
        if rope.get('rope_type') not in _BY_LENGTH:
            continue
        own = rope.get('original_max_position_embeddings') if rope['rope_type'] == 'longrope' else None
        limit = own or text_config.max_position_embeddings
        if longest > limit:
            raise ConfigError(
                f'pack_to_max_length: the longest sample has {longest} tokens, and {text_config.model_type} with '
                f'rope_type {rope["rope_type"]!r} moves the positions of a whole row that holds one of more than '
                f'{limit}; set max_length={limit} or less, or pack_to_max_length=False'
            )


def check_isolation(
    model: SupervisedFinetune, *, packed: Batch, changed: Batch, alone: Batch, border: int
) -> IsolationReport:
    """Compare the second sample of a pack with itself after another first sample, and by itself.

    ``packed`` and ``changed`` have the same shapes, so the same kernels run, row by row the same numbers come out, and
    the second sample must not change: by more than 4 float32 epsilons of its largest activation, also where the
    computation is bfloat16. Only where tokens of a row share a computation by design (mixtures of experts sort tokens
    by expert, int8 layers choose outlier columns over all tokens) the epsilon of the dtype is allowed, and 2**-5 for
    int8. Alone, other kernels run, so that comparison is coarse; it finds what does not depend on the neighbour's
    content, such as positions that run on.

    Mode, buffers and random generators are left as they were (dropout is off, nothing is drawn).

    Args:
        model: on its device, ready to train.
        packed: two samples in one row, as the collator makes it.
        changed: the same with other text and pixels in the first sample.
        alone: the second sample by itself.
        border: tokens of the first sample.

    Raises:
        TrainingError: the samples see each other, or the first one does not feel its own change.
    """
    with in_evaluation(model), torch.no_grad():
        before, after, single = (
            model.hidden_states({k: v.clone() for k, v in batch.items()})[0].float()
            for batch in (packed, changed, alone)
        )
    second = before[border:]
    single = single[: len(second)]  # where it has no image but the first sample has, the collator's filler is behind it
    scale = float(second.abs().max())
    report = IsolationReport(
        attention=describe_attention(model.model, family=model.family),
        leak=float((after[border:] - second).abs().max()) / scale,
        own=float((after[:border] - before[:border]).abs().max()) / scale,
        alone=float((single - second).abs().mean() / second.abs().mean()),
    )
    _judge(report, allowed=_allowed(model), near=0.2 if model.quantization == 'int8' else _NEAR[model.dtype])
    return report


def _allowed(model: SupervisedFinetune) -> float:
    text = model.model.config.get_text_config()
    if model.quantization == 'int8':
        return 2**-5
    experts = any(getattr(text, name, None) for name in ('num_experts', 'num_local_experts', 'n_routed_experts'))
    return 4 * torch.finfo(model.dtype if experts else torch.float32).eps


def _judge(report: IsolationReport, *, allowed: float, near: float) -> None:
    if not report.leak <= allowed:  # also where it is not a number
        raise TrainingError(
            f'packed samples see each other ({report.attention}): another first sample changes the second one by '
            f'{report.leak:.1e} of its largest activation, at most {allowed:.1e} is rounding; {_ADVICE}'
        )
    if not report.own > 10 * allowed:
        raise TrainingError(
            f'packed samples cannot be told apart ({report.attention}): other text changes the activations of its own '
            f'sample by {report.own:.1e} only, so a leak would not show; the weights may be constant or not finite'
        )
    if not report.alone <= near:
        raise TrainingError(
            f'a packed sample is not what it is alone ({report.attention}): its activations differ by '
            f'{report.alone:.1e} of their mean, at most {near:.1e} is rounding; {_ADVICE}'
        )
