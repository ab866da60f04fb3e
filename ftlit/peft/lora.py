"""LoRA: a trained low-rank product beside frozen matrices (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from ftlit.errors import ConfigError
from ftlit.peft.base import MERGE_IT_THERE, Change, DenseChange, PEFTStrategy, input_dim, move
from ftlit.peft.copies import at_start, copies, keep_dtype, merge_copies, train_copy
from ftlit.peft.lora_layers import LoRAEmbedding, LoRALayer, LoRALinear
from ftlit.peft.matching import Names, endings, is_in, layer_of, pattern_key, select, shortest
from ftlit.peft.parts import beside_text, experts, is_gate, is_plain
from ftlit.peft.vocabulary import take_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_DOWN = re.compile(r"\.(lora_A\.weight|lora_embedding_A)$")
_FACTOR = re.compile(r"\.(lora_[AB]\.weight|lora_embedding_[AB])$")
# What the PEFT library adds: the frozen weight of an adapted embedding or output layer, and under `bias: all` the
# biases of trained modules a second and third time.
_BASE = ".base_layer.weight"
_DOUBLE = re.compile(r"\.(original_module|modules_to_save)\.bias$")

# Fields of a LoRA `adapter_config.json` that may say something: read below, or without influence on the loaded model
# (which modules are adapted is read off the tensors).
_UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "auto_mapping", "peft_version", "qalora_group_size", "megatron_core", "ensure_weight_tying"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"),
}


class LoRA(PEFTStrategy):
    """Adds `scale * B A x` to linear layers and trains only A and B.

    Where input embedding and output layer share one weight, an adapter or a trained copy of one of them leaves the
    other as it is, as in the PEFT library; the merged model then has two weights.

    Args:
        rank: Rank r of the product (PEFT's `r`).
        alpha: Numerator of the scale `alpha / rank` (PEFT's `lora_alpha`); twice `rank` when left out.
        dropout: Probability of dropping an input of A (embeddings have none). 0 is faster and needs less memory.
        target_modules: `all-linear` (every linear layer that text runs through, but the output layer, gates and
            routers), name endings such as `[q_proj, v_proj]` or `q_proj,v_proj`, or one regular expression that whole
            module names must match. Embeddings and the output
            layer are adapted where they are named: `[q_proj, embed_tokens, lm_head]`.
        exclude_modules: Modules not to adapt, said in the same way.
        layers_to_transform: Numbers of the layers to adapt; all when left out. A target module that is named in full,
            such as `lm_head`, is adapted anyway.
        rank_pattern: Another rank for some modules, by a regular expression that the end of the name must match, such
            as `{q_proj: 16, layers.0.mlp.up_proj: 4}`. The first key that matches counts.
        alpha_pattern: Another `alpha` for some modules; the others keep `alpha`, whatever their rank.
        rslora: Scale by `alpha / sqrt(rank)` instead (Kalajdzievski 2023, arXiv:2312.03732).
        modules_to_save: Name endings of modules trained whole beside the adapters and saved with them, such as
            `[embed_tokens, lm_head]` or `[norm]`. A frozen copy of each is kept.
        bias: Train no biases, `all`, or those of the adapted layers (`lora_only`).
        init: Distribution of A, whose B is zero: `default` is uniform (Kaiming), `gaussian` has standard deviation
            `1 / rank`.
        lr_ratio_b: Factor on the learning rate of B (LoRA+, Hayou et al. 2024, arXiv:2402.12354, which uses 16).
        from_adapter: Adapter folder to go on from; it must fit the other settings. The run starts at its weights.

    Raises:
        ConfigError: If a number is out of range, or settings contradict each other.
    """

    peft_type: ClassVar[str | None] = "LORA"

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: list[str] | str = "all-linear",
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        rslora: bool = False,
        modules_to_save: list[str] | None = None,
        bias: Literal["none", "all", "lora_only"] = "none",
        init: Literal["default", "gaussian"] = "default",
        lr_ratio_b: float = 1.0,
        from_adapter: str | None = None,
    ) -> None:
        for name, value in {"": rank, **(rank_pattern or {})}.items():
            if value < 1:
                where = f" for {name!r} in rank_pattern" if name else ""
                raise ConfigError(f"LoRA's rank{where} must be at least 1, got {value}.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"LoRA's dropout must be in [0, 1), got {dropout}.")
        if bias not in ("none", "all", "lora_only") or init not in ("default", "gaussian"):
            raise ConfigError(
                f"LoRA's bias is none, all or lora_only and its init default or gaussian; got {bias!r} and {init!r}."
            )
        if lr_ratio_b <= 0:
            raise ConfigError(f"LoRA's lr_ratio_b must be positive, got {lr_ratio_b}.")
        target_modules = _names(target_modules)
        if layers_to_transform is not None and isinstance(target_modules, str) and target_modules != "all-linear":
            raise ConfigError(
                "LoRA's layers_to_transform goes with a list of target_modules or all-linear; "
                f"say the layers in the regular expression {target_modules!r} itself."
            )
        self.rank, self.dropout, self.rslora = rank, dropout, rslora
        self.alpha = 2.0 * rank if alpha is None else float(alpha)
        self.target_modules, self.exclude_modules = target_modules, _names(exclude_modules)
        layers = layers_to_transform
        self.layers_to_transform = [layers] if isinstance(layers, int) else layers
        self.rank_pattern, self.alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
        self.modules_to_save, self.bias, self.init = list(modules_to_save or []), bias, init
        self.lr_ratio_b, self.from_adapter = lr_ratio_b, from_adapter
        self._left_out: dict[str, list[str]] = {}
        self._start_config: Mapping[str, Any] | None = None
        expressions = [*self.rank_pattern, *self.alpha_pattern]
        expressions += [one for one in (target_modules, exclude_modules) if isinstance(one, str)]
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ConfigError(f"LoRA: {expression!r} is not a regular expression ({error}).") from None

    def rank_of(self, name: str) -> int:
        """The rank of a module's product."""
        key = pattern_key(self.rank_pattern, name)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, name: str) -> float:
        """The numerator of a module's scale."""
        key = pattern_key(self.alpha_pattern, name)
        return self.alpha if key is None else float(self.alpha_pattern[key])

    def scale_of(self, name: str) -> float:
        """The factor on a module's `B A`."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.rslora else rank)

    @override
    def notes(self, model: PreTrainedModel) -> list[str]:
        kinds = {kind: endings(names) for kind, names in self._left_out.items() if names}
        said = [f"{kind} ({', '.join(names)})" for kind, names in kinds.items()]
        return [f"all-linear leaves as they are: {'; '.join(said)}"] if said else []

    @override
    def lr_factor(self, name: str) -> float:
        return self.lr_ratio_b if name.endswith(".lora_B") else 1.0

    # ---- applying -------------------------------------------------------------------------------------------------

    @override
    def apply(self, model: PreTrainedModel) -> None:
        model.requires_grad_(False)
        start = self._read_start(model)
        whole = self._whole(model)
        targets = self._targets(model, whole)
        for name in targets:
            _check_module(name, model.get_submodule(name), self.rank_of(name))
        for name in targets:
            module = model.get_submodule(name)
            kind: Any = LoRAEmbedding if isinstance(module, nn.Embedding) else LoRALinear
            _swap(model, name, kind(module, self.rank_of(name), self.scale_of(name), self.dropout, self._gaussian))
        for name in whole:
            _train_whole(model.get_submodule(name))
        if self.bias != "none":
            self._train_biases(model)
        if start is not None:
            self._go_on(model, start)

    @property
    def _gaussian(self) -> bool:
        return self.init == "gaussian"

    def _whole(self, model: PreTrainedModel) -> list[str]:
        """Modules that are trained whole, none inside another."""
        chosen = set(_found("modules_to_save", self.modules_to_save, [name for name, _ in model.named_modules()]))
        for name in chosen:
            if not any(True for _ in model.get_submodule(name).parameters()):
                raise ConfigError(f"LoRA's modules_to_save names {name!r}, which has no weights to train.")
        names = [name for name, _ in model.named_modules()]
        return [name for name in names if name in chosen and not is_in(name, chosen - {name})]

    def _targets(self, model: PreTrainedModel, whole: list[str]) -> list[str]:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        kinds = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D | nn.Embedding)}
        if self.target_modules == "all-linear":
            linear = {n: m for n, m in kinds.items() if m is not head and not isinstance(m, nn.Embedding)}
            beside = beside_text(model)
            linear = {name: layer for name, layer in linear.items() if not is_in(name, beside)}
            found = [name for name, layer in linear.items() if not is_gate(model, layer, self.rank_of(name))]
            self._left_out = {
                "gates and routers": [name for name in linear if name not in found],
                "what text does not run through": beside,
                "experts": list(experts(model)),
            }
        else:
            found = _found("target_modules", self.target_modules, list(kinds))
        if self.exclude_modules:
            excluded = _found("exclude_modules", self.exclude_modules, [name for name, _ in model.named_modules()])
            found = [name for name in found if name not in excluded]
        if self.layers_to_transform is not None:
            has = {layer_of(name) for name in found}
            for layer in self.layers_to_transform:
                if layer not in has:
                    raise ConfigError(f"LoRA's layers_to_transform {layer} is no layer with a module to adapt.")
            named = self.target_modules if isinstance(self.target_modules, list) else []
            found = [name for name in found if name in named or layer_of(name) in self.layers_to_transform]
        found = [name for name in found if not is_in(name, whole)]
        if not found:
            raise ConfigError("LoRA has nothing to adapt: every target module is excluded or trained whole.")
        for argument, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in pattern:
                if not _matches(key, found):
                    _no_match(argument, key, found)
        return found

    def _train_biases(self, model: PreTrainedModel) -> None:
        """Trains biases that are not trained yet; refuses modules that would mix half precision and float32."""
        for name, module in list(model.named_modules()):
            bias = dict(module.named_parameters(recurse=False)).get("bias")
            adapted = isinstance(module, LoRALayer)
            if bias is None or bias.requires_grad or (self.bias == "lora_only" and not adapted):
                continue
            if not adapted and torch.promote_types(bias.dtype, torch.float32) != bias.dtype:
                kind = str(bias.dtype).removeprefix("torch.")
                raise ConfigError(
                    f"LoRA's bias: all would train {name}.bias in {kind}, which loses small updates; use bias: "
                    "lora_only, or trainer.precision 32-true."
                )
            train_copy(module, "bias")
        if not any(copy.name == "bias" for copy in copies(model)):
            raise ConfigError(f"LoRA's bias: {self.bias} finds no bias in this model; leave it out.")

    def _read_start(self, model: PreTrainedModel) -> Mapping[str, Tensor] | None:
        """The adapter to go on from, from its folder or from a checkpoint; the model gets its vocabulary."""
        from ftlit.peft.io import read_adapter

        folder = self.from_adapter
        if self.start_state is None and folder is not None:
            config, state = read_adapter(folder)
            if config.get("task_type") == "SEQ_CLS":
                raise ConfigError(
                    f"{folder} is the adapter of a classifier, with its head: to train that further, make a model of "
                    f"it (ftlit export {folder} --to MODEL) and give that as model.policy."
                )
            self.start_state, self._start_config = state, config
        if self.start_state is None:
            return None
        left, self.brought = take_vocabulary(model, self.start_state, _PREFIX, self.modules_to_save)
        return left

    def _go_on(self, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
        """Loads an adapter and makes its weights the start."""
        folder = self.from_adapter
        if self._start_config is not None:  # what is in a checkpoint was checked when its run began
            saved = self.from_peft(self._start_config, state)
            assert isinstance(saved, LoRA)
            for name in self._adapters(model):
                own, theirs = (f"rank {o.rank_of(name)} and scale {o.scale_of(name):g}" for o in (self, saved))
                if name in saved.target_modules and own != theirs:
                    raise ConfigError(
                        f"the adapter in {folder} has {theirs} for {name}, and this config {own}; give it the "
                        "adapter's rank, alpha, rslora and patterns."
                    )
        try:
            self.load(model, state)
        except ConfigError as error:
            raise ConfigError(f"LoRA cannot go on from {folder} with these settings: {error}") from None
        for copy in list(copies(model)):
            train_copy(copy.module, copy.name)
        for layer in self._adapters(model).values():
            for part in layer.parts:
                train_copy(layer, part)

    @override
    def restart(self, model: PreTrainedModel, start: Mapping[str, Tensor]) -> None:
        had = self.start_state or {}
        if had.keys() == start.keys() and all(torch.equal(had[name], start[name]) for name in start):
            return
        self.start_state, self._start_config = dict(start), None
        left, self.brought = take_vocabulary(model, start, _PREFIX, self.modules_to_save)
        self._go_on(model, left)

    @staticmethod
    def _adapters(model: PreTrainedModel) -> dict[str, LoRALayer]:
        return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}

    # ---- what changed ---------------------------------------------------------------------------------------------

    @override
    def changes(self, model: PreTrainedModel) -> Iterator[Change]:
        for name, layer in self._adapters(model).items():
            yield layer.change(f"{name}.weight")
        for copy in copies(model):
            if not copy.name.startswith("lora_"):
                delta = copy.trained - copy.start.to(copy.trained.dtype)
                yield DenseChange(copy.full_name, delta, input_dim(copy.module, copy.name))

    @override
    @contextmanager
    def start(self, model: PreTrainedModel) -> Iterator[None]:
        # A layer that goes on from another adapter starts with that one's product, any other without one.
        layers = [layer for layer in self._adapters(model).values() if not layer.goes_on]
        was = [layer.enabled for layer in layers]
        try:
            for layer in layers:
                layer.enabled = False
            with at_start(model):
                yield
        finally:
            for layer, enabled in zip(layers, was, strict=True):
                layer.enabled = enabled

    @override
    def scaling(self, model: PreTrainedModel) -> str:
        scales = {name: f"{layer.scale:g}" for name, layer in self._adapters(model).items()}
        usual = Counter(scales.values()).most_common(1)[0][0]
        others = [f"{name} {scale}" for name, scale in sorted(scales.items()) if scale != usual]
        return ", ".join([usual, *others])

    @override
    def start_settings(self, model: PreTrainedModel) -> str:
        scales = [(name, layer.scale) for name, layer in self._adapters(model).items() if layer.goes_on]
        return repr(scales) if scales else ""

    @override
    def not_between(self, model: PreTrainedModel) -> str | None:
        if not any(layer.goes_on for layer in self._adapters(model).values()):
            return None
        return (
            "LoRA goes on from another adapter, and what lies between two products of one rank has twice that rank; "
            "merge the first adapter (ftlit export) and train a new one on the merged model."
        )

    @override
    def _interpolate(self, model: PreTrainedModel, alpha: Callable[[str], float]) -> None:
        for name, layer in self._adapters(model).items():
            # One factor of the product only: both would give alpha squared.
            layer.get_parameter(layer.zero).mul_(alpha(f"{name}.{layer.zero}"))
        for copy in copies(model):
            if not copy.name.startswith("lora_"):
                move(copy.trained, copy.start, alpha(copy.full_name))

    # ---- saving ---------------------------------------------------------------------------------------------------

    @override
    def state(self, model: PreTrainedModel) -> dict[str, Tensor]:
        adapters = self._adapters(model)
        state = {
            f"{_PREFIX}{name}.{part}{layer.suffix}": layer.get_parameter(part).detach()
            for name, layer in adapters.items()
            for part in layer.parts
        }
        for copy in copies(model):
            if not copy.name.startswith("lora_"):
                inner = "base_layer." if copy.path in adapters else ""
                state[f"{_PREFIX}{copy.path}.{inner}{copy.name}"] = copy.trained.detach()
        return state

    @override
    @torch.no_grad()
    def load(self, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
        for key in [key for key in state if key.endswith(_BASE)]:
            layer = self._adapters(model).get(key.removeprefix(_PREFIX).removesuffix(_BASE))
            if layer is None or not _same(layer.weight, state[key]):
                raise ConfigError(
                    f"this adapter carries a weight {key!r} that is not the model's; give the base model it was "
                    "trained on, with the same vocabulary."
                )
        own = {key: t for key, t in state.items() if not key.endswith(_BASE) and not _DOUBLE.search(key)}
        super().load(model, own)

    @override
    def merge(self, model: PreTrainedModel) -> None:
        merge_copies(model)
        for name, layer in self._adapters(model).items():
            _swap(model, name, layer.merged())
        _untie(model)

    @override
    def peft_config(self, model: PreTrainedModel) -> dict[str, Any]:
        adapters = self._adapters(model)
        modules = [name for name, _ in model.named_modules()]
        ranks = {name: layer.factors[0].shape[0] for name, layer in adapters.items()}
        alphas = {name: self.alpha_of(name) for name in adapters}
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": _plain(self.alpha),
            "lora_dropout": self.dropout,
            "target_modules": shortest(adapters, modules),
            # By whole names: the order of overlapping expressions would be lost in a sorted file.
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank != self.rank},
            "alpha_pattern": {name: _plain(alpha) for name, alpha in alphas.items() if alpha != self.alpha},
            "use_rslora": self.rslora,
            "modules_to_save": self._saved_whole(model, modules) or None,
            "bias": self.bias,
            "fan_in_fan_out": any(isinstance(one, LoRALinear) and one.transposed for one in adapters.values()),
            "init_lora_weights": "gaussian" if self._gaussian else True,
        }

    def _saved_whole(self, model: PreTrainedModel, modules: list[str]) -> list[str]:
        """`modules_to_save` for the PEFT library, where `norm` also means `input_layernorm`."""
        whole = self._whole(model)
        meant = [name for name in modules if any(name.endswith(ending) for ending in self.modules_to_save)]
        return sorted(self.modules_to_save if meant == whole else whole)

    @override
    @classmethod
    def from_peft(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> PEFTStrategy:
        unsupported = sorted(field for field, value in config.items() if value and field not in _UNDERSTOOD)
        if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal"):
            # PiSSA, OLoRA and their kin also change the base model when they are loaded.
            unsupported.append(f"init_lora_weights={config['init_lora_weights']!r}")
        names = [key.removeprefix(_PREFIX) for key in state]
        # The tensors say which modules are adapted; the config may say it by pattern, layer number or default.
        modules = sorted({_FACTOR.sub("", name) for name in names if _FACTOR.search(name)})
        rest = [name for name in names if not _FACTOR.search(name) and not name.endswith(_BASE)]
        if config.get("ensure_weight_tying") and any(re.search(r"(embed|wte|lm_head)", name) for name in names):
            unsupported.append("ensure_weight_tying")
        bias: Any = config.get("bias") or "none"
        if not any(name.endswith((".bias", "_bias")) for name in names):  # of a model that has no biases
            bias = "none"
        if bias != "none":
            rest = [name for name in rest if not name.endswith(".bias")]
        endings = list(config.get("modules_to_save") or [])
        whole = sorted({_module_to_save(name, endings) for name in rest})
        if "" in whole and not unsupported:  # else they are those of what was named
            unsupported.append(f"the tensor {next(name for name in rest if not _module_to_save(name, endings))!r}")
        if unsupported:
            raise ConfigError(
                f"this LoRA adapter uses {', '.join(unsupported)}, which ftlit cannot read yet; {MERGE_IT_THERE}."
            )
        rank = int(config.get("r", 8))
        # Ranks too: the file sorts the keys of a pattern, of which the first that matches would count.
        ranks = {
            _FACTOR.sub("", name): t.shape[0]
            for name, t in zip(names, state.values(), strict=True)
            if _DOWN.search(name)
        }
        return cls(
            rank=rank,
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout", 0.0)),
            target_modules=modules,
            rslora=bool(config.get("use_rslora", False)),
            rank_pattern={re.escape(name): value for name, value in ranks.items() if value != rank},
            alpha_pattern={k: v for k, v in (config.get("alpha_pattern") or {}).items() if _matches(k, modules)},
            modules_to_save=whole,
            bias=bias,
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "default",
        )


def _names(wanted: list[str] | str | None) -> Any:
    """A plain name, or several with commas between them, as a list; an expression stays one."""
    if not isinstance(wanted, str) or wanted == "all-linear" or not re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", wanted):
        return wanted
    return [name.strip() for name in wanted.split(",")]


def _found(argument: str, wanted: Names, names: list[str]) -> list[str]:
    """The names that are meant, in the order of the model.

    Raises:
        ConfigError: If a wish selects nothing.
    """
    chosen: set[str] = set()
    for wish, selected in select(wanted, names).items():
        if not selected:
            _no_match(argument, wish, names)
        chosen |= set(selected)
    return [name for name in names if name in chosen]


def _no_match(argument: str, wish: str, names: list[str]) -> None:
    kind = "linear layer or embedding that can be adapted" if argument == "target_modules" else "module"
    endings = sorted({name.rsplit(".", 1)[-1] for name in names} - {""})
    endings = [ending for ending in endings if not ending.isdigit()]
    raise ConfigError(f"LoRA's {argument} {wish!r} matches no {kind}; this model has: {', '.join(endings)}.")


def _check_module(name: str, module: nn.Module, rank: int) -> None:
    weight: Any = module.weight
    if min(weight.shape) < rank:
        raise ConfigError(
            f"LoRA's rank {rank} exceeds the smaller side of {name!r} ({list(weight.shape)}); "
            "choose a smaller rank or other target_modules."
        )
    scaled = isinstance(module, nn.Embedding) and isinstance(getattr(module, "embed_scale", None), Tensor)
    if not (is_plain(module) or scaled) or getattr(module, "max_norm", None) is not None:
        raise ConfigError(
            f"LoRA cannot adapt {name!r}: a {type(module).__name__} does more than multiply or look up; exclude it, or "
            "train it whole with modules_to_save."
        )


def _train_whole(module: nn.Module) -> None:
    """Trains every parameter of a module, and of what is inside it."""
    for part in module.modules():
        names = [name for name, _ in part.named_parameters(recurse=False)]
        narrow = {part.get_parameter(name).dtype for name in names}
        for name in names:
            train_copy(part, name)
        for dtype in narrow - {torch.float32, torch.float64}:
            keep_dtype(part, dtype)


def _swap(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def _untie(model: PreTrainedModel) -> None:
    """Says in the config of a merged model that its embedding and output layer are no longer one weight."""
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embed.weight:
        return
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are the same in the narrower of their types."""
    dtype = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    return ours.shape == theirs.shape and torch.equal(ours.to(dtype), theirs.to(ours.device, dtype))


def _plain(number: float) -> float:
    """An integer where it is one, as the PEFT library writes it."""
    return int(number) if number == int(number) else number


def _module_to_save(parameter: str, endings: list[str]) -> str:
    """The module of `modules_to_save` that a tensor belongs to; empty if none."""
    parts = parameter.split(".")
    paths = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((path for path in paths if any(path.endswith(ending) for ending in endings)), "")


def _matches(key: str, names: list[str]) -> bool:
    return any(pattern_key({key: 0}, name) for name in names)


__all__ = ["LoRA"]
