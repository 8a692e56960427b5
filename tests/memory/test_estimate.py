"""The estimate against what was measured, the probe that leaves nothing behind, the command line, and the presets."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig

from benchmarks.memory import SMALL, Case, cpu_cases, cuda_cases, judged, run_case, table
from benchmarks.random_models import RandomPolicy
from callbacks import MemoryProbe
from maestro_pl import KL, Meta
from maestro_pl.cli import main
from maestro_pl.conductor.weighers import EqualWeights
from maestro_pl.errors import UserError
from maestro_pl.memory.advice import CARDS, changes, to_fit
from maestro_pl.memory.estimate import GIB, Workload, estimate, optimizer_memory, vllm_needs
from maestro_pl.memory.live import LiveTensors
from maestro_pl.memory.shadow import ModelSetting, Shadow
from maestro_pl.memory.workload import _of_vllm, model_config
from maestro_pl.policy.loading import LoRA
from tests.support import data_of, module_of, rewards, trainer_of

ROOT = Path(__file__).parents[2]
QLORA = {"quantization": "nf4", "gradient_checkpointing": True}


def setting(model: str = "Qwen/Qwen3-8B", **options: Any) -> ModelSetting:
    return ModelSetting(model_config(model), **{**QLORA, **options})


def test_live_tensors_are_counted_to_the_byte() -> None:
    kept = torch.zeros(1000)
    with LiveTensors([kept]) as live:
        assert live.bytes == 4000
        a = torch.ones(500, dtype=torch.float64)
        view = a.view(10, 50)
        assert live.bytes == 8000  # a view is the same storage
        b = a + 1
        assert live.peak == live.bytes == 12000
        del a
        assert live.bytes == 12000  # the view holds it
        del view, b
        assert live.bytes == 4000
        assert live.peak == 12000
        live.reset_peak()
        x = torch.ones(100, requires_grad=True)
        y = (x.exp() * 2).sum()
        assert live.peak > 4000 + 800  # autograd keeps the exponentials
        y.backward()
        del y
        assert live.bytes == 4000 + 400 + 400  # x and its gradient
    assert kept.numel() == 1000


@pytest.mark.slow
@pytest.mark.parametrize("case", cpu_cases(2), ids=lambda case: case.name)
def test_the_estimate_is_within_15_percent_of_what_was_measured(case: Case) -> None:
    # two layers instead of six, half as wide, and a quarter of the tokens: what decides memory is the same, in seconds
    narrow = {name: case.shape[name] // 2 for name in ("hidden_size", "intermediate_size", "head_dim", "vocab_size")}
    small = replace(
        case, steps=1, shape={**case.shape, **narrow, "num_hidden_layers": 2}, group=4, response=case.response // 2,
        micro_batch_tokens=case.micro_batch_tokens // 4,
    )  # fmt: skip
    threads = torch.get_num_threads()
    result = judged(run_case(small, "cpu", None))
    torch.set_num_threads(threads)
    assert result["estimate_ok"], result["errors"]
    assert all(abs(error) <= 0.15 for error in result["errors"].values())
    assert result["probe"]["update"] > 2**20
    assert case.name in table([result])


def test_growth_and_a_wrong_estimate_are_found() -> None:
    good: dict[str, Any] = {
        "probe": {"rollout": 100, "update": 200, "estimate": {"rollout": 110, "update": 190}},
        "bytes_after_steps": [500, 1000, 1000, 1000, 1001], "peak_reserved": None, "case": {"target_gib": None},
    }  # fmt: skip
    assert judged(good)["estimate_ok"]
    assert judged(good)["flat"]
    assert not judged({**good, "bytes_after_steps": [500, 1000, 1000, 1020, 1040]})["flat"]
    wrong = {**good["probe"], "estimate": {"rollout": 120, "update": 190}}
    assert not judged({**good, "probe": wrong})["estimate_ok"]
    assert not judged({**good, "case": {"target_gib": 1e-9}})["within_target"]


@pytest.mark.slow
def test_memory_is_flat_over_many_steps() -> None:
    case = Case("flat", "qwen3", {**SMALL, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128},
                prompt=24, response=4, policy=QLORA, steps=20)  # fmt: skip
    threads = torch.get_num_threads()
    result = judged(run_case(case, "cpu", None))
    torch.set_num_threads(threads)
    assert len(result["bytes_after_steps"]) == 20
    assert result["flat"], result["bytes_after_steps"]


@pytest.mark.slow
def test_the_weights_are_counted_as_they_are_stored() -> None:
    for model, expected in (("Qwen/Qwen3-8B", 6.07e9), ("Qwen/Qwen3-0.6B", 0.54e9)):
        shadow = Shadow(setting(model))
        assert shadow.base_bytes == pytest.approx(expected, rel=0.02)
    config = AutoConfig.for_model("qwen3", **SMALL)
    for kind in ("none", "nf4", "fp4", "int8"):
        policy = RandomPolicy(config, quantization=kind)
        stored = 0
        for parameter in {id(p): p for n, p in policy.named_parameters() if "lora_" not in n}.values():
            state = getattr(parameter, "quant_state", None)
            owners = [state, getattr(state, "state2", None)] if state is not None else []
            tensors = [t for owner in owners if owner is not None for t in vars(owner).values()]
            stored += parameter.numel() * parameter.element_size()
            stored += sum(
                t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor) and t.numel() > 1
            )
            scales = getattr(parameter, "SCB", None)
            stored += 0 if scales is None else scales.numel() * 4
        assert Shadow(ModelSetting(config, quantization=kind)).base_bytes == pytest.approx(stored, rel=0.01)


@pytest.mark.slow
def test_a_long_model_is_extrapolated_exactly() -> None:
    small = ModelSetting(AutoConfig.for_model("qwen3", **{**SMALL, "num_hidden_layers": 7}), **QLORA)
    quick, exact = Shadow(small), Shadow(small, whole=True)
    assert quick._short is not None
    assert exact._short is None
    lasting = ("base_bytes", "adapter_bytes", "reference_bytes", "trained", "trained_bytes", "largest_layer", "packs")
    for name in lasting:
        assert getattr(quick, name) == getattr(exact, name), name
    assert quick.update(1, 64, 8, 64) == exact.update(1, 64, 8, 64)
    assert quick.scoring(1, 64, 8, 64) == exact.scoring(1, 64, 8, 64)
    assert quick.prefill([64, 64]) == exact.prefill([64, 64])


@pytest.mark.parametrize("options", [{}, {"lora": None, "dtype": "float32"}, {"packing": False}])
def test_chunks_of_the_head_that_are_left_out_change_nothing(options: dict[str, Any]) -> None:
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = AutoConfig.for_model("qwen3", **{**SMALL, **tiny, "vocab_size": 2**18, "tie_word_embeddings": False})
    some, every = Shadow(ModelSetting(config, **options)), Shadow(ModelSetting(config, **options))
    assert some.scorer.sizes_only
    every.scorer.sizes_only = False
    sizes = 1, 16, 2, 200  # seven chunks of 64 tokens, the last of them smaller
    assert some.update(*sizes) == every.update(*sizes)
    assert some.scoring(*sizes) == every.scoring(*sizes)


@pytest.mark.parametrize(
    "options",
    [
        {"lora": LoRA(target_modules=["layers.3.self_attn.q_proj"])},
        {"lora": LoRA(target_modules=["q_proj"], options={"layers_to_transform": [0, 5]})},
        {"config": {"mlp_only_layers": [0, 4], "num_experts": 4, "moe_intermediate_size": 64}},
    ],
)
def test_layers_that_are_not_alike_are_all_followed(options: dict[str, Any]) -> None:
    tiny = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 6}
    shape = options.pop("config", None)
    config = AutoConfig.for_model("qwen3_moe" if shape else "qwen3", **tiny, **(shape or {}))
    assert Shadow(ModelSetting(config, **options))._short is None
    assert Shadow(ModelSetting(AutoConfig.for_model("qwen3", **tiny)))._short is not None


@pytest.mark.slow
def test_the_targets_hold_by_the_estimate() -> None:
    """8B in 12 GB and 16 GB, 4B in 8 GB, 1.7B in 6 GB."""
    for case in cuda_cases(1):
        if case.target_gib is None:
            continue
        workload = Workload(
            setting(case.model), batch_size=1, max_prompt_tokens=case.prompt, max_new_tokens=case.response
        )
        found = estimate(workload)
        assert found.fits(case.target_gib), (case.name, found.card_bytes / GIB)


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B-Instruct", "google/gemma-3-1b-it"])
def test_logits_are_never_held_for_all_tokens(vocabulary: str) -> None:
    config = model_config(vocabulary)
    tokens, width = 8 * 512, config.vocab_size
    assert width in (151936, 128256, 262144)
    update = Shadow(ModelSetting(config, **QLORA)).update(1, 512, 8, 512)
    assert update.forward - update.kept < 4 * tokens * width / 4  # a quarter of the float32 logits would be more


@pytest.mark.slow
def test_reference_optimizer_and_offload_are_counted() -> None:
    base = Workload(setting(), batch_size=1)
    found = estimate(base)
    assert estimate(replace(base, model=setting(reference="synced"))).lasting["reference"] == found.lasting["adapters"]
    paged = estimate(replace(base, optimizer=optimizer_memory("bitsandbytes.optim.PagedAdamW8bit")))
    assert paged.lasting["optimizer"] == 0
    assert paged.host["optimizer"] < found.lasting["optimizer"] / 3
    assert estimate(replace(base, optimizer=optimizer_memory("torch.optim.SGD"))).lasting["optimizer"] == 0
    offload = estimate(replace(base, model=setting(activation_offload=True)))
    assert offload.host["activations"] > 1.2e9
    assert offload.peak_of("update") < found.peak_of("update") - 1.2e9
    half = estimate(replace(base, model=setting(lora=LoRA(dtype="bfloat16"))))
    assert half.lasting["adapters"] * 2 == found.lasting["adapters"]


def test_parameters_cut_over_four_ranks_are_counted() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 264}
    config = AutoConfig.for_model("qwen3", **sizes, tie_word_embeddings=False)
    block = 1024 + 1024 + 1024 + 6144 + 80  # queries; keys and values; output; MLP; norms
    rest = 2 * 264 * 32 + 32
    trained = 2 * block + rest
    full = Workload(ModelSetting(config, dtype="float32", lora=None), max_prompt_tokens=8, max_new_tokens=8)
    one, four = estimate(full), estimate(replace(full, ranks=4))
    assert one.lasting["gradients"] == 4 * trained
    assert four.lasting["gradients"] == trained
    assert four.lasting["optimizer"] == 2 * trained
    for name in ("base", "reference"):
        assert four.lasting[name] == -(-one.lasting[name] // 4)
        assert 0 <= one.lasting[name] - 4 * trained <= 64  # the frequencies of the positions
    assert four.phases["update"]["gathered blocks"] == 2 * (2 * block + rest)  # in bfloat16
    assert four.phases["update"]["gradients before they are averaged"] == 2 * (block + rest) + 4 * rest
    assert four.phases["rollout"]["gathered copy"] == (one.lasting["base"] + one.lasting["reference"]) // 2
    adapted = replace(full, model=replace(full.model, lora=LoRA(r=4), dtype="bfloat16"))
    one, four = estimate(adapted), estimate(replace(adapted, ranks=4))
    assert four.lasting["base"] == -(-one.lasting["base"] // 4)
    assert all(four.lasting[name] == one.lasting[name] for name in ("adapters", "gradients", "optimizer"))
    assert four.phases["update"]["gathered blocks"] == 2 * (2 * block + rest)
    assert four.phases["rollout"]["gathered copy"] == one.lasting["base"]


@pytest.mark.slow
def test_advice_comes_in_the_order_of_harm_and_is_needed() -> None:
    card = 4.0
    model = setting("Qwen/Qwen3-1.7B", quantization="none", gradient_checkpointing=False)
    workload = Workload(model, batch_size=4)
    chosen, after = to_fit(workload, card)
    assert after.fits(card)
    assert [change.key for change in chosen][-1] == "model.policy.quantization"
    assert not any("another experiment" in change.cost for change in chosen)
    for left_out in chosen:
        fewer = workload
        for change in chosen:
            fewer = fewer if change is left_out else change.apply(fewer)
        assert not estimate(fewer).fits(card), left_out
    costs = [change.cost for change in changes(workload)]
    harmless = [i for i, cost in enumerate(costs) if cost.startswith("the same results")]
    harmful = [i for i, cost in enumerate(costs) if cost.startswith("another experiment")]
    assert max(harmless) < min(harmful)


@pytest.mark.slow
def test_an_8b_model_fits_8_gib_at_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return estimate(*arguments)

    monkeypatch.setattr("maestro_pl.memory.advice.estimate", counted)
    workload = Workload(setting("Qwen/Qwen3-8B"), batch_size=2, eval_batch_size=16, eval_group_size=1)
    chosen, after = to_fit(workload, 8)
    assert after.fits(8)
    assert not any("another experiment" in change.cost for change in chosen), chosen
    given = {change.key: change.value for change in chosen}
    assert given["rollout.max_batch"] in (1, 2, 4)  # fewer than a group
    assert count < 40  # each takes most of a second


@pytest.mark.slow
def test_nothing_helps_a_model_that_is_too_large() -> None:
    chosen, after = to_fit(Workload(setting("Qwen/Qwen3-0.6B"), batch_size=1, group_size=4, max_new_tokens=128), 1)
    assert not after.fits(1)
    assert chosen


def preset(card: int) -> list[str]:
    """The options of the run that is meant for a card."""
    return [
        part for name in ("qlora", f"hardware/{card}gb") for part in ("--config", str(ROOT / f"configs/{name}.yaml"))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("card", [8, 12, 16, 24])
def test_a_preset_fits_its_card(card: int, capsys: pytest.CaptureFixture[str]) -> None:
    main(["estimate", *preset(card), "--card", str(card), "--json"])
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["fits"]
    assert found["card_bytes"] > 0.6 * card * GIB  # and makes use of it
    text = (ROOT / f"configs/hardware/{card}gb.yaml").read_text(encoding="utf-8")
    assert f"{found['card_bytes'] / GIB:.1f} GiB of {card}" in text


@pytest.mark.slow
def test_the_command_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    main(["estimate", *preset(24), "--card", "12GB"])
    said = capsys.readouterr().out
    assert "It does not fit a card of 12 GB. Change:" in said
    assert "model.micro_batch_tokens=" in said
    assert all(
        part in said for part in ("base", "adapters", "optimizer", "KV cache", "activations kept", "inside a layer")
    )
    main(["estimate", *preset(24), "--rollout.max_new_tokens", "256", "--card", "16", "--json"])
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["fits"]
    main(["estimate", "--help"])
    assert "--reserve" in capsys.readouterr().out


@pytest.mark.slow
def test_a_display_has_its_share_of_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    main(["estimate", *preset(8), "--card", "6", "--json"])
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["fits"]
    main(["estimate", *preset(8), "--card", "6"])
    assert "give --reserve 0.7" in capsys.readouterr().out
    main(["estimate", *preset(8), "--card", "6", "--reserve", "0.7", "--json"])
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert not found["fits"]
    assert found["fits_after"]
    assert found["card_bytes_after"] <= (6 - 0.7) * GIB


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--card", "big"], "expected memory in GiB"),
        (["--card", "0"], "expected memory in GiB"),
        (["--devices", "0"], "--devices 0: expected how many devices, a whole number from 1 on"),
        (["--devices", "some"], "--devices some: expected how many devices"),
        (["--trainer.devices", "[]"], "--devices []: expected how many devices"),
        (["--devices", "8", "--strategy", "foo"], "--strategy 'foo': expected auto, ddp or fsdp"),
        (["--devices", "8", "--strategy", "fsdpp"], "--strategy 'fsdpp' (did you mean fsdp?)"),
        (["--devices", "8", "--strategy", "fsdp"], "model.policy.quantization=nf4 cannot be combined"),
        (["--card", "8", "--reserve", "some"], "--reserve 'some': expected memory in GiB"),
        (["--card", "8", "--reserve", "8"], "leaves nothing of a card of 8 GiB"),
        (["--model.policy.model", "/nowhere"], "could not be read"),
        (["--rollout.group_sice", "4"], "group_size"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["estimate", *preset(8), *arguments])
    assert error.value.code == 2
    assert sentence in capsys.readouterr().err


# -- the probe
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i} " * (1 + i % 3), "task": "a"}) + "\n" for i in range(12)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"kl": KL(coef=0.1)}, {"weigher": EqualWeights()}])
def test_a_probe_leaves_nothing_behind(options: Any, tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    def trained(*callbacks: Any) -> tuple[Any, Any]:
        trainer = trainer_of(tmp_path, [*rewards(), *callbacks], max_steps=3, limit_val_batches=0)
        module = module_of(tiny_qwen3, **options)
        trainer.fit(module, data_of(prompts))
        return trainer, module

    trainer, plain = trained()
    probe = MemoryProbe("always")
    other_trainer, probed = trained(probe)
    assert set(probe.report) >= {"rollout", "update", "estimate"}
    assert ("scoring" in probe.report) == ("kl" in options)
    assert probe.report["update"] > probe.report["estimate"]["update"] * 0.5
    assert trainer.global_step == other_trainer.global_step == 3
    for (name, before), (_, after) in zip(plain.named_parameters(), probed.named_parameters(), strict=True):
        assert torch.equal(before, after), name
    assert plain.training_state().keys() == probed.training_state().keys()
    assert plain.policy_steps == probed.policy_steps


def test_a_resumed_run_is_probed_and_goes_on_alike(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    first = trainer_of(tmp_path, rewards(), max_steps=2, limit_val_batches=0)
    first.fit(module_of(tiny_qwen3), data_of(prompts))
    path = str(tmp_path / "two.ckpt")
    first.save_checkpoint(path)

    def resumed(*callbacks: Any) -> Any:
        module = module_of(tiny_qwen3)
        trainer_of(tmp_path, [*rewards(), *callbacks], max_steps=4, limit_val_batches=0).fit(
            module, data_of(prompts), ckpt_path=path
        )
        return module

    plain, probed = resumed(), resumed(MemoryProbe("always"))
    for (name, before), (_, after) in zip(plain.named_parameters(), probed.named_parameters(), strict=True):
        assert torch.equal(before, after), name


@pytest.mark.slow
def test_a_worst_step_that_does_not_fit_ends_the_run_at_once(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maestro_pl.policy.scoring import Scorer

    score = Scorer.score

    def scarce(scorer: Any, base: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not isinstance(next(base.parameters()), FakeTensor):  # the estimate may go on
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(scorer, base, *args, **kwargs)

    monkeypatch.setattr(Scorer, "score", scarce)
    trainer = trainer_of(tmp_path, [*rewards(), MemoryProbe("always")], max_steps=2, limit_val_batches=0)
    with pytest.raises(UserError, match=r"The worst step of this run .* does not fit into memory"):
        trainer.fit(module_of(tiny_qwen3), data_of(prompts))
    assert trainer.global_step == 0


@pytest.mark.slow
def test_a_probe_finds_pieces_that_fit_before_the_first_step(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maestro_pl.policy.scoring import Scorer

    score, passes = Scorer.score, []

    def scarce(scorer: Any, base: Any, given: Any, responses: Any, **kwargs: Any) -> Any:
        tokens = scorer.tokens(base, given, responses)
        if torch.is_grad_enabled() and tokens > 55:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        passes.append(tokens)
        return score(scorer, base, given, responses, **kwargs)

    monkeypatch.setattr(Scorer, "score", scarce)
    probe = MemoryProbe("always")
    module = module_of(tiny_qwen3, weigher=EqualWeights())
    with pytest.warns(UserWarning, match="micro_batch_tokens"):
        trainer_of(tmp_path, [*rewards(), probe], max_steps=1, limit_val_batches=0).fit(module, data_of(prompts))
    assert probe.report["micro_batch_tokens"] == module.micro_batch_tokens <= 55


def test_eight_bit_adamw_trains_and_resumes(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    def fit(max_steps: int, ckpt: str | None = None) -> tuple[Any, Any]:
        optimizer: Any = partial(bnb.optim.PagedAdamW8bit, lr=1e-2, min_8bit_size=16)
        module = module_of(tiny_qwen3, optimizer=optimizer)
        trainer = trainer_of(tmp_path, rewards(), max_steps=max_steps, limit_val_batches=0)
        trainer.fit(module, data_of(prompts), ckpt_path=ckpt)
        return trainer, module

    _, whole = fit(4)
    half, _ = fit(2)
    path = str(tmp_path / "eight.ckpt")
    half.save_checkpoint(path)
    trainer, resumed = fit(4, path)
    states = [t.dtype for s in trainer.optimizers[0].state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert torch.uint8 in states
    for (name, expected), (_, got) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(got, expected, atol=0, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "hf"])
def test_reading_long_prompts_is_estimated_for_either_engine(engine: Any) -> None:
    config = AutoConfig.for_model("qwen3", **SMALL)
    base = Workload(
        ModelSetting(config, **QLORA, device="cpu"),
        batch_size=2,
        group_size=4,
        max_prompt_tokens=700,
        max_new_tokens=16,
    )
    found = estimate(replace(base, native=engine == "native"))
    rows, native_rows = 2 * 4 * 700, 2 * 700
    reading = found.phases["rollout"].get("reading prompts", 0)
    width = SMALL["intermediate_size"] * 2  # bytes of one of the activations of a token inside a layer
    assert reading > (native_rows if engine == "native" else rows) * width
    assert ("scoring" in found.phases) == (engine == "hf")


@pytest.mark.slow
def test_evaluation_batches_count(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "estimate",
            *preset(12),
            "--data.eval_batch_size",
            "256",
            "--rollout.max_batch",
            "null",
            "--card",
            "12",
            "--json",
        ]
    )
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert sum(found["phases"]["validation"].values()) > 20 * GIB
    assert not found["fits"]
    assert any(change["key"] in ("data.eval_batch_size", "rollout.max_batch") for change in found["changes"])
    assert found["fits_after"]


def test_a_failed_estimate_never_ends_a_run(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import maestro_pl.memory.estimate as module

    def broken(*_: Any) -> Any:
        raise UserError("PEFT refused these LoRA settings.")

    monkeypatch.setattr(module, "estimate", broken)
    probe = MemoryProbe("always")
    trainer = trainer_of(tmp_path, [*rewards(), probe], max_steps=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match="No estimate of the memory could be made"):
        trainer.fit(module_of(tiny_qwen3), data_of(prompts))
    assert trainer.global_step == 1
    assert probe.report["update"] > 0


def test_positions_that_the_model_does_not_have_are_left_out(prompts: Path, tmp_path: Path) -> None:
    from tests.support import make_model

    folder = make_model("gpt2", tmp_path / "short", n_positions=64)
    probe = MemoryProbe("always")
    trainer = trainer_of(tmp_path, [*rewards(), probe], max_steps=1, limit_val_batches=0)
    trainer.fit(module_of(folder), data_of(prompts))
    assert probe.report["prompt_tokens"] + probe.report["response_tokens"] <= 64


def test_joint_runs_are_probed_with_whole_groups(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maestro_pl.policy.policy import LoRAPolicy

    score, rows = LoRAPolicy.token_statistics, []

    def seen(policy: Any, given: Any, responses: Any, **asked: Any) -> Any:
        if torch.is_grad_enabled():
            rows.append(len(responses))
        return score(policy, given, responses, **asked)

    monkeypatch.setattr(LoRAPolicy, "token_statistics", seen)
    module = module_of(tiny_qwen3, meta=Meta(coupling="joint"), micro_batch_tokens=24)
    trainer_of(tmp_path, [*rewards(), MemoryProbe("always")], max_steps=1, limit_val_batches=0).fit(
        module, data_of(prompts)
    )
    assert set(rows) == {4}


def test_cards_are_those_of_the_issue() -> None:
    assert CARDS == (8, 12, 16, 24, 48, 80)


def test_vllm_beside_the_trainer_is_counted_with_what_it_must_have() -> None:
    base = Workload(setting(), batch_size=4, group_size=8, max_prompt_tokens=512, max_new_tokens=512, native=False)
    asleep = estimate(replace(base, vllm_share=0.3))
    need = vllm_needs(asleep)
    assert need > asleep.lasting["base"]
    assert sum(asleep.phases["rollout"].values()) == need
    assert asleep.host["vLLM's base, asleep"] == asleep.lasting["base"]
    assert "scoring" in asleep.phases
    awake = estimate(replace(base, vllm_share=0.3, vllm_sleeps=False))
    assert awake.peak >= asleep.peak
    assert awake.peak_of("update") == asleep.peak_of("update") + need
    taken = estimate(replace(base, vllm_share=0.5, card_bytes=80 * GIB))
    assert vllm_needs(taken) == 40 * GIB  # its share, whatever it needs
    assert estimate(replace(base, elsewhere=True)).phases["rollout"] == {}


def test_the_engine_of_a_config_is_counted() -> None:
    assert _of_vllm("native") == {}
    assert _of_vllm("maestro_pl.VLLMServerEngine") == {"elsewhere": True}
    chosen = {"class_path": "maestro_pl.VLLMEngine", "init_args": {"memory_share": 0.4, "sleep": False}}
    assert _of_vllm(chosen) == {"vllm_share": 0.4, "vllm_sleeps": False}
