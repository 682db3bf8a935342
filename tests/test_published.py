"""The paper's printed values: they hold together, and the rows of sweeps/ are those that they were printed for."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mvlm.model.mobilevlm import MobileVLM
from mvlm.plan import count_parts, meta_model
from mvlm.score import TITLES
from mvlm.sweep import Sweep

ROOT = Path(__file__).resolve().parents[1]
TABLES = OmegaConf.to_container(OmegaConf.load(ROOT / "results" / "published.yaml"))
T4, T5, T6, T7 = (TABLES[f"table{n}"] for n in (4, 5, 6, 7))
CELLS = {name: Sweep.read(name)[0].rows for name in ("table4", "table6", "table7")}
"""What each row sets, by its name."""
SCORED = [("table4", r) for r in T4] + [("table6", r) for r in T6] + [("table7", r) for r in T7]
COLUMNS = ["GQA", "SQA-I", "VQA-T", "POPE", "MME-P", "MMB-dev"]

HALF = 0.05
"""Half of a printed digit: what rounding a score or an average can do."""

BOUND = HALF + (5 * HALF + HALF / 20) / 6
"""The printed Avg is off by HALF at most, and so is each of its six cells, of which MME's counts a twentieth: 0.0921."""


def scores(row: dict) -> list[float | None]:
    return [row[column] for column in COLUMNS]


def mean(row: dict) -> float:
    return fmean(row[column] / 20 if column == "MME-P" else row[column] for column in COLUMNS)


def test_the_tables_are_whole() -> None:
    assert {name: len(rows) for name, rows in TABLES.items()} == {"table4": 21, "table5": 9, "table6": 3, "table7": 7}
    assert list(TITLES.values()) == COLUMNS, "a report finds its own columns here"
    assert [row["row"] for row in T6] == ["(a)", "(b)", "(c)"] and [row["row"] for row in T7] == list(range(1, 8))
    for _, row in SCORED:
        for value in [*scores(row), row["Avg"]]:
            assert value is None or value == round(value, 1), f"the paper prints one digit after the point: {row}"
        assert (row["Avg"] is None) == (None in scores(row)), row
    assert sum(row["Avg"] is not None for row in T4) == 10
    assert [row["method"].startswith("MoE-LLaVA") for row in T4] == [row.get("starred") == ["MME-P"] for row in T4]


def test_every_average_is_its_rows_but_one() -> None:
    off = [(table, row) for table, row in SCORED if row["Avg"] is not None and abs(mean(row) - row["Avg"]) > BOUND]
    assert [(table, row["row"]) for table, row in off] == [("table7", 5)]
    row = off[0][1]
    assert (row["Avg"], round(mean(row), 2)) == (63.2, 63.42)
    assert row["note"].startswith("the six cells average 63.42, not 63.2")


def test_every_latency_is_its_rows_but_one() -> None:
    """Both are printed to 0.005, so Eval_avg * T_total may miss the 256 tokens by 0.005 of each beside the other."""
    off = [r for r in T5 if abs(r["Eval_avg"] * r["T_total"] - 256) > 0.005 * (r["Eval_avg"] + r["T_total"]) + 0.005**2]
    assert [row["model"] for row in off] == ["MobileVLM V2 3B"]
    assert (off[0]["Eval_avg"], off[0]["T_total"], round(256 / off[0]["T_total"], 2)) == (30.80, 8.38, 30.55)
    assert off[0]["note"].startswith("256 / 8.38 s is 30.55 tokens/s, not 30.80")


def test_the_texts_steps_are_table_7s_but_two() -> None:
    avg = {row["row"]: row["Avg"] for row in T7}
    told = {(3, 1): 5.4, (4, 2): 4.5, (5, 4): 0.4, (6, 5): 0.5, (7, 6): 0.5, (7, 4): 1.4}  # section 5.3
    printed = {pair: round(avg[pair[0]] - avg[pair[1]], 1) for pair in told}
    assert {pair: printed[pair] for pair in told if printed[pair] != told[pair]} == {(3, 1): 4.9, (4, 2): 4.1}
    assert T7[2]["note"] == "section 5.3 gives 5.4 points over row 1; the printed averages differ by 4.9"
    assert T7[3]["note"] == "section 5.3 gives 4.5 points over row 2; the printed averages differ by 4.1"


def test_every_note_is_checked_above() -> None:
    noted = [(name, row.get("row", row.get("model"))) for name, rows in TABLES.items() for row in rows if "note" in row]
    assert noted == [("table5", "MobileVLM V2 3B"), ("table7", 3), ("table7", 4), ("table7", 5)]


def test_what_two_tables_print_is_the_same() -> None:
    by_cell: dict[tuple, list[dict]] = {}
    for name, rows in (("table6", T6), ("table7", T7)):
        for row in rows:
            by_cell.setdefault(tuple(CELLS[name][str(row["row"])].values()), []).append(row)
    twice = [rows for rows in by_cell.values() if len(rows) > 1]
    assert len(by_cell) == 8 and [[row["row"] for row in rows] for rows in twice] == [["(a)", 2], ["(c)", 4]]
    method = {row["method"]: row for row in T4 if row["LLM"] != "Vicuna-13B"}
    twice += [[method["MobileVLM 1.7B"], T6[0]], [method["MobileVLM V2 1.7B"], T7[6]]]
    for one, other in twice:
        assert (scores(one), one["Avg"]) == (scores(other), other["Avg"])
    renamed = {"ShareGPT4V-7B": "ShareGPT4V", "LLaVA-1.5 7B": "LLaVA-1.5"}
    only = [r["model"] for r in T5 if renamed.get(r["model"], r["model"]) not in method]
    assert only == ["LLaVA-1.5 3.3B", "LLaVA-1.5 1.4B"]
    for row in T5:
        if row["model"] not in only:
            assert row["Avg"] == method[renamed.get(row["model"], row["model"])]["Avg"]


# -- the cells


def composed(cell: dict[str, str]) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("plan", [f"{axis}={choice}" for axis, choice in cell.items()])


@pytest.mark.parametrize("name", ["table6", "table7"])
def test_every_row_is_a_cell_of_the_sweep_and_follows_its_flags(name: str) -> None:
    assert list(CELLS[name]) == [str(row["row"]) for row in TABLES[name]], "the same rows in the same order"
    for row in TABLES[name]:
        cell = CELLS[name][str(row["row"])]
        assert list(cell) == ["projector", "data", "strategy"]
        assert all((ROOT / "conf" / axis / f"{choice}.yaml").exists() for axis, choice in cell.items()), cell
        d, t = (row["D"], row["T"]) if "D" in row else (row["D&T"], row["D&T"])
        assert (cell["data"], cell["strategy"]) == ("v2" if d else "v1", "unfreeze_llm" if t else "freeze_llm")


def test_table_6_is_of_one_projector_and_table_4s_rows_are_printed() -> None:
    assert {cell["projector"] for cell in CELLS["table6"].values()} == {"ldpv1"}, "MobileVLM's throughout"
    assert set(CELLS["table4"]) <= {row["method"] for row in T4}


@pytest.fixture(scope="module")
def whole() -> MobileVLM:
    return meta_model(composed({"model": "1.7b"}).model.module)


@pytest.mark.parametrize("row", T7, ids=lambda row: str(row["row"]))
def test_tokens_and_parameters_are_as_printed(whole: MobileVLM, row: dict) -> None:
    """Together they tell all five projectors apart. Params is printed in millions to two digits: 0.005 either way."""
    with torch.device("meta"):  # tower and language model are the same for all, and slow to build
        projector = instantiate(composed({"model": "1.7b"} | CELLS["table7"][str(row["row"])]).projector)
        net = MobileVLM(whole.vision, projector, whole.language)
    assert net.image_tokens == row["Tokens"]
    assert abs(count_parts(net)["projector"] / 1e6 - row["Params"]) <= 0.005
