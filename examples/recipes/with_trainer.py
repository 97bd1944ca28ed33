"""Train a network with the Trainer of transformers: it evaluates, saves and resumes as well."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import pnn_compile as pnn

tokens = [(torch.arange(16) * step + start) % 64 for step in range(1, 5) for start in range(16)]
samples = [{"input_ids": ids, "labels": ids} for ids in tokens]

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, tie_word_embeddings=True,
)  # fmt: skip
batch = {name: torch.stack([s[name] for s in samples[:2]]) for name in ("input_ids", "labels")}
compiled = pnn.compile(LlamaForCausalLM(config), batch, stages=2)

arguments = TrainingArguments(
    "build/trainer", num_train_epochs=4, learning_rate=1e-2, save_strategy="epoch", report_to="none"
)
trainer = Trainer(compiled.module, arguments, train_dataset=samples, eval_dataset=samples[:8])
trainer.train(resume_from_checkpoint="--resume" in sys.argv)
print(f"loss {trainer.evaluate()['eval_loss']:.3f}")
compiled.save("build/trainer/network")
