"""Convert a trained model with a DataLoader of pairs `(x, y)`, then train it on in a plain loop."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pnn_compile as pnn

layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.ReLU())]
model = nn.Sequential(*layers, nn.Linear(16, 4))
x = torch.randn(256, 16)
loader = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32)  # does not shuffle

compiled = pnn.compile(model, x[:2], stages=3, calibration=loader)  # labels are left out
print(f"fit to the model: loss {compiled.fit(loader, epochs=2).last_loss:.1e}")

optimizer = torch.optim.AdamW(compiled.train().parameters(), lr=1e-2)
for epoch in range(4):
    for images, labels in loader:
        loss = nn.functional.cross_entropy(compiled(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
