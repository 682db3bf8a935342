"""MMBench's file, prompts and score; the golden predictions were scored by VLMEvalKit's exact matching, and by lmms-eval:
every `lmms_eval_prefetch`, `lmms_eval_static` and `lmms_eval_static_hit` is matched. What a judge says is in no golden
file: rows that would go to one are counted."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import pytest

from mvlm.benchmark.mmbench import (
    REFUSED,
    ROTATION,
    MMBench,
    circles,
    extracted,
    harness_extracted,
    harness_prompt,
    options,
    rotated,
)

REFERENCE = Path(__file__).parents[1] / "reference"
GOLDEN = json.loads((REFERENCE / "metrics" / "mmbench.json").read_text())
DIFFERENT = json.loads((REFERENCE / "metrics" / "differences.json").read_text())[
    "cases_scored_differently_by_lmms_eval"
]
PREDICTIONS = {str(row["index"]): row["prediction"] for row in GOLDEN["rows"]}
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
FILE = "mmbench_dev_20230712.tsv"


def offered(row: dict) -> dict[str, str]:
    return {letter: row[letter] for letter in "ABCD" if row[letter] is not None}


def write(folder: Path, rows: list[dict], name: str = FILE, **settings) -> MMBench:
    with (folder / name).open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, delimiter="\t", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return MMBench(folder, **settings)


def pictured(row: dict) -> dict:
    """Rotations name their first row instead of repeating its picture, as some copies of the file do."""
    first = row["index"] % ROTATION
    picture = base64.b64encode(f"picture {first}".encode()).decode()
    return row | {"hint": "", "image": picture if row["index"] == first else first}


@pytest.fixture
def benchmark(tmp_path) -> MMBench:
    return write(tmp_path, [pictured(row) for row in GOLDEN["rows"]])


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: str(row["index"]))
def test_every_golden_answer_is_matched_and_judged_alike(row):
    letter = extracted(row["prediction"], offered(row))
    assert letter == row["extracted"]
    assert (letter == row["answer"]) == row["single_correct"]


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: str(row["index"]))
def test_every_golden_answer_is_matched_as_by_the_harness(row):
    letter, sure = harness_extracted(row["prediction"], offered(row))
    assert letter == row["lmms_eval_static"]
    assert (letter if sure else None) == row["lmms_eval_prefetch"]


def test_the_golden_circles_of_the_harness(benchmark):
    score = MMBench(benchmark.folder, "harness").score(PREDICTIONS)
    assert score.value == pytest.approx(100 * GOLDEN["lmms_eval_static_circular_accuracy"], abs=1e-9)
    assert score.per_question == {str(group["group"]): group["lmms_eval_static_hit"] for group in GOLDEN["groups"]}
    assert score.detail["count for a judge"] == sum(row["lmms_eval_prefetch"] is None for row in GOLDEN["rows"])
    paper = benchmark.score(PREDICTIONS)
    different = [key for key, hit in paper.per_question.items() if hit != score.per_question[key]]
    assert len(different) == DIFFERENT["mmbench_groups"]
    rows = [row for row in GOLDEN["rows"] if row["extracted"] != row["lmms_eval_static"]]
    assert len(rows) == DIFFERENT["mmbench_rows"]


@pytest.mark.parametrize(
    ("answer", "letter", "sure"),
    [
        ("B", "B", True),
        ("(B).", "B", True),
        ("A cat", "A", True),  # three words at most: no article
        ("A dog it is", "B", True),  # an article; the option's text decides
        ("a cat", "A", True),
        ("It is :B) or (A)", "A", True),  # forms are tried in an order, not in the answer's
        ("E", "E", True),  # not offered, so wrong, and no case for a judge
        ("B or A", "B", False),  # two letters: the first place is trusted most
        ("It is B or A", "A", False),  # then the last
        ("The answer is A and B is not", "B", False),  # then what is announced, the later the better
        ("Bad Apple", "A", False),  # at worst a letter within a word
        ("neither", None, False),
    ],
)
def test_the_rules_of_the_harness_by_example(answer, letter, sure):
    """What lmms-eval's own code says of these answers, quirks included."""
    assert harness_extracted(answer, {"A": "cat", "B": "dog"}) == (letter, sure)


def test_the_golden_circles():
    marks = {str(row["index"]): float(row["single_correct"]) for row in GOLDEN["rows"]}
    assert circles(marks) == {str(group["group"]): group["hit"] for group in GOLDEN["groups"]}


def test_the_golden_accuracies(benchmark):
    score = benchmark.score(PREDICTIONS)
    assert score.value == pytest.approx(100 * GOLDEN["circular_accuracy"], abs=1e-9)
    assert score.detail["single"] == pytest.approx(100 * GOLDEN["single_accuracy_all_rows"], abs=1e-9)
    assert score.detail["vanilla"] == pytest.approx(100 * GOLDEN["single_accuracy_first_rotation"], abs=1e-9)
    assert score.detail["count of rotated rows"] == len(GOLDEN["rows"]) - GOLDEN["groups_count"]
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


def test_the_golden_rotations_are_made_of_their_first_rows():
    first = {row["index"]: row for row in GOLDEN["rows"] if row["index"] < ROTATION}
    for row in GOLDEN["rows"]:
        steps, index = divmod(row["index"], ROTATION)
        made = rotated(first[index], steps)
        for key in (*"ABCD", "answer", "question"):
            assert made[key] == row[key]
        assert made["index"] == str(row["index"])


@pytest.mark.parametrize("protocol", ["paper", "harness"])
def test_a_file_without_rotations_gets_them_if_asked_for(benchmark, tmp_path, protocol):
    whole = {q.id: q for q in MMBench(benchmark.folder, protocol).questions()}
    rows = [pictured(row) for row in GOLDEN["rows"] if row["index"] < ROTATION]
    (tmp_path / "first").mkdir()
    plain = write(tmp_path / "first", rows, protocol=protocol)
    asked = {q.id: q for q in MMBench(plain.folder, protocol, circular=True).questions()}
    assert asked == whole
    score = MMBench(plain.folder, protocol, circular=True).score(PREDICTIONS)
    assert score == MMBench(benchmark.folder, protocol).score(PREDICTIONS)
    # Without them the one pass is all there is, and the score says that nothing was rotated.
    single = plain.score(PREDICTIONS)
    assert single.value == single.detail["vanilla"] and single.detail["count of rotated rows"] == 0
    # A file that has rotations is left as it is.
    assert MMBench(benchmark.folder, protocol, circular=True).questions() == list(whole.values())


def test_the_references_file_is_read_before_the_older_one(benchmark):
    rows = [pictured(row) for row in GOLDEN["rows"][:4]]
    assert len(write(benchmark.folder, rows, "mmbench_dev_en_20231003.tsv").questions()) == 4


def test_the_prompt_of_the_harness():
    row = {"question": "Which?", "hint": "Look.", "A": "x", "B": "none", "C": "nan", "D": "", "answer": "A"}
    asked = (
        "Which? There are several options:\nA. x\nB. none\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert harness_prompt(row) == "Look. " + asked
    assert harness_prompt(row | {"hint": "nan"}) == asked
    assert (options(row), options(row, "harness")) == ({"A": "x"}, {"A": "x", "B": "none"})


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
    with pytest.raises(ValueError, match="question id '5' comes more than once"):
        write(tmp_path, [good, good]).questions()
    with pytest.raises(ValueError, match="1000006 rotates 6, which is not there"):
        write(tmp_path, [good, good | {"index": "1000006"}]).questions()
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text()[:-30])  # a download that broke off
    with pytest.raises(ValueError, match=r"laid out otherwise .row 2"):
        MMBench(tmp_path).questions()
    (tmp_path / FILE).write_text("question\tanswer\nWhich?\tB\n")
    with pytest.raises(ValueError, match=r"laid out otherwise.*index"):
        MMBench(tmp_path).questions()
    (tmp_path / FILE).write_text("")
    with pytest.raises(ValueError, match="no question was found"):
        MMBench(tmp_path).questions()


def test_empty_and_very_long_answers(benchmark):
    for protocol in ("paper", "harness"):
        asked = MMBench(benchmark.folder, protocol)
        for answer in ("", "   ", "?! " * 3_300):
            score = asked.score(dict.fromkeys(PREDICTIONS, answer))
            assert (score.value, score.detail["count without a letter"]) == (0, len(PREDICTIONS))
    # The paper's rule bounds an answer's length, the harness' does not: whoever is offered a teddy bear is given it.
    long = dict.fromkeys(PREDICTIONS, "teddy bear " * 900)
    assert benchmark.score(long).detail["count without a letter"] == len(PREDICTIONS)
    assert MMBench(benchmark.folder, "harness").score(long).detail["single"] > 0
    assert harness_extracted("AB " * 3_300, {"A": "x", "B": "y"}) == ("B", False)
