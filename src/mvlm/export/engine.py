"""llama.cpp, always in a process of its own: a file that it can't stand ends the process, and that must not be ours.

The engine is the package xllamacpp, a wheel with llama.cpp inside. Texts and tokens come from its server, as a user of
the files would get them; image embeddings, which the server does not tell, from llama.cpp's C functions in the same
library. One thread unless more are asked for: two pools of threads on one machine wait for each other.

This file runs on both sides. The near side is `look`, `ask`, `timed` and `quantise`; `python -m mvlm.export.engine` is the far
side, which reads one task as JSON and writes a line of JSON an item. It imports no torch.
"""

from __future__ import annotations

import base64
import ctypes
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, NamedTuple

import numpy as np

PACKAGE, TESTED, BUILD = "xllamacpp", "2026.10.11549", "b11549"
"""The engine, the version that this was written with, and the build of llama.cpp in it."""

FAILED = "mvlm failed:"
"""What the far side's last words begin with."""

MARKER = "<__media__>"
"""Where a picture stands in a prompt of llama.cpp's."""


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


def engine() -> str:
    """The engine's name and version.

    Raises:
        EngineError: there is none.
    """
    try:
        return f"{PACKAGE} {version(PACKAGE)}"
    except PackageNotFoundError:
        raise EngineError(
            f"there is no llama.cpp here to prove the files with: pip install {PACKAGE}=={TESTED}, "
            "or write them unproven, under names that say so, with gate=false"
        ) from None


# -------------------------------------------------------------------------------------------------- the near side


def look(language: Path, mmproj: Path, pictures: Sequence[bytes], *, threads: int = 1) -> list[np.ndarray]:
    """Image embeddings, (M, D) a picture."""
    with tempfile.TemporaryDirectory() as folder:
        task = {
            "do": "look",
            "out": str(Path(folder) / "embeddings"),
            **_files(language, mmproj),
            "pictures": [_text(picture) for picture in pictures],
            "threads": threads,
        }
        return [np.load(name) for name in _task(task)]


def ask(
    language: Path,
    mmproj: Path,
    prompts: Sequence[Ask],
    *,
    limit: int,
    top: int = 5,
    reuse: bool = False,
    context: int = 2048,
    threads: int = 1,
) -> Iterator[Said]:
    """Greedy answers, in order.

    Args:
        limit: tokens of an answer.
        top: how many log-probabilities a step.
        reuse: keep what two prompts begin with in common; quicker, and no longer computed each in the same way.
        context: positions for prompt and answer.
    """
    asked = [{"prompt": p, "question": q, "picture": _text(picture) if picture else None} for p, q, picture in prompts]
    task = {"do": "ask", **_files(language, mmproj), "asked": asked, "limit": limit, "top": top, "reuse": reuse}
    for line in _task(task | {"context": context, "threads": threads}):
        yield Said(**line | {"top": _at_steps(line["ids"], line["top"])})


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


def timed(
    language: Path,
    mmproj: Path,
    picture: bytes,
    *,
    text: int,
    tokens: int,
    context: int = 2048,
    threads: int = 1,
    gpu_layers: int = 0,
    llama_cpp: Path | None = None,
) -> Timed:
    """One greedy answer of a fixed length, in a fresh process, after a short one that warms up.

    Args:
        text: tokens of the prompt beside the picture's, made of filler: so prompts are as long whatever the tokenizer.
        tokens: of the answer, which no end of text cuts off.
        gpu_layers: of the language model; with any the tower runs on the GPU too.
        llama_cpp: a folder with `bin/llama-server`, run instead of the package.

    Raises:
        EngineError: also if the figures are not those of such a request.
    """
    task = {"do": "timed", **_files(language, mmproj), "picture": _text(picture), "text": text, "tokens": tokens}
    task |= {"context": context, "threads": threads, "gpu_layers": gpu_layers}
    (far,) = _task(task | {"llama_cpp": None if llama_cpp is None else str(llama_cpp)})
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
    if gpu_layers and (not layers or layers.startswith("0/")):
        raise EngineError(
            f"gpu_layers={gpu_layers}, and this llama.cpp put none on a GPU: it is a build without one, or finds none. "
            "Give a build with CUDA (llama_cpp=<its folder>), or gpu_layers=0"
        )
    return Timed(
        text_tokens=text,
        image_tokens=took["prompt_n"] - text,
        prompt_ms=took["prompt_ms"],
        predicted_ms=took["predicted_ms"],
        **far,
    )


def quantise(source: Path, target: Path, quant: str, threads: int = 1) -> dict[str, int]:
    """A float16 language model with fewer bits. Returns how many matrices have which type."""
    task = {"do": "quantise", "source": str(source), "target": str(target), "quant": quant, "threads": threads}
    (counts,) = _task(task)
    return counts


def _files(language: Path, mmproj: Path) -> dict[str, str]:
    from mvlm.export.vision import check_file  # here: the far side needs no torch

    check_file(mmproj, language)
    return {"language": str(language), "mmproj": str(mmproj)}


def _text(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _task(task: dict[str, Any]) -> Iterator[Any]:
    """Run a task on the far side; its items as they come.

    Raises:
        EngineError: there is no engine, or the process ended otherwise than by finishing.
    """
    name = engine()
    env = os.environ | {"LLAMA_MEDIA_MARKER": MARKER, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as asked:
        json.dump(task, asked)
        asked.seek(0)
        far = subprocess.Popen(
            [sys.executable, "-m", "mvlm.export.engine"],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=log,
            env=env,
            text=True,
        )
        try:
            for line in far.stdout:
                yield json.loads(line)
            code = far.wait()
        finally:  # also if nobody wants the rest
            far.kill()
            far.wait()
        if code:
            log.seek(0)
            said = [line.strip() for line in log if line.strip()]
            told = (line for line in said if any(word in line for word in (FAILED, "GGML_ASSERT", "GGML_ABORT")))
            why = next(told, said[-1] if said else "").split(FAILED)[-1].strip()
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            raise EngineError(f"{name} {how} over {task['do']}: {why[:300] or 'it said nothing'}")


# --------------------------------------------------------------------------------------------------- the far side


def _library() -> ctypes.CDLL:
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

    lib = _library()
    try:
        params = _returning(lib.mtmd_context_params_default, _ImageParams)()
        known = params.media_marker == _returning(lib.mtmd_default_marker, ctypes.c_char_p)() and params.n_threads == 4
    except AttributeError:
        known = False
    if not known:  # nothing is set blindly
        raise SystemExit(f"its C functions are others than those of {TESTED}: take that version")
    params.use_gpu, params.n_threads, params.print_timings = False, task["threads"], False
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
    """xllamacpp's server in this process, and the address it listens on."""

    def __init__(self, language: str, mmproj: str, context: int, threads: int, **more: Any) -> None:
        """`more` is set on xllamacpp's CommonParams by name."""
        import xllamacpp

        p = xllamacpp.CommonParams()
        p.model.path, p.mmproj.path = language, mmproj
        p.n_ctx, p.n_parallel = context, 1
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
        p.n_gpu_layers, p.mmproj_use_gpu = 0, False
        p.hostnames, p.port, p.ui = ["127.0.0.1"], 0, False
        for name, value in more.items():
            setattr(p, name, value)
        self._server = xllamacpp.Server(p)
        self._address = self._server.listening_address

    def __call__(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"the server refused {path}: {error.read().decode(errors='replace')}") from None


def _ask(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    server = _Server(task["language"], task["mmproj"], task["context"], task["threads"])
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


class _Program(_Server):
    """A `llama-server` in a process of its own, whose log goes where ours goes."""

    def __init__(self, task: dict[str, Any]) -> None:
        program = Path(task["llama_cpp"]) / "bin" / "llama-server"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = {"-m": task["language"], "--mmproj": task["mmproj"], "-c": task["context"], "-np": 1, "-lv": LOUD}
        words |= {"-t": task["threads"], "-tb": task["threads"], "-ngl": task["gpu_layers"], "--cache-ram": 0}
        words |= {"--host": "127.0.0.1", "--port": port, "--log-colors": "off"}
        flags = [
            "--log-timestamps",
            "--log-prefix",
            *([] if task["gpu_layers"] else ["--no-mmproj-offload", "--device", "none"]),
        ]
        self._address = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen([str(word) for word in (program, *sum(words.items(), ()), *flags)])
        while True:
            try:
                urllib.request.urlopen(self._address + "/health").close()
                return
            except urllib.error.URLError:  # not listening yet, or still loading (503)
                if (code := self.process.poll()) is not None:
                    raise SystemExit(f"{program} ended with code {code} while it loaded") from None
                sleep(0.05)


LOUD = 4
"""The verbosity from which on the server logs the picture's encoding."""

ENCODED = re.compile(
    rb"^(\d+)\.(\d\d)\.(\d{3})\.(\d{3}) [^\n]*encoding mtmd batch.*?"
    rb"^(\d+)\.(\d\d)\.(\d{3})\.(\d{3}) [^\n]*decoding image batch 1/",
    re.MULTILINE | re.DOTALL,
)
"""Minutes, seconds, milliseconds and microseconds of two lines of the server's log: the picture goes into the tower, and its
embeddings go into the language model."""

TOLD = {
    "build": rb"print_info: (build .*)",
    "processor": rb"system_info: [^|]*\| (.*?)[| ]*$",
    "layers on a GPU": rb"offloaded (\d+/\d+) layers to GPU",
    "tower": rb"CLIP using (.*)",
}
"""What else is read from the log."""


def _encode_ms(at: int) -> tuple[float, int]:
    """How long the first picture took that the log tells of behind byte `at`, and where that ends. The log is written by a
    thread of its own, so it is waited for. Standard error is a file, which the near side opened to be read too."""
    for _ in range(200):
        if found := ENCODED.search(os.pread(2, 1 << 22, at)):
            began, ended = (
                60e3 * int(m) + 1e3 * int(s) + int(ms) + 1e-3 * int(us)
                for m, s, ms, us in (found.groups()[:4], found.groups()[4:])
            )
            return ended - began, at + found.end()
        sleep(0.01)
    raise SystemExit(f"the log does not tell when the picture was encoded: this build logs otherwise than {BUILD}")


def _filler(length: Callable[[str], int], count: int) -> str:
    """A text of so many tokens."""
    text = ""
    while (here := length(text)) < count:
        more = next((more for more in (" a", "a", ".") if here < length(text + more) <= count), None)
        if more is None:
            raise SystemExit(f"no filler of {count} tokens was found for this tokenizer")
        text += more
    return text


def _processor_seconds(pid: int) -> float | None:
    """What a process has used of the processors."""
    path = Path(f"/proc/{pid}/stat")
    if not path.exists():
        return None
    user, system = path.read_text().rpartition(")")[2].split()[11:13]  # the name before may hold blanks
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _timed(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if task["llama_cpp"]:
        server = _Program(task)
        pid = server.process.pid
    else:
        more = {"verbosity": LOUD, "cache_ram_mib": 0, "n_gpu_layers": task["gpu_layers"]}
        more["mmproj_use_gpu"] = bool(task["gpu_layers"])
        more["no_op_offload"] = more["no_kv_offload"] = not task["gpu_layers"]
        server = _Server(task["language"], task["mmproj"], task["context"], task["threads"], **more)
        pid = os.getpid()
    try:

        def length(text: str) -> int:
            pieces = ((0, ""), (1, text))  # before and after the picture
            return sum(len(server("/tokenize", content=p, add_special=n == 0)["tokens"]) for n, p in pieces)

        prompt = {"prompt_string": MARKER + _filler(length, task["text"]), "multimodal_data": [task["picture"]]}
        how = {"temperature": 0, "top_k": 1, "repeat_penalty": 1.0, "ignore_eos": True, "cache_prompt": False}
        server("/completion", prompt=prompt, n_predict=min(8, task["tokens"]), **how)
        _, at = _encode_ms(0)
        began, used = perf_counter(), _processor_seconds(pid)
        said = server("/completion", prompt=prompt, n_predict=task["tokens"], **how)
        wall, used_then = perf_counter() - began, _processor_seconds(pid)
        encode, _ = _encode_ms(at)
        log = os.pread(2, 1 << 22, 0)
        found = {name: re.search(words, log, re.MULTILINE) for name, words in TOLD.items()}
        status = Path(f"/proc/{pid}/status")
        peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
        yield {
            "timings": said["timings"],
            "encode_ms": encode,
            "wall_ms": 1e3 * wall,
            "peak_bytes": 1024 * int(peak[1]) if peak else None,
            "busy": None if used is None or task["gpu_layers"] else (used_then - used) / wall / task["threads"],
            "told": {name: line[1].decode(errors="replace").strip() if line else None for name, line in found.items()},
        }
    finally:
        if isinstance(server, _Program):
            server.process.kill()
            server.process.wait()


def _quantise(task: dict[str, Any]) -> Iterator[dict[str, int]]:
    from mvlm.export.quantise import quantise

    yield quantise(Path(task["source"]), Path(task["target"]), task["quant"], _library(), task["threads"])


def main() -> None:
    """The far side: one task from standard input, a line of JSON an item to standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints goes to the log
    task = json.load(sys.stdin)
    try:
        for item in {"look": _look, "ask": _ask, "timed": _timed, "quantise": _quantise}[task["do"]](task):
            out.write(json.dumps(item) + "\n")
            out.flush()
    except BaseException as error:
        print(f"{FAILED} {error or type(error).__name__}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)  # the server's threads would be waited for


if __name__ == "__main__":
    main()
