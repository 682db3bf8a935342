"""Train a cell of the paper's ablations: both stages, then the benchmarks, into one run folder.

    python train.py                                                   the paper's own cell at pocket size
    python train.py projector=ldpv2 data=v2 strategy=unfreeze_llm     the same, in full
    python train.py model=nano                                        random weights, a minute, to see that all works
    python train.py model=1.7b corpus.root=/data                      the real thing (python -m mvlm.plan model=1.7b first)
    python train.py -m sweeps=table7 seeds=3                          a whole table, all of sweeps/ alike; python report.py sweep=table7 shows it
    python train.py data=custom data.pretrain=[a.json] data.finetune=[b.json] data.images=pictures/

Repeating a command goes on where it stopped: a finished stage is not trained again, an answered question not asked again.
"""

from __future__ import annotations

from mvlm.cli import imports, script


def main(cfg) -> None:
    with imports():
        from functools import partial

        import lightning as L

        from mvlm import build, fit, score
        from mvlm.run import Run

    if cfg.sweeps is not None or cfg.seeds != 1:
        raise ValueError(f"sweeps={cfg.sweeps} seeds={cfg.seeds}: to train many cells add -m (python train.py -m ...)")
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    run = Run.open(cfg)
    files, words = build.corpus(cfg), build.tokenizer(cfg)
    model = build.model(cfg)
    data = {stage: build.mixture(cfg, stage, files, words, model.image_tokens) for stage in build.STAGES}
    fit.check(cfg, data, run, files)
    scored = {"folder": cfg.benchmark_root, "protocol": cfg.protocol, "any_version": cfg.any_version}
    if cfg.evaluate:  # a missing or wrong benchmark file is told now, not after the training
        score.opened(cfg, cfg.benchmark, files, **scored)

    with fit.tracking(cfg, run) as wandb:
        for stage in build.STAGES:
            if data[stage] is not None and not run.finished(stage):
                fit.stage(cfg, run, stage, model, data, files, words, wandb)
        if cfg.evaluate:  # by all processes together
            scored |= {"device": "cpu" if cfg.trainer.accelerator == "cpu" else "auto", "wandb": wandb}
            score.run(run, partial(build.trained, run), files, words, cfg.benchmark, cfg.controls, **scored)


if __name__ == "__main__":
    script(main, "train", sweep=True)
