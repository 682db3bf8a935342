"""A conversation with exported files: in the terminal, and on both pages in a headless browser."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
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
    with urllib.request.urlopen(f"{address}/v1/models") as answer:
        assert answer.headers.get("Access-Control-Allow-Origin") in (None, ""), "no page from elsewhere may read it"
    for path in ("/slots", "/../language.gguf", "/%2e%2e/language.gguf", "/%2e%2e%5clanguage.gguf", "//etc/passwd"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(address + path)


def asked(address: str, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, str]:
    """What the server says to a request, and with which code."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, content, kind)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def about(url: str, kind: str = "image_url") -> dict[str, Any]:
    """A question about a picture."""
    content = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "What is this?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1}


def as_url(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


HELLO = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 1}


def test_pages_of_other_sites_are_refused(server):
    """By where they come from; or by the name they reach us by, for a site can give its own name this machine's address."""
    address, _ = server
    port = address.rsplit(":", 1)[1]
    assert asked(address, HELLO)[0] == asked(address, HELLO, Origin=address)[0] == 200
    assert asked(address, HELLO, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200
    for name in (
        f"elsewhere.example:{port}",
        "127.0.0.1.elsewhere.example",
        "localhost.elsewhere.example",
        "",
        "[",
        "192.0.2.1",
    ):
        code, told = asked(address, HELLO, Host=name)
        assert code == 403 and f"this is {address}" in told
    for origin in (
        "http://elsewhere.example",
        "null",
        f"https://127.0.0.1:{port}",
        "http://127.0.0.1:1",
        f"{address}.example",
    ):
        code, told = asked(
            address, HELLO, Origin=origin, Content_Type="text/plain"
        )  # which a browser sends without asking
        assert code == 403 and "may not use this model" in told


def test_a_picture_comes_along_and_is_not_fetched(server, folder):
    address, _ = server
    wide = as_url((folder / "wide.png").read_bytes())
    assert asked(address, about(wide))[0] == 200
    fetched = []
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.5)
        remote = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/cat.png"
        for url in (
            remote,
            (folder / "wide.png").as_uri(),
            str(folder / "wide.png"),
            "data:text/html,x",
            "data:image/png;base64,A",
        ):
            for path in ("/v1/chat/completions", "/chat/completions", "/apply-template"):
                assert asked(address, about(url), path)[0] == 400, url
        twice = json.dumps(about(wide)).replace(
            '"image_url": {', f'"image_url": {{"url": "{remote}"}}, "image_url": {{'
        )
        assert asked(address, twice.encode())[0] == 200, "of two, the one that was looked at"
        with suppress(TimeoutError):
            fetched.append(elsewhere.accept())
    assert fetched == []
    for kind in ("input_audio", "video_url"):
        assert asked(address, about(wide, kind))[0] == 400


def test_a_request_is_not_too_large(server, folder):
    """Neither what is sent nor what it would become: a picture of 31 kB can stand for a gigabyte of pixels."""
    address, _ = server
    where = ("127.0.0.1", int(address.rsplit(":", 1)[1]))
    start = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    for said, code in (
        (b"Content-Length: 1073741824", 413),
        (b"Transfer-Encoding: chunked", 411),
        (b"Content-Length: -1", 411),
    ):
        with socket.create_connection(where) as line:
            line.sendall(start + said + b"\r\n\r\n")
            assert line.recv(1000).split()[1] == str(code).encode()
    for side, code in ((3000, 200), (8000, 400), (16000, 400)):
        file = io.BytesIO()
        Image.new("1", (side, side)).save(file, "PNG")
        assert len(file.getvalue()) < 200_000 and asked(address, about(as_url(file.getvalue())))[0] == code, side
    for body in (b"{", b"[" * 100_000, b"\xff", b""):
        assert asked(address, body)[0] == 400
    for path in ("/completion", "/props", "/models/load", "/v1/embeddings", "/slots/0?action=save"):
        assert asked(address, HELLO, path)[0] == 404
    assert asked(address, HELLO)[0] == 200, "and it lives"


def test_llama_cpp_behind_it_asks_for_a_key(server):
    """Whoever finds its port can do nothing there."""
    address, _ = server
    told = [(one, one.as_dict(["cmdline"])["cmdline"]) for one in psutil.Process().children()]
    (far,) = (one for one, command in told if command and "mvlm.export.far" in command)
    places = {one.laddr for one in far.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    assert {place.ip for place in places} == {"127.0.0.1"}
    inner = {f"http://127.0.0.1:{place.port}" for place in places} - {address}
    assert len(inner) == 1 and asked(inner.pop(), HELLO)[0] == 401


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
        context = chromium.new_context()
        context.set_default_timeout(180_000)  # of a machine with other things to do
        yield context
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
    # A process in the background, or one of xdist, does not.
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listens
    ) as running:
        try:
            line = next(line for line in running.stdout if "answers at" in line)
            address = line.split("answers at ")[1].split()[0]
            with urllib.request.urlopen(f"{address}/health") as answer:
                assert answer.status == 200
            os.killpg(running.pid, signal.SIGINT)
            assert running.wait(90) == 0 and "ended" in running.stdout.read()
        finally:
            running.kill()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{address}/health")
