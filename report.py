"""A sweep's table beside the paper's; or two scored runs compared.

    python report.py sweep=table7                               the cells in runs/ as table.md, .tex, .csv, .json and a page with plots
    python report.py sweep=tables model=1.7b seeds=3            both tables, seeds 0, 1, 2; what is missing is told
    python report.py sweep=table7 'overrides=["recipe.max_length=512"]'     the cells that were trained with these words
    python report.py compare=[runs/a,runs/b]                    differences with paired intervals and tests, and what flipped
    python report.py compare=[a.json,b.json] out=report/ab      two results.json files
    python report.py compare=[runs/a,runs/b] view=blind         the answers without a picture

What cannot be compared (another protocol, other questions) is named with the reason.
"""

from __future__ import annotations

from pathlib import Path

from mvlm.cli import script


def main(cfg) -> None:
    if (cfg.get("sweep") is None) == (not cfg.compare):
        raise ValueError("name a table, sweep=table7, or two run folders, compare=[runs/a,runs/b]")
    if cfg.compare:
        two_runs(cfg)
    else:
        a_sweep(cfg)


def a_sweep(cfg) -> None:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from mvlm import sheet, table

    model = HydraConfig.get().runtime.choices.get("model")
    GlobalHydra.instance().clear()  # this script is composed; now its cells are, one by one
    seeds = cfg.seeds
    if seeds is not None and (not isinstance(seeds, int) or seeds < 1):
        raise ValueError(f"seeds={seeds}: a number of seeds from 1, or null for those whose run folders are there")
    read = {"runs": cfg.runs, "overrides": list(cfg.overrides), "protocol": cfg.protocol, "folder": cfg.benchmark_root}
    made = list(table.tables(cfg.sweep, model=model, seeds=seeds, **read))
    out = Path(cfg.out or f"report/{cfg.sweep}-{made[0]['model']}")
    for report in made:
        sheet.show(report)
        print(f"look at {sheet.save(report, out / report['sweep'] if len(made) > 1 else out)}")


def two_runs(cfg) -> None:
    from mvlm import report

    if len(cfg.compare) != 2:
        raise ValueError(f"compare={list(cfg.compare)}: name two run folders, compare=[runs/a,runs/b]")
    if cfg.view not in ("none", "blind", "shuffled"):
        raise ValueError(f"view is none, blind or shuffled, not {cfg.view!r}")
    a, b = (report.Side.open(path, cfg.protocol) for path in cfg.compare)
    compared, flipped = report.compare(a, b, cfg.view, cfg.benchmark_root)
    report.show(compared)
    print(f"look at {report.save(compared, flipped, cfg.out or 'report')}")


if __name__ == "__main__":
    script(main, "report")
