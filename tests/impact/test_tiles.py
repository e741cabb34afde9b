import joblib
import pytest
import torch
from torch.nn import functional as F

from local_elasticity.base.errors import InputError
from local_elasticity.impact import gradient_gram, measure, measure_tiles, tiles
from local_elasticity.impact.update import SGD
from local_elasticity.networks import MLP


def problem():
    torch.manual_seed(0)
    x, y = torch.randn(13, 6, dtype=torch.float64), torch.arange(13) % 3
    return MLP(6, 3, width=8).double(), (x, y), torch.cat([torch.randn(7, 6, dtype=torch.float64), x[:3]])


@pytest.mark.parametrize("engine", ["linear", "replay"])
def test_tiles_are_the_whole_matrix(tmp_path, engine):
    model, sources, targets = problem()
    whole = measure(model, F.cross_entropy, sources, targets, update=SGD(0.1), engine=engine)
    found = measure_tiles(
        model, F.cross_entropy, sources, targets, update=SGD(0.1), engine=engine, out=tmp_path / "p.zarr", tile=5
    )
    for name in ("change", "before", "source_before", "source_change", "losses", "self_index"):
        torch.testing.assert_close(torch.as_tensor(found[name].values), getattr(whole, name), rtol=1e-10, atol=1e-14)
    assert found.change.dims == ("source", "target", "output")


def gradients(model, sources):
    rows = []
    for x, y in zip(sources[0].split(1), sources[1].split(1), strict=True):
        got = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in got]))
    return torch.stack(rows)


def test_gram_computes_the_upper_triangle_only(tmp_path, monkeypatch):
    model, sources, _ = problem()
    seen, work = [], tiles.contract
    monkeypatch.setattr(tiles, "contract", lambda *args: seen.append(args) or work(*args))
    found = gradient_gram(model, F.cross_entropy, sources, out=tmp_path / "g.zarr", tile=5)
    rows = gradients(model, sources)
    torch.testing.assert_close(torch.as_tensor(found.gram.values), rows @ rows.T, rtol=1e-10, atol=1e-14)
    assert len(seen) == 6  # of 9 tiles


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model, sources, targets = problem()
    arguments = (model, F.cross_entropy, sources, targets)
    settings = {"update": SGD(0.1), "out": tmp_path / "p.zarr", "tile": 5}
    calls, work = [], tiles.measure

    def killed(*args, **rest):
        calls.append(1)
        if len(calls) == 4:  # the first call reads the shapes
            raise KeyboardInterrupt
        return work(*args, **rest)

    monkeypatch.setattr(tiles, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        measure_tiles(*arguments, **settings)
    calls.clear()
    monkeypatch.setattr(tiles, "measure", lambda *a, **r: calls.append(1) or work(*a, **r))
    found = measure_tiles(*arguments, **settings)
    assert len(calls) == 1 + 6 - 2
    whole = measure(*arguments, update=SGD(0.1), engine="linear")
    torch.testing.assert_close(torch.as_tensor(found.change.values), whole.change, rtol=1e-10, atol=1e-14)
    calls.clear()
    measure_tiles(*arguments, **settings)
    assert len(calls) == 1


def test_a_store_of_something_else_is_refused(tmp_path):
    model, sources, targets = problem()
    arguments = (F.cross_entropy, sources, targets)
    out = tmp_path / "p.zarr"
    measure_tiles(model, *arguments, update=SGD(0.1), out=out, tile=5)
    with pytest.raises(InputError, match="same weights"):
        measure_tiles(model, *arguments, update=SGD(0.2), out=out, tile=5)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(InputError, match="same weights"):
        measure_tiles(model, *arguments, update=SGD(0.1), out=out, tile=5)
    measure_tiles(model, *arguments, update=SGD(0.1), out=out, tile=5, overwrite=True)
    (tmp_path / "file").write_text("no store")
    with pytest.raises(InputError, match="zarr store"):
        measure_tiles(model, *arguments, update=SGD(0.1), out=tmp_path / "file")
    with pytest.raises(InputError, match="engine: one of 'linear', 'replay'"):
        measure_tiles(model, *arguments, update=SGD(0.1), out=tmp_path / "q.zarr", engine="auto")


@pytest.mark.exhaustive
def test_tiles_spread_by_joblib(tmp_path):
    model, sources, targets = problem()
    settings = {"update": SGD(0.1), "tile": 5}
    one = measure_tiles(model, F.cross_entropy, sources, targets, out=tmp_path / "a.zarr", **settings)
    with joblib.parallel_config(backend="loky", n_jobs=2):
        two = measure_tiles(model, F.cross_entropy, sources, targets, out=tmp_path / "b.zarr", **settings)
    assert (one.change.values == two.change.values).all()
