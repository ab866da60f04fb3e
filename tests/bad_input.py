"""Mistakes people make: each sets itself up and returns the command. `tests/bad_input.md` has the answers."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from ftlit.peft import LoRA
from ftlit.peft.io import save_adapter
from ftlit.testing import tiny_lm, tiny_tokenizer


class World:
    """A folder with good rows, a good model, and commands that work."""

    def __init__(self, folder: Path, model: str, trained: Path) -> None:
        self.folder, self.model, self.trained = folder, model, trained
        self.fit = ["fit", "--config", "sft", "--config", "peft/lora", "--config", "trainer/cpu", "--run", "new"]
        self.fit += ["--model.policy", model, "--trainer.max_steps", "1"]
        turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
        self.good = json.dumps({"messages": turns})
        self.dpo, self.reward, self.classification = (
            [option if option != "sft" else stage for option in self.fit]
            for stage in ("dpo", "reward", "classification")
        )
        self.rows = self.write("good.jsonl", f"{self.good}\n" * 4)

    def write(self, name: str, text: str | bytes) -> str:
        """A file of the folder; its name."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    def on(self, *more: str) -> list[str]:
        """A run on the good rows."""
        return [*self.fit, "--data.train", self.rows, *more]

    def own(self, text: str, strategy: str) -> list[str]:
        """A run with a strategy in a file of one's own."""
        self.write(f"{strategy.split('.')[0]}.py", text)
        return self.on("--model.peft", strategy)

    def data(self, name: str, text: str | bytes, *more: str) -> list[str]:
        """A run on a file of rows."""
        return [*self.fit, "--data.train", self.write(name, text), *more]

    def row(self, row: object, *more: str) -> list[str]:
        """A run on a good row and then another one."""
        return self.data("rows.jsonl", f"{self.good}\n{json.dumps(row, ensure_ascii=False)}\n", *more)

    def pairs(self, row: dict[str, object]) -> list[str]:
        """DPO on rows of preferences: a good pair, unless a row is given."""
        row = row or {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
        return [*self.dpo, "--data.train", self.write("pairs.jsonl", f"{json.dumps(row)}\n")]

    def pair(self, **columns: object) -> list[str]:
        """DPO on a pair with some columns changed; null leaves the prompt out."""
        row = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", **columns}
        return self.pairs({key: value for key, value in row.items() if key != "prompt" or value is not None})

    def labels(self, *rows: dict[str, object], **columns: object) -> list[str]:
        """Classification of two good rows and then some others, or of one with some columns changed."""
        good = [{"text": "Fine.", "label": "good"}, {"text": "Awful.", "label": "bad"}]
        text = "".join(json.dumps(row) + "\n" for row in [*good, *(rows or [{**good[0], **columns}])])
        return [*self.classification, "--data.train", self.write("labels.jsonl", text)]

    def messages(self, *turns: dict[str, object]) -> list[str]:
        """A run on a good row and then another conversation."""
        return self.row({"messages": list(turns)})

    def run(self) -> Path:
        """A run that was trained one step, as `old`."""
        shutil.copytree(self.trained, self.folder / "old")
        return self.folder / "old"

    def adapter(self, **config: object) -> Path:
        """A good adapter folder, with some fields of its config changed."""
        lm, strategy = tiny_lm(), LoRA(rank=2)
        strategy.apply(lm)
        save_adapter(strategy, lm, self.folder / "adapter", self.model)
        path = self.folder / "adapter/adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return self.folder / "adapter"


HALF = "from ftlit import PEFTStrategy\nclass Half(PEFTStrategy):\n    def apply(self, model): pass\n"

Case = Callable[[World], list[str]]
CASES: dict[str, tuple[str, Case]] = {}


def mistake(kind: str) -> Callable[[Case], Case]:
    """Registers a mistake under the name of its function."""

    def register(function: Case) -> Case:
        CASES[function.__name__.strip("_").replace("_", " ")] = (kind, function)
        return function

    return register


def simple(kind: str, **cases: Case) -> None:
    """Registers mistakes that are one expression."""
    for name, function in cases.items():
        CASES[name.replace("_", " ")] = (kind, function)


def user(content: object = "Hi?") -> dict[str, object]:
    return {"role": "user", "content": content}


def answer(content: object = "Yes.") -> dict[str, object]:
    return {"role": "assistant", "content": content}


# ---- commands and configs -----------------------------------------------------------------------------------------

simple(
    "command",
    misspelt_verb=lambda w: ["fti"],
    misspelt_option=lambda w: w.on("--trainer.max_epoch", "3"),
    name_from_another_framework=lambda w: w.on("--learning_rate", "1e-4"),
    misspelt_argument_of_a_class=lambda w: w.on("--model.peft.rnak", "4"),
    misspelt_loss=lambda w: [*w.pair(), "--model.loss", "sigmod"],
    cache_of_no_reference=lambda w: [*w.pair(), "--model.loss", "simpo", "--model.cache_reference", "true"],
    loss_as_another_framework_calls_it=lambda w: [*w.pair(), "--loss_type", "ipo"],
    beta_of_no_loss=lambda w: [*w.pair(), "--model.beta", "0.1"],
    model_as_reference=lambda w: [*w.pair(), "--ref_model", "other"],
    prompts_of_a_length_of_their_own=lambda w: [*w.pair(), "--data.max_prompt_length", "512"],
    misspelt_loss_in_a_sum=lambda w: [*w.pair(), "--model.loss", "[sigmoid, stf]"],
    loss_of_a_reward_model=lambda w: [*w.reward, *w.pair()[-2:], "--model.loss", "sigmoid"],
    replay_for_a_reward_model=lambda w: [*w.reward, *w.pair()[-2:], "--config", "forgetting/replay"],
    number_of_labels=lambda w: [*w.labels(), "--num_labels", "2"],
    class_weight_of_an_unknown_label=lambda w: [*w.labels(), "--model.class_weights", "{god: 2}"],
    labels_that_leave_one_out=lambda w: [*w.labels(), "--data.labels", "[good, neutral]"],
    scores_of_a_language_model=lambda w: ["score", w.model, "--rows", w.rows],
    scores_of_nothing=lambda w: ["score", w.model, "--rows", w.write("rows.jsonl", '{"Frage": "Hi?"}\n')],
    misspelt_class=lambda w: w.on("--model.peft", "Lora2"),
    class_that_its_file_lacks=lambda w: w.own("class BitFit: pass", "own1.Bitfit"),
    class_of_another_kind=lambda w: w.own("class BitFit: pass", "own2.BitFit"),
    class_in_a_torn_file=lambda w: w.own("x = (", "own3.BitFit"),
    class_that_is_not_finished=lambda w: w.own(HALF, "own4.Half"),
    class_of_a_missing_file=lambda w: w.on("--model.peft", "mine.BitFit"),
    text_for_a_number=lambda w: w.on("--data.batch_size", "many"),
    unknown_choice=lambda w: w.on("--model.schedule", "cosin"),
    no_model=lambda w: ["fit", "--config", "sft", "--data.train", w.rows],
    no_rows=lambda w: w.fit,
    model_as_stage=lambda w: ["fit", "--model", "./model", "--data.train", w.rows],
    missing_config=lambda w: [*w.fit, "--config", "runs/my.yaml"],
    misspelt_shipped_config=lambda w: [*w.fit, "--config", "peft/lroa"],
    config_that_is_no_YAML=lambda w: [*w.fit, "--config", w.write("my.yaml", "model: [1\n")],
    misspelt_key_in_a_config=lambda w: w.on("--config", w.write("my.yaml", "trainer:\n  devises: 1\n")),
    run_that_exists=lambda w: w.on("--run", w.run().name),
    prompt_missing=lambda w: ["generate", w.model],
    negative_temperature=lambda w: ["generate", w.model, "--prompt", "Hi?", "--temperature", "-1"],
    missing_prompts_file=lambda w: ["generate", w.model, "--prompts", "p.txt"],
    export_into_a_full_folder=lambda w: ["export", w.run().name, "--to", "old"],
)
simple(
    "number",
    negative_rate=lambda w: w.on("--model.lr", "-1"),
    batch_size_0=lambda w: w.on("--data.batch_size", "0"),
    max_length_1=lambda w: w.on("--data.max_length", "1"),
    LoRA_of_rank_0=lambda w: w.on("--model.peft.rank", "0"),
    LoRA_larger_than_the_layer=lambda w: w.on("--model.peft.rank", "1000"),
    LoRA_dropout_of_2=lambda w: w.on("--model.peft.dropout", "2"),
    LoRA_on_layers_that_are_not_there=lambda w: w.on("--model.peft.target_modules", "[q_prj]"),
    beta_of_0=lambda w: [*w.pair(), "--model.loss.beta", "0"],
    half_of_the_labels_wrong=lambda w: [*w.pair(), "--model.loss.label_smoothing", "0.5"],
    AOT_on_single_rows=lambda w: [*w.pair(), "--model.loss", "aot", "--data.batch_size", "1"],
    sum_of_losses_without_a_weight_each=lambda w: [
        *w.pair(),
        "--model.loss",
        "WeightedSum",
        "--model.loss.losses",
        "[sigmoid, sft]",
        "--model.loss.weights",
        "[1]",
    ],
    centring_below_0=lambda w: [
        *w.reward,
        *w.pair()[-2:],
        "--model.objective",
        "BradleyTerry",
        "--model.objective.center",
        "-1",
    ],
    no_virtual_tokens=lambda w: w.on("--model.peft", "PromptTuning", "--model.peft.num_virtual_tokens", "0"),
    validation_share_of_2=lambda w: w.on("--data.validation", "2.0"),
    checkpoint_every_0_steps=lambda w: w.on("--trainer.callbacks.every_n_steps", "0"),
    more_devices_than_there_are=lambda w: w.on("--trainer.accelerator", "gpu"),
    unknown_precision=lambda w: w.on("--trainer.precision", "bf17"),
)

# ---- models, adapters, checkpoints --------------------------------------------------------------------------------


@mistake("model")
def missing_model_folder(w: World) -> list[str]:
    return w.on("--model.policy", "./models/llama")


@mistake("model")
def run_as_a_model(w: World) -> list[str]:
    return [*w.pair(), "--model.policy", w.run().name]


@mistake("model")
def adapter_as_a_model(w: World) -> list[str]:
    return [*w.pair(), "--model.policy", w.adapter().name]


@mistake("model")
def hub_id_without_network(w: World) -> list[str]:
    return w.on("--model.policy", "nobody/nothing")


@mistake("model")
def folder_without_a_model(w: World) -> list[str]:
    w.write("empty/readme.txt", "")
    return w.on("--model.policy", "empty")


@mistake("model")
def file_that_is_no_model(w: World) -> list[str]:
    return w.on("--model.policy", w.write("weights.bin", "x"))


@mistake("model")
def torn_GGUF(w: World) -> list[str]:
    return w.on("--model.policy", w.write("model.gguf", b"GGUF\3\0\0\0 and then nothing"))


@mistake("model")
def torn_weights(w: World) -> list[str]:
    shutil.copytree(w.model, w.folder / "model")
    path = w.folder / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    return w.on("--model.policy", "model")


@mistake("model")
def weights_that_are_not_numbers(w: World) -> list[str]:
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    lm.save_pretrained(w.folder / "model")
    tiny_tokenizer().save_pretrained(w.folder / "model")
    return w.on("--model.policy", "model")


@mistake("model")
def model_without_a_tokenizer(w: World) -> list[str]:
    tiny_lm().save_pretrained(w.folder / "model")
    return w.on("--model.policy", "model")


@mistake("model")
def torn_config_of_a_model(w: World) -> list[str]:
    shutil.copytree(w.model, w.folder / "model")
    (w.folder / "model/config.json").write_text('{"model_type": "lla')
    return w.on("--model.policy", "model")


@mistake("model")
def encoder_instead_of_a_language_model(w: World) -> list[str]:
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
        w.folder / "model"
    )
    tiny_tokenizer().save_pretrained(w.folder / "model")
    return w.on("--model.policy", "model")


@mistake("adapter")
def adapter_of_another_size_of_model(w: World) -> list[str]:
    tiny_lm(hidden_size=32, head_dim=8).save_pretrained(w.folder / "large")
    tiny_tokenizer().save_pretrained(w.folder / "large")
    return ["generate", w.adapter().name, "--base", "large", "--prompt", "Hi?"]


@mistake("adapter")
def adapter_of_another_depth_of_model(w: World) -> list[str]:
    tiny_lm(num_hidden_layers=1).save_pretrained(w.folder / "low")
    tiny_tokenizer().save_pretrained(w.folder / "low")
    return ["generate", w.adapter().name, "--base", "low", "--prompt", "Hi?"]


@mistake("adapter")
def adapter_without_its_weights(w: World) -> list[str]:
    (w.adapter() / "adapter_model.safetensors").unlink()
    return ["generate", "adapter", "--prompt", "Hi?"]


@mistake("adapter")
def torn_adapter(w: World) -> list[str]:
    path = w.adapter() / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return ["generate", "adapter", "--prompt", "Hi?"]


@mistake("adapter")
def torn_config_of_an_adapter(w: World) -> list[str]:
    (w.adapter() / "adapter_config.json").write_text('{"r": ')
    return ["generate", "adapter", "--prompt", "Hi?"]


@mistake("adapter")
def adapter_of_an_unknown_method(w: World) -> list[str]:
    return ["generate", w.adapter(peft_type="XLORA").name, "--prompt", "Hi?"]


@mistake("adapter")
def adapter_without_a_base(w: World) -> list[str]:
    return ["generate", w.adapter(base_model_name_or_path=None).name, "--prompt", "Hi?"]


@mistake("adapter")
def adapter_with_a_feature_that_ftlit_lacks(w: World) -> list[str]:
    return ["generate", w.adapter(use_dora=True).name, "--prompt", "Hi?"]


@mistake("checkpoint")
def missing_checkpoint(w: World) -> list[str]:
    return w.on("--ckpt_path", "old/last.ckpt")


@mistake("checkpoint")
def torn_checkpoint(w: World) -> list[str]:
    path = w.run() / "checkpoints/best.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    return w.on("--ckpt_path", "old/checkpoints/best.ckpt")


@mistake("checkpoint")
def checkpoint_of_another_program(w: World) -> list[str]:
    torch.save({"weights": torch.zeros(3)}, w.folder / "other.ckpt")
    return w.on("--ckpt_path", "other.ckpt")


@mistake("checkpoint")
def checkpoint_of_another_rank(w: World) -> list[str]:
    w.run()
    return w.on("--ckpt_path", "old/checkpoints/last.ckpt", "--model.peft.rank", "2")


@mistake("checkpoint")
def checkpoint_with_code_in_it(w: World) -> list[str]:
    import pickle

    (w.folder / "evil.ckpt").write_bytes(pickle.dumps(print))
    return w.on("--ckpt_path", "evil.ckpt")


@mistake("checkpoint")
def run_without_a_checkpoint(w: World) -> list[str]:
    shutil.rmtree(w.run() / "checkpoints")
    return ["generate", "old", "--prompt", "Hi?"]


@mistake("checkpoint")
def run_with_a_torn_config(w: World) -> list[str]:
    path = w.run() / "config.yaml"
    path.write_text(path.read_text()[:40])
    return ["generate", "old", "--prompt", "Hi?"]


@mistake("checkpoint")
def merging_what_cannot_be_merged(w: World) -> list[str]:
    from ftlit.peft import PromptTuning

    lm, strategy = tiny_lm(), PromptTuning(2)
    strategy.apply(lm)
    save_adapter(strategy, lm, w.folder / "prompt", w.model)
    return ["export", "prompt", "--to", "merged"]


# ---- rows ---------------------------------------------------------------------------------------------------------

simple(
    "file",
    missing_file=lambda w: [*w.fit, "--data.train", "god.jsonl"],
    empty_file=lambda w: w.data("rows.jsonl", ""),
    empty_list=lambda w: w.data("rows.json", "[]"),
    torn_JSON=lambda w: w.data("rows.json", f"[{w.good}, {w.good[:30]}"),
    torn_line=lambda w: w.data("rows.jsonl", f"{w.good}\n{w.good[:30]}\n"),
    row_that_is_no_object=lambda w: w.data("rows.jsonl", f"{w.good}\n[1, 2]\n"),
    invalid_UTF_8=lambda w: w.data("rows.jsonl", f"{w.good}\n".encode() + b'{"messages": "\xff"}\n'),
    unknown_suffix=lambda w: w.data("rows.docx", "x"),
    torn_gzip=lambda w: w.data("rows.jsonl.gz", gzip.compress(f"{w.good}\n".encode() * 99)[:60]),
    torn_parquet=lambda w: w.data("rows.parquet", b"PAR1 and then nothing"),
    empty_folder=lambda w: [*w.fit, "--data.train", str(Path(w.write("none/.keep", "")).parent)],
    unknown_columns=lambda w: w.data("rows.jsonl", '{"Frage": "Hi?", "Antwort": "Yes."}\n'),
    CSV_with_a_column_twice=lambda w: w.data("rows.csv", "prompt,prompt\nHi?,Yes.\n"),
    CSV_row_with_too_many_cells=lambda w: w.data("rows.csv", "prompt,completion\nHi?,Yes.,More\n"),
    unknown_sample=lambda w: [*w.fit, "--data.train", "sample:identiy"],
    unknown_row_format=lambda w: w.on("--data.format", "ShareGTP"),
    format_of_other_columns=lambda w: w.on("--data.format", "Alpaca"),
    columns_that_are_not_there=lambda w: w.on("--data.columns", "{messages: turns}"),
    hub_data_without_network=lambda w: [*w.fit, "--data.train", "nobody/rows"],
    chat_template_that_is_no_template=lambda w: w.on("--data.chat_template", "my.jinja"),
    validation_takes_all=lambda w: w.on("--data.validation", "0.99"),
    weight_of_a_source_below_0=lambda w: [*w.fit, "--data.train", f"{{{w.rows}: -1}}"],
)
simple(
    "row",
    null_content=lambda w: w.messages(user(), answer(None)),
    empty_answer=lambda w: w.messages(user(), answer("  ")),
    content_of_the_wrong_type=lambda w: w.messages(user(3), answer()),
    missing_content=lambda w: w.messages(user(), {"role": "assistant"}),
    unknown_role=lambda w: w.messages({"role": "martian", "content": "Hi?"}, answer()),
    empty_conversation=lambda w: w.messages(),
    only_a_system_turn=lambda w: w.messages({"role": "system", "content": "Be kind."}),
    no_answer=lambda w: w.messages(user()),
    answer_first=lambda w: w.messages(answer()),
    messages_as_text=lambda w: w.row({"messages": "Hi?"}),
    null_messages=lambda w: w.row({"messages": None}),
    missing_column=lambda w: w.row({"text": "Hi."}),
    message_that_is_no_object=lambda w: w.row({"messages": ["Hi?", answer()]}),
    half_a_surrogate=lambda w: w.data("r.jsonl", '{"messages": [{"role": "user", "content": "\\ud800"}, '
                                      '{"role": "assistant", "content": "Yes."}]}\n'),
    Alpaca_without_output=lambda w: w.data("r.json", '[{"instruction": "Hi?", "output": null}]'),
    Alpaca_with_a_number=lambda w: w.data("r.json", '[{"instruction": "Add.", "output": 4}]'),
    prompt_without_completion=lambda w: w.data("r.jsonl", '{"prompt": "Hi?", "completion": ""}\n'),
    ShareGPT_with_an_unknown_speaker=lambda w: w.data(
        "r.json", '[{"conversations": [{"from": "martian", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]}]'),
    text_of_nothing=lambda w: w.data("r.jsonl", '{"text": ""}\n'),
    everything_cut_away=lambda w: w.on("--data.max_length", "3"),
    null_rejected=lambda w: w.pair(rejected=None),
    chosen_of_the_wrong_type=lambda w: w.pair(chosen=3),
    answers_of_two_shapes=lambda w: w.pair(chosen=[user(), answer()], rejected="No."),
    conversations_that_begin_apart=lambda w: w.pair(
        prompt=None, chosen=[user(), answer()], rejected=[user("Ho?"), answer("No.")]),
    texts_that_begin_apart=lambda w: w.pair(prompt=None, chosen="Yes.", rejected="No."),
    pairs_that_are_all_equal=lambda w: w.pairs({"prompt": "Hi?", "chosen": "Yes.", "rejected": "Yes."}),
    answers_that_are_all_empty=lambda w: w.pairs({"prompt": "Hi?", "chosen": "Yes.", "rejected": " "}),
    margin_below_0=lambda w: w.pair(margin=-1),
    margin_that_is_not_used=lambda w: [*w.pair(margin=2), "--model.loss", "ipo"],
    label_that_is_neither_true_nor_false=lambda w: w.pairs({"prompt": "Hi?", "completion": "Yes.", "label": "good"}),
    labels_for_a_loss_of_pairs=lambda w: w.pairs({"prompt": "Hi?", "completion": "Yes.", "label": True}),
    ranking_of_one=lambda w: w.pairs({"prompt": "Hi?", "answers": ["Yes."]}),
    scores_that_are_too_few=lambda w: w.pairs({"prompt": "Hi?", "answers": ["Yes.", "No."], "scores": [1]}),
    answer_that_ends_in_a_question=lambda w: w.pair(rejected=[answer(), user("No?")]),
    prompt_that_ends_in_an_answer=lambda w: w.pair(prompt=[user(), answer("Well.")]),
    weight_that_is_no_number=lambda w: w.pair(weight="much"),
    pair_without_a_prompt=lambda w: w.pair(prompt=None, chosen=answer(), rejected=answer("No.")),
    pairs_under_other_names=lambda w: w.pairs({"prompt": "Hi?", "better": "Yes.", "worse": "No."}),
    pairs_that_lost_their_difference=lambda w: [
        *w.pair(chosen="Yes. " * 9 + "Bye.", rejected="Yes. " * 9 + "Ho."), "--data.max_length", "12"],
    label_that_is_missing=lambda w: w.pairs({"prompt": "Hi?", "completion": "Yes.", "label": None}),
    label_of_a_question=lambda w: w.pairs({"messages": [user()], "label": True}),
    ranking_with_a_null=lambda w: w.pairs({"prompt": "Hi?", "answers": ["Yes.", None]}),
    ranking_by_words=lambda w: w.pairs({"prompt": "Hi?", "answers": ["Yes.", "No."], "scores": ["good", "bad"]}),
    ranking_of_equals=lambda w: w.pairs({"prompt": "Hi?", "answers": ["Yes.", "No."], "scores": [1, 1]}),
    labels_for_a_reward_model=lambda w: [
        *w.reward, *w.pairs({"prompt": "Hi?", "completion": "Yes.", "label": True})[-2:]],
    class_that_is_missing=lambda w: w.labels(label=None),
    class_that_is_no_whole_number=lambda w: w.labels(label=0.5),
    class_of_nothing=lambda w: w.labels(text=" "),
    classes_under_other_names=lambda w: [
        *w.classification, "--data.train", w.write("r.jsonl", '{"body": "Fine.", "topic": "good"}\n')],
    one_class_for_all=lambda w: [
        *w.classification, "--data.train", w.write("r.jsonl", '{"text": "Fine.", "label": "good"}\n')],
    class_that_training_lacks=lambda w: [
        *w.labels(), "--data.validation", w.write("v.jsonl", '{"text": "Hm.", "label": "so-so"}\n')],
    several_classes_where_training_has_one=lambda w: [
        *w.labels(), "--data.validation", w.write("v.jsonl", '{"text": "Hm.", "label": ["good", "bad"]}\n')],
    conversations_for_DPO=lambda w: [*w.dpo, "--data.train", w.rows],
    pairs_for_SFT=lambda w: [*w.fit, "--data.train", w.pairs({})[-1], "--data.format", "Pairs"],
)  # fmt: skip


@mistake("row")
def two_user_turns_where_the_template_wants_turns(w: World) -> list[str]:
    strict = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return [*w.messages(user(), user(), answer()), "--data.chat_template", w.write("strict.jinja", strict)]
