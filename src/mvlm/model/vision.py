"""Pixels -> patch features. The tower is any timm ViT; nothing here decides whether it trains."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

LOADS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
"""timm's arguments by which a tower's weights come from elsewhere. A saved model tells its arguments, and may be somebody else's."""

FEW = 4
"""Pictures that a frozen tower takes at a time on a processor in bfloat16, with plain products for attention: their weights stay in the
cache, which is quicker than torch's kernel (16 of 576 patches: 0.93 s and 1.34). A tower that learns would keep them all."""


class Vision(nn.Module):
    """A ViT whose second-to-last block is the output: patch tokens only, no final norm (the reference's `select_layer -2`, `patch`).

    Args:
        name: timm's name. CLIP trap: OpenAI's weights need the names with `quickgelu`; the plain ones differ in activation.
        image_size: side of the square input in pixels.
        timm_arguments: whatever `timm.create_model(name, ...)` takes (depth, embed_dim, class_token, ...).

    Raises:
        ValueError: an argument by which timm would load weights itself.

    The last block and the final norm are never run. They stay in the module, so that a checkpoint that carries them is
    written back whole, and belong to the part `vision.unused`, which no strategy can train.
    """

    def __init__(self, name: str, image_size: int, **timm_arguments) -> None:
        super().__init__()
        if loads := sorted(LOADS & set(timm_arguments)):
            raise ValueError(
                f"the tower's {', '.join(loads)} would have timm read a file or the network itself: leave it out, and name the weights "
                "in model.weights.vision"
            )
        self.arguments = {
            "name": name,
            "image_size": image_size,
            **timm_arguments,
        }  # a saved model says how to build it
        self.tower = timm.create_model(name, img_size=image_size, num_classes=0, global_pool="", **timm_arguments)
        self.image_size = image_size
        self.width: int = self.tower.embed_dim
        self.grid: int = self.tower.patch_embed.grid_size[0]
        self.depth = len(self.tower.blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        """(I, 3, S, S) -> (I, N, Dv)."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        few = pixels.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not learns
        for block in self.tower.blocks:
            block.attn.fused_attn = not few
        pieces = pixels.split(FEW) if few else [pixels]
        encoded = [
            self.tower.forward_intermediates(
                piece, indices=[self.depth - 2], stop_early=True, output_fmt="NLC", intermediates_only=True
            )[0]
            for piece in pieces
        ]
        return torch.cat(encoded) if len(encoded) > 1 else encoded[0]

    def part(self, name: str) -> str:
        """Which part the parameter `tower....` belongs to: `lower`, `upper` (the later half of the blocks) or `unused`."""
        words = name.removeprefix("tower.").split(".")
        if words[0] == "blocks":
            block = int(words[1])
            return "unused" if block == self.depth - 1 else "upper" if block >= self.depth // 2 else "lower"
        return "unused" if words[0] in ("norm", "fc_norm") else "lower"
