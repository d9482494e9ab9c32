"""The architectures that the frontends promise to import, tiny, with random weights and statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import transformers as tf
from torch import nn

VOCABULARY = 50

# Models this small run a hundred times slower when threads wait for busy cores.
torch.set_num_threads(1)


class Wrapped(nn.Module):
    """A transformers model as a function of one tensor."""

    def __init__(self, model: nn.Module, argument: str = "pixel_values"):
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x):
        return self.model(**{self.argument: x}).logits


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x):
        return x * nn.functional.hardsigmoid(self.expand(torch.relu(self.reduce(self.pool(x)))))


class MobileNetV3(nn.Module):
    """One inverted residual of each kind, as in Howard et al. 2019: hard swish, squeeze-and-excite, residual add."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.blocks = nn.ModuleList([self.block(16, 16, nn.ReLU(), 3, 1), self.block(16, 24, nn.Hardswish(), 5, 2)])
        self.head = nn.Sequential(nn.Linear(24, 32), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(32, 10))

    @staticmethod
    def block(inputs: int, outputs: int, act: nn.Module, kernel: int, stride: int) -> nn.Sequential:
        wide = inputs * 3
        return nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            act,
            nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            act,
            SqueezeExcite(wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
        x = self.stem(x)
        x = x + self.blocks[0](x)
        x = self.blocks[1](x)
        return self.head(x.mean((2, 3)))


def _encoder(**more):
    return dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **more)


def _vision(**more):
    return _encoder(image_size=32, patch_size=8, num_labels=10, **more)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": lambda: Wrapped(
        tf.MobileNetV2ForImageClassification(
            tf.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=10, tf_padding=True)
        )
    ),
    "mobilenet_v3": MobileNetV3,
    "resnet": lambda: Wrapped(
        tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=10)
        )
    ),
    "efficientnet": lambda: Wrapped(
        tf.EfficientNetForImageClassification(
            tf.EfficientNetConfig(
                image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, num_labels=10
            )
        )
    ),
    "vit": lambda: Wrapped(tf.ViTForImageClassification(tf.ViTConfig(**_vision()))),
    "deit": lambda: Wrapped(tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**_vision()))),
    "bert": lambda: Wrapped(
        tf.BertForSequenceClassification(
            tf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=3, **_encoder())
        ),
        "input_ids",
    ),
    "llama": lambda: Wrapped(
        tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=VOCABULARY,
                num_key_value_heads=2,
                max_position_embeddings=32,
                use_cache=False,
                **_encoder(),
            )
        ),
        "input_ids",
    ),
}

CONVOLUTIONAL = ("mobilenet_v2", "mobilenet_v3", "resnet", "efficientnet")
TOKENS = ("bert", "llama")


def example(name: str, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Input [batch, 3, 32, 32], or ids [batch, 16]."""
    source = torch.Generator().manual_seed(seed)
    if name in TOKENS:
        return torch.randint(0, VOCABULARY, (batch, 16), generator=source)
    return torch.randn(batch, 3, 32, 32, generator=source)


@functools.cache
def build(name: str) -> nn.Module:
    """The model in eval mode, with weights that keep the signal's size from layer to layer: the initializers' 0.02
    leave outputs that are almost constant, and statistics of random batches make deep networks chaotic."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    gain = 2.0 if name in CONVOLUTIONAL else 1.0
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "token" in path or "position" in path:
                parameter.normal_(0, 0.5)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.normal_(0, (gain / module.weight[0].numel()) ** 0.5)
            if isinstance(module, nn.BatchNorm2d):
                for statistic in (module.weight, module.running_var):
                    statistic.uniform_(0.8, 1.2)
                for statistic in (module.bias, module.running_mean):
                    statistic.normal_(0, 0.2)
    return model.eval()
