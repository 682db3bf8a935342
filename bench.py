"""Measure speed: ours beside a peer, in turn.

    python bench.py target=evaluate run=runs/pocket-ldpv2-v2-unfreeze_llm-s0          the benchmark loop beside generate()
    python bench.py target=evaluate precision=float32 questions=24                    the pretrained parts, answers equal to the letter
    python bench.py target=train projector=pw2                                        a training step beside transformers' Trainer and LLaVA
    python bench.py target=start                                                      help, configuration, first step of a training
    python bench.py target=soak                                                       a long training and a long sweep: what grows
    python bench.py target=index                                                      2.4 million annotations beside json.load
    python bench.py target=decode model=1.7b                                          256 tokens beside generate() and the memory's limit
    python bench.py target=device models=[1.7b:ldpv2,1.7b:pw2] threads=1              the paper's Table 5, in llama.cpp
    python bench.py target=device models=[runs/<run>/gguf/q4_k] llama_cpp=<build folder> gpu_layers=99

What was measured is printed and kept as a file in `out`, with commit, versions and hardware.
"""

from __future__ import annotations

from mvlm.cli import script


def main(cfg) -> None:
    import json
    from importlib import import_module
    from pathlib import Path
    from pkgutil import iter_modules

    from mvlm import bench
    from mvlm.run import manifest, write_json

    targets = sorted(module.name for module in iter_modules(bench.__path__))
    if cfg.target not in targets:
        raise ValueError(f"target={cfg.target}: there is no such target (there are: {', '.join(targets)})")
    measured = import_module(f"mvlm.bench.{cfg.target}").run(cfg)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    about = manifest()
    path = out / f"{cfg.target}-{about['commit'][:7] or 'nocommit'}{'-changed' if '+' in about['commit'] else ''}.json"
    earlier = json.loads(path.read_text())["measured"] if path.exists() else []
    write_json(path, about | {"measured": [*earlier, measured]})
    print(f"kept in {path}")


if __name__ == "__main__":
    script(main, "bench")
