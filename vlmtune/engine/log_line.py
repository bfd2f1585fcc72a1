"""What the log says of a step, on one line; trackers and files get every scalar."""

import datetime
from collections.abc import Mapping
from typing import Any

from mmengine.runner import LogProcessor

_PHASES = ('data', 'vision', 'llm', 'optimizer')
_AVERAGED = r'.*(loss|time|grad_norm|samples).*'
_RATES = ('tokens_per_second', 'learned_tokens_per_second', 'tflops', 'mfu', 'data_time_share')


class LogLine(LogProcessor):
    """mmengine's LogProcessor with a shorter line.

    Args:
        window_size: steps that the numbers are averaged over.
    """

    def __init__(self, window_size: int = 10) -> None:
        super().__init__(window_size=window_size, by_epoch=False, mean_pattern=_AVERAGED)

    def get_log_after_iter(self, runner: Any, batch_idx: int, mode: str) -> tuple[dict, str]:
        """The scalars, averaged, and the line."""
        tag, _ = super().get_log_after_iter(runner, batch_idx, mode)
        self._average_rates(tag, runner.message_hub.log_scalars, prefix=f'{mode}/')
        eta = runner.message_hub.runtime_info.get('eta')
        return tag, format_step(tag, last=runner.max_iters, eta=eta)

    def _average_rates(self, tag: dict, histories: Mapping[str, Any], *, prefix: str) -> None:
        """A rate over several steps is weighted by their times: a slow step counts as long as it took."""
        for name in _RATES:
            if name in tag:
                rates, times = (histories[prefix + n].data[0][-self.window_size :] for n in (name, 'time'))
                tag[name] = float((rates * times).sum() / times.sum())


def format_step(scalars: Mapping[str, float], *, last: int, eta: float | None = None) -> str:
    """One line.

    For example ``step 20/625  loss 1.2345  grad_norm 0.812  lr 9.98e-05  31.5 samples  12,345 tokens/s (2,310 learned)
    1.52 s: data 1% vision 22% llm 70% optimizer 7%  305.1 TFLOP/s  MFU 30.8%  41.3 GiB  eta 0:15:20``, where ``vision``
    is left out if there was none.

    Args:
        scalars: by name, 'train/' removed; what is missing is left out.
        last: steps of the run.
        eta: seconds left.
    """
    step = f'{scalars["iter"]:.0f}'
    words = [f'step {step:>{len(str(last))}}/{last}']
    words += [f'{name} {scalars[name]:{form}}' for name, form in _known(scalars)]
    words += [f'{name} {value:.2e}' for name, value in scalars.items() if name.endswith('lr')]
    if 'tokens_per_second' in scalars:
        words += [
            f'{scalars["samples"]:.4g} samples',
            f'{scalars["tokens_per_second"]:,.0f} tokens/s ({scalars["learned_tokens_per_second"]:,.0f} learned)',
        ]
        shares = [(phase, scalars[f'{phase}_time'] / scalars['time']) for phase in _PHASES]
        split = ' '.join(f'{phase} {share:.0%}' for phase, share in shares if phase != 'vision' or share > 0)
        words += [f'{scalars["time"]:.3g} s: {split}', f'{scalars["tflops"]:.4g} TFLOP/s']
        words += [f'MFU {scalars["mfu"]:.1%}'] if 'mfu' in scalars else []
        words.append(f'{scalars["memory_mib"] / 1024:.1f} GiB')
    words += [] if eta is None else [f'eta {datetime.timedelta(seconds=int(eta))}']
    return '  '.join(words)


def _known(scalars: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(name, form) for name, form in (('loss', '.4f'), ('grad_norm', '.3f')) if name in scalars]
