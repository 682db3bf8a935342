"""MMBench's file, prompt and score; the golden predictions were scored by VLMEvalKit's exact matching."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import pytest

from mvlm.benchmark.mmbench import REFUSED, ROTATION, MMBench, circles, extracted

REFERENCE = Path(__file__).parents[1] / "reference"
GOLDEN = json.loads((REFERENCE / "metrics" / "mmbench.json").read_text())
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
FILE = "mmbench_dev_20230712.tsv"


def offered(row: dict) -> dict[str, str]:
    return {letter: row[letter] for letter in "ABCD" if row[letter] is not None}


def write(folder: Path, rows: list[dict]) -> MMBench:
    with (folder / FILE).open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, delimiter="\t", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return MMBench(folder)


@pytest.fixture
def benchmark(tmp_path) -> MMBench:
    """Rotations name their first row instead of repeating its picture, as some copies of the file do."""
    rows = []
    for row in GOLDEN["rows"]:
        first = row["index"] % ROTATION
        picture = base64.b64encode(f"picture {first}".encode()).decode()
        rows.append(row | {"hint": "", "image": picture if row["index"] == first else first})
    return write(tmp_path, rows)


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: str(row["index"]))
def test_every_golden_answer_is_matched_and_judged_alike(row):
    letter = extracted(row["prediction"], offered(row))
    assert letter == row["extracted"]
    assert (letter == row["answer"]) == row["single_correct"]


def test_the_golden_circles():
    marks = {str(row["index"]): float(row["single_correct"]) for row in GOLDEN["rows"]}
    assert circles(marks) == {str(group["group"]): group["hit"] for group in GOLDEN["groups"]}


def test_the_golden_accuracies(benchmark):
    score = benchmark.score({str(row["index"]): row["prediction"] for row in GOLDEN["rows"]})
    assert score.value == pytest.approx(100 * GOLDEN["circular_accuracy"], abs=1e-9)
    assert score.detail["single"] == pytest.approx(100 * GOLDEN["single_accuracy_all_rows"], abs=1e-9)
    assert (score.items, score.detail["count of rows"]) == (GOLDEN["groups_count"], len(GOLDEN["rows"]))
    assert score.detail["count refused"] == sum(row["extracted"] == REFUSED for row in GOLDEN["rows"])
    assert score.detail["count without a letter"] == sum(row["extracted"] is None for row in GOLDEN["rows"])


def test_every_row_is_asked_once_as_in_the_golden_run(tmp_path):
    (tmp_path / FILE).write_bytes((REFERENCE / "eval_runs" / "mmbench.tsv").read_bytes())
    lines = [
        run["answer_line"]
        for run in json.loads((REFERENCE / "eval_runs" / "expected.json").read_text())["ldpnetv2"]["mmbench"]
    ]
    questions = MMBench(tmp_path).questions()
    assert [q.id for q in questions] == [str(line["question_id"]) for line in lines]
    suffix = "\nAnswer with the option's letter from the given choices directly."
    assert [q.text for q in questions] == [line["prompt"] + suffix for line in lines]
    assert [list(q.truth[1].values()) for q in questions] == [line["options"] for line in lines]
    assert all(q.image.startswith(b"\x89PNG") for q in questions)


def test_rotations_share_one_picture_object(benchmark):
    questions = {q.id: q for q in benchmark.questions()}
    assert questions["3"].image is questions["3000003"].image
    assert questions["3"].image == b"picture 3"


def test_bad_input(benchmark, tmp_path):
    with pytest.raises(ValueError, match=rf"{FILE} is missing.*MMBench"):
        MMBench(tmp_path / "nowhere").questions()
    good = dict(
        zip(
            COLUMNS,
            ["5", "Which?", "", "a", "b", "", "", "B", "c", base64.b64encode(b"a picture").decode()],
            strict=True,
        )
    )
    for changed, message in (
        ({"answer": "C"}, "answer 'C' is not among the options"),
        ({"A": "nan"}, "not among the options"),
        ({"image": "%%"}, "not base64"),
        ({"image": "1234"}, "neither a picture nor the index"),
        ({"index": "five"}, "invalid literal"),
    ):
        with pytest.raises(ValueError, match=rf"laid out otherwise .row 2.*{message}"):
            write(tmp_path, [good, good | {"index": "6"} | changed]).questions()
    (tmp_path / FILE).write_text("question\tanswer\nWhich?\tB\n")
    with pytest.raises(ValueError, match=r"laid out otherwise.*index"):
        MMBench(tmp_path).questions()
    (tmp_path / FILE).write_text("")
    with pytest.raises(ValueError, match="no question was found"):
        MMBench(tmp_path).questions()


def test_empty_and_very_long_answers(benchmark):
    keys = [str(row["index"]) for row in GOLDEN["rows"]]
    assert benchmark.score(dict.fromkeys(keys, "")).value == 0
    assert benchmark.score(dict.fromkeys(keys, "dog " * 50_000)).detail["count without a letter"] == len(keys)
