"""Look a corpus over before training on it: every picture decoded once, every dialogue tokenised, counted by source.

    python doctor.py data=v2                                   the generated corpus
    python doctor.py model=1.7b data=v2 corpus.root=/data      the real files
    python doctor.py data=custom data.finetune=[mine.json] data.images=pictures/ report=checked/
    python doctor.py replay=runs/<run>/finetune/diverged-120.json     a step that diverged: the loss of each of its samples

Missing, corrupt, blanked (no label left), too long; token histograms. The report and the list of records to leave out (train.py
exclude=doctor/exclude.json) are written where `report` says. The exit code is 1 if more than 0.1 % of a source would teach nothing, or has
a picture that it does not show.
"""

from __future__ import annotations

from mvlm.cli import script


def main(cfg) -> None:
    if cfg.replay:
        from mvlm.replay import replay

        replay(cfg.replay)
        return
    import torch
    from rich.console import Console

    from mvlm import build
    from mvlm.data.doctor import check_useful, examine

    with torch.device("meta"):
        image_tokens = build.model(cfg).image_tokens
    files, words = build.corpus(cfg), build.tokenizer(cfg)
    stages = {stage: build.datasets(cfg, stage, files, words, image_tokens, "skip") for stage in build.STAGES}
    report = examine(stages)
    report.save(cfg.report)
    Console().print(*report.tables(), f"all that was found is in {cfg.report}/doctor.json", sep="\n")
    check_useful(report)


if __name__ == "__main__":
    script(main, "doctor")
