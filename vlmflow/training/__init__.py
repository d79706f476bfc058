"""Stages, packing, the DeepSpeed loop, checkpoints and launchers."""
