"""The recorded responses of a run: an index of what is filtered and sorted by, and the records themselves by page.

The JSON lines stay the only record. The index holds a row a response (numbers, task, prompt, where its line lies), is
made by pyarrow from the lines and, of large files, kept beside them as Parquet so that the next start reads it.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj
import pyarrow.parquet as pq

from maestro_pl.errors import UserError

Sorting: TypeAlias = Literal["step", "disputed", "best", "worst", "spread"]
Only: TypeAlias = Literal["all", "dead", "truncated"]
STAGES = {"rollouts": "training", "samples_val": "validation", "samples_test": "test", "predictions": "predictions"}
KEPT_FROM = 4_000_000  # bytes of JSON lines, from which the index is worth a file
EDGE = 65_536  # bytes at either end of what an index covers, by which a file is known again
BLOCK = 1 << 24  # bytes of JSON that pyarrow parses at once; no line is longer
VERSION = "1"


@dataclass(frozen=True)
class Wanted:
    """Which groups, and in which order.

    Attributes:
        task: only this one; empty: all.
        first, last: steps, both included.
        only: ``dead`` groups (every advantage 0) or those with a ``truncated`` response.
        by: the reward that ``low``, ``high``, ``best`` and ``worst`` are about; ``reward`` is the scalar one, of which
            ``best`` and ``worst`` take the standing.
        low, high: at least one response of the group is in this range.
        text: stands in the prompt or a response, small and capital letters alike.
        sort: ``disputed`` puts groups first whose rewards disagree most.
    """

    task: str = ""
    first: int | None = None
    last: int | None = None
    only: Only = "all"
    by: str = "reward"
    low: float | None = None
    high: float | None = None
    text: str = ""
    sort: Sorting = "step"

    def __post_init__(self) -> None:
        for name, value, kind in (("only", self.only, Only), ("sort", self.sort, Sorting)):
            if value not in get_args(kind):
                raise UserError(f"{name}={value!r}: expected one of {', '.join(get_args(kind))}.")


class Responses:
    """The responses of one stage of a run, file by file in the order of their names; call :meth:`refresh` for new ones.

    Attributes:
        frame: a row a response: ``file``, ``start``, ``end`` (bytes), ``step``, ``group`` (of :attr:`groups`), ``task``,
            ``truncated``, ``length``, ``reward``, ``advantage``, and ``r/<name>``, ``w/<name>``, ``n/<name>``: raw
            rewards, weights and normalised rewards.
        groups: a row a group: ``first``, ``count``, ``step``, ``task``, ``prompt``, ``mean`` and ``spread`` of the
            scalar reward, ``standing``, ``disputed`` (see :func:`disagreement`), ``dead``, ``truncated``. Normalised
            rewards have the same mean in every group; the standing compares groups: raw rewards, each standardised
            over all responses of its task that are recorded, times their weights, as the mean over the group.
        rewards: names of all rewards, ``weighed`` those that have weights.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._covered = [0] * len(self.paths)
        self._tables: list[list[pa.Table]] = [[] for _ in self.paths]
        self._kept: list[Path | None] = [None] * len(self.paths)
        self.frame, self.groups = pd.DataFrame(), pd.DataFrame()
        self.rewards: list[str] = []
        self.weighed: list[str] = []
        self._first = np.zeros(0, dtype=np.int64)
        self._texts: Any = None
        self.refresh()

    def __len__(self) -> int:
        return len(self.frame)

    def copy(self) -> Responses:
        """One that can be refreshed while this one is read."""
        twin = copy.copy(self)
        twin._covered, twin._kept = list(self._covered), list(self._kept)
        twin._tables = [list(tables) for tables in self._tables]
        return twin

    def refresh(self) -> bool:
        """Take in the lines that were written since; whether there were any."""
        grown = [self._take(number) for number in range(len(self.paths))]
        if any(grown) or not len(self.frame.columns):
            self._summarise()
        return any(grown)

    def read(self, group: int) -> list[dict[str, Any]]:
        """The records of a group, highest advantage first (highest reward where there is none).

        Raises:
            UserError: there is no such group.
        """
        if not 0 <= group < len(self.groups):
            raise UserError(f"There is no group {group}: this run has {len(self.groups)} recorded groups.")
        first, count = (int(self.groups[name].iat[group]) for name in ("first", "count"))
        rows = self.frame.iloc[first : first + count]
        records = []
        with self.paths[int(rows["file"].iat[0])].open("rb") as file:
            for start, end in zip(rows["start"], rows["end"], strict=True):
                file.seek(int(start))
                records.append(json.loads(file.read(int(end) - int(start))))

        def place(record: dict[str, Any]) -> float:
            value = record.get("advantage") if record.get("advantage") is not None else record.get("reward")
            return -float("inf") if value is None else float(value)

        return sorted(records, key=place, reverse=True)

    def find(self, wanted: Wanted) -> list[int]:
        """The numbers of the groups that are wanted, in the wanted order.

        Raises:
            UserError: an unknown reward.
        """
        groups = self.groups
        if groups.empty:
            return []
        keep = np.ones(len(groups), dtype=bool)
        if wanted.task:
            keep &= (groups["task"] == wanted.task).to_numpy()
        if wanted.first is not None:
            keep &= groups["step"].to_numpy() >= wanted.first
        if wanted.last is not None:
            keep &= groups["step"].to_numpy() <= wanted.last
        if wanted.only != "all":
            keep &= groups[wanted.only].to_numpy()
        values = self._values(wanted.by)
        if wanted.low is not None or wanted.high is not None:
            low = -np.inf if wanted.low is None else wanted.low
            high = np.inf if wanted.high is None else wanted.high
            keep &= self._any((values >= low) & (values <= high))
        if wanted.text:
            keep &= self._any(self._holds(wanted.text))
        return [int(n) for n in self._order(wanted) if keep[n]]

    def standing(self, by: str = "reward") -> np.ndarray:
        """What groups are compared by: the standing, or the mean of one raw reward.

        Raises:
            UserError: an unknown reward.
        """
        if by == "reward":
            return np.asarray(self.groups["standing"]) if len(self.groups) else np.zeros(0)
        return self._moments(self._values(by))[0]

    def prompts(self) -> dict[str, list[int]]:
        """Each prompt's groups, in the order of the file."""
        found: dict[str, list[int]] = {}
        for number, prompt in enumerate(self.groups["prompt"] if len(self.groups) else []):
            found.setdefault(prompt, []).append(number)
        return found

    # -- the index ------------------------------------------------------------------------------------------------

    def _take(self, number: int) -> bool:
        path = self.paths[number]
        size = path.stat().st_size if path.is_file() else 0
        if size < self._covered[number]:  # another file has its name now
            self._covered[number], self._tables[number] = 0, []
        if not self._covered[number] and size >= KEPT_FROM:
            kept = _read_index(path)
            if kept is not None:
                self._tables[number], self._covered[number] = [kept[0]], kept[1]
                self._kept[number] = index_path(path)
        if size <= self._covered[number]:
            return bool(self._tables[number]) and self.frame.empty
        with path.open("rb") as file:
            file.seek(self._covered[number])
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]  # the last line may be half written
        if not new:
            return False
        self._tables[number].append(_index(new, self._covered[number], path))
        self._covered[number] += len(new)
        if len(new) >= KEPT_FROM:
            _write_index(path, _joined(self._tables[number]), self._covered[number])
        return True

    def _summarise(self) -> None:
        tables = [
            table.append_column("file", pa.array(np.full(len(table), number)))
            for number, parts in enumerate(self._tables)
            for table in parts
        ]
        if not tables:
            self.frame, self.groups = pd.DataFrame({"reward": []}), pd.DataFrame()
            return
        whole = _joined(tables)
        self._texts = whole.column("response") if "response" in whole.column_names else None
        prompts = whole.column("prompt").combine_chunks().dictionary_encode()
        codes = prompts.indices.to_numpy(zero_copy_only=False)
        frame = whole.drop_columns([n for n in ("prompt", "response") if n in whole.column_names]).to_pandas()
        frame["truncated"] = (frame.pop("finish_reason") == "length").to_numpy()
        new = np.ones(len(frame), dtype=bool)
        new[1:] = np.diff(codes) != 0
        for name in ("file", "step", "group"):
            new[1:] |= np.diff(frame[name].to_numpy()) != 0
        first = np.flatnonzero(new)
        frame["group"] = np.cumsum(new) - 1
        self.frame, self._first = frame, first
        self.rewards = [name[2:] for name in frame.columns if name.startswith("r/")]
        self.weighed = [name[2:] for name in frame.columns if name.startswith("w/") and frame[name].notna().any()]
        texts = np.asarray(prompts.dictionary.to_pylist(), dtype=object)
        mean, spread = self._moments(frame["reward"].to_numpy())
        advantage = frame["advantage"].to_numpy()
        still = np.where(np.isnan(advantage), 0.0, advantage) == 0
        known = ~np.isnan(advantage)
        self.groups = pd.DataFrame(
            {
                "first": first,
                "count": np.diff(np.append(first, len(frame))),
                "step": frame["step"].to_numpy()[first],
                "task": frame["task"].to_numpy()[first],
                "prompt": texts[codes[first]],
                "mean": mean,
                "spread": spread,
                "standing": self._standing(),
                "disputed": self._disputed(),
                "dead": ~self._any(~still) & self._any(known),
                "truncated": self._any(frame["truncated"].to_numpy()),
            }
        )

    def _any(self, flags: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.logical_or.reduceat(flags, self._first)
        return found

    def _moments(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and population standard deviation in each group, over what is known; NaN where nothing is."""
        known = np.isfinite(values)
        count = np.add.reduceat(known.astype(float), self._first)
        filled = np.where(known, values, 0.0).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.add.reduceat(filled, self._first) / count
            centred = np.where(known, filled - mean[self._groups_of(len(values))], 0.0)
            spread = np.sqrt(np.add.reduceat(centred**2, self._first) / count)
        return mean, spread

    def _groups_of(self, count: int) -> np.ndarray:
        sizes = np.diff(np.append(self._first, count))
        return np.repeat(np.arange(len(self._first)), sizes)

    def _standing(self) -> np.ndarray:
        total = np.zeros(len(self.frame))
        tasks = self.frame["task"]
        for name in self.weighed:
            if f"r/{name}" in self.frame:
                values = self.frame[f"r/{name}"]
                spread = values.groupby(tasks).transform("std", ddof=0).fillna(0.0).to_numpy()
                centred = (values - values.groupby(tasks).transform("mean")).to_numpy()
                with np.errstate(invalid="ignore", divide="ignore"):
                    standard = np.where(spread > 1e-9, centred / spread, 0.0)
                total += np.nan_to_num(standard * self.frame[f"w/{name}"].to_numpy())
        return self._moments(total)[0] if self.weighed else self._moments(self.frame["reward"].to_numpy())[0]

    def _disputed(self) -> np.ndarray:
        rows = self._groups_of(len(self.frame))
        parts = []
        for name in self.weighed:
            weight = self.frame[f"w/{name}"].to_numpy()
            column = f"n/{name}" if f"n/{name}" in self.frame and self.frame[f"n/{name}"].notna().any() else f"r/{name}"
            if column not in self.frame:
                continue
            values = self.frame[column].to_numpy().astype(float)
            if column.startswith("r/"):  # raw rewards have different units
                mean, spread = self._moments(values)
                values = (values - mean[rows]) / np.where(spread > 1e-9, spread, np.inf)[rows]
            parts.append(np.nan_to_num(weight * values))
        if not parts:
            return np.zeros(len(self._first))
        return disagreement([self._moments(part)[1] for part in parts], self._moments(sum(parts))[1])  # type: ignore[arg-type]

    def _values(self, by: str) -> np.ndarray:
        if by != "reward" and by not in self.rewards:
            raise UserError(f"by={by!r}: expected reward (the scalar one) or one of {', '.join(self.rewards)}.")
        values: np.ndarray = self.frame["reward" if by == "reward" else f"r/{by}"].to_numpy().astype(float)
        return values

    def _order(self, wanted: Wanted) -> np.ndarray:
        if wanted.sort == "step":
            return np.arange(len(self.groups))
        if wanted.sort in ("best", "worst"):
            mean = self.standing(wanted.by)
            return np.argsort(np.nan_to_num(-mean if wanted.sort == "best" else mean, nan=np.inf), kind="stable")
        return np.argsort(-np.nan_to_num(self.groups[wanted.sort].to_numpy()), kind="stable")

    def _holds(self, text: str) -> np.ndarray:
        found: np.ndarray = np.zeros(len(self.frame), dtype=bool)
        texts = self._response_texts()
        hits = pc.match_substring(texts, text, ignore_case=True)
        found |= pc.fill_null(hits, False).to_numpy(zero_copy_only=False)
        in_prompt = self.groups["prompt"].str.contains(re.escape(text), case=False).to_numpy()
        found |= in_prompt[self._groups_of(len(found))]
        return found

    def _response_texts(self) -> Any:
        """The responses; those of an index that was read are fetched when a text is looked for first."""
        if self._texts is None:
            for number, path in enumerate(self._kept):
                if path is not None and "response" not in self._tables[number][0].column_names:
                    texts = pq.read_table(path, columns=["response"])
                    first = self._tables[number][0]
                    self._tables[number][0] = first.append_column("response", texts.column("response"))
            self._texts = pa.concat_tables([t.select(["response"]) for parts in self._tables for t in parts]).column(0)
        return self._texts


def disagreement(spreads: Sequence[np.ndarray], together: np.ndarray) -> np.ndarray:
    """How much of what the weighed rewards say about a group's responses they take back from one another.

    Args:
        spreads: of each weighed reward in each group.
        together: the spread of their sum.

    Returns:
        1 - spread of the sum / sum of the spreads, in [0, 1]: 0 where all order the responses alike, 1 where they cancel;
        0 in groups without any spread.
    """
    apart = np.add.reduce([np.nan_to_num(spread) for spread in spreads])
    with np.errstate(invalid="ignore", divide="ignore"):
        share: np.ndarray = np.clip(np.where(apart > 1e-6, 1 - np.nan_to_num(together) / apart, 0.0), 0.0, 1.0)
    return share


def response_files(folder: Path, stage: str) -> list[Path]:
    """The files of one stage (a key of :data:`STAGES`): one a rank, and one a time the stage was run in this folder."""
    names = re.compile(rf"{stage}(\.rank\d+)?(-\d+)?\.jsonl")
    return sorted(path for path in folder.glob(f"{stage}*.jsonl") if names.fullmatch(path.name))


def index_path(path: Path) -> Path:
    """Where the index of a file of JSON lines is kept."""
    return path.with_name(f"{path.name}.index.parquet")


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    if any("response" not in table.column_names for table in tables):
        tables = [t.drop_columns(["response"]) if "response" in t.column_names else t for t in tables]
    return pa.concat_tables(tables, promote_options="permissive")


def _index(lines: bytes, offset: int, path: Path) -> pa.Table:
    """The rows of whole lines, of which the first lies at ``offset``."""
    ends = np.flatnonzero(np.frombuffer(lines, dtype=np.uint8) == 10) + 1
    starts = np.concatenate([[0], ends[:-1]])
    sample = [
        _loaded(lines[starts[i] : ends[i]], path) for i in np.unique(np.linspace(0, len(ends) - 1, 32).astype(int))
    ]
    try:
        table = _parsed(lines, sample)
    except pa.ArrowInvalid:  # a prompt or a number of another kind in some line
        table = None
    if table is None or len(table) != len(ends):
        records = [_loaded(lines[a:b], path) for a, b in zip(starts, ends, strict=True)]
        table = _parsed(_plain_lines(records), records)
    return table.append_column("start", pa.array(starts + offset)).append_column("end", pa.array(ends + offset))


def _loaded(line: bytes, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{path} has a line that is no JSON ({error}): {line[:80].decode(errors='replace')!r}."
        ) from error
    if not isinstance(record, dict) or "response" not in record:
        raise UserError(f"{path} has a line that records no response: {line[:80].decode(errors='replace')!r}.")
    return record


def _names(records: Sequence[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.get(key) or {}))


_LETTERS = {"rewards": "r", "weights": "w", "normalized": "n"}


def _parsed(lines: bytes, sample: Sequence[dict[str, Any]]) -> pa.Table:
    names = {key: _names(sample, key) for key in _LETTERS}
    structs = [
        pa.field(key, pa.struct([pa.field(name, pa.float64()) for name in found]))
        for key, found in names.items()
        if found
    ]
    chat = bool(sample) and not isinstance(sample[0].get("prompt"), str)
    message = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
    fields = [
        pa.field("step", pa.int64()),
        pa.field("group", pa.int64()),
        pa.field("task", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("length", pa.int64()),
        pa.field("reward", pa.float64()),
        pa.field("advantage", pa.float64()),
        pa.field("prompt", pa.list_(message) if chat else pa.string()),
        pa.field("response", pa.string()),
    ]
    read = pj.read_json(
        io.BytesIO(lines),
        read_options=pj.ReadOptions(block_size=BLOCK),
        parse_options=pj.ParseOptions(
            explicit_schema=pa.schema([*fields, *structs]), unexpected_field_behavior="ignore", newlines_in_values=False
        ),
    )
    columns = {field.name: read.column(field.name) for field in fields}
    columns["prompt"] = _chats(columns["prompt"]) if chat else columns["prompt"]
    for name, empty in (("step", 0), ("group", 0), ("task", ""), ("finish_reason", ""), ("length", 0), ("prompt", "")):
        columns[name] = pc.fill_null(columns[name], empty)
    for key, found in names.items():
        for name in found:
            columns[f"{_LETTERS[key]}/{name}"] = pc.struct_field(read.column(key), name)
    return pa.table(columns)


def _chats(messages: Any) -> Any:
    """``role: content`` a line, of each list of messages."""
    whole = messages.combine_chunks()
    flat = whole.flatten()
    role, content = (pc.fill_null(pc.struct_field(flat, key), "") for key in ("role", "content"))
    lines = pc.binary_join_element_wise(role, content, ": ")
    joined = pa.ListArray.from_arrays(whole.offsets, lines) if whole.offset == 0 else None
    if joined is None:
        raise pa.ArrowInvalid("sliced messages")
    return pc.binary_join(joined, "\n")


def prompt_text(prompt: Any) -> str:
    """A prompt of a record as text: itself, or ``role: content`` a line of chat messages."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        return "\n".join(
            f"{each.get('role', '')}: {_content(each.get('content'))}" if isinstance(each, dict) else str(each)
            for each in prompt
        )
    return json.dumps(prompt, ensure_ascii=False)


def _content(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _plain_lines(records: Sequence[dict[str, Any]]) -> bytes:
    """Lines that pyarrow can parse whatever the prompts and numbers are."""
    kept = ("step", "group", "length", "reward", "advantage")
    rows = []
    for record in records:
        row: dict[str, Any] = {key: _float_or_none(record.get(key)) for key in kept}
        row.update({key: None if row[key] is None else int(row[key]) for key in ("step", "group", "length")})
        row["task"] = str(record.get("task", ""))
        row["finish_reason"] = str(record.get("finish_reason", ""))
        row["prompt"], row["response"] = prompt_text(record.get("prompt")), str(record["response"])
        for key in _LETTERS:
            values = record.get(key)
            if isinstance(values, dict) and values:
                row[key] = {name: _float_or_none(value) for name, value in values.items()}
        record["prompt"] = row["prompt"]
        rows.append(json.dumps(row, ensure_ascii=False, default=str))
    return ("\n".join(rows) + "\n").encode("utf-8", errors="replace")


def _float_or_none(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _fingerprint(path: Path, covered: int) -> str:
    with path.open("rb") as file:
        digest = hashlib.blake2b(file.read(min(EDGE, covered)), digest_size=16)
        file.seek(max(0, covered - EDGE))
        digest.update(file.read(min(EDGE, covered)))
    return f"{VERSION}:{covered}:{digest.hexdigest()}"


def _read_index(path: Path) -> tuple[pa.Table, int] | None:
    """The index that is kept of this file, and how many of its bytes it covers."""
    place = index_path(path)
    try:
        schema = pq.read_schema(place)
        mark = (schema.metadata or {}).get(b"maestro", b"").decode()
        covered = int(mark.split(":")[1])
        if covered > path.stat().st_size or _fingerprint(path, covered) != mark:
            return None
        columns = [name for name in schema.names if name != "response"]
        return pq.read_table(place, columns=columns).replace_schema_metadata(None), covered
    except (OSError, ValueError, IndexError, pa.ArrowInvalid):
        return None  # none, or a damaged one: it is made anew


def _write_index(path: Path, table: pa.Table, covered: int) -> None:
    if "response" not in table.column_names:
        return  # grown from one that was read: the next start adds the few lines again
    place = index_path(path)
    beside = place.with_name(f"{place.name}.part")
    try:
        marked = table.replace_schema_metadata({"maestro": _fingerprint(path, covered)})
        pq.write_table(marked, beside, compression="zstd")
        beside.replace(place)
    except OSError:  # a folder that cannot be written: the index lives as long as the server
        beside.unlink(missing_ok=True)
