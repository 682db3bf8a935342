"""What SECURITY.md promises of files that come from somebody else, and of one's own secrets."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mvlm import build, page, projector, score, trust
from mvlm.benchmark.evaluate import stored
from mvlm.benchmark.pope import POPE
from mvlm.chat import Chat, converse
from mvlm.export.pair import Pair
from mvlm.model.checkpoint import from_released, save_checkpoint
from mvlm.model.files import read_config, read_tensors
from mvlm.model.vision import Vision
from mvlm.run import Run

ROOT = Path(__file__).resolve().parents[1]


def resolved(cfg: DictConfig) -> DictConfig:
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))


@pytest.fixture
def stranger(configure, tmp_path: Path):
    """`stranger("key", value)`: a run folder, as somebody might send it, in which `key` was changed to that."""

    def changed(key: str | None = None, value=None) -> Run:
        cfg = resolved(configure("model=nano"))
        if key is not None:
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        (tmp_path / "theirs").mkdir(exist_ok=True)
        OmegaConf.save(cfg, tmp_path / "theirs" / "config.yaml")
        return Run.find(tmp_path / "theirs")

    return changed


# ------------------------------------------------------------------------------------------------- a run folder


@pytest.mark.parametrize("model", ["nano", "pocket", "1.7b", "3b", "7b"])
def test_what_this_project_writes_may_be_opened(model, configure, tmp_path) -> None:
    for words in ([], ["logger=csv", "trainer=ddp"], ["projector=resampler"], ["projector=pixel_shuffle"]):
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(resolved(configure(f"model={model}", *words))))
        assert Run.find(tmp_path).config == resolved(configure(f"model={model}", *words))


CALL = {"_target_": "os.system", "_args_": ["touch ran"]}


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("model.tokenizer", CALL, "model.tokenizer._target_: os.system"),
        ("model.module.vision.act_layer", [[CALL]], "model.module.vision.act_layer.0.0._target_: os.system"),
        ("corpus.samples.more", [{"a": CALL | {"_partial_": True}}], "corpus.samples.more.0.a._target_: os.system"),
        ("model.module.projector", CALL | {"_recursive_": False}, "model.module.projector._target_: os.system"),
        ("model.module._target_", "mvlm.model.checkpoint.shutil.rmtree", "mvlm.model.checkpoint.shutil.rmtree"),
        ("model.module._target_", "mvlm.projector.pw2.nn.Module.load_state_dict", "mvlm.projector.pw2.nn"),
        ("model.module._target_", "transformers.LlamaForCausalLM.from_pretrained", "LlamaForCausalLM.from_pretrained"),
        ("model.module._target_", "lightning.Trainer", "lightning.Trainer"),
        ("corpus.root", {"_target_": "hydra.utils.instantiate"}, "hydra.utils.instantiate"),
        ("corpus.root._target_", ["os", "system"], r"\['os', 'system'\]"),
        ("_target_", "os.system", "_target_: os.system"),
        ("anything", CALL, "anything._target_: os.system"),
    ],
)  # fmt: skip
def test_a_target_outside_the_list_is_refused(key, value, told, stranger, tmp_path, monkeypatch) -> None:
    """With its key and the cure, before anything is made; by every way in which a folder is opened."""
    monkeypatch.chdir(tmp_path)
    run = stranger(key, value)
    for opened in (lambda: run.config, lambda: build.trained(run), lambda: Chat.open(run.folder)):
        with pytest.raises(ValueError, match=rf"config.yaml: .*{told}.*would be imported and called.*MVLM_ALLOW="):
            opened()
    assert not (tmp_path / "ran").exists()


def test_what_is_named_in_the_environment_is_allowed(stranger, monkeypatch) -> None:
    run = stranger("model.module.projector._target_", "mypackage.deep.Mine")
    for others in ("", ",", "my", "mypackage.deep.Min", "otherpackage"):
        monkeypatch.setenv("MVLM_ALLOW", others)
        with pytest.raises(ValueError, match=r"MVLM_ALLOW=mypackage.deep.Mine before"):
            _ = run.config
    for name in ("mypackage", "mypackage.deep", "otherpackage, mypackage.deep.Mine"):
        monkeypatch.setenv("MVLM_ALLOW", name)
        assert run.config.model.module.projector._target_ == "mypackage.deep.Mine"


def test_a_strangers_results_say_nothing_of_what_is_made(tmp_path) -> None:
    """Its settings are values of the benchmark's own page, and none that asks for something to be filled in."""
    pickled = {"_target_": "numpy.load", "file": "x.npy", "allow_pickle": True, "folder": "/"}
    usual = score.settings_of("sqa", {})
    assert score.settings_of("sqa", {"settings": {"sqa": pickled | {"order": "QCM"}}}) == usual | {"order": "QCM"}
    for order in ("${oc.env:HF_TOKEN}", {"_target_": "os.system"}, 3):
        assert score.settings_of("sqa", {"settings": {"sqa": {"order": order}}}) == usual
    for name in ("nothing", "../benchmark/sqa", "/etc/passwd"):
        with pytest.raises(ValueError, match="there is no conf/benchmark"):
            score.settings_of(name, {"settings": {name: pickled}})


def test_ones_own_command_may_name_anything(configure, tmp_path) -> None:
    """What a user types is the user's: it is believed in the process that it was typed for, and again when it is typed again."""
    cfg = configure("model=nano", "projector._target_=mypackage.Mine", f"runs={tmp_path}", "cell=mine")
    for _ in range(2):
        assert Run.open(cfg).config.projector._target_ == "mypackage.Mine"
    with pytest.raises(ValueError, match=r"mypackage\.Mine would be imported"):
        _ = Run.find(tmp_path / "mine").config


def test_ones_own_command_may_name_anything_on_every_device(configure, tmp_path, together) -> None:
    cfg = configure("model=nano", "projector._target_=mypackage.Mine", f"runs={tmp_path}", "cell=mine")
    assert together(2, lambda rank: Run.open(cfg).config.projector._target_, patience=60) == ["mypackage.Mine"] * 2


@pytest.mark.parametrize("value", ["${oc.env:HF_TOKEN}", "${oc.decode:1}", "x ${seed}", "${hydra:runtime.cwd}"])
def test_nothing_is_filled_in_here(value, stranger, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    with pytest.raises(ValueError, match=r"data.images.0: .* asks for something to be filled in here") as told:
        _ = stranger("data.images", [value]).config
    assert "hf_something" not in str(told.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation_internal", "experts_implementation"])
def test_code_of_the_model_hub_is_refused(key, stranger, monkeypatch) -> None:
    """transformers takes `owner/name` there for a kernel to fetch and run."""
    run = stranger(f"model.module.language.config.{key}", {"": "somebody/kernel"})
    with pytest.raises(ValueError, match=r"somebody/kernel is a kernel of the model hub.*MVLM_ALLOW=somebody"):
        _ = run.config
    monkeypatch.setenv("MVLM_ALLOW", "somebody")
    assert run.config.seed == 0


def test_generators_write_into_the_cache_alone(stranger, tmp_path, monkeypatch) -> None:
    """A folder elsewhere is taken if it holds such a cache, as that of one's own earlier run may."""
    there = tmp_path / "elsewhere"
    for key in ("model.tokenizer.root", "corpus.root.root", "corpus.root.svg.root"):
        run = stranger(key, str(there))
        with pytest.raises(ValueError, match=rf"{key}: {there} is where mvlm.* would write.*MVLM_CACHE={there}"):
            _ = run.config
        assert not there.exists()
    (there / "nano").mkdir(parents=True)
    assert run.config.corpus.root.svg.root == str(there)
    fetch = {"_target_": "mvlm.pocket.parts.fetch", "part": "language"}
    for more, told in (
        ({"cache": "/"}, "cache: / is"),
        ({"wheels": "/"}, "wheels"),
        ({"_args_": ["x", "/"]}, "_args_"),
    ):
        with pytest.raises(ValueError, match=told):
            _ = stranger("model.tokenizer", fetch | more).config
    assert stranger("model.tokenizer", fetch).config.model.tokenizer == fetch


def test_what_may_be_named_does_nothing_but_compute() -> None:
    """All that the patterns let through of our own rooms: projectors, and what they are made with. A name that a module
    merely imports can be named, too, so none of these may do more than build a module or hold numbers."""
    for found in iter_modules(projector.__path__):
        module = import_module(f"{projector.__name__}.{found.name}")
        for name, value in vars(module).items():
            if callable(value) and re.fullmatch(trust.TARGETS["projector"], f"{module.__name__}.{name}"):
                harmless = inspect.isclass(value) and issubclass(value, nn.Module | torch.Tensor)
                assert harmless or value.__module__ in ("collections.abc", "typing"), f"{module.__name__}.{name}"


@pytest.mark.parametrize(
    "text, told",
    [
        ("a: [", "no configuration"),
        ("- 1\n- 2", "keys with values are expected"),
        ("a: !!python/object/apply:os.system [touch ran]", "no configuration"),
        ("a: &x [1, 1]\nb: &y [*x, *x]\nc: [*y, *y]", "refers to its own parts"),
        ("a: " + "[" * 5000, "no configuration"),
        ("a: " + "1" * (1 << 20), "1,048,579 bytes"),
        ("a: \xff", "no configuration"),
    ],
)
def test_a_hostile_file_is_told_in_one_line(text, told, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=told) as error:
        _ = Run.find(tmp_path).config
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["{", "[1]", "null", "[" * 100_000])
def test_records_are_json_objects(text, stranger) -> None:
    run = stranger()
    for name, read in (("run.json", lambda: run.facts), ("results.json", run.results)):
        (run.folder / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name} (is no whole JSON file|holds \w+ where a JSON object)"):
            read()


def test_stored_answers_are_texts(tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    for line in ([1], {"id": "1", "prompt": "?", "text": ["<script>"], "stopped": True}, {"id": [1], "prompt": "?"}):
        file.write_text(json.dumps(line) + "\n")
        with pytest.raises(ValueError, match="line 1 is no stored answer"):
            stored(file, [])


# ------------------------------------------------------------------------------------- checkpoints and benchmarks


def test_shards_lie_beside_their_index(tmp_path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "x.safetensors").write_bytes(b"")
    for name in ("../x.safetensors", str(tmp_path / "x.safetensors"), "..", "", ["x"], None):
        index = tmp_path / "there" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match=r"which is not in its folder|is no whole index"):
            read_tensors(tmp_path / "there")


@pytest.mark.parametrize("name", ["../x.gguf", "/x.gguf", "..", "", ["x"], None])
def test_a_manifest_names_files_beside_it(name, tmp_path) -> None:
    (tmp_path / "there").mkdir()
    for file in (tmp_path / "x.gguf", tmp_path / "there" / "x.gguf"):
        file.write_bytes(b"")
    told = tmp_path / "there" / "manifest.json"
    files = {"language": {"name": "x.gguf", "bytes": 0}, "mmproj": {"name": name, "bytes": 0}}
    told.write_text(json.dumps({"files": files}))
    with pytest.raises(ValueError, match=r"its files lie beside it|laid out otherwise"):
        Pair.find(told.parent)
    files["mmproj"]["name"] = "x.gguf"
    look = {"size": 96, "mode": "pad", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    told.write_text(json.dumps({"files": files, "context": 512, "pictures": look}))
    assert Pair.find(told.parent).context == 512
    for wrong in (
        {"context": "512 --path /"},
        {"context": 1 << 40},
        {"pictures": look | {"size": 1 << 30}},
        {"pictures": [1]},
    ):
        told.write_text(json.dumps({"files": files} | wrong))
        with pytest.raises(ValueError, match=r"manifest.json(: context=| is laid out otherwise)"):
            Pair.find(told.parent)


class Runs:
    """Pickled, a command."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_pickle_runs_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Runs()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than plain tensors"):
        read_tensors(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoints_settings_load_nothing_else(tmp_path, configure) -> None:
    """config.json says how to build tower, projector and language model, and must say no more."""
    net = build.model(configure("model=nano"))
    save_checkpoint(net, tmp_path)
    config = read_config(tmp_path)

    def opened(**changed) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        from_released(tmp_path)

    tower = config["mm_vision_arguments"]
    for key in ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        with pytest.raises(ValueError, match=f"the tower's {key} would have timm read a file"):
            opened(mm_vision_arguments=tower | {key: "x.bin"})
        with pytest.raises(ValueError, match=key):
            Vision(**tower, **{key: None})
    for kind in ("os.system", "mvlm.projector.pw2.nn.Module", "mvlm.run.Run"):
        with pytest.raises(ValueError, match="mm_projector_type"):
            opened(mm_projector_type=kind)
    with pytest.raises(ValueError, match="mm_vision_tower is a name"):
        opened(mm_vision_tower={"a": 1})
    opened(attn_implementation="somebody/kernel", _attn_implementation="somebody/kernel", auto_map={"AutoModel": "x.Y"})
    for text in ("[1]", "{", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json (is no whole JSON|holds no settings)"):
            from_released(tmp_path)


@pytest.mark.parametrize("outside", ["../../private.jpg", "/private.jpg", "{tmp}/private.jpg"])
def test_a_benchmark_shows_no_picture_from_elsewhere(outside, tmp_path) -> None:
    """It would stand in the pages of answers and in the table that W&B gets."""
    (tmp_path / "private.jpg").write_bytes(b"")
    (tmp_path / "pope" / "val2014").mkdir(parents=True)
    line = {"question_id": 1, "image": outside.format(tmp=tmp_path), "text": "Is it?", "label": "yes"}
    for split in ("random", "popular", "adversarial"):
        (tmp_path / "pope" / f"coco_pope_{split}.json").write_text(json.dumps(line | {"question_id": split}))
    with pytest.raises(ValueError, match=r"names the picture .*private.jpg, which lies elsewhere"):
        POPE(tmp_path / "pope").questions()


# --------------------------------------------------------------------------------------- what a model or a file says

SCRIPT = "</li><script>alert(1)</script><img src=x onerror='alert(1)'>\" onload=\"alert(1)"


def test_no_text_becomes_part_of_a_page() -> None:
    """Questions, answers, truths, groups, names of benchmarks, of views, of rows and of folders."""
    shown = page.Shown(SCRIPT, SCRIPT, SCRIPT, {SCRIPT: (SCRIPT, 0.0)}, None, {SCRIPT: SCRIPT})
    scores = page.score_table({SCRIPT: {"none": SCRIPT}})
    curve = page.curve_figure({SCRIPT: [{"step": n, "sight_true": 1.0, "sight_shuffled": 1.0} for n in (1, 2)]})
    made = page.document(SCRIPT, SCRIPT, {SCRIPT: page.gallery([shown], filters=True) + scores + curve})
    told = made.replace(page.SCRIPT, "")
    assert told.count("<script>") == 1 and "<img" not in told and 'onload="' not in told
    assert told.count("&lt;script&gt;") > 8


def test_a_terminal_obeys_no_answer(capsys) -> None:
    class Says:
        def look(self, image) -> None: ...

        def stream(self, question: str):
            yield "\x1b]0;title\x07a\tb\r\x9b2J\nc é"

    converse(Says(), None, "?")
    assert capsys.readouterr().out == "\ufffd]0;title\ufffda\tb\ufffd\ufffd2J\nc é\n"


# ------------------------------------------------------------------------------------------------------ secrets

MARKED = {
    "WANDB_API_KEY": "5ec2e7" * 6 + "5ec2",
    "HF_TOKEN": "hf_MarkedMarkedMarkedMarked",
    "HUGGING_FACE_HUB_TOKEN": "hf_MarkedToo0MarkedToo0",
    "AWS_ACCESS_KEY_ID": "AKIAMARKEDMARKED",
    "AWS_SECRET_ACCESS_KEY": "aws/Marked/Marked/Marked",
}


@pytest.mark.parametrize("name", MARKED)
def test_no_secret_of_the_environment_is_written_down(name, configure, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(name, MARKED[name])
    cfg = configure("model=nano", f"runs={tmp_path}", "cell=x", f"+note=[a,'${{oc.env:{name}}} ']")
    with pytest.raises(ValueError, match=rf"note.1 holds a secret \(that of {name}\)") as told:
        Run.open(cfg)
    assert MARKED[name] not in str(told.value) and list(tmp_path.iterdir()) == []


def test_nor_one_that_was_typed(configure, tmp_path) -> None:
    for key in ("logger.settings.api_key", "logger.password", "my.aws_secret_access_key"):
        cfg = configure("model=nano", f"runs={tmp_path}", "cell=x", f"+{key}=TypedTyped")
        with pytest.raises(ValueError, match=rf"{key} holds a secret, and .*WANDB_API_KEY") as told:
            Run.open(cfg)
        assert "TypedTyped" not in str(told.value) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_whole_run_holds_no_secret(nano_cache, tmp_path) -> None:
    """Trained, scored, swept and exported with marked secrets in the environment: no file has one, W&B's own among them, and nothing
    that was printed."""
    env = os.environ | MARKED | {"MVLM_CACHE": str(nano_cache), "OMP_NUM_THREADS": "1"}
    run = "runs/nano-ldpv2-v1-freeze_llm-s0"
    printed = b""
    for words in (
        ["train.py", "-m", "model=nano", "data=v1", "strategy=freeze_llm", "projector=ldpv2"],
        ["export.py", f"run={run}", "format=released"],
        ["evaluate.py", f"run={run}", "benchmark=[pope]", "protocol=harness"],
        ["evaluate.py", "run=nowhere"],
    ):
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False, timeout=500)
        assert (done.returncode == 0) == (words[1] != "run=nowhere"), done.stderr[-2000:]
        printed += done.stdout + done.stderr
    files = [file for folder in (tmp_path, nano_cache) for file in folder.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"config.yaml", "run.json", "log.txt", "README.md", "manifest.json", "results-harness.json"} <= names
    assert any(name.endswith(".wandb") for name in names)
    for name, secret in MARKED.items():
        assert secret.encode() not in printed, name
        assert [file for file in files if secret.encode() in file.read_bytes()] == [], name
