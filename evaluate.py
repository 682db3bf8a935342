"""Answer and score the benchmarks for a run folder.

    python evaluate.py run=runs/pocket-ldpv2-v2-unfreeze_llm-s0
    python evaluate.py run=<folder> benchmark=[gqa,pope] controls=[]
    python evaluate.py run=<folder> benchmark_root=/data/benchmarks      the real files, laid out as each benchmark's page says
    python evaluate.py run=<folder> protocol=harness                     by lmms-eval's rules, into files of its own

Answers already stored are kept, so an interrupted evaluation goes on and scoring again needs no time.
"""

from __future__ import annotations

from mvlm.cli import script


def main(cfg) -> None:
    from mvlm import build, score
    from mvlm.run import Run

    run = Run.find(cfg.run)
    files = build.corpus(run.config)
    asked = {"folder": cfg.benchmark_root, "protocol": cfg.protocol, "any_version": cfg.any_version}
    score.opened(run.config, cfg.benchmark, files, **asked)  # what is wrong there is told before the model is loaded
    words, limits = build.tokenizer(run.config), {"batch_size": cfg.batch_size, "max_new_tokens": cfg.max_new_tokens}
    score.run(run, build.trained(run), files, words, cfg.benchmark, cfg.controls, **asked, **limits)


if __name__ == "__main__":
    script(main, "evaluate")
