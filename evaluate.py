"""Answer and score the benchmarks for a run folder.

    python evaluate.py run=runs/pocket-ldpv2-v2-unfreeze_llm-s0
    python evaluate.py run=<folder> benchmark=[gqa,pope] controls=[]
    python evaluate.py run=<folder> benchmark_root=/data/benchmarks      the real files, laid out as each benchmark's page says
    python evaluate.py run=<folder> protocol=harness                     by lmms-eval's rules, into files of its own
    python evaluate.py run=<folder> flips=true                           how many answers depend on being asked one at a time
    torchrun --nproc-per-node 8 evaluate.py run=<folder>                 on eight GPUs; on any other number, it goes on

Answers already stored are kept, so an interrupted evaluation goes on and scoring again needs seconds and no model.
"""

from __future__ import annotations

from mvlm.cli import imports, script


def main(cfg) -> None:
    with imports():
        from functools import partial

        from mvlm import build, score
        from mvlm.benchmark.ranks import join
        from mvlm.run import Run

    run = Run.find(cfg.run)
    join()
    files, words = build.corpus(run.config), build.tokenizer(run.config)
    asked = ("protocol", "any_version", "batch_size", "max_new_tokens", "precision", "device", "again", "flips")
    how = {"folder": cfg.benchmark_root} | {key: cfg[key] for key in asked}
    score.run(run, partial(build.trained, run), files, words, cfg.benchmark, cfg.controls, **how)


if __name__ == "__main__":
    script(main, "evaluate")
