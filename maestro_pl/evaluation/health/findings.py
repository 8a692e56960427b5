"""What counts as unhealthy, in plain words with the numbers, and what to try."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from maestro_pl.algorithm.advantages import dead_groups
from maestro_pl.errors import UserError
from maestro_pl.evaluation.health.advice import ADVICE
from maestro_pl.evaluation.health.conflict import Conflict, conflict, pareto_set
from maestro_pl.evaluation.health.record import WeighedBatch
from maestro_pl.evaluation.health.reward_weights import relative_entropy, saturation, self_grading, weight_over_share
from maestro_pl.evaluation.health.tasks import Gap, prompt_weights, task_difference, task_information

P_VALUE = 0.01  # of the permutation test that tasks differ
DRIFT_WINDOW = 5  # batches whose median cosine is compared
LEAST_UPDATES = 3  # of the Conductor, before their median is called its speed


@dataclass(frozen=True)
class Thresholds:
    """When a measurement counts as a failure; docs/health.md gives the reason of each default.

    Attributes:
        uniform_entropy: mean entropy of the weights over that of equal weights, from which they count as equal.
        uniform_after: updates of the Conductor before equal weights count: it starts from them.
        one_reward: mean weight of one reward from which it counts as the only one.
        saturated_share: share of groups in which a reward is constant, or of scores at its edge, that makes it
            saturated.
        saturated_excess: how much more than its equal share a saturated reward may weigh.
        step_change: share of the weight that one update of the Conductor may move.
        self_grading: correlation of the weights with the response's own rewards.
        task_information: nats that the weights must tell about the task where tasks differ.
        task_difference: difference in correlation from which two tasks differ.
        overfit_gap: share of the weight that may lie elsewhere on validation than on training prompts.
        context_drift: how far the cosine of the contexts to those that were learned from may fall.
        dead_groups: share of groups that teach nothing.
        conflict: gain of the worst-served reward under the best static weights, where independent rewards give 1.
        least_groups: groups (and of a task a quarter of them, at least 2) before noisy measurements are judged.
        errors: standard errors beyond which a noisy measurement counts.

    Raises:
        UserError: a value outside its range.
    """

    uniform_entropy: float = 0.999
    uniform_after: int = 20
    one_reward: float = 0.95
    saturated_share: float = 0.9
    saturated_excess: float = 0.1
    step_change: float = 0.1
    self_grading: float = 0.3
    task_information: float = 0.005
    task_difference: float = 0.3
    overfit_gap: float = 0.1
    context_drift: float = 0.25
    dead_groups: float = 0.5
    conflict: float = 0.2
    least_groups: int = 20
    errors: float = 3.0

    def __post_init__(self) -> None:
        counts = {"uniform_after": 0, "least_groups": 1, "errors": 0}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if name in counts and not value >= counts[name]:
                raise UserError(f"ConductorHealth thresholds.{name}={value}: expected at least {counts[name]}.")
            if name not in counts and not 0 <= value <= 1:
                raise UserError(f"ConductorHealth thresholds.{name}={value}: expected a number in [0, 1].")

    @property
    def least_of_task(self) -> int:
        """Groups of a task before it is compared with another."""
        return max(2, self.least_groups // 4)


@dataclass
class Finding:
    """One failure: where it was found, what is wrong in numbers, what to try."""

    key: str
    step: int
    text: str
    advice: str


@dataclass
class Examination:
    """What was measured, what was found, and which findings could have been.

    Attributes:
        numbers: name to measured number; only what could be measured.
        findings: failures.
        examined: keys of all findings for which there was enough data, found or not.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    examined: list[str] = field(default_factory=list)

    def add(self, key: str, name: str, number: float, step: int, text: str | None) -> None:
        """Take one measurement, and the sentence of its failure (None: healthy)."""
        self.examined.append(key)
        self.numbers[name] = number
        if text is not None:
            self.findings.append(Finding(key, step, text, ADVICE[key]))

    @property
    def found(self) -> set[str]:
        """Keys of the failures."""
        return {finding.key for finding in self.findings}


def examine(
    batch: WeighedBatch,
    thresholds: Thresholds,
    step: int = 0,
    updates: int | None = None,
    step_changes: Sequence[float] = (),
    seed: int = 0,
) -> Examination:
    """Examine recent training batches.

    Args:
        batch: the recent batches, joined.
        thresholds: when a measurement counts as a failure.
        step: the policy step, for the findings.
        updates: how often the Conductor was updated; None for a weigher that does not learn, which is judged only by
            dead groups and conflict.
        step_changes: share of the weight that each of its last updates moved.
        seed: of the permutations of task labels.
    """
    out = Examination()
    _dead(out, batch, thresholds, step)
    _conflict(out, batch, thresholds, step)
    if updates is None or not batch.choice_B.any():
        return out
    _collapse(out, batch, thresholds, step, updates)
    _saturated(out, batch, thresholds, step)
    _speed(out, thresholds, step, step_changes)
    _self_grading(out, batch, thresholds, step)
    if updates >= thresholds.uniform_after:
        _context(out, batch, thresholds, step, seed)
    return out


def _dead(out: Examination, batch: WeighedBatch, limits: Thresholds, step: int) -> None:
    if batch.advantages_B is None:
        return
    dead_N = dead_groups(batch.advantages_B, batch.group_size)
    share = float(dead_N.double().mean())
    text = None
    worst = _dead_tasks(batch, dead_N.tolist(), limits)
    if worst and share < limits.dead_groups:
        text = (
            f"Dead groups: of the last groups {', '.join(worst)} have advantages of 0 only, so that they teach the policy "
            f"nothing there (limit {limits.dead_groups:.0%}). Look whether all its answers have become one."
        )
    if share >= limits.dead_groups and len(dead_N) >= limits.least_groups:
        text = (
            f"Dead groups: in {share:.0%} of the last {len(dead_N)} groups every advantage is 0, so that they teach the "
            f"policy nothing (limit {limits.dead_groups:.0%})."
        )
    out.add("dead_groups", "dead_share", share, step, text)


def _dead_tasks(batch: WeighedBatch, dead_N: list[bool], limits: Thresholds) -> list[str]:
    """Tasks whose groups are dead, in words: a policy that has one answer left for one task is hidden among the others."""
    if len(dead_N) != len(batch.tasks_N):  # a batch of the window had no advantages
        return []
    by_task: dict[str, list[bool]] = {}
    for task, dead in zip(batch.tasks_N, dead_N, strict=True):
        by_task.setdefault(task, []).append(dead)
    return [
        f"{sum(dead)} of {len(dead)} on {task}"
        for task, dead in by_task.items()
        if len(dead) >= limits.least_of_task and sum(dead) >= limits.dead_groups * len(dead)
    ]


def _conflict(out: Examination, batch: WeighedBatch, limits: Thresholds, step: int) -> None:
    measured = conflict(batch)
    if measured is None or len(batch.tasks_N) < limits.least_groups:
        return
    conflicting = measured.gain + limits.errors * measured.error <= limits.conflict
    out.add("conflict", "static_gain", measured.gain, step, _conflict_text(batch, measured) if conflicting else None)


def _conflict_text(batch: WeighedBatch, measured: Conflict) -> str:
    pareto = pareto_set(batch, list(measured.weights))
    pairs = ", ".join(f"{a} and {b} {correlation:+.2f}" for a, b, correlation in measured.correlations)
    examples = "; ".join(
        f"response {i}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        for i, values in pareto.examples
    )
    best = ", ".join(f"{name} {weight:.2f}" for name, weight in measured.weights.items())
    return (
        f"Conflict: no static weights improve all rewards. Under the best ones ({best}) the worst-served reward gains "
        f"{measured.gain:.2f} (standard error {measured.error:.2f}), where independent rewards gain 1. Correlations inside "
        f"groups: {pairs}. Pareto set: {pareto.size} of {pareto.total} responses are dominated by no other of their group; "
        f"in the last one, {examples}."
    )


def _collapse(out: Examination, batch: WeighedBatch, limits: Thresholds, step: int, updates: int) -> None:
    rows_B = batch.choice_B
    weights_BK, mask_BK = batch.weights_BK[rows_B], batch.mask_BK[rows_B]
    entropy = relative_entropy(weights_BK, mask_BK)
    if updates >= limits.uniform_after:
        text = None
        if entropy >= limits.uniform_entropy:
            text = (
                f"Collapse to uniform: after {updates} updates of the Conductor the weights are still, or again, equal in "
                f"every context: their entropy is {entropy:.5f} of that of equal weights (limit {limits.uniform_entropy})."
            )
        out.add("collapse_to_uniform", "relative_entropy", entropy, step, text)
    else:
        out.numbers["relative_entropy"] = entropy
    mean_K = weights_BK.mean(0)
    top, weight = int(mean_K.argmax()), float(mean_K.max())
    text = None
    if weight >= limits.one_reward:
        text = (
            f"Collapse to one reward: {batch.names[top]} has {weight:.3f} of the weight, over all responses with a choice "
            f"(limit {limits.one_reward}); the other {len(batch.names) - 1} hardly count."
        )
    out.add("collapse_to_one_reward", "top_weight", weight, step, text)


def _saturated(out: Examination, batch: WeighedBatch, limits: Thresholds, step: int) -> None:
    saturated_K, excess_K = saturation(batch).tolist(), weight_over_share(batch).tolist()
    found = [
        (excess, share, name)
        for name, share, excess in zip(batch.names, saturated_K, excess_K, strict=True)
        if share >= limits.saturated_share
    ]
    excess, share, name = max(found, default=(0.0, 0.0, ""))
    text = None
    if excess >= limits.saturated_excess and len(batch.tasks_N) >= limits.least_groups:
        text = (
            f"A saturated reward takes the weight: {name} is constant, or at its edge, in {share:.0%} of the groups or scores "
            f"(limit {limits.saturated_share:.0%}), and weighs {excess:.2f} more than its equal share "
            f"(limit {limits.saturated_excess})."
        )
    out.add("saturated_reward", "saturated_excess", excess, step, text)


def _speed(out: Examination, limits: Thresholds, step: int, changes: Sequence[float]) -> None:
    if len(changes) < LEAST_UPDATES:
        return
    speed = statistics.median(changes)  # a single jump, such as a fitted learner's first, is no failure
    text = None
    if speed > limits.step_change:
        text = (
            f"The weights move too fast: the median of the Conductor's last {len(changes)} updates moved {speed:.1%} of the "
            f"weight (limit {limits.step_change:.0%}), so that it chases its own last batch."
        )
    out.add("weights_move_fast", "median_step_change", speed, step, text)


def _self_grading(out: Examination, batch: WeighedBatch, limits: Thresholds, step: int) -> None:
    if len(batch.tasks_N) < limits.least_groups:
        return
    measured = self_grading(batch)
    text = None
    if measured.value >= limits.self_grading and measured.value > limits.errors * measured.error:
        text = (
            f"Self-grading: responses are weighed by what they are good at. Inside groups, the weights correlate with the "
            f"response's own rewards by {measured.value:.2f} (standard error {measured.error:.2f}, limit "
            f"{limits.self_grading})."
        )
    out.add("self_grading", "self_grading_correlation", measured.value, step, text)


def _context(out: Examination, batch: WeighedBatch, limits: Thresholds, step: int, seed: int) -> None:
    """Where the weights collapsed, that they ignore the context follows and is not said again."""
    difference = task_difference(batch, limits.least_of_task, seed)
    prompts = prompt_weights(batch.weights_BK, batch.mask_BK, batch.tasks_N, batch.group_size)
    if difference is None or len(set(prompts.tasks_N)) < 2 or len(prompts.tasks_N) < limits.least_groups:
        return
    out.numbers["task_difference"] = difference.size
    information = task_information(prompts, seed)
    differ = difference.size >= limits.task_difference and difference.p <= P_VALUE
    ignored = information.value + limits.errors * information.error <= limits.task_information
    text = None
    if differ and ignored and not out.found & {"collapse_to_uniform", "collapse_to_one_reward"}:
        what = "rewards and anchor" if difference.by == "anchor" else "the rewards"
        text = (
            f"Context ignored: the weights tell {max(information.value, 0.0):.4f} nats about the task (limit "
            f"{limits.task_information}), while the tasks differ: correlations of {what} inside groups are up to "
            f"{difference.size:.2f} apart (p = {difference.p:.3f})."
        )
    out.add("context_ignored", "task_information", information.value, step, text)


def examine_gaps(gaps: Mapping[str, Gap], thresholds: Thresholds, step: int = 0) -> Examination:
    """Examine how far the weights on training and on validation prompts are apart: task to its gap."""
    out = Examination()
    if not gaps:
        return out
    errors = thresholds.errors
    task, gap = max(gaps.items(), key=lambda item: item[1].distance - item[1].drift - errors * item[1].error)
    beyond = gap.distance - gap.drift - errors * gap.error
    text = None
    if beyond > 0 and gap.distance >= thresholds.overfit_gap:
        text = (
            f"Over-fitting to the training prompts: in task {task}, {gap.distance:.1%} of the weight lies elsewhere on "
            f"validation prompts than on recent training prompts (standard error {gap.error:.1%}, movement during training "
            f"{gap.drift:.1%}, limit {thresholds.overfit_gap:.0%})."
        )
    out.add("overfit_prompts", "train_validation_gap", gap.distance, step, text)
    return out


def examine_drift(cosines: Sequence[float], thresholds: Thresholds, step: int = 0) -> Examination:
    """Examine whether the policy's hidden state has moved away from the contexts that the Conductor was fitted on.

    Args:
        cosines: of every training batch so far, the mean cosine of its contexts to the nearest that is remembered.
        thresholds: when a measurement counts as a failure.
        step: the policy step, for the finding.
    """
    out = Examination()
    if len(cosines) < 2 * DRIFT_WINDOW:
        return out
    medians = [statistics.median(cosines[i : i + DRIFT_WINDOW]) for i in range(len(cosines) - DRIFT_WINDOW + 1)]
    best, now = max(medians), medians[-1]
    text = None
    if best - now >= thresholds.context_drift:
        text = (
            f"The context drifts: the cosine of the prompts' hidden states to the nearest ones that the Conductor was fitted "
            f"on was {best:.2f} and is {now:.2f} (limit: a fall of {thresholds.context_drift}), so that what was learned from "
            "the labels is read with other states than it was learned with."
        )
    out.add("context_drifts", "context_cosine", now, step, text)
    return out


def examine_unhelped(
    unhelped: Mapping[str, Mapping[str, tuple[float, float]]], hybrid: float = 0.0, step: int = 0
) -> Examination:
    """Examine whether there are tasks on which no reward goes along with the anchor.

    Args:
        unhelped: task to reward to its covariance with the anchor, and the posterior deviation of that.
        hybrid: the anchor's own share in the reward.
        step: the policy step, for the finding.
    """
    out = Examination()
    tasks = []
    for task, rewards in unhelped.items():
        against = ", ".join(f"{name} {mean:+.2f} (deviation {sd:.2f})" for name, (mean, sd) in rewards.items())
        tasks.append(f"{task}: {against}")
    text = None
    if tasks:
        rest = "only the anchor's labels train it" if hybrid else "its groups do not train the policy"
        text = (
            f"No reward helps: by the labels, every reward goes against the anchor on {'; '.join(tasks)}. Their weights are 0 "
            f"there, and {rest}."
        )
    out.add("no_reward_helps", "unhelped_tasks", float(len(tasks)), step, text)
    return out
