"""Train a network with accelerate: the loop is that of any other module."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pnn_compile as pnn

layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.ReLU())]
model = nn.Sequential(*layers, nn.Linear(16, 4))
x = torch.randn(256, 16)
compiled = pnn.compile(model, x[:2], stages=3)

accelerator = Accelerator()
loader = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32, shuffle=True)
optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-2)
network, optimizer, loader = accelerator.prepare(compiled.module, optimizer, loader)
for epoch in range(4):
    for images, labels in loader:
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
