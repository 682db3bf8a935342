"""The dashboard asks for keys that a run logs, all of them and no others; it is made without a network, and refused with the cure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import WandbLogger

from mvlm import build, dashboard, fit, score
from mvlm.cli import CONF
from mvlm.run import Run


class Experiment:
    """In place of a W&B run: what it is told, by its keys. Lightning's logger around it is the real one."""

    id = name = "recorded"

    def __init__(self) -> None:
        self.logged: set[str] = set()
        self.summary = SimpleNamespace(update=self.log)
        self.hyperparameters: list[dict] = []
        self.config = SimpleNamespace(update=lambda values, **_: self.hyperparameters.append(values))

    def log(self, values: dict) -> None:
        self.logged |= set(values)


def asked(specification: dict) -> tuple[set[str], set[tuple[str, ...]], set[str]]:
    """What a specification reads of a run: keys of its history or summary, places in its configuration, its own attributes."""
    section = specification["spec"]["section"]
    panels = [panel["config"] for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    keys, places, attributes = set(), set(), set()

    def see(accessor: str) -> None:
        kind, _, name = accessor.rpartition(":")
        if kind == "config" or name.endswith(".value"):
            places.add(tuple(part for part in name.split(".") if part != "value"))
        elif kind == "run":
            attributes.add(name)
        else:
            keys.add(name)

    for panel in panels:
        for accessor in (*panel.get("metrics", []), *(panel[k] for k in ("xAxis", "yAxis", "groupBy") if k in panel)):
            see(accessor)
        for column in panel.get("columns", []):
            see(column["accessor"])
        if "panel2Config" in panel:
            see(panel["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"])
    (runs,) = section["runSets"]
    for key in (
        *runs["grouping"],
        *(sort["key"] for sort in runs["sort"]["keys"]),
        *(f["key"] for f in runs["filters"]["filters"]),
    ):
        see(f"{key['section']}:{key['name']}")
    for column in runs["runFeed"]["columnPinned"]:
        see(column)
    see(section["settings"]["xAxis"])
    return keys, places, attributes


def test_panels_show_what_a_run_logs(configure, scored, tmp_path: Path, monkeypatch) -> None:
    """Both stages are trained and a run is scored, at nano size: a key that is renamed, there or here, is found missing."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))  # the table's pictures; set anew by score.log
    enough = "data.pretrain=[sharegpt4v_pt,sharegpt4v]"  # 18 samples, of which two are held out
    words = ["model=nano", "trainer=cpu", enough, f"runs={tmp_path}", "cell=trained"]
    cfg = configure(*words)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
        HydraConfig.instance().set_config(compose("train", words, return_hydra_config=True))
    run, files, text = Run.open(cfg), build.corpus(cfg), build.tokenizer(cfg)
    model = build.model(cfg)
    data = {stage: build.mixture(cfg, stage, files, text, model.image_tokens) for stage in build.STAGES}
    experiment = Experiment()
    logger = WandbLogger(experiment=experiment, save_dir=tmp_path)
    for stage in build.STAGES:
        fit.stage(cfg, run, stage, model, data, files, text, logger)
    assert experiment.hyperparameters == [], "the configuration is told once, by tracking"
    logger.log_metrics(fit.costs(run))
    answered = scored("scored", lambda q, view: view == "none", ("blind", "shuffled")).folder
    results = json.loads((answered / "results.json").read_text())
    for protocol in ("paper", "harness"):
        items = score.collect(results, scored.found, answered / "answers")
        score.log(results | {"protocol": protocol}, items, logger)

    config, shown = fit.told_to_wandb(cfg, run)["config"], set()
    for protocol in ("paper", "harness"):
        made = dashboard.workspace(configure("sweep=table7", f"protocol={protocol}", page="dashboard"))
        keys, places, attributes = asked(dashboard.specification(made))
        assert keys <= experiment.logged
        assert attributes == {"group", "displayName", "state"}
        assert {("row",), ("axes", "projector"), ("axes", "data"), ("axes", "strategy"), ("seed",)} == places
        for place in places:
            value = config
            for part in place:
                value = value[part]
        shown |= keys
    elsewhere = {"epoch", *(key for key in experiment.logged if key.endswith(("/shown", "/of")))}
    assert experiment.logged - shown <= elsewhere | {f"{build.STAGES[0]}/samples_per_second"}, "all else is on a panel"


def test_it_shows_the_runs_of_one_sweep(configure) -> None:
    made = dashboard.workspace(configure("sweep='table6,table7'", "benchmark=[pope]", page="dashboard"))
    section = dashboard.specification(made)["spec"]["section"]
    (only,) = section["runSets"][0]["filters"]["filters"]
    assert (only["key"], only["op"], only["value"]) == ({"section": "run", "name": "group"}, "=", "table6,table7")
    bars = [p["config"] for p in section["panelBankConfig"]["sections"][0]["panels"] if p["viewType"] == "Bar Chart"]
    assert [b["chartTitle"] for b in bars] == ["Avg", "POPE"]
    assert {(b["groupBy"], b["groupAgg"], b["groupArea"]) for b in bars} == {("row.value", "mean", "minmax")}
    assert min(b["limit"] for b in bars) >= 8 * 3, "all rows of Tables 6 and 7 with three seeds"


def test_the_specification_is_written_without_an_account(configure, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(wandb, "Api", None)
    dashboard.main(configure("sweep=table7", f"out={tmp_path / 'd.json'}", page="dashboard"))
    assert json.loads((tmp_path / "d.json").read_text())["displayName"] == "table7, protocol paper"


def test_what_cannot_be_made_is_refused_with_the_cure(configure, monkeypatch) -> None:
    for word, told in (
        ("sweep=null", "name a sweep"),
        ("sweep='a=b'", "WANDB_RUN_GROUP=<name>"),
        ("protocol=papr", "protocol paper or harness"),
    ):
        with pytest.raises(ValueError, match=told):
            dashboard.workspace(configure("sweep=x", word, page="dashboard"))

    def refuse():
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "Api", refuse)
    with pytest.raises(
        ValueError, match=r"your account/mvlm: No API key configured.*`wandb login`.*out=dashboard\.json"
    ):
        dashboard.main(configure("sweep=x", page="dashboard"))
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[dashboard\]'"):
        dashboard.workspace(configure("sweep=x", page="dashboard"))
