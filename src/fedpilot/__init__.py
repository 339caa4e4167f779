"""Federated LoRA fine-tuning across clients that differ in memory."""
