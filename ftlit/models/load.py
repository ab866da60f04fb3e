"""Where models come from: a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError

from ftlit.cache import cache_dir
from ftlit.device import seeded
from ftlit.errors import ConfigError
from ftlit.models.fused import fuse
from ftlit.models.heads import prepare_classifier
from ftlit.models.policy import check_packing, use_segment_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        name: Hub id, folder, or GGUF file.
        trust_remote_code: Run tokenizer code that comes with the model.

    Raises:
        ConfigError: If there is none.
    """
    from transformers import AutoTokenizer

    with _explained(name):
        own = (Path(name).expanduser() / "tokenizer_config.json").exists()  # an adapter folder may have no more
        place = str(Path(name).expanduser()) if own else resolve(name)
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)


def load_lm(name: str, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model in training mode, its attention switched to packed segments and checked.

    Args:
        name: Hub id, folder, or GGUF file.
        dtype: Type of its weights; never left to the checkpoint, whose half precision would lose small updates.
        trust_remote_code: Run model code that comes with the model.

    Raises:
        ConfigError: If it cannot be found, read or packed.
    """
    with _explained(name):
        folder = resolve(name)
        kind = _kind(folder, trust_remote_code)
        lm, info = kind.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"model {name!r} is no whole language model: its checkpoint lacks {missing[0]}{more}, which would be drawn "
            "at random; give the language model that it was made from."
        )
    prepare(lm)
    return lm.train()  # from_pretrained leaves it in eval mode, and Lightning would keep that


def _kind(name: str, trust_remote_code: bool) -> Any:
    """The class of transformers that loads it: one that also takes images can be trained on text alone.

    Raises:
        ConfigError: If its weights are quantized.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    refuse_quantized(config, name)
    images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def refuse_quantized(config: Any, name: str) -> None:
    """Weights that were quantized are no numbers that could be trained, merged or compared.

    Args:
        config: The model's config.
        name: The model, for the message.

    Raises:
        ConfigError: If its weights are quantized.
    """
    quantized = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not quantized:
        return
    fields = quantized if isinstance(quantized, dict) else quantized.to_dict()
    method = getattr(fields.get("quant_method"), "value", fields.get("quant_method")) or "an unknown method"
    raise ConfigError(
        f"model {name!r} has quantized weights ({method}), which ftlit cannot train; give the model that it was made "
        "from, in 16 or 32 bits, or a GGUF file, whose weights are made whole again."
    )


class Classifier(NamedTuple):
    """A sequence classifier as it was loaded.

    Attributes:
        lm: The model, in training mode.
        new: Modules whose weights were not in the checkpoint and are drawn anew, such as `score`.
    """

    lm: PreTrainedModel
    new: list[str]


def is_classifier(name: str) -> bool:
    """Whether a hub id or folder holds a sequence classifier with a head.

    Raises:
        ConfigError: If it cannot be found or read.
    """
    from transformers import AutoConfig

    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" or (path.is_dir() and not (path / "config.json").exists()):
        return False
    with _explained(name):
        return _has_head(AutoConfig.from_pretrained(resolve(name)))


def load_classifier(
    source: str | PreTrainedModel,
    labels: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    trust_remote_code: bool = False,
    packed: bool = True,
) -> Classifier:
    """A sequence classifier from any checkpoint that has a trunk for one: a language model, an encoder, a classifier.

    Args:
        source: Hub id, folder, GGUF file, or a model built in Python.
        labels: Names of the outputs; one name for a model that gives one score. Left out, those of a classifier.
        dtype: Type of its weights.
        seed: Seed of a new head.
        trust_remote_code: Run model code that comes with the model.
        packed: Whether it is switched to packed attention, and checked; else it is as transformers loads it.

    Raises:
        ConfigError: If it cannot be found, read or packed, or it is a classifier with other outputs.
    """
    with seeded(seed):
        if isinstance(source, str):
            lm, new = _classifier_from(source, labels, dtype, trust_remote_code)
        else:
            lm, new = _classifier_around(source, labels)
    if packed:
        prepare_classifier(lm)
    return Classifier(lm.train(), new)


def _classifier_from(
    name: str, labels: Sequence[str] | None, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[str]]:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with _explained(name):
        folder = resolve(name)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        refuse_quantized(config, name)
        _name_outputs(config, labels, name)
        with _no_load_report():
            lm, info = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
    new = list(dict.fromkeys(key.rpartition(".")[0] for key in sorted(info["missing_keys"])))
    return lm, new


@contextlib.contextmanager
def _no_load_report() -> Iterator[None]:
    """Transformers lists what a checkpoint of another task has more or less; which parts are new is said elsewhere."""
    from transformers.utils import logging

    was = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(was)


def _classifier_around(source: PreTrainedModel, labels: Sequence[str] | None) -> tuple[PreTrainedModel, list[str]]:
    """A classifier whose trunk is that of a model built in Python."""
    from transformers import AutoModelForSequenceClassification

    if type(source).__name__.endswith("ForSequenceClassification"):
        _name_outputs(source.config, labels, type(source).__name__)
        return source, []
    config = copy.deepcopy(source.config)
    _name_outputs(config, labels, type(source).__name__)
    lm = AutoModelForSequenceClassification.from_config(config, dtype=source.dtype).to(source.device)
    setattr(lm, lm.base_model_prefix, source.base_model)
    head = [name for name, part in lm.named_children() if name != lm.base_model_prefix and list(part.parameters())]
    return lm, head


def _has_head(config: Any) -> bool:
    return any("ForSequenceClassification" in kind for kind in config.architectures or ())


def _name_outputs(config: Any, labels: Sequence[str] | None, name: str) -> None:
    """Gives a config the names of the outputs.

    Raises:
        ConfigError: If there is no classifier of this architecture, or it has outputs of its own that are not these.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as KNOWN

    own_code = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if type(config) not in KNOWN and not own_code:
        raise ConfigError(f"model {name!r}: transformers has no sequence classifier for {config.model_type} models.")
    if labels is None:
        if not _has_head(config):
            raise ConfigError(f"model {name!r} is no sequence classifier: it has no head that was trained.")
        return
    if _has_head(config):
        own = [config.id2label[number] for number in range(config.num_labels)]
        if len(own) != len(labels) or (len(labels) > 1 and set(own) != set(labels) and not own[0].startswith("LABEL_")):
            raise ConfigError(
                f"model {name!r} is a classifier with {len(own)} outputs ({', '.join(own[:8])}), and "
                f"{len(labels)} are needed ({', '.join(labels[:8])}); give the model that it was made from."
            )
        if set(own) == set(labels):
            return
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}


def prepare(lm: PreTrainedModel) -> None:
    """Switches a model to packed attention and faster layers, and checks that packing is right for it.

    Raises:
        ConfigError: If it is not.
    """
    lm.config.get_text_config().use_cache = True
    use_segment_attention(lm)
    fuse(lm)
    check_packing(lm)


def resolve(name: str) -> str:
    """A name that transformers can load: a GGUF file (or a folder with nothing else) is converted once and cached.

    Raises:
        ConfigError: If the name looks like a path that does not exist.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            files = sorted(path.glob("*.gguf"))
            if len(files) == 1:
                return str(_converted(files[0]))
            if len(files) > 1:
                names = ", ".join(file.name for file in files[:4])
                raise ConfigError(f"model folder {name} holds several GGUF files ({names}); name one of them.")
            raise ConfigError(f"model folder {name} {_instead(path, name)}.")
        return str(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"model {name} is a file but no .gguf; give the folder that holds config.json.")
        return str(_converted(path))
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix.lower() == ".gguf":
        raise ConfigError(f"model {name} does not exist (looked in {Path.cwd()}).")
    return name


def _instead(folder: Path, name: str) -> str:
    """What a folder without a model is, and how one gets a model from it."""
    if (folder / "config.yaml").is_file():
        return f"is a run: make a model of it (ftlit export {name} --to MODEL) and give that"
    if (folder / "adapter_config.json").is_file():
        return (
            "is an adapter: give its base model, and the adapter as --model.peft.from_adapter, or merge them "
            f"(ftlit export {name} --to MODEL)"
        )
    return "holds neither a config.json nor a GGUF file"


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what transformers raises for a model that cannot be had into one sentence."""
    try:
        yield
    except ConfigError:
        raise
    except (SafetensorError, struct.error, EOFError) as error:
        raise ConfigError(
            f"model {name!r} cannot be loaded: its files are torn ({error}); fetch them again."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "backend tokenizer" in str(error):
            raise ConfigError(f"model {name!r} has no tokenizer files beside its weights; copy them there.") from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {name!r} cannot be loaded: {first} Give a hub id that can be reached, a folder with config.json, "
            "or a GGUF file."
        ) from error


def _converted(gguf: Path) -> Path:
    """The transformers folder made from a GGUF file, once for each content."""
    target = cache_dir() / "gguf" / f"{gguf.stem}-{_fingerprint(gguf)}"
    if target.exists():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"converting {gguf.name} once (kept in {target})", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        lm = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        make_saveable(lm)
        folder = Path(scratch) / "model"
        lm.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        try:
            os.replace(folder, target)  # another process may have been faster
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _fingerprint(path: Path, blocks: int = 256, block: int = 1 << 16) -> str:
    """A hash of a file's size and of blocks spread over all of it: 16 MiB are read, however large the file is."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(blocks):
            file.seek(max(0, (size - block) * number // (blocks - 1)))
            digest.update(file.read(block))
    return digest.hexdigest()[:16]


def make_saveable(lm: Any) -> None:
    """Removes the marks of a quantized file from a model whose weights are plain numbers again."""
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
    lm.hf_quantizer = None
    lm.is_quantized = False
