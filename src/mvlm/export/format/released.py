"""The layout of the released MobileVLM as a folder to hand over or to upload: weights, config.json, tokenizer and a model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from mvlm import score
from mvlm.build import STAGES
from mvlm.chat import Chat
from mvlm.data.corpus import is_own
from mvlm.export.card import file_table, seen, table
from mvlm.export.gate import QUESTIONS, answer, pictures
from mvlm.export.handover import Source, Unproven, described, refuse
from mvlm.model.files import read_config
from mvlm.page import CONTROLS
from mvlm.pocket.parts import PARTS
from mvlm.run import Run, write_json
from mvlm.trust import read_json

TOKENIZER = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files of a tokenizer, of which a folder has some."""

LOGPROB = 1e-4
"""Largest difference of a first token's log-probability, likely or not. Weights, pixels and ids are the same to the bit by then, and so
are the kernels on one machine: 0 was seen. Heads, rates of rotation and epsilons show in no tensor; the smallest fault of them that was
seen, an epsilon of 1e-6 for 1e-5 in the norms of the pocket language model, makes 2e-3."""


def place(cfg: DictConfig) -> str:
    """`released`.

    Raises:
        ValueError: a key of another format's. The proof needs no other program, so it can't be left out.
    """
    refuse(cfg, quant="f16", scores=False, gate=True, llama_cpp=None, gpu_layers=0)
    return "released"


def check(source: Source, cfg: DictConfig) -> int:
    """The size of the stage's weights.

    Raises:
        ValueError: it is such a folder already.
    """
    if source.run is None:
        raise ValueError(f"{cfg.run} is in the released format already: copy the folder")
    return sum(path.stat().st_size for path in _weights(source))


def write(folder: Path, source: Source, cfg: DictConfig) -> None:
    """Copies, the config with what they don't tell, the card.

    Raises:
        Unproven: the folder, opened anew, is not the run's model.
    """
    files = [*_weights(source), *(path for name in TOKENIZER if (path := source.tokenizer / name).is_file())]
    for path in files:
        shutil.copyfile(path, folder / path.name)  # no links: whoever changes the one must not change the other
    about = source.about()
    look = about["pictures"]
    config = read_config(source.weights)
    config |= {"image_aspect_ratio": look["mode"], "mvlm_pictures": look, "mvlm_template": about["template"]}
    write_json(folder / "config.json", config)
    parity = compare(source.chat, Chat.open(folder))
    if parity["faults"]:
        write_json(folder / "parity.json", parity)
        raise Unproven("the folder, opened anew, is not the run's model:\n  " + "\n  ".join(parity["faults"]))
    Console().print(f"opened anew: {_same(parity)}", soft_wrap=True)
    model, stages = source.chat.model, [stage for stage in STAGES if source.run.finished(stage)]
    about |= {
        "parameters": {
            name: sum(value.numel() for value in part.parameters())
            for name, part in (("tower", model.vision), ("projector", model.projector), ("language", model.language))
        },
        "prompt": source.chat.talk.open("<image>\n{question}"),
        "stages": {stage: read_json(source.run.folder / stage / "stage.json") for stage in stages},
        "files": {path.name: described(path) for path in sorted(folder.iterdir())},
        "tower kind": config.get("vision_tower_type"),
        "proven": True,
        "parity": parity,
    }
    for told in about["stages"].values():
        told.pop("history", None)
    write_json(folder / "manifest.json", about)
    (folder / "README.md").write_text(card(about, source.run), encoding="utf-8")


def _weights(source: Source) -> list[Path]:
    return sorted([*source.weights.glob("*.safetensors"), *source.weights.glob("*.safetensors.index.json")])


@torch.inference_mode()
def compare(ours: Chat, theirs: Chat) -> dict[str, Any]:
    """Two openings of one model: every tensor, then how one picture and one question come in and what comes out first.

    Returns:
        {"tensors": how many are the same to the bit, "first_logprob": largest difference, "faults"}
    """
    here, there = ours.model.state_dict(), theirs.model.state_dict()
    same = [name for name, value in here.items() if name in there and torch.equal(value, there[name])]
    parity: dict[str, Any] = {"tensors": len(same), "first_logprob": None}
    parity["faults"] = faults = [
        f"{len(odd)} tensors differ, {odd[0]} first" for odd in [sorted({*here, *there} - set(same))] if odd
    ]
    file, question = pictures(ours.pictures.size)[1], QUESTIONS[1]  # a wide one, which the modes fit differently
    if not torch.equal(ours.pictures(file), theirs.pictures(file)):
        faults.append(f"a picture becomes other pixels: {theirs.pictures} instead of {ours.pictures}")
    asked = [
        one.talk.prompt(question, one.words, image_tokens=one.model.image_tokens, has_image=True)
        for one in (ours, theirs)
    ]
    if asked[0] != asked[1] or ours.talk.stop_ids(ours.words) != theirs.talk.stop_ids(theirs.words):
        faults.append(f"a question becomes other ids: template {theirs.talk.name} instead of {ours.talk.name}")
    if not faults:
        said = [
            answer(one.model, asked[0], one.model.project(one.model.encode(one.pictures(file)[None]))[0], set(), 1)
            for one in (ours, theirs)
        ]
        parity["first_logprob"] = worst = float((said[0].logprobs - said[1].logprobs).abs().max())
        if not worst <= LOGPROB:
            faults.append(f"a first token's log-probability differs by {worst:.1e} (at most {LOGPROB})")
    return parity


# ----------------------------------------------------------------------------------------------------- what is told


def card(about: dict[str, Any], run: Run) -> str:
    """README.md in the model hub's manner."""
    cfg, count, pocket = run.config, about["parameters"], score.is_generated(run.config, None)
    parts = [
        _front(about, cfg, pocket),
        f"# {about['name']}",
        f"A small vision-language model of the MobileVLM V2 kind ([arXiv 2402.03766](https://arxiv.org/abs/2402.03766)): the tower "
        f"`{about['tower']['name']}` ({count['tower'] / 1e6:,.1f} M parameters, {about['pictures']['size']} px), the projector "
        f"`{about['projector']['type']}` ({count['projector'] / 1e6:,.2f} M; {about['projector']['image tokens']} tokens a picture) "
        f"and a LLaMA ({count['language'] / 1e6:,.1f} M). Trained by mvlm, and no checkpoint of that paper's authors.",
        "## Use\n\n" + _use(about),
        "## Training\n\n" + "\n\n".join(_training(about, cfg, pocket)),
        "## Scores\n\n" + "\n\n".join(_scores(run)),
        "## Files\n\n" + file_table(about["files"]),
        f"Opened anew beside the run: {_same(about['parity'])}. `manifest.json` has the whole hashes, the versions and the configuration.",
    ]
    return "\n\n".join(parts) + "\n"


def _same(parity: dict[str, Any]) -> str:
    worst = parity["first_logprob"]
    said = f"differ by at most {worst:.1e}" if worst else "are the same"
    return f"{parity['tensors']} tensors, all the same to the bit; a first token's log-probabilities {said}"


def _front(about: dict[str, Any], cfg: DictConfig, pocket: bool) -> str:
    """The yaml that the hub reads. The licence is not known here, so it is not claimed; names of the generated sources would be
    taken for the public sets of these names, and own files are none."""
    bases = [base for base in cfg.model.weights.values() if isinstance(base, str)]
    known = {
        "library_name": "mvlm",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mobilevlm", about["projector"]["type"]],
    }
    known |= {"base_model": bases} if bases else {}
    samples = [name for told in about["stages"].values() for name in told.get("samples", {})]
    public = [] if pocket else [name for name in dict.fromkeys(samples) if not is_own(name)]
    known |= {"datasets": public} if public else {}
    return f"---\n{OmegaConf.to_yaml(OmegaConf.create(known))}---"


def _use(about: dict[str, Any]) -> str:
    theirs = about["projector"]["type"] in ("mlp2x_gelu", "ldpnet", "ldpnetv2") and about["tower kind"] == "clip"
    elsewhere = (
        "The names of the tensors are those of the released MobileVLM checkpoints, and so are the keys of `config.json`, with some of "
        "ours (`mvlm_...`) among them. transformers' `LlamaForCausalLM.from_pretrained` reads the language model alone, and names the other "
        "tensors as unexpected. "
    ) + (
        "The official code was not run on this folder; it takes the picture mode `pad`, CLIP's mean and deviation and its own template, "
        "whatever is said below."
        if theirs
        else "The official code can't build this model: it has no such tower or projector."
    )
    return (
        "With mvlm, from this folder:\n\n```\n"
        'python chat.py run=<this folder> image=cat.png prompt="What is this?"\n'
        "python export.py run=<this folder> quant=q4_k                    # for llama.cpp\n"
        "lmms-eval --model mvlm --model_args run=<this folder> --tasks pope\n```\n\n"
        f"{elsewhere}\n\n"
        f"Pictures: {seen(about['pictures'])}\n\n"
        f"The prompt, template `{about['template']}`; {about['projector']['image tokens']} image tokens stand for `<image>`:\n\n"
        f"```\n{about['prompt']}\n```"
    )


def _training(about: dict[str, Any], cfg: DictConfig, pocket: bool) -> Iterator[str]:
    facts = about["from"]["run"]
    yield (
        f"Seed {cfg.seed}, commit `{facts.get('commit') or 'not known'}`"
        + "".join(f", {name} {facts['versions'][name]}" for name in ("torch", "transformers") if "versions" in facts)
        + f". AdamW {tuple(cfg.recipe.optimizer.betas)}, weight decay {cfg.recipe.optimizer.weight_decay:g}, cosine to zero after a warm-up "
        f"of {cfg.recipe.warmup:g} of the steps; texts of at most {cfg.recipe.max_length} tokens."
    )
    yield (
        "Started from: "
        + "; ".join(f"{part} {_base(base)}" for part, base in cfg.model.weights.items())
        + ". These weights' own licence "
        "is their owner's to state; those of what they started from and of the data bind."
    )
    yield "Learning rates a part; a frozen one has none:"
    rows = []
    for stage, told in about["stages"].items():
        rates = cfg.strategy[stage].rates
        parts = (f"{part} {'frozen' if rate is None else f'{rate:g}'}" for part, rate in rates.items())
        lora = cfg.strategy[stage].get("lora")
        rates_told = ", ".join(parts) + (f"; language by LoRA of rank {lora.r}, merged" if lora else "")
        done = [str(told.get(key, "not known")) for key in ("steps", "precision")]
        rows.append(
            [stage, f"{sum(told.get('samples', {}).values()):,}", str(cfg.recipe[stage].batch), *done, rates_told]
        )
    yield table(["stage", "samples", "batch", "steps", "precision", "learning rates"], rows)
    if any("start" in told for told in about["stages"].values()):
        yield (
            f"Before the first stage the projector was started (`recipe.start={cfg.recipe.start}`), which reads the training pictures' "
            "own descriptions."
        )
    yield "Samples by source:"
    sources = [
        [stage, name, f"{count:,}"]
        for stage, told in about["stages"].items()
        for name, count in told.get("samples", {}).items()
    ]
    yield table(["stage", "source", "samples"], sources)
    own = [name for _, name, _ in sources if is_own(name)]
    if pocket and len(own) < len(sources):
        yield (
            "**The data are generated** (mvlm's pocket world: drawn scenes of OpenMoji objects): counterparts of the public sets of "
            "these names, in their formats, and nothing of the sets themselves."
        ) + f" {', '.join(f'`{name}`' for name in dict.fromkeys(own))}: the owner's." * bool(own)
    hashes = facts.get("data_sha256", {})
    if hashes:
        yield "The annotation files' SHA-256 are in `manifest.json` (`from.run.data_sha256`)."


def _base(base: DictConfig | str | None) -> str:
    """What a part's weights were before training."""
    if isinstance(base, DictConfig):
        part = PARTS.get(base.get("part"))
        return (
            f"`{base.part}` of the package {part.package} {part.version} ({part.licence})"
            if part
            else f"`{base._target_}`"
        )
    return "random weights" if base is None else f"`{base}`"


def _scores(run: Run) -> Iterator[str]:
    found = [results for protocol in ("paper", "harness") if (results := run.results(protocol)).get("benchmarks")]
    if not found:
        yield "Not measured."
    for results in found:
        # Results of earlier versions lack the two.
        results.setdefault("generated", score.is_generated(run.config, run.config.get("benchmark_root")))
        for one in (one for views in results["benchmarks"].values() for one in views.values()):
            one.setdefault("official", None)
        files = "**generated pocket benchmarks**" if results["generated"] else "the benchmarks' files"
        told = f"Protocol {results['protocol']}, on {files}; ± is half of the 95 % interval over pictures. "
        if results["generated"]:
            told += (
                "They have the public benchmarks' formats and names, and drawn scenes for their pictures: these figures say nothing of "
                "the public ones and must not be put beside the paper's. "
            )
        yield told + "The controls are the same questions without a picture and with another question's."
        views = list(results["avg"])
        cells = score.rows(results)
        head = ["benchmark", *(CONTROLS[view] for view in views), "questions"]
        yield table(head, [[name, *(row.get(view, "") for view in (*views, "items"))] for name, row in cells.items()])
        if blind := score.blindness(results):
            yield f"**{blind}**"
        if len(views) == 1:
            yield "The controls were not measured."
