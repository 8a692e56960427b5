"""Reward callbacks: each scores the responses of a batch's rollout."""
