"""What is believed of a run folder, which may be somebody else's: its files are data, and must not choose what runs here.

A `_target_` in a configuration names what Hydra will import and call. On one's own command line and in `conf/` it may be anything.
In the config.yaml of a run folder it may be what a model and its corpus are made of, or what MVLM_ALLOW names:

    MVLM_ALLOW=mypackage,other.module python evaluate.py run=<folder>
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mvlm.data.cache import cache_folder

MODEL = r"mvlm\.model\.(mobilevlm\.MobileVLM|vision\.Vision)|mvlm\.projector\.\w+\.[A-Z]\w*|transformers\.\w+(ForCausalLM|Config)"
MADE = r"mvlm\.pocket\.(corpus\.build|shapes\.folder|parts\.fetch)|mvlm\.data\.byte_tokenizer\.build|pathlib\.Path"
TARGETS = {
    "model": rf"{MODEL}|{MADE}",
    "projector": MODEL,
    "corpus": rf"mvlm\.data\.corpus\.Corpus|{MADE}",
    "benchmark": r"mvlm\.benchmark\.\w+\.[A-Z]\w*",
    "trainer": r"lightning\.Trainer|lightning\.pytorch\.[\w.]+\.[A-Z]\w*",
    "logger": r"lightning\.pytorch\.loggers\.[A-Z]\w*",
}
"""The targets that may stand under a key of the first level. The last three are never made from a run folder."""

WRITERS = {
    "mvlm.pocket.corpus.build": "root",
    "mvlm.pocket.shapes.folder": "root",
    "mvlm.pocket.parts.fetch": "cache",
    "mvlm.data.byte_tokenizer.build": "root",
}
"""Targets that write files, and which argument says where."""

KERNEL = re.compile(r"_?(attn|experts)_implementation\w*")
"""Keys by whose values transformers may fetch a kernel, which is code, from the model hub: `owner/name`."""

LARGEST = 1 << 20
"""Bytes of a config.yaml; a real one has some 10 kB."""

SECRET = re.compile(r"(?i)(.*_)?(api_?key|secret(_?key)?|access_?key(_?id)?|password|credentials?)")
"""What a key is called that holds a secret."""

SECRETS = re.compile(rf"{SECRET.pattern}|(.*_)?token")
"""What an environment variable is called that does."""


def load_config(path: Path) -> DictConfig:
    """A run folder's config.yaml as data. Before anything is made of it, or looked up in it, `check_config`.

    Raises:
        ValueError: it is no configuration.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, and a configuration at most {LARGEST:,}")
    try:
        text = path.read_text(encoding="utf-8")
        if any(
            isinstance(token, yaml.AliasToken) for token in yaml.scan(text)
        ):  # a few of them can stand for gigabytes
            raise ValueError(f"{path} refers to its own parts (yaml's *name), which no configuration of ours does")
        config = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is no configuration: {told[:200]}") from None
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} is no configuration: keys with values are expected")
    return config


def check_config(config: DictConfig, path: Path) -> DictConfig:
    """The configuration of somebody's run folder, if nothing that it names can do harm.

    Raises:
        ValueError: it names a target that is not allowed, would read the environment, or would write where nothing of this project
            lies. The message names the key, what stands there and the cure.
    """
    for key, value in _nodes(OmegaConf.to_container(config)):  # as written: nothing is filled in
        try:
            _check(key, value)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return config


def _nodes(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted key, mappings and lists too."""
    yield key, tree
    children = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for name, child in children:
        yield from _nodes(child, f"{key}.{name}".lstrip("."))


def _check(key: str, value: Any) -> None:
    last = key.rsplit(".", 1)[-1]
    if isinstance(value, str) and "${" in value:
        raise ValueError(
            f"{key}: {value} asks for something to be filled in here, from the environment for one. A run folder holds values "
            "only: write the value there"
        )
    if last == "_target_":
        allowed = re.fullmatch(TARGETS.get(key.split(".")[0], "(?!)"), value) if isinstance(value, str) else None
        if not allowed and not _named(value):
            raise ValueError(
                f"{key}: {value} would be imported and called, and is nothing that a run folder may name. If you know what it "
                f"does: MVLM_ALLOW={value} before the command, or the name of its package"
            )
    if isinstance(value, str) and "/" in value and KERNEL.search(key) and not _named(value.replace("/", ".")):
        raise ValueError(
            f"{key}: {value} is a kernel of the model hub, which is code. If you trust its owner: "
            f"MVLM_ALLOW={value.split('/')[0]} before the command"
        )
    if isinstance(value, Mapping) and str(value.get("_target_")) in WRITERS:
        _check_writer(key, value)


def _named(target: Any) -> bool:
    """Whether MVLM_ALLOW names the target, its module or its package."""
    named = [name.strip() for name in os.environ.get("MVLM_ALLOW", "").split(",")]
    return any(name and f"{target}.".startswith(f"{name}.") for name in named)


def _check_writer(key: str, node: Mapping[str, Any]) -> None:
    target, place = node["_target_"], WRITERS[node["_target_"]]
    if odd := {"_args_", "wheels", "say"} & set(node):
        raise ValueError(f"{key}.{odd.pop()}: {target} takes no such argument from a run folder: leave it out")
    if place not in node:
        return
    root = Path(str(node[place]))
    own = any(root.resolve().is_relative_to(folder.resolve()) for folder in (cache_folder(), Path()))
    if not own and not any((root / made).is_dir() for made in ("corpus", "nano", "pocket")):
        raise ValueError(
            f"{key}.{place}: {root} is where {target} would write, and it is neither in the cache ({cache_folder()}) nor in this "
            f"folder, nor is anything of ours there. To have it written there: MVLM_CACHE={root} before the command"
        )


def refuse_secrets(tree: Mapping[str, Any]) -> None:
    """See that no secret is written down with a configuration: none under a key that is called so, and none of the environment's.

    Raises:
        ValueError: there is one; the message names its key and not itself.
    """
    known = {v: name for name, v in os.environ.items() if len(v) >= 8 and SECRETS.fullmatch(name)}
    for key, value in _nodes(tree):
        if not isinstance(value, str) or not value:
            continue
        named = next((name for secret, name in known.items() if secret in value), None)
        if named or SECRET.fullmatch(key.rsplit(".", 1)[-1]):
            raise ValueError(
                f"{key} holds a secret{f' (that of {named})' if named else ''}, and a run folder keeps its configuration in plain text: "
                "leave it out, and give it in the environment (WANDB_API_KEY, HF_TOKEN) or by `wandb login`"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: it is none; the message names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no whole JSON file ({error}): copy it again, or make it again") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds {type(found).__name__} where a JSON object is expected: copy it again, or make it again"
        )
    return found
