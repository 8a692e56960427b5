"""The rewards that run a model: perplexity under the real policy, preference under tiny reward models."""

import math
import types
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from callbacks import LengthReward, PerplexityReward, PreferenceReward
from maestro_pl.errors import UserError
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rewards.preference import encode_pair, free_token_id, load_pair_scorer
from maestro_pl.rollout import Rollout
from tests.support import make_policy, make_rollout, make_tokenizer, reward_module

PROMPTS: list[Any] = ["What is 2+2?", "Say hi."]
RESPONSES = ["<think>two and two</think><answer>4</answer>", "<think>hm", "<think>hi</think><answer>hi</answer>", ""]


def rollout_of(policy: Any, references: list[Any]) -> Rollout:
    fields = {
        "prompts": PROMPTS,
        "prompt_texts": PROMPTS,
        "prompt_ids": [policy.encode(prompt) for prompt in PROMPTS],
        "response_ids": [policy.encode(text) for text in RESPONSES],
    }
    return make_rollout(RESPONSES, group_size=2, fields=fields, reference=references, task=["a", "b"])


def make_module(policy: Any, **attributes: Any) -> Any:
    precision = SimpleNamespace(forward_context=nullcontext)
    trainer = SimpleNamespace(precision_plugin=precision)
    return reward_module(policy=policy, trainer=trainer, micro_batch_tokens=150, **attributes)


@pytest.fixture(scope="module")
def policy(tiny_qwen3: Path) -> LoRAPolicy:
    """A policy whose adapters have moved away from its reference, with dropout in them."""
    return make_policy(tiny_qwen3, std=0.2, seed=1, lora=LoRA(r=2, dropout=0.5)).train()


def by_hand(model: Any, prompt: list[int], context: list[int], target: list[int], think_length: int) -> float:
    """P of one reference in one unpadded forward pass, written out."""
    ids = torch.tensor([prompt + context + target])
    with torch.no_grad():
        logps = model(ids).logits[0].log_softmax(-1)
    start = len(prompt) + len(context)
    surprise = -sum(float(logps[start + i - 1, token]) for i, token in enumerate(target))
    return math.exp(surprise / (len(target) * max(1, 1 + math.log10(max(think_length, 1)))))


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_perplexity_is_that_of_a_direct_computation(policy: LoRAPolicy, tiny_qwen3: Path, which: Any) -> None:
    rollout = rollout_of(policy, ["four", "hello"])
    reward = PerplexityReward(model=which)
    reward.on_train_batch_start(None, make_module(policy), {"rollout": rollout}, 0)  # type: ignore[arg-type]
    if which == "reference":
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    else:
        model = policy.model.eval()
    expected = [
        by_hand(
            model,
            policy.encode(prompt),
            policy.encode(f"<think>{think}</think><answer>"),
            policy.encode(ref),
            len(think),
        )
        for prompt, think, ref in [
            (PROMPTS[0], "two and two", "four"),
            (PROMPTS[0], "hm", "four"),  # no format: the whole response without its tag
            (PROMPTS[1], "hi", "hello"),
            (PROMPTS[1], "", "hello"),
        ]
    ]
    policy.train()
    assert rollout.rewards["perplexity"].values_B.tolist() == pytest.approx([-p for p in expected], rel=1e-4)
    assert rollout.perplexities["perplexity"].tolist() == pytest.approx(expected, rel=1e-4)
    assert len({round(p, 3) for p in expected}) == 4


def test_perplexity_restores_the_policys_mode(policy: LoRAPolicy) -> None:
    modes = [module.training for module in policy.modules()]
    assert any(modes)
    rollout = rollout_of(policy, ["four", "hello"])
    PerplexityReward().score(rollout, [0, 1], make_module(policy))
    assert [module.training for module in policy.modules()] == modes


def test_perplexity_reads_a_groups_prompt_once(policy: LoRAPolicy) -> None:
    """One forward pass over both groups: each prompt once, then context and reference of its two responses."""
    rollout = rollout_of(policy, ["four", "hello"])
    passes: list[int] = []
    backbone = policy.base_model.model
    policy.scorer.abilities(policy.base_model)  # tried out before, on rows of its own
    hook = backbone.register_forward_pre_hook(
        lambda _m, _a, kw: passes.append(kw["input_ids"].numel()), with_kwargs=True
    )
    PerplexityReward().score(rollout, [0, 1, 2, 3], make_module(policy))
    hook.remove()
    rows = [("two and two", "four"), ("hm", "four"), ("hi", "hello"), ("", "hello")]
    own = sum(len(policy.encode(f"<think>{think}</think><answer>{ref}")) for think, ref in rows)
    assert passes == [sum(len(ids) for ids in rollout.prompt_ids) + own]


def test_perplexity_applies_where_there_is_a_reference_and_a_reasoning(policy: LoRAPolicy) -> None:
    rollout = rollout_of(policy, ["four", None])
    reward = PerplexityReward(invalid="none", score="log", name="ppl")
    reward.on_test_batch_start(None, make_module(policy), {"rollout": rollout}, 0)  # type: ignore[arg-type]
    scores = rollout.rewards["ppl"]
    assert scores.mask_B.tolist() == [True, False, False, False]
    perplexities = rollout.perplexities["ppl"]
    assert torch.isnan(perplexities).tolist() == [False, True, True, True]
    assert float(scores.values_B[0]) == pytest.approx(-math.log(float(perplexities[0])), rel=1e-5)
    assert reward.spec.normalize == "rank"
    rollout = rollout_of(policy, [None, ""])
    reward.on_test_batch_start(None, make_module(policy), {"rollout": rollout}, 0)  # type: ignore[arg-type]
    assert not rollout.rewards["ppl"].mask_B.any()


def test_perplexity_context_follows_template_and_budget() -> None:
    seen: list[Any] = []

    def token_statistics(prompts: list[list[int]], responses: list[list[int]], **options: Any) -> Any:
        seen.append((prompts, responses, options))
        return SimpleNamespace(logps_T=torch.full((sum(options["tails_B"]),), -2.0))

    policy = types.SimpleNamespace(
        encode=lambda text: list(text.encode()),
        token_statistics=token_statistics,
        modules=lambda: [],
        eval=lambda: None,
    )
    rollout = rollout_of(policy, ["ab", None])
    rollout.responses[0] = "x" * 10 + "</think><answer>4</answer>"
    reward = PerplexityReward(think_in_prompt=True, max_tokens=99)
    assert reward.score(rollout, [0, 2], make_module(policy)) == [
        pytest.approx(-math.e),
        None,
    ]  # 2 nats, halved by 1 + log10(10)
    prompts, responses, options = seen[0]
    assert bytes(prompts[0]).decode() == PROMPTS[0]
    assert bytes(responses[0]).decode() == f"{'x' * 10}</think><answer>ab"
    assert options == {"which": "policy", "max_tokens": 99, "tails_B": [2]}
    PerplexityReward(template="Because {think}. So:").score(rollout, [0], make_module(policy))
    assert bytes(seen[1][1][0]).decode().startswith("Because x")
    assert seen[1][2]["max_tokens"] == 150  # the module's own
    rollout.columns["reference"] = [["ab"], None]
    with pytest.raises(
        UserError, match=r"reads one reference text from the column 'reference', and found \['ab'\] \(list\)"
    ):
        reward.score(rollout, [0], make_module(policy))


def test_efficiency_reads_what_perplexity_left(policy: LoRAPolicy) -> None:
    rollout = rollout_of(policy, ["four", "hello"])
    module = make_module(policy)
    PerplexityReward().on_train_batch_start(None, module, {"rollout": rollout}, 0)  # type: ignore[arg-type]
    LengthReward(mode="efficiency").on_train_batch_start(None, module, {"rollout": rollout}, 0)  # type: ignore[arg-type]
    assert rollout.rewards["length"].values_B.tolist() == [0, 0, 0, 0]  # one valid response a group: nobody to beat


# -- preference -------------------------------------------------------------------------------------------------------


def make_classifier(path: Path, kind: str = "llama", **overrides: Any) -> Path:
    """Save a randomly initialised sequence classifier with a byte tokenizer."""
    make_tokenizer(path)
    small: dict[str, Any] = {
        "vocab_size": 264,
        "num_labels": 1,
        "pad_token_id": None,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    small |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"max_position_embeddings": 128}
    if kind == "bert":
        small["pad_token_id"] = 258
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **(small | overrides)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier"))


PAIRS: list[tuple[Any, str]] = [
    ("What is 2+2?", "4"),
    ("Say hi.", "Hello, how are you?"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], "d"),
    ("x", ""),
]


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("pad", [None, 257])
def test_a_batch_scores_as_single_pairs_do(tmp_path: Path, kind: str, pad: int | None) -> None:
    path = make_classifier(tmp_path, kind, **({"pad_token_id": pad} if kind == "llama" else {}))
    scorer = load_pair_scorer(str(path), batch_size=3)
    together, cut = scorer([p for p, _ in PAIRS], [r for _, r in PAIRS])
    alone = [float(load_pair_scorer(str(path), batch_size=1)([p], [r])[0]) for p, r in PAIRS]
    assert together.tolist() == pytest.approx(alone, abs=1e-4)
    assert len({round(score, 3) for score in alone}) == 4
    assert not cut.any()
    assert not scorer.model.training
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())


def test_without_a_padding_id_the_score_is_read_at_the_last_token(classifier: Path) -> None:
    scorer = load_pair_scorer(str(classifier), batch_size=2, template="concat")
    scores, _ = scorer(["What is 2+2?", "Say hi."], ["4</s>", "Hello, how are you?"])
    raw = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    ids = tokenizer.encode("What is 2+2?\n4</s>", add_special_tokens=False)
    assert ids[-1] == tokenizer.eos_token_id  # the obvious id to pad with would hide the last token
    with torch.no_grad():
        hidden = raw.model(torch.tensor([ids])).last_hidden_state
        expected = float(raw.score(hidden[0, -1]))
    assert float(scores[0]) == pytest.approx(expected, abs=1e-4)


def test_free_token_id() -> None:
    assert free_token_id([{"input_ids": [0, 1, 3]}, {"input_ids": [2, 5]}]) == 4
    assert free_token_id([{"input_ids": []}]) == 0


def test_long_pairs_lose_the_beginning_of_their_prompt(classifier: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    prompt, response = "abcdefgh", "xyz"
    for template, kept in {"chat": "gh</s>\n<s>assistant\nxyz</s>\n", "concat": "bcdefgh\nxyz"}.items():
        limit = 11 if template == "concat" else len(tokenizer.encode(kept, add_special_tokens=False))
        encoded, cut = encode_pair(tokenizer, prompt, response, template, limit)  # type: ignore[arg-type]
        assert cut
        assert tokenizer.decode(encoded["input_ids"]) == kept
        assert len(encoded["input_ids"]) == len(encoded["attention_mask"]) == limit
    only_response, _ = encode_pair(tokenizer, prompt, "w" * 30, "concat", 5)
    assert len(only_response["input_ids"]) == 5
    whole, cut = encode_pair(tokenizer, prompt, response, "concat", 12)
    assert (tokenizer.decode(whole["input_ids"]), cut) == ("abcdefgh\nxyz", False)
    assert encode_pair(tokenizer, [{"role": "user", "content": "a"}], "b", "concat", None)[0][
        "input_ids"
    ] == tokenizer.encode("a\nb")


def test_a_model_that_is_no_reward_model_is_refused(tmp_path: Path, tiny_llama: Path, classifier: Path) -> None:
    two = make_classifier(tmp_path / "two", num_labels=2)
    with pytest.raises(UserError, match=r"two' has 2 labels: a reward model has one"):
        load_pair_scorer(str(two))
    config = AutoConfig.from_pretrained(tiny_llama, num_labels=1)
    headless = AutoModelForCausalLM.from_pretrained(tiny_llama)
    headless.config = config
    make_tokenizer(tmp_path / "headless")
    headless.save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match=r"lacks trained weights for \['score.weight'\]"):
        load_pair_scorer(str(tmp_path / "headless"))
    with pytest.raises(UserError, match="cannot be loaded as a sequence classifier"):
        load_pair_scorer(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"max_length is 500, and the preference model .* takes 128 tokens"):
        load_pair_scorer(str(classifier), max_length=500)


def test_concat_stands_in_where_there_is_no_chat_template(tmp_path: Path) -> None:
    path = make_classifier(tmp_path)
    (path / "chat_template.jinja").unlink()
    scorer = load_pair_scorer(str(path))
    assert scorer.template == "concat"
    same = load_pair_scorer(str(make_classifier(tmp_path / "with")), template="concat")
    assert scorer(["a"], ["b"])[0].tolist() == same(["a"], ["b"])[0].tolist()


def test_preference_reward_loads_in_setup_and_scores_its_rows(classifier: Path) -> None:
    class Writer:
        writes_rollout = True

    reward = PreferenceReward(str(classifier), max_length=40, batch_size=2, dtype="float32")
    policy = SimpleNamespace(encode=lambda text: list(text.encode()))
    rollout = rollout_of(policy, [None, None])
    module = make_module(policy)
    with pytest.raises(UserError, match=r"has no model yet: its setup\(\) loads it"):
        reward.on_train_batch_start(None, module, {"rollout": rollout}, 0)  # type: ignore[arg-type]
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(callbacks=[Writer(), reward], strategy=strategy)
    reward.setup(trainer, module, "fit")
    loaded = reward._scorer
    reward.setup(trainer, module, "test")
    assert reward._scorer is loaded
    notes: list[str] = []
    module.clock.listeners.append(lambda stage, note: notes.append(note))
    rollout.responses = ["4", "5" * 40, "hi", "yo"]
    with pytest.warns(UserWarning, match="1 of 4 pairs are longer than 40 tokens and lose the beginning"):
        reward.on_train_batch_start(trainer, module, {"rollout": rollout}, 0)
    scores = rollout.rewards["preference"]
    assert scores.metrics["truncated"].tolist() == [0, 1, 0, 0]
    assert scores.spec.normalize == "zscore"
    expected, _ = load_pair_scorer(str(classifier), max_length=40)(
        [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, rollout.responses
    )
    assert scores.values_B.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert notes[1:3] == ["preference: 2/4", "preference: 4/4"]
    assert reward.state_dict() == {}


def test_the_sandbox_has_a_reward_model() -> None:
    from maestro_pl.sandbox import preference_path

    scores, cut = load_pair_scorer(str(preference_path()))(["Say hi.", "Say hi."], ["hi", "no no no no"])
    assert scores.isfinite().all()
    assert scores[0] != scores[1]
    assert not cut.any()
