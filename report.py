"""Compare two scored runs: differences with paired intervals and tests, and the questions that flipped.

    python report.py compare=[runs/a,runs/b]                    a table, and report/index.html with the flipped questions
    python report.py compare=[a.json,b.json] out=report/ab      two results.json files
    python report.py compare=[runs/a,runs/b] view=blind         the answers without a picture

What cannot be compared (another protocol, other questions) is named with the reason.
"""

from __future__ import annotations

from mvlm.cli import script


def main(cfg) -> None:
    from mvlm import report

    if len(cfg.compare) != 2:
        raise ValueError(f"compare={list(cfg.compare)}: name two run folders, compare=[runs/a,runs/b]")
    if cfg.view not in ("none", "blind", "shuffled"):
        raise ValueError(f"view is none, blind or shuffled, not {cfg.view!r}")
    a, b = map(report.Side.open, cfg.compare)
    compared, flipped = report.compare(a, b, cfg.view, cfg.benchmark_root)
    report.show(compared)
    print(f"look at {report.save(compared, flipped, cfg.out)}")


if __name__ == "__main__":
    script(main, "report")
