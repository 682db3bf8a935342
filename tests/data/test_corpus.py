from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mvlm.data.byte_tokenizer import build as build_tokenizer
from mvlm.data.corpus import Corpus, Source, sources_of
from mvlm.data.tokenizer import load_tokenizer
from mvlm.pocket import shapes
from mvlm.pocket.draw import Sprites
from mvlm.pocket.objects import KINDS

CONF = Path(__file__).parents[2] / "conf"
V1 = {"lcs558k", "llava665k"}
TABLE2 = {  # thousands of samples, paper, Table 2
    "visual_dialog": 123,
    "textvqa": 35,
    "vsr": 13,
    "vigc": 37,
    "iconqa": 107,
    "sqa": 13,
    "coco": 592,
    "sbu": 844,
    "sharegpt4v": 665,
}


def data(name: str, stage: str) -> list[str]:
    return list(OmegaConf.load(CONF / "data" / f"{name}.yaml")[stage])


def place(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("[]")


@pytest.fixture
def small(tmp_path: Path) -> Corpus:
    place(tmp_path, "train/a.json", "train/b.json", "mixed/all.json")
    (tmp_path / "pictures").mkdir()
    shared = {"file": "mixed/all.json", "images": "mixed"}
    return Corpus(tmp_path, {"c": {**shared, "samples": 3}, "d": {**shared, "samples": 4}}, samples={"a": 1, "b": 2})


def test_a_name_is_a_file_a_folder_and_a_count(small: Corpus) -> None:
    assert small.source("a") == Source("a", small.root / "train/a.json", small.root / "pictures", 1)
    assert small.benchmarks == small.root / "benchmarks"
    assert [s.name for s in sources_of(small, ["b", "a"])] == ["b", "a"]


def test_names_that_share_a_file_are_one_source_and_only_together(small: Corpus) -> None:
    assert sources_of(small, ["c", "a", "d"]) == [
        Source("all", small.root / "mixed/all.json", small.root / "mixed", 7),
        small.source("a"),
    ]
    with pytest.raises(ValueError, match="'c' needs d beside it"):
        sources_of(small, ["c", "a"])


def test_a_source_may_have_no_pictures(tmp_path: Path) -> None:
    place(tmp_path, "train/t.json")
    assert Corpus(tmp_path, {"t": {"images": None}}).source("t") == Source("t", tmp_path / "train/t.json", None)


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no source 'textvq'; did you mean 'textvqa'"):
        Corpus(tmp_path, samples={"textvqa": 1, "sqa": 1}).source("textvq")
    with pytest.raises(ValueError, match="has pictures; an entry may have file"):
        Corpus(tmp_path, {"a": {"pictures": "x"}})


def test_the_same_name_twice_is_refused(small: Corpus) -> None:
    with pytest.raises(ValueError, match="a stands twice"):
        sources_of(small, ["a", "b", "a"])


def test_a_missing_file_says_where_it_comes_from_and_what_is_dead(tmp_path: Path) -> None:
    corpus = instantiate(OmegaConf.load(CONF / "corpus" / "full.yaml"), root=str(tmp_path))
    with pytest.raises(ValueError) as refused:
        corpus.source("lcs558k")
    assert "pretrain_data/blip_laion_cc_sbu_558k.json" in str(refused.value)
    assert "LLaVA-1.5's pre-training set" in str(refused.value) and "corpus.root" in str(refused.value)
    # Asked for first, Visual Dialog has no trouble of its own, but the file that is missing holds SBU too.
    with pytest.raises(ValueError, match=r"sbu: many picture links return 403 .*MobileVLM#71"):
        sources_of(corpus, data("v2", "finetune"))
    place(tmp_path, "train/x.json")
    with pytest.raises(ValueError, match=r"the folder of pictures of source 'x' is missing"):
        Corpus(tmp_path, samples={"x": 1}).source("x")


def test_own_files_stand_beside_names(small: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place(tmp_path, "mine.json")
    mine = Source("mine.json", Path("mine.json"), Path("mixed"), None)
    assert sources_of(small, ["mine.json", "a"], images="mixed") == [mine, small.source("a")]
    assert sources_of(small, ["mine.json"])[0].images is None  # text only
    with pytest.raises(ValueError, match="images=nowhere is no folder"):
        sources_of(small, ["mine.json"], images="nowhere")
    with pytest.raises(ValueError, match=r"/yours\.json is missing"):
        sources_of(small, ["yours.json"])


def test_the_real_corpus_has_the_papers_sources_and_counts() -> None:
    corpus = instantiate(OmegaConf.load(CONF / "corpus" / "full.yaml"))
    counts = {name: entry["samples"] for name, entry in corpus.entries.items()}
    assert {name: counts[name] // 1000 for name in TABLE2} == TABLE2
    assert set(counts) == V1 | {"sharegpt4v_pt"} | set(TABLE2)
    # 1.2M and, "in total", 3.6M: Table 2 rounds down
    assert counts["sharegpt4v_pt"] // 100_000 == 12
    assert (counts["sharegpt4v_pt"] + sum(counts[name] for name in TABLE2)) // 100_000 == 36
    assert all(entry["origin"] for entry in corpus.entries.values())


def test_the_released_mixture_is_read_once(tmp_path: Path) -> None:
    corpus = instantiate(OmegaConf.load(CONF / "corpus" / "full.yaml"), root=str(tmp_path))
    place(tmp_path, "finetune_data/MobileVLM_V2_FT_Mix2M.json")
    (source,) = sources_of(corpus, data("v2", "finetune"))
    assert (source.name, source.samples) == ("MobileVLM_V2_FT_Mix2M", 2_429_000)


@pytest.mark.parametrize("corpus", ["full", "pocket", "nano"])
def test_every_source_of_v1_and_v2_is_in_every_corpus(corpus: str) -> None:
    config = OmegaConf.load(CONF / "corpus" / f"{corpus}.yaml")
    known = set(config.get("samples") or {}) | set(config.get("sources") or {})
    assert known == {name for d in ("v1", "v2") for stage in ("pretrain", "finetune") for name in data(d, stage)}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    with pytest.MonkeyPatch.context() as patch, initialize_config_dir(str(CONF), version_base="1.3"):
        patch.setenv("MVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return instantiate(compose("plan", ["model=nano"]).corpus, _convert_="all")


def test_the_nano_corpus_holds_what_it_promises(nano: Corpus) -> None:
    for d in ("v1", "v2"):
        for stage in ("pretrain", "finetune"):
            for source in sources_of(nano, data(d, stage)):
                records = json.loads(source.annotations.read_text())
                assert len(records) == source.samples
                assert all((source.images / r["image"]).is_file() for r in records if "image" in r)
    # the reference's order of samples needs both kinds
    for name in ("llava665k", "sharegpt4v"):
        records = json.loads(nano.source(name).annotations.read_text())
        assert 0 < sum("image" not in r for r in records) < len(records)
    assert {f.name for f in nano.benchmarks.iterdir() if f.is_dir()} == {
        *("gqa", "sqa", "textvqa", "pope", "mme", "mmbench")
    }


def test_every_shape_can_be_told_apart_and_has_its_kinds_proportions(tmp_path: Path) -> None:
    sprites = Sprites(shapes.folder(tmp_path))
    pictures = {kind.name: sprites.get(kind.name, None) for kind in KINDS.values()}
    assert len({picture.tobytes() for picture in pictures.values()}) == len(KINDS)
    for name, picture in pictures.items():
        width, height = (side - 10 for side in picture.size)  # the sprite's outline is 5 px wide on every side
        # The outline's stroke of 2 of 72 units widens both sides alike, most visibly the short one.
        assert width / height == pytest.approx(KINDS[name].aspect, rel=0.1)


def test_the_byte_tokenizer_keeps_every_text(tmp_path: Path) -> None:
    words = load_tokenizer(build_tokenizer(tmp_path))
    text = "Two  words,\n ümläut, 猫, \x00 and 🙂 "
    assert words.decode(words.encode(text)) == text
    assert len(words.encode(text)) == len(text.encode())
    assert (words.encode("<|im_end|>"), words.eos_id, words.vocab_size) == ([2], 2, 259)
    assert OmegaConf.load(CONF / "model" / "nano.yaml").module.language.config.vocab_size == words.vocab_size
