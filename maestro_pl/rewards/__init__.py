"""Rewards as pure functions, one file each; `callbacks.rewards` wraps them for the trainer."""
