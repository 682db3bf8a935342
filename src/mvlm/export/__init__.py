"""A trained model as files that others run, proven equal to PyTorch before they get their names.

handover.py      what is exported, and the folder made aside         card.py          what is told about it
format/          a format a file: gguf, onnx, released               gate.py          llama.cpp's answers beside PyTorch's

For gguf, two files that llama.cpp runs:

language.py      the language model's file             tokenizer.py     its vocabulary and chat template
vision.py        tower and projector, the `mmproj`     class_token.py   the one order that builds of llama.cpp disagree on
container.py     a GGUF file, written and read         quantise.py      fewer bits, by llama.cpp's own code
engine.py        llama.cpp, in a process of its own    scores.py        the benchmarks, answered by llama.cpp
talk.py          a conversation with them, in the terminal or on page/
"""
