"""What every verifier must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from ftlit.rollout.verifiers import Prompt, verify


class VerifierSuite(ABC):
    """Subclass it as `TestMine`, say how to make the verifier, and what is right and wrong."""

    columns: dict[str, Sequence[Any]]
    """The columns of some rows."""

    right: Sequence[str]
    """An answer to each row that scores higher ..."""

    wrong: Sequence[str]
    """... than this one."""

    @abstractmethod
    def make(self) -> Callable[..., Any]:
        """A new verifier."""

    def scores(self, completions: Sequence[str], rows: Sequence[int] | None = None) -> list[Any]:
        """Scores of answers to some rows (all when left out)."""
        rows = range(len(completions)) if rows is None else rows
        prompts: list[Prompt] = [[{"role": "user", "content": f"Question {row}"}] for row in rows]
        return verify(self.make(), prompts, completions, {k: [v[row] for row in rows] for k, v in self.columns.items()})

    def test_right_is_better_than_wrong(self) -> None:
        """Each row tells them apart."""
        for good, bad in zip(self.scores(self.right), self.scores(self.wrong), strict=True):
            assert good > bad

    def test_the_same_again(self) -> None:
        """Nothing is drawn or remembered."""
        verifier = self.make()
        prompts: list[Prompt] = [[] for _ in self.right]
        first = verify(verifier, prompts, self.right, dict(self.columns))
        assert verify(verifier, prompts, self.right, dict(self.columns)) == first

    def test_rows_do_not_see_each_other(self) -> None:
        """A row scores the same alone, and wherever it stands."""
        whole = self.scores(self.right)
        rows = list(range(len(self.right)))
        assert self.scores(self.right[::-1], rows[::-1]) == whole[::-1]
        assert [self.scores([self.right[row]], [row])[0] for row in rows] == whole

    def test_any_text_can_be_scored(self) -> None:
        """Empty answers, other scripts and long ones are answers too."""
        for text in ("", " \n", "答案是四十二。", "🙂" * 50, "\x00", "no " * 500):
            assert self.scores([text] * len(self.right)) is not None

    def test_nothing_to_score(self) -> None:
        """No answers have no scores."""
        assert self.scores([], []) == []
