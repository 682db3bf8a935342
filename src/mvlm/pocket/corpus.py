"""The whole pocket corpus in a folder: training pictures and records, the six benchmarks, a contact sheet, a manifest.

Made once and reused: the folder is named by a hash of everything that decides its content, is written aside, and gets
its name only when it is complete. The same arguments give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track

from .benchmarks import FIRST_ID, JPEG_QUALITY, write_all
from .draw import Sprites, draw
from .objects import KINDS
from .scene import PAINTING, PLAIN_STYLE, POSTER, Scene, sample_scene
from .sources import SOURCES, records, short_caption

GENERATOR = 3
"""Raised whenever the same arguments would give other content."""

LICENCE = "Pictures use OpenMoji, CC BY-SA 4.0"

_BYTES_A_PICTURE = 60_000
"""Generous: the average JPEG has about 25 kB."""

_BYTES_BESIDES = 60_000_000
"""Benchmarks at scale 1 (some pictures as PNG, some twice) and records."""


def build(
    root: str | Path,
    svg: str | Path,
    *,
    seed: int = 0,
    counts: Mapping[str, int],
    scenes: int,
    turns: int = 6,
    eval_scale: float = 1.0,
    progress: bool = True,
) -> Path:
    """The corpus's folder, made on the first call.

    It holds pictures/ID.jpg, train/SOURCE.json, scenes.jsonl (what the training pictures show), benchmarks/,
    contact_sheet.png and manifest.json. `image` in the records is relative to pictures/.

    Args:
        root: the cache; the folder lies below it in corpus/.
        svg: folder with OpenMoji's SVG files, named by codepoint.
        counts: records of each source (see `sources.SOURCES`).
        scenes: distinct training pictures; records of several sources share them.
        turns: questions in a record of the sources that ask several.
        eval_scale: size of the benchmarks, 1 for about 105 pictures.

    Raises:
        ValueError: an unknown source or a number that is not positive, missing SVG files, or too little disk.
    """
    counts = {str(name): int(number) for name, number in sorted(counts.items())}
    if unknown := sorted(set(counts) - set(SOURCES)):
        raise ValueError(f"the pocket world has no source {', '.join(unknown)}; it has {', '.join(SOURCES)}")
    if min([scenes, turns, *counts.values()]) < 1 or scenes >= FIRST_ID or eval_scale <= 0:
        raise ValueError(
            f"scenes={scenes} (1 to {FIRST_ID - 1:,}), turns={turns}, eval_scale={eval_scale} and counts={counts} "
            "must all be positive"
        )
    sprites = Sprites(Path(svg))
    arguments = {"seed": seed, "counts": counts, "scenes": scenes, "turns": turns, "eval_scale": eval_scale}
    drawings = _sha256((sprites.svg / f"{kind.codepoint}.svg").read_bytes() for kind in KINDS.values())
    identity = {"generator": GENERATOR, **arguments, "drawings": drawings}
    key = _sha256([json.dumps(identity, sort_keys=True).encode()])[:16]
    folder = Path(root) / "corpus" / key
    if (folder / "manifest.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_disk(folder.parent, scenes * _BYTES_A_PICTURE + round(max(1.0, eval_scale) * _BYTES_BESIDES))
    aside = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=folder.parent))
    try:
        _write(aside, sprites, identity, progress=progress)
        aside.chmod(0o755)  # mkdtemp's folders are private; a cache may be shared
        try:
            os.rename(aside, folder)
        except OSError:  # another process was faster: its folder has the same bytes
            if not (folder / "manifest.json").is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def training_scenes(seed: int, number: int, avoid: set[tuple]) -> list[Scene]:
    """`number` scenes of distinct content, none of it among `avoid`. Every eighth has two signs, so that even a tiny
    corpus has something to read."""
    taken, scenes = set(avoid), []
    for scene_id in range(number):
        wishes = {"style": PLAIN_STYLE, "signs": 2} if scene_id % 8 == 0 else {}
        scene = sample_scene(seed, scene_id, avoid=taken, **wishes)
        taken.add(scene.content)
        scenes.append(scene)
    return scenes


def _write(folder: Path, sprites: Sprites, identity: dict, *, progress: bool) -> None:
    seed = identity["seed"]
    evaluation = write_all(folder / "benchmarks", sprites, seed=seed, scale=identity["eval_scale"])
    scenes = training_scenes(seed, identity["scenes"], {scene.content for scene in evaluation})
    for name, content in (("scenes.jsonl", scenes), ("benchmarks/scenes.jsonl", evaluation)):
        lines = "".join(json.dumps(scene.to_json()) + "\n" for scene in content)
        (folder / name).write_text(lines, encoding="utf-8")
    (folder / "pictures").mkdir()
    steps = track(scenes, "Drawing the pocket world", console=Console(stderr=True), disable=not progress)
    for scene in steps:
        draw(scene, sprites).save(folder / "pictures" / scene.picture, quality=JPEG_QUALITY)
    (folder / "train").mkdir()
    for source, count in identity["counts"].items():
        made = records(source, scenes, count, turns=identity["turns"], seed=seed)
        (folder / "train" / f"{source}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    contact_sheet(scenes, sprites).save(folder / "contact_sheet.png")
    _write_manifest(folder, identity, len(scenes), len(evaluation))


def _write_manifest(folder: Path, identity: dict, scenes: int, evaluation: int) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix in (".json", ".jsonl", ".tsv", ".txt")]
    pictures = [path for path in files if path.suffix in (".jpg", ".png")]
    manifest = {
        **identity,
        "licence": LICENCE,
        "training_pictures": scenes,
        "evaluation_pictures": evaluation,
        "pictures_sha256": _sha256(path.read_bytes() for path in pictures),
        "sha256": {path.relative_to(folder).as_posix(): _sha256([path.read_bytes()]) for path in texts},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"the pocket corpus needs about {needed / 1e6:.0f} MB in {folder.resolve()}, which has "
            f"{free / 1e6:.0f} MB free; free some, ask for fewer scenes, or point the cache elsewhere"
        )


# -- the contact sheet


def contact_sheet(scenes: Sequence[Scene], sprites: Sprites, *, columns: int = 4, rows: int = 3) -> Image.Image:
    """A page of varied scenes, each with what it shows written underneath."""
    cell, gap, text_height = 300, 16, 84
    font = ImageFont.load_default(15)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + text_height + gap) + gap), (252, 252, 250))
    pen = ImageDraw.Draw(sheet)
    for place, scene in enumerate(_varied(scenes, columns * rows)):
        row, column = divmod(place, columns)
        x, y = gap + column * (cell + gap), gap + row * (cell + text_height + gap)
        picture = draw(scene, sprites)
        scale = cell / max(picture.size)
        picture = picture.resize(tuple(round(side * scale) for side in picture.size), Image.Resampling.LANCZOS)
        sheet.paste(picture, (x + (cell - picture.width) // 2, y + cell - picture.height))
        caption = short_caption(scene, colours=True)
        lines = _wrapped(caption[0].upper() + caption[1:] + ".", font, cell)[:4]
        pen.multiline_text((x, y + cell + 8), "\n".join(lines), (40, 40, 40), font, spacing=4)
    return sheet


def _varied(scenes: Sequence[Scene], number: int) -> list[Scene]:
    """Some of everything: a poster, a painting, places and plain colours, then whatever comes first."""
    wishes = [
        lambda s: s.style == PLAIN_STYLE and s.background.is_place and s.signs,
        lambda s: s.style == POSTER,
        lambda s: s.style == PAINTING,
        lambda s: s.style == PLAIN_STYLE and not s.background.is_place and not s.signs,
    ]
    chosen: dict[int, Scene] = {}
    seen: set[str] = set()
    for k in range(number):
        fits = [s for s in scenes if s.id not in chosen and wishes[k % len(wishes)](s)]
        new = [s for s in fits if s.background.name not in seen]
        for scene in (new or fits or [s for s in scenes if s.id not in chosen])[:1]:
            chosen[scene.id] = scene
            seen.add(scene.background.name)
    return list(chosen.values())


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
