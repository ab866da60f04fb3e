"""Documents that are trained while they are measured."""

import random

import lightning as L
from hypothesis import given
from hypothesis import strategies as st

from ftlit.batch import Example
from ftlit.forgetting.base import ForgettingControl
from ftlit.forgetting.overlap import overlaps
from ftlit.peft import LoRA
from ftlit.stages import SFT
from ftlit.testing import tiny_examples, tiny_lm
from tests.forgetting.test_replay import GENERAL, Given
from tests.stages.test_step import LENGTHS, Data

text = st.lists(st.integers(1, 3), min_size=1, max_size=3)


def example(prompt, answer):
    return Example(prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer))


@given(st.lists(st.tuples(text, text), max_size=6), st.lists(st.tuples(text, text), max_size=6))
def test_answers_are_compared_whatever_the_prompt(documents, rows):
    found = list(overlaps({"probe": [example(*one) for one in documents]}, {"train": [example(*one) for one in rows]}))
    answers = [answer for _, answer in rows]
    count = sum(answer in answers for _, answer in documents)
    assert found == ([("probe", "train", count)] if count else [])


class Measures(ForgettingControl):
    """Measures some of its documents, and of the rows it is given."""

    in_loss = False

    def __init__(self, rows):
        super().__init__(0.0, "probe")
        self.rows = rows

    def held_out(self):
        return {"own": [*tiny_examples((5, 6), seed=99), *self.rows]}


def test_a_run_says_it(capsys):
    rows = tiny_examples(LENGTHS)
    replayed = tiny_examples(GENERAL, seed=7)
    controls = [Given(), Measures([*random.Random(0).sample(replayed, 3), rows[1]])]
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=1,
        enable_model_summary=False, callbacks=controls,
    )  # fmt: skip
    data = Data(rows)
    data.sets = {"train": rows}
    trainer.fit(SFT(policy=tiny_lm(), peft=LoRA(), lr=1e-3), data)
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert said == [
        f"  warning: {count} of the 6 documents of probe (own) are also trained by {trainer}, so what is measured on "
        "them flatters; take other rows for one of the two"
        for count, trainer in ((3, "replay"), (1, "data.train"))
    ]
