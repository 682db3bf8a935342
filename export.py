"""A run folder as files that others run, proven equal to PyTorch before they get their names.

    python export.py run=runs/pocket-ldpv2-v2-unfreeze_llm-s0                     for llama.cpp, in float16
    python export.py run=<folder> quant=q4_k                                      4 bits; also q8_0 and q4_0
    python export.py run=<folder> quant=q4_0 scores=true                          the six benchmarks too, answered by llama.cpp
    python export.py run=<released MobileVLM folder> quant=q4_k
    python export.py run=<folder> format=onnx                                     tower and projector, for TensorRT
    python export.py run=<folder> format=released                                 the released MobileVLM's layout, with a model card

format=gguf, into <run>/gguf/<quant>/: the language model, tower and projector (mmproj), a script for a Jetson Orin. The gate asks
llama.cpp and PyTorch the same questions; it needs xllamacpp. What llama.cpp can't compute is refused by name before anything is
written. format=onnx, into <run>/onnx/: pixels to image tokens, any projector, compared in ONNX Runtime. format=released, into
<run>/released/: weights, config.json and tokenizer, opened anew and compared; chat.py, export.py and lmms-eval take it as run=.

Each has a manifest and a card. The exit code is 1 if what was written computes something else, and the message says what differs.
"""

from __future__ import annotations

from mvlm.cli import script


def main(cfg) -> None:
    from mvlm.export.handover import export

    export(cfg)


if __name__ == "__main__":
    script(main, "export")
