"""Settings that would train something else than was meant are refused by name, before anything is loaded."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from mvlm import settings
from mvlm.cli import CONF

WRONG = {
    "seed": [-1, 1.5, "abc", None],
    "on_bad_sample": ["Stop", True],
    "on_divergence": ["skp", None],
    "checkpoint_every": [0, "often", True],
    "evaluate": ["maybe", 1],
    "controls": [["blinded"], "blind"],
    "batch_size": [0],
    "questions": [0],
    "rounds": [0],
    "steps": [-8],
    "devices": [0, "auto"],
    "text": [-1],
    "mfu": [0, 1.01, 35],
    "peak": [0, "h100"],
    "max_new_tokens": [0],
    "recipe.pretrain.epochs": [0, 0.5],
    "recipe.finetune.epochs": [-1],
    "recipe.pretrain.order": ["sorted"],
    "recipe.finetune.order": [None],
    "recipe.optimizer.betas": [[0.9], [0.9, 1], 0.9, [0.9, "x"]],
    "recipe.optimizer.eps": [0],
    "recipe.optimizer.weight_decay": [-0.1, float("nan")],
    "recipe.warmup": [1, -0.1, 2],
    "recipe.clip": [0, -1],
    "recipe.max_length": [0],
    "recipe.start": ["words "],
    "recipe.cache_features": ["yes"],
    "follow_links": ["yes"],
    "data.pretrain": ["sbu"],
    "data.finetune": ["mine.json", None],
}


@pytest.mark.parametrize("key", settings.RULES)
def test_what_is_wrong_is_told_with_what_is_right(key: str) -> None:
    right = settings.RULES[key][1]
    for value in WRONG[key]:
        cfg = OmegaConf.create()
        OmegaConf.update(cfg, key, value)
        with pytest.raises(ValueError) as told:
            settings.check(cfg)
        assert str(told.value) == f"{key}={value}: it may be {right}"


PAGES = {
    path.stem: ("pocket", "1.7b", "nano") if "- model:" in path.read_text() else () for path in CONF.glob("*.yaml")
}


@pytest.mark.parametrize("page, words", [(page, [f"model={m}"]) for page, some in PAGES.items() for m in some] + [
    (page, []) for page in PAGES
])  # fmt: skip
def test_what_the_project_says_itself_is_right(configure, page: str, words: list[str]) -> None:
    settings.check(configure(*words, page=page))


@pytest.mark.parametrize(
    "word",
    ["checkpoint_every=null", "recipe.clip=null", "recipe.warmup=0", "controls=[]", "controls=[shuffled]", "evaluate=false"],
)  # fmt: skip
def test_the_edges_are_right(configure, word: str) -> None:
    settings.check(configure(word))


def test_a_folder_of_own_pictures_without_own_files_is_refused(configure) -> None:
    with pytest.raises(
        ValueError, match=r"data.images=pictures is where the pictures of own files lie, and there are none"
    ):
        settings.check(configure("data.images=pictures"))
    settings.check(configure("data=custom", "data.finetune=[mine.json]", "data.images=pictures"))


def test_a_start_from_words_needs_whole_pictures(configure) -> None:
    square = ["recipe.pretrain.pictures=square", "recipe.finetune.pictures=square"]
    with pytest.raises(ValueError, match=r"start=words .* recipe.pretrain.pictures=square cuts them"):
        settings.check(configure("model=pocket", square[0]))
    with pytest.raises(ValueError, match=r"recipe.finetune.pictures=square cuts them"):
        settings.check(configure("model=pocket", square[1], "data.pretrain=[]"))
    settings.check(configure("model=pocket", square[1]))
    settings.check(configure("model=pocket", *square, "recipe.start=random"))
