"""A small corpus with one of each illness, counted by hand."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mvlm.data.dataset import LlavaDataset
from mvlm.data.doctor import check_useful, examine, read_exclusions
from mvlm.data.image import Pictures
from mvlm.data.prompt import template
from mvlm.data.tokenizer import load_tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
TOKENIZER = load_tokenizer(REFERENCE / "tokenizer")
PICTURES = Pictures(14, "pad", (0, 0, 0), (1, 1, 1))


def record(name, answer="A boat.", image="a.png", question="What is it?"):
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


@pytest.fixture
def corpus(tmp_path):
    """Two sources: `ill` has one of each, `well` has nothing but one blanked record in 2,000."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 12), "red").save(tmp_path / "pictures/a.png")
    (tmp_path / "pictures/bad.png").write_bytes(b"nothing")
    text = record("t")["conversations"]
    later = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a boat " * 40}]
    ill = [
        record("good"),
        record("missing", image="none.png"),
        record("corrupt", image="bad.png"),
        record("blank", answer=""),
        record("long", answer="a boat " * 40),
        {"id": "text", "conversations": text},
        {"id": "odd", "conversations": []},
        {"id": "unseen", "image": "a.png", "conversations": [*later, *text]},
        {"id": "untagged", "image": "a.png", "conversations": later[:1] + text[1:]},
    ]
    well = [{"id": str(k), "conversations": text} for k in range(1999)] + [record("blank", answer="")]
    for name, records in (("ill", ill), ("well", well)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))

    def read(name, **options):
        options = {"image_tokens": 4, "max_length": 170, "on_bad_sample": "skip"} | options
        folder = tmp_path / "pictures"
        return LlavaDataset(tmp_path / f"{name}.json", folder, template("v1"), TOKENIZER, PICTURES, **options)

    return read


def test_examination(corpus, tmp_path):
    report = examine({"finetune": [corpus("ill"), corpus("well")]})
    ill, well = report.sources
    assert (ill.samples, ill.text_only, ill.pictures) == (7, 1, 2)
    assert (ill.missing, ill.malformed, ill.corrupt, ill.blanked, ill.truncated, ill.unseen) == (1, 1, 1, 1, 2, 2)
    kinds = {(f.record, f.id): f.kind for f in ill.findings}
    assert kinds == {
        (1, "missing"): "missing",
        (6, "odd"): "format",
        (2, "corrupt"): "corrupt",
        (3, "blank"): "blanked",
        (7, "unseen"): "unseen",
        (8, "untagged"): "unseen",
    }
    reasons = [f.reason for f in ill.findings if f.kind == "unseen"]
    assert reasons == ["<image> stands beyond max_length 170", "no turn has an <image>"]
    dataset = corpus("ill")
    encoded = [dataset.encode(dataset.record(k)) for k in range(len(dataset))]
    lengths = sorted(len(e.input_ids) for e in encoded)
    assert (ill.tokens["min"], ill.tokens["max"]) == (lengths[0], lengths[-1])
    assert lengths[-1] == 170 + 3  # the cut comes first, then the picture's other three ids
    assert ill.tokens["median"] == lengths[3]
    assert ill.label_tokens == sum(label >= 0 for e in encoded for label in e.labels)
    assert sum(ill.histogram.values()) == 7 and sum(well.histogram.values()) == 2000
    assert all(int(k) & (int(k) - 1) == 0 for k in ill.histogram)
    with pytest.raises(
        ValueError, match=r"limit of 0.10% teach nothing.* finetune, ill: 1 of 7 \(14.29%; records 3, ...\)"
    ):
        check_useful(report)
    ill.blanked = 0
    with pytest.raises(
        ValueError, match=r"have a picture that is not shown.* ill: 2 of 7 \(28.57%; records 7, 8, ...\)"
    ):
        check_useful(report)
    report.sources = [well]
    check_useful(report)  # one in 2,000 is below one in 1,000


def test_what_is_found_is_what_would_stop_a_training(corpus, tmp_path):
    """A strip that opens and cannot be fitted, too: by each way that a stage fits its pictures."""
    Image.new("1", (1, 40_000)).save(tmp_path / "pictures/bad.png")
    padded, letterbox = corpus("ill"), corpus("ill")
    letterbox.pictures = Pictures(14, "letterbox", (0, 0, 0), (1, 1, 1))
    reports = examine({"pretrain": [padded], "finetune": [letterbox]}).sources
    assert [(r.corrupt, padded[k].skipped is not None) for k, r in enumerate(reports)] == [(1, False), (0, True)]
    (finding,) = (f for f in reports[0].findings if f.kind == "corrupt")
    assert finding.reason == f"{tmp_path}/pictures/bad.png: 1 x 40000 pixels are too narrow for mode pad"


def test_table_and_files(corpus, tmp_path):
    report = examine({"finetune": [corpus("ill")]})
    console = Console(file=io.StringIO(), width=80)
    console.print(*report.tables())
    shown = [line.split() for line in console.file.getvalue().splitlines()]
    there, wrong = (line for line in shown if line[:1] == ["ill"])
    assert there[:4] == ["ill", "7", "1", "2"] and there[-1] == "173" and shown.count(["finetune"]) == 2
    assert wrong == ["ill", "1", "1", "1", "1", "2", "2"]
    assert ["source", "missing", "malformed", "corrupt", "blanked", "truncated", "unseen"] in shown
    report.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out/doctor.json").read_text())
    assert saved["sources"][0]["corrupt"] == 1
    exclude = partial(read_exclusions, tmp_path / "out/exclude.json", "finetune", "ill")
    assert exclude(report.sources[0].sha256) == [1, 2, 3, 6, 7, 8]
    healed = corpus("ill", on_bad_sample="stop", exclude=exclude)
    assert [s.id for s in healed] == ["good", "long", "text"] and healed.excluded == [1, 2, 3, 6, 7, 8]
    again = examine({"finetune": [healed]})
    check_useful(again)
    assert again.exclusions() == report.exclusions(), "what is left out stays on the list"


def test_what_one_stage_cannot_use_another_may(corpus, tmp_path):
    """Here the picture that only one of them can fit."""
    Image.new("1", (1, 40_000)).save(tmp_path / "pictures/bad.png")
    padded, letterbox = corpus("ill"), corpus("ill")
    letterbox.pictures = Pictures(14, "letterbox", (0, 0, 0), (1, 1, 1))
    listed = examine({"pretrain": [letterbox], "finetune": [padded]}).exclusions()
    records = {stage: sources["ill"]["records"] for stage, sources in listed.items()}
    assert records == {"pretrain": [1, 3, 6, 7, 8], "finetune": [1, 2, 3, 6, 7, 8]}


def test_a_source_of_which_nothing_is_good_is_told_beside_the_others(corpus, tmp_path):
    """Its pictures are not there yet, say."""
    (tmp_path / "gone.json").write_text(json.dumps([record(str(k), image=f"{k}.png") for k in range(3)]))
    gone, ill = examine({"finetune": [corpus("gone"), corpus("ill")]}).sources
    assert (gone.samples, gone.missing, gone.tokens, gone.histogram) == (0, 3, {}, {}) and ill.samples == 7


@pytest.mark.parametrize(
    "source, content, told",
    [
        ("other", None, "knows finetune/ill, and not finetune/other: examine the corpus"),
        ("ill", None, r"ill\.json has changed since"),
        ("ill", "{", "is no list of the doctor's .*column 2"),
        ("ill", "[]", "is no list of the doctor's"),
    ],
)
def test_a_list_that_is_not_of_these_records_is_refused(corpus, tmp_path, source, content, told):
    examine({"finetune": [corpus("ill")]}).save(tmp_path)
    (tmp_path / "ill.json").write_text((tmp_path / "well.json").read_text())
    if content:
        (tmp_path / "exclude.json").write_text(content)
    with pytest.raises(ValueError, match=told):
        corpus("ill", exclude=partial(read_exclusions, tmp_path / "exclude.json", "finetune", source))
    with pytest.raises(ValueError, match=r"is no list of the doctor's .*No such file"):
        corpus("ill", exclude=partial(read_exclusions, tmp_path / "none.json", "finetune", source))
