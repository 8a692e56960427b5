"""The anchor: what truly matters, labelled on a few groups, and which rewards go along with it there.

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

from maestro_pl.algorithm.scalar_reward import anchor_values
from maestro_pl.conductor.credits import group_covariance
from maestro_pl.conductor.labels import choice_ranks, tells_apart
from maestro_pl.conductor.signals import Credit, MetaSignal, Observation


class AnchorSignal(MetaSignal):
    """The in-group covariance of every reward with an anchor that labels a share of the groups (Eq. 10).

    An anchor is a reward with ``role: anchor``: a judge, a verifier, labels from a file. It is never weighed. In
    training it scores the groups that ``model.anchoring.fraction`` draws, and no others. With several anchors (one a task,
    say) a response's value is the mean of those that apply to it, each z-scored in its group.

    A group whose anchor is the same for all responses carries no signal; it is counted as
    ``conductor/anchor_constant``. Where ``model.anchoring.responses`` has only some responses of a group rated, labels are
    centred over these and divided by one deviation for the whole run. Anchors may compare responses instead of scoring them
    (:class:`maestro_pl.rollout.Choice`); ``RidgeLearner(target: choice)`` learns from both.

    Args:
        entropy_coef: lambda_ent of the gradient learners.
    """

    uses_anchor = True
    gives_values = True
    needs_labels_of_task = True
    gives_choices = True

    def __init__(self, entropy_coef: float = 1e-3) -> None:
        super().__init__(entropy_coef)

    def observe(self, seen: Observation) -> Credit:
        """Values of the labelled responses, and each reward's covariance with them."""
        rollout = seen.weighed.rollout
        size, device = rollout.group_size, seen.z_BK.device
        value_B = anchor_values(rollout) if seen.label_scale is None else seen.label_scale.values(rollout)
        rank_BJ = choice_ranks(rollout)
        known_N = (~value_B.isnan()).view(-1, size).any(1) | tells_apart(rank_BJ, size)
        asked = int(seen.labelled_N.sum())
        metrics = {"anchor_groups": float(asked), "anchor_constant": float(asked - int(known_N.sum()))}
        value_B = value_B.to(device)
        credit_BK = group_covariance(seen.z_BK, seen.weighed.mask_BK, value_B, size)
        return Credit(credit_BK, value_B, metrics, rank_BJ.to(device) if rank_BJ.shape[1] else None)
