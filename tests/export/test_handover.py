"""From a run folder to the folder that goes to the device: whole and proven, or nothing under a final name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from random import Random
from signal import SIGKILL
from time import monotonic, sleep

import pytest
import torch

from mvlm import build, score
from mvlm.benchmark.evaluate import evaluate
from mvlm.export import container, handover, vision
from mvlm.export import engine as far
from mvlm.export.class_token import has_class_token
from mvlm.export.engine import Engine
from mvlm.export.pair import Pair
from mvlm.run import file_hash, write_json

from .conftest import REFERENCE, names

ROOT = Path(__file__).parents[2]


def test_a_run_becomes_a_folder(engine, configure, run_of):
    run = run_of()
    out = handover.export(configure(f"run={run.folder}", "quant=q4_0", page="export"))
    assert out == run.folder / "gguf" / "q4_0" and names(out.parent) == {"q4_0"}
    files = {"language": "small-q4_0.gguf", "mmproj": "mmproj-small-f16.gguf"}
    assert names(out) == {*files.values(), "manifest.json", "README.md", "jetson.sh"}
    about = json.loads((out / "manifest.json").read_text())
    for role, name in files.items():
        told = about["files"][role]
        assert told == {"name": name, "bytes": (out / name).stat().st_size, "sha256": file_hash(out / name)}
    assert about["proven"] and [parity["quant"] for parity in about["parity"]] == ["f16", "q4_0"]
    assert all(parity["passed"] for parity in about["parity"]) and about["engine"].startswith("xllamacpp ")
    weights = run.folder / "finetune" / "model.safetensors"
    assert about["from"]["weights_sha256"] == {"model.safetensors": file_hash(weights)}
    assert about["from"]["config"]["model"]["grid"] == 24
    assert about["matrices"] == {"Q4_0": 15, "Q8_0": 1}
    vision.check_file(out / files["mmproj"], out / files["language"])
    card = (out / "README.md").read_text()
    assert "| q4_0 |" in card and "never run on an Orin" in card and about["files"]["language"]["sha256"][:16] in card
    subprocess.run(["bash", "-n", out / "jetson.sh"], check=True)
    # A second time: the old folder is replaced as a whole.
    (out / "old").touch()
    handover.export(configure(f"run={run.folder / 'finetune'}", "quant=q4_0", page="export"))
    assert names(out) == {*files.values(), "manifest.json", "README.md", "jetson.sh"}
    again = json.loads((out / "manifest.json").read_text())
    assert again["files"] == about["files"], "the same weights make the same files, byte for byte"


@pytest.mark.slow  # ten exports
def test_killed_at_any_moment_an_export_is_whole_or_not_there(engine, configure, run_of):
    """Eight kills at moments drawn by lot. What was there before stays whole, llama.cpp's process ends with ours, and a repetition
    finds nothing in its way and writes the same bytes."""
    run = run_of()
    cfg = configure(f"run={run.folder}", "quant=q4_0", page="export")
    out = run.folder / "gguf" / "q4_0"

    def begin() -> int:
        if (child := os.fork()) == 0:
            os.setsid()  # one group with what it starts
            try:
                handover.export(cfg)
                os._exit(0)
            finally:
                os._exit(1)
        return child

    def files() -> dict[str, str]:
        told = json.loads((out / "manifest.json").read_text())["files"].values()
        assert {one["name"]: one["sha256"] for one in told} == {p.name: file_hash(p) for p in out.glob("*.gguf")}
        return {one["name"]: one["sha256"] for one in told}

    began = monotonic()
    assert os.waitpid(begin(), 0)[1] == 0
    took, whole, draw, left = monotonic() - began, files(), Random(0), set()
    for _ in range(8):
        child = begin()
        sleep(draw.uniform(0.1, 0.95) * took)
        os.kill(child, SIGKILL)
        os.waitpid(child, 0)
        until = monotonic() + 20
        with pytest.raises(ProcessLookupError):
            while monotonic() < until:
                os.killpg(child, 0)
                sleep(0.1)
        assert files() == whole
        left |= names(out.parent)
    assert left > {"q4_0"}, "no kill came in time to leave anything behind"
    assert os.waitpid(begin(), 0)[1] == 0
    assert files() == whole and names(out.parent) == {"q4_0"}


def test_killed_between_two_names_the_old_export_comes_back(tmp_path):
    """The one moment at which neither has its name."""
    out, old = tmp_path / "q4_0", tmp_path / "q4_0.old"
    old.mkdir()
    (old / "manifest.json").write_text("{}")
    with pytest.raises(RuntimeError, match="again"), handover.aside(out, 0):
        raise RuntimeError("killed again")
    assert names(tmp_path) == {"q4_0"} and names(out) == {"manifest.json"}


def test_a_failed_gate_leaves_no_name(engine, configure, run_of, monkeypatch):
    run = run_of()
    true = vision.metadata
    monkeypatch.setattr(
        vision, "metadata", lambda *words: {k: v for k, v in true(*words).items() if k != "clip.vision.feature_layer"}
    )
    with pytest.raises(ValueError) as told:
        handover.export(configure(f"run={run.folder}", page="export"))
    assert "does not compute what PyTorch does" in str(told.value)
    assert "f16: the image embeddings of picture 1 are" in str(told.value)
    assert names(run.folder / "gguf") == {"f16.failed"}
    assert names(run.folder / "gguf" / "f16.failed") == {"language-f16.gguf", "mmproj-f16.gguf", "parity.json"}
    monkeypatch.undo()


def test_without_an_engine_nothing_is_called_proven(configure, run_of, monkeypatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    run = run_of()
    with monkeypatch.context() as patch:
        patch.setattr(far, "version", missing)
        for words in ((), ("gate=false", "quant=q4_k")):
            with pytest.raises(ValueError, match=r"there is no llama.cpp here"):
                handover.export(configure(f"run={run.folder}", *words, page="export"))
        assert names(run.folder) == {"config.yaml", "finetune"}
        out = handover.export(configure(f"run={run.folder}", "gate=false", page="export"))
    assert {"small-f16.unproven.gguf", "mmproj-small-f16.unproven.gguf"} <= names(out)
    about = json.loads((out / "manifest.json").read_text())
    assert not about["proven"] and about["parity"] == [] and about["engine"] is None
    assert "these files were never run" in (out / "README.md").read_text()


def test_what_llama_cpp_has_not_is_refused_before_anything_is_written(configure, run_of):
    run = run_of("projector.pool=1")
    with pytest.raises(ValueError, match=r"llama.cpp has no LDPv2 with pool=1"):
        handover.export(configure(f"run={run.folder}", "gate=false", page="export"))
    assert names(run.folder) == {"config.yaml", "finetune"}


@pytest.mark.parametrize(
    "words, told",
    [
        (("quant=q5_k",), r"quant=q5_k: there is no such type \(there are: f16, q8_0, q4_0, q4_k\)"),
        (("gate=false", "scores=true"), r"scores of unproven files"),
    ],
)
def test_words_that_make_no_sense(configure, tmp_path, words, told):
    with pytest.raises(ValueError, match=told):
        handover.export(configure(f"run={tmp_path}", *words, page="export"))


def test_a_class_token_is_told_on_the_files(engine, configure, run_of, capsys):
    """Whichever order the build at hand has: most can't run these files, which say so in their names, on the card and in the script."""
    run = run_of("model.module.vision.class_token=true")
    assert has_class_token(build.trained(run).vision)
    out = handover.export(configure(f"run={run.folder}", page="export"))
    about = json.loads((out / "manifest.json").read_text())
    (order,) = {parity["class_token"] for parity in about["parity"]}
    assert about["needs a mended llama.cpp"] and order in ("faithful", "misordered")
    assert about["files"]["mmproj"]["name"].endswith("f16.needs-mended-llama.cpp.gguf")
    card = (out / "README.md").read_text()
    assert "Not for a llama.cpp as it comes" in card and ("proven with one that orders rightly" in card) == (
        order == "faithful"
    )
    assert "sed -i" in (out / "jetson.sh").read_text()
    assert ("misplaces the class token" in capsys.readouterr().out) == (order == "misordered")
    warning = Pair.find(out).warning(Engine().name)
    assert (warning is None) == (order == "faithful") and "misplaces" in Pair.find(out).warning("another llama.cpp")
    words = (f"run={run.folder}", "benchmark=[pope]", "scores=true", "max_new_tokens=1")
    about = json.loads((handover.export(configure(*words, page="export")) / "manifest.json").read_text())
    assert (about["scores"] is None) == (order == "misordered"), "what sees next to nothing is no score"


@pytest.mark.parametrize(
    "kind", ["ldpnetv2", *(pytest.param(k, marks=pytest.mark.slow) for k in ("ldpnet", "mlp2x_gelu"))]
)
def test_a_released_checkpoint(engine, configure, tmp_path, monkeypatch, kind):
    """The three kinds of released models, at toy size: CLIP with its class token, sentencepiece, pictures padded first."""
    shutil.copytree(REFERENCE / "checkpoints" / kind, tmp_path / kind)
    monkeypatch.chdir(REFERENCE)  # where `mm_vision_tower` leads
    out = handover.export(configure(f"run={tmp_path / kind}", "quant=q8_0", page="export"))
    about = json.loads((out / "manifest.json").read_text())
    assert about["template"] == "v1" and about["pictures"]["mode"] == "pad"
    assert all(parity["passed"] for parity in about["parity"])
    assert any("Give it pictures fitted already, 336x336 px" in note for note in about["notes"])


@pytest.mark.slow  # answers two benchmarks twice
def test_scores_stand_beside_the_runs(engine, configure, run_of):
    """A float16 file answers as PyTorch does, question by question, so the scores are the same."""
    run = run_of()
    cfg = configure(f"run={run.folder}", "benchmark=[gqa,pope]", "scores=true", "max_new_tokens=4", page="export")
    about = json.loads((handover.export(cfg) / "manifest.json").read_text())
    assert all(row["pytorch"] is None for row in about["scores"]["benchmarks"].values()), "not measured yet"
    files, words = build.corpus(run.config), build.tokenizer(run.config)
    found = score.benchmarks(cfg.benchmark, files.benchmarks)
    model = build.trained(run)
    results = evaluate(
        model, found, run.folder / "answers", max_new_tokens=4, **build.asking(run.config, words, lambda: model)
    )
    write_json(
        run.folder / "results.json", results | {"questions": {b.name: score.fingerprint(b.questions()) for b in found}}
    )
    out = handover.export(cfg)
    about = json.loads((out / "manifest.json").read_text())
    same = total = 0
    for name, row in about["scores"]["benchmarks"].items():
        assert row["pytorch"] is not None and row["questions"] > 0
        ours, theirs = (
            [json.loads(line) for line in (folder / "answers" / f"{name}.jsonl").read_text().splitlines()]
            for folder in (run.folder, out)
        )
        same += sum(a["text"] == b["text"] for a, b in zip(ours, theirs, strict=True))
        total += len(ours)
    assert same / total > 0.9, "random weights waver between two tokens now and then, and no more than that"


@pytest.mark.slow
def test_the_command(engine, configure, run_of, nano_cache):
    run = run_of("projector=learnable_pe")
    env = os.environ | {"MVLM_CACHE": str(nano_cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "export.py"), f"run={run.folder}"]
    done = subprocess.run([*command, "quant=q8_0"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout and "q8_0" in done.stdout
    done = subprocess.run([*command, "quant=q9"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: quant=q9: there is no such type")


# ------------------------------------------------------------------------------------------------ whole or not at all


def test_a_format_is_a_file(configure, tmp_path):
    with pytest.raises(ValueError, match=r"format=gguff: there is no such format \(there are: gguf, onnx, released\)"):
        handover.export(configure(f"run={tmp_path}", "format=gguff", page="export"))


def test_what_is_no_export_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is there and no export"), handover.aside(tmp_path / "mine", 0):
        pytest.fail("was filled")
    assert names(tmp_path) == {"mine"} and names(tmp_path / "mine") == {"thesis.tex"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no such thing")])
def test_what_fails_leaves_the_earlier_export(tmp_path, error):
    for text in ("first", "second"):
        with handover.aside(tmp_path / "out", 0) as folder:
            assert names(folder) == set()
            (folder / "manifest.json").write_text(text)
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "half").touch()  # of an export that was killed
    with pytest.raises(type(error)), handover.aside(tmp_path / "out", 0) as folder:
        assert names(folder) == set()
        (folder / "manifest.json").write_text("third")
        raise error
    assert names(tmp_path) == {"out"} and (tmp_path / "out" / "manifest.json").read_text() == "second"


ONNX = pytest.param(
    ("gate=false", "format=onnx"), marks=pytest.mark.skipif(not find_spec("onnxscript"), reason="no onnxscript here")
)


def free(count: int):
    return lambda path: shutil._ntuple_diskusage(10**12, 10**12 - count, count)


@pytest.mark.parametrize("words", [("gate=false",), ONNX, ("format=released",)])
def test_too_small_a_disk_is_told_before_anything_is_written(configure, run_of, monkeypatch, words):
    run = run_of()
    monkeypatch.setattr(shutil, "disk_usage", free(10**6))
    with pytest.raises(ValueError, match=r"takes about 0.02 GB while it is made and 0.00 GB are free there: make room"):
        handover.export(configure(f"run={run.folder}", *words, page="export"))
    assert names(run.folder) == {"config.yaml", "finetune"}


@pytest.mark.parametrize("words", [("gate=false",), ("format=released",)])
def test_what_is_written_is_no_more_than_was_said(configure, run_of, monkeypatch, words):
    """What is needed is checked against what came to lie there, so that the check before can be believed."""
    said, true = [], handover.aside
    monkeypatch.setattr(handover, "aside", lambda out, needed: said.append(needed) or true(out, needed))
    out = handover.export(configure(f"run={run_of().folder}", *words, page="export"))
    written = sum(path.stat().st_size for path in out.iterdir())
    assert 0.7 * said[0] < written < said[0] + handover.SMALL


FAR = "xllamacpp 1 ended with code 1 over quantise: [Errno 28] No space left on device"
NUMPY = "884736 requested and 483584 written"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(NUMPY), far.EngineError(FAR)], ids=str
)
def test_a_disk_that_fills_up_meanwhile(tmp_path, error):
    told = pytest.raises(ValueError, match=r"the disk is full.*takes about 3.02 GB .* are free there")
    with told, handover.aside(tmp_path / "out", 3 * 10**9) as folder:
        (folder / "half").write_bytes(b"half")
        raise error
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "words, writer",
    [
        (("gate=false",), (container.gguf.GGUFWriter, "write_tensor_data")),
        pytest.param(*ONNX.values, (torch.onnx, "export"), marks=ONNX.marks),
        (("format=released",), (shutil, "copyfile")),
    ],
)
def test_whoever_writes_when_the_disk_is_full(configure, run_of, monkeypatch, words, writer):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = run_of()
    monkeypatch.setattr(*writer, full)
    with pytest.raises(ValueError, match=r"the disk is full, nothing is kept"):
        handover.export(configure(f"run={run.folder}", *words, page="export"))
    assert not any(path.is_file() for name in ("gguf", "onnx", "released") for path in run.folder.rglob(f"{name}*/**"))
