"""The Inception network of FID: InceptionV3 as TensorFlow's 2015 graph had it, for the weights that FID's ports share.

It differs from the usual one in its poolings: averages leave padding out, the last block pools by maximum.
Weights: `weights-inception-2015-12-05-6726825d.pth`, or the same as safetensors; only tensors are read.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advdmd.files import file_hash
from advdmd.models.pretrained import load_tensors_only

SIDE, WIDTH = 299, 2048
average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU: [N, n_in, H, W] -> [N, n_out, H', W']."""

    def __init__(self, n_in: int, n_out: int, **kw: Any):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, bias=False, **kw)
        self.bn = nn.BatchNorm2d(n_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class BlockA(nn.Module):
    """One block: [N, C, H, W] -> [N, C', H', W']."""

    def __init__(self, n: int, pooled: int):
        super().__init__()
        self.branch1x1 = Conv(n, 64, kernel_size=1)
        self.branch5x5_1, self.branch5x5_2 = Conv(n, 48, kernel_size=1), Conv(48, 64, kernel_size=5, padding=2)
        self.branch3x3dbl_1 = Conv(n, 64, kernel_size=1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = (Conv(m, 96, kernel_size=3, padding=1) for m in (64, 96))
        self.branch_pool = Conv(n, pooled, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(average(x))], 1)


class BlockB(nn.Module):
    """One block: [N, C, H, W] -> [N, C', H', W']."""

    def __init__(self, n: int):
        super().__init__()
        self.branch3x3 = Conv(n, 384, kernel_size=3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(n, 64, kernel_size=1), Conv(64, 96, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """One block: [N, C, H, W] -> [N, C', H', W']."""

    def __init__(self, n: int, m: int):
        super().__init__()
        wide, tall = {"kernel_size": (1, 7), "padding": (0, 3)}, {"kernel_size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(n, 192, kernel_size=1)
        self.branch7x7_1, self.branch7x7_2 = Conv(n, m, kernel_size=1), Conv(m, m, **wide)
        self.branch7x7_3 = Conv(m, 192, **tall)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(n, m, kernel_size=1), Conv(m, m, **tall)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(m, m, **wide), Conv(m, m, **tall)
        self.branch7x7dbl_5 = Conv(m, 192, **wide)
        self.branch_pool = Conv(n, 192, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average(x))], 1)


class BlockD(nn.Module):
    """One block: [N, C, H, W] -> [N, C', H', W']."""

    def __init__(self, n: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(n, 192, kernel_size=1), Conv(192, 320, kernel_size=3, stride=2)
        self.branch7x7x3_1 = Conv(n, 192, kernel_size=1)
        self.branch7x7x3_2 = Conv(192, 192, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), deep, F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """One block: [N, C, H, W] -> [N, C', H', W']."""

    def __init__(self, n: int, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        wide, tall = {"kernel_size": (1, 3), "padding": (0, 1)}, {"kernel_size": (3, 1), "padding": (1, 0)}
        self.pool = pool
        self.branch1x1, self.branch3x3_1 = Conv(n, 320, kernel_size=1), Conv(n, 384, kernel_size=1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, **wide), Conv(384, 384, **tall)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(n, 448, kernel_size=1), Conv(448, 384, kernel_size=3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, **wide), Conv(384, 384, **tall)
        self.branch_pool = Conv(n, 192, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        single = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        double = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *single, *double, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """[N, 3, 299, 299] in [-1, 1] -> [N, 2048]"""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, kernel_size=3, stride=2), Conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = Conv(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, kernel_size=1), Conv(80, 192, kernel_size=3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = BlockC(768, 128), BlockC(768, 160), BlockC(768, 160)
        self.Mixed_6e, self.Mixed_7a = BlockC(768, 192), BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, average), BlockE(2048, maximum)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


class InceptionFeatures:
    """What FID and KID compare images in."""

    name = "inception"

    def __init__(self, net: Inception, fingerprint: str, device: str = "cpu"):
        self.net, self.fingerprint, self.device = net.to(device).eval(), fingerprint, device

    @torch.no_grad()
    def embed(self, images: Sequence[np.ndarray]) -> Tensor:
        """[N, 2048]; images are resized to 299 x 299, bilinear without antialiasing, as the ports of FID do in PyTorch."""
        x = [torch.from_numpy(np.array(i)).permute(2, 0, 1)[None].float() for i in images]
        x = torch.cat([F.interpolate(i, (SIDE, SIDE), mode="bilinear", align_corners=False) for i in x])
        return self.net((x / 127.5 - 1).to(self.device)).float().cpu()


def load_inception(file: Path, device: str = "cpu") -> InceptionFeatures:
    """Raises ValueError if the file cannot be read as tensors, or does not fit; its classifier is left out."""
    from safetensors.torch import load_file

    state = load_file(file) if file.suffix == ".safetensors" else load_tensors_only(file)
    net = Inception()
    wanted = {k: v for k, v in state.items() if not k.startswith("fc.")}
    missing, extra = net.load_state_dict(wanted, strict=False)
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing or extra:
        raise ValueError(f"{file} is not FID's Inception: {missing[:2]} missing, {extra[:2]} left over")
    return InceptionFeatures(net, file_hash(file)[:16], device)
