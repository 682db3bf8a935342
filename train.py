"""Train a cell of the paper's ablations: both stages, then the benchmarks, into one run folder.

    python train.py                                                   the paper's own cell at pocket size
    python train.py projector=ldpv2 data=v2 strategy=unfreeze_llm     the same, in full
    python train.py model=nano                                        random weights, a minute, to see that all works
    python train.py model=1.7b data.images=... corpus.root=...        the real thing (python -m mvlm.plan model=1.7b first)
    python train.py data=custom data.pretrain=[a.json] data.finetune=[b.json] data.images=pictures/

Repeating a command goes on where it stopped: a finished stage is not trained again, an answered question not asked again.
"""

from __future__ import annotations

from mvlm.cli import script


def main(cfg) -> None:
    import lightning as L
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from mvlm import build, fit, score
    from mvlm.run import Run

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    run = Run.open(cfg)
    files, words = build.corpus(cfg), build.tokenizer(cfg)
    model = build.model(cfg)
    data = {stage: build.mixture(cfg, stage, files, words, model.image_tokens) for stage in build.STAGES}
    fit.check(cfg, data, run)

    with fit.tracking(cfg, run) as wandb:
        for stage in build.STAGES:
            if data[stage] is not None and not run.finished(stage):
                fit.stage(cfg, run, stage, model, data, files, words, wandb)
        if cfg.evaluate and rank_zero_only.rank == 0:  # of several processes one answers the questions
            score.run(run, build.trained(run), files, words, cfg.benchmark, cfg.controls, wandb=wandb)


if __name__ == "__main__":
    script(main, "train")
