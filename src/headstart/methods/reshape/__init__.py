"""Reshape: change the structure of the network while fine-tuning it."""
