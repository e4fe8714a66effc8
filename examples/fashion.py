"""Two convolution networks, trained here on Fashion-MNIST: of ResNet type, and inverted residuals.

Images come from Debian's package ``dataset-fashion-mnist`` (or from a directory that is named in
``FASHION_MNIST``); where it is missing, scikit-learn's digits take their place, enlarged.
55,000 images are trained on, 5,000 of the training set are kept for choices (validation), and
nothing is ever chosen by a figure of the 10,000 test images.

    $ python examples/fashion.py        # trains, some minutes on two cores, and keeps the weights
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)
BLOCKS = 2
CLASSES = 10
EPOCHS = 8
BATCH = 128
OUT = Path(__file__).parent.parent / "out"


@dataclass(frozen=True, eq=False)
class Images:
    """Some images and what they show.

    Attributes:
        pixels: (count x 1 x 28 x 28), zero mean and unit variance over the training set.
        labels: (count), 0 to 9.
    """

    pixels: Tensor
    labels: Tensor

    def first(self, count: int) -> Images:
        """The first of them."""
        return Images(self.pixels[:count], self.labels[:count])

    def batches(self, size: int = 256) -> list[Tensor]:
        """Their pixels in batches."""
        return list(self.pixels.split(size))


@dataclass(frozen=True, eq=False)
class Data:
    """The three parts of a data set, and its name."""

    name: str
    train: Images
    validation: Images
    test: Images


def load_data() -> Data:
    """Fashion-MNIST, or scikit-learn's digits where it is not installed."""
    folder = _fashion_folder()
    if folder is None:
        return _digits()
    train = _idx(folder, "train-images-idx3"), _idx(folder, "train-labels-idx1")
    test = _idx(folder, "t10k-images-idx3"), _idx(folder, "t10k-labels-idx1")
    return _parts("Fashion-MNIST", train, test, held=5000)


def _fashion_folder() -> Path | None:
    given = os.environ.get("FASHION_MNIST")
    if given:
        return Path(given)
    if shutil.which("dpkg") is None:
        return None
    listed = subprocess.run(
        ["dpkg", "-L", "dataset-fashion-mnist"], capture_output=True, text=True, check=False
    )
    found = [Path(p) for p in listed.stdout.split() if p.endswith("train-images-idx3-ubyte.gz")]
    return found[0].parent if found else None


def _idx(folder: Path, name: str) -> np.ndarray:
    """An array from a gzipped file in the IDX format."""
    raw = gzip.decompress((folder / f"{name}-ubyte.gz").read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _digits() -> Data:
    from sklearn.datasets import load_digits  # the fallback only

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    small = torch.from_numpy(digits.images[order]).float()[:, None]
    pixels = (F.interpolate(small, (28, 28), mode="bilinear") * 15.9).numpy().astype(np.uint8)
    labels = digits.target[order].astype(np.uint8)
    split = len(labels) * 2 // 3
    train, test = (pixels[:split, 0], labels[:split]), (pixels[split:, 0], labels[split:])
    return _parts("scikit-learn's digits, enlarged", train, test, held=200)


def _parts(
    name: str, train: tuple[np.ndarray, ...], test: tuple[np.ndarray, ...], held: int
) -> Data:
    pixels = torch.from_numpy(train[0].copy()).float() / 255
    mean, spread = pixels[held:].mean(), pixels[held:].std()

    def images(pair: tuple[np.ndarray, ...], part: slice) -> Images:
        scaled = (torch.from_numpy(pair[0][part].copy()).float() / 255 - mean) / spread
        return Images(scaled[:, None], torch.from_numpy(pair[1][part].astype(np.int64)))

    return Data(
        name,
        train=images(train, slice(held, None)),
        validation=images(train, slice(held)),
        test=images(test, slice(None)),
    )


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, n: int, m: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n, m, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(m)
        self.conv2 = nn.Conv2d(m, m, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(m)
        self.around: nn.Module = nn.Identity()
        if stride > 1 or n != m:
            self.around = nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(h)) + self.around(x))


class ResNet(nn.Module):
    """A stem, stages of blocks, a classifier of the mean over positions."""

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks, n = [], widths[0]
        for stage, m in enumerate(widths):
            for block in range(BLOCKS):
                blocks.append(Block(n, m, 2 if stage and not block else 1))
                n = m
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(n, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(torch.relu(self.norm(self.stem(x))))
        return self.head(h.mean((2, 3)))


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as those of EfficientNet do."""

    def forward(self, x: Tensor) -> Tensor:
        sides = [k - 1 for k in reversed(self.kernel_size)]
        x = F.pad(x, [part for side in sides for part in (side // 2, side - side // 2)])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Inverted(nn.Module):
    """An inverted residual: expand, one kernel a channel, project."""

    def __init__(self, n: int, m: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        wide = expansion * n
        self.expand = Padded(n, wide, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.depthwise = Padded(wide, wide, 3, stride, groups=wide, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.project = Padded(wide, m, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(m)
        self.residual = stride == 1 and n == m

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.norm1(self.expand(x)))
        h = F.relu6(self.norm2(self.depthwise(h)))
        h = self.norm3(self.project(h))
        return x + h if self.residual else h


class MobileNet(nn.Module):
    """A stem at half the size, six inverted residuals, a classifier of the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 40, 1), (40, 40, 1), (40, 40, 1))
        self.stem = Padded(1, 16, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(Inverted(*each) for each in sizes))
        self.last = Padded(40, 160, 1, bias=False)
        self.norm_last = nn.BatchNorm2d(160)
        self.head = nn.Linear(160, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(F.relu6(self.norm(self.stem(x))))
        return self.head(F.relu6(self.norm_last(self.last(h))).mean((2, 3)))


NETWORKS: dict[str, type[nn.Module]] = {"resnet": ResNet, "mobilenet": MobileNet}
"""The networks by their names."""


def train(data: Data, network: str = "resnet", epochs: int = EPOCHS) -> nn.Module:
    """Train a network; seeded, so that it is the same one every time on the same machine."""
    torch.manual_seed(0)
    model = NETWORKS[network]().to(memory_format=torch.channels_last)
    steps = epochs * (len(data.train.labels) // BATCH)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(data.train.labels), generator=generator)
        losses = []
        for places in order[: len(order) // BATCH * BATCH].split(BATCH):
            x = _moved(data.train.pixels[places], generator)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), data.train.labels[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        spent = time.perf_counter() - start
        left = spent / (epoch + 1) * (epochs - epoch - 1)
        print(
            f"epoch {epoch + 1:2} of {epochs}: loss {np.mean(losses):.4f}, "
            f"{spent:.0f} s, {left:.0f} s to go",
            flush=True,
        )
    return model.to(memory_format=torch.contiguous_format).eval()


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images mirrored at random, and shifted by up to two pixels."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")[:, :, down : down + 28, right : right + 28]
    return x.contiguous(memory_format=torch.channels_last)


def load_model(data: Data, network: str = "resnet") -> nn.Module:
    """The trained network: trained now if its weights are not there."""
    model, weights = NETWORKS[network]().eval(), OUT / f"fashion-{network}.pt"
    if weights.exists():
        saved = torch.load(weights, weights_only=True)
        if saved["data"] == data.name:
            model.load_state_dict(saved["state"])
            return model
    print(f"training the {network} on {data.name}")
    model = train(data, network)
    OUT.mkdir(exist_ok=True)
    torch.save({"data": data.name, "state": model.state_dict()}, weights)
    return model


@torch.no_grad()
def logits(model: nn.Module, images: Images) -> Tensor:
    """Predictions (count x classes)."""
    return torch.cat([model(part) for part in images.batches(500)])


def accuracy(predicted: Tensor, images: Images) -> float:
    """Share of the images whose class has the largest logit."""
    return float((predicted.argmax(1) == images.labels).float().mean())


def divergence(dense: Tensor, other: Tensor) -> float:
    """Mean KL(dense ‖ other), nats per image."""
    p, q = dense.double().log_softmax(1), other.double().log_softmax(1)
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


def main() -> None:
    """Train, and say how good they are."""
    data = load_data()
    for network in NETWORKS:
        model = load_model(data, network)
        count = sum(p.numel() for p in model.parameters())
        for name, part in (("validation", data.validation), ("test", data.test)):
            print(f"{network}, {data.name}, {count:,} parameters, {name} accuracy "
                  f"{100 * accuracy(logits(model, part), part):.2f} %")  # fmt: skip


if __name__ == "__main__":
    main()
