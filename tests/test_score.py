"""What a scored run shows: its wrong answers, counted and capped; questions told apart by a hash; truths in a person's words."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from mvlm import build, score
from mvlm.benchmark.base import Question
from mvlm.page import Shown, gallery, picture_of, spread, thumbnail

IMAGES = Path(__file__).parent / "reference" / "images"


@pytest.mark.parametrize(
    "truth, told",
    [
        ("yes", "yes"),
        (("B", {"A": "a cat", "B": "a dog"}), "B. a dog"),
        ((1, 3), "B"),
        (["red"] * 3 + ["blue"] + ["red"] * 6, "red, blue"),
        ({"x": 1}, '{"x": 1}'),
    ],
)
def test_truths_in_words(truth, told: str) -> None:
    assert score.told(truth) == told


def test_a_hash_tells_other_questions() -> None:
    a = Question("1", "What?", IMAGES / "img0.png", "cat")
    b = Question("2", "What?", IMAGES / "img1.png", "cat")
    same = score.fingerprint([a, b, replace(a, id="3")])
    assert same["pictures"] == {"1": 0, "2": 1, "3": 0}
    assert same == score.fingerprint(
        [replace(a, image=IMAGES / "../images/img0.png"), b, replace(a, id="3", image=IMAGES / "../images/img0.png")]
    )
    others = [replace(a, text="Who?"), replace(a, truth="dog"), replace(a, id="4"), replace(a, image=b.image)]
    hashes = {score.fingerprint([other, b])["sha256"] for other in [a, *others]}
    assert len(hashes) == 5


def test_evenly_spread() -> None:
    assert spread(range(10), 20) == list(range(10))
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert [len(set(spread(range(n), 7))) for n in (7, 8, 100)] == [7, 7, 7]


def test_pictures_are_small_and_embedded_once() -> None:
    assert max(picture_of(IMAGES / "img0.png").size) <= 256
    files = [IMAGES / "img0.png", (IMAGES / "img0.png").read_bytes(), IMAGES / "img1.png", None]
    shown = [Shown("X", f"What {k}?", "a <b>", {"": ("no", 0.0)}, image) for k, image in enumerate(files * 2)]
    page = gallery(shown)
    assert page.count("<img") == 2 and page.count("<li") == 8 and page.count('class="card"') == 3
    assert "a &lt;b&gt;" in page and "<form" not in page


def test_wrong_answers_are_counted_capped_and_filtered(scored, monkeypatch) -> None:
    monkeypatch.setattr(score, "PAGE_QUESTIONS", 12)  # two a benchmark
    run = scored("a", lambda q, view: view == "blind", ("blind", "shuffled"))
    page = (run.folder / "wrong.html").read_text()
    results = json.loads((run.folder / "results.json").read_text())
    marked = sum(len(views["none"]["per_question"]) for views in results["benchmarks"].values())
    assert page.count("<li") == 12
    cells = "".join(f"<td>{cell}</td>" for cell in ("all", marked, marked, 12, marked, 0, 0))
    assert cells in page, "all are wrong, all are right without the picture"
    assert page.count("<select>") == 3 and "<option>right with no picture</option>" in page
    assert "http" not in page and "wrong.html" in (run.folder / "index.html").read_text()


def test_a_run_without_a_wrong_answer_has_a_page_that_says_so(scored) -> None:
    run = scored("a", lambda q, view: True)
    page = (run.folder / "wrong.html").read_text()
    assert "There is none." in page and "<form" not in page


def test_results_say_what_produced_them(scored) -> None:
    results = json.loads((scored("a", lambda q, view: True).folder / "results.json").read_text())
    assert results["protocol"] == "paper" and results["versions"]["torch"] and "commit" in results
    assert set(results["questions"]) == set(results["benchmarks"])


def test_the_largest_page_stays_below_20_megabytes() -> None:
    """With 600 pictures of white noise, which no photograph of the size takes as many bytes as."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    assert score.PAGE_QUESTIONS * len(thumbnail(file.getvalue())) < 18e6  # the text takes the rest


def test_one_benchmark_scored_again_takes_none_from_the_others(scored, configure) -> None:
    """The other benchmarks and the other views are scored from their stored answers, as each was set; no model is asked."""
    run = scored("a", lambda q, view: view == "none", ("blind", "shuffled"))
    file = run.folder / "results.json"
    before = json.loads(file.read_text())
    cfg = run.config

    def again(words: list[str], controls: list[str]) -> dict:
        chosen = configure("run=x", *words, page="evaluate").benchmark
        files, words = build.corpus(cfg), build.tokenizer(cfg)
        return score.run(run, lambda: pytest.fail("a model is asked"), files, words, chosen, controls, again=False)

    for words, controls in ((["benchmark=[gqa]"], []), (["benchmark=[pope,gqa]"], ["blind"])):
        again(words, controls)
        after = json.loads(file.read_text())
        assert after["avg"] == before["avg"] and after["questions"] == before["questions"]
        assert {n: {*views} for n, views in after["benchmarks"].items()} == {
            n: {"none", "blind", "shuffled"} for n in before["benchmarks"]
        }
        assert set(after["settings"]) == set(before["benchmarks"])
    assert "MMB-dev" in (run.folder / "index.html").read_text()
    file.write_text("[torn")
    assert set(again(["benchmark=[gqa]"], [])["benchmarks"]) == {"gqa"}, "they are replaced, with a message"
    file.write_text(json.dumps(before))
    (run.folder / "answers" / "mme.jsonl").unlink()
    left = again(["benchmark=[gqa]"], [])
    assert set(left["benchmarks"]) == set(before["benchmarks"]) - {"mme"} and left["avg"]["none"] is None


def test_how_answers_were_asked_for_otherwise_is_told(scored, configure) -> None:
    run = scored("a", lambda q, view: True)
    results = json.loads((run.folder / "results.json").read_text())
    assert score.unusual(results) == []
    results["settings"] = OmegaConf.to_container(
        configure("run=x", "benchmark.sqa.order=QCM", page="evaluate").benchmark
    )
    results["benchmarks"]["gqa"]["none"] |= {"cut": 4, "short": 3, "cut_at": 2, "limit": 128}
    told = ["sqa.order=QCM", "3 answers cut off at 2 tokens, below the protocol's limit"]
    assert score.unusual(results) == told and all(way in score.about(run, results) for way in told)
    assert "MME-P / 20" in score.rows(results)


@pytest.mark.parametrize(
    "words, folder, generated",
    [
        (["model=pocket"], None, True),
        (["model=nano"], None, True),
        (["model=pocket"], "/data/benchmark_data", False),
        (["model=pocket", "corpus=full"], None, False),
        (["model=1.7b", "corpus.root=/home/me/pocket/data"], None, False),
    ],
)
def test_the_real_files_are_never_taken_for_generated_ones(
    configure, words: list[str], folder, generated: bool
) -> None:
    """Whatever their folder is called: of the real files the counts must be the published ones."""
    assert score.is_generated(configure(*words), folder) is generated
