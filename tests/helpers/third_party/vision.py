"""Vision models of timm and vit_pytorch, and CLIP of open_clip."""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

IMAGE = {"image_size": 16, "patch_size": 8, "num_classes": 10}


def _images(size: int) -> tuple[torch.Tensor, ...]:
    return (torch.linspace(-1, 1, 6 * size * size).reshape(2, 3, size, size),)


def _timm(module: str, name: str, image: int, size: int, **arguments: Any) -> tuple[nn.Module, Any]:
    """A model of timm; arguments that are functions are of the size."""
    found = {key: value(size) if callable(value) else value for key, value in arguments.items()}
    return getattr(import_module(f"timm.models.{module}"), name)(num_classes=10, **found), _images(image)


def _transformer(module: str, name: str, size: int, **more: Any) -> tuple[nn.Module, Any]:
    shape = {"embed_dim": 32 * size, "depth": 2 * size, "num_heads": 2 * size}
    return _timm(module, name, 16, size, img_size=16, patch_size=8, **shape, **more)


def _mixer(block: str | None, size: int, **more: Any) -> tuple[nn.Module, Any]:
    found: Any = import_module("timm.models.mlp_mixer")
    arguments = more | ({} if block is None else {"block_layer": partial(getattr(found, block))})
    arguments |= {"norm_layer": partial(found.Affine)} if block == "ResBlock" else {}
    arguments |= {"mlp_layer": partial(import_module("timm.layers").GatedMlp)} if block == "SpatialGatingBlock" else {}
    kept = {key: lambda _, value=value: value for key, value in arguments.items()}
    return _timm(
        "mlp_mixer", "MlpMixer", 16, size, img_size=16, patch_size=4, embed_dim=32 * size, num_blocks=2 * size, **kept
    )


def _poolformer(size: int) -> tuple[nn.Module, Any]:
    found: Any = import_module("timm.models.metaformer")
    parts = {"token_mixers": found.Pooling, "norm_layers": found.GroupNorm1, "mlp_act": nn.GELU}
    shape = {"depths": (2 * size, 2 * size), "dims": (16 * size, 32 * size)}
    return found.MetaFormer(num_classes=10, **shape, **parts), _images(32)


def _vit(module: str, name: str, size: int, **more: Any) -> tuple[nn.Module, Any]:
    shape = {"dim": 32 * size, "depth": 2 * size, "heads": 2 * size, "mlp_dim": 64 * size, "dim_head": 16}
    found = {key: value(size) if callable(value) else value for key, value in more.items()}
    return getattr(import_module(f"vit_pytorch.{module}"), name)(**IMAGE, **shape, **found), _images(16)


def _cross_vit(size: int) -> tuple[nn.Module, Any]:
    stem = {"sm_dim": 32 * size, "lg_dim": 64 * size, "sm_patch_size": 8, "lg_patch_size": 16}
    sizes: dict[str, int] = {}
    for name in ("sm_enc", "lg_enc", "cross_attn"):
        sizes |= {f"{name}_depth": size, f"{name}_heads": 2 * size, f"{name}_dim_head": 16}
    sizes |= {"sm_enc_mlp_dim": 64 * size, "lg_enc_mlp_dim": 64 * size}
    model = import_module("vit_pytorch.cross_vit").CrossViT(image_size=32, num_classes=10, depth=size, **stem, **sizes)
    return model, _images(32)


def _max_vit(size: int) -> tuple[nn.Module, Any]:
    shape = {"dim_conv_stem": 16 * size, "dim": 16 * size, "dim_head": 16, "depth": (1 + size, 1 + size)}
    return import_module("vit_pytorch.max_vit").MaxViT(num_classes=10, window_size=2, **shape), _images(32)


def _cvt(size: int) -> tuple[nn.Module, Any]:
    stages = {1: (16, 1), 2: (32, 2), 3: (64, 2)}
    shape = {f"s{i}_emb_dim": width * size for i, (width, _) in stages.items()}
    shape |= {f"s{i}_heads": heads * size for i, (_, heads) in stages.items()} | {f"s{i}_depth": size for i in stages}
    return import_module("vit_pytorch.cvt").CvT(num_classes=10, **shape), _images(64)


def _cct(size: int) -> tuple[nn.Module, Any]:
    shape = {"embedding_dim": 32 * size, "num_layers": 2 * size, "num_heads": 2 * size, "mlp_ratio": 2}
    more = {"n_conv_layers": 1, "positional_embedding": "learnable"}
    return import_module("vit_pytorch.cct").CCT(img_size=32, num_classes=10, **shape, **more), _images(32)


def _nest(size: int) -> tuple[nn.Module, Any]:
    shape = {"dim": 16 * size, "heads": 2 * size, "num_hierarchies": 2, "block_repeats": (size, size)}
    return import_module("vit_pytorch.nest").NesT(image_size=32, patch_size=4, num_classes=10, **shape), _images(32)


def _clip(size: int) -> tuple[nn.Module, Any]:
    vision = {"layers": 2 * size, "width": 32 * size, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 32 * size, "heads": 2 * size, "layers": 2 * size}
    model = import_module("open_clip.model").CLIP(embed_dim=16 * size, vision_cfg=vision, text_cfg=text)
    return model, (*_images(16), torch.arange(1, 17).reshape(2, 8))


MODELS = {
    "timm.vit": partial(_transformer, "vision_transformer", "VisionTransformer"),
    "timm.deit": partial(_transformer, "deit", "VisionTransformerDistilled"),
    "timm.beit": partial(_transformer, "beit", "Beit", init_values=0.1, use_rel_pos_bias=True),
    "timm.cait": partial(_transformer, "cait", "Cait"),
    "timm.mixer": partial(_mixer, None),
    "timm.resmlp": partial(_mixer, "ResBlock", mlp_ratio=4),
    "timm.gmlp": partial(_mixer, "SpatialGatingBlock", mlp_ratio=6),
    "timm.poolformer": _poolformer,
    "timm.convnext": partial(
        _timm, *("convnext", "ConvNeXt", 32), depths=lambda k: (k,) * 4, dims=lambda k: (8 * k, 16 * k, 16 * k, 32 * k)
    ),
    "timm.swin": partial(
        _timm,
        *("swin_transformer", "SwinTransformer", 32),
        **{"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": lambda k: 16 * k},
        **{"depths": lambda k: (k, k), "num_heads": lambda k: (2 * k, 4 * k)},
    ),
    "timm.davit": partial(
        _timm,
        *("davit", "DaVit", 32),
        **{"window_size": 2, "depths": lambda k: (k, k)},
        **{"embed_dims": lambda k: (16 * k, 32 * k), "num_heads": lambda k: (2 * k, 4 * k)},
    ),
    "timm.xcit": partial(
        _timm,
        *("xcit", "Xcit", 32),
        **{"img_size": 32, "patch_size": 8, "eta": 1.0},
        **{"embed_dim": lambda k: 32 * k, "depth": lambda k: 2 * k, "num_heads": lambda k: 2 * k},
    ),
    "timm.edgenext": partial(
        _timm,
        *("edgenext", "EdgeNeXt", 64),
        **{"dims": lambda k: (16 * k, 16 * k, 32 * k, 32 * k), "depths": lambda k: (k,) * 4},
        **{"heads": lambda k: (2 * k, 2 * k, 4 * k, 4 * k)},
    ),
    "timm.densenet": partial(
        _timm, "densenet", "DenseNet", 32, growth_rate=lambda k: 4 * k, block_config=lambda k: (2 * k, 2 * k)
    ),
    "vit_pytorch.ViT": partial(_vit, "vit", "ViT"),
    "vit_pytorch.SimpleViT": partial(_vit, "simple_vit", "SimpleViT"),
    "vit_pytorch.CaiT": partial(_vit, "cait", "CaiT", cls_depth=lambda k: k),
    "vit_pytorch.DeepViT": partial(_vit, "deepvit", "DeepViT"),
    "vit_pytorch.parallel": partial(_vit, "parallel_vit", "ViT", num_parallel_branches=2),
    "vit_pytorch.XCiT": partial(_vit, "xcit", "XCiT", cls_depth=lambda k: k),
    "vit_pytorch.MaxViT": _max_vit,
    "vit_pytorch.CvT": _cvt,
    "vit_pytorch.CrossViT": _cross_vit,
    "vit_pytorch.CCT": _cct,
    "vit_pytorch.NesT": _nest,
    "open_clip.CLIP": _clip,
}
