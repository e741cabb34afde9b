import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from synthetic_runs import heavy, synthetic, with_gaps

from local_elasticity.base.errors import InputError
from local_elasticity.report import class_pair_curves, heat_map, intra_inter, save, write_all

VARIANTS = {
    "plain": lambda: synthetic(snapshots=4),
    "replicas": lambda: synthetic(replicas=2, snapshots=3),
    "two classes": lambda: synthetic(2, snapshots=4),
    "twelve classes": lambda: synthetic(12, snapshots=3),
    "one snapshot": lambda: synthetic(snapshots=1),
    "gaps": lambda: with_gaps(synthetic(snapshots=5)),
    "heavy tails": lambda: heavy(synthetic(snapshots=4)),
    "no interval": lambda: synthetic(snapshots=3).drop_vars(
        ["interval_low", "interval_high", "intra_low", "intra_high"]
    ),
    "odd names": lambda: synthetic(names=["$x_1$ $", "_hidden", "a very long class name indeed"], snapshots=3),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_is_drawn(make):
    dataset = make()
    for draw in (class_pair_curves, intra_inter, heat_map):
        figure = draw(dataset)
        FigureCanvasAgg(figure).draw()
        assert np.asarray(figure.canvas.buffer_rgba())[..., :3].std() > 5


def lines(axis):
    return {str(line.get_label()): line for line in axis.lines}


def test_class_pair_curves_draw_the_means_and_the_intervals():
    dataset = synthetic(definitions=("kl", "he_su"), updates=("adam:0.0001", "sgd:0.01"), snapshots=7)
    figure = class_pair_curves(dataset, definition="he_su", update="sgd:0.01")
    chosen = dataset.sel(definition="he_su", update="sgd:0.01")
    for axis, anchor in zip(figure.axes, ("airplane", "automobile", "ship"), strict=True):
        assert axis.get_title() == f"step on {anchor}"
        drawn = lines(axis)
        for target in ("airplane", "automobile", "ship"):
            np.testing.assert_array_equal(drawn[target].get_xdata(), dataset["epoch"])
            expected = chosen["mean"].sel(source_class=anchor, target_class=target)
            np.testing.assert_array_equal(drawn[target].get_ydata(), expected)
        assert drawn[anchor].get_color() == "#0072B2"
        styles = {(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in drawn.values()}
        assert len({s[0] for s in styles}) == len({s[1] for s in styles}) == len({s[2] for s in styles}) == 3
        band = axis.collections[0].get_paths()[0].vertices[:, 1]
        row = chosen.sel(source_class=anchor, target_class="airplane")
        assert band.min() == pytest.approx(float(row["interval_low"].min()))
        assert band.max() == pytest.approx(float(row["interval_high"].max()))


def test_twelve_curves_differ_in_every_panel():
    for axis in class_pair_curves(synthetic(12, snapshots=3)).axes:
        styles = {(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in axis.lines}
        assert len(styles) == 12


def test_titles_say_what_was_drawn():
    title = intra_inter(synthetic(snapshots=3)).get_suptitle().replace("\n", " ").replace("\u00a0", " ")
    for part in ("kl_published", "adam:0.0001", "400 pairs a cell", "95 % bootstrap interval", "seed 1234"):
        assert part in title
    replicated = class_pair_curves(synthetic(replicas=3, snapshots=3)).get_suptitle()
    assert "±1 SD over 3 replicas" in replicated.replace("\n", " ").replace("\u00a0", " ")


def test_intra_inter_draws_the_averages_and_the_scalars():
    dataset = synthetic(snapshots=6)
    top, loss, accuracy = intra_inter(dataset).axes
    one = dataset.isel(update=0, definition=0)
    np.testing.assert_array_equal(lines(top)["own class (intra)"].get_ydata(), one["intra"])
    np.testing.assert_array_equal(lines(top)["others (inter)"].get_ydata(), one["inter"])
    np.testing.assert_array_equal(lines(loss)["train_loss"].get_ydata(), dataset["train_loss"])
    np.testing.assert_array_equal(lines(accuracy)["probe_accuracy"].get_ydata(), dataset["probe_accuracy"])
    assert top.get_shared_x_axes().joined(top, accuracy)


@pytest.mark.parametrize("width", [3.3, 6.9])
def test_legends_cover_no_data(width):
    dataset = synthetic(names=["airplane", "a longer class name", "ship"], snapshots=12)
    for draw in (intra_inter, class_pair_curves):
        figure = draw(dataset, width=width)
        FigureCanvasAgg(figure).draw()
        for legend in [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]:
            box = legend.get_window_extent()
            assert box.x1 <= figure.bbox.x1 + 1
            for line in (line for axis in figure.axes for line in axis.lines):
                points = line.axes.transData.transform(line.get_xydata())
                assert not box.padded(-1).count_contains(points)


def test_heavy_tails_show_medians_on_a_log_axis():
    dataset = heavy(synthetic(snapshots=8))
    mean, median = intra_inter(dataset).axes[:2]
    assert median.get_yscale() == "log"
    assert "median" in median.get_ylabel()
    assert "median" not in mean.get_ylabel()
    same = np.eye(3, dtype=bool)
    expected = dataset["median"].values[:, 0, 0][:, same].mean(1)
    np.testing.assert_allclose(lines(median)["own class (intra)"].get_ydata(), expected)
    assert len(class_pair_curves(dataset).axes) == 6
    assert len([axis for axis in heat_map(dataset).axes if axis.images]) == 2


def test_heat_map_shows_the_cells_of_the_step():
    dataset = with_gaps(synthetic(snapshots=5), step=2)
    axis = heat_map(dataset, step=int(dataset["step"][2])).axes[0]
    values = dataset["mean"].values[2, 0, 0]
    np.testing.assert_array_equal(axis.images[0].get_array().filled(np.nan), values)
    texts = np.array([text.get_text() for text in axis.texts]).reshape(3, 3)
    assert texts[0, 1] == texts[1, 0] == "–"
    assert texts[2, 2] == f"{values[2, 2]:.2f}"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["airplane", "automobile", "ship"]
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("step on class", "class moved")
    low, high = axis.images[0].get_clim()
    assert (low + high) / 2 == pytest.approx(1)


@pytest.mark.exhaustive
def test_a_hundred_classes(tmp_path):
    dataset = synthetic(100, snapshots=2)
    with pytest.raises(InputError, match="intra_inter"):
        class_pair_curves(dataset)
    assert len(class_pair_curves(dataset, classes=["class 003", "class 050"]).axes) >= 2
    assert not heat_map(dataset).axes[0].texts
    names = {path.name for path in write_all(dataset, tmp_path)}
    assert names == {
        f"{kind}-kl_published-adam_0.0001.{end}" for kind in ("intra_inter", "heat_map") for end in ("png", "pdf")
    }


@pytest.mark.exhaustive
def test_write_all_writes_every_combination_under_its_own_name(tmp_path):
    paths = write_all(synthetic(2, snapshots=2, updates=("adam:1", "adam/1")), tmp_path / "new")
    assert len(set(paths)) == len(paths) == 2 * 3 * 2
    assert all(path.stat().st_size > 1000 for path in paths)


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    first, second = (save(heat_map(synthetic(snapshots=2)), tmp_path, name) for name in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [({"definition": "kl_publishd"}, "kl_published"), ({"update": "adam:0.001"}, "adam:0.0001")],
)
@pytest.mark.parametrize("draw", [class_pair_curves, intra_inter, heat_map])
def test_unknown_names_are_refused_with_the_nearest(draw, arguments, hint):
    with pytest.raises(InputError, match=f"did you mean '{hint}'"):
        draw(synthetic(snapshots=2), **arguments)


def test_a_step_that_was_not_measured_is_refused():
    with pytest.raises(InputError, match="step=10"):
        heat_map(synthetic(snapshots=3), step=11)


def test_an_unknown_class_is_refused():
    with pytest.raises(InputError, match="airplane"):
        class_pair_curves(synthetic(snapshots=2), classes=["airplan"])


def test_drawing_leaves_matplotlib_as_it_was():
    code = (
        "import sys, local_elasticity.report as r;"
        "assert 'matplotlib' not in sys.modules and 'plotly' not in sys.modules;"
        "from matplotlib import rcParams;"
        "settings = lambda: {k: rcParams[k] for k in rcParams if k != 'backend'};"
        "before = settings(); sys.path.insert(0, sys.argv[1]);"
        "from synthetic_runs import synthetic; r.heat_map(synthetic(snapshots=2));"
        "assert settings() == before and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], check=True)
