"""A language model's file and its mmproj, found in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm.data.image import Pictures, open_picture
from mvlm.export.class_token import CURE
from mvlm.export.container import Opened
from mvlm.export.gate import png
from mvlm.trust import read_json

LONGEST, LARGEST = 1 << 20, 1 << 12
"""Most positions of a context, and most pixels of a picture's side, that a manifest may ask for."""


@dataclass(frozen=True)
class Pair:
    """Two files that belong together."""

    language: Path
    mmproj: Path
    about: dict[str, Any]
    """manifest.json; empty for files that were not exported here."""

    @classmethod
    def find(cls, folder: str | Path) -> Pair:
        """In a folder that export.py wrote, or in one with a single pair.

        Raises:
            ValueError: there is no pair, or several, a file is not as long as the manifest says, or that is laid out otherwise or names a
                file of another folder.
        """
        folder = Path(folder)
        told = folder / "manifest.json"
        if told.exists() and "mmproj" in (about := read_json(told)).get("files", {}):
            _check(about, told)
            files = [folder / about["files"][role]["name"] for role in ("language", "mmproj")]
            for file, role in zip(files, ("language", "mmproj"), strict=True):
                here, there = file.stat().st_size if file.exists() else 0, about["files"][role]["bytes"]
                if here != there:
                    raise ValueError(f"{file} has {here:,} bytes and {told} says {there:,}: copy or export it again")
            return cls(*files, about)
        found = sorted(folder.glob("*.gguf"))
        seers = [file for file in found if "mmproj" in file.name]
        talkers = [file for file in found if file not in seers]
        if len(seers) != 1 or len(talkers) != 1:
            names = ", ".join(file.name for file in found) or "no file that ends in .gguf"
            raise ValueError(
                f"{folder} must hold one language model and one mmproj (a file with mmproj in its name), and holds {names}; "
                "export.py writes such a folder, <run>/gguf/<quant>"
            )
        return cls(talkers[0], seers[0], {})

    def warning(self, engine: str) -> str | None:
        """Why a llama.cpp may see next to nothing with these files, unless it is the one that they were proven to be seen by."""
        if not self.about.get("needs a mended llama.cpp"):
            return None
        proven = next(iter(self.about.get("parity", [])), {})
        if proven.get("class_token") == "faithful" and self.about.get("engine") == engine:
            return None
        return f"A llama.cpp as it comes misplaces the class token, and these files' model sees next to nothing through it. {CURE}"

    @property
    def context(self) -> int:
        """Positions for a prompt and its answer."""
        return self.about.get("context") or min(4096, Opened(self.language).get("llama.context_length"))

    def fit(self, image: str | Path) -> bytes:
        """A picture as the model was trained to see it, as a PNG file. Files that were not exported here get it as it is."""
        look, picture = self.about.get("pictures"), open_picture(image)
        return png(Pictures(look["size"], look["mode"], look["mean"], look["std"]).fit(picture) if look else picture)


def _check(about: dict[str, Any], told: Path) -> None:
    """Raises ValueError unless a manifest says what is read of it: it came with the files, from wherever these did."""
    try:
        for role in ("language", "mmproj"):
            name = about["files"][role]["name"]
            if not name or Path(name).name != name or name == "..":
                raise ValueError(f"{told} names the file {name}, and its files lie beside it: export it again")
        context, look = about.get("context"), about.get("pictures")
        right = context is None or (isinstance(context, int) and 0 < context <= LONGEST)
        if look is not None:
            right &= isinstance(look["size"], int) and 0 < look["size"] <= LARGEST and isinstance(look["mode"], str)
            right &= all(
                len(look[key]) == 3 and all(isinstance(v, float) for v in look[key]) for key in ("mean", "std")
            )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{told} is laid out otherwise than export.py writes it ({error!r}): export it again"
        ) from None
    if not right:
        raise ValueError(f"{told}: context={context} or pictures={look} is none that export.py writes: export it again")
