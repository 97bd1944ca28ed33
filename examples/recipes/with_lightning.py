"""Train a network with Lightning: the example is the module's `example_input_array`."""

import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pnn_compile as pnn


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.randn(2, 16)
        layers = (nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(6))
        self.network: nn.Module = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


x, model = torch.randn(256, 16), Classifier()
model.network = pnn.compile(model, stages=3).module
Trainer(max_epochs=4).fit(model, DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32))
