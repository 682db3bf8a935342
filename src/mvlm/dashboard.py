"""A sweep's W&B workspace as code: the scores of its rows over their seeds, what they cost, how they learned, what they answered.

python -m mvlm.dashboard sweep=table7 entity=<you>             make it: every call makes a new view of the project
python -m mvlm.dashboard sweep=table7 out=dashboard.json       write its specification; needs no account and no network

It shows the runs whose group is the sweep. Send offline runs first: wandb sync runs/*/wandb
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mvlm.cli import script

# Imported where they are used: `--help` needs none of them, and wandb-workspaces is an extra.
if TYPE_CHECKING:
    from omegaconf import DictConfig
    from wandb_workspaces.workspaces import Workspace

MOST = 100
"""Runs and bars that a panel shows. W&B's own limit is 10 runs, fewer than a table with seeds has."""

STEP = "trainer/global_step"


def workspace(cfg: DictConfig) -> Workspace:
    """The workspace of a `conf/dashboard.yaml`; nothing is sent.

    Raises:
        ValueError: wandb-workspaces is missing; an unknown protocol; no sweep, or a name that a filter of W&B would misread.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ValueError(f"a dashboard needs wandb-workspaces ({error}): pip install -e '.[dashboard]'") from None
    from wandb_workspaces.expr import And, Config, Metric, Ordering, Summary

    from mvlm.build import STAGES
    from mvlm.page import CONTROLS
    from mvlm.run import beside
    from mvlm.score import TITLES

    if cfg.protocol not in ("paper", "harness"):
        raise ValueError(f"protocol={cfg.protocol}: scores are by protocol paper or harness")
    if not re.fullmatch(r"""[^=<>'"\\]+""", str(cfg.sweep or "")):
        raise ValueError(
            f"sweep={cfg.sweep}: name a sweep, without = < > \\ or quotes, which a filter of W&B reads as its own. A sweep without a "
            "table is named by WANDB_RUN_GROUP=<name> before its command"
        )
    end = beside(cfg.protocol)
    average = f"scores{end}/avg/none"

    def bars(name: str, title: str) -> wr.BarPlot:
        return wr.BarPlot(
            title=title,
            metrics=[f"scores{end}/{name}/{view}" for view in CONTROLS],
            groupby=wr.Config("row"),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=MOST,
            max_bars_to_show=MOST,
        )

    def lines(title: str, *keys: str) -> wr.LinePlot:
        return wr.LinePlot(title=title, x=STEP, y=list(keys), max_runs_to_show=MOST)

    costs = {
        "image_tokens": "tokens of a picture",
        "projector_parameters": "parameters of the projector",
        f"{STAGES[-1]}/samples_per_second": f"{STAGES[-1]}: samples a second",
    }
    columns = {f"the {axis}": wr.Config(f"axes.{axis}") for axis in ("projector", "data", "strategy")}
    columns |= {title: wr.SummaryMetric(key) for key, title in costs.items()} | {"Avg": wr.SummaryMetric(average)}
    about = (
        f"**{cfg.sweep}**, scores by protocol `{cfg.protocol}`. A row is its projector, data and strategy, and what else was changed. "
        f"Bars are means over its seeds, their marks the smallest and the largest. `none`: {CONTROLS['none']}; "
        f"`blind`: {CONTROLS['blind']}; `shuffled`: {CONTROLS['shuffled']}. What a row gains over the last two is what it sees. "
        "Intervals and tests are in the table of report.py."
    )
    sections = {
        "Scores": [
            wr.MarkdownPanel(markdown=about),
            bars("avg", "Avg"),
            *(bars(name, TITLES.get(name, name)) for name in cfg.benchmark),
        ],
        "Cost": [
            *(wr.ScatterPlot(title=f"Avg, by {title}", x=key, y=average) for key, title in costs.items()),
            wr.ParallelCoordinatesPlot(
                title="from the axes to Avg",
                columns=[
                    wr.ParallelCoordinatesPlotColumn(metric=metric, display_name=title)
                    for title, metric in columns.items()
                ],
            ),
        ],
        "Learning": [lines(f"{stage}: loss", f"{stage}/loss") for stage in STAGES],
        "Sight": [
            panel
            for stage in STAGES
            for panel in (
                lines(f"{stage}: held-out loss, true picture", f"{stage}/sight_true"),
                lines(f"{stage}: held-out loss, another picture", f"{stage}/sight_shuffled"),
                lines(f"{stage}: the gap between them", f"{stage}/sight_gap"),
            )
        ],
        "Answers": [wr.WeavePanelSummaryTable(table_name=f"predictions{end}")],
    }
    return ws.Workspace(
        entity=cfg.entity or "",
        project=cfg.project,
        name=f"{cfg.sweep}, protocol {cfg.protocol}",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=MOST),
        runset_settings=ws.RunsetSettings(
            filters=And(Metric("Group") == str(cfg.sweep)),
            groupby=[Config("row")],
            order=[Ordering(Summary(average), ascending=False)],
            pinned_columns=["run:displayName", "run:state", f"summary:{average}", "config:seed.value"],
        ),
    )


def specification(made: Workspace) -> dict:
    """What W&B would get, as plain types."""
    return made._model.model_dump(by_alias=True, exclude_none=True)


def save(made: Workspace) -> str:
    """Send a workspace to W&B, to the account's own entity if it names none.

    Returns:
        Its address.

    Raises:
        ValueError: nobody is logged in, W&B cannot be reached, or it refuses.
    """
    import wandb

    try:
        made.entity = made.entity or wandb.Api().default_entity
        return made.save().url
    except Exception as error:  # what wandb raises has no common base
        raise ValueError(
            f"W&B did not take the dashboard for {made.entity or 'your account'}/{made.project}: {error}. Log in with `wandb login`, "
            "name an entity and a project that runs were sent to, or write the specification only: out=dashboard.json"
        ) from None


def main(cfg: DictConfig) -> None:
    """Make the workspace, or write its specification."""
    made = workspace(cfg)
    if cfg.out is None:
        print(f"look at {save(made)}")
    else:
        Path(cfg.out).write_text(json.dumps(specification(made), indent=2) + "\n", encoding="utf-8")
        print(f"wrote {cfg.out}")


if __name__ == "__main__":
    script(main, "dashboard")
