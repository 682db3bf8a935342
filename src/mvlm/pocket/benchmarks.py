"""The six benchmarks over generated scenes, in the official files' own formats: one reader serves pocket and real data.

Each question stands alone, yes and no are 1 : 1, letters even; several questions share a picture, since encoding the
pictures is what an evaluation pays for. At scale 1: about 105 pictures and 476 questions.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from .draw import Sprites, draw
from .objects import KINDS, of_category
from .questions import (
    LETTERS,
    Pair,
    Slot,
    Turn,
    askable,
    existence_pairs,
    open_questions,
    pairs,
    pick,
    present,
    settle,
    with_options,
)
from .scene import PAINTING, PLAIN_STYLE, POSTER, Scene, sample_scene
from .sources import LECTURES, category_question, ocr_tokens

FIRST_ID = 10_000_000
"""Scenes of evaluation are numbered from here on, those of training from 0."""

JPEG_QUALITY = 90


def sized(default: int, scale: float) -> int:
    return max(1, round(default * scale))


class Gallery:
    """Hands out new evaluation scenes and their pictures; no two share their content."""

    def __init__(self, sprites: Sprites, seed: int) -> None:
        self.sprites, self.seed = sprites, seed
        self.scenes: list[Scene] = []
        self.contents: set[tuple] = set()

    def new(self, **wishes) -> Scene:
        """A scene with the given wishes (see `sample_scene`)."""
        scene = sample_scene(self.seed, FIRST_ID + len(self.scenes), avoid=self.contents, **wishes)
        self.contents.add(scene.content)
        self.scenes.append(scene)
        return scene

    def with_slots(self, choose: Callable[[Scene], list[Slot]], fewest: int = 1, **wishes) -> tuple[Scene, list[Slot]]:
        """A scene that can be asked at least `fewest` of the chosen questions, and these.

        Raises:
            ValueError: 500 scenes in a row cannot.
        """
        for _ in range(500):
            scene = self.new(**wishes)
            slots = choose(scene)
            if len(slots) >= fewest:
                return scene, slots
            self.scenes.pop()  # its content stays taken: the same number would give the same scene again
        raise ValueError(f"500 scenes with {wishes} could not be asked {fewest} of the wanted questions")

    def picture(self, scene: Scene) -> Image.Image:
        return draw(scene, self.sprites)

    def save(self, scene: Scene, path: Path) -> None:
        """JPEG or PNG, by the path's suffix; parents are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self.picture(scene).save(path, quality=JPEG_QUALITY)


def write_all(folder: Path, sprites: Sprites, *, seed: int = 0, scale: float = 1.0) -> list[Scene]:
    """Writes gqa/, sqa/, textvqa/, pope/, mme/ and mmbench/ below `folder`; returns the scenes used."""
    gallery = Gallery(sprites, seed)
    for write in (write_gqa, write_sqa, write_textvqa, write_pope, write_mme, write_mmbench):
        write(folder / write.__name__.removeprefix("write_"), gallery, scale=scale)
    return gallery.scenes


def _asked(
    gallery: Gallery, total: int, each: int, rng: random.Random, choose: Callable[[Scene], list[Slot]], **wishes
) -> list[tuple[Scene, Turn]]:
    """`total` settled questions, up to `each` about a scene."""
    chosen: list[tuple[Scene, Slot]] = []
    while len(chosen) < total:
        scene, slots = gallery.with_slots(choose, fewest=min(3, each), **wishes)
        chosen += [(scene, slot) for slot in pick(slots, min(each, total - len(chosen)), rng)]
    turns = settle([[slot] for _, slot in chosen], rng)
    return [(scene, turn) for (scene, _), (turn,) in zip(chosen, turns, strict=True)]


def _dump(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# -- GQA

_SEMANTIC = {
    "object": "obj", "existence": "obj", "character": "cat", "landmark": "cat", "color": "attr", "attribute": "attr",
    "size": "attr", "count": "attr", "word": "attr", "sign color": "attr", "position": "rel", "relation": "rel",
}  # fmt: skip
"""GQA's semantic type a skill; what asks about the whole picture is "global"."""


def write_gqa(folder: Path, gallery: Gallery, *, scale: float = 1.0) -> None:
    """testdev_balanced_questions.json and images/ID.jpg; 96 questions, 6 a picture."""
    rng = random.Random(f"gqa/{gallery.seed}")

    def choose(scene: Scene) -> list[Slot]:
        return [*open_questions(scene, rng), *pairs(scene, rng)]

    questions = {}
    for number, (scene, turn) in enumerate(_asked(gallery, sized(96, scale), 6, rng, choose)):
        qid, skill = f"2{number:07d}", turn.question.skill
        structural = "verify" if skill.endswith("?") or turn.answer in ("yes", "no") else "query"
        structural = {"size": "compare", "style": "choose"}.get(skill, structural)
        questions[qid] = {
            "question": turn.question.text,
            "answer": turn.answer,
            "fullAnswer": turn.question.sentence,
            "imageId": str(scene.id),
            "isBalanced": True,
            "groups": {"global": None, "local": None},
            "entailed": [],
            "equivalent": [qid],
            "types": {
                "structural": structural,
                "semantic": _SEMANTIC.get(skill.removesuffix("?"), "global"),
                "detailed": skill.removesuffix("?"),
            },
            "semantic": [],
            "semanticStr": "",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        }
        gallery.save(scene, folder / "images" / f"{scene.id}.jpg")
    _dump(folder / "testdev_balanced_questions.json", questions)


# -- ScienceQA

_TEXT_ONLY = 6


def write_sqa(folder: Path, gallery: Gallery, *, scale: float = 1.0) -> None:
    """problems.json, pid_splits.json, images/test/PID/image.png; 60 problems on pictures, 5 a scene, and 6 without."""
    rng = random.Random(f"sqa/{gallery.seed}")
    asked: list[tuple[Scene | None, Turn]] = list(_asked(gallery, sized(60, scale), 5, rng, _lettered(rng)))
    texts = [[with_options(category_question(rng), rng, 4)] for _ in range(sized(_TEXT_ONLY, scale))]
    asked += [(None, turn) for (turn,) in settle(texts, rng)]
    problems = {}
    for number, (scene, turn) in enumerate(asked, 1):
        pid, question = str(number), turn.question
        lecture = LECTURES.get(question.skill, "Words can be sorted by what they name.")
        problems[pid] = {
            "question": question.text,
            "choices": list(turn.options),
            "answer": LETTERS.index(turn.answer),
            "hint": "",
            "image": "image.png" if scene else None,
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "pictures" if scene else "words",
            "category": question.skill,
            "skill": f"Answer questions about the {question.skill}",
            "lecture": lecture,
            "solution": question.sentence,
            "split": "test",
        }
        if scene:
            gallery.save(scene, folder / "images" / "test" / pid / "image.png")
    _dump(folder / "problems.json", problems)
    splits = {name: [] for name in ("train", "val", "minitrain", "minival", "minitest", "trainval")}
    _dump(folder / "pid_splits.json", {**splits, "test": list(problems)})


def _lettered(rng: random.Random) -> Callable[[Scene], list[Slot]]:
    def choose(scene: Scene) -> list[Slot]:
        asked = [*open_questions(scene, rng), present(scene, rng)]
        return [with_options(question, rng) for question in asked if question.wrong]

    return choose


# -- TextVQA


def write_textvqa(folder: Path, gallery: Gallery, *, scale: float = 1.0) -> None:
    """The validation file, its OCR tokens and train_images/ID.jpg (the official archive's place); 60 questions.

    Two signs a picture and two questions about each: its word, and the colour of the sign with that word. The tokens
    hold both words and others, so they do not tell which is on the red sign.
    """
    rng = random.Random(f"textvqa/{gallery.seed}")
    total, data, tokens = sized(60, scale), [], []
    while len(data) < total:
        scene = gallery.new(style=PLAIN_STYLE, signs=2)
        image_id = f"{scene.id:x}"
        asked = [q for q in open_questions(scene, rng) if q.skill in ("word", "sign color")]
        for question in asked[: total - len(data)]:
            data.append(
                {
                    "question": question.text,
                    "question_id": 34602 + len(data),
                    "question_tokens": question.text.lower().rstrip("?").split(),
                    "image_id": image_id,
                    "image_classes": list(scene.kinds),
                    "image_width": scene.width,
                    "image_height": scene.height,
                    "answers": [question.answer] * 10,
                    "set_name": "val",
                }
            )
        tokens.append({"image_id": image_id, "ocr_tokens": ocr_tokens(scene, rng)})
        gallery.save(scene, folder / "train_images" / f"{image_id}.jpg")
    head = {"dataset_type": "val", "dataset_name": "textvqa"}
    _dump(folder / "TextVQA_0.5.1_val.json", {**head, "dataset_version": "0.5.1", "data": data})
    _dump(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {**head, "dataset_version": "0.2", "data": tokens})


# -- POPE


def write_pope(folder: Path, gallery: Gallery, *, scale: float = 1.0) -> None:
    """Three splits of 36 questions over 9 pictures (val2014/); two objects shown and two that are not, each."""
    rng = random.Random(f"pope/{gallery.seed}")

    def choose(scene: Scene) -> list[Slot]:
        return existence_pairs(scene, rng)

    scenes = [gallery.with_slots(choose, 2, style=PLAIN_STYLE)[0] for _ in range(sized(9, scale))]
    seen = Counter(kind for scene in scenes for kind in scene.kinds)
    popular = sorted((k.name for k in KINDS.values() if askable(k)), key=lambda name: (-seen[name], name))
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("random", "popular", "adversarial"):
        lines = []
        for scene in scenes:
            found = existence_pairs(scene, random.Random(scene.id), negatives=split, popular=popular)[:2]
            for question in (q for pair in found for q in (pair.yes, pair.no)):
                text = question.text.replace("in this image", "in the image")
                image = f"COCO_val2014_{scene.id:012d}.jpg"
                line = {"question_id": len(lines) + 1, "image": image, "text": text, "label": question.answer}
                lines.append(json.dumps(line) + "\n")
                gallery.save(scene, folder / "val2014" / image)
        (folder / f"coco_pope_{split}.json").write_text("".join(lines), encoding="utf-8")


# -- MME

_MME = {
    "existence": ({"style": PLAIN_STYLE}, ("existence",)),
    "count": ({"style": PLAIN_STYLE}, ("count?",)),
    "position": ({"style": PLAIN_STYLE}, ("relation", "position?")),
    "color": ({"style": PLAIN_STYLE}, ("color?",)),
    "posters": ({"style": POSTER}, ("word?",)),
    "celebrity": ({"style": PLAIN_STYLE, "first": of_category("character"), "group": 1}, ("character?",)),
    "scene": ({"style": PLAIN_STYLE, "place": True}, ("place?",)),
    "landmark": ({"style": PLAIN_STYLE, "first": of_category("landmark"), "group": 1}, ("landmark?",)),
    "artwork": ({"style": PAINTING, "place": True}, ("place?",)),
    "OCR": ({"style": PLAIN_STYLE, "signs": 1}, ("word?",)),
}
"""MME's ten perception categories: what their scenes are like, and the skills asked. A celebrity is a wizard here."""


def write_mme(folder: Path, gallery: Gallery, *, scale: float = 1.0) -> None:
    """CATEGORY/IMAGE.jpg with IMAGE.txt beside it, one question answered Yes and one No a picture; 4 pictures each."""
    rng = random.Random(f"mme/{gallery.seed}")
    for category, (wishes, skills) in _MME.items():
        for number in range(1, sized(4, scale) + 1):
            scene, slots = gallery.with_slots(lambda s, skills=skills: pairs(s, rng, skills=skills), **wishes)
            pair = rng.choice([slot for slot in slots if isinstance(slot, Pair)])
            lines = [f"{q.text} Please answer yes or no.\t{q.answer.capitalize()}\n" for q in (pair.yes, pair.no)]
            gallery.save(scene, folder / category / f"{number:04d}.jpg")
            (folder / category / f"{number:04d}.txt").write_text("".join(lines), encoding="utf-8")


# -- MMBench

_MMB = {
    "background": ("image_scene", "coarse_perception"),
    "place": ("image_scene", "coarse_perception"),
    "style": ("image_style", "coarse_perception"),
    "object": ("object_localization", "finegrained_perception (instance-level)"),
    "position": ("object_localization", "finegrained_perception (instance-level)"),
    "count": ("object_localization", "finegrained_perception (instance-level)"),
    "color": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "sign color": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "presence": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "character": ("celebrity_recognition", "finegrained_perception (instance-level)"),
    "landmark": ("celebrity_recognition", "finegrained_perception (instance-level)"),
    "word": ("ocr", "finegrained_perception (instance-level)"),
    "size": ("attribute_comparison", "finegrained_perception (cross-instance)"),
}
"""MMBench's category and its parent, a skill each."""

MMB_COLUMNS = (
    "index", "question", "hint", *LETTERS, "answer", "category", "image", "source", "l2-category", "comment", "split",
)  # fmt: skip


def write_mmbench(folder: Path, gallery: Gallery, *, scale: float = 1.0, circular: bool = False) -> None:
    """mmbench_dev_20230712.tsv: 60 questions, 5 a picture (inline, base64 JPEG).

    `circular` adds each question with its options rotated, under index + k * 10^6, as the official file does.
    """
    rng = random.Random(f"mmbench/{gallery.seed}")
    rows = []
    for number, (scene, turn) in enumerate(_asked(gallery, sized(60, scale), 5, rng, _lettered(rng))):
        buffer = io.BytesIO()
        gallery.picture(scene).save(buffer, "JPEG", quality=JPEG_QUALITY)
        image = base64.b64encode(buffer.getvalue()).decode()
        category, parent = _MMB[turn.question.skill]
        for k in range(len(turn.options) if circular else 1):
            options = turn.options[k:] + turn.options[:k]
            answer = LETTERS[options.index(turn.question.answer)]
            filled = [*options, *[""] * (len(LETTERS) - len(options))]
            tail = [answer, category, image, "generated", parent, "", "dev"]
            rows.append([number + k * 10**6, turn.question.text, "", *filled, *tail])
    _write_tsv(folder / "mmbench_dev_20230712.tsv", rows)


def _write_tsv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(MMB_COLUMNS)
        writer.writerows(rows)
