"""Generation as evaluation: answers to held-out questions, scored while training and in `ftlit test`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from ftlit.callbacks.generation_rows import EvalRow, EvalRows, eval_rows
from ftlit.data.datamodules import MAIN
from ftlit.errors import ConfigError
from ftlit.files import write_text
from ftlit.metrics import text
from ftlit.metrics.intervals import interval
from ftlit.models.limits import check_length
from ftlit.models.shard import gathered
from ftlit.rollout.generate import answer, seed_of, text_of
from ftlit.rollout.generator import Sampling
from ftlit.rollout.verifiers import Verifier, name_of, resolve, verify

if TYPE_CHECKING:
    from ftlit.stages.base import Stage

_TABLE = ("step", "row", "prompt", "answer", "reference")
# What is logged: of answers that can be compared, of those that are verified, of all.
_COMPARED = ("exact_match", "f1", "rouge_1", "rouge_2", "rouge_l", "bleu")
_VERIFIED = ("verifier", "verifier_low", "verifier_high")
_ALWAYS = ("distinct_1", "distinct_2", "length", "end_rate", "seconds_per_answer", "tokens_per_s")


class _Made(NamedTuple):
    """An answer as the ranks exchange it."""

    place: int
    text: str
    length: int
    ended: bool
    drawn: list[int]


class GenerationEval(L.Callback):
    """Answers held-out questions and scores the answers.

    Logged as `gen/NAME`, of another set than the main one as `gen/SET/NAME`:

    - against the row's own answer, where it has one: `exact_match` and `f1` (as SQuAD), `bleu`, `rouge_1`, `rouge_2`,
      `rouge_l`, all in [0, 1];
    - `verifier`, its mean with a 95 % interval `verifier_low`, `verifier_high` (Wilson's where every score is 0 or 1,
      else bootstrap);
    - `distinct_1`, `distinct_2` (share of different n-grams), `length` (tokens), `end_rate` (share that ended by an end
      token), `seconds_per_answer`, `tokens_per_s`.

    Every answer with its scores is written to `samples.jsonl` in the run folder, and to a table of W&B. Ranks share the
    questions; their number and `batch_size` change nothing. Training is bitwise the same with and without.

    Args:
        rows: Questions: name of a validation set, a file, or `sample:NAME`; the main validation rows when left out, and
            the test rows in `ftlit test`. The last assistant turn of a row is its reference.
        num_rows: Most questions; more rows are thinned by a seeded choice, the same each time. None: all.
        name: Name of the set in the log; that of the validation set or file when left out.
        at_start: Whether to answer before the first step.
        at_end: Whether to answer after the last.
        every_n_validations: Also at every so many validations; None: not at validations.
        every_n_steps: Also every so many optimizer steps.
        max_new_tokens: Most tokens of an answer.
        batch_size: Most answers at once.
        max_tokens: Most tokens at once, prompts and answers with padding: bounds memory.
        temperature: 0 takes the likeliest token each time.
        top_p: Sample from the likeliest tokens that together have this probability.
        top_k: Sample from so many of the likeliest; None: from all.
        min_p: Sample from tokens of at least this share of the likeliest one's probability.
        stop: Texts that end an answer with the token that completes them.
        seed: Seed of the choice of rows and of the samples: one random number a token, a function of seed, step, row
            and place in the answer. Batches and ranks change a sample only where rounding moves it over a boundary.
        verifier: A `Verifier`, or the import path of a function `(prompts, completions, **columns) -> list[float]`.
        strict: Whether `exact_match` compares as written, not as SQuAD does (case, punctuation, articles).
        bleu_tokenizer: sacreBLEU's tokenizer; `zh` for Chinese and Japanese references and else `13a` when left out.
        table_rows: Answers of each round in the table of W&B.
        show: Answers of each round to print.

    Raises:
        ConfigError: If a number is out of range, or there is no such verifier.
    """

    def __init__(
        self,
        rows: str | None = None,
        num_rows: int | None = 100,
        name: str | None = None,
        at_start: bool = True,
        at_end: bool = True,
        every_n_validations: int | None = 1,
        every_n_steps: int | None = None,
        max_new_tokens: int = 256,
        batch_size: int = 32,
        max_tokens: int = 16384,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float = 0.0,
        stop: list[str] | None = None,
        seed: int = 0,
        verifier: Verifier | str | None = None,
        strict: bool = False,
        bleu_tokenizer: text.BleuTokenizer | None = None,
        table_rows: int = 20,
        show: int = 1,
    ) -> None:
        for key, value, least in (
            ("num_rows", num_rows, 1),
            ("every_n_validations", every_n_validations, 1),
            ("every_n_steps", every_n_steps, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("batch_size", batch_size, 1),
            ("max_tokens", max_tokens, 1),
            ("table_rows", table_rows, 0),
            ("show", show, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"GenerationEval.{key} must be at least {least}, got {value}.")
        Sampling(1, max_new_tokens, temperature, top_p, top_k, min_p, tuple(stop or ())).check("GenerationEval")
        self.rows, self.num_rows, self.set_name = rows, num_rows, name
        self.at_start, self.at_end = at_start, at_end
        self.every_n_validations, self.every_n_steps = every_n_validations, every_n_steps
        self.options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "stop": tuple(stop or ()),
        }
        self.seed, self.strict, self.bleu_tokenizer = seed, strict, bleu_tokenizer
        self.verifier = None if verifier is None else resolve(verifier)
        self.table_rows, self.show = table_rows, show
        self.start_values: dict[str, float] = {}
        self.last_values: dict[str, float] = {}
        self.seconds, self.rounds, self.validations = 0.0, 0, 0
        self._last_step: int | None = None
        self._questions: list[EvalRow] = []
        self._resumed_at = 0
        self._wrote = False

    # ---- state ----------------------------------------------------------------------------------------------------

    @property
    def _key(self) -> str:
        return f"GenerationEval[{self.set_name or self.rows or MAIN}]"

    # Not `state_dict`: Lightning would refuse two of a kind before `setup` can say what to do.
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps what the run measured so far, for when it goes on."""
        checkpoint[self._key] = {
            "start": self.start_values,
            "last": self.last_values,
            "seconds": self.seconds,
            "rounds": self.rounds,
            "validations": self.validations,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Goes on from it."""
        state = checkpoint.get(self._key)
        if state is not None and trainer.state.fn == "fit":
            self.start_values, self.last_values = dict(state["start"]), dict(state["last"])
            self.seconds, self.rounds, self.validations = state["seconds"], state["rounds"], state["validations"]

    # ---- when -----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate", "test"):
            return
        others = [c for c in trainer.callbacks if isinstance(c, GenerationEval) and c is not self]
        if any(other._key == self._key for other in others):
            name = self.set_name or self.rows or MAIN
            raise ConfigError(f"two GenerationEval callbacks both measure {name!r}: give each a name of its own.")
        data: Any = trainer.datamodule
        found = eval_rows(data, self.rows, stage == "test", self.num_rows, self.seed)
        self._questions = found.chosen
        if trainer.is_global_zero:
            print(f"generation {self._plan(trainer, pl_module, stage, found)}", flush=True)

    def _plan(self, trainer: L.Trainer, pl_module: Any, stage: str, found: EvalRows) -> str:
        """What will be answered, in words."""
        asked, count, room = len(found.chosen), found.available, self.options["max_new_tokens"]
        kind = "test" if stage == "test" and self.rows is None else self._set(trainer)
        share = f"{asked:,} of {count:,}" if asked < count else f"all {count:,}"
        line = f"answers to {share} rows ({kind}), at most {room} tokens each"
        if self.verifier is not None:
            line += f", verified by {name_of(self.verifier)}"
        if found.documents:
            line += f"; {found.documents:,} rows of raw text ask nothing and are left out"
        unknown = sum(row.reference is None for row in self._questions)
        if unknown:
            line += f"; {unknown:,} rows have no answer of their own to compare with"
        policy = getattr(pl_module, "policy", None)
        most = getattr(policy.lm.config.get_text_config(), "max_position_embeddings", None) if policy else None
        beyond = sum(len(row.prompt) + room > most for row in self._questions) if most else 0
        if beyond:
            line += f"; {beyond:,} may go beyond the model's {most:,} tokens"
        return line

    def logged_at_validations(self, trainer: L.Trainer) -> list[str]:
        """Whole names of what it logs at validations, known before the first; after `setup`."""
        if not self.every_n_validations:
            return []
        known = any(row.reference is not None for row in self._questions)
        names = [*(_COMPARED if known else ()), *(_VERIFIED if self.verifier is not None else ()), *_ALWAYS]
        return [f"{self._prefix(trainer)}/{name}" for name in names]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses questions that the model has no places for, with their answers, before anything is trained."""
        stage: Any = pl_module
        virtual, room = getattr(stage.strategy, "num_virtual_tokens", 0), self.options["max_new_tokens"]
        longest = max((len(row.prompt) for row in self._questions), default=0)
        check_length(stage.policy.lm, longest, "a question", virtual, room)

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Where the run starts from; a run that goes on has that behind it."""
        self._resumed_at = trainer.global_step
        if self.at_start and trainer.global_step == 0:
            self.start_values = self._round(trainer, pl_module)
            self._to_loggers(trainer, self.start_values)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every so many optimizer steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._to_loggers(trainer, self._round(trainer, pl_module))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """At validations: logged like their losses, so that checkpoints and early stopping can watch it."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self.validations += 1
            last = self.at_end and trainer.global_step >= pl_module.planned_steps
            turn = self.every_n_validations and self.validations % self.every_n_validations == 0
            if self._last_step == trainer.global_step or not (last or turn):
                return
        self._log(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """In `ftlit test`."""
        self._log(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """At the end, where no validation was."""
        if self.at_end and trainer.global_step and self._last_step != trainer.global_step:
            self._to_loggers(trainer, self._round(trainer, pl_module))

    def _log(self, trainer: L.Trainer, stage: Stage) -> None:
        for key, value in self._round(trainer, stage).items():
            # Already the same on all ranks; the mean of equal numbers only keeps Lightning from warning.
            stage.log(key, value, sync_dist=trainer.world_size > 1, batch_size=1)

    @staticmethod
    def _to_loggers(trainer: L.Trainer, values: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    # ---- a round --------------------------------------------------------------------------------------------------

    def _round(self, trainer: L.Trainer, stage: Stage) -> dict[str, float]:
        """Answers, scores, keeps and shows; the values are the same on all ranks."""
        began = time.perf_counter()
        with isolate_rng():  # a verifier may draw too
            made, seconds = self._answers(trainer, stage)
            values, records = self._scores_of(trainer, made, seconds)
        self._last_step = trainer.global_step
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            self._keep(trainer, records)
        self.rounds += 1
        self.seconds += time.perf_counter() - began
        if trainer.is_global_zero:
            self._say(trainer, values, records, time.perf_counter() - began)
        values = {f"{self._prefix(trainer)}/{key}": value for key, value in values.items()}
        self.last_values = values
        return values

    def _answers(self, trainer: L.Trainer, stage: Stage) -> tuple[list[_Made], float]:
        """All answers in the order of the questions, and the seconds that the slowest rank took."""
        assert stage.policy is not None
        step, world = trainer.global_step, trainer.world_size
        # Every rank takes its share of the long and of the short ones.
        order = sorted(range(len(self._questions)), key=lambda i: (-len(self._questions[i].prompt), i))
        places = order[trainer.global_rank :: world]
        began = time.perf_counter()
        with gathered(stage.policy), trainer.precision_plugin.forward_context():
            answers = answer(
                stage.policy.lm,
                stage.strategy,
                stage.tokenizer,
                [self._questions[place].prompt for place in places],
                seeds=[seed_of(self.seed, step, self._questions[place].number) for place in places],
                **self.options,
            )
        seconds = time.perf_counter() - began
        made = []
        for place, one in zip(places, answers, strict=True):
            row = self._questions[place]
            said = text_of(stage.tokenizer, one.tokens, row.prompt if row.plain else ())
            made.append(_Made(place, said, len(one.tokens), one.ended, one.drawn))
        shares: list[Any] = [(made, seconds)]
        if world > 1:
            shares = [None] * world
            torch.distributed.all_gather_object(shares, (made, seconds))
        return sorted(one for share, _ in shares for one in share), max(taken for _, taken in shares)

    def _scores_of(
        self, trainer: L.Trainer, made: Sequence[_Made], seconds: float
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The first rank scores and tells the others: they agree whatever a verifier does."""
        result: Any = None
        if trainer.is_global_zero:
            try:
                result = self._score(made, seconds)
            except Exception as error:
                if trainer.world_size == 1:
                    raise
                result = error  # so that no rank waits for the others forever
        result = trainer.strategy.broadcast(result)
        if isinstance(result, Exception):
            raise result
        return result

    def _score(self, made: Sequence[_Made], seconds: float) -> tuple[dict[str, float], list[dict[str, Any]]]:
        questions = self._questions
        records: list[dict[str, Any]] = [
            {
                "row": row.number,
                "prompt": row.turns,
                "answer": one.text,
                "reference": row.reference,
                "tokens": one.length,
                "ended": one.ended,
            }
            for row, one in zip(questions, made, strict=True)
        ]
        values: dict[str, float] = {}
        known = [record for record in records if record["reference"] is not None]
        for record in known:
            ours, theirs = record["answer"], record["reference"]
            record["exact_match"] = text.exact_match(ours, theirs, self.strict)
            record["f1"] = text.token_f1(ours, theirs)
            record["rouge_1"], record["rouge_2"] = text.rouge_n(ours, theirs, 1), text.rouge_n(ours, theirs, 2)
            record["rouge_l"] = text.rouge_l(ours, theirs)
        if known:
            values |= {key: _mean(known, key) for key in ("exact_match", "f1", "rouge_1", "rouge_2", "rouge_l")}
            values["bleu"] = text.bleu(
                [record["answer"] for record in known], [record["reference"] for record in known], self.bleu_tokenizer
            )
        if self.verifier is not None:
            names = {name for row in questions for name in row.columns}
            columns: dict[str, list[Any]] = {"reference": [row.reference for row in questions]}
            columns |= {name: [row.columns.get(name) for row in questions] for name in sorted(names)}
            columns |= {
                "completion_ids": [one.drawn for one in made],
                "truncated": [not one.ended for one in made],
                "prefilled": [row.prefilled for row in questions],
            }
            prompts, said = [r["prompt"] for r in records], [r["answer"] for r in records]
            scores = verify(self.verifier, prompts, said, columns, [row.where for row in questions])
            for record, score in zip(records, scores, strict=True):
                record["verifier"] = score
            judged = [score for score in scores if score is not None]  # the others abstain
            values["verifier"] = sum(judged) / len(judged) if judged else float("nan")
            values["verifier_low"], values["verifier_high"] = interval(judged)
        answers = [one.text for one in made]
        total = sum(one.length for one in made)
        values |= {
            "distinct_1": text.distinct_n(answers, 1),
            "distinct_2": text.distinct_n(answers, 2),
            "length": total / len(made),
            "end_rate": sum(one.ended for one in made) / len(made),
            "seconds_per_answer": seconds / len(made),
            "tokens_per_s": total / seconds,
        }
        return values, records

    # ---- what a user sees -----------------------------------------------------------------------------------------

    def _set(self, trainer: L.Trainer) -> str:
        """Name of the set; the main one has none of its own in the log."""
        if self.set_name:
            return self.set_name
        if self.rows is None or self.rows == MAIN:
            return MAIN
        known = getattr(trainer.datamodule, "validation_names", [])
        return self.rows if self.rows in known else Path(self.rows.removeprefix("sample:")).stem

    def _prefix(self, trainer: L.Trainer) -> str:
        name = self._set(trainer)
        return "gen" if name == MAIN else f"gen/{name}"

    def _keep(self, trainer: L.Trainer, records: list[dict[str, Any]]) -> None:
        """Adds the answers to the file; where a run goes on, instead of those that are measured again."""
        name, step = self._set(trainer), trainer.global_step
        assert trainer.state.fn is not None
        kind = "samples" if trainer.state.fn == "fit" else f"{trainer.state.fn.value}_samples"
        path = Path(trainer.default_root_dir) / (f"{kind}.jsonl" if name == MAIN else f"{kind}-{name}.jsonl")
        lines = [json.dumps({"step": step, "set": name, **record}, ensure_ascii=False) for record in records]
        if self._wrote:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        else:
            goes_on = trainer.state.fn == "fit" and trainer.ckpt_path
            earlier = _before(path, min(step, self._resumed_at + 1)) if goes_on else []
            write_text(path, "".join(f"{line}\n" for line in [*earlier, *lines]))
        self._wrote = True
        scores = [key for key in ("exact_match", "f1", "rouge_l", "verifier") if any(key in r for r in records)]
        rows = [
            [step, r["row"], _as_text(r["prompt"]), r["answer"], r["reference"], *(r.get(key) for key in scores)]
            for r in records[: self.table_rows]
        ]
        for logger in trainer.loggers:
            if rows and hasattr(logger, "log_table"):
                key = f"{self._prefix(trainer)}/samples"
                logger.log_table(key=key, columns=[*_TABLE, *scores], data=rows, step=step)

    def _say(self, trainer: L.Trainer, values: dict[str, float], records: list[dict[str, Any]], seconds: float) -> None:
        """One line of scores, and some answers."""
        prefix, fn = self._prefix(trainer), trainer.state.fn
        if fn == "fit":
            shown = [f"{prefix}/{key} {values[key]:.3f}" for key in ("exact_match", "f1", "rouge_l") if key in values]
            if "verifier" in values:
                low, high = values["verifier_low"], values["verifier_high"]
                shown.append(f"{prefix}/verifier {values['verifier']:.3f} [{low:.3f}, {high:.3f}]")
            shown.append(f"{prefix}/length {values['length']:.1f}")
            when = f"step {trainer.global_step}" if trainer.global_step else "before training"
            print(f"{when}: {'  '.join(shown)} ({len(records)} answers in {seconds:.1f} s)")
        for record in records[: self.show]:
            question = record["prompt"][-1]["content"]
            print(f"  question  {_short(question)}\n  answer    {_short(record['answer'])}", flush=True)


def _mean(records: Sequence[dict[str, Any]], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


def _before(path: Path, step: int) -> list[str]:
    """Whole lines of earlier steps; a killed run may have torn its last."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
    return kept


def _as_text(turns: list[dict[str, str]]) -> str:
    """A prompt for reading: the question alone, or all turns with their roles."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _short(content: str, most: int = 200) -> str:
    line = " ".join(content.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


__all__ = ["GenerationEval"]
