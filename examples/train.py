"""Train a decoder on the text of the standard library, one stage a rank.

torchrun --standalone --nproc-per-node 2 -m examples.train

Every rank makes the same network and keeps its own stages; the loss is the same on all of them.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import pnn_compile as pnn
from examples import decoder
from examples.studies.data import standard_library


def next_byte_loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of `[B, T, 256]` logits against the labels of the batch, `[B, T]`."""
    return F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten())


def main() -> None:
    """Train for a number of steps and print the loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batches", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    torch.manual_seed(0)
    data, _ = standard_library(64, options.steps * options.batch)

    model = decoder.build_model(options.layers, options.width, context=64).to(device)
    example = data.x[: options.batch].to(device)
    compiled = pnn.compile(model, example, stages=dist.get_world_size())
    network = pnn.runtime.distribute(compiled, batches=options.micro_batches).train()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for step, rows in enumerate(data.batches(options.batch)):
        batch = (data.x[rows].to(device), data.y[rows].to(device))
        loss = network.train_step(batch, next_byte_loss, optimizer, clip_norm=1.0)
        if dist.get_rank() == 0 and step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
