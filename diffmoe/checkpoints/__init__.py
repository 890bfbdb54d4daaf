"""Checkpoints on disk, without DeepSpeed and without a process group."""
