"""A small pre-activation residual network for small images."""

from __future__ import annotations

from torch import Tensor, nn

from classifiers._base import Classifier

SIZES = {"tiny": (8, (8, 16), 2), "small": (16, (32, 64, 128), 2), "half": (32, (32, 64, 128, 256), 1)}
"""Channels behind the first convolution, channels of the stages of two blocks each, and the stride of the first stage;
"half" has the depth of PreActResNet-18 and half its width."""


class Block(nn.Module):
    """x → shortcut(x) + conv(relu(bn(conv(relu(bn(x)))))), the first convolution striding."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.relu(self.norm1(x))
        shortcut = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(h)
        return shortcut + self.conv2(nn.functional.relu(self.norm2(self.conv1(h))))


class ResNet(Classifier):
    """Logits of a residual network whose stages each halve the resolution, the first as its size says.

    Args:
        net: images in [-1, 1] → logits.

    Reference: He et al. 2016 (arXiv 1603.05027).
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(2 * x - 1)

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny", classes: int = 10) -> dict[str, nn.Module]:
        stem, widths, stride = SIZES[size]
        layers: list[nn.Module] = [nn.Conv2d(shape[0], stem, 3, 1, 1, bias=False)]
        inputs = stem
        for width in widths:
            layers += [Block(inputs, width, stride), Block(width, width, 1)]
            inputs, stride = width, 2
        head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
        return {"net": nn.Sequential(*layers, *head)}
