"""llama.cpp, always in a process of its own: a file that it can't stand ends the process, and that must not be ours.

By default it is the package xllamacpp, a wheel with llama.cpp inside; or a build of one's own, as on a device with a GPU.
Texts and tokens come from its server, as a user of the files would get them; image embeddings, which the server does not
tell, from llama.cpp's C functions in the same library. One thread unless more are asked for: two pools of threads on one
machine wait for each other.

This is the near side. The far one, `python -m mvlm.export.far`, reads one task as a line of JSON, writes a line of JSON an item and
ends when its input does.
"""

from __future__ import annotations

import base64
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PACKAGE, TESTED, BUILD = "xllamacpp", "2026.10.11549", "b11549"
"""The package, the version that this was written with, and the build of llama.cpp in it."""

FAILED = "mvlm failed:"
"""What the far side's last words begin with."""

MARKER = "<__media__>"
"""Where a picture stands in a prompt of llama.cpp's."""

LOOPBACK = "127.0.0.1"


class Said(NamedTuple):
    """llama.cpp's answer to one prompt."""

    ids: list[int]
    stopped: bool
    """False if the limit cut it off."""
    top: list[dict[int, float] | None]
    """At each step, log-probabilities of the likeliest ids; None where the server kept none (within a character)."""
    prompt: list[list[int]]
    """Ids of the prompt's pieces before and after the picture."""
    chat: str
    """The prompt that llama.cpp's own chat writes for the same question."""


class Ask(NamedTuple):
    """One prompt."""

    prompt: str
    """The whole text, MARKER where the picture stands."""
    question: str
    """The question alone, for the chat."""
    picture: bytes | None
    """A PNG file."""


class Timed(NamedTuple):
    """One request with a picture, timed by llama.cpp's server."""

    text_tokens: int
    image_tokens: int
    encode_ms: float
    """The picture through tower and projector, by the time stamps of the server's log."""
    prompt_ms: float
    """From the beginning of the request's work to the first token of the answer, `encode_ms` within it."""
    predicted_ms: float
    """The rest of the answer's tokens: one less than there are, for the first falls out of the prompt."""
    wall_ms: float
    """As the asking side sees it, with unpacking and fitting the picture and HTTP."""
    peak_bytes: int | None
    """Most memory of the server's process, its interpreter and mapped files included, a GPU's not; None where no /proc tells."""
    busy: float | None
    """Processor time that the server's process got, over `wall_ms` times its threads; near 1, or something else ran on the
    machine. None with a GPU, and where no /proc tells."""
    told: dict[str, str | None]
    """From the server's log: its build, what it uses of the processor, layers on a GPU, the tower's backend."""


class EngineError(ValueError):
    """The engine is missing, ended, or refused; the message says which, and what it said last."""


# -------------------------------------------------------------------------------------------------- the near side


@dataclass(frozen=True)
class Engine:
    """A llama.cpp that runs files."""

    build: Path | None = None
    """Folder of a build's programs and libraries (`<llama.cpp>/build/bin`, shared libraries); None takes the package."""
    threads: int | None = 1
    """None leaves it to llama.cpp."""
    gpu_layers: int = 0
    """Layers of the language model on the GPU, and tower and projector too if not 0; the package's wheel has no GPU."""

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> Engine:
        """What a page's keys `llama_cpp`, `threads` and `gpu_layers` say."""
        return cls(cfg["llama_cpp"] and Path(cfg["llama_cpp"]).resolve(), cfg["threads"], cfg["gpu_layers"])

    @cached_property
    def name(self) -> str:
        """Which llama.cpp it is, with its version.

        Raises:
            EngineError: it is not there.
        """
        if self.build is None:
            try:
                return f"{PACKAGE} {version(PACKAGE)}"
            except PackageNotFoundError:
                raise EngineError(
                    f"there is no llama.cpp here to prove the files with: pip install {PACKAGE}=={TESTED}, "
                    "or write them unproven, under names that say so, with gate=false"
                ) from None
        needed = [name for name in ("llama-server", "libmtmd.so") if not (self.build / name).exists()]
        if needed:
            raise EngineError(
                f"llama_cpp={self.build} has no {' and no '.join(needed)}: name the folder build/bin of a llama.cpp that was built "
                "with shared libraries (cmake -DBUILD_SHARED_LIBS=ON, target llama-server)"
            )
        said = subprocess.run([self.build / "llama-server", "--version"], capture_output=True, text=True, check=False)
        told = [line for line in (said.stderr + said.stdout).splitlines() if line.startswith("version:")]
        return f"llama.cpp {told[0].removeprefix('version:').strip() if told else 'of an unknown version'}, own build"

    def look(self, language: Path, mmproj: Path, pictures: Sequence[bytes]) -> list[np.ndarray]:
        """Image embeddings, (M, D) a picture."""
        with tempfile.TemporaryDirectory() as folder:
            out = {"out": str(Path(folder) / "embeddings"), "pictures": [_text(picture) for picture in pictures]}
            return [np.load(name) for name in self._task("look", _files(language, mmproj) | out)]

    def ask(
        self,
        language: Path,
        mmproj: Path,
        prompts: Sequence[Ask],
        *,
        limit: int,
        top: int = 5,
        reuse: bool = False,
        context: int = 2048,
    ) -> Iterator[Said]:
        """Greedy answers, in order.

        Args:
            limit: tokens of an answer.
            top: how many log-probabilities a step.
            reuse: keep what two prompts begin with in common; quicker, and no longer computed each in the same way.
            context: positions for prompt and answer.
        """
        asked = [
            {"prompt": p, "question": q, "picture": _text(picture) if picture else None} for p, q, picture in prompts
        ]
        how = {"asked": asked, "limit": limit, "top": top, "reuse": reuse, "context": context}
        for line in self._task("ask", _files(language, mmproj) | how):
            yield Said(**line | {"top": _at_steps(line["ids"], line["top"])})

    @contextmanager
    def serve(
        self,
        language: Path,
        mmproj: Path,
        *,
        host: str = LOOPBACK,
        port: int = 0,
        context: int,
        page: Path | None = None,
    ) -> Iterator[tuple[str, Iterator[Any]]]:
        """llama.cpp's server for as long as the block lasts.

        Args:
            port: 0 takes a free one.
            page: folder of a page to show; None shows llama.cpp's own, if it has one.

        Yields:
            its address, and an iterator that gives nothing and ends when the server does (with an EngineError).

        Raises:
            EngineError: there is no engine, it refused the files, or the port is taken.
        """
        if port and not _free(host, port):
            raise EngineError(
                f"port={port} of {host} can't be opened, another program may have it: take another, or port=0 for any"
            )
        how = {"host": host, "port": port, "context": context, "page": str(page) if page else None}
        task = self._task("serve", _files(language, mmproj) | how)
        try:
            yield next(task), task
        finally:
            task.close()

    def timed(
        self, language: Path, mmproj: Path, picture: bytes, *, text: int, tokens: int, context: int = 2048
    ) -> Timed:
        """One greedy answer of a fixed length, in a fresh process, after a short one that warms up.

        Args:
            text: tokens of the prompt beside the picture's, made of filler: so prompts are as long whatever the tokenizer.
            tokens: of the answer, which no end of text cuts off.

        Raises:
            EngineError: also if the figures are not those of such a request.
        """
        task = {"picture": _text(picture), "text": text, "tokens": tokens, "context": context}
        (far,) = self._task("timed", _files(language, mmproj) | task)
        took: dict[str, Any] = far.pop("timings")
        if took["predicted_n"] != tokens:
            raise EngineError(
                f"llama.cpp made {took['predicted_n']} tokens where {tokens} were asked for: nothing was measured"
            )
        if took["cache_n"]:
            raise EngineError(
                f"llama.cpp took {took['cache_n']} tokens of the prompt from an earlier request, against `cache_prompt: false`: "
                "the picture's work is not in its figures, and nothing was measured"
            )
        if not 0 < far["encode_ms"] < took["prompt_ms"]:
            raise EngineError(
                f"llama.cpp's log has {far['encode_ms']:.1f} ms for the picture, within a prompt of {took['prompt_ms']:.1f} ms: "
                "its clock was set meanwhile, or this build logs otherwise"
            )
        layers = far["told"]["layers on a GPU"]
        if self.gpu_layers and (not layers or layers.startswith("0/")):
            raise EngineError(
                f"gpu_layers={self.gpu_layers}, and this llama.cpp put none on a GPU: it is a build without one, or finds none. "
                "Give a build with CUDA (llama_cpp=<its build/bin>), or gpu_layers=0"
            )
        return Timed(
            text_tokens=text,
            image_tokens=took["prompt_n"] - text,
            prompt_ms=took["prompt_ms"],
            predicted_ms=took["predicted_ms"],
            **far,
        )

    def quantise(self, source: Path, target: Path, quant: str) -> dict[str, int]:
        """A float16 language model with fewer bits. Returns how many matrices have which type."""
        (counts,) = self._task("quantise", {"source": str(source), "target": str(target), "quant": quant})
        return counts

    def _task(self, do: str, task: dict[str, Any]) -> Iterator[Any]:
        """Run a task on the far side; its items as they come.

        Raises:
            EngineError: there is no engine, or the process ended otherwise than by finishing.
        """
        name = self.name
        env = os.environ | {"LLAMA_MEDIA_MARKER": MARKER, "OMP_NUM_THREADS": "1"}
        own = {
            "do": do,
            "build": self.build and str(self.build),
            "threads": self.threads,
            "gpu_layers": self.gpu_layers,
        }
        with tempfile.TemporaryFile("w+") as log:
            far = subprocess.Popen(
                [sys.executable, "-m", "mvlm.export.far"],
                stdin=subprocess.PIPE,  # held open: when we end, whatever ends us, so does the far side
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                text=True,
            )
            try:
                with suppress(BrokenPipeError):  # it ended already; its code and its words are told below
                    far.stdin.write(json.dumps(own | task) + "\n")
                    far.stdin.flush()
                for line in far.stdout:
                    yield json.loads(line)
                code = far.wait()
            finally:  # also if nobody wants the rest
                far.kill()
                far.wait()
                with suppress(BrokenPipeError):
                    far.stdin.close()
                far.stdout.close()
            if code:
                log.seek(0)
                said = [line.strip() for line in log if line.strip()]
                told = (line for line in said if any(word in line for word in (FAILED, "GGML_ASSERT", "GGML_ABORT")))
                why = next(told, said[-1] if said else "").split(FAILED)[-1].strip()
                how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
                raise EngineError(f"{name} {how} over {do}: {why[:300] or 'it said nothing'}")


def _at_steps(ids: Sequence[int], kept: Sequence[tuple[int, dict[str, float]]]) -> list[dict[int, float] | None]:
    """Log-probabilities at the steps they belong to.

    The server keeps none for a token that ends within a character, so there may be fewer than steps, each with its token.
    Laid along the answer from both ends, they are taken where both ways agree.
    """
    forwards, backwards = {}, {}
    step = -1
    for place, (token, _) in enumerate(kept):
        step = ids.index(token, step + 1)
        forwards[step] = place
    step = len(ids)
    for place in reversed(range(len(kept))):
        step -= 1
        while ids[step] != kept[place][0]:
            step -= 1
        backwards[step] = place
    sure = {step: kept[place][1] for step, place in forwards.items() if backwards.get(step) == place}
    return [
        {int(i): math.nan if p is None else p for i, p in sure[step].items()} if step in sure else None
        for step in range(len(ids))
    ]


def _files(language: Path, mmproj: Path) -> dict[str, str]:
    from mvlm.export.vision import check_file  # here: the far side needs no torch

    check_file(mmproj, language)
    return {"language": str(language), "mmproj": str(mmproj)}


def _free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed a moment ago is free
        try:
            one.bind((host, port))
        except OSError:
            return False
        return True


def _text(picture: bytes) -> str:
    return base64.b64encode(picture).decode()
