"""Models of images: of plain code and of Hugging Face transformers."""

from functools import partial

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.architectures.architecture import Architecture, hugging_face

IMAGES = torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)


class MixerBlock(nn.Module):  # a perceptron over the patches of every channel, and one over the channels of every patch
    def __init__(self, patches: int, heads: int, embedding: int) -> None:
        super().__init__()
        self.channel_norm, self.token_norm = nn.LayerNorm(embedding), nn.LayerNorm(embedding)
        self.channels = nn.Sequential(nn.Linear(embedding, 16 * heads), nn.GELU(), nn.Linear(16 * heads, embedding))
        self.tokens = nn.Sequential(nn.Linear(patches, 8 * heads), nn.GELU(), nn.Linear(8 * heads, patches))

    def forward(self, h: Tensor) -> Tensor:
        h = self.tokens(self.token_norm(h).transpose(1, 2)).transpose(1, 2) + h
        return h + self.channels(self.channel_norm(h))


class Mixer(nn.Module):  # MLP-Mixer (Tolstikhin et al., arXiv 2105.01601) over four patches
    def __init__(self, depth: int, heads: int, embedding: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, embedding, 4, 4)
        self.blocks = nn.Sequential(*(MixerBlock(4, heads, embedding) for _ in range(depth)))
        self.norm = nn.LayerNorm(embedding)
        self.classifier = nn.Linear(embedding, 3)

    def forward(self, images: Tensor) -> Tensor:
        h = self.blocks(self.patches(images).flatten(2).transpose(1, 2))
        return self.classifier(self.norm(h).mean(1))


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class ConvolutionalBlock(nn.Module):
    """A basic or a bottleneck block with a projection where the shape changes (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.first = _normed(inputs, hidden, 1) if bottleneck else _normed(inputs, hidden, 3, stride)
        self.second = _normed(hidden, hidden, 3, stride) if bottleneck else nn.Sequential()
        self.last = _normed(hidden, outputs, 1 if bottleneck else 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Sequential() if same else _normed(inputs, outputs, 1, stride)

    def forward(self, h: Tensor) -> Tensor:
        units = F.relu(self.second(F.relu(self.first(h))))
        return F.relu(self.last(units) + self.shortcut(h))


class ConvolutionalResNet(nn.Module):
    """Two stages, of which the second has half the size, twice the channels and twice the hidden channels."""

    def __init__(self, depth: int, heads: int, embedding: int, bottleneck: bool) -> None:
        super().__init__()
        half = embedding // 2
        self.stem = _normed(3, half, 3)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList()
        for inputs, outputs, hidden in ((half, half, 4 * heads), (half, embedding, 8 * heads)):
            stride = outputs // inputs
            first = ConvolutionalBlock(inputs, hidden, outputs, stride, bottleneck)
            rest = (ConvolutionalBlock(outputs, hidden, outputs, 1, bottleneck) for _ in range(depth - 1))
            self.stages.append(nn.Sequential(first, *rest))
        self.fc = nn.Linear(embedding, 3)

    def forward(self, images: Tensor) -> Tensor:
        h = self.pool(F.relu(self.stem(images)))
        for stage in self.stages:
            h = stage(h)
        return self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))


def _resnet(depth: int, heads: int, embedding: int) -> nn.Module:
    """Bottlenecks whose hidden channels are a quarter of the output's."""
    assert embedding == 8 * heads, "hidden channels are a quarter of the embedding"
    sizes = {"embedding_size": embedding // 4, "hidden_sizes": [embedding // 2, embedding], "depths": [depth, depth]}
    config = transformers.ResNetConfig(**sizes, layer_type="bottleneck", num_labels=3)
    return transformers.ResNetForImageClassification(config)


def _convolutional(bottleneck: bool) -> Architecture:
    build = partial(ConvolutionalResNet, bottleneck=bottleneck)
    return Architecture(build, (IMAGES,), "fc.weight", ends=("stages.*.*.last.1.*",), axis=1).reads("""
        embedding: stem.0.weight
        stream_norm: stem.1.* stages.*.*.shortcut.1.*
        branch_in: stages.*.*.first.0.weight
        branch_in_bias: stages.*.*.first.1.* stages.*.*.second.1.*
        branch_hidden: stages.*.*.second.0.weight
        branch_out (before_norm): stages.*.*.last.0.weight
        branch_norm: stages.*.*.last.1.*
        stream_matrix: stages.*.*.shortcut.0.weight
        readout: fc.weight|bias
        branches: stages.*.* convolution 4
        branches: stages.*.* convolution 8
    """)


_VIT_SIZES = {"image_size": 8, "patch_size": 4, "num_labels": 3}
_VIT = hugging_face(transformers.ViTForImageClassification, transformers.ViTConfig, 32, **_VIT_SIZES)
_LABELS = {"labels": torch.zeros(2, dtype=torch.long)}
_LABELED = {"pixel_values": IMAGES} | _LABELS
_LAST_NORMS = "resnet.encoder.*.layer.2.normalization.*"

VISION_MODELS: dict[str, Architecture] = {
    "vit": Architecture(_VIT, {"pixel_values": torch.ones(2, 3, 8, 8)} | _LABELS, "classifier.weight").reads("""
        embedding: vit.embeddings.*
        branch_in: vit.layers.*.attention.[qkv]_proj.weight|bias vit.layers.*.mlp.fc1.weight|bias
        branch_out: vit.layers.*.attention.o_proj.weight|bias vit.layers.*.mlp.fc2.weight|bias
        branch_norm: vit.layers.*.layernorm_*
        stream_norm: vit.layernorm.*
        readout: classifier.weight|bias
        branches: vit.layers.*.attention attention 1
        branches: vit.layers.*.mlp mlp 32
    """),
    "mixer": Architecture(Mixer, (IMAGES,), "classifier.weight", tokens=("blocks.*.tokens.*",)).reads("""
        embedding: patches.*
        branch_norm: blocks.*.*_norm.*
        branch_in: blocks.*.tokens.0.weight|bias blocks.*.channels.0.weight|bias
        branch_out: blocks.*.tokens.2.weight|bias blocks.*.channels.2.weight|bias
        stream_norm: norm.*
        readout: classifier.weight|bias
        branches: blocks.*.tokens mlp 8
        branches: blocks.*.channels mlp 16
    """),
    "basic resnet": _convolutional(bottleneck=False),
    "bottleneck resnet": _convolutional(bottleneck=True),
    "hugging face resnet": Architecture(_resnet, _LABELED, "classifier.1.weight", ends=(_LAST_NORMS,), axis=1).reads("""
        embedding: resnet.embedder.embedder.convolution.weight
        stream_norm: resnet.embedder.embedder.normalization.* resnet.encoder.*.shortcut.normalization.*
        stream_matrix: resnet.encoder.*.shortcut.convolution.weight
        branch_in: resnet.encoder.*.layer.0.convolution.weight
        branch_in_bias: resnet.encoder.*.layer.[01].normalization.*
        branch_hidden: resnet.encoder.*.layer.1.convolution.weight
        branch_out (before_norm): resnet.encoder.*.layer.2.convolution.weight
        branch_norm: resnet.encoder.*.layer.2.normalization.*
        readout: classifier.1.weight|bias
        branches: resnet.encoder.stages.*.layers.*.layer convolution 1
        branches: resnet.encoder.stages.*.layers.*.layer convolution 2
    """),
}
