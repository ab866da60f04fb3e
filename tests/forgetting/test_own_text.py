import pytest
import torch

from ftlit.errors import ConfigError
from ftlit.forgetting import own_text as module
from ftlit.forgetting.fingerprint import fingerprint
from ftlit.forgetting.own_text import BLOCK, own_text
from ftlit.models.policy import Policy
from ftlit.peft import Full, LoRA, PromptTuning
from ftlit.testing import tiny_lm, tiny_tokenizer

from .stages import disturb, stage_of

PROMPTS = [[3, 40, 41, 42], [3, 50], [3, 60, 61]]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


def never(*args, **kwargs):
    raise AssertionError("generated again")


@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_a_text_is_a_function_of_its_number(prompts, tmp_path, monkeypatch):
    stage = stage_of()
    whole = own_text(stage, prompts, 2 * BLOCK + 3, max_new_tokens=6)
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "other"))
    part = own_text(stage, prompts, 5, max_new_tokens=6, skip=BLOCK - 2)
    assert part == whole[BLOCK - 2 : BLOCK + 3]
    assert len({tuple(example.input_ids) for example in whole}) > 0.9 * len(whole)


def test_given_prompts_are_continued_in_turn_and_the_answer_is_trained():
    texts = own_text(stage_of(), PROMPTS, 5, max_new_tokens=7)
    for number, text in enumerate(texts):
        prompt = PROMPTS[number % 3]
        assert text.input_ids[: len(prompt)] == prompt
        assert text.weights == [0.0] * len(prompt) + [1.0] * (len(text.input_ids) - len(prompt))
        own = text.input_ids[len(prompt) :]
        end = tiny_tokenizer().eos_token_id
        assert 1 <= len(own) <= 7 + (own[-1] == end)
        assert end not in own[:-1]


def test_the_model_asks_its_own_questions():
    stage = stage_of()
    for text in own_text(stage, None, 8, max_new_tokens=8):
        shown = stage.tokenizer.decode(text.input_ids)
        assert shown.startswith("<|im_start|>user\n")
        prompt = stage.tokenizer.decode([t for t, w in zip(text.input_ids, text.weights, strict=True) if not w])
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_without_a_chat_template_it_writes_documents():
    stage = stage_of(chat=False)
    for text in own_text(stage, None, 8, max_new_tokens=8):
        assert text.weights[:2] == [0.0, 1.0]
        assert text.input_ids[0] == stage.tokenizer.bos_token_id


def test_samples_follow_the_start_model():
    """The first token of 600 answers to one prompt has the model's own distribution."""
    stage = stage_of()
    texts = own_text(stage, PROMPTS[:1], 600, max_new_tokens=2)
    first = torch.tensor([text.input_ids[len(PROMPTS[0])] for text in texts])
    with torch.no_grad():
        expected = stage.policy.lm(torch.tensor(PROMPTS[:1])).logits[0, -1].double().softmax(-1)
    top = expected.topk(3).indices
    for token in top:
        share, p = (first == token).double().mean(), expected[token]
        assert abs(share - p) < 4 * (p * (1 - p) / 600).sqrt()


@pytest.mark.parametrize("peft", [lambda: LoRA(rank=2), lambda: PromptTuning(num_virtual_tokens=2), Full])
def test_a_trained_model_still_writes_what_the_start_model_wrote(peft, tmp_path, monkeypatch):
    stage = stage_of(peft())
    if isinstance(stage.strategy, LoRA | Full):
        before = own_text(stage, PROMPTS, 6, max_new_tokens=6)
    else:  # at the start, a prompt adds nothing
        before = own_text(stage_of(), PROMPTS, 6, max_new_tokens=6)
    disturb(stage)
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "other"))
    trained = {name: p.detach().clone() for name, p in stage.policy.lm.named_parameters()}
    assert own_text(stage, PROMPTS, 6, max_new_tokens=6) == before
    for name, parameter in stage.policy.lm.named_parameters():
        assert torch.equal(parameter, trained[name])


def test_texts_come_from_the_cache_also_after_training(monkeypatch, capsys):
    stage = stage_of()
    before = own_text(stage, None, 6, max_new_tokens=6)
    assert "32 texts are written by the start model" in capsys.readouterr().out
    disturb(stage)
    monkeypatch.setattr(module, "answer", never)
    assert own_text(stage, None, 6, max_new_tokens=6) == before
    assert own_text(stage_of(), None, 4, max_new_tokens=6) == before[:4]
    assert not capsys.readouterr().out
    for other in ({"seed": 1}, {"max_new_tokens": 5}, {"temperature": 0.5}):
        with pytest.raises(AssertionError, match="generated again"):
            own_text(stage, None, 6, **{"max_new_tokens": 6, **other})
    with pytest.raises(AssertionError, match="generated again"):
        own_text(stage, PROMPTS, 6, max_new_tokens=6)
    with pytest.raises(AssertionError, match="generated again"):
        own_text(stage_of(seed=1), None, 6, max_new_tokens=6)


@pytest.mark.parametrize("torn", ["", "[[[1], [2", "[]", "[[1, 2]]", "{}"])
def test_a_torn_file_is_made_again(torn, tmp_path):
    stage = stage_of()
    before = own_text(stage, PROMPTS, 6, max_new_tokens=6)
    (file,) = (tmp_path / "cache").rglob("0.json")
    file.write_text(torn)
    assert own_text(stage, PROMPTS, 6, max_new_tokens=6) == before


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(own_text(stage_of(), PROMPTS, BLOCK + 1, max_new_tokens=3)) == BLOCK + 1
    assert capsys.readouterr().out.count("cannot be written") == 1


def test_nothing_else_is_touched():
    stage = stage_of(LoRA(rank=2, dropout=0.5))
    stage.policy.train()
    state = torch.random.get_rng_state()
    own_text(stage, None, 3, max_new_tokens=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in stage.policy.modules())
    assert all(parameter.grad is None for parameter in stage.parameters())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"max_new_tokens": 1}, "max_new_tokens must be at least 2, got 1"),
        ({"skip": -1}, "skip must be at least 0"),
        ({"temperature": 0.0}, "positive temperature"),
        ({"prompts": []}, "at least one prompt"),
    ],
)
def test_mistakes_are_one_sentence(settings, says):
    with pytest.raises(ConfigError, match=says):
        own_text(stage_of(), **{"prompts": PROMPTS, "num": 2, **settings})


def test_fingerprint_is_that_of_the_start():
    lora, full = Policy(tiny_lm(), LoRA(rank=2)), Policy(tiny_lm(), Full())
    full.strategy.remember_start(full.lm)
    names = [fingerprint(one.lm, one.strategy) for one in (lora, full)]
    with torch.no_grad():
        for one in (lora, full):
            for parameter in one.strategy.trained(one.lm).values():
                parameter.add_(0.1)
    assert [fingerprint(one.lm, one.strategy) for one in (lora, full)] == names
    other = Policy(tiny_lm(), LoRA(rank=4))
    assert fingerprint(other.lm, other.strategy) == names[0], "how it will be trained does not matter"


def test_fingerprint_sees_every_entry():
    policy = Policy(tiny_lm(), LoRA(rank=2))
    before = fingerprint(policy.lm, policy.strategy)
    weight = policy.lm.get_input_embeddings().weight
    with torch.no_grad():
        weight.view(-1)[1234] *= 1.0001
    assert fingerprint(policy.lm, policy.strategy) != before
