"""Callbacks that call `fuse_backward` for trainers; each module needs the trainer's package."""
