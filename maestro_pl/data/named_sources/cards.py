"""What is known about a benchmark besides its rows: where it comes from, its licence, its sizes, how it is scored."""

from __future__ import annotations

from dataclasses import dataclass

from maestro_pl.data.splits import Split


@dataclass(frozen=True)
class Sizes:
    """Rows of each split."""

    train: int
    validation: int
    test: int

    def of(self, split: Split) -> int:
        """The rows of one split."""
        return int(getattr(self, split))


@dataclass(frozen=True)
class BenchmarkCard:
    """The data card of a benchmark.

    Attributes:
        name: the name under ``data.sources``, and the task of its rows.
        title: the name its authors gave it.
        origin: where it is published.
        hub_id: what ``datasets.load_dataset`` loads where no file is given, None if it is published as files only.
        hub_config: the configuration of the hub id, None if it has none.
        licence: under which terms its authors publish it.
        schema: the published columns.
        sizes: rows of each split in the paper (arXiv 2601.07208) and in NOVER (arXiv 2505.16022).
        template: the default prompt template, over the published columns and those that the source adds.
        metric: what is reported.
        judge: who judges in the paper.
        caveats: what a user should know.
        evaluation_only: its authors ask that nobody train on it.
    """

    name: str
    title: str
    origin: str
    licence: str
    schema: str
    sizes: Sizes
    template: str
    metric: str
    judge: str
    caveats: tuple[str, ...] = ()
    hub_id: str | None = None
    hub_config: str | None = None
    evaluation_only: bool = False

    def markdown(self) -> str:
        """The card as a section of ``docs/benchmarks.md``."""
        hub = "none that is certain: give its files" if self.hub_id is None else f"`{self.hub_id}`"
        if self.hub_config:
            hub += f", configuration `{self.hub_config}` (`name` of the source chooses another)"
        sizes = f"{self.sizes.train} train, {self.sizes.validation} validation, {self.sizes.test} test"
        template = self.template.replace("\n", "\\n")
        lines = [
            f"### {self.name}",
            "",
            f"{self.title}, {self.origin}",
            "",
            f"- Hub: {hub}",
            f"- Licence: {self.licence}",
            f"- Published columns: {self.schema}",
            f"- Splits: {sizes}",
            f"- Prompt: `{template}`",
            f"- Metric: {self.metric}",
            f"- Judge: {self.judge}",
        ]
        return "\n".join(lines + [f"- Note: {caveat}" for caveat in self.caveats]) + "\n"
