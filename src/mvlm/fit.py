"""One stage of training, from a configuration into its run folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from mvlm import build, engine, resume, score, settings
from mvlm.benchmark.metric import BenchmarkMetric, validate
from mvlm.data.collate import collate
from mvlm.data.corpus import Corpus, is_own
from mvlm.data.datamodule import Skips, StepData, worker_count
from mvlm.data.doctor import USELESS, USELESS_LIMIT
from mvlm.data.held_out import hold_out
from mvlm.data.image import PictureError
from mvlm.data.mixture import Mixture
from mvlm.data.tokenizer import Tokenizer
from mvlm.model.checkpoint import load_checkpoint, save_checkpoint
from mvlm.model.mobilevlm import MobileVLM
from mvlm.plan import meta_model
from mvlm.progress import progress
from mvlm.run import AXES, Run, content, file_hash, first_process, overridden, placeless, write_json
from mvlm.strategy import lora
from mvlm.strategy.align import align
from mvlm.strategy.features import encode_pictures
from mvlm.strategy.parameters import claimed_rates
from mvlm.strategy.stage import Stage

LOOKED_AT = 2000
"""Dialogues of a stage that are tokenised before training, to see that they have labels."""

HELD_OUT = 8
"""Samples whose loss with the true and with another picture is watched while a stage learns."""


log = logging.getLogger(__name__)


def check(cfg: DictConfig, data: dict[str, Mixture | None], run: Run, files: Corpus) -> None:
    """Everything that could be wrong with a run, before any work: rates, batches, labels; then say what will be trained.

    Raises:
        ValueError: a setting that may not be (`mvlm.settings`), no data, no number of workers, a strategy that misses a part, a batch that
            cannot be split, no picture for what only pictures teach, too many bad records, too many dialogues without labels, other data
            than the run began with, a validation that cannot be.
    """
    settings.check(cfg)
    world, engines, why = world_size(cfg.trainer), {}, []
    worker_count(cfg.workers, 0, 1)
    for stage, mixture in data.items():
        if mixture is not None and not run.finished(stage):
            engines[stage], told, _ = engine.chosen(cfg, stage, mixture, world)
            if world > 1:
                why.append(told)
    validation(cfg, files, engines.values())
    if not any(data.values()):
        raise ValueError("there is nothing to train on: data.pretrain and data.finetune are both empty lists")
    table = Table("stage", "source", "samples", "rates", "steps", title=f"{run.folder}", title_justify="left")
    hashes = {}
    for stage, whole in data.items():
        if whole is None:
            continue
        mixture, held_out = hold_out(whole, HELD_OUT)
        if held_out:
            shown = f"{len(whole) - len(mixture)} more samples show the {len(held_out)} pictures"
            why.append(f"{stage}: {shown} that are kept back, to watch what it sees")
        rates = OmegaConf.to_container(cfg.strategy[stage].rates, resolve=True)
        if adapters := cfg.strategy[stage].get("lora"):
            meta_model(cfg.model.module, adapters)  # peft looks at its settings
        claimed_rates({"vision.lower", "vision.upper", "projector", "language"}, rates)
        steps = (
            cfg.recipe[stage].epochs * StepData(mixture, cfg.recipe[stage].batch, cfg.recipe[stage].micro_batch).steps
        )
        if steps < 2:
            raise ValueError(
                f"{stage} has 1 step of {cfg.recipe[stage].batch} samples, and the first step's learning rate is zero (warm-up): "
                f"nothing would learn from {len(mixture)} samples. Give it more data, or a smaller recipe.{stage}.batch"
            )
        idle = [part for part, rate in rates.items() if rate and part != "language"]
        if idle and not (mixture.lengths > 0).any():
            raise ValueError(
                f"{stage} shows no picture in {len(mixture)} samples, so nothing would be learned by what only pictures teach. Add samples that "
                f"have one, or freeze it: {' '.join(f'strategy.{stage}.rates.{part}=null' for part in idle)}"
            )
        Skips(stage, whole)
        check_labels(stage, whole)
        for number, (source, count) in enumerate(mixture.counts.items()):
            told = (stage, ", ".join(f"{k} {v:g}" if v else f"{k} frozen" for k, v in rates.items()), str(steps))
            table.add_row(told[0] if not number else "", source, f"{count:,}", *(told[1:] if not number else ("", "")))
        hashes |= by_source(stage, ((d.source, d.sha256) for d in mixture.datasets))
        if cfg.get("exclude"):
            left_out = ", ".join(f"{len(d.excluded):,} of {d.source}" for d in mixture.datasets)
            why.append(f"{stage}: trained without {left_out}, as {cfg.exclude} says")
    if cfg.get("exclude"):
        hashes["exclude"] = file_hash(Path(cfg.exclude))
    check_data(run, hashes)
    run.note(data_sha256=hashes)
    Console(quiet=not first_process()).print(table, *why, sep="\n")


def by_source(stage: str, sources: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A stage's sources and the hashes of their files as `check_data` takes them. One's own files may lie elsewhere next time, and two of
    one name are told by both hashes."""
    hashes: dict[str, str] = {}
    for source, sha256 in sources:
        key = wherever(f"{stage}/{source}")
        hashes[key] = hashes.get(key, "") + sha256
    return hashes


def wherever(name: str) -> str:
    """`<stage>/<source>` of one's own file, without where it lies."""
    stage, _, source = name.partition("/")
    return f"{stage}/{placeless(source)}" if is_own(source) else name


def check_data(run: Run, hashes: Mapping[str, str]) -> None:
    """Compare the data with those that a run has begun with, if it has trained anything.

    Args:
        hashes: of the annotation files, by `<stage>/<source>`, and of the list `exclude`.

    Raises:
        ValueError: some are others.
    """
    before = {wherever(name): sha for name, sha in run.facts.get("data_sha256", {}).items()}
    other = sorted(name for name in before.keys() & hashes if before[name] != hashes[name])
    if other and run.begun:
        first = other[0]
        raise ValueError(
            f"{run.folder} was begun with other data: {', '.join(other)} changed (sha256 {before[first][:12]} then, {hashes[first][:12]} "
            "now). Put them back to go on, or train under another name (cell=my-name)"
        )


def check_labels(stage: str, mixture: Mixture) -> None:
    """Tokenise a sample of the dialogues (at most LOOKED_AT, evenly spread) and count those that are of no use.

    Raises:
        ValueError: more than USELESS_LIMIT of them.
    """
    every = -(-len(mixture) // LOOKED_AT)
    looked_at = [mixture.find(k) for k in range(0, len(mixture), every)]
    encoded = [dataset.encode(dataset.record(place)) for dataset, place in looked_at]
    for kind, what in USELESS.items():
        found = [where for where, one in zip(looked_at, encoded, strict=True) if getattr(one, kind)]
        if len(found) > USELESS_LIMIT * len(looked_at):
            dataset, place = found[0]
            raise ValueError(
                f"{stage}: {len(found)} of {len(looked_at)} dialogues looked at {what} (limit {USELESS_LIMIT:.1%}; the first is record "
                f"{dataset.record_number(place)} of {dataset.source}). python doctor.py lists all of them, and "
                "exclude=doctor/exclude.json trains without"
            )


def validation(cfg: DictConfig, files: Corpus, engines: Collection[str] = ()) -> list[BenchmarkMetric]:
    """What the model answers while it trains; nothing with `val_every=null`.

    Args:
        engines: that train the stages; by the trainer's `strategy` if none is named.

    Raises:
        ValueError: a benchmark's files are missing; numbers below 1; the weights will lie in pieces on several devices.
    """
    if cfg.val_every is None:
        return []
    if cfg.val_every < 1 or cfg.val_items < 1:
        raise ValueError(
            f"val_every={cfg.val_every} and val_items={cfg.val_items} count optimizer steps and questions: at least 1 each; "
            "val_every=null validates never"
        )
    if sharded := {*(engines or [engine.name(cfg.trainer.strategy)])} & {*engine.SHARDED}:
        raise ValueError(
            f"val_every={cfg.val_every}: {sharded.pop()}, by trainer.strategy={cfg.trainer.strategy}, keeps a piece of the weights on each "
            "device, and answering needs all of them. Set val_every=null, trainer=ddp or trainer=zero2"
        )
    return [
        BenchmarkMetric(b, cfg.val_items)
        for b in score.opened(
            cfg, cfg.benchmark, files, folder=cfg.benchmark_root, protocol=cfg.protocol, any_version=cfg.any_version
        )
    ]


STARTED = "start.safetensors"
"""In a stage's folder: the projector that `recipe.start=words` began with."""


def begin(cfg: DictConfig, run: Run, name: str, model: MobileVLM) -> str | None:
    """Fill a model with what a stage begins with: the stage before, which is returned, or where there is none its pretrained parts."""
    before = next((s for s in build.STAGES[: build.STAGES.index(name)] if run.finished(s)), None)
    if before:
        load_checkpoint(model, run.folder / before)
    else:
        build.pretrained(model, cfg)
    return before


def stage(
    cfg: DictConfig,
    run: Run,
    name: str,
    model: MobileVLM,
    data: dict[str, Mixture | None],
    files: Corpus,
    words: Tokenizer,
    wandb: WandbLogger | None = None,
) -> None:
    """Train a stage and save it. The model goes on from the stage before, or from its pretrained parts; or from the newest checkpoint inside
    the stage, if there is one (`mvlm.resume`).

    An engine that cuts the model up (all but plain and DDP) uses it up: it is left without its parts, whose memory is free again, and the
    next stage builds another.
    """
    quiet()
    began = time.monotonic()
    world = world_size(cfg.trainer)
    how, _, again = engine.chosen(cfg, name, data[name], world)
    if not hasattr(model, "language"):
        model = build.model(cfg)
    recipe, folder = cfg.recipe[name], run.folder / name
    trainer_arguments = OmegaConf.to_container(cfg.trainer, resolve=True)
    trainer_arguments |= {
        "precision": build.precision(cfg.trainer.precision, cfg.trainer.accelerator),
        "strategy": engine.strategy(how, trainer_arguments["strategy"], world),
    }
    autocast = build.autocast_type(trainer_arguments["precision"])
    before = begin(cfg, run, name, model)

    from_words = cfg.recipe.start == "words" and not before
    vision_rates = [r for s in cfg.strategy.values() for part, r in s.rates.items() if part.startswith("vision")]
    frozen, in_pieces = all(rate is None for rate in vision_rates), how in engine.SHARDED
    if cfg.recipe.cache_features and (from_words or (frozen and not in_pieces)):
        more = sorted(map(str, (files.root / "pictures").glob("*.jpg"))) if from_words else []
        shown = {s: m for s, m in data.items() if m and not run.finished(s) and (frozen or s == name)}
        cache_features(cfg, model, shown, autocast, more)
    skips = Skips(name, data[name])
    facts: dict = {"engine": how, "checkpointing": again}
    kept = resume.newest(folder)
    if from_words:
        start = folder / "start.json"
        if kept and start.exists():
            facts["start"] = json.loads(start.read_text())
        else:
            facts["start"] = start_from_words(model, data[name], files, words, autocast)
            if first_process():
                folder.mkdir(exist_ok=True)
                save_file(model.projector.state_dict(), folder / STARTED)
                write_json(start, facts["start"])
    # A tower that learns gives others soon; and in pieces, a device without pictures runs it on a blank one, and the others must then, too.
    if in_pieces or not frozen:
        for dataset in (d for m in data.values() if m for d in m.datasets):
            dataset.features = None

    compute_again(model.language, again)
    adapters = lora.attach(model.language, **cfg.strategy[name].lora) if cfg.strategy[name].get("lora") else None
    mixture, held_out = hold_out(data[name], HELD_OUT)
    on_gpu, decoded = build.on_gpu(cfg.trainer.accelerator), any(d.features is None for d in mixture.datasets)
    loading = world // cfg.trainer.num_nodes if on_gpu and decoded else 0
    workers = worker_count(cfg.workers, loading, recipe.batch // world * 3 * 4 * model.image_size**2)
    loader = StepData(
        mixture, recipe.batch, recipe.micro_batch, world_size=world, workers=workers, seed=cfg.seed, order=recipe.order,
        pad_id=words.pad_id, pin_memory=on_gpu,
    )  # fmt: skip
    module = Stage(
        model,
        OmegaConf.to_container(cfg.strategy[name].rates, resolve=True),
        steps=loader.steps * recipe.epochs,
        warmup=cfg.recipe.warmup,
        **OmegaConf.to_container(cfg.recipe.optimizer),
        name=name,
        held_out=collate(held_out, words.pad_id) if held_out else None,
        seed=cfg.seed,
        on_divergence=cfg.on_divergence,
    )
    watching = []
    if metrics := validation(cfg, files, [how]):
        answering = build.asking(cfg, words, lambda: model)
        answering |= {"batch_size": 32, "max_new_tokens": score.limit(cfg, cfg.benchmark_root)}
        watching = [Validation(metrics, cfg.val_every, precision=autocast or torch.float32, **answering)]
    rows = resume.Rows(run.folder, name=name, version="")
    trainer = L.Trainer(
        **{k: v for k, v in trainer_arguments.items() if k != "_target_"},
        max_epochs=recipe.epochs,
        accumulate_grad_batches=loader.accumulation,
        gradient_clip_val=cfg.recipe.clip,
        logger=[rows, *([wandb] if wandb else [])],
        callbacks=[
            progress(name),
            skips,
            resume.Keeper(folder, cfg.checkpoint_every),
            *watching,
        ],
        plugins=[resume.PlainCheckpoints(content(cfg))],
        default_root_dir=run.folder,
    )
    projector_parameters = sum(p.numel() for p in model.projector.parameters())  # sharding leaves them without a size
    if kept and first_process():
        rows.go_on(resume.step_of(kept))
        Console().print(f"{name} goes on from {kept}", soft_wrap=True)
    trainer.fit(module, loader, ckpt_path=kept)
    if module.weights is None:
        if adapters is not None:
            model.language = adapters.merge_and_unload()
        done = model
    else:
        del model.vision, model.projector, model.language
        done = engine.in_one_piece(cfg, name, module.weights) if trainer.is_global_zero else None
    if trainer.is_global_zero:
        look = {**OmegaConf.to_container(cfg.model.pictures), "mode": recipe.pictures}
        save_checkpoint(done, folder, extras={"image_aspect_ratio": recipe.pictures, "mvlm_pictures": look})
        seconds = module.seconds + time.monotonic() - began
        write_json(
            folder / "stage.json",
            facts
            | {
                "steps": module.steps,
                "samples": mixture.counts,
                "held_out": len(held_out),
                "skipped": skips.summary(),
                "skipped_steps": module.skipped,
                "seconds": round(seconds, 1),
                "samples_per_second": round(len(mixture) * recipe.epochs / seconds, 3),
                "image_tokens": model.image_tokens,
                "projector_parameters": projector_parameters,
                "precision": trainer_arguments["precision"],
                "devices": world,
                "workers": workers,
                "moved": module.moved,
                "history": module.history,
            },
        )
        for one in resume.checkpoints(folder):
            shutil.rmtree(one)
    trainer.strategy.barrier()  # no process goes on to the next stage before this one is saved


def compute_again(language: nn.Module, again: bool) -> None:
    """Keep a decoder's layers from holding their activations, or let them. transformers calls it `activation_checkpointing` now."""
    word = "activation" if hasattr(language, "activation_checkpointing_enable") else "gradient"
    if again:
        getattr(language, f"{word}_checkpointing_enable")({"use_reentrant": False})
    elif getattr(language, f"is_{word}_checkpointing"):  # by the stage before
        getattr(language, f"{word}_checkpointing_disable")()


def cache_features(
    cfg: DictConfig, model: MobileVLM, data: dict[str, Mixture], autocast: torch.dtype | None, more: Sequence[str] = ()
) -> None:
    """Give every dataset the frozen tower's output of its pictures, each encoded once for all stages that show it alike, on the device that
    will train.

    `more` are further pictures to encode, which the start needs. Stages that an earlier one in this process encoded are left alone.
    """
    data = {stage: mixture for stage, mixture in data.items() if any(d.features is None for d in mixture.datasets)}
    kept: dict[str, dict[str, Tensor]] = {}
    looks = {stage: cfg.recipe[stage].pictures for stage in data}
    model.vision.to(own_device(cfg.trainer))
    for look in dict.fromkeys(looks.values()):
        alike = [s for s in data if looks[s] == look]
        paths = [*more, *(path for s in alike for path in data[s].pictures_used)]
        pixels = build.pictures(cfg, alike[0])

        def unreadable(path: str, error: PictureError, alike: Sequence[str] = alike) -> None:
            shown = sum([data[stage].unreadable(path, error) for stage in alike])
            if not shown and cfg.on_bad_sample == "stop":
                raise error
            log.warning("left out: %s", error)
            for stage in alike:
                Skips(stage, data[stage])  # too many stop here, before all the others are encoded

        kept[look] = encode_pictures(
            model, paths, pixels, autocast=autocast, kept_in=cfg.features, unreadable=unreadable
        )
    model.vision.cpu()
    for stage, mixture in data.items():
        for dataset in mixture.datasets:
            dataset.features = kept[looks[stage]]


def start_from_words(
    model: MobileVLM, mixture: Mixture, files: Corpus, words: Tokenizer, autocast: torch.dtype | None
) -> dict:
    """`recipe.start=words`: see `mvlm.strategy.align`. Uses the training pictures' own truth, never the benchmarks'."""
    from mvlm.pocket.scene import Scene, cell_words

    table = model.language.get_input_embeddings().weight.detach()
    features = {path: f for d in mixture.datasets for path, f in (d.features or {}).items()}
    side = int(model.image_tokens**0.5)
    file = files.root / "scenes.jsonl"
    scenes = [Scene.from_json(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    drawn = files.root / "pictures"
    truth = {str(drawn / scene.picture): cell_words(scene, side, model.image_size) for scene in scenes}
    shown = [path for path in features if path in truth]
    if not shown:
        raise ValueError(
            "recipe.start=words needs pictures that know what they show (corpus=pocket) and recipe.cache_features=true; "
            "for other data set recipe.start=random"
        )
    reached = align(
        model.projector,
        torch.stack([features[path] for path in shown]),
        [truth[path] for path in shown],
        lambda word: table[words.encode(" " + word)],
        autocast=autocast,
    )
    return asdict(reached)


def told_to_wandb(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """What tells a W&B run from others: its name, the run folder's; tags; and the configuration, nested as config.yaml has it.

    Beside the configuration stand `axes`, each axis' choice, and `row`: the choices and what else was asked for, in words. Runs
    with one `row` are the seeds of one row of a table.
    """
    hydra = HydraConfig.get()
    axes = {axis: hydra.runtime.choices[axis] for axis in AXES}
    return {
        "name": run.folder.name,
        "tags": [f"{axis}:{choice}" for axis, choice in axes.items()],
        "config": run.config_dict() | {"axes": axes, "row": " ".join(["-".join(axes.values()), *overridden(hydra)])},
    }


def costs(run: Run) -> dict[str, float]:
    """What the finished stages cost: `image_tokens` of a picture, `projector_parameters`, and `<stage>/samples_per_second`."""
    told = {}
    for name in filter(run.finished, build.STAGES):
        facts = run.stage_facts(name)
        told |= {key: facts[key] for key in ("image_tokens", "projector_parameters") if key in facts}
        told[f"{name}/samples_per_second"] = facts["samples_per_second"]
    return told


@contextmanager
def tracking(cfg: DictConfig, run: Run) -> Iterator[WandbLogger | None]:
    """The run's W&B logger, or None with `logger=csv`. Its id is kept in the run folder, so a repeated command continues the same
    W&B run. It is open from here on, and ends as the process does: an error or an interrupt marks it as failed, and one that is
    killed says nothing of its end, by which W&B knows it as crashed. Its group is W&B's own WANDB_RUN_GROUP.

    A process told to stop (SIGTERM, SIGUSR1) ends with `resume.REQUEUE`, in a stage after it has saved itself.

    Raises:
        ValueError: W&B refuses to begin: nobody is logged in, or it cannot be reached.
    """
    resume.on_signals(resume.ends_with_requeue)
    chosen: partial = instantiate(cfg.logger)
    logger = None
    if chosen.func is not CSVLogger:
        os.environ.setdefault("WANDB_SILENT", "true")
        # Seconds, 15 by itself. `wandb sync` of many runs sends none if one was killed before its first lines were on the disk.
        os.environ.setdefault("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        logger = chosen(save_dir=run.folder, id=run.facts["wandb_id"], resume="allow", **told_to_wandb(cfg, run))
        # Lightning gives it, and W&B warns at every start that it has no effect.
        vars(logger).get("_wandb_init", {}).pop("anonymous", None)
        from wandb.errors import Error

        try:
            logger.experiment  # noqa: B018  made when first asked for
        except Error as error:
            raise ValueError(
                f"W&B does not begin this run ({error}): log in (wandb login), or leave logger.offline=true and send it later (wandb sync)"
            ) from error
    try:
        yield logger
    except BaseException as error:
        if logger:
            logger.experiment.finish(exit_code=1)
        if isinstance(error, SIGTERMException):  # Lightning's own would end the process with 0
            raise SystemExit(resume.REQUEUE) from None
        raise
    if logger:
        # By every process that ends well: of a run that was interrupted, W&B keeps the last one's summary.
        logger.log_metrics(costs(run))
        logger.experiment.finish(exit_code=0)


def world_size(trainer: Mapping[str, Any]) -> int:
    """Devices that the trainer will use.

    Raises:
        ValueError: there are no such ones.
    """
    return _lightning(trainer).world_size


def own_device(trainer: Mapping[str, Any]) -> torch.device:
    """The one of them that this process will train on."""
    return _lightning(trainer).strategy.root_device


def _lightning(trainer: Mapping[str, Any]) -> L.Trainer:
    quiet()
    asked = {key: trainer[key] for key in ("accelerator", "devices", "num_nodes")}
    precision = build.precision(trainer["precision"], trainer["accelerator"])
    try:
        return L.Trainer(**asked, precision=precision, logger=False, enable_checkpointing=False)
    except MisconfigurationException as error:
        told = ", ".join(f"trainer.{key}={value}" for key, value in asked.items())
        raise ValueError(f"{told} cannot be had on this machine: {error}") from None


class Validation(Callback):
    """Every so many optimizer steps the model answers a part of the benchmarks: `val/<benchmark>`, `val/<benchmark>_items`, `val/avg`.

    On several devices each answers its part. Training does not notice: nothing is drawn by lot, and no gradient is touched.

    Args:
        metrics: one a benchmark.
        every: optimizer steps.
        precision: what the model computes in.
        loop: the other arguments of `validate`.
    """

    def __init__(
        self, metrics: Sequence[BenchmarkMetric], every: int, *, precision: torch.dtype = torch.float32, **loop: Any
    ) -> None:
        self.metrics, self.every, self.done = metrics, every, 0
        self.loop = loop | {"precision": str(precision).removeprefix("torch.")}
        self.features: dict = {}

    def on_train_batch_end(self, trainer, module, *_) -> None:
        step = trainer.global_step
        if step % self.every or step == self.done:  # a step's other micro-batches come here, too
            return
        self.done = step
        frozen = not any(p.requires_grad for p in module.model.vision.parameters())
        values = validate(
            module.model,
            [metric.to(module.device) for metric in self.metrics],
            rank=trainer.global_rank,
            ranks=trainer.world_size,
            features=self.features if frozen else None,
            **self.loop,
        )
        for logger in trainer.loggers:
            # Lightning counts rows from 0: beside the loss of the same step.
            logger.log_metrics({f"val/{key}": value for key, value in values.items()}, step=step - 1)


def quiet() -> None:
    """Keep Lightning to what concerns the user of this kit."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # StepData is, by its own state
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    # DDP's, of a depthwise convolution: a little time
    warnings.filterwarnings("ignore", message=".*Grad strides do not match.*")
    warnings.filterwarnings("ignore", message=".*DeepSpeed handles gradient clipping internally.*")  # so it is told to
