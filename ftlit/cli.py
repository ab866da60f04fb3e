"""The training verbs: Lightning's command line with ftlit's defaults, run folders and errors.

The only place where arguments are linked and the Trainer is put together.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from ftlit import callbacks, forgetting, peft
from ftlit.callbacks import Progress, Report, SaveAdapter, SaveCheckpoint, WriteEvaluation, WritePredictions
from ftlit.callbacks.checkpoint import LAST, PREVIOUS
from ftlit.callbacks.metrics_csv import MetricsCSV
from ftlit.callbacks.wandb import WandB
from ftlit.cli_errors import class_of, explain, rows_given
from ftlit.data import classification, datamodules, formats, preferences, prompts
from ftlit.data.templating import terminal_marks
from ftlit.errors import ConfigError
from ftlit.export import scorer
from ftlit.export.opening import read_checkpoint
from ftlit.files import write_text
from ftlit.objectives import advantages, dpo, policy_gradient, preference_sums, reference_free, sft
from ftlit.objectives import reward as reward_objectives
from ftlit.peft import Full
from ftlit.rollout import generator
from ftlit.run_config import absolute, look_where_begun, run_of, with_place
from ftlit.run_folder import RunLock, begun_in, origin, remember_origin
from ftlit.shipped import config_dir, resolve_all
from ftlit.stages import Stage
from ftlit.stages.precision import check_strategy, decided, set_precision
from ftlit.stages.rates import default_rate
from ftlit.stages.signals import StopRequest, exit_status, restarted

RUN_VARIABLE = "FTLIT_RUN"
BRANCH_VARIABLE = "FTLIT_BRANCHED_FROM"

# Imported, so that their classes are known by short name.
COMPONENTS = (
    *(advantages, callbacks, classification, datamodules, dpo, forgetting, formats, generator, peft, policy_gradient),
    *(preference_sums, preferences, prompts, reference_free, reward_objectives, scorer, sft),
)


class Trainer(L.Trainer):
    """Lightning's Trainer with ftlit's own verb."""

    decides_precision: bool = True
    """Whether a precision that is not given is decided, and said: `32-true` was then asked for, or kept."""
    goes_on_from: Any = None
    """The checkpoint of this call; Lightning's own `ckpt_path` says it only after the model was made."""

    def _run(self, model: Any, ckpt_path: Any = None, *more: Any, **options: Any) -> Any:
        self.goes_on_from = ckpt_path
        return super()._run(model, ckpt_path, *more, **options)

    def data(self, model: Stage, datamodule: Any = None, rows: int = 3) -> None:
        """Show what would be trained on.

        Args:
            model: The stage, for its tokenizer.
            datamodule: The data.
            rows: How many rendered training rows to show.
        """
        datamodule.use_tokenizer(model.tokenizer)
        datamodule.setup("fit")
        print("\n".join(datamodule.report()))
        *marks, meaning = terminal_marks()
        for number in range(min(rows, len(datamodule.sets["train"]))):
            print(f"--- training example {number + 1}, trained tokens {meaning}")
            print(datamodule.rendered(number, *marks))


class SaveConfig(SaveConfigCallback):
    """Writes the whole config of a run to `config.yaml` in its folder."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: a config that cannot be loaded must not take the place of one that could."""

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes it, once, when all that it names is loaded and before anything is trained."""
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same, where nothing is validated before."""
        if self.already_saved or not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "config.yaml"
        config = self.config.clone()
        config.ckpt_path = None  # where this process went on from is not a setting of the run
        text = with_place(self.parser.dump(absolute(config), skip_unset=False), path)
        _keep_earlier(path, text, trainer.ckpt_path)
        write_text(path, text)
        branch = origin(path.parent)
        for logger in trainer.loggers:
            logger.log_hyperparams({**yaml.safe_load(text), **({"branched_from": branch} if branch else {})})
        self.already_saved: bool = True


def _keep_earlier(path: Path, text: str, checkpoint: Any) -> None:
    """Keeps the config of a run that goes on with another one, under the step up to which it was trained with."""
    if checkpoint is None or not path.exists() or path.read_text(encoding="utf-8") == text:
        return
    step = read_checkpoint(checkpoint, checked=True)["global_step"]
    os.replace(path, path.with_name(f"config-until-step-{step}.yaml"))


class Parser(LightningArgumentParser):
    """Takes `null` for arguments of arguments, as `model.kl.target`: jsonargparse hands it on as the text `None`.

    Nulls inside of lists, and a text that is `None`, are for a YAML file.
    """

    @override
    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        return super().parse_args(None if args is None else with_null(args), *more, **options)

    @override
    def dump(self, namespace: Namespace, *more: Any, **options: Any) -> str:
        return super().dump(with_rate(namespace), *more, **options)


def with_rate(config: Namespace) -> Namespace:
    """A config with the rate that a run of it trains with, where it names none.

    Args:
        config: A whole config, or a part without a stage, which is returned as it is.
    """
    model = config.get("model")
    settings = model.get("init_args") if isinstance(model, Namespace) else None
    if not isinstance(settings, Namespace) or settings.get("lr", 0) is not None:
        return config
    strategy = settings.get("peft")
    named = strategy.get("class_path") if isinstance(strategy, Namespace) else None
    stage, kind = class_of(model.class_path), Full if named is None else class_of(named)
    if stage is None or kind is None:
        return config
    config = config.clone()
    config.model.init_args.lr = default_rate(stage, kind).value
    return config


def with_null(args: Sequence[str]) -> list[str]:
    """Arguments with `null` in the place of Python's `None`.

    Args:
        args: What a parser is given.
    """
    values = [f"{one[:-4]}null" if one.startswith("--") and one.endswith("=None") else one for one in args]
    keys = ["", *values[:-1]]
    return ["null" if one == "None" and key.startswith("--") else one for key, one in zip(keys, values, strict=True)]


class CLI(LightningCLI):
    """LightningCLI for stages and their data."""

    current: LightningArgumentParser | None = None
    run_given: bool = False
    """Whether the command line names the run folder."""
    lock: RunLock | None = None

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand == "data":  # the arguments of a method become a group of its name, and that one is taken
            parser = self.init_parser(**kwargs)
            self._add_arguments(parser)
            parser.add_argument("--rows", type=int, default=3, help="How many rendered training rows to show.")
            for name in ("--ckpt_path", "--weights_only"):  # so that the config.yaml of a run can be given
                parser.add_argument(name, type=str | bool | None, default=None, help="Not used here.")
            self._subcommand_method_arguments[subcommand] = ["rows"]
        else:
            parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        CLI.current = parser
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only the verb that was asked for: building a parser takes a while."""
        verbs = {**LightningCLI.subcommands(), "data": {"model", "datamodule"}}
        asked = next((a for a in sys.argv[1:] if a in verbs), None)
        return {asked: verbs[asked]} if asked else verbs

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--run`."""
        parser.add_argument(
            "--run", type=str | None, default=None, help="Run folder; runs/STAGE-DATE-TIME when left out."
        )

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let a checkpoint's old hyper-parameters win over the command line."""

    def before_instantiate_classes(self) -> None:
        """Decides the run folder, and what is read from it or written to it."""
        verb = str(self.subcommand)
        config = self.config[verb]
        folder = self._folder(verb, config)
        config.run = str(folder)
        # A run can then be used from any folder.
        for settings, name in ((config.model.init_args, "policy"), (config.data.init_args, "chat_template")):
            value = settings.get(name)
            if isinstance(value, str) and "{" not in value and Path(value).expanduser().exists():
                settings[name] = str(Path(value).expanduser().resolve())
        given = config.trainer.callbacks
        config.trainer.callbacks = given if isinstance(given, list) else [] if given is None else [given]
        if config.trainer.max_epochs is None:  # one epoch, unless a number of steps says when to stop
            config.trainer.max_epochs = 1 if config.trainer.max_steps in (-1, None) else -1
        config.trainer.default_root_dir = str(folder)
        if verb == "fit":
            _prepare_wandb(config.trainer, folder)
        else:
            config.trainer.logger = False
            if "verbose" in config:
                config.verbose = False  # WriteEvaluation prints the table
            config.trainer.callbacks = [c for c in config.trainer.callbacks if not c.class_path.endswith("Checkpoint")]
            config.trainer.enable_checkpointing = False
        strategy = config.trainer.strategy
        check_strategy(strategy.class_path if isinstance(strategy, Namespace) else strategy)
        if config.trainer.strategy in ("fsdp", "fsdp2"):
            config.trainer.strategy = Namespace(class_path="ftlit.stages.fsdp.FSDP2", init_args=Namespace())
        if "ckpt_path" in config:
            source = os.environ.get(BRANCH_VARIABLE)
            known = CLI.lock is None or not CLI.lock.is_new
            config.ckpt_path = _checkpoint(config.ckpt_path, Path(source or folder), verb, known)
            if source and config.ckpt_path and CLI.lock is not None:
                step = read_checkpoint(config.ckpt_path, checked=True)["global_step"]
                print(f"run        {folder} branches from {source} at step {step}", flush=True)
                remember_origin(folder, Path(source), step)

    @staticmethod
    def _folder(verb: str, config: Namespace) -> Path:
        if RUN_VARIABLE in os.environ:  # a further rank of a run that is already on its way
            return Path(os.environ[RUN_VARIABLE])
        kind = config.model.class_path.rsplit(".", 1)[-1].lower()
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
        if verb == "fit" and rank is not None and not config.run:
            raise ConfigError("several processes were started from outside: give --run, so that all use one folder.")
        folder = Path(config.run) if config.run else None
        # A run whose config.yaml was given: it was moved since that was written, or a new run is to branch from it.
        begun = begun_in(config.get("config") or []) if config.get("ckpt_path") else None
        if not CLI.run_given and (own := run_of(config)) is not None:
            folder = own
        elif begun is not None and folder is not None and not list(folder.glob("checkpoints/*.ckpt")):
            if verb == "fit" and CLI.run_given and config.ckpt_path != "auto":
                os.environ[BRANCH_VARIABLE] = str(begun)
            elif not folder.exists():
                folder = begun
        if verb != "fit":
            return folder or Path("runs") / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
        if rank in (None, "0"):
            if folder and list(folder.glob("checkpoints/*.ckpt")) and not config.ckpt_path and not restarted():
                raise ConfigError(
                    f"{folder} already holds a run: give another --run, or continue it with --ckpt_path last."
                )
            CLI.lock = RunLock(folder, kind)
            folder = CLI.lock.folder
        assert folder is not None  # several processes from outside have been told theirs
        os.environ[RUN_VARIABLE] = str(folder)
        return folder

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds what every run has: metrics.csv, reports, adapters, progress."""
        trainer = self.config_init[str(self.subcommand)]["trainer"]
        folder = Path(trainer["default_root_dir"])
        if trainer.get("fast_dev_run"):
            kwargs["logger"] = False
        elif self.subcommand == "fit":
            given = trainer.get("logger")
            loggers = [] if given in (None, True, False) else given if isinstance(given, list) else [given]
            path = self.config_init["fit"].get("ckpt_path")
            last = None
            if path:
                checkpoint = read_checkpoint(path, checked=True)
                last = {"step": checkpoint["global_step"], **checkpoint.get("ftlit", {}).get("step_metrics", {})}
            for one in loggers:
                if isinstance(one, WandB):
                    back = path and Path(path).name not in (LAST, PREVIOUS)
                    one.go_on(resumed=path is not None, back_to=int(last["step"]) if last and back else None)
            kwargs["logger"] = [MetricsCSV(folder, last), *(one for one in loggers if isinstance(one, Logger))]
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        own: list[L.Callback] = []
        saves = config.get("enable_checkpointing") is not False
        if not saves:
            config["callbacks"] = [c for c in config["callbacks"] if not isinstance(c, ModelCheckpoint)]
        elif self.subcommand == "fit" and not any(isinstance(c, ModelCheckpoint) for c in config["callbacks"]):
            own.append(SaveCheckpoint())  # a config that replaces the callbacks still leaves a run to go on from
        if self.subcommand == "fit" and not config.get("fast_dev_run"):
            given = any(isinstance(one, SaveAdapter) for one in config["callbacks"])
            own += [Report()] if given else [SaveAdapter(), Report()]  # the report says what was kept
        elif self.subcommand == "predict":
            own.append(WritePredictions())
        elif self.subcommand in ("validate", "test"):
            own.append(WriteEvaluation())
        shows = any(isinstance(one, ProgressBar) for one in config["callbacks"])
        if config.get("enable_progress_bar") is not False and not shows:
            own.append(Progress())
        try:
            trainer = super()._instantiate_trainer(config, [*callbacks, *own])
            self._decide_precision(trainer, config)
            return trainer
        except (ValueError, TypeError, MisconfigurationException) as error:
            text = " ".join(str(error).split())
            if "gpu backend" in text:
                text = "no GPU is found here; --config trainer/cpu trains on the CPU."
            raise ConfigError(f"trainer: {text}") from error
        except RuntimeError as error:
            if "more than one stateful callback" not in str(error):
                raise
            twice = str(error).split("`")[1]
            raise ConfigError(f"trainer.callbacks holds {twice} twice: give each a name of its own.") from error

    def _decide_precision(self, trainer: L.Trainer, given: dict[str, Any]) -> None:
        """Puts a precision where none was given: that of the checkpoint, else the one that suits the device."""
        if given.get("precision") is not None or trainer.precision != "32-true":
            return
        verb = str(self.subcommand)
        path = self.config_init[verb].get("ckpt_path")
        kept = _precision_of(path) if path else None
        device = trainer.strategy.root_device
        precision = kept or decided(device)
        set_precision(trainer, precision)
        self.config[verb].trainer.precision = precision
        why = "as the checkpoint" if kept else f"chosen for {device.type}"
        rank_zero_only(print)(f"precision  {precision} ({why})", flush=True)


def _precision_of(checkpoint: str) -> str | None:
    """The precision that a checkpoint was trained in; None: it does not say.

    One that was written before checkpoints said it has the config of its run beside it, where none given meant float32.
    """
    said = read_checkpoint(checkpoint, checked=True).get("ftlit", {}).get("precision")
    if said is not None:
        return str(said)
    config = Path(checkpoint).absolute().parent.parent / "config.yaml"
    if not config.is_file():
        return None
    trainer = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("trainer") or {}
    given = str(trainer.get("precision") or "32-true")
    kind = given.partition("-")[0]
    return {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(kind)


def _checkpoint(asked: str | None, folder: Path, verb: str, known: bool) -> str | None:
    """The checkpoint file behind `--ckpt_path`; other verbs than fit take a run's last by themselves.

    `last` wants a run that was begun; `auto` begins one where there is none: what a queue that restarts jobs wants, and
    what a job that SLURM restarted gets by itself.

    Args:
        asked: What `--ckpt_path` says.
        folder: The run folder.
        verb: The verb.
        known: Whether the folder was there before this command.
    """
    kept = folder / "checkpoints"
    if asked is None and verb == "fit" and restarted():
        asked = "auto"
    if asked is None and verb != "fit" and ((kept / LAST).exists() or (kept / PREVIOUS).exists()):
        asked = "last"
    if asked is None:
        return None
    if asked in ("last", "auto"):
        path = _newest_whole(kept)
        if path is None and verb == "fit" and (asked == "auto" or (known and folder.is_dir())):
            print(f"weights    {folder} has no checkpoint yet: the run starts from its beginning", flush=True)
            return None
    else:
        path = kept / "best.ckpt" if asked == "best" else Path(asked)
    if path is None or (asked == "best" and not path.exists()):
        raise ConfigError(f"there is no {kept / asked}.ckpt: give the --run that has one, or the path of a checkpoint.")
    if not path.exists():
        raise ConfigError(f"checkpoint {asked} does not exist.")
    read_checkpoint(path, checked=path == kept / LAST and asked in ("last", "auto"))
    print(f"weights    {path}", flush=True)
    return str(path)


def _newest_whole(kept: Path) -> Path | None:
    """`last.ckpt`, or where it is damaged or missing the one before it."""
    last, previous = kept / LAST, kept / PREVIOUS
    if last.exists():
        try:
            read_checkpoint(last)
        except ConfigError as error:
            if not previous.exists():
                raise
            print(f"weights    {error} Going on from the one before it.", flush=True)
            if all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK")):
                os.replace(last, last.with_suffix(".damaged"))
            return previous
        return last
    return previous if previous.exists() else None


def _prepare_wandb(trainer: Namespace, folder: Path) -> None:
    """Lets a W&B logger write into the run folder, and work offline where no key is set."""
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in loggers:
        kind = str(logger.get("class_path")) if isinstance(logger, Namespace) else ""
        if not kind.endswith((".WandB", "WandbLogger")):
            continue
        settings = logger.init_args
        settings.save_dir = str(folder.resolve())  # the process that writes may have begun in another folder
        settings.name = settings.name or folder.name
        known = "WANDB_API_KEY" in os.environ or (Path.home() / ".netrc").exists() or "WANDB_MODE" in os.environ
        if not known and not settings.offline:
            settings.offline = True
            if settings.get("log_model"):  # Lightning's own logger refuses this pair with a traceback
                raise ConfigError("W&B: log_model needs a key (wandb login); the WandB logger has log_adapter instead.")
            print("W&B: no key is set, so this run is logged offline; upload it later with `wandb sync`.", flush=True)
        folder.mkdir(parents=True, exist_ok=True)


def _quiet() -> None:
    """Silences what Lightning and transformers print at every run and what does not help anyone."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        "litlogger",
        "LeafSpec",
        "does not have many workers",
        "ModelCheckpoint",
        "`isinstance\\(treespec",
        "callbacks used to create the checkpoint",
        "across ranks is zero",  # a run without validation
    ):
        warnings.filterwarnings("ignore", message=f".*{text}.*")
    warnings.filterwarnings("ignore", module="lightning.*", category=UserWarning, message=".*checkpoint directory.*")


def _torch_first(args: list[str]) -> list[str]:
    """Says of torch's optimizers and schedules whose they are: other packages have some of the same name."""
    homes = {"--model.optimizer": torch.optim, "--model.lr_scheduler": torch.optim.lr_scheduler}
    named: list[str] = []
    for arg in args:
        option, equals, value = arg.partition("=")
        if not equals and named and named[-1] in homes:
            home, value, front = homes[named[-1]], arg, ""
        elif equals and option in homes:
            home, front = homes[option], f"{option}="
        else:
            named.append(arg)
            continue
        named.append(f"{front}{home.__name__}.{value}" if value.isidentifier() and hasattr(home, value) else arg)
    return named


def _leave_group() -> None:
    """Ends what ranks talk through; Lightning does so for NCCL only.

    The threads of another kind can abort a process that ends with them, and then Lightning kills the other ranks.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(args: list[str]) -> int:
    """Runs a training verb.

    Args:
        args: The verb and its options.

    Returns:
        The exit status.

    Raises:
        FtlitError: For whatever the user can mend.
    """
    args = with_null(_torch_first(resolve_all(rows_given(args))))
    CLI.run_given = any(arg == "--run" or arg.startswith("--run=") for arg in args)
    _quiet()
    for option, value in pairwise(args):
        if option in ("--config", "-c"):
            look_where_begun(value)
    sys.argv = [sys.argv[0], *args]
    options = {"default_config_files": [str(config_dir() / "base.yaml")], "exit_on_error": False}
    try:
        with explain(lambda: CLI.current):
            CLI(
                Stage,
                L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                trainer_class=Trainer,
                auto_configure_optimizers=False,
                parser_class=Parser,
                seed_everything_default=0,
                save_config_callback=SaveConfig,
                parser_kwargs={
                    "exit_on_error": False,
                    "allow_abbrev": False,
                    **{verb: dict(options) for verb in CLI.subcommands()},
                },
            )
        _leave_group()
    except SIGTERMException:
        _leave_group()
        return exit_status(StopRequest.last)
    except (MisconfigurationException, FloatingPointError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    finally:
        os.environ.pop(RUN_VARIABLE, None)
        os.environ.pop(BRANCH_VARIABLE, None)
        if CLI.lock is not None:
            CLI.lock.release()
            CLI.lock = None
    return 0
