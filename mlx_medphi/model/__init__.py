"""Phi-3 on MLX: checkpoints, adapters, fusing and generation."""
