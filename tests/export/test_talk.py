"""A conversation with exported files: in the terminal, and on both pages in a headless browser."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

from mvlm.chat import Chat, converse
from mvlm.data.image import PictureError
from mvlm.export import gate
from mvlm.export.engine import Engine, EngineError
from mvlm.export.pair import Pair
from mvlm.export.talk import PAGE, Conversation

from .conftest import Bench, fitted, lively, llama, small

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def speaker(bench) -> Bench:
    """Says printable characters alone, and of those that were tried one that hardly ever wavers between two."""
    language = lively(llama(), 8)
    printable = {bench.words.encode(chr(code))[0] for code in range(32, 127)}
    with torch.no_grad():
        language.lm_head.weight[[i not in printable for i in range(language.config.vocab_size)]] = 0
    return bench.with_model(small(language=language))


@pytest.fixture(scope="module")
def folder(speaker, tmp_path_factory) -> Path:
    """A pair of files and a picture."""
    folder = tmp_path_factory.mktemp("pair")
    speaker.write(folder)
    (folder / "wide.png").write_bytes(gate.pictures(96)[1])
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """Where llama.cpp answers with these files and shows our page."""
    pair = Pair.find(folder)
    with Engine().serve(pair.language, pair.mmproj, context=pair.context, page=PAGE) as (address, _):
        yield address, pair


def test_the_terminal_says_what_pytorch_says(engine, server, speaker, folder, capsys, monkeypatch):
    """The picture is shown fitted to both, as they resize to a grey level."""
    address, pair = server
    b = speaker
    b.look.fit(Image.open(folder / "wide.png")).save(folder / "fitted.png")
    ours, theirs = Chat(b.model, b.words, b.talk, b.look, 8), Conversation(address, pair, 8)
    said = []
    for chat in (ours, theirs):
        for image in (folder / "fitted.png", None):
            typed = iter(["What is in the picture?", "Why?", ""])
            monkeypatch.setattr("builtins.input", lambda prompt, typed=typed: next(typed))
            converse(chat, image, None)
        said.append(capsys.readouterr().out.splitlines())
    assert said[0] == said[1]
    assert len(set(said[0])) == 4, "questions and pictures change what is said"


def test_pictures_are_fitted_as_the_model_was_trained(folder, tmp_path):
    pair, wide = Pair.find(folder), folder / "wide.png"
    assert Image.open(wide).tobytes() == Image.open(_written(pair.fit(wide), tmp_path)).tobytes()
    look = {"size": 96, "mode": "pad", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    padded = Pair(pair.language, pair.mmproj, {"pictures": look})
    ours = fitted(mode="pad").fit(Image.open(wide))
    assert Image.open(_written(padded.fit(wide), tmp_path)).tobytes() == ours.tobytes()
    with pytest.raises(PictureError, match="this is not a picture"):
        pair.fit(pair.language)


def _written(file: bytes, folder: Path) -> Path:
    (folder / "picture.png").write_bytes(file)
    return folder / "picture.png"


def test_what_is_no_pair_is_told(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"must hold one language model and one mmproj .*holds no file that ends in .gguf"
    ):
        Pair.find(tmp_path)
    for name in ("language.gguf", "mmproj.gguf"):
        shutil.copy(folder / name, tmp_path)
    shutil.copy(folder / "language.gguf", tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"holds language.gguf, mmproj.gguf, other.gguf"):
        Pair.find(tmp_path)
    size = (tmp_path / "mmproj.gguf").stat().st_size
    files = {r: {"name": f"{r}.gguf", "bytes": (tmp_path / f"{r}.gguf").stat().st_size} for r in ("language", "mmproj")}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    assert Pair.find(tmp_path).mmproj == tmp_path / "mmproj.gguf", "the manifest names the two"
    with (tmp_path / "mmproj.gguf").open("rb+") as file:
        file.truncate(size - 1000)
    with pytest.raises(ValueError, match=rf"mmproj.gguf has {size - 1000:,} bytes and .*manifest.json says {size:,}"):
        Pair.find(tmp_path)


def test_the_server_is_for_this_machine_alone(server):
    address, _ = server
    assert address.startswith("http://127.0.0.1:")
    port = int(address.rsplit(":", 1)[1])
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]
    assert [place for place in listening if place.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    request = urllib.request.Request(f"{address}/v1/models", headers={"Origin": "http://elsewhere.example"})
    with urllib.request.urlopen(request) as answer:
        assert answer.headers.get("Access-Control-Allow-Origin") in (None, ""), "no page from elsewhere may read it"
    for path in ("/slots", "/../language.gguf", "/%2e%2e/language.gguf"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(address + path)


def test_a_taken_port_is_told(folder):
    pair = Pair.find(folder)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(EngineError, match=rf"port={port} of 127.0.0.1 can't be opened"),
            Engine().serve(pair.language, pair.mmproj, context=512, port=port),
        ):
            pass


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    driver = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (Debian, Ubuntu: apt install chromium)")
    quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with driver.sync_playwright() as pw:
        chromium = pw.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield chromium
        chromium.close()


def test_our_page_answers_about_a_picture(server, browser, folder):
    """Any picture that the browser reads; asked again without one, another answer."""
    address, pair = server
    # llama.cpp reads no webp: the page hands on a PNG.
    Image.open(folder / "wide.png").save(folder / "wide.webp", lossless=True)
    page, faults = browser.new_page(), []
    page.on("pageerror", lambda error: faults.append(error))
    page.goto(address)
    chat, said = Conversation(address, pair, 256), {}
    for image in (None, folder / "wide.webp"):
        if image:
            page.get_by_label("picture").set_input_files(image)
            page.get_by_alt_text("wide.webp").wait_for()
        page.get_by_label("question").fill("What is in the picture?")
        page.get_by_role("button", name="Ask").click()
        page.wait_for_function("!document.querySelector('button').disabled && document.querySelector('article')")
        chat.look(image)
        said[image] = page.locator("article span").first.text_content()
        assert said[image] == "".join(chat.stream("What is in the picture?"))
    assert len(set(said.values())) == 2 and faults == []
    page.get_by_label("picture").set_input_files(folder / "language.gguf")
    page.get_by_text("language.gguf is no picture that this browser can read").wait_for()


def test_llama_cpps_own_page_answers_about_a_picture(folder, browser):
    """It keeps its model's settings: greedy, as in the terminal."""
    pair = Pair.find(folder)
    with Engine().serve(pair.language, pair.mmproj, context=pair.context) as (address, _):
        page = browser.new_page()
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(folder / "wide.png")
        page.locator("textarea").first.fill("What is in the picture?")
        with page.expect_response(lambda answer: answer.url.endswith("/v1/chat/completions")) as answered:
            page.keyboard.press("Enter")
        asked = json.loads(answered.value.request.post_data)
        kinds = [part["type"] for part in asked["messages"][-1]["content"]]
        assert answered.value.status == 200 and sorted(kinds) == ["image_url", "text"]
        assert kinds[0] == "image_url", "the picture stands before the question, as in training"
        assert asked.get("temperature") in (None, 0)
        page.get_by_text("t/s").first.wait_for()  # its line under a finished answer


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(folder):
    command = [sys.executable, str(ROOT / "chat.py"), f"gguf={folder}", "serve=true", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        line = next(line for line in running.stdout if "answers at" in line)
        address = line.split("answers at ")[1].split()[0]
        with urllib.request.urlopen(f"{address}/health") as answer:
            assert answer.status == 200
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(90) == 0 and "ended" in running.stdout.read()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{address}/health")
