"""llama.cpp in a process of its own: what it says arrives, and what ends it is told."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from mvlm.export import engine as near
from mvlm.export import far, gate, vision
from mvlm.export.container import vector
from mvlm.export.engine import Engine, EngineError


def test_without_an_engine_it_says_so(monkeypatch, bench, tmp_path):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(near, "version", missing)
    files = bench.write(tmp_path)
    with pytest.raises(EngineError, match=r"there is no llama.cpp here .* pip install xllamacpp==.* gate=false"):
        Engine().look(*files, gate.pictures(96))
    with pytest.raises(EngineError):
        bench.gate().check(*files)


def test_a_file_that_ends_the_process_is_told_and_ours_goes_on(engine, bench, tmp_path, monkeypatch):
    """The check is left out, as if llama.cpp had found a new reason."""
    spoilt = bench.write(
        tmp_path,
        vision_tensors=lambda ts: [vector(t.name, t.value) if "peg.0.weight" in t.name else t for t in ts],
    )
    monkeypatch.setattr(vision, "check_file", lambda *files: None)
    with pytest.raises(EngineError, match=r"xllamacpp \S+ was ended by signal 6 over look: .*GGML_ASSERT"):
        Engine().look(*spoilt, gate.pictures(96))


def test_what_the_server_refuses_is_told(engine, bench, tmp_path):
    ask = gate.prompt(bench.talk, "x" * 500, None)
    with pytest.raises(EngineError, match=r"ended with code 1 over ask: the server refused /completion: .*context"):
        list(Engine().ask(*bench.write(tmp_path), [ask], limit=2, context=256))


def test_a_question_at_a_time_and_nobody_need_wait_for_the_rest(engine, bench, tmp_path):
    asked = [gate.prompt(bench.talk, "What?", picture) for picture in (*gate.pictures(96), None)]
    files = bench.write(tmp_path)
    said = list(Engine().ask(*files, asked, limit=4))
    assert len(said) == 4 and all(
        len(one.prompt) == (1 if ask.picture is None else 2) for ask, one in zip(asked, said, strict=True)
    )
    assert next(iter(Engine().ask(*files, asked, limit=4))) == said[0]


def test_a_library_of_another_layout_is_not_used_blindly(engine, monkeypatch):
    """Where the defaults do not stand where they are looked for, nothing is set and nothing is called."""

    class Other:
        def __getattr__(self, name: str):
            assert name in ("mtmd_context_params_default", "mtmd_default_marker")
            return Function(far._ImageParams() if name.endswith("params_default") else b"<__media__>")

    class Function:
        def __init__(self, value) -> None:
            self.value = value

        def __call__(self):
            return self.value

    monkeypatch.setattr(far, "_library", lambda task: Other())
    with pytest.raises(SystemExit, match=r"its C functions are others than those of 2026.10.11549: take that version"):
        next(far._look({}))


@pytest.mark.parametrize(
    "ids, kept, at",
    [
        ([7, 8, 9], [7, 8, 9], [0, 1, 2]),
        ([7, 8, 9], [7, 9], [0, None, 1]),  # 8 ended within a character
        ([7, 7, 9], [7, 9], [None, None, 1]),  # whichever 7 it was
        ([7, 8, 7, 9], [8, 9], [None, 0, None, 1]),
        ([7, 8], [], [None, None]),
    ],
)
def test_log_probabilities_find_their_steps(ids, kept, at):
    tops = [(token, {str(number): -1.0}) for number, token in enumerate(kept)]
    assert near._at_steps(ids, tops) == [None if place is None else {place: -1.0} for place in at]


def test_a_build_of_ones_own_must_be_whole(tmp_path):
    """A folder without the programs, and one whose server is a program that ends at once."""
    with pytest.raises(
        EngineError, match=r"llama_cpp=.* has no llama-server and no libmtmd.so: name the folder build/bin"
    ):
        _ = Engine(tmp_path).name
    for name in ("llama-server", "libmtmd.so"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'version: 1 (abc)'\nexit 3\n")
        (tmp_path / name).chmod(0o755)
    assert Engine(tmp_path).name == "llama.cpp 1 (abc), own build"


def test_a_server_that_ends_while_it_loads_is_told(bench, tmp_path):
    files = bench.write(tmp_path)
    for name in ("llama-server", "libmtmd.so"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 3\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(
        EngineError,
        match=r"of an unknown version, own build ended with code 1 over ask: llama-server ended with code 3",
    ):
        list(Engine(tmp_path).ask(*files, [gate.prompt(bench.talk, "What?", None)], limit=1))


@pytest.mark.skipif("MVLM_LLAMA_CPP" not in os.environ, reason="MVLM_LLAMA_CPP names no build of llama.cpp")
def test_a_build_of_ones_own_answers_like_the_package(engine, bench, tmp_path):
    own = gate.Gate(bench.model, bench.words, bench.talk, bench.look, Engine(Path(os.environ["MVLM_LLAMA_CPP"])))
    parity = own.check(*bench.write(tmp_path))
    assert parity.passed, parity.faults
