"""The base of the reward callbacks, the rewards that read text and entropies, and how a config names them."""

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

import callbacks
from callbacks import (
    ContainsReward,
    EntropyReward,
    ExactMatchReward,
    FormatReward,
    FunctionReward,
    LengthReward,
    PerplexityReward,
    PreferenceReward,
    Reward,
)
from maestro_pl.errors import UserError
from maestro_pl.rollout import RewardSource, RewardSpec, Rollout, check_reward_names
from maestro_pl.training.clock import StageClock
from tests.support import given, make_rollout, reward_module, run

GOOD = "<think>one two three</think><answer>4</answer>"
CONFIGS = Path(__file__).parents[2] / "configs" / "rewards"


class Writer(Callback):
    """Stands in for a RolloutGenerator."""

    writes_rollout = True


class GivenReward(Reward):
    """Returns what it was given."""

    def __init__(self, result: Any, **options: Any) -> None:
        super().__init__(**options)
        self.result = result
        self.rows: list[int] = []

    def score(self, rollout: Rollout, rows: list[int], pl_module: Any) -> Any:
        self.rows = rows
        assert pl_module.clock.current == "rewards"
        assert not torch.is_grad_enabled()
        return self.result


# -- the base ---------------------------------------------------------------------------------------------------------


def test_the_four_hooks_write_the_scores() -> None:
    for hook in ("train", "validation", "test", "predict"):
        rollout = make_rollout(["x", "y"])
        reward = GivenReward([1, None], name="r", role="anchor", normalize="zscore")
        getattr(reward, f"on_{hook}_batch_start")(None, reward_module(), {"rollout": rollout}, 0)
        scores = rollout.rewards["r"]
        assert scores.spec == reward.spec == RewardSpec("r", "anchor", "zscore")
        assert scores.values_B.tolist() == [1, 0]
        assert scores.mask_B.tolist() == [True, False]
    assert isinstance(reward, RewardSource)


def test_only_the_responses_of_its_tasks_are_scored() -> None:
    rollout = make_rollout(["u", "v", "w", "x"], group_size=2, task=["a", "b"])
    reward = GivenReward(([5, 6], {"extra": torch.tensor([7.0, math.nan])}), tasks=["b"])
    scores = run(reward, rollout)
    assert reward.rows == [2, 3]
    assert scores.values_B.tolist() == [0, 0, 5, 6]
    assert scores.mask_B.tolist() == [False, False, True, True]
    assert scores.metrics["extra"].nan_to_num(-1).tolist() == [-1, -1, 7, -1]


def test_a_batch_without_its_tasks_is_masked_and_not_scored() -> None:
    reward = GivenReward("never read", tasks=["c"])
    assert not run(reward, make_rollout(["u", "v"])).mask_B.any()
    assert reward.rows == []


def test_errors_of_a_score_name_reward_row_and_value() -> None:
    rollout = make_rollout(["u", "v " * 100, "w", "x"], group_size=2, task=["a", "b"])
    with pytest.raises(UserError) as caught:
        run(GivenReward([1.0, "x"], name="mine", tasks=["a"]), rollout)
    assert "Reward 'mine' returned 'x' (str) for response 1 of the batch (prompt 'prompt 0', response 'v v" in str(
        caught.value
    )
    assert "..." in str(caught.value)
    with pytest.raises(UserError, match=r"Reward 'mine', metric 'm', returned inf .*response 2 of the batch"):
        run(GivenReward(([1.0, 2.0], {"m": [math.inf, 1]}), name="mine", tasks=["b"]), rollout)
    with pytest.raises(UserError, match=r"Reward 'mine' returned 1 score\(s\) for 4 responses"):
        run(GivenReward([1.0], name="mine"), rollout)


@pytest.mark.parametrize("batch", [{}, {"rollout": None}, [1], None])
def test_a_batch_without_a_rollout(batch: Any) -> None:
    with pytest.raises(UserError, match="found no rollout in the batch: the RolloutGenerator must stand before"):
        FormatReward().on_test_batch_start(None, reward_module(), batch, 0)  # type: ignore[arg-type]


def test_names_roles_and_tasks_are_checked() -> None:
    assert GivenReward([]).name == "given"
    assert FormatReward().name == "format"
    assert FormatReward(name="fmt-2.b").name == "fmt-2.b"
    for options, sentence in {
        ("name", "a/b"): "name is 'a/b', expected letters, digits",
        ("name", ""): "name is '', expected letters",
        ("role", "loss"): "role is 'loss', expected one of train, anchor, gate, metric",
        ("normalize", "z"): "normalize is 'z', expected one of none, zscore, rank, minmax",
        ("tasks", "a"): "tasks is 'a', expected a list of one or more strings",
        ("tasks", ()): "tasks is .*, expected a list",
    }.items():
        with pytest.raises(UserError, match=f"FormatReward: {sentence}"):
            FormatReward(**{options[0]: options[1]})


def test_setup_wants_a_rollout_before_the_reward_and_unique_names() -> None:
    def setup(*chain: Any) -> None:
        for callback in chain:
            if isinstance(callback, Reward):
                callback.setup(SimpleNamespace(callbacks=list(chain)), reward_module(), "fit")  # type: ignore[arg-type]

    setup(Writer(), FormatReward(), LengthReward())
    with pytest.raises(
        UserError, match="FormatReward has no rollout to score: put a RolloutGenerator before the rewards"
    ):
        setup(FormatReward(), Writer())
    with pytest.raises(UserError) as caught:
        setup(Writer(), FormatReward(), LengthReward(), EntropyReward(name="length"))
    assert "Two rewards are named 'length': LengthReward (number 2 of the rewards) and EntropyReward (number 3" in str(
        caught.value
    )

    class OtherSource(Callback):
        spec = RewardSpec("format")

    with pytest.raises(UserError, match="Two rewards are named 'format': OtherSource"):
        setup(Writer(), OtherSource(), FormatReward())


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["scalar"], "A reward is named 'scalar': FormatReward .number 1 of the rewards.. reward/scalar is the logged"),
        (["a_std", "a"], "Rewards are named 'a' .FormatReward .number 2 .* and 'a_std' .FormatReward .number 1"),
        (["a", "a_low"], "reward/a_low is what is logged of 'a'"),
        (["a_high", "b", "a"], "reward/a_high is what is logged of 'a'"),
    ],
)
def test_no_two_metrics_have_one_key(names: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_reward_names([FormatReward(name=name) for name in names])
    check_reward_names([FormatReward(name=f"{name}.x") for name in names])


def test_a_trainer_takes_two_rewards_of_one_class(tmp_path: Path) -> None:
    one, two = FormatReward(), FormatReward(name="loose", allow_empty=False)
    assert one.state_key != two.state_key
    model = BoringModel()
    model.clock = StageClock()
    trainer = Trainer(
        default_root_dir=tmp_path, logger=False, enable_checkpointing=False, callbacks=[one, two], fast_dev_run=1
    )
    with pytest.raises(UserError, match="has no rollout to score"):
        trainer.fit(model)


def test_a_task_that_never_came_is_warned_about() -> None:
    reward = FormatReward(tasks=["a", "z"])
    run(reward, make_rollout(["x"]))
    with pytest.warns(UserWarning, match=r"Reward 'format' lists the tasks \['z'\], which no row .* \(seen: \['a'\]\)"):
        reward.on_fit_end(None, None)  # type: ignore[arg-type]
    reward.tasks = ["a"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.on_test_end(None, None)  # type: ignore[arg-type]


# -- format, length, entropy ------------------------------------------------------------------------------------------


def test_format_reward_hands_its_options_on() -> None:
    empty, opened = "<think></think><answer>4</answer>", "a</think><answer>4</answer>"
    assert given(FormatReward(), make_rollout([GOOD, empty, opened])) == [1, 1, 0]
    assert given(FormatReward(allow_empty=False), make_rollout([GOOD, empty])) == [1, 0]
    assert given(FormatReward(think_in_prompt=True), make_rollout([GOOD, opened])) == [0, 1]
    assert given(FormatReward(think_tag="a", answer_tag="b"), make_rollout([GOOD, "<a>x</a><b>y</b>"])) == [0, 1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # GOOD: 46 bytes as a whole, 13 in think, 1 in answer; 4 words as a whole (tags are glued on), 3 in think.
        ({"max": 23}, -1.0),
        ({"max": 40}, -6 / 40),
        ({"unit": "characters", "max": 40}, -6 / 40),
        ({"of": "think", "max": 10}, -0.3),
        ({"of": "think", "max": 10, "unit": "characters"}, -0.3),
        ({"of": "think", "unit": "words", "max": 2}, -0.5),
        ({"of": "answer", "unit": "words", "min": 4}, -0.75),
        ({"unit": "words", "max": None, "min": 3}, 0.0),
        ({"of": "think", "max": 4, "floor": -3}, -9 / 4),
    ],
)
def test_length_reward_measures_what_it_is_told(options: dict[str, Any], expected: float) -> None:
    assert len(GOOD) == 46
    assert given(LengthReward(**options), make_rollout([GOOD])) == [pytest.approx(expected)]


def test_a_part_that_is_not_there_counts_as_the_whole_response() -> None:
    open_end = "<think>" + "x" * 13
    for unit in ("tokens", "characters"):
        assert given(LengthReward(of="think", max=10, unit=unit), make_rollout([open_end])) == [-1.0]


def test_token_length_is_that_of_the_sampled_ids() -> None:
    rollout = make_rollout(["abcd"])
    rollout.response_ids = [[1, 2, 3, 4, 5, 99]]  # the end-of-sequence token counts
    assert given(LengthReward(max=4), rollout) == [-0.5]


def test_efficiency_compares_inside_the_group() -> None:
    short, long = "<think>ab</think><answer>4</answer>", "<think>abcdef</think><answer>4</answer>"
    rollout = make_rollout([short, long, "broken", long, short, short], group_size=3)
    rollout.perplexities["perplexity"] = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, math.nan])
    # first group: the short one beats the long one, the broken one is out; second: no perplexity counts as not valid
    assert given(LengthReward(mode="efficiency"), rollout) == [1, 0, 0, 0, 1, 0]
    rollout.perplexities["perplexity"] = torch.tensor([1.0, 2.0, 0.5, math.nan, math.nan, math.nan])
    assert given(LengthReward(mode="efficiency"), rollout) == [1, 0, 0, None, None, None]
    rollout.perplexities = {"ppl": rollout.perplexities["perplexity"]}
    assert given(LengthReward(mode="efficiency", perplexity="ppl"), rollout)[:3] == [1, 0, 0]
    with pytest.raises(UserError, match="mode efficiency reads the perplexities of a reward named 'perplexity'"):
        run(LengthReward(mode="efficiency"), rollout)


def test_efficiency_leaves_other_tasks_out() -> None:
    short, long = "<think>ab</think><answer>4</answer>", "<think>abcdef</think><answer>4</answer>"
    rollout = make_rollout([short, long, short, long], group_size=2, task=["a", "b"])
    rollout.perplexities["perplexity"] = torch.tensor([1.0, 2.0, 1.0, 2.0])
    assert given(LengthReward(mode="efficiency", tasks=["b"]), rollout) == [None, None, 1, 0]


def test_entropy_reward_signs_and_reductions() -> None:
    rollout = make_rollout(["ab", "c", ""])
    rollout.entropies_T = torch.tensor([1.0, 2.0, 0.25])
    assert given(EntropyReward(), rollout) == [-1.5, -0.25, None]
    assert given(EntropyReward(direction="maximize"), rollout) == [1.5, 0.25, None]
    assert given(EntropyReward(reduction="sum", direction="maximize"), rollout) == [3.0, 0.25, None]
    assert EntropyReward().spec == RewardSpec("entropy", "train", "rank")
    rollout.entropies_T = None
    with pytest.raises(UserError, match="Reward 'entropy' needs the entropy of every sampled token"):
        run(EntropyReward(), rollout)


# -- exact match and contains -----------------------------------------------------------------------------------------


def test_exact_match_reward() -> None:
    rollout = make_rollout([GOOD, "It is 4.0", "<answer>five</answer>", "x"], reference=["4", "4", ["5", "five"], None])
    assert given(ExactMatchReward(), rollout) == [1, 0, 1, None]
    assert given(ExactMatchReward(pattern=r"[\d.]+"), rollout) == [1, 1, 1, None]
    assert given(ExactMatchReward(column="gold"), make_rollout([GOOD], gold=[4])) == [1]
    assert given(ExactMatchReward(drop_articles=True), make_rollout(["The end"], reference=["end"])) == [1]
    assert given(ExactMatchReward(answer_tag="say"), make_rollout(["<say>4</say> or 5"], reference=["4"])) == [1]


def test_contains_reward() -> None:
    rollout = make_rollout(["<think>red</think><answer>Blue sky</answer>", "red", "x"], reference=["blue", "RED", None])
    assert given(ContainsReward(), rollout) == [1, 1, None]
    assert given(ContainsReward(strings=["red"]), rollout) == [0, 1, 0]
    assert given(ContainsReward(strings=["red"], of="response"), rollout) == [1, 1, 0]
    assert given(ContainsReward(strings=["red", "sky"], of="response", require="all"), rollout) == [1, 0, 0]
    assert given(ContainsReward(ignore_case=False), rollout) == [0, 0, None]


def test_a_cell_that_is_no_reference() -> None:
    with pytest.raises(
        UserError, match=r"Reward 'exact_match', column 'reference', response 0 .*\{'a': 1\} \(dict\) is no"
    ):
        run(ExactMatchReward(), make_rollout(["x"], reference=[{"a": 1}]))
    with pytest.raises(UserError, match="no column 'gold'"):
        run(ContainsReward(column="gold"), make_rollout(["x"]))


# -- arguments and configs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "options", "sentence"),
    [
        (FormatReward, {"think_tag": "<think>"}, "think_tag is '<think>', expected a tag's name without brackets"),
        (FormatReward, {"answer_tag": "think"}, "think_tag and answer_tag are both 'think'"),
        (LengthReward, {"min": -1}, "min is -1, expected a whole number of at least 0"),
        (LengthReward, {"max": 2.5}, "max is 2.5, expected a whole number of at least 0"),
        (LengthReward, {"min": 9, "max": 8}, "max, 8, is below min, 9"),
        (LengthReward, {"max": None}, "min is 0 and max is null, so that every response gets 0"),
        (LengthReward, {"floor": 1}, "floor is 1, expected a number of at most 0"),
        (LengthReward, {"floor": math.nan}, "floor is nan, expected a number"),
        (LengthReward, {"unit": "lines"}, "unit is 'lines', expected one of tokens, words, characters"),
        (LengthReward, {"of": "all"}, "of is 'all', expected one of response, think, answer"),
        (LengthReward, {"mode": "x"}, "mode is 'x', expected one of budget, efficiency"),
        (EntropyReward, {"direction": "up"}, "direction is 'up', expected one of minimize, maximize"),
        (EntropyReward, {"reduction": "max"}, "reduction is 'max', expected one of mean, sum"),
        (PerplexityReward, {"model": "proxy"}, "model is 'proxy', expected one of policy, reference"),
        (PerplexityReward, {"invalid": "skip"}, "invalid is 'skip', expected one of none, whole"),
        (PerplexityReward, {"score": "nll"}, "score is 'nll', expected one of perplexity, log"),
        (PerplexityReward, {"template": "<answer>"}, "the template '<answer>' has no {think}"),
        (PerplexityReward, {"max_tokens": 0}, "max_tokens is 0, expected a whole number of at least 1"),
        (PreferenceReward, {"dtype": "int8"}, "dtype is 'int8', expected one of auto, float32, bfloat16, float16"),
        (PreferenceReward, {"template": "x"}, "template is 'x', expected one of chat, concat"),
        (PreferenceReward, {"batch_size": True}, "batch_size is True, expected a whole number of at least 1"),
        (PreferenceReward, {"max_length": 0}, "max_length is 0, expected a whole number of at least 1"),
        (PreferenceReward, {"device": "gpu0"}, "device is 'gpu0', expected one such as cpu, cuda"),
        (ExactMatchReward, {"pattern": "("}, r"the pattern '\(' is no regular expression"),
        (ContainsReward, {"strings": []}, r"strings is \[\], expected a list of one or more strings"),
        (ContainsReward, {"strings": "red"}, "strings is 'red', expected a list"),
        (ContainsReward, {"require": "some"}, "require is 'some', expected one of any, all"),
        (ContainsReward, {"of": "think"}, "of is 'think', expected one of response, answer"),
    ],
)
def test_arguments_are_checked_where_they_are_given(
    reward: type[Reward], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=f"{reward.__name__}: {sentence}"):
        reward(**options)


def parse(*args: str) -> list[Reward]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=list[Reward], sub_configs=True)
    config = parser.parse_args(list(args))
    again = parser.parse_string(parser.dump(config, skip_unset=False))  # what --print_config shows runs to the same
    assert again.rewards == config.rewards
    rewards: list[Reward] = parser.instantiate(config).rewards
    return rewards


def test_every_reward_parses_from_a_config(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def short(completion, scale):\n    return -scale * len(completion)\n")
    items = {
        "FormatReward": {"role": "gate", "think_in_prompt": True},
        "LengthReward": {"min": 5, "max": None, "unit": "words"},
        "EntropyReward": {"direction": "maximize", "normalize": "minmax"},
        "PerplexityReward": {"model": "reference", "score": "log"},
        "PreferenceReward": {"model": "sandbox", "device": "cpu"},
        "ExactMatchReward": {"pattern": r"\d+", "tasks": ["math"]},
        "ContainsReward": {"strings": ["a", "b"], "require": "all"},
        "FunctionReward": {"function": f"{tmp_path}/f.py:short", "kwargs": {"scale": 2}, "name": "brief"},
    }
    lines = [f"- {{class_path: callbacks.{name}, init_args: {options!r}}}" for name, options in items.items()]
    text = "\n".join(lines).replace("True", "true").replace("None", "null")
    (tmp_path / "rewards.yaml").write_text(text)
    rewards = parse("--rewards", str(tmp_path / "rewards.yaml"))
    assert [type(reward).__name__ for reward in rewards] == list(items)
    assert rewards[0].spec == RewardSpec("format", "gate")
    assert isinstance(rewards[1], LengthReward)
    assert (rewards[1].min, rewards[1].max) == (5, None)
    assert rewards[5].tasks == ["math"]
    assert isinstance(rewards[7], FunctionReward)
    assert rewards[7].spec.name == "brief"
    assert given(rewards[7], make_rollout(["abc"])) == [-6]


@pytest.mark.parametrize(
    ("item", "what"),
    [
        ("{class_path: callbacks.FormatReward, init_args: {tag: x}}", "tag"),
        ("{class_path: callbacks.LengthReward, init_args: {min: short}}", "short"),
        ("{class_path: callbacks.EntropyReward, init_args: {direction: up}}", "up"),
        ("{class_path: callbacks.NoReward}", "NoReward"),
    ],
)
def test_a_wrong_item_of_a_config_is_refused(item: str, what: str) -> None:
    with pytest.raises(Exception, match=what):
        parse("--rewards", f"[{item}]")


@pytest.mark.parametrize("name", ["brief", "creative", "paper"])
def test_shipped_reward_sets_parse_and_have_unique_names(name: str) -> None:
    rewards = parse("--rewards", str(CONFIGS / f"{name}.yaml"))
    names = [reward.name for reward in rewards]
    assert len(names) == len(set(names)) >= 4
    if name == "paper":
        assert set(names) == {"perplexity", "format", "entropy", "length", "preference"}
        assert {r.name for r in rewards if r.normalize == "rank"} == {"perplexity", "entropy"}


def test_what_callbacks_exports() -> None:
    assert {"Reward", "FormatReward", "FunctionReward"} <= set(callbacks.__all__)
    assert all(hasattr(callbacks, name) for name in callbacks.__all__)
