"""Which validation of a run was the best. What there is to know is a function of the scores of all of them."""

import math
from collections.abc import Collection, Sequence
from typing import Any, get_args

from vlmtune.evaluation import Evaluator
from vlmtune.evaluation.evaluator import Rule
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.suggest import did_you_mean

History = Sequence[dict[str, Any]]
"""Of every validation, oldest first: ``iteration`` and the scores by name."""


class Monitor:
    """Looks at one score of the validations.

    Args:
        name: of the score: 'val/cer', 'val/loss'.
        rule: whether the greater or the less value is better; None: what the metric says, see ``ask``.
        asked_by: the setting that asks for it, for messages.

    Raises:
        ConfigError: an unknown rule, or a name that is no text.
    """

    def __init__(self, name: str, *, rule: Rule | None = None, asked_by: str) -> None:
        if rule is not None and rule not in get_args(Rule):
            raise ConfigError(f"{asked_by}: rule={rule!r} is unknown; expected 'greater', 'less' or None")
        if not isinstance(name, str):
            raise ConfigError(f"{asked_by}={name!r}: expected the name of a score, such as 'val/loss'")
        self.name, self.asked_by = name.removeprefix('val/'), asked_by
        self.rule = rule

    def ask(self, evaluator: Evaluator) -> None:
        """Take the rule of the metric, unless there is one; before ``best``.

        Raises:
            ConfigError: it has none.
        """
        self.rule = self.rule or evaluator.rule_of(self.name)
        if self.rule is None:
            raise ConfigError(
                f'{self.asked_by}: whether the greater or the less val/{self.name} is the better one is not known; '
                "add rule='greater' or rule='less' to the metric, dict(type=..., rule='less'), or beside this setting"
            )

    def check(self, names: Collection[str]) -> None:
        """Tell whether there is such a score.

        Raises:
            ConfigError: there is none.
        """
        if self.name not in names:
            shown = sorted(f'val/{name}' for name in names)
            raise ConfigError(
                f'{self.asked_by}: no score is called {f"val/{self.name}"!r}'
                f'{did_you_mean(f"val/{self.name}", shown)}; there are {", ".join(shown)}'
            )

    def check_last(self, history: History) -> None:
        """Tell, behind a validation, whether it has given that score; some metrics name theirs only once they run.

        Raises:
            ConfigError: it has not.
        """
        self.check([name for name in history[-1] if name != 'iteration'])

    def best(self, history: History, *, min_delta: float = 0.0) -> int | None:
        """The place in the history of the best validation, the first of equals; None where no value is a number.

        Args:
            history: of the run.
            min_delta: what a value has to be better by than the best before it.
        """
        found: int | None = None
        sign = -1 if self.rule == 'less' else 1
        for at, row in enumerate(history):
            value = row.get(self.name, math.nan)
            if not math.isfinite(value):
                continue
            if found is None or sign * (value - history[found][self.name]) > min_delta:
                found = at
        return found
