"""Greedy decoding after the prompt is read: a token a step, over keys and values in tensors of a fixed size.

A step writes its keys and values into their places and moves nothing, where a growing cache copies the whole past at every token.
On a CPU attention is shown the positions so far alone. On a GPU it is shown all places, the later ones masked, and every
number that changes from step to step is an element of a tensor: so a step is captured once as a CUDA graph and then replayed, one
launch in place of some thousand. What is captured is what the CPU's tests run step by step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import LlamaModel

log = logging.getLogger(__name__)

MASKED = ("eager", "sdpa", "grouped")
"""Attention implementations that take a mask of zeros and minus infinities. The others are told of real positions, and not captured."""

BLOCK = 256
"""A decoder's length is a multiple of it, so that a slightly longer prompt needs no other."""


class Room(DynamicLayer):
    """A layer's keys and values, each (rows, heads, length, width). `keys` and `values` are what attention is shown of them."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        super().__init__()
        self.whole, self.place, self.is_initialized = (keys, values), place, True
        self.keys, self.values = keys, values

    def show(self, rows: int, length: int) -> None:
        self.keys, self.values = (one[:rows, :, :length] for one in self.whole)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for shown, new in ((self.keys, key_states), (self.values, value_states)):
            shown.index_copy_(2, self.place, new.to(shown.dtype))  # autocast may have widened what came before
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1  # what lies before the present token


class Decoder:
    """Decodes some rows side by side; rows that are done may leave.

    Args:
        language: a decoder as transformers builds them.
        past: keys and values of prompts, for their shapes and types.
        rows, length: the most prompts, and the most positions of a prompt and what follows it.
    """

    def __init__(self, language: nn.Module, past: Cache, rows: int, length: int) -> None:
        self.language, self.rows, self.length = language, rows, length
        like = past.layers[0].keys
        self.place = torch.zeros(1, dtype=torch.long, device=like.device)
        self.ids, self.positions = self.place.new_zeros(rows, 1), self.place.new_zeros(rows, 1)
        self.mask = like.new_full((rows, 1, 1, length), float("-inf"))
        both = ((layer.keys, layer.values) for layer in past.layers)
        rooms = ([one.new_zeros(rows, one.shape[1], length, one.shape[3]) for one in some] for some in both)
        self.cache = Cache(layers=[Room(*some, self.place) for some in rooms])

    def begin(self, past: Cache, real: Tensor, ids: Tensor) -> None:
        """Take over from the pass over the prompts.

        Args:
            past: keys and values; emptied, so that they are not held twice.
            real: (rows, positions), 1 at real positions and 0 at the padding before them.
            ids: (rows,) the first token of each answer.
        """
        self.running, self.end = real.shape
        for room, layer in zip(self.cache.layers, past.layers, strict=True):
            for whole, one in zip(room.whole, (layer.keys, layer.values), strict=True):
                whole[: self.running, :, : self.end] = one
            layer.reset()
        self.mask.fill_(float("-inf"))[: self.running, 0, 0, : self.end].masked_fill_(real.bool(), 0)
        self.ids[: self.running, 0], self.positions[: self.running, 0] = ids, real.sum(1)
        self.place.fill_(self.end)

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the rows alone."""
        self.running = len(rows)
        seen = [one[:, :, : self.end] for room in self.cache.layers for one in room.whole]
        for one in (*seen, self.ids, self.positions, self.mask):
            one[: self.running] = one[rows]

    def step(self) -> Tensor:
        """The next token of each row, (rows,); overwritten by the next step."""
        self.end += 1
        for room in self.cache.layers:
            room.show(self.running, self.end)
        self._advance()
        return self.ids[: self.running, 0]

    def _advance(self) -> None:
        """A step. Reads no value on the host and replaces no tensor, or it could not be captured."""
        rows, _, length, _ = self.cache.layers[0].keys.shape
        ids, positions, mask = self.ids[:rows], self.positions[:rows], self.mask[:rows, ..., :length]
        mask.index_fill_(3, self.place, 0)
        if self.language.config._attn_implementation not in MASKED:
            mask = mask[:, 0, 0] == 0
        hidden = self._read(self.language.get_input_embeddings()(ids), positions, mask)
        ids.copy_(self.language.lm_head(hidden[:, -1]).argmax(-1, keepdim=True))
        positions.add_(1)
        self.place.add_(1)

    def _read(self, words: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        return self.language.model(
            inputs_embeds=words,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state


class Captured(Decoder):
    """A decoder of always the same shape, whose step is a CUDA graph. Rows that are done stay in it and are not looked at.

    A single row's layers are compiled too (some seconds, once; torch's TORCH_COMPILE_DISABLE=1 leaves it out): its small kernels
    would take as long as reading the weights. Where they cannot be, for want of a C compiler or of Python's headers, that is told.
    **The capture itself was not run yet on any GPU**; the same steps without it are what it does on a CPU.
    """

    def __init__(self, language: nn.Module, past: Cache, rows: int, length: int) -> None:
        super().__init__(language, past, rows, length)
        self.compiled = self.place.is_cuda and rows == 1 and isinstance(language.model, LlamaModel)
        self.run = self._capture() if self.place.is_cuda else self._advance

    def begin(self, past: Cache, real: Tensor, ids: Tensor) -> None:
        for room in self.cache.layers:
            for whole in room.whole:
                whole.zero_()  # what an earlier prompt left is masked, but must be a number: 0 * nan is none
        super().begin(past, real, ids)
        self.shown = torch.arange(len(ids), device=ids.device)

    def keep(self, rows: Tensor) -> None:
        self.shown = self.shown[rows]

    def step(self) -> Tensor:
        self.run()
        return self.ids[self.shown, 0]

    def _capture(self) -> Callable[[], None]:
        """Capturing runs nothing, and what the steps before it wrote is overwritten by `begin`."""
        with torch.cuda.device(self.place.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._warm_up()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may load data meanwhile
                self._advance()
        return graph.replay

    def _warm_up(self) -> None:
        """Torch asks for it: kernels are compiled and get their memory before the capture."""
        try:
            self._advance()
        except Exception as error:  # torch, Inductor, Triton and the compiler that it calls each have their own
            if not self.compiled:
                raise
            self.compiled = False
            told = str(error).strip().partition("\n")[0] or type(error).__name__
            log.warning("layers are not compiled, so a token takes longer to decode: %s", told)
        for _ in range(3):
            self._advance()

    def _read(self, words: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        if not self.compiled:
            return super()._read(words, positions, mask)
        net, hidden = self.language.model, words
        turn = net.rotary_emb(words, position_ids=positions)
        for layer, room in zip(net.layers, self.cache.layers, strict=True):
            hidden = _compiled()(layer, hidden, mask, turn, room)
        return net.norm(hidden)


@cache
def _compiled() -> Callable[..., Tensor]:
    """One compilation serves all layers: they differ in their tensors alone."""
    return torch.compile(_layer, fullgraph=True)


def _layer(layer: nn.Module, hidden: Tensor, mask: Tensor, turn: tuple[Tensor, Tensor], room: Room) -> Tensor:
    return layer(hidden, attention_mask=mask, position_embeddings=turn, past_key_values=room, use_cache=True)


class Decoders:
    """A decoder for each batch of prompts: the same one again for all that fit into it.

    So whoever comes with the longest first pays for its memory, and for a capture, once.
    """

    def __init__(self, language: nn.Module) -> None:
        self.language = language
        self.kept: Decoder | None = None

    def begin(self, past: Cache, real: Tensor, ids: Tensor, limit: int) -> Decoder:
        """A decoder that went through `Decoder.begin` and has room for `limit` steps."""
        rows, length = len(ids), -(-(real.shape[1] + limit) // BLOCK) * BLOCK
        kind = Captured if captures(self.language, ids.device) else Decoder
        if type(self.kept) is not kind or self.kept.rows < rows or self.kept.length < length:
            self.kept = None  # its memory goes first
            self.kept = kind(self.language, past, rows, length)
        self.kept.begin(past, real, ids)
        return self.kept


def captures(language: nn.Module, device: torch.device) -> bool:
    """On a GPU, but not under autocast: the copies of the weights that it makes do not live as long as a graph."""
    masked = language.config._attn_implementation in MASKED
    return device.type == "cuda" and masked and not torch.is_autocast_enabled(device.type)
