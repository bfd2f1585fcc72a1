"""Which validation of a run was the best. What there is to know is a function of the scores of all of them."""

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal, get_args

from vlmtune.evaluation import is_better
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.suggest import did_you_mean

History = Sequence[dict[str, Any]]
"""Of every validation, oldest first: ``iteration`` and the scores by name."""

Rule = Literal['greater', 'less']


class Monitor:
    """Looks at one score of the validations.

    Args:
        name: of the score: 'val/cer', 'val/loss'.
        rule: whether the greater or the less value is better; None: what the name says, see ``is_better``.
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
        self.sign = 1 if (rule or is_better(self.name)) == 'greater' else -1

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

    def best(self, history: History, *, min_delta: float = 0.0) -> int | None:
        """The place in the history of the best validation, the first of equals; None where no value is a number.

        Args:
            history: of the run.
            min_delta: what a value has to be better by than the best before it.
        """
        found: int | None = None
        for at, row in enumerate(history):
            value = row.get(self.name, math.nan)
            if not math.isfinite(value):
                continue
            if found is None or self.sign * (value - history[found][self.name]) > min_delta:
                found = at
        return found
