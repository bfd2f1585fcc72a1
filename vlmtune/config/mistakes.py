"""All mistakes of a config in one error."""

from collections.abc import Iterable

from vlmtune.utils.errors import ConfigError


class ConfigMistakes(ConfigError):
    """Several mistakes. One stands alone on its line; several stand under a heading, one a line."""

    def __init__(self, mistakes: Iterable[str], *, where: str) -> None:
        self.mistakes = list(dict.fromkeys(mistakes))
        heading = [f'{len(self.mistakes)} mistakes in {where}:'] if len(self.mistakes) > 1 else []
        super().__init__('\n  '.join(heading + self.mistakes))


def raise_mistakes(mistakes: Iterable[str], *, where: str) -> None:
    """Raises one error for all mistakes, if there are any.

    Raises:
        ConfigMistakes: there are.
    """
    found = list(mistakes)
    if found:
        raise ConfigMistakes(found, where=where)
