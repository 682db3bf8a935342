"""A conversation with a model: one picture, one question at a time, the answer streamed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from mvlm import build
from mvlm.data.image import Pictures
from mvlm.data.prompt import Template, template
from mvlm.data.tokenizer import Tokenizer, load_tokenizer
from mvlm.model.checkpoint import from_released, read_config
from mvlm.model.decode import Decoders
from mvlm.model.mobilevlm import MobileVLM
from mvlm.run import Run

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""How released MobileVLM models see: CLIP's own normalisation (`preprocessor_config.json` of openai/clip-vit-large-patch14-336)."""

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal obeys instead of showing; a model may say anything. Line ends and tabs are none of them."""


class Chat:
    """A model, on whatever device and in whatever type it is, with its tokenizer, its template and its way to look at pictures."""

    def __init__(
        self, model: MobileVLM, words: Tokenizer, talk: Template, pictures: Pictures, max_new_tokens: int = 128
    ) -> None:
        self.model, self.words, self.talk, self.pictures = model.eval(), words, talk, pictures
        self.max_new_tokens = max_new_tokens
        self.decoders = Decoders(model.language)
        self.tokens: torch.Tensor | None = None

    @classmethod
    def open(cls, folder: str | Path, max_new_tokens: int = 128) -> Chat:
        """From a run folder (its last stage), or from a folder in the released format.

        Raises:
            ValueError: it is neither.
        """
        folder = build.run_folder(folder)
        if (folder / "config.yaml").exists():
            run = Run.find(folder)
            cfg = run.config
            return cls(
                build.trained(run),
                build.tokenizer(cfg),
                build.talk(cfg),
                build.pictures(cfg, "finetune"),
                max_new_tokens,
            )
        if (folder / "config.json").exists():
            model, said = from_released(folder), read_config(folder)
            look = {"size": model.image_size, "mode": "pad", "mean": CLIP_MEAN, "std": CLIP_STD}
            pictures = Pictures(**said.get("mvlm_pictures", look))  # ours says how it sees and is spoken to
            talk = template(said.get("mvlm_template", "v1"))
            return cls(model, load_tokenizer(folder), talk, pictures, max_new_tokens)
        raise ValueError(f"{folder} is neither a run folder (config.yaml) nor a released checkpoint (config.json)")

    @torch.inference_mode()
    def look(self, image: str | Path | None) -> None:
        """Look at a picture file; the following questions are about it. None: talk without one."""
        self.tokens = None
        if image is not None:
            pixels = self.pictures(image)[None].to(next(self.model.parameters()))
            self.tokens = self.model.project(self.model.encode(pixels))

    @torch.inference_mode()
    def stream(self, question: str) -> Iterator[str]:
        """The answer, greedily, in pieces of text."""
        ids = self.talk.prompt(
            question, self.words, image_tokens=self.model.image_tokens, has_image=self.tokens is not None
        )
        stop, past, said, shown = self.talk.stop_ids(self.words), DynamicCache(), [], ""
        prompt = torch.tensor([ids], device=next(self.model.parameters()).device)
        embedded = self.model.embed(prompt, self.tokens)
        hidden = self.model.language.model(
            inputs_embeds=embedded, past_key_values=past, use_cache=True
        ).last_hidden_state
        best = self.model.language.lm_head(hidden[:, -1]).argmax(-1)
        decoder = self.decoders.begin(past, torch.ones_like(prompt), best, self.max_new_tokens)
        for number in range(self.max_new_tokens):
            token = int(decoder.step() if number else best)
            if token in stop:
                return
            said.append(token)
            text = self.words.decode(said)
            if not text.endswith("\ufffd"):  # the rest of a character is still to come
                yield text[len(shown) :]
                shown = text


def converse(chat: Any, image: str | None, prompt: str | None) -> None:
    """One question, or questions from the terminal until an empty line; answers are printed as they come.

    Args:
        chat: has `look` and `stream`.
    """
    chat.look(image)
    for question in _typed() if prompt is None else [prompt]:
        for piece in chat.stream(question):
            sys.stdout.write(CONTROL.sub("\ufffd", piece))
            sys.stdout.flush()
        print()


def _typed() -> Iterator[str]:
    with suppress(EOFError):
        while question := input("> ").strip():
            yield question
