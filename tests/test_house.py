"""The house keeps its order: who imports whom, what the project may not say, and that a first look costs no time."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "mvlm"

LEVEL = {
    "batch": 0,
    "data": 1, "projector": 1, "model": 1, "pocket": 1,
    "strategy": 2, "benchmark": 2,
    "trust": 3, "run": 3, "page": 3, "plan": 3, "scale": 3, "cli": 3, "build": 3,
    "settings": 3, "engine": 3, "resume": 3, "fit": 3, "progress": 3, "replay": 3, "score": 3, "report": 3,
    "sweep": 3, "table": 3, "sheet": 3, "plot": 3, "dashboard": 3, "chat": 3, "bench": 3, "harness": 3, "export": 3,
}  # fmt: skip
"""The ladder: a room imports rooms below it and itself; rooms of levels 1 and 2 never import one another, except as listed."""

ALLOWED = {
    ("strategy", "data"),
    ("strategy", "model"),
    ("benchmark", "model"),
    ("pocket", "data"),
    ("model", "projector"),
}
"""`model` imports projectors in checkpoint.py and names.py alone, to rebuild a released model from its type's name."""

HYDRA_ROOMS = {
    "trust", "run", "plan", "cli", "build", "engine", "fit", "score", "report", "sweep", "table", "dashboard", "bench", "export", "replay",
    "settings",
}  # fmt: skip
LIGHTNING_FILES = {
    "data/datamodule.py",
    "strategy/sharding.py",
    "strategy/stage.py",
    "engine.py",
    "fit.py",
    "progress.py",
    "resume.py",
    "score.py",
    "bench/train.py",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    found = set()
    package = [PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names} | {name}
    return found


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_ladder_holds(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for name in imports(path):
        there = room(name)
        if not name.startswith("mvlm.") or there not in LEVEL or there == here:
            continue
        lower = LEVEL[there] < LEVEL[here] and (LEVEL[here] == 3 or there == "batch" or (here, there) in ALLOWED)
        assert lower or (LEVEL[here] == LEVEL[there] == 3) or (here, there) in ALLOWED, f"{here} imports {name}"


def test_every_room_is_on_the_ladder() -> None:
    rooms = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if not p.name.startswith("__")}
    assert rooms == set(LEVEL)


@pytest.mark.parametrize("library, allowed", [("hydra", HYDRA_ROOMS), ("omegaconf", HYDRA_ROOMS)])
def test_configuration_stays_in_its_rooms(library: str, allowed: set[str]) -> None:
    users = {
        p.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for p in modules()
        if any(n.split(".")[0] == library for n in imports(p))
    }
    assert users <= allowed


def test_lightning_stays_in_its_files() -> None:
    users = {str(p.relative_to(PACKAGE)) for p in modules() if any(n.split(".")[0] == "lightning" for n in imports(p))}
    assert users == LIGHTNING_FILES


@pytest.mark.parametrize("name", ["train", "evaluate", "report", "export", "chat", "doctor", "bench"])
def test_help_is_quick_and_loads_nothing(name: str) -> None:
    """Under a second is promised, and is measured in the processor's time, which what else runs here hardly changes. That nothing
    heavy is imported is what keeps the promise, and that is exact."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"import sys, runpy; sys.argv = ['{name}.py', '--help']; runpy.run_path('{name}.py', run_name='__main__'); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert f"conf/{name}.yaml" in done.stdout
    loaded = done.stdout.splitlines()[-1]
    assert not any(f"'{heavy}'" in loaded for heavy in ("torch", "hydra", "transformers", "lightning"))


def test_no_unsafe_loading() -> None:
    """A file must not be able to run code: torch.load only with weights_only, no pickle, no eval, no yaml but of plain values; nor may
    a shell read a command, nor an archive say where its members go."""
    for path in modules():
        assert not {n.split(".")[0] for n in imports(path)} & {"pickle", "dill", "joblib", "marshal"}, path
    for path in [*modules(), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), path
                assert not re.match(r"yaml\.(?!scan$)", called), (
                    path
                )  # the rest through OmegaConf, whose loader is a safe one
                assert called.split(".")[-1] not in ("extract", "extractall", "unpack_archive"), path
                told = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert told.get("shell", "False") == told.get("allow_pickle", "False") == "False", path
                assert told.get("trust_remote_code", "False") == "False", path
                if called == "torch.load":
                    assert told.get("weights_only") == "True", path


def test_constraints_name_versions_only() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 50
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+( ;.*)?", line) for line in lines)
