"""llama.cpp, always in a process of its own: a file that it can't stand ends the process, and that must not be ours.

By default it is the package xllamacpp, a wheel with llama.cpp inside; or a build of one's own, as on a device with a GPU.
Texts and tokens come from its server, as a user of the files would get them; image embeddings, which the server does not
tell, from llama.cpp's C functions in the same library. One thread unless more are asked for: two pools of threads on one
machine wait for each other.

This file runs on both sides. The near side is `Engine`; `python -m mvlm.export.engine` is the far side, which reads one task
as a line of JSON, writes a line of JSON an item and ends when its input does. It imports no torch.
"""

from __future__ import annotations

import base64
import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
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
                [sys.executable, "-m", "mvlm.export.engine"],
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


# --------------------------------------------------------------------------------------------------- the far side


def _library(task: dict[str, Any]) -> ctypes.CDLL:
    """All of llama.cpp's functions: a library also answers for those that it was linked with."""
    if task["build"]:
        return ctypes.CDLL(str(Path(task["build"]) / "libmtmd.so"))
    import xllamacpp.xllamacpp

    return ctypes.CDLL(xllamacpp.xllamacpp.__file__)


class _Defaults(ctypes.Structure):
    """llama_model_params as the library fills it, handed back as it is: larger than any version's, and never looked into."""

    _fields_ = [("words", ctypes.c_uint64 * 64)]


class _ImageParams(ctypes.Structure):
    """The beginning of mtmd_context_params; the rest is handed back as it is."""

    _fields_ = [
        ("use_gpu", ctypes.c_bool),
        ("device", ctypes.c_void_p),
        ("print_timings", ctypes.c_bool),
        ("n_threads", ctypes.c_int),
        ("image_marker", ctypes.c_char_p),
        ("media_marker", ctypes.c_char_p),
        ("flash_attn_type", ctypes.c_int),
        ("warmup", ctypes.c_bool),
        ("words", ctypes.c_uint64 * 64),
    ]


class _InputText(ctypes.Structure):
    _fields_ = [
        ("text", ctypes.c_char_p),
        ("length", ctypes.c_size_t),
        ("add_special", ctypes.c_bool),
        ("parse_special", ctypes.c_bool),
    ]


def _look(task: dict[str, Any]) -> Iterator[str]:
    """Each picture's embeddings into a file of its own."""
    from PIL import Image

    lib = _library(task)
    try:
        params = _returning(lib.mtmd_context_params_default, _ImageParams)()
        known = params.media_marker == _returning(lib.mtmd_default_marker, ctypes.c_char_p)() and params.n_threads == 4
    except AttributeError:
        known = False
    if not known:  # nothing is set blindly
        raise SystemExit(f"its C functions are others than those of {TESTED}: take that version")
    params.use_gpu, params.print_timings = bool(task["gpu_layers"]), False
    params.n_threads = task["threads"] or params.n_threads
    load = _returning(lib.llama_model_load_from_file, ctypes.c_void_p)
    start = _returning(lib.mtmd_init_from_file, ctypes.c_void_p)
    words = _returning(lib.llama_model_default_params, _Defaults)()
    model = ctypes.c_void_p(load(task["language"].encode(), words))
    context = ctypes.c_void_p(start(task["mmproj"].encode(), model, params) if model else None)
    if not context:
        raise SystemExit("llama.cpp could not load the files")
    width = lib.llama_model_n_embd_inp(model)
    marker = params.media_marker
    text = _InputText(marker, len(marker), False, True)
    for number, picture in enumerate(task["pictures"]):
        image = Image.open(BytesIO(base64.b64decode(picture))).convert("RGB")
        bitmap = ctypes.c_void_p(_returning(lib.mtmd_bitmap_init, ctypes.c_void_p)(*image.size, image.tobytes()))
        chunks = ctypes.c_void_p(_returning(lib.mtmd_input_chunks_init, ctypes.c_void_p)())
        bitmaps = (ctypes.c_void_p * 1)(bitmap)
        if lib.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, ctypes.c_size_t(1)):
            raise SystemExit("llama.cpp could not read a picture")
        chunk = ctypes.c_void_p(_returning(lib.mtmd_input_chunks_get, ctypes.c_void_p)(chunks, ctypes.c_size_t(0)))
        count = _returning(lib.mtmd_input_chunk_get_n_tokens, ctypes.c_size_t)(chunk)
        if lib.mtmd_encode_chunk(context, chunk):
            raise SystemExit("llama.cpp could not encode a picture")
        values = _returning(lib.mtmd_get_output_embd, ctypes.POINTER(ctypes.c_float))(context)
        name = f"{task['out']}-{number}.npy"
        np.save(name, np.ctypeslib.as_array(values, (count, width)))
        yield name


def _returning(function: Any, kind: Any) -> Any:
    function.restype = kind
    return function


class _Server:
    """llama.cpp's server, in this process or as its child, and the address it listens on."""

    def __init__(self, task: dict[str, Any], host: str = LOOPBACK, port: int = 0, ui: bool = False) -> None:
        if task["build"]:
            self.address = f"http://{host}:{port or _free_port(host)}"
            self._server = _program(task, host, int(self.address.rsplit(":", 1)[1]), ui)
            self._wait()
        else:
            self._server = _packaged(task, host, port, ui)
            self.address = self._server.listening_address

    def _wait(self) -> None:
        while True:
            if self._server.poll() is not None:
                raise SystemExit(f"llama-server ended with code {self._server.returncode}")
            with suppress(OSError), urllib.request.urlopen(f"{self.address}/health"):  # 503 while it loads
                return
            time.sleep(0.05)

    def __call__(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"the server refused {path}: {error.read().decode(errors='replace')}") from None


def _packaged(task: dict[str, Any], host: str, port: int, ui: bool) -> Any:
    """The package's server, in this process."""
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path, p.mmproj.path = task["language"], task["mmproj"]
    p.n_ctx, p.n_parallel = task["context"], 1
    if task["threads"]:
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = task["threads"]
    p.n_gpu_layers, p.mmproj_use_gpu = task["gpu_layers"], bool(task["gpu_layers"])
    p.hostnames, p.port, p.ui = [host], port, ui
    p.endpoint_slots, p.cors_origins = False, ""  # nobody else's page may read what is said here
    p.public_path, p.sampling.temp = task.get("page") or "", 0.0
    return xllamacpp.Server(p)


def _program(task: dict[str, Any], host: str, port: int, ui: bool) -> subprocess.Popen:
    """A build's own server. The kernel ends it with us."""
    words = [str(Path(task["build"]) / "llama-server"), "-m", task["language"], "--mmproj", task["mmproj"]]
    words += [
        "-c",
        str(task["context"]),
        "--parallel",
        "1",
        "-ngl",
        str(task["gpu_layers"]),
        "--jinja",
        "--no-slots",
        "--temp",
        "0",
    ]
    words += ["--host", host, "--port", str(port), "--cors-origins", ""] + ["--no-ui"] * (not ui)
    words += ["-t", str(task["threads"])] * bool(task["threads"]) + ["--path", str(task.get("page"))] * bool(
        task.get("page")
    )
    words += ["--no-mmproj-offload"] * (not task["gpu_layers"])
    ends_with_us = ctypes.CDLL(None).prctl
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, preexec_fn=lambda: ends_with_us(1, signal.SIGKILL))


def _free_port(host: str) -> int:
    with socket.socket() as one:
        one.bind((host, 0))
        return one.getsockname()[1]


def _serve(task: dict[str, Any]) -> Iterator[str]:
    server = _Server(task, task["host"], task["port"], ui=True)
    yield server.address
    sys.stdin.read()  # until the near side ends


def _ask(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    server = _Server(task)
    greedy = {"temperature": 0, "top_k": 1, "repeat_penalty": 1.0, "return_tokens": True, "cache_prompt": task["reuse"]}
    for one in task["asked"]:
        prompt, content = {"prompt_string": one["prompt"]}, [{"type": "text", "text": one["question"]}]
        if one["picture"]:
            prompt["multimodal_data"] = [one["picture"]]
            url = {"url": f"data:image/png;base64,{one['picture']}"}
            content = [{"type": "image_url", "image_url": url}, *content]
        said = server("/completion", prompt=prompt, n_predict=task["limit"], n_probs=task["top"], **greedy)
        pieces = enumerate(one["prompt"].split(MARKER))
        yield {
            "ids": said["tokens"],
            "stopped": said["stop_type"] == "eos",
            "top": [
                (step["id"], {t["id"]: t["logprob"] for t in step["top_logprobs"]})
                for step in said.get("completion_probabilities", [])  # none if all of it is within a character
            ],
            "prompt": [
                server("/tokenize", content=p, add_special=n == 0, parse_special=True)["tokens"] for n, p in pieces
            ],
            "chat": server("/apply-template", messages=[{"role": "user", "content": content}])["prompt"],
        }


def _quantise(task: dict[str, Any]) -> Iterator[dict[str, int]]:
    from mvlm.export.quantise import quantise

    yield quantise(Path(task["source"]), Path(task["target"]), task["quant"], _library(task))


def main() -> None:
    """The far side: one task from standard input, a line of JSON an item to standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints goes to the log
    task = json.loads(sys.stdin.readline())
    try:
        for item in {"look": _look, "ask": _ask, "serve": _serve, "quantise": _quantise}[task["do"]](task):
            out.write(json.dumps(item) + "\n")
            out.flush()
    except BaseException as error:
        print(f"{FAILED} {error or type(error).__name__}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)  # the server's threads would be waited for


if __name__ == "__main__":
    main()
