"""A W&B run is told what its process is and ends as it does. Read from the written files by wandb's own reader, which needs no account."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from wandb.util import get_core_path

from mvlm.resume import REQUEUE
from mvlm.run import Run

pytestmark = pytest.mark.slow  # seven processes, each with W&B's own beside it; CI runs them

WORDS = ["model=nano", "data=v1", "strategy=freeze_llm", "recipe.clip=2.0", "trainer=cpu", "seed=3", "cell=my-own-name"]

SCRIPT = """
import os, signal, sys, time
import wandb.sdk.launch  # wandb.init does
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities.exceptions import SIGTERMException
from mvlm import fit
from mvlm.cli import CONF
from mvlm.run import Run, write_json

with initialize_config_dir(str(CONF), version_base="1.3"):
    HydraConfig.instance().set_config(compose("train", sys.argv[1:], return_hydra_config=True))
    cfg = compose("train", sys.argv[1:])

def main(ending):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
    run = Run.open(cfg)
    (run.folder / "finetune").mkdir(exist_ok=True)
    with fit.tracking(cfg, run) as wandb:
        wandb.log_metrics({"watched": 1.0}, step=0)
        write_json(run.folder / "finetune" / "stage.json", {"image_tokens": 16, "samples_per_second": 2.5})
        match ending:
            case "crash": raise RuntimeError("out of memory")
            case "Ctrl-C": os.kill(os.getpid(), signal.SIGINT)
            case "stopped in fit": raise SIGTERMException
            case "SIGTERM" | "SIGKILL":
                *_, file = sorted(run.folder.glob("wandb/offline-run-*/*.wandb"))
                while b"watched" not in file.read_bytes():
                    time.sleep(0.1)
                os.kill(os.getpid(), getattr(signal, ending))

for ending in ENDINGS:
    if (child := os.fork()) == 0:
        main(ending)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    time.sleep(1 - time.time() % 1)  # W&B names its folders by the second
"""
"""The same cell again and again, as somebody repeats the command, in processes that end in another way each. They are forked, so
that what takes seconds to import is imported once."""

ENDINGS = {  # the process' exit code as Python tells it, and W&B's
    "crash": (1, 1),
    "Ctrl-C": (-signal.SIGINT, 1),
    "stopped in fit": (REQUEUE, 1),
    "SIGTERM": (REQUEUE, 1),
    "SIGKILL": (-signal.SIGKILL, None),
    "none": (0, 0),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[int], list[dict[str, dict]]]:
    """The cell, the exit codes of its processes, and what each of them wrote for W&B."""
    folder = tmp_path_factory.mktemp("tracking")
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("ENDINGS", repr([*ENDINGS])), *WORDS],
        cwd=folder,
        env=env | {"WANDB_RUN_GROUP": "table7", "WANDB_API_KEY": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wandb: WARNING" not in done.stdout + done.stderr
    run = Run(folder / "runs" / "my-own-name")
    return run, [int(line) for line in done.stdout.split()], records(run.folder)


def records(run: Path) -> list[dict[str, dict]]:
    """A run folder's W&B files in their order: what each says of the run, of its end, and its history's values in one."""
    told = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", file, file.parent]
        lines = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()
        told.append({"exit": {"exit_code": None}, "history": {}})
        for record in map(json.loads, lines):
            if record["type"] == "history":
                told[-1]["history"] |= record["history"]["item"]
            elif record["type"] in ("run", "exit"):
                told[-1][record["type"]] = record[record["type"]]
    return told


def test_a_run_ends_as_its_process(ended) -> None:
    """Of a process that is killed nothing tells the end: W&B's server calls such a run crashed, and `wandb sync` marks it as failed."""
    _, codes, told = ended
    assert len(codes) == len(told) == len(ENDINGS)
    ends = [(code, some["exit"]["exit_code"]) for code, some in zip(codes, told, strict=True)]
    assert dict(zip(ENDINGS, ends, strict=True)) == ENDINGS


def test_a_repeated_command_continues_the_same_run(ended) -> None:
    run, _, told = ended
    assert {some["run"]["run_id"] for some in told} == {run.facts["wandb_id"]}
    assert all(some["run"]["resume"] for some in told), "by which the server appends, and does not overwrite"
    assert all(some["history"]["watched"] == 1 for some in told), "of the killed ones, too"
    costs = {"image_tokens": 16, "finetune/samples_per_second": 2.5}
    assert costs.items() <= told[-1]["history"].items(), "what was trained in another process is told, too"


def test_a_run_is_told_what_it_is(ended) -> None:
    """Tags are the choices, whatever the folder is called; the configuration is there once, nested as config.yaml has it."""
    run, _, (told, *others) = ended
    told = told["run"]
    assert all(other["run"]["config"] == told["config"] and other["run"]["tags"] == told["tags"] for other in others)
    assert (told["project"], told["display_name"], told["run_group"]) == ("mvlm", "my-own-name", "table7")
    assert told["tags"] == ["model:nano", "projector:ldpv2", "data:v1", "strategy:freeze_llm"]
    config = {key: value for key, value in told["config"]["update"].items() if key != "_wandb"}
    assert config.pop("axes") == {"model": "nano", "projector": "ldpv2", "data": "v1", "strategy": "freeze_llm"}
    assert config.pop("row") == "nano-ldpv2-v1-freeze_llm recipe.clip=2.0", "neither the seed nor where it runs"
    assert config == run.config_dict()
    assert config["strategy"]["finetune"]["rates"]["vision"] is None and config["seed"] == 3
