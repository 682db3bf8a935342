"""A small corpus, built twice, and every file of it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import shutil
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
from PIL import Image

from mvlm.pocket import corpus, shapes
from mvlm.pocket.benchmarks import FIRST_ID, MMB_COLUMNS, Gallery, write_all, write_mmbench
from mvlm.pocket.draw import Sprites
from mvlm.pocket.objects import KINDS
from mvlm.pocket.questions import LETTERS
from mvlm.pocket.scene import WORDS, Scene
from mvlm.pocket.sources import SOURCES

SMALL = {"counts": dict.fromkeys(SOURCES, 12), "scenes": 24, "eval_scale": 0.1, "progress": False}
MME = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")


@pytest.fixture(scope="module")
def svg(tmp_path_factory):
    return shapes.folder(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def small(tmp_path_factory, svg):
    return corpus.build(tmp_path_factory.mktemp("one"), svg, **SMALL)


@pytest.fixture(scope="module")
def full(tmp_path_factory, svg):
    """The benchmarks at their default size."""
    folder = tmp_path_factory.mktemp("full")
    return SimpleNamespace(folder=folder, scenes=write_all(folder, Sprites(svg), seed=0))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scenes(path):
    return [Scene.from_json(json.loads(line)) for line in path.read_text().splitlines()]


def test_two_builds_are_byte_equal(small, svg, tmp_path):
    again = corpus.build(tmp_path, svg, **SMALL)
    assert again != small and again.name == small.name
    assert contents(again) == contents(small)
    assert [path.name for path in again.parent.iterdir()] == [again.name]  # nothing is left beside it


def test_a_complete_corpus_is_reused(small, svg):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    assert corpus.build(small.parents[1], svg, **SMALL) == small
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


def test_every_argument_gets_its_own_folder(small, svg):
    """Only names are compared: writing is replaced by nothing."""
    root = small.parents[1]
    names = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_write", lambda aside, *rest, **more: (aside / "manifest.json").write_text("{}"))
        for change in ({"seed": 1}, {"scenes": 25}, {"turns": 5}, {"eval_scale": 0.2}, {"counts": {"coco": 12}}):
            names.add(corpus.build(root, svg, **{**SMALL, **change}).name)
    assert len(names) == 5 and small.name not in names
    for name in names:
        shutil.rmtree(root / "corpus" / name)


def test_an_interrupted_build_leaves_nothing(svg, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "write_all", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        corpus.build(tmp_path, svg, **SMALL)
    assert list((tmp_path / "corpus").iterdir()) == []


def test_errors(svg, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no source coca"):
        corpus.build(tmp_path, svg, counts={"coca": 1}, scenes=5)
    with pytest.raises(ValueError, match="scenes=0"):
        corpus.build(tmp_path, svg, counts={"coco": 1}, scenes=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    with pytest.raises(ValueError, match=r"needs about 61 MB .* has 1 MB free"):
        corpus.build(tmp_path, svg, counts={"coco": 1}, scenes=12)


def test_manifest(small):
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["licence"] == "Pictures use OpenMoji, CC BY-SA 4.0" and manifest["generator"] == corpus.GENERATOR
    assert manifest["counts"] == SMALL["counts"] and manifest["seed"] == 0 and manifest["training_pictures"] == 24
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((small / name).read_bytes()).hexdigest() == digest
    assert {f"train/{source}.json" for source in SOURCES} < set(manifest["sha256"])


def test_records_have_their_pictures(small):
    used = set()
    for source in SOURCES:
        made = json.loads((small / "train" / f"{source}.json").read_text())
        assert len(made) == 12
        used |= {record["image"] for record in made if "image" in record}
    assert used <= {path.name for path in (small / "pictures").iterdir()}
    shown = scenes(small / "scenes.jsonl")
    assert {scene.picture for scene in shown} == {path.name for path in (small / "pictures").iterdir()}
    for scene in shown:
        assert Image.open(small / "pictures" / scene.picture).size == (scene.width, scene.height)


def test_training_and_evaluation_share_nothing(small, full):
    train, evaluation = scenes(small / "scenes.jsonl"), scenes(small / "benchmarks" / "scenes.jsonl")
    both = [*train, *evaluation]
    assert len({scene.content for scene in both}) == len({scene.id for scene in both}) == len(both)
    assert max(scene.id for scene in train) < FIRST_ID <= min(scene.id for scene in evaluation)
    held_out = {scene.content for scene in full.scenes}
    assert not held_out & {scene.content for scene in corpus.training_scenes(0, 500, held_out)}


def test_contact_sheet(small):
    sheet = Image.open(small / "contact_sheet.png")
    assert sheet.width > 1200 and sheet.height > 1000


def test_pictures_are_few(full):
    assert 90 <= len(full.scenes) <= 120


def even(answers, values):
    counts = Counter(answers)
    return set(counts) <= set(values) and max(counts.values()) - min(counts[v] for v in values) <= 1


def test_gqa(full):
    folder = full.folder / "gqa"
    questions = json.loads((folder / "testdev_balanced_questions.json").read_text())
    assert len(questions) == 96
    ids = {str(scene.id): scene for scene in full.scenes}
    for qid, question in questions.items():
        assert qid.isdigit() and question["isBalanced"] and question["imageId"] in ids
        assert set(question["types"]) == {"structural", "semantic", "detailed"}
        assert question["types"]["structural"] in ("verify", "query", "choose", "compare", "logical")
        assert question["types"]["semantic"] in ("obj", "attr", "rel", "cat", "global")
        assert question["question"].endswith("?") and question["answer"] and question["fullAnswer"].endswith(".")
        assert Image.open(folder / "images" / f"{question['imageId']}.jpg").format == "JPEG"
    yes_no = [q["answer"] for q in questions.values() if q["answer"] in ("yes", "no")]
    assert len(yes_no) > 20 and even(yes_no, ("yes", "no"))
    assert all((q["types"]["structural"] == "verify") == (q["answer"] in ("yes", "no")) for q in questions.values())


def test_sqa(full):
    folder = full.folder / "sqa"
    problems = json.loads((folder / "problems.json").read_text())
    splits = json.loads((folder / "pid_splits.json").read_text())
    assert splits["test"] == list(problems) and len(problems) == 66
    letters = defaultdict(list)
    for pid, problem in problems.items():
        assert problem["split"] == "test" and 2 <= len(problem["choices"]) <= 4 and problem["hint"] == ""
        assert 0 <= problem["answer"] < len(problem["choices"]) == len(set(problem["choices"]))
        assert {"question", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"} < set(
            problem
        )
        picture = folder / "images" / "test" / pid / "image.png"
        assert picture.exists() == (problem["image"] == "image.png") and problem["image"] in ("image.png", None)
        if problem["image"]:
            assert Image.open(picture).format == "PNG"
            letters[len(problem["choices"])].append(problem["answer"])
    assert sum(problem["image"] is None for problem in problems.values()) == 6
    assert all(even(answers, range(options)) for options, answers in letters.items())


def test_textvqa(full):
    folder = full.folder / "textvqa"
    data = json.loads((folder / "TextVQA_0.5.1_val.json").read_text())["data"]
    tokens = json.loads((folder / "TextVQA_Rosetta_OCR_v0.2_val.json").read_text())["data"]
    assert len(data) == 60 == len({question["question_id"] for question in data})
    ocr = {entry["image_id"]: entry["ocr_tokens"] for entry in tokens}
    assert len(ocr) == len(tokens) == 15
    by_id = {f"{scene.id:x}": scene for scene in full.scenes}
    for question in data:
        scene, found = by_id[question["image_id"]], ocr[question["image_id"]]
        assert len(question["answers"]) == 10 and set(question["answers"]) == {question["answers"][0]}
        assert 3 <= len(found) <= 4 and {sign.word for sign in scene.signs} < set(found)  # more words than are printed
        assert question["answers"][0] in found or question["answers"][0] not in WORDS
        assert (folder / "train_images" / f"{question['image_id']}.jpg").is_file()


def test_pope(full):
    folder = full.folder / "pope"
    positives = set()
    for split in ("random", "popular", "adversarial"):
        lines = [json.loads(line) for line in (folder / f"coco_pope_{split}.json").read_text().splitlines()]
        assert [line["question_id"] for line in lines] == list(range(1, 37))
        assert Counter(line["label"] for line in lines) == {"yes": 18, "no": 18}
        for line in lines:
            assert set(line) == {"question_id", "image", "text", "label"}
            assert (folder / "val2014" / line["image"]).is_file()
            scene = next(s for s in full.scenes if line["image"] == f"COCO_val2014_{s.id:012d}.jpg")
            name = next(k for k in KINDS.values() if line["text"] == f"Is there {k.a} in the image?").name
            assert (name in scene.kinds) == (line["label"] == "yes")
        positives.add(tuple((line["image"], line["text"]) for line in lines if line["label"] == "yes"))
    assert len(positives) == 1  # the splits differ in what is absent only


def test_mme(full):
    folder = full.folder / "mme"
    assert sorted(path.name for path in folder.iterdir()) == sorted(MME)
    for category in MME:
        texts, pictures = sorted((folder / category).glob("*.txt")), sorted((folder / category).glob("*.jpg"))
        assert [p.stem for p in texts] == [p.stem for p in pictures] and len(texts) == 4
        for path in texts:
            rows = [line.split("\t") for line in path.read_text().splitlines()]
            assert [answer for _, answer in rows] == ["Yes", "No"]
            assert all(question.endswith("? Please answer yes or no.") for question, _ in rows)


@pytest.mark.parametrize("circular", [False, True])
def test_mmbench(full, svg, tmp_path, circular):
    folder = full.folder / "mmbench"
    if circular:
        folder = tmp_path
        write_mmbench(folder, Gallery(Sprites(svg), 0), circular=True)
    csv.field_size_limit(10**7)
    with (folder / "mmbench_dev_20230712.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert tuple(rows[0]) == MMB_COLUMNS
    first = [row for row in rows if int(row["index"]) < 10**6]
    assert len(first) == 60 == len({row["index"] for row in first})
    letters = defaultdict(list)
    answers = defaultdict(set)
    for row in rows:
        options = [row[letter] for letter in LETTERS if row[letter]]
        assert 2 <= len(options) == len(set(options)) and row["answer"] in LETTERS[: len(options)]
        assert row["category"] and row["l2-category"] and row["split"] == "dev" and row["question"].endswith("?")
        answers[int(row["index"]) % 10**6].add(row[row["answer"]])
        letters[len(options)].append(row["answer"])
        if row in first[:5]:
            assert Image.open(io.BytesIO(base64.b64decode(row["image"]))).format == "JPEG"
    assert all(len(values) == 1 for values in answers.values())
    assert all(even(found, LETTERS[:options]) for options, found in letters.items())
    if circular:
        assert len(rows) == sum(sum(bool(row[letter]) for letter in LETTERS) for row in first)
