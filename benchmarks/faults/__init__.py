"""The fault campaign: runs are killed, torn, starved and poisoned, and what they keep is compared (docs/reliability.md)."""
