"""A conversation with exported files, answered by llama.cpp: in the terminal, or on a page in a browser."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from mvlm.chat import converse
from mvlm.export.engine import LOOPBACK, Engine, EngineError
from mvlm.export.pair import Pair

PAGE = Path(__file__).with_name("page")
"""Shown where a build of llama.cpp has no page of its own."""


class Conversation:
    """One picture, one question at a time, as `mvlm.chat.Chat`.

    Args:
        address: of a llama.cpp server.
    """

    def __init__(self, address: str, pair: Pair, max_new_tokens: int = 128) -> None:
        self.address, self.pair, self.max_new_tokens = address, pair, max_new_tokens
        self.picture: bytes | None = None

    def look(self, image: str | Path | None) -> None:
        """Look at a picture file; the following questions are about it. None: talk without one."""
        self.picture = None if image is None else self.pair.fit(image)

    def stream(self, question: str) -> Iterator[str]:
        """The answer, greedily, in pieces of text.

        Raises:
            EngineError: the server refused.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if self.picture:
            url = f"data:image/png;base64,{base64.b64encode(self.picture).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        greedy = {
            "temperature": 0,
            "top_k": 1,
            "repeat_penalty": 1.0,
            "max_tokens": self.max_new_tokens,
            "stream": True,
        }
        asked = json.dumps({"messages": [{"role": "user", "content": content}], **greedy}).encode()
        request = urllib.request.Request(
            f"{self.address}/v1/chat/completions", asked, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as events:
                for line in events:
                    word, _, rest = line.decode().strip().partition(": ")
                    if word == "error" or (word == "data" and '"error"' in rest[:10]):
                        raise EngineError(f"llama.cpp's server refused: {rest}")
                    if word == "data" and rest != "[DONE]" and (choices := json.loads(rest)["choices"]):
                        yield choices[0]["delta"].get("content") or ""
        except urllib.error.HTTPError as error:
            raise EngineError(f"llama.cpp's server refused: {error.read().decode(errors='replace')}") from None


def terminal(cfg: DictConfig) -> None:
    """What conf/chat.yaml says, answered by llama.cpp."""
    pair, engine = Pair.find(cfg.gguf), Engine.of(cfg)
    if warning := pair.warning(engine.name):
        Console().print(f"[bold yellow]{warning}[/]")
    with engine.serve(pair.language, pair.mmproj, context=pair.context) as (address, _):
        converse(Conversation(address, pair, cfg.max_new_tokens), cfg.image, cfg.prompt)


def browser(cfg: DictConfig) -> None:
    """llama.cpp's server and its page, or ours if it has none, until Ctrl-C."""
    pair, engine, say = Pair.find(cfg.gguf), Engine.of(cfg), Console(soft_wrap=True).print
    if cfg.host not in (LOOPBACK, "localhost", "::1"):
        say(
            f"[bold yellow]host={cfg.host}: everybody who reaches this machine can use the model; no password is asked for.[/]"
        )
    if warning := pair.warning(engine.name):
        say(f"[bold yellow]{warning}[/]")
    if (look := pair.about.get("pictures")) and look["mode"] != "letterbox":
        say(
            f"[bold yellow]Trained on pictures of mode {look['mode']}; a browser's pictures are fitted by llama.cpp, which does it "
            "otherwise. The terminal (serve=false) shows them as trained.[/]"
        )
    where = {"host": cfg.host, "port": cfg.port, "context": pair.context}
    with suppress(KeyboardInterrupt), ExitStack() as open_now:
        serve = partial(engine.serve, pair.language, pair.mmproj, **where)
        address, lasting = open_now.enter_context(serve())
        if not _has_page(address):
            open_now.close()
            address, lasting = open_now.enter_context(serve(page=PAGE))
        say(f"{pair.language.name} answers at {address} (Ctrl-C ends it)")
        for _ in lasting:
            pass
    say("ended")


def _has_page(address: str) -> bool:
    """Whether this llama.cpp brings a page (packed alone: it refuses to unpack it)."""
    request = urllib.request.Request(f"{address}/", headers={"Accept-Encoding": "gzip"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.headers.get_content_type() == "text/html"
    except urllib.error.HTTPError:
        return False
