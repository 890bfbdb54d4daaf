"""Makes patches.pt, what `train.repa_weight` aligns tokens with in this study: a small network that
reads the clothing of data/fashion14/train (four passes, seed 0), of which the 64 features of each
of its 7 x 7 places before they are averaged count.

    python docs/results/recipes_2026-11-29/patches.py runs/patches14.pt
"""

import sys

import torch
from torch import Tensor, nn

from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import load_index


class Patches(nn.Module):
    """Four convolutions, the last three at half the size; ``head`` reads their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, 14, 14], three equal channels -> [B, 64, 7, 7]."""
        return self.body(images[:, :1].float() / 127.5 - 1)


def main(path: str) -> None:
    """Trains the network, prints its accuracy on test images, writes it to ``path``."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    parts = {}
    for name in ("train", "test"):
        reader = ShardReader(load_index(f"data/fashion14/{name}"), seed=0)
        x, y = reader.read(list(range(reader.index.count)))
        pixels = (127.5 * torch.from_numpy(x) + 128).clamp(0, 255).to(torch.uint8)
        parts[name] = pixels.expand(-1, 3, -1, -1), torch.from_numpy(y)
    network = Patches()
    images, labels = parts["train"]
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(4):
        for part in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            scores = network.head(network(images[part]).mean((2, 3)))
            nn.functional.cross_entropy(scores, labels[part]).backward()
            optimizer.step()
    network.eval()
    images, labels = parts["test"]
    with torch.no_grad():
        right = (network.head(network(images).mean((2, 3))).argmax(1) == labels).float().mean()
    print(f"{100 * right:.1f} % of data/fashion14/test")
    torch.jit.save(torch.jit.script(network), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
