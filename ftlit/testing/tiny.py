"""Tiny random models and a tiny tokenizer, built in code: no network, no files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ftlit.batch import Example
from ftlit.data.comparisons import Comparisons
from ftlit.data.store import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_COMMON: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

# Settings that differ from the common ones; together they cover grouped heads, biases on projections, query-key norms,
# sliding windows shorter than the test rows, soft-caps on attention and logits, logit scales, tied and untied heads,
# learned positions and transposed weights (GPT-2).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"sliding_window": 5, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "cohere": ("CohereConfig", {"logit_scale": 0.5}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "gpt2": (
        "GPT2Config",
        {"n_inner": 24, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "num_key_value_heads": 4},
    ),
}


_ENCODER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

# Encoders for classification: a pooler, positions that begin after the pad token, a head of two layers, windows.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {}),
    "roberta": ("RobertaConfig", {"max_position_embeddings": 514}),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
        | {"seq_classif_dropout": 0.0},
    ),
    "electra": ("ElectraConfig", {"embedding_size": 16}),
    "modernbert": (
        "ModernBertConfig",
        {"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
}


def tiny_lm(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random two-layer causal language model of width 16.

    Args:
        family: A key of `FAMILIES`.
        dtype: Type of its weights.
        seed: Seed of its weights; the global generator is left as it was.
        config: Fields of the transformers config to change.

    Returns:
        The model in training mode. Its weights are larger than a trained model's, so that positions and masks matter.
    """
    import transformers

    name, fields = FAMILIES[family]
    settings = getattr(transformers, name)(**{**_COMMON, **fields, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype)
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return lm.train()


def tiny_classifier(
    family: str = "bert", labels: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """A random two-layer sequence classifier of width 16.

    Args:
        family: A key of `ENCODERS`, or of `FAMILIES` for a decoder.
        labels: Number of outputs.
        dtype: Type of its weights.
        seed: Seed of its weights; the global generator is left as it was.
        config: Fields of the transformers config to change.

    Returns:
        The model in training mode, with large weights.
    """
    import transformers

    name, fields = (ENCODERS | FAMILIES)[family]
    common = _ENCODER if family in ENCODERS else _COMMON
    settings = getattr(transformers, name)(**{**common, **fields, "num_labels": labels, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = transformers.AutoModelForSequenceClassification.from_config(settings, dtype=dtype)
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return lm.train()


def tiny_examples(lengths: Sequence[int] = (9, 4, 4, 12, 7), vocabulary: int = 250, seed: int = 0) -> list[Example]:
    """Random examples whose second halves are trained.

    Args:
        lengths: Tokens of each example, 2 or more.
        vocabulary: Tokens are drawn below this.
        seed: Seed of the tokens.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = max(1, length // 2)
        examples.append(Example(ids, [0.0] * prompt + [1.0] * (length - prompt)))
    return examples


def tiny_comparisons(
    sizes: Sequence[Sequence[int]] = ((4, 5, 3), (9, 2, 7), (3, 6, 6), (5, 1, 4), (2, 8, 3), (7, 3, 2), (1, 2, 2)),
    vocabulary: int = 250,
    seed: int = 0,
    *,
    grades: Sequence[Sequence[float]] | None = None,
    margin: float = 0.0,
    weight: float = 1.0,
) -> Comparisons:
    """Random answers to random prompts, each with all its tokens trained.

    Args:
        sizes: For each comparison the tokens of the prompt and of each answer, the best first.
        vocabulary: Tokens are drawn below this.
        seed: Seed of the tokens.
        grades: How good the answers of each comparison are, where not the best first.
        margin: By how much the better answers are better.
        weight: How much a comparison counts.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    pieces, rows = [], []
    for row, (prompt, *answers) in enumerate(sizes):
        values = [margin, *(range(len(answers), 0, -1) if grades is None else grades[row])]
        for place, (length, value) in enumerate(zip((prompt, *answers), values, strict=True)):
            ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
            pieces.append(Example(ids, [weight if place else 0.0] * length, value))
            rows.append(row)
    return Comparisons(Examples.of(pieces, rows, [False] * len(pieces)))


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The same, showing tools and calls as JSON.
TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 259 tokens whose pad token is its end token, as SmolLM2's is.

    Args:
        chat_template: A Jinja chat template; ChatML when left out.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = chat_template
    return fast
