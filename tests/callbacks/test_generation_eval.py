"""What a round of GenerationEval makes of answers, without a model."""

import math

from ftlit.callbacks import GenerationEval
from ftlit.callbacks.generation_eval import _Made
from ftlit.callbacks.generation_rows import EvalRow
from ftlit.data.formats import Message


def scored(verifier, texts, **more):
    callback = GenerationEval(verifier=verifier)
    callback._questions = [
        EvalRow(
            n + 1, (Message("user", "Hi"),), [5], "def f():\n    pass\n", {"grade": n}, where=f"x, row {n + 1}", **more
        )
        for n in range(len(texts))
    ]
    made = [_Made(n, text, len(text), n % 2 == 0, [7] * len(text)) for n, text in enumerate(texts)]
    return callback._score(made, 1.0)


def test_a_verifier_sees_what_was_said():
    seen = {}

    def check(completions, reference, truncated, completion_ids, prefilled, grade):
        seen.update(said=completions, truncated=truncated, ids=completion_ids, begun=prefilled, grade=grade)
        return [float(text == right) for text, right in zip(completions, reference, strict=True)]

    texts = ["def f():\n    pass\n", "    pass\n"]
    values, records = scored(check, texts, prefilled="<think>\n")
    assert seen["said"] == [record["answer"] for record in records] == texts
    assert seen["truncated"] == [False, True]
    assert seen["ids"] == [[7] * len(text) for text in texts]
    assert (seen["begun"], seen["grade"]) == (["<think>\n"] * 2, [0, 1])
    assert values["verifier"] == 0.5


def test_a_verifier_may_abstain():
    values, records = scored(lambda completion: None if completion == "x" else 1.0, ["a", "x", "b"])
    assert [record["verifier"] for record in records] == [1.0, None, 1.0]
    assert values["verifier"] == 1.0
    values, _ = scored(lambda completions: [None] * 2, ["a", "b"])
    assert math.isnan(values["verifier"])
