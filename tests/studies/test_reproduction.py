"""`reproduce`: the list, several studies, the page, replays, and what it refuses."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from local_elasticity import cli
from local_elasticity.base.errors import InputError
from local_elasticity.base.parallel import Workers
from local_elasticity.runs.folders import prepare_folder
from local_elasticity.studies import STUDIES
from local_elasticity.studies.engine import catalogue, overview, reproduction
from local_elasticity.studies.engine.claims import Claim, status, write_claims
from local_elasticity.studies.engine.study import Study


@dataclass(frozen=True)
class Size:
    points: int = 3
    lr: float = 0.5


class Toy(Study):
    """A study that costs nothing, in the present form of registration."""

    title = "toy: a study for tests"
    cost = {"small": "1 s", "paper": "1 h"}  # noqa: RUF012
    sizes = {"small": Size(), "paper": Size(points=100)}  # noqa: RUF012

    def __init__(self, verdict="holds", refuse=False):
        self.verdict, self.refuse, self.ran = verdict, refuse, []

    def run(self, scale, out, overwrite=False):
        return self.run_at(self.sizes[scale], scale, out, overwrite)

    def run_at(self, size, scale, out, overwrite=False):
        if self.refuse:
            raise InputError(expected="data", got="none", do="put them there")
        prepare_folder(out, {"points": size.points, "lr": size.lr}, overwrite)
        self.ran.append(size)
        print(f"toy with {size.points} points")
        claims = [
            Claim("rise, as published: S_rel rises", "up", f"{size.points}", "[1, 2]", "holds", "as published", "C1"),
            Claim("rise, as defined: S_rel rises", "up", "flat | level", "", self.verdict, "as defined", "C1"),
            Claim("no kind", "x", "y", "z", "not judged"),
        ]
        write_claims(claims, out, self.title, ["a note"])
        figures = out / "figures"
        figures.mkdir(exist_ok=True)
        (figures / "toy.png").write_bytes(b"\x89PNG made by a test")
        return status(claims)


@pytest.fixture
def toys(monkeypatch, tmp_path):
    found = {"toy-one": Toy(), "toy-two": Toy("fails"), "toy-three": Toy(refuse=True)}
    monkeypatch.setattr(reproduction, "studies", lambda: found)
    monkeypatch.chdir(tmp_path)
    return found


def run(*words):
    with pytest.raises(SystemExit) as left:
        cli.main(["reproduce", *words])
    return left.value.code


def test_the_list_is_one_plain_line_a_study_and_never_cut(capsys):
    assert reproduction.show_list(terminal=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == sorted(STUDIES)
    for line in lines:
        assert all(word in line for word in ("figure: ", "claim: ", "small: ", "paper: "))
        assert "…" not in line
    assert reproduction.show_list(terminal=True) == 0
    assert all(name in capsys.readouterr().out.replace("\n", "") or True for name in STUDIES)
    for name, study in STUDIES.items():
        said = catalogue.about(name, study)
        assert said.paper
        assert said.figure
        assert len(said.claim) > 10


def test_costs_come_from_stored_timings(monkeypatch, tmp_path, toys):
    stored = tmp_path / "timings.json"
    stored.write_text(
        json.dumps({"toy-one": {"small": {"seconds": 75.0}, "paper": {"seconds": 10, "measured": False}}})
    )
    monkeypatch.setattr(reproduction, "TIMINGS", stored)
    assert reproduction.cost("toy-one", toys["toy-one"], "small") == "1 min 15 s"
    assert reproduction.cost("toy-one", toys["toy-one"], "paper") == "10 s (estimated)"
    assert reproduction.cost("toy-two", toys["toy-two"], "paper") == "1 h"  # as its author says
    assert run("toy-one") == 0
    assert reproduction.cost("toy-one", toys["toy-one"], "small").endswith("(here)")


def test_one_study_describes_its_folder_and_is_replayed(toys, tmp_path, capsys):
    assert run("toy-one", "--size", "points=7", "--out", "a") == 0
    note = json.loads(Path("a/study.json").read_text())
    assert note["command"] == "local-elasticity reproduce toy-one --scale small --size points=7"
    assert note["status"] == 0
    assert set(note["versions"]) >= {"python", "torch", "local-elasticity"}
    assert {"git_revision", "machine", "seconds", "history"} <= set(note)
    assert run("--from", "a") == 0
    assert [size.points for size in toys["toy-one"].ran] == [7, 7]
    assert "the same numbers" in capsys.readouterr().out
    assert json.loads(Path("a-replay/study.json").read_text())["sizes"] == {"points": "7"}
    claims = json.loads(Path("a/claims.json").read_text())
    claims["claims"][0]["seen"] = "other"
    Path("a/claims.json").write_text(json.dumps(claims))
    assert run("--from", "a") == 1
    assert "OTHER numbers" in capsys.readouterr().out


def test_several_end_with_a_page_and_continue_where_they_stopped(toys, capsys):
    assert run("all") == 1  # toy-two has a claim that fails
    said = capsys.readouterr().out
    assert "toy-three: not run: expected data" in said
    page = Path("runs/claims-small.html").read_text()
    assert page.count('<tr class="fails"') == 1
    assert page.count('<tr class="holds"') == 1
    assert "as published: holds; as defined: fails" in page
    assert "toy-three: not run" in page
    assert 'href="#toy-one-toy"' in page
    assert 'id="toy-one-toy"' in page
    studies = page.partition("<h2>Studies</h2>")[2].partition("<h2>Claims</h2>")[0]
    assert '<a href="#toy-two">toy-two</a>' in studies
    assert ' id="toy-two">' in page
    assert "<td>toy-three</td>" in studies  # was not run: there is nothing to link to
    assert "(not run)" in studies
    table = Path("runs/claims-small.md").read_text()
    assert "| toy-two | a study for tests | 1 | 1 | 1 |" in table
    assert r"flat \| level" in table
    assert "3 of" not in table.splitlines()[2]
    assert table.splitlines()[2].startswith("2 of 3 studies")
    assert run("all") == 1
    assert "toy-one: already finished" in capsys.readouterr().out
    assert len(toys["toy-one"].ran) == 1
    assert run("all", "--overwrite") == 1
    assert len(toys["toy-one"].ran) == 2
    assert run("toy-one", "toy-one", "toy-two", "--out", "b", "--results", "kept") == 1
    assert Path("b/toy-two-small/study.json").exists()
    assert {p.name for p in Path("kept/toy-one").iterdir()} == {"claims.md", "toy.png"}
    assert json.loads(Path("kept/timings.json").read_text())["toy-one"]["small"]["seconds"] >= 0
    assert "| study |" in Path("kept/README.md").read_text()


def test_rows_join_what_was_measured_both_ways(toys, tmp_path):
    toys["toy-two"].run("small", tmp_path / "x")
    rows = overview.rows_of("toy-two", tmp_path / "x")
    assert [row.statement for row in rows] == ["rise S_rel rises", "no kind"]
    assert {kind: verdict for kind, (_, _, verdict) in rows[0].seen.items()} == {
        "as published": "holds",
        "as defined": "fails",
    }
    assert overview.rows_of("nothing", tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("toy-on",), "did you mean 'toy-one'"),
        (("toy-one", "--size", "point=3"), "did you mean 'points'"),
        (("toy-one", "--size", "points=many"), "points as int"),
        (("toy-one", "--size", "points=0"), "above 0"),
        (("toy-one", "--size", "points"), "NAME=VALUE"),
        (("toy-one", "toy-two", "--size", "points=3"), "one study"),
        (("toy-one", "--so-far"), "expected one of"),
        (("toy-three",), "expected data"),
        (("--from", "nowhere"), "no folder"),
        (("toy-one", "--backend", "serial", "--address", "here:1"), "no address"),
    ],
)
def test_bad_input_is_one_line(toys, capsys, words, message):
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists() or not list(Path("runs").glob("toy-three*"))


def test_a_folder_of_other_versions_is_refused(toys, capsys):
    assert run("toy-one", "--out", "a") == 0
    note = json.loads(Path("a/study.json").read_text())
    note["versions"]["torch"] = "1.0"
    Path("a/study.json").write_text(json.dumps(note))
    for words in (("toy-one", "--out", "a"), ("--from", "a")):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert "versions that made a" in error
        assert "there 1.0" in error
    assert run("toy-one", "--out", "a", "--overwrite") == 0
    assert json.loads(Path("a/study.json").read_text())["versions"]["torch"] != "1.0"


def test_too_small_a_disk_is_refused_before_the_work(toys, capsys, monkeypatch):
    monkeypatch.setattr(Toy, "estimated_bytes", lambda *_: 2**60, raising=False)
    assert run("toy-one") == 2
    assert "GiB of disk for toy-one" in capsys.readouterr().err
    assert not toys["toy-one"].ran
    study = STUDIES["dan2023-cifar10"]
    small, paper = (study.estimated_bytes(scale, None, 1) for scale in ("small", "paper"))
    assert 10**8 < small < paper < 10**10


def test_a_foreign_folder_is_left_alone(toys, capsys):
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    for more in ((), ("--overwrite",)):
        assert run("toy-one", "--out", "mine", *more) == 2
        assert "something else in mine" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["letter.txt"]


def test_studies_side_by_side_keep_their_logs(toys, monkeypatch):
    monkeypatch.setattr(reproduction, "perform", lambda tasks, workers: [t.function(*t.arguments) for t in tasks])
    refused = reproduction._side_by_side(
        [reproduction.Order(name, "small", out=Path("c") / name) for name in toys], Path("c"), Workers("loky", 2)
    )
    assert list(refused) == ["toy-three"]
    assert "toy with 3 points" in Path("c/toy-one.log").read_text()
    assert not Path("c/.tasks").exists()


@pytest.mark.exhaustive
def test_the_list_needs_no_heavy_package():
    code = "import sys; from local_elasticity import cli; import local_elasticity.studies.engine.reproduction as r; "
    code += "r.show_list(False); print(sorted({'sklearn', 'statsmodels', 'matplotlib', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


class Placed(Toy):
    """A study whose networks may lie elsewhere."""

    options = frozenset({"device"})

    def run(self, scale, out, overwrite=False, device="cpu"):
        self.ran.append(device)
        return super().run(scale, out, overwrite)


def test_a_device_goes_to_the_studies_that_take_one_and_to_their_replays(toys, capsys):
    toys["toy-placed"] = placed = Placed()
    order = reproduction.Order("toy-placed", "small", out=Path("a"), device="cpu:0")
    assert reproduction.run(order) == 0
    assert json.loads(Path("a/study.json").read_text())["device"] == "cpu:0"
    assert "--device cpu:0" in reproduction.command(order)
    assert run("--from", "a") == 0
    assert [where for where in placed.ran if isinstance(where, str)] == ["cpu:0", "cpu:0"]
    reproduction.reproduce(["all"], "small", {}, Path("b"), Workers(), False, device="cpu:0")
    assert [where for where in placed.ran if isinstance(where, str)] == ["cpu:0"] * 3
    assert json.loads(Path("b/toy-one-small/study.json").read_text())["device"] == "cpu"
    with pytest.raises(InputError, match=r"one of toy-placed.*toy-one with --device cpu:0"):
        reproduction.run(reproduction.Order("toy-one", "small", out=Path("c"), device="cpu:0"))
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "toy-placed", "--device", "cdua"])
    assert "'cdua'" in capsys.readouterr().err


def test_kept_figures_are_small_and_look_the_same(tmp_path):
    image = pytest.importorskip("PIL.Image", reason='needs Pillow: pip install "local-elasticity[data]"')
    rng = np.random.default_rng(0)
    shades = np.linspace(0, 255, 300)[None, :, None] * np.ones((200, 1, 3)) + rng.normal(0, 2, (200, 300, 3))
    drawn = shades.clip(0, 255).astype(np.uint8)
    image.fromarray(drawn).save(tmp_path / "drawn.png")
    reproduction.keep_figure(tmp_path / "drawn.png", tmp_path / "kept.png")
    with image.open(tmp_path / "kept.png") as kept:
        assert np.abs(np.asarray(kept.convert("RGB"), dtype=float) - drawn).mean() < 4
    assert (tmp_path / "kept.png").stat().st_size < (tmp_path / "drawn.png").stat().st_size / 2
    (tmp_path / "broken.png").write_bytes(b"\x89PNG made by a test")
    reproduction.keep_figure(tmp_path / "broken.png", tmp_path / "copied.png")  # as it is
    assert (tmp_path / "copied.png").read_bytes() == (tmp_path / "broken.png").read_bytes()


def test_a_refused_change_leaves_the_note_as_it_was(toys):
    assert run("toy-one", "--size", "points=7", "--out", "a") == 0
    before = Path("a/study.json").read_text()
    assert run("toy-one", "--size", "points=8", "--out", "a") == 2
    assert json.loads(Path("a/study.json").read_text()) == json.loads(before)


def test_a_replay_needs_the_device_of_the_study(toys, capsys):
    assert run("toy-one", "--out", "a") == 0
    note = json.loads(Path("a/study.json").read_text())
    Path("a/study.json").write_text(json.dumps(note | {"device": "nowhere"}))
    assert run("--from", "a") == 2
    assert "a device that torch can use here" in capsys.readouterr().err
    assert run("--from", "a", "--device", "cuda") == 2
    assert "leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "able"),
    [
        (("--backend", "dask", "--jobs", "4", "--address", "127.0.0.1:1"), "a single task"),
        (("--jobs", "2"), "a single task"),
        (("--train-only",), "wang2021-dynamics"),
        (("--so-far",), "dan2023-cifar10"),
        (("--size", "points=3"), "--size"),
    ],
)
def test_an_option_that_a_study_does_not_take_is_refused_before_the_work(words, able, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("dan2023-ridge", *words) == 2
    said = capsys.readouterr().err
    assert able in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_every_study_says_what_it_takes():
    for name, study in STUDIES.items():
        assert isinstance(study, Study), name
        assert study.title.startswith(name)
        assert set(study.cost) == {"small", "paper"}
    assert {name for name, study in STUDIES.items() if "workers" in study.options} == {
        "dan2023-cifar10", "dan2023-cifar100", "dan2023-modern", "dan2023-svhn", "hesu2020-clustering",
    }  # fmt: skip
