"""What is told about an export: the card, the script for the device, and the table that both the card and the terminal show.

Everything is made from the manifest, so that nothing can be told that it does not hold.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from mvlm.export.class_token import CURE, PATCH
from mvlm.export.engine import BUILD

HEAD = ("", "embeddings", "answers", "tokens", "log-prob: first, any", "gate")


def parity_row(parity: dict[str, Any]) -> list[str]:
    """One file's comparison with PyTorch on the run's own weights, under HEAD."""
    run = parity["run"]
    return [
        parity["quant"],
        f"{max(parity['embedding_run']):.2%} off",
        f"{run['same']} of {run['questions']}",
        f"{run['tokens']:.1%}",
        f"{run['first_logprob']:.3f}, {run['logprob']:.3f} off",
        "passed" if parity["passed"] else "FAILED",
    ]


def score_rows(scores: dict[str, Any], titles: dict[str, str]) -> list[list[str]]:
    """Benchmark, PyTorch's score, llama.cpp's, questions."""
    return [
        [
            titles.get(name, name),
            "not measured" if row["pytorch"] is None else f"{row['pytorch']:.1f}",
            f"{row['llama.cpp']:.1f}",
            str(row["questions"]),
        ]
        for name, row in scores["benchmarks"].items()
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def file_table(files: dict[str, dict[str, Any]]) -> str:
    """A manifest's files."""

    def size(count: int) -> str:
        return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"

    rows = [[f"`{f['name']}`", size(f["bytes"]), f"`{f['sha256'][:16]}`"] for f in files.values()]
    return table(["file", "size", "SHA-256"], rows)


def card(about: dict[str, Any], titles: dict[str, str]) -> str:
    """README.md of the folder.

    Args:
        about: the manifest.
        titles: of the benchmarks.
    """
    files, projector = about["files"], about["projector"]
    parts = [
        f"# {about['name']} for llama.cpp, {about['quant']}",
        f"A small vision-language model: the tower `{about['tower']['name']}`, the projector `{projector['type']}` "
        f"(`{projector['in llama.cpp']}` in llama.cpp; {projector['image tokens']} tokens a picture) and a LLaMA. "
        "Trained and exported by mvlm; `manifest.json` has all hashes, versions and the configuration.",
        file_table(files),
        "## Run it\n\n```\n" + ask_command(about, "cat.png", "'What is this?'") + "\n```",
        "On a Jetson Orin: `./jetson.sh`, which builds llama.cpp there. That script has not been run.",
        "## Parity\n\n" + _parity(about),
        "## Scores\n\n" + _scores(about, titles),
    ]
    if about["needs a mended llama.cpp"]:
        parts.insert(2, f"**Not for a llama.cpp as it comes.** {about['engine']} misplaces the class token. {CURE}")
    if about["notes"]:
        parts.append("## To know\n\n" + "\n".join(f"- {note}" for note in about["notes"]))
    return "\n\n".join(parts) + "\n"


def _parity(about: dict[str, Any]) -> str:
    if not about["proven"]:
        return "**Not measured: these files were never run** (`gate=false`)."
    count = about["parity"][0]["run"]["questions"]
    ties = [f"{parity['quant']}: {tie}" for parity in about["parity"] for tie in parity["ties"]]
    told = (
        f"{about['engine']} beside PyTorch in float32 with the run's weights, greedy, on {count} fixed questions, most of them about "
        "three fixed pictures: how far image embeddings are off, answers whose tokens are all the same, tokens before an answer parts, "
        "the largest difference of a likely token's log-probability at the first and at any token. The float16 file proves the export; "
        "what a file of fewer bits differs more comes of its bits."
    )
    near = "\n\nNear ties, where either token may come first: " + "; ".join(ties) + "." if ties else ""
    return told + "\n\n" + table(HEAD, [parity_row(parity) for parity in about["parity"]]) + near


def _scores(about: dict[str, Any], titles: dict[str, str]) -> str:
    scores = about["scores"]
    if scores is None:
        return "Not measured in llama.cpp (`scores=true` does)."
    files = "generated pocket benchmarks" if scores["generated"] else "benchmark files"
    told = f"Protocol {scores['protocol']}, {files}; llama.cpp ran this folder's files, PyTorch the run's weights."
    return told + "\n\n" + table(["benchmark", "PyTorch", "llama.cpp", "questions"], score_rows(scores, titles))


def ask_command(about: dict[str, Any], picture: str, question: str, program: str = "llama-mtmd-cli") -> str:
    """The command that asks about a picture; the words go into it as they are."""
    llm, mmproj = _names(about)
    asked = f"--image {picture} -p {question}"
    return f"{program} -m {llm} --mmproj {mmproj} --jinja --temp 0 -c {about['context']} {asked}"


def _names(about: dict[str, Any]) -> list[str]:
    return [shlex.quote(about["files"][role]["name"]) for role in ("language", "mmproj")]


def jetson(about: dict[str, Any]) -> str:
    """The script for the device."""
    llm, mmproj = _names(about)
    sums = "\n".join(f"{file['sha256']}  {file['name']}" for file in about["files"].values())
    mend = f"\n    {PATCH}  # the class token" if about["needs a mended llama.cpp"] else ""
    context = about["context"]
    ask = ask_command(about, '"$2"', '"$3"', '"$bin/llama-mtmd-cli"')
    return f"""#!/usr/bin/env bash
# {about["name"]}, {about["quant"]}, on a Jetson Orin (CUDA, compute capability 8.7).
# Written where there is no Orin: the files were compared with PyTorch on a processor, this script was not run.
#
#   ./jetson.sh ask cat.png "What is this?"     one answer
#   ./jetson.sh serve                           llama.cpp's server and its page, on port 8080
#   ./jetson.sh speed                           tokens a second of the language model
#
# LLAMA_CPP=<folder> takes a llama.cpp that is there; else build {BUILD} is fetched and built, once.
set -euo pipefail
cd "$(dirname "$0")"
llama=${{LLAMA_CPP:-$HOME/llama.cpp-{BUILD}}}
bin=$llama/build/bin
if [ ! -x "$bin/llama-mtmd-cli" ]; then
    [ -d "$llama" ] || git clone --depth 1 --branch {BUILD} https://github.com/ggml-org/llama.cpp "$llama"{mend}
    cmake -S "$llama" -B "$llama/build" -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=87
    cmake --build "$llama/build" -j "$(nproc)" --target llama-mtmd-cli llama-server llama-bench
fi
sha256sum --quiet --check <<'END'
{sums}
END
case ${{1:-}} in
    ask) {ask} -ngl 99 ;;
    serve) "$bin/llama-server" -m {llm} --mmproj {mmproj} --jinja -c {context} -ngl 99 --host 0.0.0.0 --port 8080 ;;
    speed) "$bin/llama-bench" -m {llm} -ngl 99 -p 256 -n 256 ;;
    *) sed -n '4,8p' "$0" && exit 2 ;;
esac
"""
