"""MobileVLM: vision tower, projector and language model joined (paper, Figure 2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mvlm.batch import IGNORE_INDEX, IMAGE_TOKEN, Batch
from mvlm.model.attention import PACKS, documents
from mvlm.model.vision import Vision


class Loss(NamedTuple):
    """Summed cross-entropy and the number of predictions in the sum: whoever adds up micro-batches divides once, at the end."""

    total: Tensor
    tokens: int


class LastLayer(LlamaDecoderLayer):
    """LLaMA's, which computes and gives only the positions that are read afterwards, if it is told which; all are attended to."""

    def forward(self, hidden_states: Tensor, read: Tensor | None = None, **more) -> Tensor:
        """(B, T, D) -> (B, T, D); with `read`, R places in the rows one after the other, -> (1, R, D)."""
        if read is None:
            return super().forward(hidden_states, **more)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **more)
        chosen = (hidden_states + attended).flatten(0, 1)[read][None]
        return chosen + self.mlp(self.post_attention_layernorm(chosen))


class MobileVLM(nn.Module):
    """H_v = P(F_enc(X_v)) takes the place of its placeholders among the word embeddings; the language model reads on.

    Args:
        vision: the tower.
        projector: called with (vision width, language width), gives the projector.
        language: a decoder as transformers builds them (`.model`, `.lm_head`, `get_input_embeddings()`).
    """

    def __init__(self, vision: Vision, projector: Callable[[int, int], nn.Module], language: nn.Module) -> None:
        super().__init__()
        self.vision = vision
        self.language = language
        if type(language.model.layers[-1]) is LlamaDecoderLayer:
            language.model.layers[-1].__class__ = LastLayer
        self.projector = projector(vision.width, language.get_input_embeddings().embedding_dim)
        with torch.no_grad():
            device = next(language.parameters()).device
            blank = torch.zeros(1, vision.grid**2, vision.width, device=device)
            self.image_tokens: int = self.projector(blank).shape[1]

    @property
    def image_size(self) -> int:
        """Side of the square pictures, in pixels."""
        return self.vision.image_size

    def part(self, name: str) -> str:
        """The part a parameter's name belongs to: vision.lower, vision.upper, vision.unused, projector or language."""
        room, rest = name.split(".", 1)
        return f"vision.{self.vision.part(rest)}" if room == "vision" else room

    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures through the tower: (I, 3, S, S) -> (I, N, Dv). Without a graph unless some of the tower trains."""
        trains = any(p.requires_grad for p in self.vision.parameters())
        with nullcontext() if trains else torch.no_grad():
            return self.vision(pixels)

    def project(self, features: Tensor) -> Tensor:
        """(I, N, Dv) -> (I, M, D)."""
        return self.projector(features)

    def embed(self, input_ids: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Word embeddings with the pictures' tokens written at their placeholders.

        Args:
            input_ids: (B, T) with IMAGE_TOKEN at the M places of each picture.
            tokens: (I, M, D), in the order of the placeholders; None if there are none.

        Returns:
            (B, T, D)

        Raises:
            ValueError: the number of placeholders is not I * M.
        """
        holes = input_ids == IMAGE_TOKEN
        words = self.language.get_input_embeddings()(input_ids.masked_fill(holes, 0))
        places = holes.flatten().nonzero().squeeze(1)
        count, given = len(places), 0 if tokens is None else tokens.shape[0] * tokens.shape[1]
        if count != given:
            raise ValueError(
                f"the text has {count} image placeholders and the pictures give {given} tokens "
                f"({self.image_tokens} a picture): build the data with image_tokens={self.image_tokens}, "
                "and give every picture that is mentioned"
            )
        if tokens is None:
            return words
        # Not masked_scatter: its backward looks at each number, this one copies rows.
        rows = words.flatten(0, 1).index_copy(0, places, tokens.flatten(0, 1).to(words.dtype))
        return rows.view_as(words)

    def inputs(self, batch: Batch, packed: bool = False) -> Tensor:
        """The language model's input for a batch: (B, T, D), or its samples one after the other in one row without padding.

        A batch without pictures still sends a blank one through tower and projector, multiplied by zero: with sharded
        parameters (ZeRO-3, FSDP) a device that skipped them would leave the others waiting for ever. The reference does
        the same with an all-zero image.
        """
        features = batch.features
        ids = batch.input_ids[batch.attention_mask][None] if packed else batch.input_ids
        if features is None and batch.pixels is None:
            # Before the words, as with pictures: ZeRO gathers weights in the order of their use.
            nothing = 0 * self.project(self.blank()).sum()
            return self.embed(ids) + nothing
        return self.embed(ids, self.project(self.encode(batch.pixels) if features is None else features))

    def blank(self) -> Tensor:
        """Features of a blank picture, (1, N, Dv). One process alone may spare the tower, whose output would be multiplied by zero."""
        like = next(self.vision.parameters())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return self.encode(like.new_zeros(1, 3, self.image_size, self.image_size))
        return like.new_zeros(1, self.vision.grid**2, self.vision.width)

    def forward(self, batch: Batch) -> Loss:
        """Cross-entropy of every labelled position given all before it (Equation 2), summed.

        Where attention can keep documents apart (`mvlm.model.attention.PACKS`), the samples lie one after the other in one row and
        nothing is computed for padding. Elsewhere padding is on the right, so a causal mask already hides it from every real
        position and no other mask is needed. Logits are made for labelled positions only: at 49k words they would otherwise cost a
        fifth of the step. So is the feed-forward half of a LLaMA's last layer (`LastLayer`).
        """
        attention = self.language.config._attn_implementation
        packed, real = attention in PACKS, batch.attention_mask
        labels = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # of the word that follows
        labels = labels[real] if packed else labels.flatten()
        read = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        embedded, more = self.inputs(batch, packed), documents(real.sum(1), attention) if packed else {}
        if last := isinstance(self.language.model.layers[-1], LastLayer):
            more["read"] = read
        hidden = self.language.model(inputs_embeds=embedded, use_cache=False, **more).last_hidden_state.flatten(0, 1)
        logits = self.language.lm_head(hidden if last else hidden[read])
        total = cross_entropy(logits.float(), labels[read], reduction="sum")
        return Loss(total, len(read))

    def logits(self, batch: Batch) -> Tensor:
        """Logits at every position, (B, T, V), padding on either side masked."""
        return self.language(inputs_embeds=self.inputs(batch), attention_mask=batch.attention_mask.long()).logits
