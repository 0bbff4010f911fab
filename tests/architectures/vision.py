"""Models of images: of plain code and of Hugging Face transformers."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from architectures.architecture import Architecture


def _vit(depth: int, heads: int, embedding: int) -> nn.Module:
    assert embedding == 8 * heads, "ViT has no head_dim of its own"
    config = transformers.ViTConfig(
        num_hidden_layers=depth,
        num_attention_heads=heads,
        hidden_size=embedding,
        intermediate_size=32 * heads,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


VISION_MODELS: dict[str, Architecture] = {
    "vit": Architecture(
        build=_vit,
        example={"pixel_values": torch.ones(2, 3, 8, 8), "labels": torch.zeros(2, dtype=torch.long)},
        roles={
            "vit.embeddings.*": "embedding",
            "vit.layers.*.attention.[qkv]_proj.weight": "branch_in",
            "vit.layers.*.attention.[qkv]_proj.bias": "branch_in_bias",
            "vit.layers.*.attention.o_proj.weight": "branch_out",
            "vit.layers.*.attention.o_proj.bias": "branch_out_bias",
            "vit.layers.*.mlp.fc1.weight": "branch_in",
            "vit.layers.*.mlp.fc1.bias": "branch_in_bias",
            "vit.layers.*.mlp.fc2.weight": "branch_out",
            "vit.layers.*.mlp.fc2.bias": "branch_out_bias",
            "vit.layers.*.layernorm_*": "branch_norm",
            "vit.layernorm.*": "stream_norm",
            "classifier.weight": "readout",
            "classifier.bias": "readout_bias",
        },
        branches=(("vit.layers.*.attention", "attention", 1), ("vit.layers.*.mlp", "mlp", 32)),
        readout="classifier.weight",
    ),
}
