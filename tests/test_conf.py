"""Every yaml under conf/ composes and builds, the count is asserted, and misspelt words are refused with the right ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from mvlm import build
from mvlm.cli import check_overrides, groups, literal
from mvlm.data.datamodule import StepData

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
GROUPS = groups()


def test_all_yaml_files_are_covered_here() -> None:
    """Groups are walked below, so a new option is tested without anybody remembering to; a new group or page must be added."""
    assert set(GROUPS) == {
        "benchmark", "corpus", "data", "logger", "model", "projector", "recipe", "strategy", "trainer",
    }  # fmt: skip
    assert {p.stem for p in CONF.glob("*.yaml")} == {
        "train", "evaluate", "report", "export", "chat", "plan", "doctor", "bench", "dashboard",
    }  # fmt: skip
    assert sum(1 for _ in CONF.rglob("*.yaml")) == sum(map(len, GROUPS.values())) + 9


@pytest.mark.parametrize("model", GROUPS["model"])
@pytest.mark.parametrize("projector", GROUPS["projector"])
def test_models_build_on_meta(configure, model: str, projector: str) -> None:
    with torch.device("meta"):
        net = build.model(configure(f"model={model}", f"projector={projector}"))
    assert 0 < net.image_tokens <= net.vision.grid**2
    assert all(p.device.type == "meta" for p in net.parameters())


@pytest.mark.parametrize("strategy", GROUPS["strategy"])
@pytest.mark.parametrize("recipe", GROUPS["recipe"])
def test_strategies_take_their_rates_from_every_recipe(configure, strategy: str, recipe: str) -> None:
    cfg = configure(f"strategy={strategy}", f"recipe={recipe}")
    for stage in build.STAGES:
        rates = dict(cfg.strategy[stage].rates)
        assert all(rate is None or 0 < rate < 0.1 for rate in rates.values())
        look = build.pictures(configure("model=nano", f"recipe={recipe}"), stage)
        assert look(__import__("PIL.Image", fromlist=["new"]).new("RGB", (30, 20))).shape == (3, 112, 112)
        assert build.talk(cfg, stage).name == cfg.recipe[stage].template
        StepData(range(1000), cfg.recipe[stage].batch, cfg.recipe[stage].micro_batch)


@pytest.mark.parametrize("data", ["v1", "v2"])
@pytest.mark.parametrize("corpus", ["pocket", "nano", "full"])
def test_every_source_is_in_every_corpus(configure, data: str, corpus: str) -> None:
    cfg = configure(f"data={data}", f"corpus={corpus}")
    known = set(cfg.corpus.get("sources") or {}) | set(cfg.corpus.get("samples") or {})
    for stage in build.STAGES:
        assert set(cfg.data[stage]) <= known


@pytest.mark.parametrize("trainer", GROUPS["trainer"])
def test_trainers_name_lightnings_own_arguments(configure, trainer: str) -> None:
    cfg = configure(f"trainer={trainer}")
    here = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": build.precision(cfg.trainer.precision)}
    assert instantiate(cfg.trainer, **here, logger=False).world_size == 1


@pytest.mark.parametrize("logger", GROUPS["logger"])
def test_loggers_build(configure, logger: str, tmp_path: Path) -> None:
    made = instantiate(configure(f"logger={logger}").logger)
    assert callable(made) and made.func.__name__ in ("WandbLogger", "CSVLogger")


@pytest.mark.parametrize("protocol", ["paper", "harness"])
@pytest.mark.parametrize("benchmark", GROUPS["benchmark"])
def test_benchmarks_read_the_generated_files(configure, benchmark: str, protocol: str) -> None:
    from mvlm.score import opened

    cfg = configure("model=nano", f"benchmark=[{benchmark}]", f"protocol={protocol}")
    files = build.corpus(cfg)
    (made,) = opened(cfg, cfg.benchmark, files, protocol=cfg.protocol)
    assert (made.name, made.protocol) == (benchmark, protocol)
    assert made.version(made.questions()) is None, "what is generated is no published version"
    # The same files, named as the real ones would be, are refused unless any version will do.
    asked = {"folder": files.benchmarks, "protocol": protocol}
    with pytest.raises(ValueError, match=r"another version of .*any_version=true"):
        opened(cfg, cfg.benchmark, files, **asked)
    assert opened(cfg, cfg.benchmark, files, **asked, any_version=True)


def test_the_table_says_whether_files_are_a_published_set(tmp_path: Path) -> None:
    from mvlm.run import Run
    from mvlm.score import about, counted

    score = {"items": 12578, "official": "testdev-balanced"}
    assert counted(score, generated=False) == "12,578 (testdev-balanced)"
    assert counted(score | {"items": 40, "official": None}, generated=False) == "40 (no published version)"
    assert counted(score | {"items": 40, "official": None}, generated=True) == "40"
    scores = {"gqa": {"none": score}, "pope": {"none": score | {"official": None}}}
    results = {"protocol": "harness", "generated": False, "corpus": "/data", "benchmarks": scores}
    told = about(Run(tmp_path), results)
    assert "protocol harness, benchmark files of /data (POPE of no published version)" in told
    assert "generated pocket benchmarks" in about(Run(tmp_path), results | {"generated": True})


def test_an_unknown_protocol_is_refused_by_name(configure) -> None:
    from mvlm.score import opened

    cfg = configure("model=nano", "protocol=harnes")
    with pytest.raises(ValueError, match=r"^protocol=harnes: \w+ knows paper, harness$"):
        opened(cfg, cfg.benchmark, build.corpus(cfg), protocol=cfg.protocol)


@pytest.mark.parametrize(
    "override, told",
    [
        ("projector=ldpv3", "there is no such projector; did you mean 'ldpv2'?"),
        ("modell=pocket", "there is no key 'modell'; did you mean 'model'?"),
        ("recipe.pretrain.bach=3", "did you mean 'recipe.pretrain.batch'?"),
        ("sead=1", "did you mean 'seed'?"),
        ("benchmark=[]", "name at least one benchmark (there are: gqa,"),
        ("data.finetune=[a=b.json]", "cannot be read (no viable alternative at input '[a='): put a value"),
    ],
)
def test_misspelt_words_are_refused_with_the_right_ones(override: str, told: str) -> None:
    with pytest.raises(ValueError) as error:
        check_overrides("train", [override])
    assert told in str(error.value)


SAID = ["What is this?", "What's this, a cat (red)? [a] {b}: c=d", 'say "hi"', " a ", "é\n猫", "'", "\"'"]
SAID += ["\\", 'a\\"', "\\\\${oc.env:HOME}", "${x} $5"]


@pytest.mark.parametrize("said", SAID)
def test_a_sentence_is_taken_as_it_is_typed(configure, said: str) -> None:
    for key in ("prompt", "image"):
        assert configure(literal(f"{key}={said}"), page="chat")[key] == said


@pytest.mark.parametrize("word", ["prompt=null", "prompt='a, b'", 'image="a, b"', "prompt=", "seed=1,2", "--help"])
def test_other_words_are_left_alone(word: str) -> None:
    assert literal(word) == word


def test_good_words_pass() -> None:
    check_overrides(
        "train",
        ["projector=ldpv2", "projector.pool=1", "recipe=paper", "seed=1,2", "+new.key=1", "data.pretrain=[a.json]"],
    )


def test_a_misspelt_word_costs_one_line_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "train.py", "projektor=pw2"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "did you mean 'projector'" in done.stderr
