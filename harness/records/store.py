"""The only reader and writer of results/: one folder a run, one append-only part a trial.

    manifest.json             what the run is; a folder without it is not ours
    trials.jsonl              one line a finished trial, written last: a trial without a line never happened
    requests.parquet/<trial>.parquet    its Results, chunks as list columns
    server.parquet/<trial>.parquet      its ServerSamples
    fit.json, plan.json       what was concluded from them; replaced whole

Beside the runs, ``profiles/<device>-<preset>.json`` holds the times of the stages on a device.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from harness.content import SCHEMA, OtherSchema, Record, parsed
from harness.device_profile import Profile
from harness.errors import StoreError
from harness.records.fit import Fit
from harness.records.load_test import LOAD_TEST, TestManifest
from harness.records.metrics import in_window, per_request, through_windows
from harness.records.plan import Plan
from harness.records.prediction import Prediction
from harness.records.schema import (
    BatchStatistics,
    Chunks,
    GpuSample,
    Outcome,
    Result,
    RunManifest,
    ServerSample,
    StageStatistics,
    Trial,
)

Row = TypeVar("Row")
_PART_FOLDERS = ("requests.parquet", "server.parquet")
_FIX = "restore it, or leave the run out"  # of a damaged file
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CHUNK_COLUMNS = tuple(each.name for each in dataclasses.fields(Chunks))
_ARROW = {"str": pa.string(), "int": pa.int64(), "bool": pa.bool_(), "Outcome": pa.string()}
_RESULT_FIELDS = [(each.name, _ARROW[str(each.type)]) for each in dataclasses.fields(Result) if each.name != "chunks"]
_RESULT_SCHEMA = pa.schema(
    [("trial_id", pa.string()), *_RESULT_FIELDS, *((name, pa.list_(pa.int64())) for name in _CHUNK_COLUMNS)]
)
_COUNTS = [("requests", pa.int64()), ("executions", pa.int64()), ("queue_ns", pa.int64()), ("compute_ns", pa.int64())]
_BATCH = pa.struct([("batch_size", pa.int64()), ("executions", pa.int64()), ("compute_ns", pa.int64())])
_STAGE = pa.struct([("stage", pa.string()), *_COUNTS, ("batches", pa.list_(_BATCH))])
_GPU = pa.struct(
    [("uuid", pa.string()), ("percent", pa.float64()), ("memory_bytes", pa.int64()), ("power_w", pa.float64())]
)
_SAMPLE_SCHEMA = pa.schema(
    [
        ("trial_id", pa.string()),
        ("at_ns", pa.int64()),
        ("stages", pa.list_(_STAGE)),
        ("cpu_percent", pa.float64()),
        ("memory_bytes", pa.int64()),
        ("gpus", pa.list_(_GPU)),
        ("metrics", pa.map_(pa.string(), pa.float64())),
    ]
)

_OLD_SAMPLE_COLUMNS = ("gpu_percent", "gpu_memory_bytes")  # of the first GPU; no run was ever stored with one

ROOM_FOR_A_TRIAL = 200_000_000  # bytes: Locust's log, records and their copy in the store


class Run:
    """One results folder. Every method that reads or writes raises StoreError, naming the file."""

    def __init__(self, path: Path, manifest: RunManifest) -> None:
        self.path = path
        self.manifest = manifest
        self._parsed: dict[str, Trial] = {}  # by line: a search asks for all of them at each of its steps

    @classmethod
    def create(cls, root: Path | str, manifest: RunManifest) -> Run:
        """A new run in ``root/<run_id>``; that folder must be new or empty."""
        path = Path(root) / _checked_name(manifest.run_id, "run id")
        with _disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            if any(not inside.name.startswith(".") for inside in path.iterdir()):
                raise StoreError(f"{path} is not empty; open it if it is a run, or choose another run id")
        run = cls(path, manifest)
        run.update_manifest()
        return run

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """An existing run."""
        path = Path(path)
        if not cls.is_run(path):
            raise StoreError(f"{path} holds no manifest.json, so it is not a run of this harness; give a run's folder")
        content = _read_json(path / "manifest.json")
        if content.pop("kind", None) == LOAD_TEST:
            raise StoreError(f"{path} holds the records of a load test (locust --records), not a run of a plan")
        del content["schema"]
        with _damage(path / "manifest.json"):
            return cls(path, RunManifest.of(content))

    @staticmethod
    def is_run(path: Path | str) -> bool:
        return (Path(path) / "manifest.json").is_file()

    def update_manifest(self, **changes: Any) -> None:
        """Replaces fields of the manifest, here and on disk."""
        self.manifest = dataclasses.replace(self.manifest, **changes)
        write_json(self.path / "manifest.json", self.manifest.to_dict())

    def trials(self) -> list[Trial]:
        """Every finished trial, in the order they were appended."""
        lines, known = _whole_lines(self.path / "trials.jsonl"), self._parsed
        trials = [known.get(line) or self._trial(number, line) for number, line in enumerate(lines, start=1)]
        self._parsed = dict(zip(lines, trials, strict=True))
        return trials

    def append_trial(self, trial: Trial, results: Sequence[Result], samples: Sequence[ServerSample]) -> None:
        """Stores a finished trial: its parts first, its line last. Either all of it is there afterwards, or none."""
        name = _checked_name(trial.trial_id, "trial id")
        if any(known.trial_id == name for known in self.trials()):
            raise StoreError(f"{self.path}: trial {name} is stored already; records are append-only")
        line = json.dumps(_plain(trial.to_dict()), allow_nan=False)
        parts = [self.path / folder / f"{name}.parquet" for folder in _PART_FOLDERS]
        try:
            for part, table in zip(parts, (_result_table(name, results), _sample_table(name, samples)), strict=True):
                _write_part(part, table)
            _append_line(self.path / "trials.jsonl", line)
        except StoreError:
            for part in parts:
                part.unlink(missing_ok=True)
            raise

    def append_prediction(self, trial_id: str, prediction: Prediction) -> None:
        """Write down what a trial that has not started will show; the line is on disk when this returns."""
        line = json.dumps({"trial_id": trial_id, **prediction.to_dict()}, allow_nan=False)
        _append_line(self.path / "predictions.jsonl", line)

    def predictions(self) -> dict[str, Prediction]:
        """What was written down before trials started, by trial; the last line of a trial counts."""
        path = self.path / "predictions.jsonl"
        with _damage(path):
            lines = [json.loads(line) for line in _whole_lines(path)]
            return {line.pop("trial_id"): Prediction.of(line) for line in lines}

    def must_have_room(self) -> None:
        """Raise StoreError, before anything is measured, where the disk has no room for a trial."""
        with _disk_errors(self.path):
            free = shutil.disk_usage(self.path).free
        if free < ROOM_FOR_A_TRIAL:
            raise StoreError(
                f"{self.path}: {free / 1e6:.0f} MB of disk are left, a trial needs up to {ROOM_FOR_A_TRIAL / 1e6:.0f}: "
                "free some and start again; what is measured is kept"
            )

    def results(self, trial_id: str) -> list[Result]:
        """The Results of a trial, as they were appended."""
        return self._part(_PART_FOLDERS[0], trial_id, _results_of)

    def samples(self, trial_id: str) -> list[ServerSample]:
        """The ServerSamples of a trial, as they were appended."""
        return self._part(_PART_FOLDERS[1], trial_id, _samples_of)

    def requests(self, trial_id: str | None = None) -> pd.DataFrame:
        """``metrics.per_request`` of one trial, or of all, with a first column ``trial_id``."""
        names = [trial_id] if trial_id is not None else [trial.trial_id for trial in self.trials()]
        frames = []
        for name in names:
            frame = per_request(self.results(name))
            frame.insert(0, "trial_id", name)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else per_request([]).assign(trial_id="")

    def requests_in_rungs(self, trial_id: str | None = None) -> pd.DataFrame:
        """``metrics.through_windows`` of the rungs of one ladder, or of all, with a first column ``trial_id``."""
        frames = [through_windows([], []).assign(trial_id="")]
        for trial in self.trials():
            if trial.kind == "ladder" and trial_id in (None, trial.trial_id):
                windows = [(rung.start_ns, rung.end_ns) for rung in trial.rungs]
                frames.append(through_windows(self.results(trial.trial_id), windows).assign(trial_id=trial.trial_id))
        return pd.concat(frames, ignore_index=True)

    def requests_in_windows(self) -> pd.DataFrame:
        """``metrics.in_window`` of the windows of all open-loop runs, with a first column ``trial_id``."""
        frames = [per_request([]).assign(trial_id="")]
        for trial in self.trials():
            for rung in trial.rungs if trial.kind == "open" else ():
                found = in_window(self.results(trial.trial_id), rung.start_ns, rung.end_ns)
                frames.append(found.assign(trial_id=trial.trial_id))
        return pd.concat(frames, ignore_index=True)

    def write_fit(self, fit: Fit) -> None:
        write_json(self.path / "fit.json", fit.to_dict())

    def fit(self) -> Fit | None:
        """What was fitted, or None where nothing was yet."""
        return _read_record_if_there(self.path / "fit.json", Fit.of)

    def write_plan(self, plan: Plan) -> None:
        write_json(self.path / "plan.json", plan.to_dict())

    def plan(self) -> Plan | None:
        """What was planned, or None where nothing was yet."""
        return _read_record_if_there(self.path / "plan.json", Plan.of)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for one writer; a second one, of this or another process, is refused with the first's pid."""
        with _disk_errors(self.path):
            file = _locked(self.path)
        with file:  # closing it frees the lock
            yield

    def _trial(self, number: int, line: str) -> Trial:
        with _damage(self.path / "trials.jsonl", f"line {number}"):
            return Trial.of(json.loads(line))

    def _part(self, folder: str, trial_id: str, read: Callable[[pa.Table], list[Row]]) -> list[Row]:
        if all(trial.trial_id != trial_id for trial in self.trials()):
            raise StoreError(f"{self.path}: holds no trial {trial_id!r}")
        path = self.path / folder / f"{trial_id}.parquet"
        with _damage(path), path.open("rb") as file:
            return read(pq.read_table(file))


def replace_text(path: Path, text: str) -> None:
    """Writes a text whole, over an older one; its folder is made. Raises StoreError."""
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda file: file.write(text.encode("utf-8")))


def write_load_test(path: Path, manifest: TestManifest) -> None:
    """Writes the manifest of a load test whole, over an older one. Raises StoreError."""
    write_json(path, manifest.to_dict())


def read_load_test(path: Path) -> TestManifest:
    """The manifest of a load test. Raises StoreError where it is missing, damaged or of another schema."""
    return _read_record(path, TestManifest.of)


def write_profile(path: Path | str, profile: Profile) -> None:
    """Writes a profile whole, over an older one of its name."""
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, profile.to_dict())


def read_profile(path: Path | str) -> Profile:
    """The profile in a file. Raises StoreError where it is missing, damaged or of another schema."""
    return _read_record(Path(path), Profile.of, "make one with `harness profile`")


def _whole_lines(path: Path) -> list[str]:
    with _damage(path):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return text.split("\n")[:-1]  # what follows the last line end was torn by a crash


def _locked(folder: Path) -> TextIO:
    file = open(folder / ".lock", "a+", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise StoreError(f"{folder} is being written by process {holder}; wait for it or end it") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _result_table(trial_id: str, results: Sequence[Result]) -> pa.Table:
    columns = {"trial_id": [trial_id] * len(results)}
    columns |= {name: [_plain(getattr(result, name)) for result in results] for name, _ in _RESULT_FIELDS}
    offsets = np.cumsum([0, *(len(result.chunks) for result in results)], dtype=np.int32)
    for name in _CHUNK_COLUMNS:
        flat = [np.empty(0, dtype=np.int64), *(getattr(result.chunks, name) for result in results)]
        columns[name] = pa.ListArray.from_arrays(offsets, np.concatenate(flat))
    return pa.table(columns, schema=_RESULT_SCHEMA)


def _results_of(table: pa.Table) -> list[Result]:
    table = table.combine_chunks()
    # A field that is newer than the file has its default.
    rows = table.select([name for name, _ in _RESULT_FIELDS if name in table.column_names]).to_pylist()
    lists = [_arrays_of(table[name]) for name in _CHUNK_COLUMNS]
    return [_result_of(row, Chunks(*columns)) for row, *columns in zip(rows, *lists, strict=True)]


def _result_of(row: dict[str, Any], chunks: Chunks) -> Result:
    return Result(**_changed(row, outcome=Outcome(row["outcome"]), chunks=chunks))


def _arrays_of(column: pa.ChunkedArray) -> list[np.ndarray]:
    if not len(column):
        return []
    lists = column.combine_chunks()
    return np.split(lists.flatten().to_numpy(), np.cumsum(lists.value_lengths().to_numpy())[:-1])


def _sample_table(trial_id: str, samples: Sequence[ServerSample]) -> pa.Table:
    rows = [{"trial_id": trial_id, **dataclasses.asdict(sample)} for sample in samples]
    return pa.Table.from_pylist(rows, schema=_SAMPLE_SCHEMA)


def _samples_of(table: pa.Table) -> list[ServerSample]:
    rows = table.drop_columns("trial_id").to_pylist()
    return [_sample_of(row) for row in rows]


def _sample_of(row: dict[str, Any]) -> ServerSample:
    metrics = dict(row.get("metrics") or ())  # older runs have none
    gpus = tuple(GpuSample(**gpu) for gpu in row.get("gpus") or ())
    known = {name: value for name, value in row.items() if name not in _OLD_SAMPLE_COLUMNS}
    return ServerSample(**_changed(known, stages=_stages_of(row["stages"]), gpus=gpus, metrics=metrics))


def _stages_of(rows: Sequence[dict[str, Any]]) -> tuple[StageStatistics, ...]:
    batches = (tuple(BatchStatistics(**batch) for batch in row["batches"]) for row in rows)
    return tuple(StageStatistics(**_changed(row, batches=each)) for row, each in zip(rows, batches, strict=True))


def _changed(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Content with some fields as records hold them, which JSON cannot."""
    return {**content, **changes}


def _plain(value: Any) -> Any:
    """``value`` as JSON can say it: a NaN or an infinity becomes null."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else str(value)


def _checked_name(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise StoreError(f"{what} {name!r} cannot name a file; use letters, digits, '.', '_' and '-'")
    return name


def _write_part(path: Path, table: pa.Table) -> None:
    with _disk_errors(path):
        path.parent.mkdir(exist_ok=True)
    _replace(path, lambda file: pq.write_table(table, file, compression="zstd"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole, over an older one of its name; a NaN becomes null. Raises StoreError."""
    text = json.dumps({"schema": SCHEMA, **_plain(content)}, indent=1, allow_nan=False)
    _replace(path, lambda file: file.write(text.encode("utf-8")))


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    """Writes beside ``path``, then renames over it: a reader sees the old file or the new one, whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with _disk_errors(path):
        try:
            with beside.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            _sync_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def _append_line(path: Path, line: str) -> None:
    with _disk_errors(path), open(path, "ab+") as file:
        whole = _whole_bytes(file)
        file.truncate(whole)
        try:
            file.write(line.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
            _sync_folder(path.parent)
        except OSError:
            os.ftruncate(file.fileno(), whole)
            raise


def _whole_bytes(file: Any) -> int:
    """The size up to the last line end: what follows was torn by a crash."""
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def _sync_folder(folder: Path) -> None:
    # A rename or a new file is on disk only when its folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_record_if_there(path: Path, of: Callable[[dict[str, Any]], Record]) -> Record | None:
    return _read_record(path, of) if path.exists() else None


def _read_record(path: Path, of: Callable[[dict[str, Any]], Record], fix: str = _FIX) -> Record:
    content = _read_json(path, fix)
    with _damage(path, fix=fix):
        return of(content)


def _read_json(path: Path, fix: str = _FIX) -> dict[str, Any]:
    """The content of a JSON file, whose schema number must be that of this harness."""
    with _damage(path, fix=fix):
        try:
            return parsed(path.read_text(encoding="utf-8"))
        except OtherSchema as error:
            raise StoreError(f"{path} has {error}") from None


@contextmanager
def _damage(path: Path, where: str = "", fix: str = _FIX) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowException) as error:
        place = f"{path} {where}".rstrip()
        raise StoreError(f"{place} is damaged or cannot be read ({error}); {fix}") from error


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}; free or repair the disk") from error
