"""Every YAML of configs/ is read as what it is, and whatever can be trained trains two steps of a tiny policy."""

from __future__ import annotations

import copy
import csv
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import callbacks
import maestro_pl
from callbacks.rewards.math import MathReward
from callbacks.run_report import RunReport
from callbacks.weights import WeightDistributionLogger
from maestro_pl.cli import main
from maestro_pl.cli.arguments import take
from maestro_pl.cli.estimate import parsed_config
from maestro_pl.cli.resolve import resolve_config
from maestro_pl.data import BENCHMARKS
from maestro_pl.evaluation.judge import load_prompts
from maestro_pl.evaluation.judge.prompts import prompt_for
from maestro_pl.experiment.grid import CONFIG_KEYS, Cell, read_grid
from maestro_pl.rewards.math import MathComparer
from tests.support import INSTRUCTION, KEY, PUBLISHED, Server, fake_vllm, make_model, write_nover, write_rows

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
BASE = "paper/webinstruct.yaml"  # what overlays, and lists of metrics without a cell, are laid over
AFTER = "../tiny.yaml"  # once more, behind a file that sets sizes itself
STEPS = 2

#: Smaller in every way, and laid over a config before what is tested, so that this has the last word.
TINY: dict[str, Any] = {
    "data": {"batch_size": 3, "eval_batch_size": 2, "eval_limit": 2, "show": False},
    "rollout": {"group_size": 4, "eval_group_size": 1, "max_new_tokens": 6},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "strategy": "auto",
        "precision": "32-true",
        "max_steps": STEPS,
        "limit_val_batches": 0,
        "val_check_interval": STEPS,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    },
}
VALIDATED = {"trainer": {"limit_val_batches": 1}}


def read(name: str) -> Any:
    return yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))


def beside(name: str, file: str) -> str:
    """The file that a config names, as a path from configs/."""
    if file.startswith("configs/"):
        return file.removeprefix("configs/")
    return os.path.relpath((CONFIGS / name).parent / file, CONFIGS)


def parts(name: str) -> list[str]:
    content = read(name)
    given = content.get("configs", []) if isinstance(content, dict) else []
    return [beside(name, file) for file in ([given] if isinstance(given, str) else given)]


def laid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested keys over others; a list is replaced."""
    return below | {
        key: laid(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }


def composed(name: str) -> dict[str, Any]:
    """The keys of a config and of its parts."""
    found: dict[str, Any] = {}
    for part in parts(name):
        found = laid(found, composed(part))
    return laid(found, {key: value for key, value in read(name).items() if key != "configs"})


def entries(name: str) -> list[dict[str, Any]]:
    """The callbacks of a list, those of the files among its entries in their place."""
    content = read(name)
    return [
        entry
        for item in (content if isinstance(content, list) else [content])
        for entry in (
            entries(beside(name, item))
            if _is_yaml(item)
            else [item if isinstance(item, dict) else {"class_path": item}]
        )
    ]


def kind(name: str, content: Any) -> str:
    """What a file is: by what is in it and by who names it, so that a new one of a known kind needs nothing here."""
    folder = name.split("/")[0]
    if isinstance(content, list) and folder in ("rewards", "metrics", "anchors"):
        return folder
    if isinstance(content, dict):
        if folder == "judge" and all(isinstance(entry, dict) and "prompt" in entry for entry in content.values()):
            return "prompts"
        if folder == "judge" and content.get("class_path") == "callbacks.JudgeReward":
            return "judge"
        if "axes" in content:
            return "grid"
        if {key.rstrip("+") for key in content} <= {*CONFIG_KEYS, "configs"}:
            if folder == "experiments" and name in LAYERS:
                return "layer"
            made = composed(name)
            trained = made.get("method") == "sft" or {"weigher", "policy"} <= set(made.get("model", {}))
            if trained and "sources" in made.get("data", {}):
                return "whole"
            return "part" if name in PARTS and folder != "hardware" else "overlay"
    raise AssertionError(f"configs/{name}: teach tests/configs/test_configs.py what this is")


def named_by(of_grids: bool) -> set[str]:
    """The files that grids name as ``config``, or that configs name as their parts."""
    found: set[str] = set()
    for name in FILES:
        content = read(name)
        if not isinstance(content, dict) or ("axes" in content) != of_grids:
            continue
        if of_grids:
            levels = [level for axis in content["axes"].values() if isinstance(axis, dict) for level in axis.values()]
            layers = [layer for layer in (content.get("common"), *levels) if isinstance(layer, dict)]
            listed = [layer.get("config") or [] for layer in layers]
            found |= {beside(name, file) for given in listed for file in ([given] if isinstance(given, str) else given)}
        else:
            found |= set(parts(name))
    return found


def _is_yaml(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".yaml")


LAYERS, PARTS = named_by(of_grids=True), named_by(of_grids=False)
KINDS = {name: kind(name, read(name)) for name in FILES}


def of(*kinds: str) -> list[str]:
    return [name for name in FILES if KINDS[name] in kinds]


def commands(name: str) -> list[str]:
    """The commands in the comment on top of a file."""
    text = "\n".join(lines(name)).replace("\\\n#", "")
    return [command.split(" #")[0] for command in re.findall(r"^#\s+maestro-pl (.+)$", text, re.MULTILINE)]


def lines(name: str) -> list[str]:
    return (CONFIGS / name).read_text(encoding="utf-8").splitlines()


# -- the copy of configs/ that can be run: nothing of it needs a hub, a GPU or a key
# -------------------------------------


def benchmark_rows(name: str, count: int = 24) -> list[dict[str, Any]]:
    """Rows of the published form, each with a question of its own."""
    rows = []
    for number in range(count):
        row = copy.deepcopy(PUBLISHED[name])
        if name == "opus_books":
            row["translation"] = {language: f"{text} {number}" for language, text in row["translation"].items()}
        else:
            asked = next(column for column in ("question", "title", "STORY", "scenario") if column in row)
            row[asked] = f"{row[asked]} {number}"
            row |= {"qid": str(number)} if "qid" in row else {}  # EmoBench is divided by it
        rows.append(row)
    return rows


class Workshop:
    """Runs the copy; a run is made once."""

    def __init__(self, folder: Path, server: Server, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.server, self.patch = folder, server, patch
        self.made: dict[tuple[str, ...], Path] = {}
        self.models: dict[str, str] = {}
        self.comparers: dict[tuple[float, int], MathComparer] = {}
        self.servers: list[fake_vllm.FakeVLLMServer] = []
        for name in FILES:
            self.write(f"configs/{name}", self.runnable(read(name)))
        for name, changes in (("tiny.yaml", TINY), ("validated.yaml", VALIDATED)):
            self.write(name, changes)

    def write(self, name: str, content: Any) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return str(path)

    def runnable(self, content: Any, key: str = "") -> Any:
        """The same content with models, data and judges that are here; everything else stays."""
        if isinstance(content, list):
            if key == "sources":
                return [self.source(source) for source in content]
            return [self.runnable(item) for item in content]
        if not isinstance(content, dict):
            return self.source(content) if key == "sources" else content
        content = {name: self.runnable(value, name) for name, value in content.items()}
        if key == "policy" and "model" in content:
            content["model"] = self.model(content["model"])
        options = content.get("init_args", {})
        if content.get("class_path") == "callbacks.PreferenceReward" and "model" in options:
            content["init_args"] = options | {"model": "sandbox"}
        if content.get("class_path") == "callbacks.JudgeReward":
            here = {"endpoint": self.server.url, "cache": str(self.folder / "judged.sqlite"), "backoff_s": 0.01}
            content["init_args"] = options | here
            self.patch.setenv(options.get("api_key_env", "OPENAI_API_KEY"), KEY)
        if content.get("class_path") == "maestro_pl.VLLMEngine":
            fake_vllm.install(self.patch)
        if content.get("class_path") == "maestro_pl.VLLMServerEngine":
            content["init_args"] = options | {"urls": [self.vllm_server().url]}
        return content

    def vllm_server(self) -> fake_vllm.FakeVLLMServer:
        """A server with the model of the config that overlays are laid over."""
        if not self.servers:
            made = fake_vllm.FakeVLLMServer(self.model(composed(BASE)["model"]["policy"]["model"]))
            made.max_model_len = 10_000
            self.servers.append(made)
        return self.servers[0]

    def model(self, name: str) -> str:
        """A tiny model of the same architecture; its layers are wide enough for 4 bits."""
        if name == "sandbox":
            return name
        architectures = {"Qwen/Qwen3": "qwen3", "meta-llama/Llama-3": "llama", "HuggingFaceTB/SmolLM2": "llama"}
        made = next((made for start, made in architectures.items() if name.startswith(start)), None)
        assert made, f"the model {name}: teach tests/configs/test_configs.py which architecture it has"
        if made not in self.models:
            wide = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 2048}
            self.models[made] = str(make_model(made, self.folder / made, **wide))
        return self.models[made]

    def source(self, source: Any) -> Any:
        """The same source with a file of a few rows; its other options stay."""
        if isinstance(source, dict) and isinstance(source["path"], str):
            name, settings = source["path"], source
        else:
            assert isinstance(source, str), (
                f"data.sources {source}: teach tests/configs/test_configs.py where its rows are"
            )
            name, settings = source, {"path": source}
        if name in BENCHMARKS:
            file = self.folder / f"{name}.jsonl"
            write_rows(file, *benchmark_rows(name))
            return settings | {"options": {**settings.get("options", {}), "file": str(file)}}
        if name == "sandbox":
            return source
        return settings | {"path": self.data_file(name)}

    def data_file(self, name: str) -> str:
        """A file that a config names under ``data.root``, in its published schema or NOVER's form."""
        splits = itertools.cycle(("train", "validation", "test"))
        asked = "Translate the following text from English to French:\n\nYes "
        makers: dict[str, Callable[[Path], str]] = {
            "ssgen/dev.jsonl": lambda path: write_rows(path, *benchmark_rows("ss_gen")),
            "gsm8k/train.jsonl": lambda path: write_rows(path, *benchmark_rows("gsm8k")),
            "nover/opus_books_all_pairs.csv": lambda path: write_nover(
                path, *((f"{asked}{i}{INSTRUCTION}", f"Oui {i}", next(splits)) for i in range(12))
            ),
            "tasks.jsonl": lambda path: write_rows(
                path,
                *(
                    {"task": "ab"[i % 2], "prompt": f"Say {i}", "reference": f"{i}", "split": next(splits)}
                    for i in range(12)
                ),
            ),
            "nover/emobench.csv": lambda path: write_nover(
                path, *((f"Is {i} sad?{INSTRUCTION}", "A: yes", "train") for i in range(12))
            ),
        }
        makers["prompts.jsonl"] = lambda path: write_rows(
            path, *({"question": f"{i}?", "answer": f"{i}"} for i in range(12))
        )
        assert name in makers, f"the data file {name}: teach tests/configs/test_configs.py its schema"
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        return makers[name](path)

    def fit(self, *configs: str) -> Path:
        """The folder of a run of two steps; ``tiny.yaml`` goes behind the first config."""
        if configs not in self.made:
            before = set(self.folder.glob("runs/*/version_*"))
            given = [configs[0], "../tiny.yaml", *configs[1:]]
            named = [part for name in given for part in ("--config", str(self.folder / "configs" / name))]
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.folder)
                Path("labels.db").touch()  # of people who have said nothing yet: conductor/people.yaml
                patch.setenv("MAESTRO_DEBUG", "1")  # the error itself and not its status
                patch.setattr(WeightDistributionLogger, "_draw", lambda *_: None)  # a third of so short a run
                patch.setattr(RunReport, "_write", lambda *_: None)  # a sixth, and nobody reads the page
                patch.setattr("callbacks.rewards.math.MathComparer", self.comparer)
                patch.setattr(MathReward, "close", lambda _: None)
                main(["fit", *named])
            (self.made[configs],) = set(self.folder.glob("runs/*/version_*")) - before
        return self.made[configs]

    def evaluated(self, name: str, *below: str, **changes: Any) -> tuple[str, ...]:
        """What ``fit`` takes for a run over these configs that is validated once, with keys of its own."""
        return (*below, self.write(f"with/{name}", changes | VALIDATED))

    def comparer(self, seconds: float, megabytes: int) -> MathComparer:
        """One for all runs: its process imports sympy for longer than two steps take."""
        return self.comparers.setdefault((seconds, megabytes), MathComparer(seconds, megabytes))

    def config(self, *configs: str) -> dict[str, Any]:
        """The whole config of a run, as the run has saved it: the parser's defaults are in it."""
        found: dict[str, Any] = yaml.safe_load((self.fit(*configs) / "config.yaml").read_text(encoding="utf-8"))
        return found


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    server = Server()
    server.answer = lambda body, number: (
        "Score: 7" if "Score:" in body["messages"][-1]["content"] else "Verdict: correct"
    )
    with pytest.MonkeyPatch.context() as patch:
        made = Workshop(tmp_path_factory.mktemp("configs"), server, patch)
        yield made
    for each in (server, *made.servers, *made.comparers.values()):
        each.close()


def run_looked_at(test: str, given: Mapping[str, Any]) -> str | None:
    """Which run of the workshop a test looks at: of two workers, the one that has made it (tests/conftest.py)."""
    if test == "test_a_cell_has_the_published_values" and given["backbone"] == "qwen3_8b":
        return f"paper/{given['benchmark']}.yaml"
    trained = ["test_a_whole_config_trains", "test_an_overlay_trains", "test_an_overlay_changes_what_it_names"]
    trained += ["test_metrics_evaluate"] * given.get("name", "").startswith("paper/")
    return str(given["name"]) if test in trained else None


def steps_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("train/loss")]


def logged(run: Path) -> set[str]:
    with (run / "metrics.csv").open(newline="") as file:
        return {key for row in csv.DictReader(file) for key, value in row.items() if value}


def assert_trained(run: Path) -> None:
    steps = steps_of(run)
    assert len(steps) == STEPS
    assert all(math.isfinite(float(row["train/loss"])) for row in steps)


# -- every file
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", of("whole"))
def test_a_whole_config_trains(name: str, shop: Workshop) -> None:
    # the run of a cell whose metrics are tried too, save of the one that overlays are compared with
    cell = name.startswith("paper/") and Path(name).stem in PAPERS and name != BASE
    assert_trained(shop.fit(*(shop.evaluated(name, name) if cell else [name])))


@pytest.mark.slow
@pytest.mark.parametrize("name", of("overlay"))
def test_an_overlay_trains(name: str, shop: Workshop) -> None:
    given = composed(name)
    sized = "max_new_tokens" in given.get("rollout", {}) or "devices" in given.get("trainer", {})
    adapters = ["hardware/lora.yaml"] * name.startswith("engines/")  # the cells train all parameters
    assert_trained(shop.fit(BASE, *adapters, name, *[AFTER] * sized))


@pytest.mark.slow
@pytest.mark.parametrize("name", of("rewards"))
def test_a_list_of_rewards_trains(name: str, shop: Workshop) -> None:
    longer = shop.write("longer.yaml", {"rollout": {"max_new_tokens": 32}})  # the sandbox's policy closes its tags
    without = {key: value for key, value in shop.runnable(read("quickstart.yaml")).items() if key != "rewards"}
    rewards = {"rewards": str(shop.folder / "configs" / name)}
    run = shop.fit(shop.write("quickstart.yaml", without), longer, shop.write(f"with/{name}", rewards))
    assert_trained(run)
    keys = logged(run)  # the warm-up's rows too: anchors score no group of these steps
    anchors = len(read("quickstart.yaml")["anchors"])  # which another set of rewards leaves alone
    assert len([key for key in keys if re.fullmatch(r"reward/\w+_std", key)]) == len(entries(name)) + anchors


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*of("metrics"), *(f"{folder}/{b}.yaml" for folder in ("data", "paper") for b in BENCHMARKS)]
)
def test_metrics_evaluate(name: str, shop: Workshop) -> None:
    stem, folder = Path(name).stem, name.split("/")[0]
    if folder == "metrics":
        tasks = sorted({task for given in entries(name) for task in given.get("init_args", {}).get("tasks", [])})
        assert tasks or stem == "sandbox", f"configs/{name}: teach tests/configs/test_configs.py which data it is for"
        data: dict[str, Any] = {"sources": [shop.source(task) for task in tasks or ["sandbox"]]}
        of_all = {"batch_size": 60} if tasks else {}  # of every task in a step
        evaluated = {"metrics": str(shop.folder / "configs" / name), "data": data | of_all} | VALIDATED
        configs, stages = (BASE, shop.write(f"with/{name}", evaluated)), [""] if tasks else ["", "val/"]
    elif folder == "paper" and stem not in PAPERS:
        return  # GSM8K is not one of the paper's
    else:
        metrics = {"metrics": shop.runnable(read(name)["metrics"])} if folder == "data" else {}
        cell = (f"paper/{stem}.yaml",) if stem in PAPERS else (BASE, name)
        configs = shop.evaluated(name, *cell, **metrics)
        stages = ["", "val/"] if BENCHMARKS[stem].card.sizes.validation else [""]
    run, evaluated_by = shop.fit(*configs), shop.config(*configs)["metrics"]
    assert_trained(run)
    assert any(given["class_path"] == "callbacks.JudgeReward" for given in evaluated_by) == (folder == "paper")
    scored = logged(run)
    for given, stage in itertools.product(evaluated_by, stages):
        kind_of = getattr(callbacks, given["class_path"].removeprefix("callbacks."))
        key = f"{stage}reward/{given.get('init_args', {}).get('name') or kind_of.default_name}"
        # its own further numbers are there even where it applies to no row (a reference that is no mathematics)
        assert any(found == key or found.startswith(f"{key}/") for found in scored), key


@pytest.mark.parametrize("name", of("prompts"))
def test_a_file_of_judge_prompts_is_read(name: str) -> None:
    prompts = load_prompts(str(CONFIGS / name))
    assert all(prompt_for(prompts, task) for task in BENCHMARKS)
    if name == "judge/paper.yaml":  # a prompt of its own for each
        assert set(BENCHMARKS) - set(prompts) == set()


# -- what the configs say
# ------------------------------------------------------------------------------------------------

PAPERS = ["natural_reasoning", "ss_gen", "webinstruct", "tombench", "general_thoughts", "opus_books", "emobench"]
BACKBONES = {"qwen3_8b": "Qwen/Qwen3-8B", "llama31_8b": "meta-llama/Llama-3.1-8B-Instruct"}
CELLS = list(itertools.product(PAPERS, BACKBONES))
RANDOM, EQUAL, FIXED = (f"maestro_pl.{name}Weights" for name in ("Random", "Equal", "Fixed"))

#: What the baselines and ablations change, and nothing else. ``weigher`` stands for its class and all its arguments.
CLAIMS: dict[str, dict[str, Any]] = {
    "ablations/joint": {"model.meta.coupling": "joint", "model.updates_per_rollout": 2},
    "ablations/layer_first": {"model.weigher.layer": "first"},
    "ablations/layer_middle": {"model.weigher.layer": "middle"},
    "ablations/mlp_1024": {"model.weigher.hidden_sizes": [1024]},
    "ablations/mlp_64": {"model.weigher.hidden_sizes": [64]},
    "ablations/no_context": {"model.weigher.reads": "nothing"},
    "ablations/no_entropy": {"model.meta.signal.entropy_coef": 0.0},
    "ablations/pairwise": {"model.meta.signal.pairwise_coef": 1.0},
    "ablations/pool_mean": {"model.weigher.pool": "mean"},
    "ablations/shuffled": {"model.weigher.reads": "shuffled"},
    "baselines/em": {"model.weigher": EQUAL, "rewards": ["EntropyReward"]},
    "baselines/eq": {"model.weigher": EQUAL},
    "baselines/rand": {"model.weigher": RANDOM},
    "baselines/judge": {"model.weigher": EQUAL, "rewards": ["FormatReward", "JudgeReward"]},
    "baselines/only_entropy": {"model.weigher": FIXED},
    "baselines/only_format": {"model.weigher": FIXED},
    "baselines/only_length": {"model.weigher": FIXED},
    "baselines/only_perplexity": {"model.weigher": FIXED},
    "baselines/only_preference": {"model.weigher": FIXED},
}


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys with their values, ``init_args`` left out; a list is one value."""
    if not isinstance(content, Mapping) or not content:
        return {prefix: content}
    return {
        key: value
        for name, part in content.items()
        for key, value in flat(part, ".".join(filter(None, (prefix, str(name).replace("init_args", ""))))).items()
    }


def brief(key: str, value: Any) -> Any:
    """A list of callbacks by their classes."""
    lists = ("rewards", "anchors", "metrics")
    return [item["class_path"].split(".")[-1] for item in value] if key in lists else value


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The leaves that differ; where the class changes, the class instead of its arguments."""
    one, two = flat(before), flat(after)
    found = {key: two.get(key) for key in one.keys() | two.keys() if one.get(key) != two.get(key)}
    news = [(key.removesuffix(".class_path"), two[key]) for key in found if key.endswith(".class_path")]
    news += [(key, "given") for key in found if key not in two]  # null before, keys of its own now
    for owner, value in news:
        if value == "given" and not any(key.startswith(f"{owner}.") for key in two):
            continue
        found = {key: old for key, old in found.items() if not key.startswith(f"{owner}.")} | {owner: value}
    return {key: brief(key, value) for key, value in found.items() if not key.startswith("trainer.logger")}


def test_an_unknown_kind_of_file_is_noticed() -> None:
    for content in ({"temperature": 1}, ["a"], {"model": {}, "sweep": {}}):
        with pytest.raises(AssertionError, match="teach tests"):
            kind("sweeps/new.yaml", content)


@pytest.mark.slow
@pytest.mark.parametrize(("benchmark", "backbone"), CELLS)
def test_a_cell_has_the_published_values(benchmark: str, backbone: str, shop: Workshop) -> None:
    name, given = f"paper/{benchmark}.yaml", [] if backbone == "qwen3_8b" else [f"models/{backbone}.yaml"]
    written = laid(composed(name), composed(given[0]) if given else {})
    assert written["model"]["policy"]["model"] == BACKBONES[backbone]
    config = shop.config(*([name, *given] if given or name == BASE else shop.evaluated(name, name)))
    model, stories = config["model"], benchmark == "ss_gen"
    assert model["meta"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert model["meta"]["optimizer"]["init_args"]["lr"] == 5e-5
    assert model["meta"]["every"] == (6 if stories else 3)
    assert model["meta"]["signal"]["class_path"] == "maestro_pl.AdvantageSignal"
    assert model["meta"]["signal"]["init_args"]["entropy_coef"] == 1e-3
    conductor = model["weigher"]["init_args"]
    assert model["weigher"]["class_path"] == "maestro_pl.Conductor"
    assert (conductor["tau"], conductor["min_probability"], conductor["layer"]) == (1.0, 1e-4, "last")
    assert conductor["hidden_sizes"] in (None, [])
    policy = model["policy"].get("init_args", model["policy"])
    assert (policy["lora"], policy["reference"], policy["sync_every"]) == (None, "synced", 12 if stories else 6)
    assert (model["kl"]["place"], model["meta"]["coupling"]) == ("reward", "async")
    trained = [item for item in config["rewards"] if item["init_args"]["role"] == "train"]
    assert brief("rewards", trained) == [
        f"{r}Reward" for r in ("Perplexity", "Format", "Entropy", "Length", "Preference")
    ]
    ranked = [item["init_args"]["normalize"] == "rank" for item in trained]
    assert ranked == [True, False, True, False, False]
    assert trained[2]["init_args"]["direction"] == ("maximize" if stories else "minimize")
    # a budget that responses can go past: else the reward is 0 everywhere, and K is 4
    assert trained[3]["init_args"]["max"] < read("paper/run.yaml")["rollout"]["max_new_tokens"]
    (judge,) = [item["init_args"] for item in config["metrics"] if item["class_path"] == "callbacks.JudgeReward"]
    gemini = benchmark in ("ss_gen", "opus_books")
    assert judge["model"].startswith("gemini-2.5-flash" if gemini else "Qwen/Qwen3-235B")
    assert judge["votes"] == 3
    assert config["data"]["sources"][0]["path"] == benchmark


def test_tau_is_learned() -> None:
    conductor = maestro_pl.Conductor(tau=1.0)
    conductor.build(4, ["a", "b"])
    assert conductor.tau.item() == pytest.approx(1.0)
    assert any(parameter.requires_grad and "tau" in name for name, parameter in conductor.named_parameters())


def test_presets_of_qwen3_decide_whether_it_thinks() -> None:
    """Its template lets it think where nothing is said, for thousands of tokens."""
    named = [name for name in FILES if "Qwen/Qwen3-" in (CONFIGS / name).read_text(encoding="utf-8")]
    policies = [name for name in named if isinstance(read(name), dict) and "policy" in read(name).get("model", {})]
    assert {"models/qwen3_4b.yaml", "models/qwen3_8b.yaml"} <= set(policies)
    for name in policies:
        assert read(name)["data"]["chat_template_kwargs"]["enable_thinking"] is False
        assert "# ours: " in (CONFIGS / name).read_text(encoding="utf-8")


SOURCED = ("conductor/", "data/", "hardware/", "models/", "judge/", "qlora", "paper/", "rewards/paper")
CLAIMED = ("paper/ablations/", "paper/baselines/")  # whose values are CLAIMS
CHANGES = [name for name in of("overlay") if name.startswith((*CLAIMED, "hardware/lora", "hardware/4bit"))]


@pytest.mark.parametrize(
    "name",
    [name for name in FILES if name.startswith(SOURCED) and not name.startswith(CLAIMED) and name not in of("prompts")],
)
def test_every_value_says_where_it_comes_from(name: str) -> None:
    silent = [
        line
        for line in lines(name)
        if re.match(r"\s*\w+\+?: *[^#\s]", line)
        and not re.match(r"configs:|rewards: \S+\.yaml|anchors: \S+\.yaml|method:|.*: [>|]-? # NOVER", line)
        and not re.search(r"# ?(paper|NOVER|ours|EM-RL)\b", line)
    ]
    assert silent == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_an_overlay_changes_what_it_names(name: str, shop: Workshop) -> None:
    found = changes(shop.config(BASE), shop.config(BASE, name))
    named = flat(composed(name))
    after = flat(shop.config(BASE, name))
    assert found
    absent = {
        leaf for leaf, value in flat(shop.config(BASE)).items() if value is None
    }  # lora: null, of which a part is given
    for key in found:
        if any(key.startswith(f"{leaf}.") and any(given.startswith(f"{leaf}.") for given in named) for leaf in absent):
            continue
        assert any(key == leaf or leaf.startswith(f"{key}.") or key.startswith(f"{leaf}.") for leaf in named), key
    for key, value in named.items():
        given = after[f"{key}.class_path"] if f"{key}.class_path" in after else after.get(key)
        assert given == value or _is_yaml(value), key
    claim = CLAIMS.get(name.removeprefix("paper/").removesuffix(".yaml"))
    assert claim in (None, found)


def test_a_single_reward_has_all_the_weight() -> None:
    for name in of("overlay"):
        if "only_" in name:
            weights = read(name)["model"]["weigher"]["init_args"]["weights"]
            asked = Path(name).stem.removeprefix("only_")
            assert weights == {reward: int(reward == asked) for reward in weights}
            assert set(weights) == {"perplexity", "format", "entropy", "length", "preference"}


@pytest.mark.slow
def test_the_judge_is_asked_from_any_folder(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAESTRO_DEBUG", "1")
    asked = len(shop.server.bodies)
    given = ("paper/emobench.yaml", "../tiny.yaml")
    main(["test", *(part for name in given for part in ("--config", str(shop.folder / "configs" / name)))])
    assert len(shop.server.bodies) > asked
    (table,) = tmp_path.glob("runs/*/*/test_metrics.csv")
    assert "judge" in table.read_text()


# -- grids
# ---------------------------------------------------------------------------------------------------------------


def covering(cells: tuple[Cell, ...]) -> list[Cell]:
    """Cells in which every level of every axis stands at least once: a layer says the same in every cell."""
    left, chosen = {level for cell in cells for level in cell.levels.items()}, []
    while left:
        chosen.append(max(cells, key=lambda cell: len(left & set(cell.levels.items()))))
        left -= set(chosen[-1].levels.items())
    return chosen


GRIDS = {name: read_grid(CONFIGS / name) for name in of("grid")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cell"),
    [pytest.param(name, cell, id=f"{name}-{cell.name}") for name in GRIDS for cell in covering(GRIDS[name].cells)],
)
def test_a_cell_of_a_grid_is_resolved(name: str, cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(resolve_config(cell))
    assert config["seed_everything"] == int(cell.levels.get("seed", 0))
    assert config["data"]["sources"]


def test_layers_belong_to_a_grid() -> None:
    assert set(of("layer", "grid")) == {name for name in FILES if name.startswith("experiments/")}


# -- the commands, and who names what
# ------------------------------------------------------------------------------------------------------

ROOT = CONFIGS.parent
COMPOSED = {  # what a reader starts from; the others are in the comments of the files themselves
    "quickstart": "fit --config configs/quickstart.yaml",
    "own of parts": "fit --config configs/models/qwen3_8b.yaml --config configs/data/gsm8k.yaml "
    "--config configs/conductor/anchored.yaml --config configs/hardware/12gb.yaml --rewards configs/rewards/reasoning.yaml",
    "ablation": "fit --config configs/paper/natural_reasoning.yaml --config configs/paper/ablations/joint.yaml",
    "without the judge": "test --config configs/paper/ss_gen.yaml --config configs/data/ss_gen.yaml",
}
IN_FILES = {command: name for name in FILES for command in commands(name)}


def test_there_is_a_command_for_each_card_a_cell_and_a_table() -> None:
    text = " ".join(IN_FILES)
    for named in (*(f"hardware/{card}gb" for card in (8, 12, 16, 24)), "paper/ss_gen", "experiments/paper_table1"):
        assert f"configs/{named}.yaml" in text, named


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMPOSED.values(), *(c for c in IN_FILES if not c.startswith("compare"))])
def test_a_shown_command_is_parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder of the checkout, as a reader gives it."""
    monkeypatch.chdir(ROOT)
    words = re.sub(r"FOLDER\w*", str(ROOT), command).split()
    if words[0] == "experiment":
        assert read_grid(Path(words[1])).cells
        return
    _, arguments = take(words[1:], ("--card",))
    config = parsed_config(arguments)
    assert config["data"]["sources"]
    assert config["method"] == "sft" or config["rewards"]


def test_every_config_is_named_by_a_page_a_test_or_another_config() -> None:
    found = {
        beside(name, file)
        for name in FILES
        for file in re.findall(r"[\w./]+\.yaml", "\n".join(lines(name)))
        if beside(name, file) != name
    }
    folders = ("docs", "tests", "benchmarks")
    pages = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages if path.suffix in (".md", ".py"))
    shown = {name for name in FILES if name.removesuffix(".yaml") in text or f"`{Path(name).name}`" in text}
    claimed = {f"paper/{name}.yaml" for name in CLAIMS}
    assert set(FILES) - found - shown - claimed == set()
