"""The class token: what is stored for it, and the order in which a build of llama.cpp really computes.

CLIP's tower reads [class token, patches]. For the projectors mlp, ldp and ldpv2 current builds of llama.cpp join
[patches, class token] instead, and then give out position rows and pick output rows as if it were the right order: each
patch gets its left neighbour's position, the first patch is lost and the class token becomes the last image token
(ggml-org/llama.cpp issue 25814; pull request 25844 mends it). A model sees next to nothing through that. Files are
written for a build that orders rightly. Which one is at hand is found out, not assumed: `mvlm.export.gate` compares its
image embeddings with both orders. A tower without a class token (`class_token: false`, as pocket's) is right in all.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mvlm.model.vision import Vision

FILE, RIGHT = "tools/mtmd/models/llava.cpp", "ggml_concat(ctx0, model.class_embedding, inp, 1)"
"""Where llama.cpp joins the two, and how it must."""

CURE = f"Build a llama.cpp in which {FILE} joins {RIGHT}, the class token first: that one line is right to float16's precision."

PATCH = f"sed -i 's/ggml_concat(ctx0, inp, model.class_embedding, 1)/{RIGHT}/' \"$llama/{FILE}\""
"""The same as a command, `$llama` being the folder of llama.cpp."""


def has_class_token(vision: Vision) -> bool:
    """Whether the order matters."""
    return vision.tower.cls_token is not None


def positions(tower: VisionTransformer) -> Tensor:
    """The table of positions as it is stored: (N, Dv), with a class token (1 + N, Dv), its row first.

    Towers that give the class token no position (`no_embed_class`) get a row of zeros for it.
    """
    table = tower.pos_embed[0]
    if tower.cls_token is not None and tower.no_embed_class:
        return torch.cat([table.new_zeros(1, table.shape[1]), table])
    return table


def misordered(vision: Vision, pixels: Tensor) -> Tensor:
    """The features as a build that joins in the wrong order computes them: (I, 3, S, S) -> (I, N, Dv)."""
    tower: VisionTransformer = vision.tower
    patches = tower.patch_embed(pixels)
    tokens = torch.cat([patches, tower.cls_token.expand(len(patches), -1, -1)], 1) + positions(tower)
    for block in (tower.norm_pre, *tower.blocks[:-1]):
        tokens = block(tokens)
    return tokens[:, 1:]
