"""Print what the capture of a deep network takes per node, at several depths side by side.

Run it with `python -m examples.capture_time 333 1000`; `--export` for torch.export.
"""

import argparse
import time

import torch
from torch import Tensor, nn

from examples.resnet1001 import PreActivationBottleneck
from passes.capture.ladder import capture

WIDTH = 16


class Deep(nn.Module):
    """A chain of bottleneck units over images `[B, 16, H, W]`.

    Args:
        depth: Number of units.
        exported: Whether forward asks for a shape, which only torch.export can answer.
    """

    def __init__(self, depth: int, exported: bool) -> None:
        super().__init__()
        self.units = nn.ModuleList(PreActivationBottleneck(WIDTH, WIDTH) for _ in range(depth))
        self.exported = exported

    def forward(self, images: Tensor) -> Tensor:
        """Map images to images of the same shape."""
        if self.exported and images.shape[-1] > 1000:
            return images
        for unit in self.units:
            images = unit(images)
        return images


def main() -> None:
    """Capture one network per depth and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("depths", nargs="*", type=int, default=[333, 1000])
    parser.add_argument("--export", action="store_true", help="by torch.export")
    options = parser.parse_args()
    print(f"{'blocks':>8}{'nodes':>8}{'CPU s':>10}{'ms/node':>10}  front end")
    for depth in options.depths:
        torch.manual_seed(0)
        model = Deep(depth, options.export).eval()
        start = time.process_time()
        program = capture(model, (torch.randn(2, WIDTH, 4, 4),))
        seconds = time.process_time() - start
        nodes = len(program.order)
        each = 1e3 * seconds / nodes
        print(f"{depth:>8}{nodes:>8}{seconds:>10.1f}{each:>10.2f}  {program.capture.rung}")


if __name__ == "__main__":
    main()
