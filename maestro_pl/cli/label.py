"""``maestro-pl label``: people teach the Conductor by choosing the best answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maestro_pl.cli.arguments import take, with_config
from maestro_pl.cli.parser import ToolParser
from maestro_pl.cli.view import add_address, needs_app
from maestro_pl.errors import UserError, escaped

if TYPE_CHECKING:
    from maestro_pl.app.label import Asking
    from maestro_pl.labelling.questions import Asked
    from maestro_pl.labelling.teaching import Teaching

HELP = """usage: maestro-pl label [--config FILE] [--questions N] [--of N] [--labels FILE] [--rater NAME] [--host H] [--port P]
                        [--key value ...]
       maestro-pl label RUN --live [--of N] [--labels FILE] [--rater NAME] [--host H] [--port P]
       maestro-pl label export LABELS FILE [--format csv|jsonl|argilla|label-studio]
       maestro-pl label import LABELS FILE [--format ...] [--rater NAME]

Samples the first groups as `maestro-pl fit` with this config would, and asks in a browser which answer is best: keys 1 to 4
choose, a to d mark beforehand what is as good as the best, 0 is "no difference", x "all bad", u takes the last answer back. At
the side, live: the weights that the clicks so far give each task. Every click is kept in one file at once; several people may
answer, each under a pseudonym. Nothing is trained.

With RUN --live it asks about the groups that a running `fit` records, the newest first; the run reads new labels at each
step (callbacks.PeopleAnchor) and never waits.

options:
  --config FILE     as for `fit`; so is every key (--rollout.group_size 4); without one, the sandbox
  --questions N     how many; default: 40
  --of N            answers of a question at most; default: 4
  --labels FILE     where the answers are kept; default: labels.db, with --live the file that the run reads
  --rater NAME      your pseudonym; default: me
  --host, --port    as for `maestro-pl view`
"""
WEIGHER = "{class_path: maestro_pl.Conductor, init_args: {action: soft, norm: center, context: prompt}}"
LABELS = "labels.db"
LEARNER = "{class_path: maestro_pl.RidgeLearner, init_args: {target: choice}}"


@dataclass(frozen=True)
class Sampled:
    """What can be asked about the first batches of a run.

    Attributes:
        asked: the questions.
        teaching: what answers to them teach.
        warmup: batches without a policy step that the run needs to meet all questions.
        further: arguments that the run needs besides, to learn from choices.
    """

    asked: list[Asked]
    teaching: Teaching
    warmup: int
    further: list[str]


def label(arguments: list[str]) -> None:
    """Ask people until Ctrl-C, or export or import what they said.

    Args:
        arguments: those after ``maestro-pl label``.

    Raises:
        UserError: an option, a config or a file of labels that cannot be used, or the extra ``app`` is not installed.
    """
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    if arguments[:1] in (["export"], ["import"]):
        _exchange(arguments[0], arguments[1:])
        return
    needs_app("label")
    from maestro_pl.app.label import label_app
    from maestro_pl.app.serving import serve

    asking, host, port = asking_of(arguments)
    serve(lambda token: label_app(asking, token), host, port)


def asking_of(arguments: list[str]) -> tuple[Asking, str, int | None]:
    """What ``maestro-pl label`` with these arguments asks, and the host and port that it was given.

    Raises:
        UserError: as for :func:`label`.
    """
    values, others = _options(arguments)
    from maestro_pl.app.serving import bound

    bound(values.host, values.port).close()  # sampling takes minutes: what cannot be served is said before
    if values.live:
        return _live(values, others), values.host, values.port
    if others and not others[0].startswith("-"):
        raise UserError(
            f"maestro-pl label {others[0]!r:.80}: to ask about the groups of a running run, add --live; to sample anew, give "
            "its config, --config FILE."
        )
    from maestro_pl.app.label import Labelling
    from maestro_pl.labelling.store import LabelStore, check_rater

    check_rater(values.rater)
    path = Path(values.labels or LABELS).expanduser()
    new = not path.exists()
    store = LabelStore(path)  # before minutes of sampling: what cannot be kept is said now
    try:
        with redirect_stdout(sys.stderr):  # what the run says on its way
            sampled = sampled_questions(others, store.path, values.questions, values.of)
    except BaseException:
        store.close()
        if new:
            path.unlink(missing_ok=True)
        raise
    print(f"{len(sampled.asked)} questions; answers are kept in {escaped(str(store.path))}", flush=True)
    command = next_command(others, store.path, sampled)
    return Labelling(sampled.asked, store, sampled.teaching, values.rater, command), values.host, values.port


def _options(arguments: list[str]) -> tuple[Any, list[str]]:
    """Our own options, and those of ``fit``."""
    names = ("--questions", "--of", "--labels", "--rater", "--host", "--port")
    own = [word for word in arguments if word == "--live"]
    others = [word for word in arguments if word != "--live"]
    for name in names:
        found, others = take(others, (name,))
        own += [f"{name}={found[-1]}"] if found else []
    parser = ToolParser(prog="maestro-pl label")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--of", type=int, default=4)
    parser.add_argument("--labels")
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--rater", default="me")
    add_address(parser)
    values = parser.parse_args(own)
    from maestro_pl.labelling.questions import MOST

    if values.questions < 1 or not 2 <= values.of <= MOST:
        raise UserError(
            f"--questions {values.questions} --of {values.of}: expected at least one question, of 2 to {MOST} answers."
        )
    return values, others


def _live(values: Any, arguments: list[str]) -> Asking:
    """Questions about the groups of a run."""
    from maestro_pl.app.label import LiveLabelling
    from maestro_pl.labelling.live import LiveQuestions
    from maestro_pl.labelling.store import EARLIER, LabelStore, check_rater
    from maestro_pl.report.run_files import RunFiles

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError(
            f"maestro-pl label --live {' '.join(arguments)}: expected the folder of one run, such as "
            "`maestro-pl label runs/mine/version_0 --live`; what is asked is in its files, and takes no key of `fit`."
        )
    check_rater(values.rater)
    run = RunFiles(arguments[0])
    anchor = _people_anchor(run.config)
    if anchor is None:
        raise UserError(
            f"{arguments[0]} reads no labels of people: train with "
            "`anchors: [{class_path: callbacks.PeopleAnchor, init_args: {path: labels.db}}]`."
        )
    path = Path(values.labels or anchor["path"])
    if not path.exists():
        raise UserError(f"The run reads labels from {path}, and from here there is no such file: give --labels FILE.")
    size = int((run.config.get("rollout") or {}).get("group_size") or 0)
    if size < 2:
        raise UserError(
            f"The config of {arguments[0]} has no rollout.group_size of at least 2: there is nothing to choose."
        )
    earlier, tasks = anchor.get("earlier", EARLIER), anchor.get("tasks")
    print(
        f"Questions about {escaped(run.name)}; answers are kept in {escaped(str(path))}, which the run reads at each step"
    )
    print("It asks about recorded steps: callbacks.ResponseRecorder has every_n_steps, 10 by default.", flush=True)
    live = LiveQuestions(run.folder, size, values.of, earlier, tasks)
    return LiveLabelling(run, live, LabelStore(path), values.rater)


def _people_anchor(config: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of the run's first ``PeopleAnchor``."""
    listed = [*(config.get("anchors") or ()), *((config.get("trainer") or {}).get("callbacks") or ())]
    for each in listed:
        if isinstance(each, dict) and str(each.get("class_path", "")).endswith("PeopleAnchor"):
            return dict(each.get("init_args") or {})
    return None


def sampled_questions(arguments: list[str], labels: Path, count: int, shown: int) -> Sampled:
    """Questions about the first groups of ``fit`` with these arguments.

    Args:
        arguments: of ``fit``.
        labels: the file of labels, which stands for all anchors.
        count: how many questions.
        shown: answers of each at most.

    Raises:
        UserError: as for ``fit``; or no group has two different answers.
    """
    import torch

    from maestro_pl.algorithm.scalar_reward import normalized_rewards
    from maestro_pl.cli.sampling import Look, look_at
    from maestro_pl.conductor.conductor import Conductor
    from maestro_pl.conductor.credits import zscores
    from maestro_pl.conductor.ridge import RidgeLearner
    from maestro_pl.labelling.questions import Group, chosen_questions
    from maestro_pl.labelling.teaching import Teaching

    groups: list[Group] = []
    seen: list[Any] = []  # the module
    batches = [0]

    def see(look: Look) -> bool:
        module, rollout, size = look.module, look.rollout, look.rollout.group_size
        rewards_BK, mask_BK = normalized_rewards(rollout, module.reward_specs, module.advantages, module.device)
        z_BK = zscores(rewards_BK, mask_BK, size).cpu()
        if isinstance(module.weigher, Conductor):
            module.weigh(rollout, rewards_BK, mask_BK, sample=True)  # it notes the scale of its contexts
        h_BD = rollout.hidden_BD if isinstance(module.weigher, Conductor) else torch.zeros(len(rollout), 0)
        tasks = [str(task) for task in rollout.columns["task"]]
        for n, prompt in enumerate(rollout.prompts):
            rows = slice(n * size, (n + 1) * size)
            groups.append(
                Group(tasks[n], prompt, rollout.responses[rows], z_BK[rows], mask_BK[rows].cpu(), h_BD[rows].cpu(),
                      batches[0])
            )  # fmt: skip
        batches[0] += 1
        seen[:] = [module]
        found = len(chosen_questions(groups, count, shown))
        print(f"questions: {found} of {count}", file=sys.stderr, flush=True)
        return found >= count

    anchor = [{"class_path": "callbacks.PeopleAnchor", "init_args": {"path": str(labels.absolute())}}]
    look_at([*arguments, f"--anchors={json.dumps(anchor)}", "--metrics=[]"], "label", see)
    asked = chosen_questions(groups, count, shown)
    if not asked:
        raise UserError(
            f"None of the {len(groups)} sampled groups has two different answers: sample at a higher "
            "rollout.temperature, or larger groups (rollout.group_size)."
        )
    module = seen[0]
    given = module.outer.learner
    learner = given if isinstance(given, RidgeLearner) and given.takes_choices else RidgeLearner(target="choice")
    weigher = module.weigher
    linear = weigher if isinstance(weigher, Conductor) and not weigher.hidden_sizes else None
    names = sorted({group.task for group in groups})
    featured = []
    with torch.no_grad():
        for group in groups:
            if linear is not None:
                x_GF = linear.features(group.x_GF.to(module.device)).cpu()
            else:  # nothing that is fitted reads a context here: each task has its own weights
                own_F = torch.tensor([float(group.task == name) for name in names] + [learner.constant])
                x_GF = own_F.expand(len(group.responses), -1)
            featured.append(replace(group, x_GF=x_GF))
    rewards = [spec.name for spec in module.reward_specs if spec.role == "train"]
    constant = learner.constant if linear is None else linear.constant
    teaching = Teaching(featured, asked, rewards, learner, constant)
    further = [] if linear is not None else [f"--model.weigher={WEIGHER}"]
    further += [] if module.outer.meta.signal.uses_anchor else ["--model.meta.signal=maestro_pl.AnchorSignal"]
    further += [] if learner is given else [f"--model.meta.learner={LEARNER}"]
    needed = 1 + max(groups[each.group].batch for each in asked)
    return Sampled(asked, teaching, max(needed, module.warmup[1]), further)


def next_command(arguments: Sequence[str], labels: Path, sampled: Sampled) -> list[str]:
    """The ``fit`` that learns from the labels: the same arguments, and what reads them."""
    anchor = f"[{{class_path: callbacks.PeopleAnchor, init_args: {{path: {json.dumps(str(labels))}}}}}]"
    fit = with_config(["fit", *arguments])
    return ["maestro-pl", *fit, f"--anchors={anchor}", *sampled.further, f"--model.meta.warmup={sampled.warmup}"]


def _exchange(what: str, arguments: list[str]) -> None:
    parser = ToolParser(prog=f"maestro-pl label {what}", description="Labels to or from another format.")
    parser.add_argument("labels", metavar="LABELS", help="the file that `maestro-pl label` keeps")
    parser.add_argument("file", metavar="FILE", help="what is written, or read")
    parser.add_argument("--format", help="csv, jsonl, argilla or label-studio; default: by the file's ending")
    if what == "import":
        parser.add_argument("--rater", help="whose labels these are, where the file does not say")
    options = parser.parse_args(arguments)
    from maestro_pl.labelling.exchange import exported
    from maestro_pl.labelling.importing import imported, labels_in, outcome
    from maestro_pl.labelling.store import LabelStore

    if what == "export":
        count = exported(LabelStore(options.labels, writes=False), Path(options.file), options.format)
        print(f"{count} labels written to {escaped(options.file)}")
    else:
        labels = labels_in(Path(options.file), options.format, options.rater)
        done = imported(LabelStore(options.labels), labels)  # no file of labels is made for what cannot be read
        print(f"{done.new} labels read from {escaped(options.file)}{outcome(done, labels, options.rater)}")
