"""A trained model as two GGUF files that llama.cpp runs, proven equal to PyTorch before they get their names.

language.py      the language model's file             tokenizer.py     its vocabulary and chat template
vision.py        tower and projector, the `mmproj`     class_token.py   the one order that builds of llama.cpp disagree on
container.py     a GGUF file, written and read         quantise.py      fewer bits, by llama.cpp's own code
engine.py        llama.cpp, in a process of its own    gate.py          its answers beside PyTorch's
handover.py      the folder that goes to the device    card.py          what is told about it
scores.py        the benchmarks, answered by llama.cpp
"""
