"""The hull of all curves against brute force, planted truth and published exponents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from bfm.errors import UserError
from bfm.laws.hull import fit_hull, lower_hull
from bfm.laws.runs import Runs
from bfm.laws.tables import read_table
from tests.helpers import published


def table(params_R, events_R, flops_R, loss_R, curve_R):
    columns = {"params": params_R, "events": events_R, "flops": flops_R, "loss": loss_R, "curve": curve_R}
    names = tuple(f"run {place}" for place in range(len(params_R)))
    return Runs("curves", columns, names, "loss", {"loss": loss_R}, {}, {})


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 60))
def test_the_hull_is_what_a_vantage_point_leaves(seed, count):
    x_R, y_R = np.random.default_rng(seed).normal(size=(2, count))
    above = np.array([[x_R.max() + 50, y_R.max() + 50]])
    places = ConvexHull(np.concatenate([np.stack([x_R, y_R], 1), above])).vertices
    places = sorted((place for place in places if place < count), key=lambda place: x_R[place])
    kept = [place for number, place in enumerate(places) if all(y_R[place] < y_R[one] for one in places[:number])]
    mine = lower_hull(x_R, y_R)
    assert mine[-1] == np.argmin(y_R)
    # From a finite vantage point a last vertex left of the leftmost one's shadow cannot differ; rising ones are cut.
    assert set(mine) <= set(kept)
    for place in range(count):
        under = np.interp(x_R[place], x_R[mine], y_R[mine], left=-np.inf, right=-np.inf)
        assert y_R[place] >= under - 1e-12


def planted(sizes):
    params_R = np.repeat(sizes, 40)
    flops_R = np.tile(np.logspace(16, 21, 40), len(sizes))
    events_R = flops_R / 6 / params_R
    loss_R = 1.8 + 400 * params_R**-0.34 + 400 * events_R**-0.34
    return table(params_R, events_R, flops_R, loss_R, np.repeat([f"{n:g}" for n in sizes], 40))


def test_a_planted_surface_gives_half_and_half():
    fit = fit_hull(planted(np.logspace(6.5, 10, 24)))
    assert fit.parameters["N_exponent"].estimate == pytest.approx(0.5, abs=0.03)
    assert fit.parameters["D_exponent"].estimate == pytest.approx(0.5, abs=0.03)
    assert fit.parameters["N_exponent"].low < 0.5 < fit.parameters["N_exponent"].high
    assert fit.as_dict()["hull"][0]["flops"] == pytest.approx(1e16)


def test_one_size_and_short_hulls_are_refused():
    with pytest.raises(UserError, match="at least 2 other sizes"):
        fit_hull(planted(np.array([1e8])))
    runs = planted(np.array([1e7, 1e8]))
    with pytest.raises(UserError, match="a line needs 3"):
        fit_hull(runs.select(np.array([0, 40, 79])))


def test_few_curves_are_doubted():
    fit = fit_hull(planted(np.logspace(7, 9, 4)))
    assert any("4 curves are few" in warning for warning in fit.warnings)


@pytest.mark.parametrize(
    ("points", "params", "tokens"),
    [
        ("hot_477", 0.4994, 0.4810),
        ("hot_100b+_477", 0.4579, 0.5249),
        ("hot_120b+_only_477", 0.7987, 0.1828),
        ("lr_ablation_hot_477", 0.5131, 0.4858),
        ("cool_end", 0.5970, 0.3933),
    ],
)
def test_published_exponents(points, params, tokens):
    """McLeish et al. 2025, approach 1; C of a shape per token is the one counted in the curves' table."""
    path = published(f"gemstones/wandb_dfs/wandb_df_for_fitting_{points}.jsonl")
    curves = read_table(published("curves/gemstones_curves.parquet"), ["width", "depth", "flops", "tokens"]).to_pydict()
    per_token = {
        (width, depth): flops / tokens
        for width, depth, flops, tokens in zip(*(curves[c] for c in ("width", "depth", "flops", "tokens")), strict=True)
    }
    found = read_table(path, ["params_active_precise", "tokens", "final_loss"]).to_pydict()
    shapes = list(zip(found["width"], found["depth"], strict=True))
    tokens_R = np.array(found["tokens"], float)
    runs = table(
        np.array(found["params_active_precise"], float),
        tokens_R,
        tokens_R * [per_token[shape] for shape in shapes],
        np.array(found["final_loss"]),
        np.array([f"{width}x{depth}" for width, depth in shapes]),
    )
    fit = fit_hull(runs)
    assert fit.parameters["N_exponent"].estimate == pytest.approx(params, abs=1e-4)
    assert fit.parameters["D_exponent"].estimate == pytest.approx(tokens, abs=1e-4)
    assert fit.parameters["N_exponent"].low < fit.parameters["N_exponent"].high
