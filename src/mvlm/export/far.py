"""The far side of `engine.py`: llama.cpp in this process, or a build's server as its child. No torch is imported.

Standard output carries a line of JSON an item; what llama.cpp prints goes to standard error, a file that the near side opened.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mvlm.export.engine import BUILD, FAILED, LOOPBACK, MARKER, TESTED
from mvlm.export.guard import Guard


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
    """llama.cpp's server, in this process or as its child.

    Args:
        ui: whether it shows a page; then `Guard` stands before it.
        loud: whether it tells its log when it encodes a picture, and keeps nothing of one request for the next.

    It listens on this machine alone, and answers who knows its key.
    """

    def __init__(self, task: dict[str, Any], ui: bool = False, loud: bool = False) -> None:
        self.key = secrets.token_urlsafe(32)
        if task["build"]:
            port = _free_port(LOOPBACK)
            self.address = f"http://{LOOPBACK}:{port}"
            self._server = _program(task, port, ui, loud, self.key)
            self.process: int = self._server.pid
            self._wait()
        else:
            self._server = _packaged(task, ui, loud, self.key)
            self.address, self.process = self._server.listening_address, os.getpid()

    def _wait(self) -> None:
        while True:
            if self._server.poll() is not None:
                raise SystemExit(f"llama-server ended with code {self._server.returncode} while it loaded")
            with suppress(OSError), urllib.request.urlopen(f"{self.address}/health"):  # 503 while it loads
                return
            time.sleep(0.05)

    def __call__(self, path: str, **body: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"the server refused {path}: {error.read().decode(errors='replace')}") from None


def _packaged(task: dict[str, Any], ui: bool, loud: bool, key: str) -> Any:
    """The package's server, in this process."""
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path, p.mmproj.path = task["language"], task["mmproj"]
    p.n_ctx, p.n_parallel = task["context"], 1
    if task["threads"]:
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = task["threads"]
    p.n_gpu_layers, p.mmproj_use_gpu = task["gpu_layers"], bool(task["gpu_layers"])
    p.no_op_offload = p.no_kv_offload = not task["gpu_layers"]
    p.hostnames, p.port, p.api_keys, p.ui = [LOOPBACK], 0, [key], ui
    p.endpoint_slots, p.cors_origins = False, ""  # nobody else's page may read what is said here
    p.public_path, p.sampling.temp = task.get("page") or "", 0.0
    if loud:
        p.verbosity, p.cache_ram_mib = LOUD, 0
    return xllamacpp.Server(p)


def _program(task: dict[str, Any], port: int, ui: bool, loud: bool, key: str) -> subprocess.Popen:
    """A build's own server, with the same settings. Its log goes where ours goes, and the kernel ends it with us."""
    words = {"-m": task["language"], "--mmproj": task["mmproj"], "-c": task["context"], "--parallel": 1, "--temp": 0}
    words |= {"-ngl": task["gpu_layers"], "--host": LOOPBACK, "--port": port, "--cors-origins": ""}
    if task["threads"]:
        words |= {"-t": task["threads"], "-tb": task["threads"]}
    if task.get("page"):
        words |= {"--path": task["page"]}
    if loud:
        words |= {"-lv": LOUD, "--cache-ram": 0, "--log-colors": "off"}
    flags = ["--jinja", "--no-slots", *["--no-ui"] * (not ui), *["--log-timestamps", "--log-prefix"] * loud]
    flags += ["--no-mmproj-offload", "--device", "none"] * (not task["gpu_layers"])
    line = [str(Path(task["build"]) / "llama-server"), *(str(word) for pair in words.items() for word in pair), *flags]
    ends_with_us = ctypes.CDLL(None).prctl
    env = os.environ | {"LLAMA_API_KEY": key}  # everybody on this machine can read a command line
    return subprocess.Popen(line, stdin=subprocess.DEVNULL, env=env, preexec_fn=lambda: ends_with_us(1, signal.SIGKILL))


def _free_port(host: str) -> int:
    with socket.socket() as one:
        one.bind((host, 0))
        return one.getsockname()[1]


def _serve(task: dict[str, Any]) -> Iterator[str]:
    server = _Server(task, ui=True)
    guard = Guard(task["host"], task["port"], server.address, server.key)
    threading.Thread(target=guard.serve_forever, daemon=True).start()
    yield guard.address
    sys.stdin.read()  # until the near side ends


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
        time.sleep(0.01)
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


def _timed(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    server = _Server(task, loud=True)

    def length(text: str) -> int:
        pieces = ((0, ""), (1, text))  # before and after the picture
        return sum(len(server("/tokenize", content=p, add_special=n == 0)["tokens"]) for n, p in pieces)

    prompt = {"prompt_string": MARKER + _filler(length, task["text"]), "multimodal_data": [task["picture"]]}
    how = {"temperature": 0, "top_k": 1, "repeat_penalty": 1.0, "ignore_eos": True, "cache_prompt": False}
    server("/completion", prompt=prompt, n_predict=min(8, task["tokens"]), **how)
    _, at = _encode_ms(0)
    began, used = time.perf_counter(), _processor_seconds(server.process)
    said = server("/completion", prompt=prompt, n_predict=task["tokens"], **how)
    wall, used_then = time.perf_counter() - began, _processor_seconds(server.process)
    encode, _ = _encode_ms(at)
    log = os.pread(2, 1 << 22, 0)
    found = {name: re.search(words, log, re.MULTILINE) for name, words in TOLD.items()}
    status = Path(f"/proc/{server.process}/status")
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    told = used is not None and task["threads"] and not task["gpu_layers"]
    yield {
        "timings": said["timings"],
        "encode_ms": encode,
        "wall_ms": 1e3 * wall,
        "peak_bytes": 1024 * int(peak[1]) if peak else None,
        "busy": (used_then - used) / wall / task["threads"] if told else None,
        "told": {name: line[1].decode(errors="replace").strip() if line else None for name, line in found.items()},
    }


def _quantise(task: dict[str, Any]) -> Iterator[dict[str, int]]:
    from mvlm.export.quantise import quantise

    yield quantise(Path(task["source"]), Path(task["target"]), task["quant"], _library(task), task["threads"] or 1)


def main() -> None:
    """One task from standard input, a line of JSON an item to standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints goes to the log
    task = json.loads(sys.stdin.readline())
    try:
        for item in {"look": _look, "ask": _ask, "serve": _serve, "timed": _timed, "quantise": _quantise}[task["do"]](
            task
        ):
            out.write(json.dumps(item) + "\n")
            out.flush()
    except BaseException as error:
        print(f"{FAILED} {error or type(error).__name__}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)  # the server's threads would be waited for


if __name__ == "__main__":
    main()
