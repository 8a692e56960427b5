"""What runs on an accelerator: every kind of run gives the CPU's numbers there, no operand is left behind, few reads wait.

Collected by ``test_pretend.py`` in a process of its own, since the device stays in the process that registered it. With
``MAESTRO_DEVICE=cuda`` the device is a real one (``make test-gpu``); what is counted on the pretend one is left out then.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.plugins import MixedPrecision
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertModel

from callbacks import (
    BestOfAnchor,
    EmbeddingReward,
    EntropyReward,
    FunctionReward,
    LengthReward,
    PerplexityReward,
    PreferenceReward,
)  # fmt: skip
from maestro_pl import KL, Advantages, Anchoring, Loss, Meta
from maestro_pl.cli import main
from maestro_pl.conductor import AnchorSignal, LookaheadSignal, RidgeLearner
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.influence import GradientWeights
from maestro_pl.evaluation.judge import Ask, LocalJudge
from maestro_pl.generation import Generation, HFEngine, NativeEngine, Sampling
from maestro_pl.generation.fixed import FixedDecoding
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import Rollout
from maestro_pl.training import update
from tests.support import data_of, make_policy, make_tokenizer, module_of, rewards, trainer_of
from tests.support.pretend import NAME, Pretended, PretendStrategy, asked, register

REAL = os.environ.get("MAESTRO_DEVICE", "")
if not REAL:
    register()

DEVICE = torch.device(REAL or NAME, 0)
STRATEGY = f"{PretendStrategy.__module__}.{PretendStrategy.__qualname__}"
Runs = Callable[[Path], dict[str, Any]]
counted = pytest.mark.skipif(bool(REAL), reason="what the pretend device counts or refuses")


def there() -> dict[str, Any]:
    """The Trainer's arguments for a run on the device."""
    return {"accelerator": "gpu", "devices": 1} if REAL else {"accelerator": "auto", "strategy": PretendStrategy()}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"word {i}", "task": "ab"[i % 2], "reference": f"four {i}"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("encoder")
    make_tokenizer(path)
    torch.manual_seed(0)
    small = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(BertConfig(**small, intermediate_size=64, pad_token_id=258, initializer_range=0.3)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("classifier")
    make_tokenizer(path)
    torch.manual_seed(0)
    small = {"vocab_size": 264, "num_labels": 1, "pad_token_id": None, "bos_token_id": 256, "eos_token_id": 257}
    small |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **small)).save_pretrained(path)
    return str(path)


class Watch(L.Callback):
    """Keeps the rollouts and metrics of every step, and tells the counter which stage asks."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.logged: list[dict[str, float]] = []
        self.devices: set[str] = set()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.clock.listeners.append(asked.listen)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        asked.clear()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rollouts.append(batch["rollout"])
        self.logged.append(dict(pl_module.step_metrics))
        self.devices |= {parameter.device.type for parameter in pl_module.parameters()}

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, n: int = 0
    ) -> None:
        self.rollouts.append(batch["rollout"])


def sgd(rate: float) -> Any:
    """Steps that grow with the gradient, so that what rounding changes stays small."""
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def fives(completion: str, **_: Any) -> float:
    return float(sum(map(ord, completion)) % 5)


def longest(responses: list[str]) -> int:
    return max(range(len(responses)), key=lambda i: sum(map(ord, responses[i])) % 5)


def soft() -> Conductor:
    return Conductor(action="soft", norm="center", context="prompt")


def anchored(folder: Path) -> dict[str, Any]:
    return {
        "weigher": soft(),
        "anchoring": Anchoring(fraction=0.5),
        "chain": [FunctionReward(function=fives, name="anchor", role="anchor")],
    }


def paper(folder: Path) -> dict[str, Any]:
    """The paper's Conductor, the KL in the loss, and passes of one group."""
    return {"kl": KL(coef=0.1), "micro_batch_tokens": 60}


def ridge(folder: Path) -> dict[str, Any]:
    return {
        **anchored(folder),
        "meta": Meta(AnchorSignal(), RidgeLearner(exploration="thompson"), every=1, warmup=1),
        "kl": KL(coef=0.1, place="reward"),
    }


def choices(folder: Path) -> dict[str, Any]:
    rated = FunctionReward(function=fives, name="rated", role="anchor", tasks=["b"])
    return {
        "weigher": soft(),
        "meta": Meta(AnchorSignal(), RidgeLearner(target="choice"), every=1, warmup=1),
        "anchoring": Anchoring(fraction=1.0, responses=3),
        "chain": [BestOfAnchor(longest, tasks=["a"]), rated],
    }


def gdpo(folder: Path) -> dict[str, Any]:
    """GDPO with a synced reference, two updates a rollout and the tokens of high entropy only."""
    reference = {"reference": "synced", "sync_every": 1, "sync_rate": 0.5}
    return {
        "policy_options": reference,
        "kl": KL(coef=0.1),
        "advantages": Advantages(aggregation="normalize_then_sum"),
        "loss": Loss(type="dapo", top_entropy=0.5),
        "updates_per_rollout": 2,
    }


def whole(folder: Path) -> dict[str, Any]:
    """All parameters, the reference a frozen copy, ratios of whole responses, decoding by transformers."""
    return {"lora": None, "kl": KL(coef=0.1), "loss": Loss(importance_level="sequence"), "engine": "hf"}


def joint(folder: Path) -> dict[str, Any]:
    return {"meta": Meta(coupling="joint")}


def lookahead(folder: Path) -> dict[str, Any]:
    return {**anchored(folder), "meta": Meta(LookaheadSignal(), "gradient", every=1)}


def influence(folder: Path) -> dict[str, Any]:
    return {"weigher": GradientWeights(), "advantages": Advantages(aggregation="dvao")}


def fit(model: Path, prompts: Path, kind: Runs, on_device: bool, *more: Any, path: Any = None, **run: Any) -> Any:
    """Two steps of a kind of run; the module, what was seen of them, and the trainer."""
    options = kind(model)
    chain, watch = [*rewards(*options.pop("chain", [])), *more], Watch()
    # on a real device rounding differs after a step, and a draw at a rounded edge falls to the neighbour
    steps = 1 if REAL else 2
    run = {"max_steps": steps, "limit_val_batches": 0, "engine": options.pop("engine", "native"), **run}
    meta = options.pop("meta", Meta(every=1))
    meta = Meta(meta.signal, meta.learner, meta.every, meta.warmup, meta.coupling, optimizer=sgd(0.1))
    lora = options.pop("lora", LoRA(r=4))
    module = module_of(model, optimizer=sgd(0.5), meta=meta, lora=lora, **options)
    torch.manual_seed(0)
    if on_device:
        run |= there()
    trainer = trainer_of(prompts.parent, [*chain, watch], **run)
    trainer.fit(module, data_of(prompts), ckpt_path=path)
    return module, watch, trainer


def alike(one: Any, other: Any) -> None:
    """Modules and rollouts of two runs agree up to rounding."""
    (module, watch, _), (again, rewatch, _) = one, other
    assert [r.response_ids for r in watch.rollouts] == [r.response_ids for r in rewatch.rollouts]
    for rollout, own in zip(watch.rollouts, rewatch.rollouts, strict=True):
        for name, scores in rollout.rewards.items():
            torch.testing.assert_close(scores.values_B.cpu(), own.rewards[name].values_B.cpu(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rollout.weights_BK, own.weights_BK, rtol=1e-4, atol=1e-5)
    assert len(watch.logged) == len(rewatch.logged)
    for measured, own in zip(watch.logged, rewatch.logged, strict=True):
        seconds = {name: measured[name] for name in measured if name.startswith("time/")}
        assert measured == pytest.approx({**own, **seconds}, rel=1e-3, abs=1e-4, nan_ok=True)
    for name, values in module.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name].cpu(), values.cpu(), rtol=1e-4, atol=3e-5, msg=name)


# -- the check itself ----------------------------------------------------------------------------------------------------


@counted
def test_operands_on_two_devices_raise() -> None:
    here, there, number = torch.ones(3, device=DEVICE), torch.ones(3), torch.tensor(2.0)
    for wrong in (
        lambda: here + there,
        lambda: there[here.long() - 1],
        lambda: here.index_put((torch.tensor([0, 1, 2]),), there),
        lambda: torch.stack([here.sum(), number]),
        lambda: number.add_(here.sum()),
        lambda: torch.cat([here, there]),
        lambda: torch.where(here > 0, here, there),
    ):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            wrong()
    with pytest.raises(TypeError, match="can't convert a pretend:0 tensor to numpy"):
        here.numpy()
    assert (here * number).tolist() == [2.0] * 3  # what CUDA allows
    assert there.copy_(here).device.type == "cpu"
    assert here[torch.tensor([0])].device == DEVICE


@counted
def test_reads_are_counted() -> None:
    x = torch.arange(4.0, device=DEVICE)
    for read, count in (
        (lambda: x.sum().item(), 1),
        (lambda: bool((x > 1).any()), 1),
        (lambda: x[x > 1], 1),
        (lambda: (x > 1).nonzero(), 1),
        (lambda: x.tolist(), 1),
        (lambda: x.cpu(), 1),
        (lambda: x.repeat_interleave(x.long()), 1),
        (lambda: x.repeat_interleave(x.long(), output_size=6), 0),
        (lambda: x[x.long()] + 1, 0),
    ):
        asked.clear()
        read()
        assert sum(asked.waits.values()) == count


def views(x: torch.Tensor) -> torch.Tensor:
    x[1:3].mul_(2)
    x.t()[0].add_(5)
    x[:, ::2].fill_(3)
    x.chunk(2)[0].exp_()
    x.view(-1, 3).addmm_(torch.ones(8, 2, device=x.device), torch.full((2, 3), 0.5, device=x.device))
    return x


def indices(x: torch.Tensor) -> torch.Tensor:
    x[torch.tensor([0, 1], device=x.device)] = 7.0
    x[x > 10] = 1.0
    x.index_copy_(0, torch.arange(2, 4, device=x.device), torch.eye(2, 6, device=x.device))
    return x.gather(1, x.argsort(dim=1))


def results(x: torch.Tensor) -> torch.Tensor:
    given, taken = torch.empty(4, 6, device=x.device), x.new_tensor([1.0, 2.0])
    torch.add(x, x, out=given)
    taken.data = torch.ones(6, device=x.device)
    return given + taken


def many(x: torch.Tensor) -> torch.Tensor:
    parts = [x.clone(), x + 1]
    torch._foreach_mul_(parts, 2.0)
    return torch.cat(parts) * torch.stack(torch._foreach_norm(parts)).sum()


def drawn(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.dropout(x, 0.5, True) + torch.randn(6, device=x.device) + torch.multinomial(x + 1, 1)


def solved(x: torch.Tensor) -> torch.Tensor:
    system = x @ x.t() + torch.eye(4, device=x.device)
    return torch.linalg.solve(system, x) + torch.cholesky_solve(x, torch.linalg.cholesky(system))


def learned(x: torch.Tensor) -> torch.Tensor:
    layer = torch.nn.Linear(6, 2)
    torch.nn.init.constant_(layer.weight, 0.1)
    torch.nn.init.zeros_(layer.bias)
    layer.to(x.device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).logsumexp(-1).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
    return layer.weight.data


def inferred(x: torch.Tensor) -> torch.Tensor:
    parameter = torch.nn.Parameter(x)
    with torch.inference_mode():
        return (parameter.t() @ x).view(-1, 4).contiguous()


@counted  # a real device draws its own random numbers
@pytest.mark.parametrize("ask", [views, indices, results, many, drawn, solved, learned, inferred])
def test_operations_have_the_numbers_of_the_cpu(ask: Callable[[torch.Tensor], torch.Tensor]) -> None:
    expected = ask(torch.arange(24.0).reshape(4, 6))
    found = ask(torch.arange(24.0, device=DEVICE).reshape(4, 6))
    assert found.device == DEVICE
    torch.testing.assert_close(found.cpu(), expected)


def test_parameters_that_are_tied_stay_tied_and_the_same() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.own = torch.nn.Parameter(torch.ones(2))
    held, own = model[0].weight, model.own
    model.to(DEVICE)
    assert model[0].weight is model[1].weight is held
    assert model.own is own
    assert held.device == own.device == DEVICE
    assert model.cpu()[1].weight is held
    assert held.device.type == "cpu"


@counted
def test_an_operand_left_on_the_cpu_ends_a_run_and_is_named(
    tiny_qwen3: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        update, "repeated", lambda values, lengths, count: values.cpu().repeat_interleave(lengths.cpu())
    )
    with pytest.raises(RuntimeError, match=r"same device, but aten\.\S+ at maestro_pl/\S+\.py:\d+ \w+ got"):
        fit(tiny_qwen3, prompts, paper, True)


# -- runs ----------------------------------------------------------------------------------------------------------------

KINDS: list[Runs] = [paper, ridge, choices, gdpo, whole, joint, lookahead, influence]


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_a_run_has_the_numbers_of_the_cpu(tiny_qwen3: Path, prompts: Path, kind: Runs) -> None:
    if REAL and kind is whole:
        pytest.skip("transformers draws by the device's own random numbers")
    device = fit(tiny_qwen3, prompts, kind, True)
    for key, count in sorted(asked.waits.items()):
        print(count, *key)
    print(asked.operations)
    assert device[1].devices == {DEVICE.type}
    alike(fit(tiny_qwen3, prompts, kind, False), device)
    assert device[2].global_step == (1 if REAL else 2)


def test_rewards_that_compute_have_the_scores_of_the_cpu(
    tiny_qwen3: Path, prompts: Path, encoder: str, classifier: str
) -> None:
    def chain() -> list[Any]:
        return [
            PerplexityReward(), PerplexityReward(model="reference", name="under_reference", score="log"), EntropyReward(),
            EmbeddingReward(encoder, of="response"), PreferenceReward(classifier), LengthReward(),
        ]  # fmt: skip

    device = fit(tiny_qwen3, prompts, paper, True, *chain())
    names = {"perplexity", "under_reference", "entropy", "embedding", "preference", "length", "sevens", "elevens"}
    assert set(device[1].rollouts[0].rewards) == names
    assert {scores.values_B.device.type for scores in device[1].rollouts[0].rewards.values()} == {"cpu"}
    alike(fit(tiny_qwen3, prompts, paper, False, *chain()), device)


def test_a_local_judge_replies_as_on_the_cpu(tiny_qwen3: Path) -> None:
    asks = [Ask([{"role": "user", "content": text}]) for text in ("a", "something longer", "b c")]
    replies = [
        LocalJudge(str(tiny_qwen3), max_tokens=4, device=device).complete(asks, lambda index, reply: None)
        for device in ("cpu", DEVICE)
    ]
    assert replies[0] == replies[1]


def test_evaluation_has_the_rollouts_of_the_cpu(tiny_qwen3: Path, prompts: Path) -> None:
    found = []
    for on_device in (False, True):
        module, _, _ = fit(tiny_qwen3, prompts, paper, on_device, max_steps=0 if REAL else 1)
        watch = Watch()
        run = there() if on_device else {}
        trainer = trainer_of(prompts.parent, [*rewards(), watch], **run)
        metrics = trainer.validate(module, data_of(prompts), verbose=False)
        metrics += trainer.test(module, data_of(prompts), verbose=False)
        found.append((metrics, [rollout.response_ids for rollout in watch.rollouts]))
    (cpu, said), (device, said_there) = found
    assert said == said_there
    assert len(cpu) == 2
    for one, other in zip(cpu, device, strict=True):
        assert one == pytest.approx(
            {**other, **{name: one[name] for name in one if name.startswith("time/")}}, rel=1e-4
        )


@pytest.mark.parametrize("kind", [paper, ridge], ids=["paper", "ridge"])
def test_a_resumed_run_equals_the_uninterrupted_one(tiny_qwen3: Path, prompts: Path, kind: Runs) -> None:
    """Bit for bit; and a checkpoint of the device goes on, on the CPU."""
    straight, _, _ = fit(tiny_qwen3, prompts, kind, True, max_steps=2)
    _, _, trainer = fit(tiny_qwen3, prompts, kind, True, max_steps=1)
    saved = prompts.with_name("part.ckpt")
    trainer.save_checkpoint(saved)
    resumed, _, _ = fit(tiny_qwen3, prompts, kind, True, path=saved, max_steps=2)
    expected = straight.state_dict()
    assert expected.keys() == resumed.state_dict().keys()
    assert all(torch.equal(values, expected[name]) for name, values in resumed.state_dict().items())
    if kind is paper and not REAL:
        elsewhere, _, _ = fit(tiny_qwen3, prompts, kind, False, path=saved)
        for name, values in elsewhere.state_dict().items():
            torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_mixed_precision_runs(tiny_qwen3: Path, prompts: Path, precision: Any, dtype: torch.dtype) -> None:
    seen = set()

    class Products(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            for part in pl_module.policy.modules():
                if isinstance(part, torch.nn.Linear):
                    part.register_forward_hook(lambda part, given, out: seen.add(out.dtype))

    # by itself Lightning casts on the CPU and on CUDA
    run = {"precision": precision} if REAL else {"plugins": [MixedPrecision(precision, NAME)]}
    module, watch, _ = fit(tiny_qwen3, prompts, paper, True, Products(), max_steps=1, **run)
    assert dtype in seen
    assert all(bool(p.isfinite().all()) for p in module.policy.trained_parameters())
    assert [row["policy/skipped"] for row in watch.logged] == [0.0]


def test_the_command_line_runs_with_all_its_callbacks(
    tiny_qwen3: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prompts.parent
    monkeypatch.chdir(folder)
    config = {
        "seed_everything": 1,
        "model": {"policy": {"model": str(tiny_qwen3), "dtype": "float32"}, "weigher": "maestro_pl.Conductor"},
        "data": {"sources": str(prompts), "fractions": [0.6, 0.2, 0.2], "batch_size": 2, "show": False},
        "rollout": {"group_size": 4, "eval_group_size": 2, "max_new_tokens": 4},
        "rewards": [{"class_path": "callbacks.FormatReward"}, {"class_path": "callbacks.EntropyReward"}],
        "trainer": {
            **({"accelerator": "gpu", "devices": 1} if REAL else {"strategy": {"class_path": STRATEGY}}),
            "max_steps": 2,
            "val_check_interval": 1,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "run.yaml"])
    run = folder / "runs/run/version_0"
    assert {"weights.csv", "rollouts.jsonl", "rewards.csv", "report.html"} <= {path.name for path in run.iterdir()}
    main(["fit", "--config", "run.yaml", "--ckpt_path", str(run / "checkpoints/last.ckpt"), "--trainer.max_steps", "3"])
    main(["test", "--config", "run.yaml", "--ckpt_path", str(run / "checkpoints/last.ckpt")])
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert len([row for row in rows if row.get("train/loss")]) >= 2


# -- how often the host waits --------------------------------------------------------------------------------------------


def asked_per_step(engine: Any, policy: LoRAPolicy) -> tuple[float, float, Generation]:
    """Waits and operations of one decoded step of all rows, and what was made."""
    waits, operations = [], []
    for longest in (4, 12):
        asked.clear()
        made = engine.generate(policy, [[1, 2, 3], [4, 5, 6, 7]], 2, Sampling(max_new_tokens=longest, seed=3))
        assert {len(ids) for ids in made.response_ids} == {longest}
        waits.append(sum(asked.waits.values()))
        operations.append(sum(asked.operations.values()))
    return (waits[1] - waits[0]) / 8, (operations[1] - operations[0]) / 8, made


@counted
def test_a_decoded_step_waits_once_and_asks_for_no_more_than_one_of_transformers(tiny_qwen3: Path) -> None:
    """A model with adapters: ours also gives log-probabilities and entropies, theirs must be scored afterwards."""
    policy = make_policy(tiny_qwen3, std=0.1).to(DEVICE).eval()
    policy.eos_token_ids = []  # all rows go on to the end
    assert policy.packs  # which is tried once
    waits, operations, made = asked_per_step(NativeEngine(), policy)
    assert isinstance(made.logps_T, Pretended)
    assert waits == 1
    waits_of_theirs, operations_of_theirs, _ = asked_per_step(HFEngine(), policy)
    assert 0 < operations <= operations_of_theirs
    assert waits_of_theirs <= 2  # transformers' own, for four tokens


@counted
def test_a_decoded_step_of_fixed_shapes_waits_for_nothing(tiny_qwen3: Path) -> None:
    policy = make_policy(tiny_qwen3, std=0.1).to(DEVICE).eval()
    policy.eos_token_ids = []
    assert policy.packs
    waits, _, made = asked_per_step(NativeEngine(cache="static"), policy)
    assert isinstance(made.logps_T, Pretended)
    assert waits == 1 / FixedDecoding.look_every  # between the steps


@counted
def test_decoding_waits_less_than_once_a_token(tiny_qwen3: Path) -> None:
    """Of rows that end one after the other, whatever is asked for at the beginning and the end."""
    policy = make_policy(tiny_qwen3, std=0.1).to(DEVICE).eval()
    policy.eos_token_ids = list(range(0, 264, 20))
    assert policy.packs
    for engine in (NativeEngine(), HFEngine()):
        asked.clear()
        made = engine.generate(policy, [[1, 2, 3], [4, 5, 6, 7]], 4, Sampling(max_new_tokens=16, seed=3))
        lengths = [len(ids) for ids in made.response_ids]
        assert len(set(lengths)) > 2
        assert max(lengths) <= sum(asked.waits.values()) <= sum(lengths)


@counted
@pytest.mark.parametrize("kind", [ridge, gdpo], ids=["ridge", "gdpo"])
def test_an_update_waits_as_often_for_long_responses_as_for_short_ones(
    tiny_qwen3: Path, prompts: Path, kind: Runs
) -> None:
    counts, tokens = [], []
    for longest in (4, 12):

        def length(model: Path, longest: int = longest) -> dict[str, Any]:
            return {**kind(model), "micro_batch_tokens": 4096}

        class Longer(L.Callback):
            def setup(self, trainer: Any, pl_module: Any, stage: str, longest: int = longest) -> None:
                writer = trainer.callbacks[0]
                writer.sampling = type(writer.sampling)(max_new_tokens=longest)

        _, watch, _ = fit(tiny_qwen3, prompts, length, True, Longer())
        counts.append(asked.waits_of("update"))
        assert asked.waits_of("", "training_log") == len(watch.logged)  # all metrics of a step at once
        tokens.append(sum(int(rollout.lengths_B.sum()) for rollout in watch.rollouts))
    print(counts, tokens)
    assert tokens[1] > 1.5 * tokens[0]
    assert counts[0] == counts[1]
