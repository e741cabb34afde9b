"""What ``local-elasticity reproduce`` does: lists, runs, continues and replays studies, and joins their claims."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from local_elasticity.base.devices import usable_device
from local_elasticity.base.errors import InputError, nearest
from local_elasticity.base.files import told_of_disk, write_whole
from local_elasticity.base.locks import Lock
from local_elasticity.base.parallel import Task, Workers, perform
from local_elasticity.base.progress import duration
from local_elasticity.runs.folders import STUDY_NOTE, clear_folder, holds_notes_only, is_ours
from local_elasticity.runs.provenance import git_revision, versions
from local_elasticity.studies.engine.study import Option, Study

TIMINGS = Path(__file__).with_name("timings.json")


@dataclass(frozen=True)
class Order:
    """One study to be run.

    Attributes:
        name: of the study.
        scale: "small" or "paper".
        sizes: changes of the scale: names and values as written on the command line.
        out: its folder.
        overwrite: throw away what is there.
        workers: where its tasks run.
        ensembles: options of the studies of ensembles: ``trainings``, ``train_only``, ``only``.
        device: of the networks, for example "cuda".
    """

    name: str
    scale: str
    sizes: Mapping[str, str] = field(default_factory=dict)
    out: Path | None = None
    overwrite: bool = False
    workers: Workers = field(default_factory=Workers)
    ensembles: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        """Where it goes: runs/NAME-SCALE unless given; more runs go to the folder of fewer."""
        changed = "".join(f"-{key.replace('_', '-')}-{value}" for key, value in self.sizes.items() if key != "runs")
        return self.out or Path("runs") / f"{self.name}-{self.scale}{changed}"


def studies() -> dict[str, Study]:
    """Every study by its name."""
    from local_elasticity.studies import STUDIES

    return STUDIES


def chosen(names: Sequence[str]) -> list[str]:
    """The studies that are meant; "all" is every one.

    Raises:
        InputError: for an unknown name, with the nearest.
    """
    known = studies()
    if "all" in names:
        return sorted(known)
    for name in names:
        if name not in known:
            raise InputError(expected="a study, or all", got=repr(name), do=nearest(name, [*known, "all"]))
    return list(dict.fromkeys(names))


def run(order: Order) -> int:
    """Run, or continue, one study; its exit status.

    Raises:
        InputError: for options or sizes that it does not have, a folder of other versions, too small a disk.
    """
    study = studies()[order.name]
    check_options(study, order)
    size = sized(study, order)
    folder = order.folder
    if not order.overwrite:
        check_versions(folder)
    check_disk(study, order, size, folder)
    extra: dict[str, Any] = {key: value for key, value in order.ensembles.items() if value}
    if "workers" in study.options:
        extra["workers"] = order.workers
    if order.device != "cpu":
        extra["device"] = order.device
    with Lock(folder / STUDY_NOTE), told_of_disk(folder):
        note = Note(folder, order)
        note.start()
        try:
            if size is None:
                status = study.run(order.scale, folder, **extra)
            else:
                status = study.run_at(size, order.scale, folder, **extra)
        except InputError:
            note.withdraw()
            raise
        note.finish(status)
    return status


def sized(study: Study, order: Order) -> Any:
    """The size of the study with the changes made; None where nothing is changed.

    Raises:
        InputError: for a study of fixed sizes, an unknown name, or a value of another kind.
    """
    if not order.sizes:
        return None
    size = study.size(order.scale)
    if size is None:
        raise InputError(
            expected="a study whose size can be changed",
            got=f"--size for {order.name}",
            do="leave --size out: it has the scales small and paper",
        )
    changes = {}
    kinds = {one.name: type(getattr(size, one.name)) for one in fields(size)}
    for name, text in order.sizes.items():
        key = name.replace("-", "_")
        if key not in kinds:
            raise InputError(expected=f"a size of {order.name}", got=repr(name), do=nearest(key, kinds))
        try:
            changes[key] = kinds[key](text)
        except ValueError:
            raise InputError(
                expected=f"{name} as {kinds[key].__name__}", got=repr(text), do=f"write for example {name}=3"
            ) from None
        if isinstance(changes[key], int | float) and changes[key] <= 0:
            raise InputError(expected=f"{name} above 0", got=text, do="ask for at least one")
    return replace(size, **changes)


def asked(order: Order) -> dict[Option, str]:
    """The options that were given, as a person types them."""
    workers, given = order.workers, [key for key, value in order.ensembles.items() if value]
    words = f"--backend {workers.backend} --jobs {workers.jobs}" + (
        f" --address {workers.address}" * bool(workers.address)
    )
    return {
        **({} if workers.backend == "serial" else {"workers": words}),
        **({} if order.device == "cpu" else {"device": f"--device {order.device}"}),
        **({"trainings": " ".join(f"--{key.replace('_', '-')}" for key in given)} if given else {}),
    }


def check_options(study: Study, order: Order) -> None:
    """Refuse what a study would not do, before the work.

    Raises:
        InputError: naming the studies that take the option.
    """
    for option, words in asked(order).items():
        if option not in study.options:
            raise InputError(
                expected=f"one of {_able(option)}" + (", which have several tasks" if option == "workers" else ""),
                got=f"{order.name} with {words}" + (": it is run as a single task" if option == "workers" else ""),
                do="leave it out",
            )


def _able(option: Option) -> str:
    return ", ".join(name for name, one in sorted(studies().items()) if option in one.options)


def check_versions(folder: Path) -> None:
    """Refuse to go on in a folder that other versions made: its numbers would be of two kinds.

    Raises:
        InputError: naming what differs.
    """
    note = read_note(folder)
    if note is None:
        return
    now = versions()
    differing = {k: (v, now.get(k, "not installed")) for k, v in note["versions"].items() if now.get(k) != v}
    if differing:
        raise InputError(
            expected=f"the versions that made {folder}",
            got=", ".join(f"{k} {new} (there {old})" for k, (old, new) in differing.items()),
            do="install those, choose another --out, or start again with --overwrite",
        )


def check_disk(study: Study, order: Order, size: Any, folder: Path) -> None:
    """Refuse what the disk has no room for.

    Raises:
        InputError: with the estimate and what is free.
    """
    needed = study.estimated_bytes(order.scale, size, order.workers.jobs)
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            expected=f"about {needed / 2**30:.2g} GiB of disk for {order.name}, scale {order.scale}",
            got=f"{free / 2**30:.2g} GiB free at {place}",
            do="free some, choose an --out on another disk, or a smaller --scale or --size",
        )


# --- a study's folder describes itself -----------------------------------------------------------------------------


class Note:
    """``study.json``: what was run, with which versions, how long it took and how it ended."""

    def __init__(self, folder: Path, order: Order) -> None:
        self.folder, self.order = folder, order
        self.started = time.perf_counter()
        self.old: dict[str, Any] | None = None

    def start(self) -> None:
        """Write it before the work; a folder that is continued keeps its history."""
        self.old = old = None if self.order.overwrite else read_note(self.folder)
        if self.order.overwrite and is_ours(self.folder):
            clear_folder(self.folder)
        self.content = {
            "study": self.order.name,
            "scale": self.order.scale,
            "sizes": dict(self.order.sizes),
            "command": command(self.order),
            "workers": self.order.workers.words,
            "device": self.order.device,
            "versions": versions(),
            "git_revision": git_revision(),
            "machine": machine(self.order.device),
            "seconds": (old or {}).get("seconds", 0.0),
            "status": None,
            "history": [*(old or {}).get("history", [])],
        }
        self.content["history"].append(
            {"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "git_revision": self.content["git_revision"]}
        )
        revision = (old or {}).get("git_revision")
        if revision and revision != self.content["git_revision"]:
            print(f"{self.folder} was begun at revision {revision[:12]}; going on at {git_revision()[:12]}")
        if not self.folder.exists() or is_ours(self.folder) or (self.folder.is_dir() and holds_notes_only(self.folder)):
            self.write()  # anything else is refused by the study, and left as it is

    def withdraw(self) -> None:
        """Leave no folder behind for a study that was refused before it began, and an older note as it was."""
        if self.old is not None:
            self.content = self.old
            self.write()
            return
        if self.folder.is_dir() and holds_notes_only(self.folder) and read_note(self.folder) is not None:
            shutil.rmtree(self.folder)

    def finish(self, status: int) -> None:
        """Write how it ended."""
        self.content["status"] = status
        self.content["seconds"] += time.perf_counter() - self.started
        self.write()

    def write(self) -> None:
        """Write it whole."""
        with told_of_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / STUDY_NOTE, json.dumps(self.content, indent=2))


def command(order: Order) -> str:
    """What a person types for this."""
    sizes = "".join(f" {key}={value}" for key, value in order.sizes.items())
    return (
        f"local-elasticity reproduce {order.name} --scale {order.scale}"
        + (f" --size{sizes}" if sizes else "")
        + ("" if order.device == "cpu" else f" --device {order.device}")
    )


def machine(device: str = "cpu") -> str:
    """One line about this machine: what timings are worth depends on it."""
    import platform

    import torch

    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    card = f", {torch.cuda.get_device_name(device)}" if torch.device(device).type == "cuda" else ""
    return f"{name}, {os.cpu_count()} cores{card}"


def read_note(folder: Path) -> dict[str, Any] | None:
    """The note of a study's folder, or None."""
    try:
        note = json.loads((folder / STUDY_NOTE).read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and "versions" in note and "study" in note else None


# --- several studies, and replays ----------------------------------------------------------------------------------


def reproduce(
    names: Sequence[str],
    scale: str,
    sizes: Mapping[str, str],
    out: Path | None,
    workers: Workers,
    overwrite: bool,
    results: Path | None = None,
    ensembles: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> int:
    """Run the studies: one alone in ``out`` itself, several in folders of it, with a page over all of them.

    Args:
        names: studies, or "all".
        scale: "small" or "paper".
        sizes: changes of the scale, for one study only.
        out: where to.
        workers: where the tasks run; at the small scale of several studies a task is a study, else a run of one.
        overwrite: throw away what is there.
        results: keep the tables and figures, small files only, here too.
        ensembles: options of the studies of ensembles.
        device: of the networks; of several studies, of those that take one.

    Returns:
        1 when a claim that was expected to hold does not.
    """
    wanted = chosen(names)
    if len(wanted) == 1 and "all" not in names and results is None:
        return run(Order(wanted[0], scale, sizes, out, overwrite, workers, ensembles or {}, device))
    if sizes:
        raise InputError(expected="--size for one study", got=f"{len(wanted)} studies", do="run them one by one")
    place = out or Path("runs")
    known_studies = studies()
    orders = [
        Order(
            name,
            scale,
            {},
            place / f"{name}-{scale}",
            overwrite,
            workers if "workers" in known_studies[name].options or scale == "small" else Workers(),
            (ensembles or {}) if "trainings" in known_studies[name].options else {},
            device if "device" in known_studies[name].options else "cpu",
        )
        for name in wanted
    ]
    known = [seconds for name in wanted if (seconds := cost_seconds(name, scale)) is not None]
    more = "" if len(known) == len(wanted) else f", and {len(wanted) - len(known)} that have no stored timing"
    print(
        f"{len(wanted)} studies, scale {scale}: about {duration(sum(known))} of work by stored timings{more}",
        flush=True,
    )
    if workers.jobs > 1 and scale == "small":
        refused = _side_by_side(orders, place, workers)
    else:
        refused = {order.name: why for order in orders if (why := _one_of_several(order)) is not None}
    from local_elasticity.studies.engine.catalogue import about
    from local_elasticity.studies.engine.overview import write_overview

    words = {name: about(name, known_studies[name]).claim for name in wanted}
    page, failing = write_overview([order.folder for order in orders], wanted, refused, scale, place, words)
    if results is not None:
        keep_results(orders, place, scale, results)
    print(f"page:   {page}")
    return int(failing > 0)


def so_far(names: Sequence[str], scale: str, sizes: Mapping[str, str], out: Path | None) -> int:
    """Judge and draw what an unfinished study has so far.

    Raises:
        InputError: for several studies, or one that is judged only when it is finished.
    """
    wanted = chosen(names)
    study = studies()[wanted[0]]
    if len(wanted) != 1 or "so_far" not in study.options:
        raise InputError(
            expected=f"one of {_able('so_far')}", got=", ".join(wanted), do="leave --so-far out for other studies"
        )
    order = Order(wanted[0], scale, sizes, out)
    return study.so_far(sized(study, order), scale, order.folder)


def _one_of_several(order: Order) -> str | None:
    """Run a study unless it is finished; why it was refused, or None."""
    note = read_note(order.folder)
    finished = note is not None and note["status"] is not None and (order.folder / "claims.json").exists()
    if finished and not order.overwrite:
        check_versions(order.folder)
        print(f"{order.name}: already finished in {order.folder}", flush=True)
        return None
    try:
        status = run(order)
    except InputError as error:
        print(f"{order.name}: not run: {error}", flush=True)
        return str(error)
    print(f"{order.name}: {'a claim fails' if status else 'every judged claim holds'}", flush=True)
    return None


def _side_by_side(orders: Sequence[Order], place: Path, workers: Workers) -> dict[str, str]:
    """Whole studies as tasks; each says what it has to say in a log beside its folder."""
    records = place / ".tasks"
    shutil.rmtree(records, ignore_errors=True)  # a finished study says so itself
    inner = [replace(order, workers=Workers(), out=order.folder.resolve()) for order in orders]
    # Studies of ensembles share trainings, so that they go one after the other.
    sharing = [order for order in inner if "trainings" in studies()[order.name].options]
    groups = [[order] for order in inner if order not in sharing] + ([sharing] if sharing else [])
    groups.sort(key=lambda group: -sum(cost_seconds(order.name, order.scale) or 0.0 for order in group))
    tasks = [Task(group[0].name, logged, (group,), records / f"{group[0].name}.json") for group in groups]
    try:
        outcomes = perform(tasks, workers)
    finally:
        shutil.rmtree(records, ignore_errors=True)
    done = [one for outcome in outcomes for one in outcome["studies"]]
    for one in done:
        print(f"{one['study']}: {one['said']} (log: {one['log']})", flush=True)
    return {one["study"]: one["refused"] for one in done if one["refused"] is not None}


def logged(orders: Sequence[Order]) -> dict[str, Any]:
    """Run some of several studies one after the other, with what they print in files."""
    return {"studies": [_logged(order) for order in orders]}


def _logged(order: Order) -> dict[str, Any]:
    log = order.folder.with_name(f"{order.folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, contextlib.redirect_stdout(file):
        refused = _one_of_several(order)
    said = log.read_text().splitlines()[-1].partition(": ")[2]
    return {"study": order.name, "refused": refused, "said": said, "log": str(log)}


def replay(folder: Path, out: Path | None, workers: Workers, overwrite: bool) -> int:
    """Run the study that made a folder again, with its settings and seeds, and say whether the numbers are the same.

    Raises:
        InputError: for a folder that no study made, or one of other versions.
    """
    note = read_note(folder)
    if note is None:
        raise InputError(
            expected=f"the folder of a study, with {STUDY_NOTE} in it",
            got=f"{'no folder' if not folder.is_dir() else 'none'} at {folder}",
            do="pass the --out of 'local-elasticity reproduce NAME'",
        )
    (name,) = chosen([note["study"]])
    check_versions(folder)
    usable_device(note.get("device", "cpu"))
    where = out or folder.with_name(f"{folder.name}-replay")
    if where.resolve() == folder.resolve():
        raise InputError(expected="another folder for the replay", got=str(where), do="choose another --out")
    print(f"replaying {note['command']}, made at revision {note['git_revision'] or 'unknown'}", flush=True)
    status = run(Order(name, note["scale"], note["sizes"], where, overwrite, workers, {}, note.get("device", "cpu")))
    same = _claims_in(folder) == _claims_in(where)
    print(f"replay: {'the same numbers as' if same else 'OTHER numbers than'} {folder}")
    return status if same else 1


def _claims_in(folder: Path) -> Any:
    """What a study judged; None where it did not come so far."""
    try:
        return json.loads((folder / "claims.json").read_text())["claims"]
    except (OSError, ValueError, KeyError):
        return None


# --- the list --------------------------------------------------------------------------------------------------------


def show_list(terminal: bool) -> int:
    """Print every study: paper, figure, claim, cost at each scale; one line a study where nobody looks."""
    from local_elasticity.studies.engine.catalogue import about

    rows = []
    for name, study in sorted(studies().items()):
        said = about(name, study)
        rows.append((name, said.paper, said.figure, said.claim, cost(name, study, "small"), cost(name, study, "paper")))
    if not terminal:
        for name, *rest in rows:
            print(f"{name}: {'; '.join(_labelled(rest))}")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Studies: local-elasticity reproduce NAME --scale small")
    for heading in ("study", "paper", "figure", "claim", "small", "paper scale"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return 0


def _labelled(row: Sequence[str]) -> list[str]:
    paper, figure, claim, small, large = row
    return [paper, f"figure: {figure}", f"claim: {claim}", f"small: {small}", f"paper: {large}"]


def timings() -> dict[str, dict[str, Any]]:
    """Stored timings: study -> scale -> seconds, machine, and whether they were measured."""
    try:
        return json.loads(TIMINGS.read_text())
    except (OSError, ValueError):
        return {}


def cost_seconds(name: str, scale: str) -> float | None:
    """Seconds of a study by the stored timings, or None."""
    stored = timings().get(name, {}).get(scale)
    return None if stored is None else float(stored["seconds"])


def cost(name: str, study: Study, scale: str) -> str:
    """What a study costs: as it was here, as it was where timings were stored, or as its author says."""
    mine = read_note(Path("runs") / f"{name}-{scale}")
    if mine is not None and mine["status"] is not None:
        return f"{duration(mine['seconds'])} (here)"
    stored = timings().get(name, {}).get(scale)
    if stored is not None:
        return f"{duration(stored['seconds'])}{'' if stored.get('measured', True) else ' (estimated)'}"
    return str(study.cost.get(scale, "unknown"))


# --- results that are kept -------------------------------------------------------------------------------------------

LARGEST_KEPT = 400 * 2**10  # bytes of a file under docs/results
COLOURS = 128  # of a kept figure: a quarter of the bytes, and nobody sees it


def keep_results(orders: Sequence[Order], place: Path, scale: str, results: Path) -> None:
    """Copy the tables and figures of the studies, small files only, and the timings."""
    results.mkdir(parents=True, exist_ok=True)
    found = timings()  # what was not run now keeps its timing
    for order in orders:
        note = read_note(order.folder)
        if note is None or note["status"] is None:
            continue
        now = {"seconds": round(note["seconds"], 1), "machine": note["machine"]}
        found[order.name] = {**found.get(order.name, {}), scale: now}
        target = results / order.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for path in (order.folder / name for name in ("claims.md", "separation.csv")):
            if path.is_file() and path.stat().st_size <= LARGEST_KEPT:
                shutil.copy(path, target / path.name)
        for path in sorted((order.folder / "figures").glob("*.png")):
            keep_figure(path, target / path.name)
    shutil.copy(place / f"claims-{scale}.md", results / "README.md")
    (results / "timings.json").write_text(json.dumps(found, indent=2) + "\n")


def keep_figure(path: Path, target: Path) -> None:
    """Copy a figure with fewer colours, or where that is not possible as it is, unless it is large."""
    try:
        from PIL import Image

        with Image.open(path) as image:
            image.convert("RGB").quantize(COLOURS).save(target, optimize=True)
    except (ImportError, OSError):
        shutil.copy(path, target)
    if target.stat().st_size > LARGEST_KEPT:
        target.unlink()
