"""What ``vlmtune check-data`` finds wrong, row by row."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vlmtune.utils.errors import DATA_ERROR_KINDS

WARNING_KINDS: Mapping[str, str] = {
    'overlong': 'sample is longer than max_length and is dropped',
    'duplicate': 'row is the same as an earlier one',
}
"""Problems with which data is not wrong: the word that programs read, and what people read."""
ERROR_KINDS: Mapping[str, str] = {
    **DATA_ERROR_KINDS,
    'failed_function': 'dataset_map_fn fails on the row',
    'overlong_refused': "sample is longer than max_length, and overlong='error'",
}
"""Problems that make the exit code 1."""
KINDS: Mapping[str, str] = {**ERROR_KINDS, **WARNING_KINDS}


@dataclass(frozen=True)
class Problem:
    """Something wrong with one row; ``kind`` is one of ``KINDS``."""

    index: int  # of the row in its data set
    where: str
    kind: str
    reason: str


@dataclass
class DataSetReport:
    """What one data set is like."""

    name: str
    rows: int
    images: int = 0  # in rows that could be read; a file counts every time it is used
    problems: list[Problem] = field(default_factory=list)

    def by_kind(self) -> dict[str, list[Problem]]:
        """The problems of each kind that occurs, in the order of ``KINDS`` and of the rows."""
        ordered = sorted(self.problems, key=lambda problem: problem.index)
        grouped = {kind: [problem for problem in ordered if problem.kind == kind] for kind in KINDS}
        return {kind: problems for kind, problems in grouped.items() if problems}

    def count(self, kinds: Mapping[str, str]) -> int:
        """How many problems are of one of ``kinds``."""
        return sum(problem.kind in kinds for problem in self.problems)
