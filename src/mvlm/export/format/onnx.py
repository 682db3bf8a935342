"""Tower and projector as one ONNX file, for TensorRT and its like: pixels in, image tokens out. The language model goes its own way,
and the card tells how the two are joined."""

from __future__ import annotations

import copy
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn

from mvlm.data.prompt import IMAGE_TAG
from mvlm.export.card import file_table, origin, seen, table
from mvlm.export.gate import apart, pictures
from mvlm.export.handover import Source, Unproven, described, refuse, show
from mvlm.run import write_json

OPSET = 18
"""Of the operators; TensorRT 10 reads more."""

ROUNDING = 10
"""How many times as far from PyTorch in float64 as PyTorch in float32 is ONNX Runtime in float32 may be, picture by picture. Both round
every sum at 6e-8, in another order, so their errors are of one size; what that size is depends on the model, so it is measured and not
assumed. Seen: 0.6 to 1.2 times, of 2e-7 to 1.3e-6 (towers of 3 to 24 blocks, every projector)."""

ONE_FILE = 2 * 10**9
"""Bytes of weights that still fit into the file; protocol buffers end at 2 GiB. More lie beside it."""

HEAD = ("picture", "alone", "in a batch of 3", "at most", "PyTorch's own rounding")


class Seeing(nn.Module):
    """The half of the model that looks."""

    def __init__(self, vision: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.vision, self.projector = vision, projector

    def forward(self, pixels: Tensor) -> Tensor:
        """(I, 3, S, S) -> (I, M, D)"""
        return self.projector(self.vision(pixels))


def place(cfg: DictConfig) -> str:
    """`onnx`.

    Raises:
        ValueError: a key of another format's, or a package is missing.
    """
    refuse(cfg, quant="f16", scores=False, llama_cpp=None, gpu_layers=0)
    for package, needed in (("onnxscript", True), ("onnxruntime", cfg.gate)):
        try:
            _ = needed and version(package)
        except PackageNotFoundError:
            otherwise = ", or write the file unproven, under a name that says so, with gate=false"
            raise ValueError(
                f"format=onnx needs {package}: pip install '.[export]'{otherwise if package == 'onnxruntime' else ''}"
            ) from None
    return "onnx"


def check(source: Source, cfg: DictConfig) -> int:
    """Four bytes a parameter."""
    model = source.chat.model
    return 4 * sum(value.numel() for part in (model.vision, model.projector) for value in part.parameters())


def write(folder: Path, source: Source, cfg: DictConfig) -> None:
    """The file, proven, and what is told about it.

    Raises:
        Unproven: ONNX Runtime computes something else than PyTorch; parity.json tells all of it.
    """
    model, talk, words = source.chat.model, source.chat.talk, source.chat.words
    seeing = Seeing(model.vision, model.projector).eval()
    file = folder / f"vision{'' if cfg.gate else '.unproven'}.onnx"
    with Console().status(f"{source.name} to ONNX"):
        convert(file, seeing, model.image_size)
    parity = None
    if cfg.gate:
        pixels = torch.stack([source.chat.pictures(picture) for picture in pictures(model.image_size)])
        with Console().status("ONNX Runtime beside PyTorch"):
            parity = compare(file, seeing, pixels, cfg.threads)
        show(f"{source.name}: {parity['engine']} beside PyTorch", HEAD, parity_rows(parity))
        if parity["faults"]:
            write_json(folder / "parity.json", parity)
            raise Unproven(f"{file.name} does not compute what PyTorch does:\n  " + "\n  ".join(parity["faults"]))
    before, after = talk.open(f"{IMAGE_TAG}\n{{question}}").split(IMAGE_TAG)
    about = source.about() | {
        "files": {path.name: described(path) for path in sorted(folder.glob("vision*"))},
        "opset": OPSET,
        "tokens": [model.image_tokens, model.language.config.hidden_size],
        "prompt": {
            "first id": words.bos_id,
            "before the picture": before,
            "after the picture": after,
            "an answer ends with": sorted(talk.stop_ids(words)),
        },
        "proven": cfg.gate,
        "parity": parity,
    }
    about["made"]["versions"] |= {name: version(name) for name in ("onnx", "onnxscript")}
    write_json(folder / "manifest.json", about)
    (folder / "README.md").write_text(card(about), encoding="utf-8")


@torch.no_grad()
def convert(file: Path, seeing: Seeing, size: int) -> None:
    """Write the file: input `pixels` (I, 3, S, S), output `tokens` (I, M, D), both float32, any I."""
    log = logging.getLogger("onnx_ir")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells of every constant that it did not fold
    try:
        made = torch.onnx.export(
            seeing,
            (torch.zeros(2, 3, size, size),),  # two, for one would be taken for a fixed one
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["tokens"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("pictures")}},
            verbose=False,
        )
    finally:
        log.setLevel(level)
    graph = made.model.graph
    for told in (
        graph,
        *graph.all_nodes(),
        *graph.inputs,
        *(value for node in graph.all_nodes() for value in node.outputs),
    ):
        told.metadata_props.clear()  # lines of source with their paths on this machine
    made.save(file, external_data=sum(v.nbytes for v in seeing.state_dict().values()) > ONE_FILE)


def compare(file: Path, seeing: Seeing, pixels: Tensor, threads: int = 1) -> dict[str, Any]:
    """ONNX Runtime on pictures one at a time and all at once, beside PyTorch.

    Args:
        pixels: (I, 3, S, S)

    Returns:
        Relative errors a picture: {"engine", "alone", "batch", "rounding", "bound", "faults"}; the first two beside PyTorch in
        float64, as is `rounding`, which is that of PyTorch in float32.
    """
    import onnx
    import onnxruntime

    parity: dict[str, Any] = {"engine": f"onnxruntime {version('onnxruntime')}", "alone": [], "batch": []}
    with torch.inference_mode():
        exact = [tokens.numpy() for tokens in copy.deepcopy(seeing).double()(pixels.double())]
        ours = [seeing(one[None])[0].numpy() for one in pixels]
    parity["rounding"] = [_error(a, b) for a, b in zip(ours, exact, strict=True)]
    parity["bound"] = [ROUNDING * error for error in parity["rounding"]]
    parity["faults"] = faults = []
    try:
        onnx.checker.check_model(file, full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        alone = [session.run(None, {"pixels": one[None].numpy()})[0][0] for one in pixels]
        batch = list(session.run(None, {"pixels": pixels.numpy()})[0])
    except Exception as error:  # of onnx's and of the runtime's many types: all say that the file is not right
        faults.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return parity
    for way, theirs in (("alone", alone), ("batch", batch)):
        parity[way] = [_error(a, b) for a, b in zip(theirs, exact, strict=True)]
        faults += [
            f"the image tokens of picture {number}, {way}, are {error:.1e} from PyTorch's (at most {bound:.1e})"
            for number, (error, bound) in enumerate(zip(parity[way], parity["bound"], strict=True), 1)
            if not error <= bound
        ]
    return parity


def _error(theirs: np.ndarray, ours: np.ndarray) -> float:
    return apart([theirs], [torch.from_numpy(ours)])[0]


# ----------------------------------------------------------------------------------------------------- what is told


def parity_rows(parity: dict[str, Any]) -> list[list[str]]:
    """A picture a row, under HEAD."""
    columns = zip(*(parity[key] for key in ("alone", "batch", "bound", "rounding")), strict=False)
    return [[str(number), *(f"{value:.1e}" for value in row)] for number, row in enumerate(columns, 1)]


def card(about: dict[str, Any]) -> str:
    """README.md of the folder, from its manifest."""
    (name, *beside), (count, width), size = about["files"], about["tokens"], about["pictures"]["size"]
    shape = f"3x{size}x{size}"
    parts = [
        f"# {about['name']}: tower and projector in ONNX",
        f"Pictures to image tokens: the tower `{about['tower']['name']}`, then the projector `{about['projector']['type']}`. float32, "
        f"operators of opset {about['opset']}. Half of a small vision-language model; the language model is not inside. "
        f"{origin(about)} `manifest.json` has all hashes, versions and the configuration.",
        file_table(about["files"])
        + (f"\n\nKeep both in one folder: the weights are in `{beside[0]}`." if beside else ""),
        "## Run it\n\n```python\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{name}", providers=["CPUExecutionProvider"])\n'
        f'(tokens,) = session.run(None, {{"pixels": pixels}})  # (I, 3, {size}, {size}) float32 -> (I, {count}, {width}), any I\n```',
        f"TensorRT: `trtexec --onnx={name} --saveEngine=vision.plan --minShapes=pixels:1x{shape} --optShapes=pixels:1x{shape} "
        f"--maxShapes=pixels:8x{shape}`. That was not run, nor was anything measured in TensorRT or in fewer bits.",
        "## Pixels\n\n" + seen(about["pictures"]),
        "## Joining it with the language model\n\n" + _joined(about),
        "## Parity\n\n" + _parity(about),
    ]
    return "\n\n".join(parts) + "\n"


def _joined(about: dict[str, Any]) -> str:
    (count, width), prompt = about["tokens"], about["prompt"]
    first = "nothing" if prompt["first id"] is None else f"id {prompt['first id']}"
    return (
        f"Not inside: the language model, its word embeddings, the tokenizer. `python export.py run=<the run> format=released` hands "
        f"them over (safetensors, under transformers' names of a LLaMA). The prompt, template `{about['template']}`:\n\n"
        f"```\n{prompt['before the picture']}{IMAGE_TAG}{prompt['after the picture']}\n```\n\n"
        f"1. Cut it at `{IMAGE_TAG}`. Tokenise each piece by itself, special tokens parsed, nothing added; before all comes {first}.\n"
        f"2. Look the ids up in the word embeddings: {width} numbers each.\n"
        f"3. Where `{IMAGE_TAG}` stood, put the picture's {count} image tokens as they are, in their order.\n"
        f"4. Decode from these embeddings. Any of the ids {prompt['an answer ends with']} ends the answer."
    )


def _parity(about: dict[str, Any]) -> str:
    parity = about["parity"]
    if parity is None:
        return "**Not measured: this file was never run** (`gate=false`)."
    return (
        f"{parity['engine']} on a processor, beside PyTorch in float64 with the run's weights, on three fixed pictures: relative error "
        f"of a picture's tokens. At most {ROUNDING} times what PyTorch's own float32 is off.\n\n"
        + table(HEAD, parity_rows(parity))
    )
