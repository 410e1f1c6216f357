"""ResNet-18 for small images."""

from __future__ import annotations

from torch import Tensor, nn

from classifiers._base import Classifier

SIZES = {"tiny": [1, 1, 1, 1], "full": [2, 2, 2, 2]}


class ResNet18(Classifier):
    """Logits of torchvision's ResNet-18 with the stem that small images take: a 3×3 convolution, no pooling.

    Args:
        net: images in [0, 1] → logits.

    Reference: He et al. 2015 (arXiv 1512.03385), section 4.2 for the stem.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny", classes: int = 10) -> dict[str, nn.Module]:
        from torchvision.models.resnet import BasicBlock, ResNet  # heavy

        net = ResNet(BasicBlock, SIZES[size], classes)
        net.conv1 = nn.Conv2d(shape[0], 64, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()
        return {"net": net}
