"""A run folder as two GGUF files that llama.cpp runs, proven equal to PyTorch before they get their names.

    python export.py run=runs/pocket-ldpv2-v2-unfreeze_llm-s0                     float16
    python export.py run=<folder> quant=q4_k                                      4 bits; also q8_0 and q4_0
    python export.py run=<folder> quant=q4_0 scores=true                          the six benchmarks too, answered by llama.cpp
    python export.py run=<released MobileVLM folder> quant=q4_k

Into <run>/gguf/<quant>/: the language model, tower and projector (mmproj), a manifest, a card, a script for a Jetson Orin.
The gate asks llama.cpp and PyTorch the same questions; the exit code is 1 if float16 answers with another token, and the
message says what differs. It needs xllamacpp. What llama.cpp can't compute is refused by name before anything is written.
"""

from __future__ import annotations

from mvlm.cli import script


def main(cfg) -> None:
    from mvlm.export.handover import export

    export(cfg)


if __name__ == "__main__":
    script(main, "export")
