"""Two small vision models trained on scikit-learn's handwritten digits, once per session: a ViT and a ResNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpsearch.model.model import Model
from mpsearch.model.threads import one_thread

#: Pictures of one batch, and how many batches of each kind.
BATCH, CALIBRATION, VALIDATION = 16, 4, 20
#: Pictures for training; the others are for calibration and validation.
TRAINED_ON = 1400


class Digits(NamedTuple):
    """A trained model with what it never saw.

    Attributes:
        model: takes batches of (pictures, labels).
        calibration: batches to score on.
        validation: batches to measure on.
    """

    model: Model
    calibration: Sequence[Any]
    validation: Sequence[Any]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        q, k, v = self.qkv(x).view(samples, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        joined: Tensor = self.out(mixed.transpose(1, 2).reshape(samples, tokens, width))
        return joined


class EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        found: Tensor = x + self.down(functional.gelu(self.up(self.between(x))))
        return found


class Vit(nn.Module):
    """A vision transformer that reads 8 x 8 pictures as 16 patches of 2 x 2."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patches(pictures).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x).mean(dim=1))
        return found


class ResidualBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for _ in range(2))
        self.shortcut = (
            nn.Identity()
            if before == after
            else nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))
        )

    def forward(self, x: Tensor) -> Tensor:
        found = self.norms[1](self.second(torch.relu(self.norms[0](self.first(x)))))
        return torch.relu(found + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of residual blocks with batch norms, on 8 x 8, 4 x 4 and 2 x 2 positions."""

    def __init__(self, widths: Sequence[int] = (12, 24, 32)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]))
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.stages = nn.Sequential(*(ResidualBlock(a, b, 1 if a == b else 2) for a, b in pairs))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, pictures: Tensor) -> Tensor:
        found: Tensor = self.head(self.stages(torch.relu(self.stem(pictures))).mean(dim=(2, 3)))
        return found


def digits_vit() -> Digits:
    """The ViT, trained on first use."""
    return _trained(Vit, 20, 6e-3)


def digits_resnet() -> Digits:
    """The ResNet, trained on first use."""
    return _trained(ResNet, 6, 1e-2)


def accuracy(found: Digits) -> float:
    """Share of the validation pictures that are named rightly."""
    with torch.no_grad(), one_thread():
        right = [found.model.logits(batch).argmax(dim=1) == batch[1] for batch in found.validation]
    return float(torch.cat(right).float().mean())


@cache
def _pictures() -> tuple[Tensor, Tensor]:
    """All 1797 pictures, (samples, 1, 8, 8) with mean 0 and deviation 1, and their labels, in a fixed random order."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(loaded.target, dtype=torch.int64)
    return ((pictures - pictures.mean()) / pictures.std())[order], labels[order]


@cache
def _trained(build: Callable[[], nn.Module], epochs: int, rate: float) -> Digits:
    pictures, labels = _pictures()
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(1)
        module = build().train()
        optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.05)
        steps = epochs * (TRAINED_ON // 50)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(TRAINED_ON).split(50):
                loss = functional.cross_entropy(module(pictures[rows]), labels[rows])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
    unseen = [(pictures[rows], labels[rows]) for rows in torch.arange(TRAINED_ON, len(labels)).split(BATCH)]
    model = Model(module.eval(), loss=_loss, logits=_logits, name=build.__name__)
    return Digits(model, unseen[:CALIBRATION], unseen[CALIBRATION : CALIBRATION + VALIDATION])


def _logits(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits: Tensor = module(batch[0])
    return logits


def _loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])
