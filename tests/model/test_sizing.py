from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.errors import InfeasibleError
from bfm.model.sizing import Shape, size_model
from tests.model.toys import make_model

SIZES = st.floats(3.0, math.log10(3e8)).map(lambda exponent: 10**exponent)
SHARES = st.one_of(st.just(0.0), st.floats(0, 0.5), st.floats(-6, math.log10(0.5)).map(lambda exponent: 10**exponent))
WIDTHS = st.sampled_from([8, 16, 32, 48, 64, 128, 256])
DEPTHS = st.one_of(st.none(), st.integers(1, 12))


def smallest_contextualizer(d_item: int, depth: int | None, pointer: bool = True) -> int:
    """Two channels: inputs, output, the pointer's queries and keys (half as wide) and gate; blocks of hidden 2."""
    return 6 * d_item + (2 * d_item + 2 if pointer else 0) + 28 * (depth or 1)


def smallest_share(params: float, d_item: int, embedder_depth: int | None = None) -> float:
    """Of an MLP of hidden 2, or of blocks of two channels and hidden 2 where a depth is asked for."""
    return (4 * d_item + 28 * (embedder_depth or 0)) / params


def width_unit_params(shape: Shape) -> tuple[int, int]:
    """What two more channels would add to the contextualizer and to the embedder: no size can be met more closely."""
    wider = dataclasses.replace(shape, width=shape.width + 2)
    unit = {"mlp": "embedder_hidden", "transformer": "embedder_width"}.get(shape.embedder_kind)
    larger = dataclasses.replace(shape, **{unit: getattr(shape, unit) + 2}) if unit else shape
    return (
        wider.contextualizer_params - shape.contextualizer_params,
        larger.embedder_params - shape.embedder_params,
    )


@settings(max_examples=400, deadline=None)
@given(SIZES, SHARES, WIDTHS, st.floats(8, 128), DEPTHS, st.one_of(st.none(), st.integers(0, 6)), st.booleans())
def test_every_size_is_met_or_refused_for_a_stated_bound(params, share, d_item, aspect, depth, embedder_depth, pointer):
    depths = {"depth": depth, "embedder_depth": embedder_depth}
    try:
        shape = size_model(params, share, d_item=d_item, aspect=aspect, pointer=pointer, **depths)
    except InfeasibleError as error:
        if error.key == "embedder_share":
            assert 0 < share < smallest_share(params, d_item, embedder_depth)
        else:
            assert error.key == "params"
            assert params * (1 - share) < smallest_contextualizer(d_item, depth, pointer)
        return
    contextualizer_unit, embedder_unit = width_unit_params(shape)
    assert abs(shape.params - params) <= max(0.03 * params, contextualizer_unit)
    assert abs(shape.embedder_params - share * params) <= max(0.03 * share * params, embedder_unit)
    assert shape.pointer_width == (d_item // 2 if pointer else 0)
    assert depth is None or shape.depth == depth
    for width, heads in ((shape.width, shape.heads), (shape.embedder_width, shape.embedder_heads)):
        assert width % 2 == 0
        assert heads == 0 or (width % heads == 0 and (width // heads) % 2 == 0)
    assert min(shape.width, shape.hidden) >= 2
    assert shape.hidden % 2 == shape.embedder_hidden % 2 == 0


@settings(max_examples=200, deadline=None)
@given(SIZES.filter(lambda params: params > 2 * smallest_contextualizer(64, 1)), SHARES)
def test_with_the_default_width_only_shares_below_the_smallest_are_refused(params, share):
    if 0 < share < smallest_share(params, 64):
        with pytest.raises(InfeasibleError, match="s_min"):
            size_model(params, share, d_item=64)
    else:
        size_model(params, share, d_item=64)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("params", [1e4, 1e5, 1e6, 1e7, 1e8, 3e8])
def test_common_sizes_are_met_within_one_percent(params, share):
    shape = size_model(params, share, d_item=32)
    assert shape.params == pytest.approx(params, rel=0.01)
    assert shape.embedder_share == pytest.approx(share, rel=0.03, abs=128 / params)


@settings(max_examples=200, deadline=None)
@given(SIZES, SHARES, WIDTHS, st.booleans())
def test_a_larger_request_is_a_larger_model(params, share, d_item, pointer):
    """Beyond the tolerance of the smaller one; both parts."""
    if 0 < share < smallest_share(params, d_item) or params * (1 - share) < smallest_contextualizer(
        d_item, None, pointer
    ):
        return
    small = size_model(params, share, d_item=d_item, pointer=pointer)
    contextualizer_unit, embedder_unit = width_unit_params(small)
    more = max(0.06 * params, 2 * contextualizer_unit)
    if share:
        more = max(more, 2 * embedder_unit / share)
    large = size_model(params + more, share, d_item=d_item, pointer=pointer)
    assert large.params > small.params
    assert large.embedder_params >= small.embedder_params
    assert size_model(params, share, d_item=d_item, pointer=pointer) == small


def test_shape_of_wide_models_follows_the_aspect_and_the_swiglu_ratio():
    for params in (1e6, 1e7, 1e8, 3e8):
        for aspect in (16, 32, 64):
            shape = size_model(params, 0.0, d_item=64, aspect=aspect)
            assert shape.width / shape.depth == pytest.approx(aspect, rel=0.35)
            assert shape.hidden / shape.width == pytest.approx(8 / 3, rel=0.3)


def test_smallest_share_is_buildable_and_just_below_is_refused():
    for params, d_item, depth in ((1e4, 32, None), (1e6, 64, None), (1e6, 64, 2), (1e4, 32, 0)):
        share = smallest_share(params, d_item, depth)
        assert size_model(params, share, d_item=d_item, embedder_depth=depth).embedder_params == round(share * params)
        with pytest.raises(InfeasibleError, match=f"s_min = {share:.3g}"):
            size_model(params, 0.98 * share, d_item=d_item, embedder_depth=depth)


@pytest.mark.parametrize(("pointer", "least"), [(False, 1564), (True, 2078)])
def test_the_refusal_of_a_small_model_names_the_smallest_that_works(pointer, least):
    with pytest.raises(InfeasibleError, match=f"minimum {least} for d_item 256") as refusal:
        size_model(least - 1, 0.0, d_item=256, pointer=pointer)
    assert refusal.value.key == "params"
    assert size_model(least, 0.0, d_item=256, pointer=pointer).params == least


@pytest.mark.parametrize("pointer", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_params_are_the_matmul_weights_of_both_parts(share, pointer):
    model = make_model(shape=size_model(3e4, share, d_item=16, pointer=pointer))
    weights = {name: weight.numel() for name, weight in model.named_parameters()}
    matrices = {name for name, weight in model.named_parameters() if weight.dim() == 2}
    contextualizer = sum(
        size for name, size in weights.items() if name in matrices and name.startswith("contextualizer.")
    )
    embedder = sum(size for name, size in weights.items() if name.startswith("embedder.residual."))
    assert contextualizer == model.shape.contextualizer_params
    assert embedder == model.shape.embedder_params
    biases = {f"contextualizer.pointer.{name}_bias" for name in ("gate", "distance", "elapsed")} if pointer else set()
    assert {name for name in weights if name.startswith("contextualizer.")} - matrices == biases


def test_shapes_survive_json():
    shape = size_model(1e5, 0.3, d_item=32)
    assert Shape(**shape.as_dict()) == shape
