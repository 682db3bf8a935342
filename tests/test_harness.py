"""lmms-eval drives a model of ours: its own POPE on local files, its score and its answers computed a second way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; it is the extra `harness`")

import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageColumn
from lmms_eval import tasks
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from PIL import Image

from mvlm import build
from mvlm.benchmark.answer import answers
from mvlm.benchmark.base import SHORT, Question
from mvlm.benchmark.pope import POPE
from mvlm.chat import Chat
from mvlm.data.collate import collate
from mvlm.data.dataset import Sample
from mvlm.harness import MVLM, _before
from mvlm.model.checkpoint import save_checkpoint
from mvlm.run import Run, write_json

REFERENCE = Path(__file__).parent / "reference"
PICTURES = sorted((REFERENCE / "images").glob("img*.png"))[:3]
SAYS = ("Yes", "No", "Yes, there is.")
"""What the model is taught to say. By the harness' rule the last is neither yes nor no."""


@pytest.fixture
def run(configure, tmp_path) -> Run:
    """A run folder of an untrained model whose weights are wide enough apart for its answers to differ."""
    wide = "+model.module.language.config.initializer_range=0.4"
    run = Run.open(configure("model=nano", wide, f"runs={tmp_path}", "cell=wide"))
    torch.manual_seed(0)
    return store(run, build.model(run.config))


@pytest.fixture
def taught(configure, tmp_path) -> Run:
    """A run folder of a model that learned a few POPE questions by heart: it says each of SAYS."""
    run = Run.open(configure("model=nano", f"runs={tmp_path}", "cell=taught"))
    torch.manual_seed(0)
    model, words, talk = build.model(run.config), build.tokenizer(run.config), build.talk(run.config)
    look = build.pictures(run.config, "finetune")
    first = {q.text: q for q in reversed(pope(run).questions())}
    samples = []
    for number, q in enumerate(first.values()):
        turns = [{"from": "human", "value": f"<image>\n{q.text}"}, {"from": "gpt", "value": SAYS[number % 3]}]
        ids = talk.encode(turns, words, image_tokens=model.image_tokens, max_length=2048, has_image=True)
        with torch.no_grad():
            samples.append(Sample(q.id, "", ids.input_ids, ids.labels, features=model.encode(look(q.image)[None])[0]))
    batch = collate(samples)
    optimizer = torch.optim.AdamW([*model.projector.parameters(), *model.language.parameters()], lr=3e-3)
    for _ in range(90):
        loss = model(batch)
        (loss.total / loss.tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return store(run, model)


def store(run: Run, model) -> Run:
    save_checkpoint(model, run.folder / "finetune")
    write_json(run.folder / "finetune" / "stage.json", {})
    return run


def pope(run: Run) -> POPE:
    return POPE(build.corpus(run.config).benchmarks / "pope")


def ours(folder: Path, questions: list[Question], **settings) -> list[str]:
    """Our own loop's answers, called on files and without the harness."""
    chat = Chat.open(folder)

    def encode(text: str, seen: bool) -> list[int]:
        return chat.talk.prompt(text, chat.words, image_tokens=chat.model.image_tokens, has_image=seen)

    loop = {"encode_prompt": encode, "decode": chat.words.decode, "pictures": chat.pictures}
    said = answers(chat.model, questions, stop_ids=chat.talk.stop_ids(chat.words), **loop, **settings)
    by_id = {question.id: text for question, text, _ in said}
    return [by_id[q.id] for q in questions]


def test_popes_score_and_answers(taught: Run, tmp_path: Path) -> None:
    """The harness' task with nothing changed but where its data are."""
    questions = pope(taught).questions()
    rows = [
        {"question_id": q.id, "question": q.text.removesuffix(SHORT), "answer": q.truth, "image": str(q.image)}
        for q in questions
    ]
    DatasetDict({"test": Dataset.from_list(rows).cast_column("image", ImageColumn())}).save_to_disk(tmp_path / "data")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pope_here.yaml").write_text(
        f"include: {Path(tasks.__file__).parent}/pope/pope.yaml\ntask: pope_here\n"
        f"dataset_path: {tmp_path}/data\ndataset_kwargs: {{load_from_disk: true}}\n"
    )
    results = simple_evaluate(
        model="mvlm",
        model_args=f"run={taught.folder},dtype=float32",
        tasks=["pope_here"],
        batch_size="5",
        device="cpu",
        task_manager=tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False, model_name="mvlm"),
    )
    said = ours(taught.folder, questions, max_new_tokens=128)
    assert set(SAYS) <= set(said), "the score says something only of answers that differ"
    assert [sample["filtered_resps"] for sample in results["samples"]["pope_here"]] == [[text] for text in said]
    # The harness' rule: the whole answer in small letters is `yes` or `no`, all questions are one pool, answers that are
    # neither count as wrong but not among the missed, and the ratio of yes is the truth's.
    pairs = [(text.strip().lower(), q.truth) for text, q in zip(said, questions, strict=True)]
    hit, false, missed = (pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
    precision, recall = hit / (hit + false), hit / (hit + missed)
    expected = {
        "accuracy": sum(one == other for one, other in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1_score": 2 * precision * recall / (precision + recall),
        "yes_ratio": sum(truth == "yes" for _, truth in pairs) / len(pairs),
    }
    assert 0 < expected["accuracy"] < 1 and 0 < expected["f1_score"] < 1
    found = results["results"]["pope_here"]
    assert {name: found[f"pope_{name},none"] for name in expected} == pytest.approx(expected)


def test_the_harness_finds_it_by_name() -> None:
    assert get_model("mvlm") is MVLM


def ask(model: MVLM, *documents: dict) -> list[str]:
    """Documents {text, shown, settings} as the harness hands them over."""
    model.task_dict = {"task": {"test": documents}}
    arguments = [
        (d["text"], d["settings"], lambda doc: doc["shown"], k, "task", "test") for k, d in enumerate(documents)
    ]
    facts = [{"task": "task", "doc_id": k, "repeats": 1} for k in range(len(documents))]
    return model.generate_until(
        [Instance("generate_until", args, 0, fact) for args, fact in zip(arguments, facts, strict=True)]
    )


def document(text: str = "What is it?", *shown, **settings) -> dict:
    return {"text": text, "shown": list(shown), "settings": {"max_new_tokens": 6, "until": ["\n\n"]} | settings}


@pytest.fixture
def released(tmp_path) -> Path:
    """A checkpoint in the released format, told where its small tower's config.json is."""
    folder = shutil.copytree(REFERENCE / "checkpoints" / "ldpnetv2", tmp_path / "released")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(REFERENCE / "vision_tower")}))
    return folder


@pytest.mark.parametrize("kind", ["run", "released"])
def test_every_request_gets_its_own_answer(run: Run, released: Path, kind: str) -> None:
    """With pictures and without, of several limits, mixed: as if each were asked alone, and each picture read once."""
    folder = run.folder if kind == "run" else released
    plan = [(k, [None, *PICTURES][k % 4], 3 if k % 3 else 9) for k in range(13)]
    questions = [Question(str(k), "Look there. " * (k % 5) + f"What is {k}?", image, None) for k, image, _ in plan]
    expected = [ours(folder, [q], batch_size=1, max_new_tokens=plan[int(q.id)][2])[0] for q in questions]
    assert len(set(expected)) > 6, "answers must differ to be told apart"
    model, read = MVLM(str(folder), batch_size=4, device="cpu", dtype="float32"), []
    model.model.vision.register_forward_pre_hook(lambda _, pixels: read.append(len(pixels[0])))
    requests = [
        document(q.text, *([Image.open(q.image)] if q.image else []), max_new_tokens=limit, until=[])
        for q, (_, _, limit) in zip(questions, plan, strict=True)
    ]
    assert ask(model, *requests) == expected
    assert sum(read) == len(PICTURES) * 2, "once for each of two limits"


def test_pictures_of_equal_indices_and_other_palettes_are_two(run: Run) -> None:
    """A palette picture is its indices and its palette; GIF and PNG files come as such."""
    one, other = (Image.new("P", (8, 8)) for _ in range(2))
    one.putpalette([250, 0, 0])
    other.putpalette([0, 0, 250])
    model, read = MVLM(str(run.folder), device="cpu", dtype="float32"), []
    model.model.vision.register_forward_pre_hook(lambda _, pixels: read.append(len(pixels[0])))
    ask(model, document("What?", one), document("What?", other), document("What?", one.copy()))
    assert sum(read) == 2


def test_stop_texts_end_an_answer(run: Run) -> None:
    model = MVLM(str(run.folder), device="cpu", dtype="float32")
    (whole,) = ask(model, document(max_new_tokens=30, until=[]))
    middle = whole[len(whole) // 2]
    assert ask(model, document(max_new_tokens=30, until=[middle, "", "not in it"])) == [whole.split(middle)[0].strip()]
    assert ask(model, document(max_new_tokens=30, until=middle)) == [whole.split(middle)[0].strip()]
    # What stands before the first of them counts before anything is stripped.
    assert _before("\n\nYes", ["\n\n"]) == "" and _before("a b c", ["c", "b"]) == "a " and _before("a", []) == "a"


def test_the_limit_is_the_tasks_own_or_the_models(run: Run) -> None:
    model = MVLM(str(run.folder), device="cpu", dtype="float32", max_new_tokens=4)
    longer, own = ask(model, document(max_new_tokens=9, until=[]), document(max_new_tokens=None, until=None))
    assert [own] == ask(model, document(max_new_tokens=4, until=[])) != [longer]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (document(temperature=0.2), r"document 1 asks for {'temperature': 0.2}.*--gen_kwargs"),
        (document(do_sample=True), "'do_sample': True"),
        (document(num_beams=5), "'num_beams': 5"),
        (document(repetition_penalty=1.2), "'repetition_penalty': 1.2"),
        (document(stop_sequences=["x"]), "'stop_sequences'"),
        (document("Both?", *[Image.new("RGB", (4, 4))] * 2), "shows 2 pictures, and mvlm takes one"),
        (document("Both?", "video.mp4"), "shows a str, and mvlm takes pictures only"),
        (document("<image> or <image>?", Image.new("RGB", (4, 4))), "one picture and 2 places"),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_first_answer(run: Run, bad: dict, message: str) -> None:
    model = MVLM(str(run.folder), device="cpu", dtype="float32")
    model.model = None  # so nothing can be run
    with pytest.raises(ValueError, match=message):
        ask(model, document(temperature=0.0, do_sample=False, num_beams=1, top_p=1.0), bad)


def test_other_kinds_of_request_are_refused(run: Run) -> None:
    model = MVLM(str(run.folder), device="cpu", dtype="float32")
    with pytest.raises(NotImplementedError, match="output_type generate_until"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": "auto"}, "not 'auto': try 16"),
        ({"batch_size": 0}, "not 0"),
        ({"dtype": "fp16"}, "not 'fp16'"),
        ({"run": "nowhere"}, "nowhere is neither a run folder"),
    ],
)
def test_wrong_settings(run: Run, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MVLM(**({"run": str(run.folder)} | settings))
