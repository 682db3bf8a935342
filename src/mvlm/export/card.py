"""What is told about an export: the card, the script for the device, and the table that both the card and the terminal show.

Everything is made from the manifest, so that nothing can be told that it does not hold.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from mvlm.data.image import LETTERBOX_COLOUR
from mvlm.export.class_token import CURE, FILE, PATCH, RIGHT
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


FITTED = {
    "square": "The shorter side is resized to {size} (bicubic, as Pillow does it), then the middle is cut out.",
    "pad": "Filled up to a square with the mean colour (the picture in the middle), then resized to {size} (bicubic, as Pillow does it).",
    "letterbox": "The longer side is resized to {size} (bicubic, as Pillow does it); around the picture, which lies in the middle, comes "
    "the colour {colour}.",
}
"""What `mvlm.data.image.Pictures` does in each mode."""


def seen(look: dict[str, Any]) -> str:
    """How a picture file becomes pixels, for whoever must do it again."""
    mean, std = (", ".join(f"{value:.6g}" for value in look[key]) for key in ("mean", "std"))
    return (
        f"RGB, mode `{look['mode']}`. {FITTED[look['mode']].format(size=look['size'], colour=LETTERBOX_COLOUR)} Then "
        f"`(value / 255 - mean) / std` with mean [{mean}] and std [{std}], channels first."
    )


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
        f"{origin(about)} `manifest.json` has all hashes, versions and the configuration.",
        file_table(files),
        "## Run it\n\n```\n" + ask_command(about, "cat.png", "'What is this?'") + "\n```",
        "On a Jetson Orin: `./jetson.sh`, which builds llama.cpp there. It was never "
        "run on an Orin; its commands were, with a llama.cpp for x86 processors.",
        "## Parity\n\n" + _parity(about),
        "## Scores\n\n" + _scores(about, titles),
    ]
    if about["needs a mended llama.cpp"]:
        parts.insert(2, _mend(about))
    if about["notes"]:
        parts.append("## To know\n\n" + "\n".join(f"- {note}" for note in about["notes"]))
    return "\n\n".join(parts) + "\n"


def origin(about: dict[str, Any]) -> str:
    """Who trained it, as far as is known."""
    return "Trained and exported by mvlm;" if about["from"]["run"] else "A released checkpoint, exported by mvlm;"


def _mend(about: dict[str, Any]) -> str:
    """What is told of a tower with a class token."""
    told = f"**Not for a llama.cpp as it comes:** up to build {BUILD} at least it misplaces the class token. {CURE} "
    if not about["proven"]:
        return told.strip()
    if about["parity"][0]["class_token"] == "faithful":
        return told + f"These files were proven with one that orders rightly, {about['engine']}."
    return told + (
        f"{about['engine']} is one that does not order rightly: there the files were compared with PyTorch computing in the same wrong "
        "order, so what is stored is right, and nothing was run in the right order."
    )


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


SPEED = """import base64, json, os, sys, time, urllib.request

ask = urllib.request.Request("http://127.0.0.1:8089/v1/chat/completions", headers={"Content-Type": "application/json"})
picture = "data:image/any;base64," + base64.b64encode(open(sys.argv[1], "rb").read()).decode()
content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "Describe the picture."}]
how = {"messages": [{"role": "user", "content": content}], "temperature": 0, "cache_prompt": False, "ignore_eos": True}
for attempt in range(600):
    try:
        urllib.request.urlopen("http://127.0.0.1:8089/health")
        break
    except OSError:  # it is still loading, or has ended
        time.sleep(1)
    try:
        os.kill(int(sys.argv[2]), 0)
    except ProcessLookupError:
        sys.exit("llama-server has ended; its last words, in server.log:\\n" + "".join(open("server.log").readlines()[-5:]))
else:
    sys.exit("llama-server did not start: see server.log")
for count in (8, 256, 256, 256):  # the first warms up
    with urllib.request.urlopen(ask, json.dumps({**how, "max_tokens": count}).encode()) as answer:
        took = json.load(answer)["timings"]
    if took["predicted_n"] != count or took["cache_n"]:
        sys.exit(f"not the request that was asked for: {took}")
    total = (took["prompt_ms"] + took["predicted_ms"]) / 1000
    if count == 256:
        print(f"picture and prompt {took['prompt_ms']:.0f} ms, decode {1000 * 255 / took['predicted_ms']:.1f} tokens/s, "
              f"T_total {total:.2f} s, Eval_avg {256 / total:.2f} tokens/s", flush=True)
"""
"""The script's measurement, for any Python 3: Table 5's columns by the server's own clock."""


def jetson(about: dict[str, Any]) -> str:
    """The script for the device."""
    llm, mmproj = _names(about)
    sums = "\n".join(f"{file['sha256']}  {file['name']}" for file in about["files"].values())
    needed = about["needs a mended llama.cpp"]
    mend = f"\n    {PATCH}  # the class token" if needed else ""
    own = f"{BUILD}-mended" if needed else BUILD  # beside one as it comes, for other models
    ask = ask_command(about, '"$picture"', '"$3"', '"$bin/llama-mtmd-cli"')
    mended = f"""
if ! grep -qF '{RIGHT}' "$llama/{FILE}"; then
    echo "$llama misplaces the class token, and this model would see next to nothing: see README.md" >&2
    exit 1
fi"""
    serve = f'"$bin/llama-server" -m {llm} --mmproj {mmproj} --jinja --parallel 1 -c {about["context"]} -ngl 99'
    return f"""#!/usr/bin/env bash
# {about["name"]}, {about["quant"]}, on a Jetson Orin (CUDA, compute capability 8.7).
# Never run on an Orin: there was none. Its commands were, with a llama.cpp built for an x86 processor.
#
#   ./jetson.sh ask cat.png "What is this?"     one answer
#   ./jetson.sh serve                           llama.cpp's server and its page, on port 8080 of this device alone (HOST=0.0.0.0: for all)
#   ./jetson.sh speed cat.png                   seconds for the picture and 256 tokens, as in Table 5 of the MobileVLM V2 paper
#
# LLAMA_CPP=<folder> takes a llama.cpp that is there; else build {BUILD} is fetched and built, once.
set -euo pipefail
self=$(realpath "$0")
picture=${{2:+$(realpath -m "$2")}}
cd "$(dirname "$self")"
llama=${{LLAMA_CPP:-$HOME/llama.cpp-{own}}}
bin=$llama/build/bin
if [ ! -x "$bin/llama-mtmd-cli" ] || [ ! -x "$bin/llama-server" ]; then
    [ -d "$llama" ] || git clone --depth 1 --branch {BUILD} https://github.com/ggml-org/llama.cpp "$llama"{mend}
    cmake -S "$llama" -B "$llama/build" -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=87
    cmake --build "$llama/build" -j "$(nproc)" --target llama-mtmd-cli llama-server
fi{mended if needed else ""}
sha256sum --quiet --check <<'END'
{sums}
END
case ${{1:-}} in
    ask)
        : "${{2:?ask needs a picture}}" "${{3:?ask needs a question}}"
        {ask} -ngl 99
        ;;
    serve) {serve} --port 8080 --host "${{HOST:-127.0.0.1}}" ;;
    speed)
        : "${{2:?speed needs a picture}}"
        [ -r "$picture" ] || {{ echo "$picture can't be read" >&2 && exit 1; }}
        {serve} --port 8089 --host 127.0.0.1 >server.log 2>&1 &
        trap 'kill %1 2>/dev/null || true' EXIT
        python3 - "$picture" $! <<'END'
{SPEED}END
        ;;
    *) sed -n '4,7p' "$self" && exit 2 ;;
esac
"""
