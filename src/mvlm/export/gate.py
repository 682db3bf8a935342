"""The parity gate: llama.cpp beside PyTorch on fixed pictures and questions, before a file gets its name.

Compared are image embeddings, the ids of the prompt, the prompt that llama.cpp's chat writes, log-probabilities and greedy
tokens. A float16 file must give PyTorch's tokens, question by question and to the end: past a near tie, PyTorch is asked what it
says after llama.cpp's words. PyTorch computes in float32 with the run's weights; a
quantised file is held against PyTorch with the file's own, dequantised weights, and how far it is from the run's is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import DynamicCache

from mvlm.batch import IMAGE_TOKEN
from mvlm.data.image import Pictures
from mvlm.data.prompt import IMAGE_TAG, Template
from mvlm.data.tokenizer import Tokenizer
from mvlm.export.class_token import has_class_token, misordered
from mvlm.export.container import Opened
from mvlm.export.engine import MARKER, Ask, Engine, Said
from mvlm.export.language import read_back
from mvlm.model.mobilevlm import MobileVLM

EMBEDDING = 3e-3
"""Largest relative error of a picture's embeddings, PyTorch computing with llama.cpp's tanh GELU. float16 makes 0.0006 to 0.0013;
of what goes wrong silently, the smallest seen is quick-GELU for GELU in a tower of two blocks, 0.0053."""

RESIZED = 2e-2
"""The same for a picture that each side resizes: a grey level apart makes up to 0.006, padding before resizing 0.07."""

LIKELY = 0.01
"""Probability from which on an id's log-probability is compared. Those of hardly possible ids differ more and decide nothing."""

LOGPROB = 0.1
"""Largest difference of a likely id's log-probability in a float16 file. 0.01 to 0.06 were seen."""

QUANTISED = 0.5
"""The same at the first token of a quantised file, whose products also round what comes in to 8 bits. 0.29 was seen."""

NEAR_TIE = 0.05
"""Where llama.cpp takes an id that PyTorch finds less likely by no more than this, in log-probability, it is told and no fault:
float16 moves a log-probability as much as that (LOGPROB)."""

TOKENS = 32
"""Length of an answer that is compared."""

QUESTIONS = (
    "What is in the picture?",
    "Is there a red circle in the picture?\nAnswer the question using a single word or phrase.",
    "Which is right?\nA. 12 boats, 3.50 each\nB. the naïve café 🚋\nAnswer with the option's letter from the given choices directly.",
    "Describe the picture in detail.",
)
"""Asked about every picture; digits, accents and an emoji test the tokenizer."""

BARE = "Count from 1 to 20."
"""Asked without a picture."""


def pictures(size: int) -> list[bytes]:
    """Three PNG files, always the same: as large as the tower's, which neither side resizes, a wide one and a tall one."""
    return [_drawn(size, size), _drawn(size * 5 // 3, size, 1), _drawn(size * 3 // 5, size * 6 // 5, 2)]


def _drawn(width: int, height: int, turn: int = 0) -> bytes:
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(9 * x + 3 * turn), np.cos(7 * y - turn), np.sin(5 * x + 6 * y)]
    picture = Image.fromarray(np.uint8(np.stack(np.roll(waves, turn, 0), -1) * 60 + 150))
    draw, side = ImageDraw.Draw(picture), min(width, height)
    for number, colour in enumerate([(200, 30, 30), (30, 90, 200), (40, 150, 60)]):
        left, top = (width - side // 4) * number // 2, (height - side // 4) * ((number + turn) % 3) // 2
        shape = (draw.ellipse, draw.rectangle)[number % 2]
        shape((left, top, left + side // 4, top + side // 4), fill=colour)
    return png(picture)


def png(picture: Image.Image) -> bytes:
    """A picture as a file."""
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def shown(look: Pictures, picture: Image.Image) -> bytes:
    """The file that llama.cpp is given. Only `letterbox` is how it fits pictures itself; for the other modes it gets what is
    already fitted, and leaves that as it is."""
    return png(picture if look.mode == "letterbox" else look.fit(picture))


# ------------------------------------------------------------------------------------------------------ our side


@dataclass(frozen=True)
class Answer:
    """PyTorch's answer to one question."""

    ids: list[int]
    """With the one that ended it, if any did."""
    logprobs: Tensor
    """(len(ids), V)"""


Encode = Callable[[Tensor], Tensor]
"""(I, 3, S, S) -> (I, N, Dv)"""


@torch.inference_mode()
def embeddings(model: MobileVLM, look: Pictures, files: Sequence[bytes], encode: Encode | None = None) -> list[Tensor]:
    """PyTorch's image embeddings, (M, D) a picture."""
    return [model.project((encode or model.encode)(look(file)[None]))[0] for file in files]


@contextmanager
def tanh_gelu(model: MobileVLM) -> Iterator[None]:
    """Tower and projector compute with llama.cpp's GELU meanwhile. Where a projector takes the difference of large features, the
    two GELUs alone make embeddings differ by half a percent, in which a small fault of the file could hide."""
    acts = ((part, name, act) for part in model.modules() for name, act in part.named_children())
    exact = [(part, name, act) for part, name, act in acts if type(act).__name__ == "GELU"]  # torch's and timm's
    for part, name, _ in exact:
        setattr(part, name, nn.GELU(approximate="tanh"))
    try:
        yield
    finally:
        for part, name, act in exact:
            setattr(part, name, act)


@torch.inference_mode()
def answer(
    model: MobileVLM,
    ids: Sequence[int],
    seen: Tensor | None,
    stop: set[int],
    limit: int,
    begun: Sequence[int] = (),
) -> Answer:
    """PyTorch's greedy answer.

    Args:
        ids: of the prompt.
        seen: (M, D), the picture.
        begun: ids that the answer begins with, likely or not.
    """
    cache, said, steps = DynamicCache(), [], []
    embedded = model.embed(torch.tensor([ids]), None if seen is None else seen[None])
    while not said or (said[-1] not in stop and len(said) < limit):
        hidden = model.language.model(inputs_embeds=embedded, past_key_values=cache, use_cache=True).last_hidden_state
        steps.append(model.language.lm_head(hidden[0, -1]).log_softmax(-1))
        said.append(begun[len(said)] if len(said) < len(begun) else int(steps[-1].argmax()))
        embedded = model.embed(torch.tensor([said[-1:]]))
    return Answer(said, torch.stack(steps))


# ----------------------------------------------------------------------------------------------------- the gate


class Parting(NamedTuple):
    """Where two answers go apart."""

    question: int
    step: int
    lead: float
    """Of PyTorch's likeliest id over the one that llama.cpp took, in log-probability; infinite where one of them ended."""
    ours: list[int]
    theirs: list[int]

    @property
    def tie(self) -> bool:
        """Whether either id may come first."""
        return self.lead <= NEAR_TIE


@dataclass(frozen=True)
class Agreement:
    """llama.cpp's answers beside PyTorch's."""

    questions: int
    partings: list[Parting]
    """The first of each question whose tokens are not all the same, and after a tie, where a float16 file is compared, the next."""
    tokens: float
    """Share of PyTorch's tokens before the answers part."""
    first_logprob: float
    """Largest difference of a likely id's log-probability at the first token."""
    logprob: float
    """At any token up to the parting."""

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return vars(self) | {
            "same": self.questions - len({p.question for p in self.partings}),
            "partings": [{"question": p.question + 1, "token": p.step + 1, "lead": p.lead} for p in self.partings],
        }


@dataclass
class Parity:
    """What came out of a comparison."""

    quant: str
    embedding: list[float]
    """Relative error of each picture's, PyTorch computing with llama.cpp's GELU."""
    embedding_run: list[float]
    """The same with the GELU that the run was trained with: what changed in all."""
    class_token: str
    """`none`; or what this build of llama.cpp makes of it: `faithful` or `misordered`. Then everything was compared with what
    such a build must compute: the file is right, and another build is needed to run it."""
    file: Agreement | None = None
    """With PyTorch on the file's own weights (float16: on the run's)."""
    run: Agreement | None = None
    """With PyTorch on the run's weights."""
    ties: list[str] = field(default_factory=list)
    """Places where answers part at a near tie."""
    faults: list[str] = field(default_factory=list)
    """What differs and must not."""

    @property
    def passed(self) -> bool:
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        agreements = {
            "file": self.file.as_dict() if self.file else None,
            "run": self.run.as_dict() if self.run else None,
        }
        return {"passed": self.passed, **vars(self), **agreements}


class Gate:
    """PyTorch's side, computed once, and the files held against it: the float16 pair first.

    Args:
        model: in float32 on the CPU. A quantised file's weights are read into it.
        engine: what runs the files; the package if None.
        progress: called with a title and how many; gives back what is called after each.
    """

    def __init__(
        self,
        model: MobileVLM,
        words: Tokenizer,
        talk: Template,
        look: Pictures,
        engine: Engine | None = None,
        progress: Any = None,
    ) -> None:
        self.model, self.words, self.talk, self.look, self.engine = model.eval(), words, talk, look, engine or Engine()
        self.progress = progress or (lambda title, count: lambda: None)
        self.stop = talk.stop_ids(words)
        self.files = [shown(look, Image.open(BytesIO(file))) for file in pictures(look.size)]
        asked = [(text, number) for number in range(len(self.files)) for text in QUESTIONS] + [(BARE, None)]
        self.asked = [(prompt(talk, text, None if n is None else self.files[n]), n) for text, n in asked]
        self.seen = embeddings(model, look, self.files)
        self.class_token = "faithful" if has_class_token(model.vision) else "none"
        self.of_the_run: list[Answer] = []

    def check(self, language: Path, mmproj: Path, quant: str = "f16") -> Parity:
        """A pair of files, whole."""
        parity = self.check_embeddings(language, mmproj)
        parity.quant = quant
        if quant != "f16":
            read_back(self.model.language, Opened(language))
        ours = self.answers(f"PyTorch, {quant}")
        self.of_the_run = self.of_the_run or ours
        step, said = self.progress(f"llama.cpp, {quant}", len(self.asked)), []
        how = {"limit": TOKENS, "context": context(self.model)}
        for one in self.engine.ask(language, mmproj, [ask for ask, _ in self.asked], **how):
            said.append(one)
            step()
        for number, ((ask, _), one) in enumerate(zip(self.asked, said, strict=True), 1):
            parity.faults += [f"question {number}: {fault}" for fault in self._prompt_faults(ask, one)]
        parity.file = self.agreement(ours, said, past_ties=quant == "f16")
        parity.run = parity.file if quant == "f16" else self.agreement(self.of_the_run, said)
        self._judge(parity)
        return parity

    def check_embeddings(self, language: Path, mmproj: Path) -> Parity:
        """The image embeddings of a pair of files, and the order in which this build of llama.cpp computes a class token."""
        tower = self.model.vision
        theirs = self.engine.look(language, mmproj, self.files)
        with tanh_gelu(self.model):
            errors = apart(theirs, embeddings(self.model, self.look, self.files))
        if has_class_token(tower) and _too_far(errors):

            def otherwise(pixels: Tensor) -> Tensor:
                return misordered(tower, pixels)

            with tanh_gelu(self.model):
                shifted = apart(theirs, embeddings(self.model, self.look, self.files, otherwise))
            if not _too_far(shifted):
                errors, self.class_token = shifted, "misordered"
                self.seen = embeddings(self.model, self.look, self.files, otherwise)
        return Parity("f16", errors, apart(theirs, self.seen), self.class_token, faults=_too_far(errors))

    def answers(self, title: str) -> list[Answer]:
        """PyTorch's, with the language model's weights as they are now."""
        step, found = self.progress(title, len(self.asked)), []
        for question in range(len(self.asked)):
            found.append(self._answer(question))
            step()
        return found

    def _answer(self, question: int, begun: Sequence[int] = ()) -> Answer:
        ask, number = self.asked[question]
        seen, count = None if number is None else self.seen[number], self.model.image_tokens
        ids = self.talk.prompt(ask.question, self.words, image_tokens=count, has_image=number is not None)
        return answer(self.model, ids, seen, self.stop, TOKENS, begun)

    def agreement(self, ours: Sequence[Answer], theirs: Sequence[Said], past_ties: bool = False) -> Agreement:
        """Over all questions.

        Args:
            past_ties: whether an answer that parts at a tie is compared further, PyTorch going on from llama.cpp's words.
        """
        partings, drifts, matched = [], [], 0
        for number, (our, said) in enumerate(zip(ours, theirs, strict=True)):
            common = shared(our.ids, said.ids)
            matched += len(our.ids) if said.stopped and common == len(said.ids) else common
            drifts.append(drift(our, said, common))
            while parting := _parted(number, our, said):
                partings.append(parting)
                if not (past_ties and parting.tie):
                    break
                our = self._answer(number, said.ids[: parting.step + 1])
                drifts[-1] = [drifts[-1][0], *drift(our, said, shared(our.ids, said.ids))]
        total = sum(len(our.ids) for our in ours)
        first, every = (float(np.max(some)) for some in ([one[0] for one in drifts], np.concatenate(drifts)))
        return Agreement(len(ours), partings, matched / max(total, 1), first, every)

    def _judge(self, parity: Parity) -> None:
        exact = parity.quant == "f16"
        for parting in parity.file.partings if exact else []:
            where = f"question {parting.question + 1} parts at token {parting.step + 1}, where PyTorch leads by {parting.lead:.3f}"
            if parting.tie:
                parity.ties.append(where)
            else:
                ours, theirs = (self.words.decode(ids) for ids in (parting.ours, parting.theirs))
                parity.faults.append(f"{where}: {theirs!r} instead of {ours!r}")
        worst, bound = (parity.file.logprob, LOGPROB) if exact else (parity.file.first_logprob, QUANTISED)
        if not worst <= bound:
            parity.faults.append(f"log-probabilities differ by up to {worst:.3f} (at most {bound})")

    def _prompt_faults(self, ask: Ask, said: Said) -> Iterator[str]:
        ours = self.talk.prompt(ask.question, self.words, image_tokens=1, has_image=ask.picture is not None)
        theirs = [i for number, piece in enumerate(said.prompt) for i in ([IMAGE_TOKEN] if number else []) + piece]
        if ours != theirs:
            yield f"llama.cpp tokenises the prompt to {theirs}, we to {ours}"
        if said.chat != ask.prompt:
            yield f"llama.cpp's chat writes {said.chat!r}, our prompt is {ask.prompt!r}"


def _parted(question: int, our: Answer, said: Said) -> Parting | None:
    """Where an answer of llama.cpp's leaves ours, if it does."""
    step = shared(our.ids, said.ids)
    # llama.cpp also ends at other special tokens, such as <|endoftext|>, where our loop goes on and shows nothing
    if step >= max(len(said.ids), 0 if said.stopped else len(our.ids)):
        return None
    lead = math.inf
    if step < min(len(our.ids), len(said.ids)):
        lead = float(our.logprobs[step, our.ids[step]] - our.logprobs[step, said.ids[step]])
    return Parting(question, step, lead, our.ids, said.ids)


def context(model: MobileVLM) -> int:
    """Positions that llama.cpp keeps for a prompt and its answer."""
    return min(4096, model.language.config.max_position_embeddings)


def prompt(talk: Template, question: str, picture: bytes | None) -> Ask:
    """A question as llama.cpp is asked it."""
    text = talk.open(f"{IMAGE_TAG}\n{question}" if picture else question)
    return Ask(text.replace(IMAGE_TAG, MARKER) if picture else text, question, picture)


def apart(theirs: Sequence[np.ndarray], ours: Sequence[Tensor]) -> list[float]:
    """Relative error a picture; infinite where the shapes differ."""
    return [
        float(np.linalg.norm(t - o.numpy()) / np.linalg.norm(o.numpy())) if t.shape == tuple(o.shape) else float("inf")
        for t, o in zip(theirs, ours, strict=True)
    ]


def _too_far(errors: Sequence[float]) -> list[str]:
    """Which pictures' embeddings differ more than they may. The first picture is resized by neither side."""
    bounds = [EMBEDDING] + [RESIZED] * (len(errors) - 1)
    return [
        f"the image embeddings of picture {number} are {error:.1%} from PyTorch's (at most {bound:.1%})"
        for number, (error, bound) in enumerate(zip(errors, bounds, strict=True), 1)
        if not error <= bound
    ]


def shared(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two answers begin with in common."""
    return next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def drift(our: Answer, said: Said, common: int) -> list[float]:
    """Largest difference of a likely id's log-probability at the first token, and at each further one up to where the answers part.

    What is not a number stays so: numpy's maximum keeps it, Python's may not.
    """
    steps = zip(our.logprobs, said.top, strict=False)
    return [
        float(np.max([0.0, *(abs(float(ours[i]) - p) for i, p in (top or {}).items() if not p < math.log(LIKELY))]))
        for step, (ours, top) in enumerate(steps)
        if step <= common
    ] or [0.0]
