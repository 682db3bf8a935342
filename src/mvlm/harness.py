"""A model of ours in the community's harness, lmms-eval: its tasks, prompts and scores, answered by our loop.

    lmms-eval --model mvlm --model_args run=runs/pocket-ldpv2-v2-unfreeze_llm-s0 --tasks pope,gqa --batch_size 16

The harness (0.7.3, the extra `harness`) finds `manifest` by the entry point in pyproject.toml; nothing else imports this
file.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image
from tqdm import tqdm

from mvlm import build
from mvlm.benchmark.answer import answers
from mvlm.benchmark.base import Question
from mvlm.chat import Chat
from mvlm.data.prompt import IMAGE_TAG

GREEDY = {"do_sample": False, "temperature": 0, "num_beams": 1, "repetition_penalty": 1}
"""The settings of a request that a greedy answer fulfils."""

UNFELT = {"max_new_tokens", "until", "top_p", "top_k", "seed", "image_aspect_ratio"}
"""Settings that are followed, make no difference to a greedy answer, or tell LLaVA's code how to fit its pictures (a run
knows its own way)."""


def manifest() -> Any:
    """The name and the class, as the harness' registry wants them."""
    from lmms_eval.models.registry_v2 import ModelManifest  # the registry calls this while it is itself being imported

    return ModelManifest("mvlm", simple_class_path="mvlm.harness.MVLM")


class MVLM(lmms):
    """A run folder or a released MobileVLM, as the harness drives it: one picture or none a question, greedy.

    Args:
        run: a run folder (its last stage), or a folder in the released format.
        batch_size: questions at a time.
        device: the process' own GPU if there is one, else the CPU.
        dtype: of the weights: float32, bfloat16 or float16; `auto` is bfloat16 where the hardware multiplies it, as in
            evaluate.py.
        max_new_tokens: for tasks that set no limit.

    Raises:
        ValueError: `run` is neither, or a setting is not one of these.
    """

    def __init__(
        self,
        run: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int = 128,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is a number of questions, 1 or more, not {batch_size!r}: try 16")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is auto, float32, bfloat16 or float16, not {dtype!r}")
        if device is None:  # LOCAL_RANK: set where the harness is started in several processes
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        found = build.autocast_type(build.precision("auto", device)) if dtype == "auto" else getattr(torch, dtype)
        chat = Chat.open(str(run))
        self.words, self.talk, self.pictures = chat.words, chat.talk, chat.pictures
        self.model = chat.model.to(device, found or torch.float32)
        self.device, self.batch_size, self.max_new_tokens = torch.device(device), int(batch_size), max_new_tokens

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests. All are looked at before the first is answered.

        A picture is known by its content and taken from the task again when it is its turn: equal ones are read once,
        whichever documents they belong to, and none is kept in memory. Stop texts (`until`) cut what has been said; only
        the template's own end makes the loop stop earlier than the limit.

        Raises:
            ValueError: a request shows several pictures or none that is one, or asks for more than greedy decoding.
        """
        groups: dict[tuple[int, tuple[str, ...]], list[Question]] = defaultdict(list)
        sources: dict[Path, Callable[[], Image.Image | None]] = {}
        order = []
        for number, request in enumerate(tqdm(requests, "questions", disable=self.rank != 0)):
            text, settings, to_visual, doc_id, task, split = request.args
            where = f"{task}, document {doc_id}"
            source = partial(_picture, to_visual, self.task_dict[task][split], doc_id, where)
            name, picture = None, source()
            if picture is not None:
                if text.count(IMAGE_TAG) > 1:
                    raise ValueError(f"{where} has one picture and {text.count(IMAGE_TAG)} places for it ({IMAGE_TAG})")
                name = Path(sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest())
                sources.setdefault(name, source)
            order.append(f"{number} ({where})")  # a document may be asked about several times
            groups[self._limits(settings, where)].append(Question(order[-1], text, name, None))
        said, cut = {}, 0
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as progress:
            for (limit, until), questions in groups.items():
                for question, text, stopped in answers(
                    self.model,
                    questions,
                    encode_prompt=self._prompt,
                    decode=lambda ids, until=until: _before(self.words.decode(ids), until),
                    pictures=lambda name: self.pictures(sources[name]()),
                    stop_ids=self.talk.stop_ids(self.words),
                    batch_size=self.batch_size,
                    max_new_tokens=limit,
                ):
                    said[question.id] = text
                    cut += not stopped
                    progress.update()
        if cut:
            logger.warning(f"{cut} of {len(said)} answers ran on to max_new_tokens")
        return [said[name] for name in order]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered."""
        raise NotImplementedError(
            "mvlm answers in words and does not rate given ones: tasks of output_type multiple_choice or loglikelihood "
            "cannot be asked, take one of output_type generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("mvlm answers one question at a time: tasks of several rounds cannot be asked")

    def _prompt(self, text: str, seen: bool) -> list[int]:
        return self.talk.prompt(text, self.words, image_tokens=self.model.image_tokens, has_image=seen)

    def _limits(self, settings: Mapping[str, Any], where: str) -> tuple[int, tuple[str, ...]]:
        """The most tokens of an answer, and the texts that end it."""
        refused = {k: v for k, v in settings.items() if k not in UNFELT and v is not None and v != GREEDY.get(k)}
        if refused:
            raise ValueError(
                f"{where} asks for {refused}, and mvlm answers greedily ({GREEDY}): "
                "say so with --gen_kwargs, e.g. --gen_kwargs temperature=0,do_sample=False, or leave the task out"
            )
        until = settings.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        return int(settings.get("max_new_tokens") or self.max_new_tokens), tuple(filter(None, until))


def _picture(to_visual: Callable, documents: Any, number: int, where: str) -> Image.Image | None:
    """A document's picture as RGB (whose bytes are all there is of it: no palette), None if it has none.

    Raises:
        ValueError: it has several, or something else such as a video's path.
    """
    shown = to_visual(documents[number]) or []
    if len(shown) > 1:
        raise ValueError(f"{where} shows {len(shown)} pictures, and mvlm takes one a question: leave the task out")
    if not all(isinstance(one, Image.Image) for one in shown):
        raise ValueError(f"{where} shows a {type(shown[0]).__name__}, and mvlm takes pictures only: leave the task out")
    return shown[0].convert("RGB") if shown else None


def _before(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the stop texts."""
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=None)]
