"""Answer and score the benchmarks for a run folder.

    python evaluate.py run=runs/pocket-ldpv2-v2-unfreeze_llm-s0
    python evaluate.py run=<folder> benchmark=[gqa,pope] controls=[]
    python evaluate.py run=<folder> benchmark_root=/data/benchmarks      the real files, laid out as each benchmark's page says

Answers already stored are kept, so an interrupted evaluation goes on and scoring again needs no time.
"""

from __future__ import annotations

from mvlm.cli import script


def main(cfg) -> None:
    from pathlib import Path

    from mvlm import build, score
    from mvlm.run import Run

    run = Run.find(cfg.run)
    if cfg.protocol != "paper":
        raise ValueError(
            f"protocol={cfg.protocol}: there is only protocol=paper, the reference's own prompts and scorers"
        )
    score.run(
        run,
        build.trained(run),
        build.corpus(run.config),
        build.tokenizer(run.config),
        cfg.benchmark,
        cfg.controls,
        folder=Path(cfg.benchmark_root) if cfg.benchmark_root else None,
        batch_size=cfg.batch_size,
        max_new_tokens=cfg.max_new_tokens,
    )


if __name__ == "__main__":
    script(main, "evaluate")
