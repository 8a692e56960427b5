"""What to try against each failure; the keys are those of docs/health.md, in its order."""

from __future__ import annotations

ADVICE = {
    "collapse_to_uniform": "Raise the learning rate of `model.meta.optimizer`, update more often (`model.meta.every`), "
    "put every reward on one scale (`normalize: zscore`), or learn from an anchor (`model.meta.signal: "
    "maestro_pl.AnchorSignal`). If equal weights are what you want, `maestro_pl.EqualWeights` is cheaper.",
    "collapse_to_one_reward": "Put every reward on one scale (`normalize: zscore`), raise `min_probability` or the lower end "
    "of `tau_range` of `model.weigher`, set `target_entropy` of `model.meta.learner`, lower the "
    "learning rate of `model.meta.optimizer`, or learn from an anchor (`model.meta.signal: maestro_pl.AnchorSignal`).",
    "saturated_reward": "Give the reward `normalize: zscore`, so that a group in which all score alike counts 0; or take it "
    "out, or make it a gate (`role: gate`); or learn from an anchor (`model.meta.signal: maestro_pl.AnchorSignal`).",
    "weights_move_fast": "Lower the learning rate of `model.meta.optimizer`, bound the step (`trust_region` of "
    "`model.meta.learner`), update less often on more data (`model.meta.every`), or warm up "
    "(`model.meta.warmup`).",
    "self_grading": "Decide from the prompt (`model.weigher.context: prompt`) or once a group "
    "(`model.advantages.scope: group`): then a response cannot choose its own ruler; or learn from an anchor "
    "(`model.meta.signal: maestro_pl.AnchorSignal`).",
    "context_ignored": "Let the Conductor read h (`model.weigher.reads: hidden`), try `layer`, `pool` and `context: both` "
    "of `model.weigher`, raise the learning rate of `model.meta.optimizer`, or learn from an anchor "
    "(`model.meta.signal: maestro_pl.AnchorSignal`, with a higher `model.anchoring.fraction`).",
    "overfit_prompts": "Train on more prompts, take a smaller Conductor (`hidden_sizes: []`) or `model.meta.learner: ridge`, "
    "lower the learning rate of `model.meta.optimizer`, or set `trust_region` of `model.meta.learner`.",
    "context_drifts": "Let the Conductor read what does not move (`model.weigher.state: base`), go on labelling while "
    "the policy trains (`model.anchoring.fraction`), let old labels fade (`forgetting` of `model.meta.learner`), or hold "
    "the policy nearer to its reference (`model.kl.coef`).",
    "no_reward_helps": "Give this task a reward that goes along with its anchor, let the anchor itself enter the reward "
    "(`model.anchoring.hybrid`), or leave its prompts out. Until then its rewards do not train the policy.",
    "dead_groups": "Sample more different responses (`rollout.temperature`, `rollout.group_size`), leave out prompts that are "
    "always or never solved, or add a reward that still differs between responses. Where all answers have become one, go "
    "back to an earlier checkpoint and hold the policy nearer to its reference (`model.kl.coef`), or take out what that one "
    "satisfies.",
    "conflict": "No Conductor resolves this by static weights: decide which reward matters in which context (an anchor, "
    "`model.meta.signal: maestro_pl.AnchorSignal`), or take one of the conflicting rewards out or make it a gate "
    "(`role: gate`).",
}
WEIGHING = tuple(key for key in ADVICE if key not in ("dead_groups", "conflict"))  # of a weigher that learns only
ANCHORED = ("context_drifts", "no_reward_helps")  # of a weigher that learns from an anchor only
