"""The whole journey at nano size, as a user types it: train, evaluate, ask; repeated at no cost; wrong input told in one line."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from shutil import copytree

import pytest
import torch
from omegaconf import open_dict
from PIL import Image

from mvlm import build, fit, score
from mvlm.model.checkpoint import load_vision
from mvlm.page import CONTROLS
from mvlm.run import Run

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "reference"


@pytest.fixture(scope="module")
def trained(shell) -> Run:
    done = shell("train.py", "model=nano")
    assert "Warning" not in done.stdout + done.stderr, "a user can do nothing about it"
    run = Run(shell.folder / "runs" / "nano-ldpv2-v2-unfreeze_llm-s0")
    run.said = done.stdout
    return run


def test_what_is_said_before_is_what_is_trained(trained: Run) -> None:
    """Steps and samples of the table that a run begins with, beside those of the stages that it then went through."""
    said = re.findall(r"^│ (\w*) +│ (\w+) +│ (\d+) +│.*│ (\d*) +│$", trained.said, re.M)
    steps = {stage: int(number) for stage, _, _, number in said if number}
    samples = [(source, int(count)) for _, source, count, _ in said if count]
    facts = {stage: trained.stage_facts(stage) for stage in build.STAGES}
    assert steps == {stage: told["steps"] for stage, told in facts.items()} == {"pretrain": 2, "finetune": 5}
    assert samples == [each for told in facts.values() for each in told["samples"].items()]
    assert "finetune: 6 more samples show the 3 pictures that are kept back" in trained.said


def test_a_run_folder_holds_the_whole_story(trained: Run) -> None:
    for name in (
        "config.yaml",
        "run.json",
        "results.json",
        "index.html",
        "pretrain/metrics.csv",
        "finetune/metrics.csv",
    ):
        assert (trained.folder / name).stat().st_size > 0, name
    facts = trained.facts
    assert facts["versions"]["torch"] == version("torch") and facts["seed"] == 0
    assert all(len(sha) == 64 for sha in facts["data_sha256"].values()) and len(facts["data_sha256"]) == 10
    for stage in ("pretrain", "finetune"):
        told = json.loads((trained.folder / stage / "stage.json").read_text())
        assert told["moved"] == {
            "vision.lower": False, "vision.upper": False, "vision.unused": False, "projector": True, "language": True,
        }  # fmt: skip
        assert len(told["history"]) == told["steps"]
        assert (trained.folder / stage / "model.safetensors").exists()
    assert list(trained.folder.glob("wandb/offline-run-*")), "W&B ran offline"


def test_w_and_b_holds_predictions_with_pictures(trained: Run) -> None:
    """Offline the table and its pictures wait in the run folder for `wandb sync`: nothing lies elsewhere."""
    staged = [path.read_bytes() for path in trained.folder.glob("wandb/artifacts/staging/*")]
    (table,) = map(json.loads, {content for content in staged if b'"mark, no picture"' in content})
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    results = json.loads((trained.folder / "results.json").read_text())
    for name, views in results["benchmarks"].items():
        some = {row["id"]: row for row in rows if row["benchmark"] == score.TITLES[name]}
        assert len(some) == min(score.LOGGED, len(views["none"]["per_question"]))
        for view, title in CONTROLS.items():
            got = {key: row[f"mark, {title}"] for key, row in some.items()}
            assert got == {key: views[view]["per_question"][key] for key in got}
    pictures = {row["picture"]["sha256"] for row in rows}
    assert pictures == {sha256(content).hexdigest() for content in staged if content.startswith(b"\x89PNG")}
    assert len(pictures) > 6


def test_scores_of_six_benchmarks_and_two_controls(trained: Run) -> None:
    results = json.loads((trained.folder / "results.json").read_text())
    assert set(results["benchmarks"]) == {"gqa", "sqa", "textvqa", "pope", "mme", "mmbench"}
    for views in results["benchmarks"].values():
        assert set(views) == {"none", "blind", "shuffled"}
    for view, average in results["avg"].items():
        assert average == pytest.approx(sum(v[view]["value"] for v in results["benchmarks"].values()) / 6)


def test_the_page_is_self_contained(trained: Run) -> None:
    for name in ("index.html", "wrong.html"):
        page = (trained.folder / name).read_text()
        assert page.count("data:image/jpeg;base64,") >= 6
        assert "http" not in page


def test_a_finished_command_is_not_done_again(shell, trained: Run) -> None:
    watched = [trained.folder / stage / "model.safetensors" for stage in ("pretrain", "finetune")]
    before = [path.stat().st_mtime_ns for path in watched]
    shell("train.py", "model=nano")
    assert before == [path.stat().st_mtime_ns for path in watched]


@pytest.mark.slow
def test_an_interrupted_cell_goes_on_with_its_second_stage(shell, trained: Run) -> None:
    """Same seed, same data, one thread: the second stage trained again from the saved first one gives the same weights, bit for bit."""
    from safetensors.torch import load_file

    stage = trained.folder / "finetune"
    before = load_file(stage / "model.safetensors")
    (stage / "stage.json").unlink()
    shell("train.py", "model=nano", "evaluate=false")
    after = load_file(stage / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_folder_of_another_configuration_is_refused(shell, trained: Run) -> None:
    told = shell("train.py", "model=nano", f"cell={trained.folder.name}", "recipe.clip=2.0", ok=False).stderr
    assert "recipe.clip: 1.0 there, 2.0 here" in told and "Traceback" not in told


@pytest.mark.slow
def test_evaluate_scores_again_without_a_model(shell, trained: Run) -> None:
    weights = trained.folder / "finetune" / "model.safetensors"
    gone = weights.rename(weights.with_suffix(".away"))
    try:
        done = shell("evaluate.py", f"run={trained.folder}", "benchmark=[pope]")
    finally:
        gone.rename(weights)
    assert "POPE" in done.stdout


@pytest.mark.slow  # a script of its own; CI runs it
def test_the_harness_protocol_stands_beside_the_papers(shell, trained: Run) -> None:
    paper = {
        name: (trained.folder / name).read_bytes() for name in ("results.json", "index.html", "answers/pope.jsonl")
    }
    done = shell("evaluate.py", f"run={trained.folder}", "benchmark=[pope]", "controls=[]", "protocol=harness")
    assert "protocol harness" in " ".join(done.stdout.split())
    results = json.loads((trained.folder / "results-harness.json").read_text())
    assert results["protocol"] == results["benchmarks"]["pope"]["none"]["protocol"] == "harness"
    assert results["generated"] and results["benchmarks"]["pope"]["none"]["official"] is None
    assert (trained.folder / "answers" / "harness" / "pope.jsonl").exists() and "protocol harness" in (
        trained.folder / "index-harness.html"
    ).read_text()
    assert {name: (trained.folder / name).read_bytes() for name in paper} == paper
    for page, other in (("index", "wrong"), ("wrong", "index")):
        assert f'href="{other}-harness.html"' in (trained.folder / f"{page}-harness.html").read_text()


@pytest.mark.slow
def test_evaluate_on_two_processes_leaves_the_answers_of_one(shell, trained: Run) -> None:
    """In float32 byte for byte; what was answered before is set aside, not lost."""
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    words = (f"run={trained.folder}", "precision=32-true", "again=true", "flips=true")
    folder, told = trained.folder / "answers", []
    for how in ((), launch):
        shell("evaluate.py", *words, launch=how)
        files = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
        told.append((files, json.loads((trained.folder / "results.json").read_text())))
    assert told[0] == told[1] and len(told[0][0]) == 24
    assert {entry["flipped"] for entry in told[0][1]["flips"].values()} == {0}
    assert len(list((folder / "before-2").iterdir())) == 24


@pytest.mark.slow  # a script of its own; CI runs it
def test_report_compares_two_runs(shell, trained: Run) -> None:
    """Here the run with itself, by its folder and by its file."""
    words = f"compare=[{trained.folder},{trained.folder / 'results.json'}]"
    done = shell("report.py", words, "out=compared")
    assert "McNemar" in done.stdout
    for name in ("report.json", "report.md", "index.html"):
        assert (shell.folder / "compared" / name).stat().st_size > 0


@pytest.mark.slow  # a script of its own; CI runs it
def test_chat_answers_about_a_picture(shell, trained: Run) -> None:
    picture = next((trained.folder.parents[1]).glob("**/*.jpg"), None) or ROOT / "tests/reference/images/img0.png"
    done = shell("chat.py", f"run={trained.folder}", f"image={picture}", "prompt=What is this?", "max_new_tokens=5")
    assert done.stdout.endswith("\n")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["freeze_llm", "sharegpt4v", "lora"])
def test_every_strategy_trains(shell, strategy: str) -> None:
    shell("train.py", "model=nano", f"strategy={strategy}", "evaluate=false", "logger=csv")
    told = json.loads((shell.folder / f"runs/nano-ldpv2-v2-{strategy}-s0/pretrain/stage.json").read_text())
    assert told["moved"]["vision.upper"] == (strategy == "sharegpt4v")
    assert told["moved"]["language"] == (strategy == "sharegpt4v")


TOY = {
    "model.module.vision": {"depth": 3, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2},
    "model.module.language.config": {
        "vocab_size": 384, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    },
    "recipe.pretrain": {"batch": 4, "micro_batch": 2},
    "recipe.finetune": {"batch": 4, "micro_batch": 2},
}  # fmt: skip
"""The sizes of the toy checkpoints in tests/reference."""


@pytest.mark.slow
def test_the_papers_cell_begins_with_the_hubs_parts_and_the_real_files(shell, configure, tmp_path: Path) -> None:
    """`model=1.7b` as it is but for its sizes: toys lie in the hub's cache under the real names, generated files in the places of the
    real ones. What is trained is then asked, without the hub's weights."""
    for name, toy in (("mtgv/MobileLLaMA-1.4B-Chat", "base_llm"), ("openai/clip-vit-large-patch14-336", "clip_full")):
        kept = tmp_path / "hub" / "hub" / f"models--{name.replace('/', '--')}"
        copytree(REFERENCE / toy, kept / "snapshots" / "toy")
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text("toy")
    made, real, data = build.corpus(configure("model=nano")), configure("model=1.7b").corpus, tmp_path / "data"
    copytree(made.benchmarks, data / "benchmark_data")
    for stage, names in (("pretrain", ["sharegpt4v_pt"]), ("finetune", ["coco", "sharegpt4v", "textvqa"])):
        sources = [made.source(name) for name in names]
        copytree(sources[0].images, data / f"{stage}_data")
        records = [record for source in sources for record in json.loads(source.annotations.read_text())]
        (data / real.sources[names[0]].file).write_text(json.dumps(records))

    sizes = [f"++{key}.{k}={v}" for key, some in TOY.items() for k, v in some.items()]
    cell, words = shell.folder / "runs" / "toy", ["model=1.7b", "cell=toy", "logger=csv", *sizes]
    words += ["benchmark=[pope]", "controls=[]", "any_version=true"]
    shell("train.py", *words, HF_HOME=str(tmp_path / "hub"), MVLM_DATA=str(data))
    results = json.loads((cell / "results.json").read_text())
    assert results["benchmarks"]["pope"]["none"]["items"] == 24
    trained, start = build.trained(Run(cell)), build.model(Run(cell).config)
    load_vision(start.vision, REFERENCE / "clip_full")
    assert all(torch.equal(a, b) for a, b in zip(trained.vision.parameters(), start.vision.parameters(), strict=True))

    for weights in (tmp_path / "hub").rglob("*.safetensors"):
        weights.unlink()
    picture = f"image={REFERENCE / 'images' / 'img0.png'}"
    shell("chat.py", f"run={cell}", picture, "prompt=What?", "max_new_tokens=4", HF_HOME=str(tmp_path / "hub"))


@pytest.mark.slow
def test_own_data(shell) -> None:
    """`data=custom`, with a picture and a text-only record."""
    (shell.folder / "own.json").write_text(
        json.dumps(
            [
                {"id": 1, "image": "img0.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]},
                {"id": 2, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello to you."}]},
            ]
        )
    )  # fmt: skip
    shell(
        "train.py", "model=nano", "data=custom", "data.finetune=[own.json]", f"data.images={ROOT / 'tests/reference/images'}",
        "evaluate=false", "logger=csv", "recipe.finetune.batch=1", "recipe.finetune.micro_batch=1",
    )  # fmt: skip


GOOD = {"id": 1, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello."}]}
BAD = {
    "not JSON": ("[{]", "is not JSON: line 1, column 3"),
    "no list": ("{}", "must hold a list of records"),
    "empty": ("[]", "holds no sample: 0 records"),
    "no conversations": (json.dumps([GOOD, {"id": 7}]), "record 1 (id 7): no field `conversations`"),
    "unknown speaker": (json.dumps([{"conversations": [{"from": "bot", "value": "x"}]}]), "'bot'"),
    "missing image": (json.dumps([GOOD | {"image": "gone.png"}]), "gone.png is missing"),
    "path climbs out": (json.dumps([GOOD | {"image": "../img0.png"}]), "leads out of the image folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_before_any_work(configure, tmp_path: Path, name: str) -> None:
    text, told = BAD[name]
    (tmp_path / "bad.json").write_text(text)
    cfg = configure(
        "model=nano",
        "data=custom",
        f"data.finetune=[{tmp_path / 'bad.json'}]",
        f"data.images={ROOT / 'tests/reference/images'}",
    )
    with pytest.raises(ValueError, match=re.escape(told)):
        build.mixture(cfg, "finetune", build.corpus(cfg), build.tokenizer(cfg), 16)


@pytest.mark.slow
def test_doctor_counts_what_is_wrong_and_training_goes_without(shell) -> None:
    """A missing and a corrupt picture and a blanked dialogue, each found, counted and listed; the exit code tells. All three stop a
    training, which does without them if it is given the list."""
    blank = {"id": 3, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": ""}]}
    pictures = shell.folder / "pictures"
    pictures.mkdir()
    (pictures / "torn.jpg").write_bytes(b"\xff\xd8\xff no picture")
    records = [*[GOOD] * 8, GOOD | {"image": "gone.jpg"}, GOOD | {"image": "torn.jpg"}, blank]
    (shell.folder / "sick.json").write_text(json.dumps(records))
    words = ("model=nano", "data=custom", "data.finetune=[sick.json]", "data.images=pictures")
    done = shell("doctor.py", *words, "report=checked", ok=False)
    assert "no label" in done.stderr and "Traceback" not in done.stderr
    told = "".join(path.read_text() for path in (shell.folder / "checked").glob("*.json"))
    assert all(word in told for word in ("missing", "corrupt", "blanked"))

    frozen = "strategy.finetune.rates.projector=null"
    training = ("train.py", *words, "evaluate=false", "logger=csv", frozen)
    assert "exclude=doctor/exclude.json trains without" in shell(*training, ok=False).stderr
    done = shell(*training, "exclude=checked/exclude.json", "cell=healed")
    assert "trained without 3 of sick.json, as checked/exclude.json says" in " ".join(done.stdout.split())
    run = Run(shell.folder / "runs" / "healed")
    assert json.loads((run.folder / "finetune" / "stage.json").read_text())["samples"] == {"sick.json": 8}
    assert "exclude" in run.facts["data_sha256"]
    shell("doctor.py", *words, "report=again", "exclude=checked/exclude.json")


@pytest.fixture
def checked(configure, tmp_path: Path):
    """`checked("data=custom", ...)`: a cell as train.py looks at it before it trains; its run."""

    def check(*words: str) -> Run:
        cfg = configure("model=nano", "trainer=cpu", f"runs={tmp_path / 'runs'}", "cell=a", *words)
        files, text, run = build.corpus(cfg), build.tokenizer(cfg), Run.open(cfg)
        fit.check(cfg, {stage: build.mixture(cfg, stage, files, text, 16) for stage in build.STAGES}, run, files)
        return run

    return check


def test_settings_are_looked_at_without_a_script_too(checked) -> None:
    with pytest.raises(ValueError, match=r"recipe\.start=foo: it may be random, words"):
        checked("recipe.start=foo")


def test_data_that_change_while_a_run_waits_are_refused(checked, tmp_path: Path) -> None:
    """Once anything was trained on them: a run is of one set of data, whatever interrupts it."""
    mine, picture = tmp_path / "mine.json", {"image": "img0.png"}
    seen = GOOD | picture | {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, GOOD["conversations"][1]]}

    def with_samples(count: int) -> Run:
        mine.write_text(json.dumps([seen] * count))
        return checked("data=custom", f"data.finetune=[{mine}]", f"data.images={REFERENCE / 'images'}")

    with_samples(12)
    run = with_samples(13)
    (run.folder / "finetune" / "step-2").mkdir(parents=True)
    with_samples(13)
    with pytest.raises(ValueError, match=r"begun with other data: finetune/\S*mine.json changed \(sha256 \w{12} then"):
        with_samples(12)
    with_samples(13)


def test_data_that_moved_are_the_same_data(checked, tmp_path: Path) -> None:
    """A node's own disk has another name at every start."""
    (checked().folder / "finetune" / "step-2").mkdir(parents=True)
    elsewhere = f"corpus.root.root={tmp_path / 'elsewhere'}"
    checked(elsewhere)
    (annotations,) = (tmp_path / "elsewhere").rglob("sqa.json*")
    annotations.write_text(annotations.read_text().replace("?", "??", 1))
    with pytest.raises(ValueError, match="begun with other data: finetune/sqa changed"):
        checked(elsewhere)


def test_a_mix_of_named_sources_needs_to_say_no_folder(configure) -> None:
    cfg = configure("model=nano")
    with open_dict(cfg.data):
        del cfg.data["images"]
    assert len(build.mixture(cfg, "finetune", build.corpus(cfg), build.tokenizer(cfg), 16))


def test_what_nothing_was_trained_by_keeps_nobody_from_mending_it(checked, tmp_path: Path) -> None:
    """A run that was refused has a folder and no stage: its configuration is put in order, not held against it."""
    checked("recipe.warmup=0.1")
    run = checked("recipe.warmup=0.2")
    assert run.config.recipe.warmup == 0.2
    (run.folder / "pretrain" / "step-2").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"another configuration:\n  recipe.warmup: 0.2 there, 0.1 here"):
        checked("recipe.warmup=0.1")


def test_ones_own_data_that_moved_are_the_same_data(checked, tmp_path: Path) -> None:
    """They go by their names; what is in them is compared, of two files of one name as well."""
    seen = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Red."}]

    def lie_in(folder: Path, answer: str = "Red.") -> tuple[str, ...]:
        for part in ("a", "b", "pictures"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / "pictures/a.png")
        for part, said in (("a", "Red."), ("b", answer)):
            records = [{"image": "a.png", "conversations": [seen[0], seen[1] | {"value": said}]}] * 12
            (folder / part / "mine.json").write_text(json.dumps(records))
        files = ",".join(str(folder / part / "mine.json") for part in "ab")
        return "data=custom", f"data.finetune=[{files}]", f"data.images={folder / 'pictures'}"

    words = lie_in(tmp_path / "here")
    run = checked(*words)
    (run.folder / "finetune" / "step-2").mkdir(parents=True)
    words = lie_in(tmp_path / "there")
    with pytest.raises(
        ValueError, match=r"data.images: .*here/pictures' there, which is still there, .*there/pictures"
    ):
        checked(*words)
    (tmp_path / "here").rename(tmp_path / "gone")
    assert checked(*words).folder == run.folder
    (tmp_path / "there").rename(tmp_path / "gone, too")
    with pytest.raises(ValueError, match=r"begun with other data: finetune/mine.json changed"):
        checked(*lie_in(tmp_path / "elsewhere", "Blue."))


def test_a_tower_that_learns_may_begin_from_words(shell) -> None:
    """Its features are needed for the start alone, and then it gives others."""
    words = ("model=nano", "recipe.start=words", "evaluate=false", "logger=csv")
    shell("train.py", *words, "strategy=sharegpt4v", "cell=learning")
    told = json.loads((shell.folder / "runs/learning/pretrain/stage.json").read_text())
    assert told["moved"]["vision.upper"] and told["start"]["pictures"] > 0


def test_adapters_are_looked_at_before_the_stage_that_comes_first(checked) -> None:
    with pytest.raises(ValueError, match="`r` should be a positive"):
        checked("strategy=lora", "strategy.finetune.lora.r=0")


def test_text_alone_cannot_teach_a_projector(checked, tmp_path: Path) -> None:
    """Else the stage ends with weights that did not move, and is not saved."""
    (tmp_path / "text.json").write_text(json.dumps([GOOD] * 12))
    own = ("data=custom", f"data.finetune=[{tmp_path / 'text.json'}]")
    frozen = "strategy.finetune.rates.projector=null"
    with pytest.raises(ValueError, match=f"shows no picture in 12 samples.* or freeze it: {frozen}$"):
        checked(*own, "cell=learns")
    checked(*own, "cell=frozen", frozen)


def test_dialogues_without_labels_stop_a_run(configure, tmp_path: Path) -> None:
    blank = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": ""}]}
    (tmp_path / "blank.json").write_text(json.dumps([GOOD] * 9 + [blank]))
    cfg = configure("model=nano", "data=custom", f"data.finetune=[{tmp_path / 'blank.json'}]", "data.images=.")
    mixture = build.mixture(cfg, "finetune", build.corpus(cfg), build.tokenizer(cfg), 16)
    with pytest.raises(ValueError, match=r"1 of 10 dialogues looked at teach nothing.* record 9 of .*blank\.json"):
        fit.check_labels("finetune", mixture)


def test_pictures_without_a_place_in_the_text_stop_a_run(checked, tmp_path: Path) -> None:
    """They would be trained on as texts, and the projector would learn nothing."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    seen = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Red."}]
    unseen = [{"from": "human", "value": "Which colour?"}, seen[1]]
    for untagged in (40, 1):
        records = [{"image": "a.png", "conversations": unseen if k < untagged else seen} for k in range(40)]
        (tmp_path / "mine.json").write_text(json.dumps(records))
        with pytest.raises(
            ValueError, match=f"{untagged} of 40 .* not shown, for no <image> .*record 0 of .*mine.json"
        ):
            checked(
                "data=custom",
                f"data.finetune=[{tmp_path / 'mine.json'}]",
                f"data.images={tmp_path}",
                f"cell=with{untagged}",
            )


def test_pictures_behind_links_are_taken_if_that_is_said(checked, tmp_path: Path) -> None:
    """As where a shared set of pictures is linked into the corpus' folder."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "root").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "shared/a.png")
    (tmp_path / "root/coco").symlink_to(tmp_path / "shared")
    seen = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Red."}]
    (tmp_path / "mine.json").write_text(json.dumps([{"image": "coco/a.png", "conversations": seen}] * 12))
    words = ("data=custom", f"data.finetune=[{tmp_path / 'mine.json'}]", f"data.images={tmp_path / 'root'}")
    with pytest.raises(ValueError, match=r"leads out of the image folder; follow_links=true allows it"):
        checked(*words, "cell=refused")
    checked(*words, "cell=taken", "follow_links=true")


def test_bad_data_is_told_in_one_line(shell) -> None:
    (shell.folder / "bad.json").write_text("[]")
    done = shell(
        "train.py", "model=nano", "data=custom", "data.finetune=[bad.json]", "data.images=.", "logger=csv", ok=False
    )
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_w_and_b_without_a_login_is_told_before_any_work(shell, tmp_path: Path) -> None:
    words = ("model=nano", "logger.offline=false", "cell=online")
    told = shell("train.py", *words, ok=False, WANDB_MODE="online", HOME=str(tmp_path)).stderr
    assert "W&B does not begin this run (No API key" in told and "wandb sync" in told and "Traceback" not in told
    assert not (shell.folder / "runs" / "online" / "pretrain").exists()


@pytest.mark.slow
def test_one_step_learns_nothing_and_is_refused(shell) -> None:
    """The schedule's first step has rate zero (as the reference's), so a stage of one step would change no weight."""
    (shell.folder / "one.json").write_text(json.dumps([GOOD]))
    done = shell(
        "train.py", "model=nano", "data=custom", "data.finetune=[one.json]", "data.images=.", "logger=csv", ok=False
    )
    assert "finetune has 1 step" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one(shell) -> None:
    """The same global batch dealt to two processes: the same losses step by step, up to float32 sums in another order. Both answer
    their part of the questions, while training and after it."""
    cells = {"one": ["trainer=cpu"], "two": ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]}
    histories = {}
    for cell, words in cells.items():
        words += ["trainer.precision=32-true", "benchmark=[pope]", "controls=[]", "val_every=5", "val_items=8"]
        shell("train.py", "model=nano", f"cell={cell}", *words)
        told = [json.loads((shell.folder / "runs" / cell / s / "stage.json").read_text()) for s in build.STAGES]
        assert {stage["devices"] for stage in told} == {1 if cell == "one" else 2}
        histories[cell] = [entry["loss"] for stage in told for entry in stage["history"]]
        run = Run(shell.folder / "runs" / cell)
        results = json.loads((run.folder / "results.json").read_text())["benchmarks"]["pope"]["none"]
        answers = list((run.folder / "answers").iterdir())
        assert [path.name for path in answers] == ["pope.jsonl"], "no process' part is left"
        assert len(answers[0].read_text().splitlines()) == results["items"]
        assert "val/pope_items" in (run.folder / "finetune" / "metrics.csv").read_text()
    assert histories["two"] == pytest.approx(histories["one"], rel=1e-4)


@pytest.mark.parametrize(
    "device, rel",
    [pytest.param("elsewhere", 1e-5, marks=pytest.mark.slow), pytest.param("gpu", 1e-3, marks=pytest.mark.gpu)],
)
def test_another_device_trains_and_answers_as_the_processor(shell, device: str, rel: float) -> None:
    """The whole journey on a GPU, and on a device that takes no tensor of the processor's (`tests/elsewhere.py`): pictures encoded there,
    too. In float32 the losses are the same up to sums in another order, which a GPU's kernels also cut up otherwise, and so are all
    answers but for a tie. The samples of a batch lie in one row, as the pocket model has them."""
    folder, told, said, talked = shell.folder / "runs", {}, {}, {}
    for cell in ("cpu", device):
        launch = (str(ROOT / "tests/elsewhere.py"),) if cell == "elsewhere" else ()
        words = [f"trainer.accelerator={cell}", "trainer.devices=1", "trainer.precision=32-true", f"cell={cell}"]
        words += ["val_every=5", "val_items=4", "checkpoint_every=3", f"features=for-{device}", "logger=csv"]
        words += ["benchmark=[gqa,pope]", "+model.module.language.config.attn_implementation=grouped"]
        shell("train.py", "model=nano", f"runs=runs/{device}", *words, launch=launch)
        stages = [json.loads((folder / device / cell / stage / "stage.json").read_text()) for stage in build.STAGES]
        told[cell] = [entry["loss"] for stage in stages for entry in stage["history"]]
        files = sorted((folder / device / cell / "answers").glob("*.jsonl"))
        said[cell] = [line for file in files for line in file.read_text().splitlines()]
        picture, more = f"image={ROOT / 'tests/reference/images/img0.png'}", ("precision=32-true", "max_new_tokens=8")
        asked = (f"run=runs/{device}/{cell}", picture, "prompt=What?", *more, *["device=cpu"] * (cell == "cpu"))
        talked[cell] = shell("chat.py", *asked, launch=launch).stdout
    assert told[device] == pytest.approx(told["cpu"], rel=rel)
    same = [a == b for a, b in zip(said["cpu"], said[device], strict=True)]
    assert len(same) == 3 * (19 + 24) and sum(same) >= 0.98 * len(same)
    assert len(list((shell.folder / f"for-{device}").iterdir())) == 2, "each device encoded its own pictures"
    assert talked[device] == talked["cpu"]
