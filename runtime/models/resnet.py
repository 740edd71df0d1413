"""A residual network for small images (He et al. 2015, section 4.2).

Group normalisation (Wu and He 2018) stands in for batch normalisation: what it computes of an image does not depend
on the other images of the micro-batch, so that any number of ranks trains the same model.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

_GROUP_CHANNELS = 8


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a way around them, by a 1×1 convolution where the shape changes."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(out_channels // _GROUP_CHANNELS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(out_channels // _GROUP_CHANNELS, out_channels)
        same = stride == 1 and channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, out_channels, height / stride, width / stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Images to the logits of their classes: three stages, each of half the size and twice the channels."""

    def __init__(self, classes: int = 10, image_channels: int = 1, width: int = 16, blocks_per_stage: int = 1) -> None:
        """width: channels of the first stage, a multiple of 8."""
        super().__init__()
        self.stem = nn.Conv2d(image_channels, width, 3, padding=1, bias=False)
        blocks = []
        for stage in range(3):
            channels = width << stage
            first = ResidualBlock(channels >> 1, channels, stride=2) if stage else ResidualBlock(width, width, stride=1)
            blocks += [first, *(ResidualBlock(channels, channels, stride=1) for _ in range(blocks_per_stage - 1))]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width << 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, image_channels, height, width) -> logits, (batch, classes)."""
        features = self.blocks(F.relu(self.stem(images)))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits
