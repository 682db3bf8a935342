"""The one loop that answers questions: greedy, batched, every picture read once for all its questions.

A prompt is [text head][a picture's tokens][text tail]. The head with its picture is the same for every question about
the picture, so the language model reads it once and its keys and values are handed to all of them; only the tails are
run question by question, padded on the left, with positions counted over real tokens. In float32 the answers are those
of one question at a time; in half precision sums over another number of rows may round otherwise, and a near tie flip.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import IO, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from mvlm.batch import IMAGE_TOKEN
from mvlm.benchmark.base import Picture, Question, digest
from mvlm.model.decode import Decoder, Decoders
from mvlm.model.mobilevlm import MobileVLM

Control = Literal["none", "blind", "shuffled"]
"""What the model is shown: the picture, no picture, or another question's picture."""

CACHE_BYTES = 4 * 2**30
"""What a features dictionary is filled up to; further pictures are encoded anew each time."""

KeysAndValues = list[tuple[Tensor, Tensor]]
"""By layer, each (rows, heads, positions, width)."""


class Answer(NamedTuple):
    """What the model said to a question."""

    question: Question
    text: str
    stopped: bool
    """False if `max_new_tokens` cut it off."""


class _Asked(NamedTuple):
    question: Question
    picture: Picture | None
    head: tuple[int, ...]
    """Ids up to and including the picture; empty without one."""
    tail: list[int]


def answers(
    model: MobileVLM,
    questions: Sequence[Question],
    *,
    encode_prompt: Callable[[str, bool], list[int]],
    decode: Callable[[Sequence[int]], str],
    pictures: Callable[[Path | IO[bytes]], Tensor],
    stop_ids: Iterable[int],
    control: Control = "none",
    batch_size: int = 16,
    max_new_tokens: int = 128,
    precision: str = "float32",
    features: MutableMapping[Picture, Tensor] | None = None,
    skip: Container[str] = (),
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Answer]:
    """Answers to the questions, in an order of the loop's own: of like length together.

    Args:
        model: on the device it shall run on. Put into eval mode, and each module back into its own at the end.
        encode_prompt: (text, whether there is a picture) -> ids of the prompt, IMAGE_TOKEN at the picture's places.
        decode: ids -> text, special tokens skipped.
        pictures: file or opened file -> (3, S, S).
        stop_ids: any of them ends an answer.
        batch_size: questions at a time; also the pictures at a time, whose keys and values are held meanwhile.
        precision: `float32`, `bfloat16` or `float16`; the halves by autocast. A model whose weights are halves already
            runs as it is under `float32`, on a CPU twice as fast as by autocast, which converts them at every batch.
        features: picture -> (N, Dv) on the CPU. Looked up first and filled, so that further calls (another control,
            another benchmark on the same pictures) need not encode them again.
        skip: ids of questions that are answered already. They still lend their pictures to `shuffled`, so that an
            interrupted evaluation goes on with the same ones.
        rank, ranks: of `ranks` processes this one answers its own part alone: all that is asked about every `ranks`-th
            picture, so that no picture is encoded by two.

    Raises:
        ValueError: a picture cannot be read; `shuffled` has no other picture to show; an unknown control or precision.
    """
    shown = zip(questions, _shown(questions, control), strict=True)
    asked = []
    for question, picture in _dealt(questions, [one for one in shown if one[0].id not in skip], rank, ranks):
        ids = encode_prompt(question.text, picture is not None)
        cut = len(ids) - ids[::-1].index(IMAGE_TOKEN) if IMAGE_TOKEN in ids else 0
        asked.append(_Asked(question, picture, tuple(ids[:cut]), ids[cut:]))
    device = next(model.parameters()).device
    if precision not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"precision is float32, bfloat16 or float16, not {precision!r}")
    autocast = torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")
    stop, training = frozenset(stop_ids), [module for module in model.modules() if module.training]
    decoders = Decoders(model.language)
    model.eval()
    try:
        for group in _groups(asked, batch_size):
            with torch.no_grad(), autocast:
                prefix = _read_heads(model, [some[0] for some in group], pictures, {} if features is None else features)
            jobs = [(row, one) for row, some in enumerate(group) for one in some]
            jobs.sort(key=lambda job: -len(job[1].tail))
            for start in range(0, len(jobs), batch_size):
                rows, batch = zip(*jobs[start : start + batch_size], strict=True)
                with torch.no_grad(), autocast:
                    said = _generate(model, decoders, prefix, rows, [one.tail for one in batch], stop, max_new_tokens)
                for one, (ids, stopped) in zip(batch, said, strict=True):
                    yield Answer(one.question, decode(ids).strip(), stopped)
    finally:
        for module in training:  # one by one: whoever trains the model may keep some of them in eval mode
            module.training = True


def _shown(questions: Sequence[Question], control: Control) -> list[Picture | None]:
    """The picture each question is asked with."""
    if control == "none":
        return [q.image for q in questions]
    if control == "blind":
        return [None] * len(questions)
    if control != "shuffled":
        raise ValueError(f"control is none, blind or shuffled, not {control!r}")
    others = _others(questions)
    return [None if q.image is None else others[q.image] for q in questions]


def _others(questions: Sequence[Question]) -> dict[Picture, Picture]:
    """Each picture's stand-in, never one of the same content, the same at every call and on every machine.

    The distinct contents are put into a ring in the order of their hashes, which is as good as drawn by lot, and each
    is replaced by the next.
    """
    pictures = dict.fromkeys(q.image for q in questions if q.image is not None)
    content = {picture: digest(picture) for picture in pictures}
    first: dict[str, Picture] = {}
    for picture, key in content.items():
        first.setdefault(key, picture)
    ring = sorted(first)
    if len(ring) == 1:
        raise ValueError(
            f"the shuffled control needs two different pictures, and all {len(questions)} questions have the same one: "
            "take more questions, or leave this control out"
        )
    following = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    return {picture: first[following[key]] for picture, key in content.items()}


def _dealt(
    questions: Sequence[Question], asked: Sequence[tuple[Question, Picture | None]], rank: int, ranks: int
) -> list[tuple[Question, Picture | None]]:
    """Those of the asked (question, shown picture) that are this process' part.

    Pictures are dealt in the order in which the benchmark first shows them, under every control: so the shuffled pictures of a
    process are those that it encoded before. Questions without a picture are dealt one by one.
    """
    number = {picture: place for place, picture in enumerate(dict.fromkeys(q.image for q in questions))}
    keys = [number[p] if p is not None else len(number) + place for place, (_, p) in enumerate(asked)]
    mine = set(sorted(set(keys))[rank::ranks])
    return [one for one, key in zip(asked, keys, strict=True) if key in mine]


def _groups(asked: Iterable[_Asked], size: int) -> Iterator[list[list[_Asked]]]:
    """Up to `size` lists of questions that share a head; heads of a group are equally long, tails alike.

    Longest first: if memory does not suffice, it shows at once, and the time left is not guessed too low.
    """
    by_head: dict[tuple, list[_Asked]] = {}
    for number, one in enumerate(asked):
        # Without a picture nothing is shared: each question is a head of its own, of length 0.
        by_head.setdefault((one.picture, one.head) if one.head else (number,), []).append(one)
    longest = {key: (len(some[0].head), max(len(one.tail) for one in some)) for key, some in by_head.items()}
    order = sorted(by_head, key=lambda key: longest[key], reverse=True)
    for _, keys in groupby(order, key=lambda key: longest[key][0]):
        heads = [by_head[key] for key in keys]
        yield from (heads[start : start + size] for start in range(0, len(heads), size))


def _read_heads(
    model: MobileVLM,
    heads: Sequence[_Asked],
    pictures: Callable[[Path | IO[bytes]], Tensor],
    features: MutableMapping[Picture, Tensor],
) -> KeysAndValues:
    """The language model's keys and values of equally long heads, one row each; empty for empty heads."""
    if not heads[0].head:
        return []
    like = next(model.parameters())
    fresh: dict[Picture, Tensor] = {}
    unseen = {one.picture: one.question for one in heads if one.picture not in features}
    if unseen:
        pixels = torch.stack([_pixels(picture, question, pictures) for picture, question in unseen.items()])
        fresh = dict(zip(unseen, model.encode(pixels.to(like)), strict=True))
        for picture, encoded in fresh.items():
            if (len(features) + 1) * encoded.nbytes <= CACHE_BYTES:
                features[picture] = encoded.cpu()
    encoded = [fresh[one.picture] if one.picture in fresh else features[one.picture].to(like) for one in heads]
    ids = torch.tensor([one.head for one in heads], device=like.device)
    return read(model, ids, model.project(torch.stack(encoded)))


def read(model: MobileVLM, ids: Tensor, tokens: Tensor) -> KeysAndValues:
    """The language model's keys and values of equally long beginnings (B, T) with their pictures' tokens."""
    embedded = model.embed(ids, tokens)
    cache = model.language.model(inputs_embeds=embedded, past_key_values=DynamicCache(), use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def _pixels(picture: Picture, question: Question, pictures: Callable[[Path | IO[bytes]], Tensor]) -> Tensor:
    try:
        return pictures(BytesIO(picture) if isinstance(picture, bytes) else picture)
    except ValueError as error:
        raise ValueError(f"the picture of question {question.id} cannot be shown: {error}") from error


def _generate(
    model: MobileVLM,
    decoders: Decoders,
    prefix: KeysAndValues,
    rows: Sequence[int],
    tails: Sequence[list[int]],
    stop: frozenset[int],
    limit: int,
) -> list[tuple[list[int], bool]]:
    """Greedy continuations.

    Args:
        prefix: from `_read_heads`.
        rows: of the prefix, one a tail.
        tails: at least one id each.

    Returns:
        For each tail its ids without the stop id, and whether there was one.
    """
    device = next(model.parameters()).device
    index = torch.tensor(rows, device=device)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys[index], values[index], layer)
    past = prefix[0][0].shape[2] if prefix else 0
    length = max(map(len, tails))
    ids = torch.tensor([[0] * (length - len(tail)) + tail for tail in tails], device=device)
    real = torch.tensor([[1] * past + [0] * (length - len(tail)) + [1] * len(tail) for tail in tails], device=device)
    # Positions count real tokens, so a tail follows its picture directly, however much padding stands between.
    positions = (real.cumsum(1) - 1).clamp(min=0)[:, past:]
    hidden = model.language.model(
        inputs_embeds=model.embed(ids),
        attention_mask=real,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]
    best = model.language.lm_head(hidden).argmax(-1)
    said: list[list[int]] = [[] for _ in tails]
    stopped = [False] * len(tails)
    running = list(range(len(tails)))
    decoder: Decoder | None = None
    while True:
        keep = []
        for place, (row, token) in enumerate(zip(running, best.tolist(), strict=True)):
            stopped[row] = token in stop
            if not stopped[row]:
                said[row].append(token)
                if len(said[row]) < limit:
                    keep.append(place)
        if not keep:
            return list(zip(said, stopped, strict=True))
        if decoder is None:
            decoder = decoders.begin(cache, real, best, limit)
        if len(keep) < len(running):  # finished rows leave: one that rambles on does not hold up the others
            running = [running[place] for place in keep]
            decoder.keep(torch.tensor(keep, device=device))
        best = decoder.step()
