"""What is exported, and the folder that it becomes: made aside, and named when all is whole and proven. What goes into it is
a file of `format/`."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from mvlm import build
from mvlm.chat import Chat
from mvlm.export import format as formats
from mvlm.model.files import read_config
from mvlm.model.names import projector_type
from mvlm.run import Run, file_hash, manifest

SMALL = 2**24
"""Bytes for vocabularies, graphs and cards: what is not weights."""

FULL = re.compile(
    rf"{os.strerror(errno.ENOSPC)}|{os.strerror(errno.EDQUOT)}|Not enough free space to write|\d+ requested and \d+ written"
)
"""How a full disk is told: by the system (other processes pass its words on), and by numpy, which gives no number of an error."""


class Unproven(ValueError):
    """What was written does not compute what PyTorch does."""


@dataclass(frozen=True)
class Source:
    """What is exported."""

    name: str
    folder: Path
    chat: Chat
    """The model with its tokenizer, its template and its way to look at pictures."""
    tokenizer: Path
    """The tokenizer's folder."""
    run: Run | None
    """None for a released checkpoint."""

    @classmethod
    def open(cls, folder: str | Path) -> Source:
        """A run folder (its last stage; adapters were merged when that was saved), or a released MobileVLM.

        Raises:
            ValueError: it is neither.
        """
        folder = build.run_folder(folder)
        chat, name = Chat.open(folder), folder.resolve().name
        if not (folder / "config.yaml").exists():
            return cls(name, folder, chat, folder, None)
        run = Run.find(folder)
        return cls(name, folder, chat, build.tokenizer_folder(run.config), run)

    @property
    def weights(self) -> Path:
        """The folder of the weights."""
        return self.run.last_stage() if self.run else self.folder

    def about(self) -> dict[str, Any]:
        """What every format's manifest says: the model, and what produced it."""
        model, look = self.chat.model, self.chat.pictures
        return {
            "name": self.name,
            "tower": model.vision.arguments,
            "projector": {"type": projector_type(model.projector), "image tokens": model.image_tokens},
            "template": self.chat.talk.name,
            "pictures": {"mode": look.mode, "size": look.size}
            # single precision, told in as few digits as it takes
            | {key: [float(str(value)) for value in getattr(look, key)] for key in ("mean", "std")},
            "from": {
                "stage": self.weights.name,
                "weights_sha256": {path.name: file_hash(path) for path in sorted(self.weights.glob("*.safetensors"))},
                "run": self.run.facts if self.run else None,
                "config": self.run.config_dict() if self.run else read_config(self.folder),
            },
            "made": manifest(),
        }


def export(cfg: DictConfig) -> Path:
    """What conf/export.yaml says. Returns the folder.

    Raises:
        ValueError: the format can't hold this model, what should prove it is missing, the disk has no room, or it was not proven.
            Then nothing has a final name; what did not pass is kept in a folder whose name ends in `.failed`.
    """
    known = sorted(module.name for module in iter_modules(formats.__path__))
    if cfg.format not in known:
        raise ValueError(f"format={cfg.format}: there is no such format (there are: {', '.join(known)})")
    kind = import_module(f"{formats.__name__}.{cfg.format}")
    place = kind.place(cfg)
    torch.set_num_threads(cfg.threads)
    source = Source.open(cfg.run)
    out, needed = Path(cfg.out or source.folder / place), kind.check(source, cfg)
    with aside(out, needed) as folder:
        kind.write(folder, source, cfg)
    Console().print(f"written: {out}", soft_wrap=True)
    return out


def refuse(cfg: DictConfig, **defaults: Any) -> None:
    """Raises ValueError if a key that says nothing to the format was set."""
    for key, default in defaults.items():
        if cfg[key] != default:
            raise ValueError(f"{key}={cfg[key]} says nothing to format={cfg.format}: leave it out")


def described(file: Path) -> dict[str, Any]:
    """A file as a manifest tells of it."""
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": file_hash(file)}


def show(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table in the terminal."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


# ------------------------------------------------------------------------------------------------ whole or not at all


@contextmanager
def aside(out: Path, needed: int) -> Iterator[Path]:
    """An empty folder beside `out`, which takes that name when the block ends well; an earlier export there goes.

    Args:
        needed: bytes of weights that will be written.

    Raises:
        ValueError: something that is no export has the name; the disk has no room, found before anything is written or while
            it is; or what was written is `Unproven`, and then it is kept in a folder whose name ends in `.failed`.
    """
    part, failed, old = (out.with_name(out.name + end) for end in (".part", ".failed", ".old"))
    if old.exists() and not out.exists():  # killed between the two renames below
        old.replace(out)
    if out.exists() and not (out / "manifest.json").exists():
        raise ValueError(
            f"{out} is there and no export (it has no manifest.json), and would be replaced: name another out="
        )
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    if needed + SMALL > (free := _free(out)):
        raise ValueError(_no_room(out, needed, free))
    try:
        part.mkdir(parents=True)
        yield part
    except Unproven as error:
        shutil.rmtree(failed, ignore_errors=True)
        part.replace(failed)
        raise ValueError(f"{error}\nWhat did not pass is kept in {failed}") from None
    except BaseException as error:
        free = _free(out) + sum(path.stat().st_size for path in part.rglob("*"))
        shutil.rmtree(part, ignore_errors=True)
        if FULL.search(str(error)):
            raise ValueError(f"the disk is full, nothing is kept ({error}): {_no_room(out, needed, free)}") from error
        raise
    for folder in (failed, old):
        shutil.rmtree(folder, ignore_errors=True)
    if out.exists():
        out.replace(old)
    part.replace(out)
    shutil.rmtree(old, ignore_errors=True)


def _free(out: Path) -> int:
    """Bytes that are free where `out` will lie."""
    return shutil.disk_usage(next(folder for folder in out.absolute().parents if folder.exists())).free


def _no_room(out: Path, needed: int, free: int) -> str:
    need, there = (f"{size / 1e9:.2f} GB" for size in (needed + SMALL, free))
    return f"{out} takes about {need} while it is made and {there} are free there: make room, or name another disk with out="
