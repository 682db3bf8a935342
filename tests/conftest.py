"""What every test shares: one thread, no network, no GPU, a cache of its own for what is generated, the nano model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: pools of several tests would fight for two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)
# A fork makes torch's pool of threads anew when it is first asked for. Two threads that ask at once (autograd's and gloo's) crash it: one
# asks before there is a second.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def pytest_configure(config: pytest.Config) -> None:
    """Tests find the same machine everywhere, one without a GPU, but for those that need one: `pytest -m gpu`."""
    if config.option.markexpr != "gpu":
        # Before torch is asked for any. Scripts that a test starts see none either.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(scope="session")
def trained_bpe():
    """`trained_bpe(text, size)`: a small byte-level BPE with chat markup."""
    import tokenizers

    def trained(text: str, size: int) -> tokenizers.Tokenizer:
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator([text], trainer)
        return bpe

    return trained


@pytest.fixture(scope="session")
def nano_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the nano corpus is generated, once a session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def shell(nano_cache: Path, tmp_path_factory: pytest.TempPathFactory):
    """`shell("train.py", "model=nano", HF_HOME=...)`: a script in a folder of its own, as from a terminal."""
    folder = tmp_path_factory.mktemp("shell")
    env = os.environ | {"MVLM_CACHE": str(nano_cache), "OMP_NUM_THREADS": "1", "WANDB_API_KEY": ""}
    env["NVIDIA_TF32_OVERRIDE"] = "0"  # float32 is float32 on a GPU, too

    def run(
        script: str, *words: str, ok: bool = True, launch: tuple[str, ...] = (), **more: str
    ) -> subprocess.CompletedProcess:
        command, told = [sys.executable, *launch, str(ROOT / script), *words], env | more
        done = subprocess.run(command, cwd=folder, env=told, capture_output=True, text=True, check=False, timeout=300)
        assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-2000:]
        return done

    run.folder = folder
    return run


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory):
    """`together(2, work)`: what `work(rank)` returned in so many processes that know one another, as torchrun starts them.

    They are forks of this one, which cost no import. `nodes=2` deals them to two; a process that fails or says nothing for `patience`
    seconds is an error here, or with `ok=False` its traceback is in the place of what it returned.
    """

    def run(count: int, work, nodes: int = 1, ok: bool = True, patience: float = 300) -> list:
        store, ends, started = tmp_path_factory.mktemp("store") / "store", [], []
        for rank in range(count):
            here, there = get_context("fork").Pipe(duplex=False)
            started.append(get_context("fork").Process(target=one, args=(rank, count, nodes, store, there, work)))
            started[-1].start()
            there.close()
            ends.append(here)
        try:
            said = [heard(rank, *each, patience) for rank, each in enumerate(zip(started, ends, strict=True))]
        finally:
            for process in started:
                process.join(5)
                process.kill()
        if ok and (failed := [word for well, word in said if not well]):
            raise RuntimeError("\n".join(failed))
        return [word for _, word in said]

    def heard(rank: int, process, end, patience: float) -> tuple[bool, Any]:
        if not end.poll(patience):
            return False, f"process {rank}: no word in {patience} s"
        try:
            return end.recv()
        except EOFError:
            process.join(5)
            return False, f"process {rank}: ended with code {process.exitcode} and said nothing"

    def one(rank: int, count: int, nodes: int, store: Path, end, work) -> None:
        here = count // nodes
        told = {
            "RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_RANK": rank % here,
            "LOCAL_WORLD_SIZE": here,
            "GROUP_RANK": rank // here,
        }
        told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 0, "TORCHELASTIC_RUN_ID": "test"}
        os.environ |= {key: str(value) for key, value in told.items()}
        try:
            if count > 1:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
            end.send((True, work(rank)))
        except BaseException:
            end.send((False, f"process {rank}: {traceback.format_exc()}"))

    return run


@pytest.fixture
def configure(nano_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """`configure("model=nano", ...)`: the configuration that `python train.py ...` would get."""
    monkeypatch.setenv("MVLM_CACHE", str(nano_cache))

    def configured(*overrides: str, page: str = "train") -> DictConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose(page, list(overrides))

    return configured


@pytest.fixture
def finetuned(configure):
    """`finetuned(runs, "cell=a", ...)`: the nano model's second stage alone, with dropout in its adapters; its folder in that run."""
    import lightning as L

    from mvlm import build, fit
    from mvlm.run import Run

    def train(runs: Path, *words: str) -> Path:
        cfg = configure(
            "model=nano", "strategy=lora", "trainer=cpu", "trainer.precision=32-true", f"runs={runs}", *words
        )
        L.seed_everything(0, verbose=False)
        run, files, text = Run.open(cfg), build.corpus(cfg), build.tokenizer(cfg)
        model = build.model(cfg)
        data = {"pretrain": None, "finetune": build.mixture(cfg, "finetune", files, text, model.image_tokens)}
        fit.stage(cfg, run, "finetune", model, data, files, text)
        return run.folder / "finetune"

    return train


@pytest.fixture
def scored(configure, tmp_path: Path):
    """`scored("a", right)`: a run folder with stored answers, scored without a model.

    `right(question, view)` says whether an answer is right; `controls` are answered beside the true pictures.
    """
    from mvlm import build, score
    from mvlm.benchmark.evaluate import answers_file, evaluate
    from mvlm.run import Run

    cfg = configure("model=nano")
    folder = build.corpus(cfg).benchmarks
    found = score.benchmarks(cfg.benchmark, folder)

    def answer(name: str, truth, right: bool) -> str:
        if name == "sqa":
            return "ABCDE"[truth[0] if right else (truth[0] + 1) % truth[1]]
        if name == "mmbench":
            return truth[0] if right else next(letter for letter in truth[1] if letter != truth[0])
        if name in ("pope", "mme"):
            return truth if right else {"yes": "no", "no": "yes"}[truth]
        return (truth if isinstance(truth, str) else truth[0]) if right else "neither"

    def made(name: str, right, controls: tuple[str, ...] = ()) -> Run:
        run = Run(tmp_path / name)
        (run.folder / "answers").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), run.folder / "config.yaml")
        for benchmark in found:
            for view in ("none", *controls):
                lines = [
                    {
                        "id": q.id,
                        "prompt": q.text,
                        "text": answer(benchmark.name, q.truth, right(q, view)),
                        "stopped": True,
                    }
                    for q in benchmark.questions()
                ]
                text = "".join(json.dumps(line) + "\n" for line in lines)
                answers_file(run.folder / "answers", benchmark, view).write_text(text)
        results = evaluate(None, found, run.folder / "answers", controls=controls) | {"generated": True}
        score.publish(run, results, found, folder)
        return run

    made.found = found
    return made
