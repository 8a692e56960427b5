"""What a step costs on paper: tokens, operations and bytes of every stage, from counts, and the seconds that they bound.

    python -m benchmarks.cost                                    # the cases of docs/scale.md
    python -m benchmarks.cost --model Qwen/Qwen3-8B --card h100 --rank 16 --quantization nf4
    python -m benchmarks.cost --check benchmarks/results/roofline_*.json

A stage takes at least the longest of: its operations over the card's, its bytes over the memory's, what cards send each
other over the link's, and (decoding) the host's time to ask for its operations. Seconds are such bounds at the shares of
the data sheet that ``--shares`` gives (1 1: all of it), not forecasts. ``--check`` holds them against what
``python -m benchmarks.limit --roofline`` measured. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.workloads import finish, show_table

COMPUTE_BYTES = 2  # bfloat16: weights as they are multiplied, keys and values
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # codes, a byte a block of 64, a float for 256 of these
STEPPED_BYTES = 28  # of an AdamW in float32: read weight, gradient and two states, write weight and states
BACKWARD_OF_ATTENTION = 2.5  # five products for two of the forward
COPY_BELOW = 4096  # maestro_pl.generation.cache: prompt keys are copied to the rows below it


@dataclass(frozen=True)
class Shape:
    """A dense decoder with gated MLPs; norms and biases are not counted.

    Attributes:
        layers: L.
        hidden: d.
        heads: of queries.
        key_heads: of keys and values.
        head_size: of each.
        intermediate: width of the MLP.
        vocabulary: V.
        tied: embedding and output head are one matrix.
    """

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Sizes (in, out) of the linear maps of a layer."""
        queries, keys = self.heads * self.head_size, self.key_heads * self.head_size
        d, m = self.hidden, self.intermediate
        return [(d, queries), (d, keys), (d, keys), (queries, d), (d, m), (d, m), (m, d)]

    @property
    def body(self) -> int:
        """Weights of all layers."""
        return self.layers * sum(a * b for a, b in self.linears)

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """N: layers, head and embedding."""
        return self.body + self.head * (1 if self.tied else 2)

    @property
    def cached(self) -> int:
        """Numbers that a token leaves in the cache."""
        return 2 * self.layers * self.key_heads * self.head_size

    def adapters(self, rank: int) -> int:
        """Weights of LoRA adapters on all linear maps of the layers."""
        return self.layers * rank * sum(a + b for a, b in self.linears)

    def attention(self, pairs: float) -> float:
        """Operations of two products for so many pairs of query and key in every head and layer."""
        return 4 * self.layers * self.heads * self.head_size * pairs


def shape_of(config: Any) -> Shape:
    """The shape that a config of transformers describes."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.intermediate_size,
        config.vocab_size,
        bool(config.tie_word_embeddings),
    )


@dataclass(frozen=True)
class Card:
    """A card as its data sheet has it; bandwidths in bytes a second, of one direction.

    Attributes:
        name: of the card.
        flops: dense products in bfloat16 that are summed in float32.
        memory: its own.
        link: to the cards of its machine.
        network: to other machines, its share.
        launch: seconds in which the host asks for one operation; an assumption, not from a data sheet.
    """

    name: str
    flops: float
    memory: float
    link: float = math.inf
    network: float = math.inf
    launch: float = 0.0

    def at(self, compute: float, memory: float) -> Card:
        """With these shares of products and of all bandwidths."""
        bandwidths = {name: getattr(self, name) * memory for name in ("memory", "link", "network")}
        return replace(self, flops=self.flops * compute, **bandwidths)


HOST = 5e-6
CARDS = {
    # NVIDIA Ada GPU architecture (white paper): RTX 4090; PCIe 4 x16
    "rtx4090": Card("rtx4090", 165.2e12, 1008e9, 32e9, 1.25e9, HOST),
    # NVIDIA A100 80GB SXM data sheet; NVLink 600 GB/s both ways; DGX A100: one 200 Gb/s adapter a card
    "a100": Card("a100", 312e12, 2039e9, 300e9, 25e9, HOST),
    # NVIDIA H100 SXM data sheet; NVLink 900 GB/s both ways; DGX H100: one 400 Gb/s adapter a card
    "h100": Card("h100", 989.4e12, 3350e9, 450e9, 50e9, HOST),
}


@dataclass(frozen=True)
class Run:
    """One step, as one card sees it.

    Attributes:
        shape: of the model.
        prompts: N of this card.
        group: G.
        prompt_tokens: P.
        new_tokens: T, of every response.
        rank: of the adapters; None trains all parameters.
        quantized: the layers' weights lie in nf4 and are unpacked for every product.
        weight_bytes: of a weight that is not quantised, and of a cached number.
        scorings: passes over whole sequences without gradient (reference for a KL; policy where a server samples).
        checkpointing: the update's forward is computed twice.
        micro_batch_tokens: of a pass of the update.
        max_rows: decoded at once.
        cards: n that train together.
        per_machine: of these in one machine; full parameters are sharded over it.
        operations: asked for in one layer and decoded token (`operations` of ``benchmarks.limit --roofline``, over layers);
            0 leaves the host out.
    """

    shape: Shape
    prompts: int = 8
    group: int = 8
    prompt_tokens: int = 512
    new_tokens: int = 1024
    rank: int | None = 16
    quantized: bool = False
    weight_bytes: float = COMPUTE_BYTES
    scorings: int = 0
    checkpointing: bool = False
    micro_batch_tokens: int = 16384
    max_rows: int = 10**9
    cards: int = 1
    per_machine: int = 8
    operations: int = 0

    @property
    def rows(self) -> int:
        """Responses of a step."""
        return self.prompts * self.group

    @property
    def sampled(self) -> int:
        """Response tokens of a step."""
        return self.rows * self.new_tokens

    @property
    def tokens(self) -> int:
        """Tokens of the update: prompts once, and all responses."""
        return self.prompts * self.prompt_tokens + self.sampled

    @property
    def pairs(self) -> float:
        """Pairs of query and key in the update."""
        prompt, new = self.prompt_tokens, self.new_tokens
        return self.prompts * _triangle(prompt) + self.rows * (new * prompt + _triangle(new))

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return self.shape.parameters if self.rank is None else self.shape.adapters(self.rank)

    @property
    def adapters(self) -> int:
        """Weights of the adapters, 0 without any."""
        return 0 if self.rank is None else self.trained

    @property
    def weights_read(self) -> float:
        """Bytes of memory traffic to multiply by the layers' weights once; unpacked ones are written and read again."""
        each = NF4_BYTES + 2 * COMPUTE_BYTES if self.quantized else self.weight_bytes
        return self.shape.body * each + self.adapters * self.weight_bytes


@dataclass(frozen=True)
class Stage:
    """A stage of a step on one card.

    Attributes:
        name: of the stage.
        tokens: that pass through the layers.
        flops: operations of matrix products, an addition and a multiplication each.
        moved: bytes of weights, keys and values, and optimizer states that the memory moves.
        sent: bytes over the link between the cards of a machine.
        networked: bytes over the network.
        asked: operations that the host asks for, where it may be what all wait for.
    """

    name: str
    tokens: int
    flops: float
    moved: float
    sent: float = 0.0
    networked: float = 0.0
    asked: float = 0.0

    def bounds(self, card: Card) -> dict[str, float]:
        """Seconds that each part of the card needs."""
        return {
            "products": self.flops / card.flops,
            "memory": self.moved / card.memory,
            "link": self.sent / card.link,
            "network": self.networked / card.network,
            "host": self.asked * card.launch,
        }

    def seconds(self, card: Card) -> float:
        """The longest of the bounds: what can run beside it does."""
        return max(self.bounds(card).values())

    def limit(self, card: Card) -> str:
        """What the longest bound is of."""
        bounds = self.bounds(card)
        return max(bounds, key=lambda name: bounds[name])


def stages_of(run: Run) -> dict[str, Stage]:
    """Every stage of a step, from counts alone.

    Args:
        run: the step.

    Returns:
        By name: ``prompt``, ``decoding``, ``scoring``, ``forward``, ``backward``, ``optimizer``.
    """
    shape, adapters = run.shape, run.adapters
    head_read = shape.head * run.weight_bytes
    ring = (run.cards - 1) / run.cards
    inside = min(run.cards, run.per_machine)
    shard = (inside - 1) / inside if run.rank is None else 0.0  # of weights that lie on other cards of the machine
    gathered = shard * shape.parameters * COMPUTE_BYTES
    prompt_tokens = run.prompts * run.prompt_tokens
    prompt = Stage(
        "prompt",
        prompt_tokens,
        2 * (shape.body + adapters) * prompt_tokens
        + 2 * shape.head * run.prompts
        + shape.attention(run.prompts * _triangle(run.prompt_tokens)),
        run.weights_read + head_read,
        sent=gathered,
    )
    passes = math.ceil(run.tokens / run.micro_batch_tokens)
    layers = 2 * (shape.body + adapters) * run.tokens
    head = 2 * shape.head * run.sampled
    attention = shape.attention(run.pairs)
    read = passes * (run.weights_read + head_read)
    scored = run.scorings * (layers + attention + head)
    again = layers + attention if run.checkpointing else 0.0
    frozen = run.rank is not None
    # a frozen head's gradient comes with its forward; a trained one has its logits again, and a product for its weights
    forward = layers + attention + 2 * head
    backward = BACKWARD_OF_ATTENTION * attention + again
    backward += 2 * (shape.body + 2 * adapters) * run.tokens if frozen else 2 * layers + 2 * head
    gradients = run.trained * 4
    crossing = run.cards > run.per_machine
    machines = run.cards / inside
    all_reduced = 2 * ring * gradients if frozen else passes * (gathered + 2 * shard * shape.parameters * 2)
    networked = 2 * (machines - 1) / machines * gradients / (1 if frozen else inside) if crossing else 0.0
    return {
        stage.name: stage
        for stage in (
            prompt,
            _decoding(run, head_read),
            Stage(
                "scoring", run.scorings * run.tokens, scored, run.scorings * read, sent=run.scorings * passes * gathered
            ),
            Stage("forward", run.tokens, forward, read, sent=passes * gathered),
            Stage("backward", run.tokens, backward, read, sent=all_reduced, networked=networked),
            Stage("optimizer", 0, 0.0, run.trained * STEPPED_BYTES / (1 if frozen else inside)),
        )
    }


def _decoding(run: Run, head_read: float) -> Stage:
    """T - 1 steps of every wave of rows: the first token comes with the prompt."""
    shape, steps = run.shape, run.new_tokens - 1
    waves = math.ceil(run.rows / run.max_rows)
    own = run.new_tokens / 2  # tokens before one, on average
    copied = min(run.rows, run.max_rows) * run.prompt_tokens <= COPY_BELOW
    prompts = run.rows if copied else run.prompts
    cache = shape.cached * run.weight_bytes * (prompts * run.prompt_tokens + run.rows * own)
    token = 2 * (shape.body + run.adapters + shape.head) + shape.attention(run.prompt_tokens + own)
    return Stage(
        "decoding",
        run.rows * steps,
        run.rows * steps * token,
        steps * (waves * (run.weights_read + head_read) + cache),
        asked=steps * waves * shape.layers * run.operations,
    )


def _triangle(count: int) -> float:
    return count * (count + 1) / 2


# -- the cases of docs/scale.md --------------------------------------------------------------------------------------

NODES, SERVERS = 64, (8, 16, 32, 48)
JUDGE_SECONDS = 2.0  # of one call; an assumption


def cases(shape: Shape) -> dict[str, tuple[Run, str]]:
    """Runs and their cards; lengths and groups are those of configs/paper/run.yaml."""
    qlora = Run(shape, quantized=True, checkpointing=True)
    return {
        "QLoRA, 24 GB": (replace(qlora, prompts=2, micro_batch_tokens=4096, max_rows=16), "rtx4090"),
        "QLoRA, 80 GB": (qlora, "h100"),
        "LoRA in bfloat16, 80 GB": (Run(shape, checkpointing=True), "h100"),
        "all parameters, 8 x 80 GB": (
            Run(shape, rank=None, scorings=1, checkpointing=True, cards=8),
            "h100",
        ),
    }


def report(run: Run, card: Card) -> dict[str, Any]:
    """Stages of a run on a card, and of the whole step."""
    stages = stages_of(run)
    seconds = {name: stage.seconds(card) for name, stage in stages.items()}
    total = sum(seconds.values())
    return {
        "card": card.name,
        "run": {name: value for name, value in asdict(run).items() if name != "shape"},
        "seconds": total,
        "sampled_tokens_per_s": run.sampled * run.cards / total,
        "stages": {
            name: {
                "tokens": stage.tokens,
                "tflop": stage.flops / 1e12,
                "gb": stage.moved / 1e9,
                "sent_gb": (stage.sent + stage.networked) / 1e9,
                "seconds": seconds[name],
                "share": seconds[name] / total,
                "limit": stage.limit(card),
            }
            for name, stage in stages.items()
        },
        # Little's law: calls under way so that a judge of every response is through while the step's tokens are decoded
        "judge_calls_under_way": run.rows * run.cards * JUDGE_SECONDS / max(seconds["decoding"], 1e-9),
    }


def split(shape: Shape, card: Card, servers: int, prompts: int = 1024) -> dict[str, float]:
    """Seconds of a step of so many prompts on 64 machines of eight cards, ``servers`` of which only sample.

    A server card holds the whole model.
    """
    sampling, training = servers * 8, (NODES - servers) * 8
    server = Run(shape, prompts=math.ceil(prompts / sampling), rank=None)
    trainer = Run(
        shape, max(1, math.ceil(prompts / training)), rank=None, scorings=2, checkpointing=True, cards=training
    )
    sampled, trained = stages_of(server), stages_of(trainer)
    sample = sampled["prompt"].seconds(card) + sampled["decoding"].seconds(card)
    train = sum(trained[name].seconds(card) for name in ("scoring", "forward", "backward", "optimizer"))
    sync = shape.parameters * COMPUTE_BYTES / card.network  # every server card takes all weights in
    return {
        "sampling": sample,
        "training": train,
        "sync": sync,
        "in_turn": sample + train + sync,
        "side_by_side": max(sample, train) + sync,
        "tokens_per_s_in_turn": prompts * server.group * server.new_tokens / (sample + train + sync),
        "tokens_per_s_side_by_side": prompts * server.group * server.new_tokens / (max(sample, train) + sync),
        "judge_calls_under_way": prompts * server.group * JUDGE_SECONDS / sample,
    }


# -- against what was measured ---------------------------------------------------------------------------------------


def check(result: dict[str, Any]) -> dict[str, float]:
    """Measured over predicted seconds of each stage of a result of ``benchmarks.limit --roofline``."""
    card = Card("measured", result["peak_flops"]["median"], result["bandwidth"]["median"])
    run = Run(Shape(**result["shape"]), **result["run"])
    stages = stages_of(run)
    return {
        name: found["seconds"]["median"] / stages[name].seconds(card)
        for name, found in result["stages"].items()
        if name in stages and stages[name].seconds(card)
    }


def counted(result: dict[str, Any]) -> dict[str, float]:
    """Counted over predicted operations of the same stages: what the formulas leave out."""
    stages = stages_of(Run(Shape(**result["shape"]), **result["run"]))
    return {name: found["flops"] / stages[name].flops for name, found in result["stages"].items() if name in stages}


def main(args: Sequence[str] | None = None) -> None:
    """Compute and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-8B", help="published id or folder")
    parser.add_argument("--card", choices=list(CARDS), help="one run on this card, in place of the cases")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; 0 trains all parameters")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    for name, default in (("prompts", 8), ("group", 8), ("prompt-tokens", 512), ("new-tokens", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("cards", 1), ("scorings", 0), ("micro-batch-tokens", 16384), ("operations", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shares", type=float, nargs=2, default=[1.0, 1.0], help="reached of products, of bandwidths")
    parser.add_argument("--check", type=Path, nargs="+", help="results of benchmarks.limit --roofline")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(args)
    finish(_checked(options.check) if options.check else _computed(options), options.out)


def _checked(files: list[Path]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        seconds, flops = check(result), counted(result)
        found[result["workload"]] = {"seconds": seconds, "flops": flops}
        rows = [(name, f"{seconds[name]:.2f}", f"{flops[name]:.3f}") for name in seconds]
        show_table(f"{result['workload']}: measured over predicted", ("stage", "seconds", "operations"), rows)
    return found


def _computed(options: argparse.Namespace) -> dict[str, Any]:
    from maestro_pl.memory.workload import model_config

    shape = shape_of(model_config(options.model))
    chosen = cases(shape)
    if options.card:
        run = Run(
            shape,
            rank=options.rank or None,
            quantized=options.quantization == "nf4",
            checkpointing=True,
            **{
                name: getattr(options, name)
                for name in (
                    "prompts",
                    "group",
                    "prompt_tokens",
                    "new_tokens",
                    "cards",
                    "operations",
                    "scorings",
                    "micro_batch_tokens",
                )
            },
        )
        chosen = {options.card: (run, options.card)}
    found: dict[str, Any] = {"model": options.model, "parameters": shape.parameters, "shares": options.shares}
    for title, (run, card) in chosen.items():
        found[title] = report(run, CARDS[card].at(*options.shares))
        _show(title, found[title])
    if not options.card:
        card_64 = CARDS["h100"].at(*options.shares)
        found["64 machines"] = {servers: split(shape, card_64, servers) for servers in SERVERS}
        columns = ["servers", *next(iter(found["64 machines"].values()))]
        rows = [(servers, *(f"{v:.3g}" for v in row.values())) for servers, row in found["64 machines"].items()]
        show_table("64 machines of 8 x H100", columns, rows)
    return found


def _show(title: str, found: dict[str, Any]) -> None:
    rows = [
        (
            name,
            s["tokens"],
            *(f"{s[key]:.3g}" for key in ("tflop", "gb", "sent_gb", "seconds")),
            f"{s['share']:.0%}",
            s["limit"],
        )
        for name, s in found["stages"].items()
    ]
    columns = ("stage", "tokens", "TFLOP", "GB", "GB sent", "seconds", "share", "limit")
    show_table(f"{title}: {found['seconds']:.3g} s, {found['sampled_tokens_per_s']:.0f} tokens/s", columns, rows)


if __name__ == "__main__":
    main()
