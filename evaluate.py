"""Answer and score the benchmarks for a run folder.

    python evaluate.py run=runs/pocket-ldpv2-v2-unfreeze_llm-s0
    python evaluate.py run=<folder> benchmark=[gqa,pope] controls=[]
    python evaluate.py run=<folder> benchmark_root=/data/benchmarks      the real files, laid out as each benchmark's page says
    python evaluate.py run=<folder> flips=true                           how many answers depend on being asked one at a time
    torchrun --nproc-per-node 8 evaluate.py run=<folder>                 on eight GPUs; on any other number, it goes on

Answers already stored are kept, so an interrupted evaluation goes on and scoring again needs seconds and no model.
"""

from __future__ import annotations

from mvlm.cli import script


def main(cfg) -> None:
    from functools import partial

    from mvlm import build, score
    from mvlm.benchmark.ranks import join
    from mvlm.run import Run

    run = Run.find(cfg.run)
    if cfg.protocol != "paper":
        raise ValueError(
            f"protocol={cfg.protocol}: there is only protocol=paper, the reference's own prompts and scorers"
        )
    join()
    score.run(
        run,
        partial(build.trained, run),
        build.corpus(run.config),
        build.tokenizer(run.config),
        cfg.benchmark,
        cfg.controls,
        folder=cfg.benchmark_root,
        batch_size=cfg.batch_size,
        max_new_tokens=cfg.max_new_tokens,
        precision=cfg.precision,
        device=cfg.device,
        again=cfg.again,
        flips=cfg.flips,
    )


if __name__ == "__main__":
    script(main, "evaluate")
