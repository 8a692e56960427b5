"""maestro_pl: GRPO with a Conductor that weighs the rewards of every response (MAESTRO, arXiv 2601.07208)."""
