"""From a size to a model: (N, share s, retrieval width) to widths and depths, and back to exact counts.

Enters: N (every dense weight after the field tokens and before the final logits), the embedder's share of it,
`d_item`, the aspect (width / depth) and, where wanted, depths. Leaves: a `Shape`, whose matmul weights are counted
exactly. Norms have no parameters and nothing has a bias, so N is the sum of the matmul weights:

    contextualizer  2 d_item w (item and context inputs) + depth (4 w^2 + 3 w hidden) + w d_item (output)
    pointer         w (2 key width + 1), of the contextualizer; the key width is half of d_item
    neighbours      2 w (key and gate), of the contextualizer; none where their share is given
    MLP embedder    2 d_item hidden, on the pooled vector, added to the path of s = 0
    transformer     2 d_item w + depth (4 w^2 + 3 w hidden), on the field tokens, pooled, added to the same path

Widths are even and lie on a grid that grows with them; `hidden` (about 8/3 w) then moves in steps of 2 to meet N.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

from bfm.errors import InfeasibleError
from bfm.events.neighbours import LAST_EVENTS

_HIDDEN_RATIO = 8 / 3

EmbedderKind = Literal["none", "mlp", "transformer"]


@dataclass(frozen=True)
class Shape:
    """Widths and depths of both parts. Embedder fields that its kind does not have are 0."""

    d_item: int
    """Retrieval width: item vectors, output vectors, field tokens."""
    width: int
    """Residual width of the contextualizer."""
    depth: int
    heads: int
    hidden: int
    """SwiGLU width of the contextualizer's blocks."""
    pointer_width: int = 0
    """Width of the pointer's queries and keys; 0: no pointer."""
    embedder_kind: EmbedderKind = "none"
    embedder_width: int = 0
    embedder_depth: int = 0
    embedder_heads: int = 0
    embedder_hidden: int = 0
    """Hidden width of the MLP, or SwiGLU width of the embedder's blocks."""
    counted_events: int = 0
    """Last events whose counted neighbours are mixed in; 0: none."""
    counts_share: float = 0.0
    """Share of these in the mixture; 0: learned."""

    @property
    def embedder_params(self) -> int:
        """Weights of the embedder: 0 at s = 0."""
        if self.embedder_kind == "none":
            return 0
        if self.embedder_kind == "mlp":
            return 2 * self.d_item * self.embedder_hidden
        stack = _block_params(self.embedder_width, self.embedder_depth, self.embedder_hidden)
        return 2 * self.d_item * self.embedder_width + stack

    @property
    def contextualizer_params(self) -> int:
        """Weights of the contextualizer, its input and output projections and sparse components included."""
        return self.edge * self.width + _block_params(self.width, self.depth, self.hidden)

    @property
    def edge(self) -> int:
        """Weights of the contextualizer outside its blocks, per channel: inputs, output and sparse components."""
        pointer = 2 * self.pointer_width + 1 if self.pointer_width else 0
        return 3 * self.d_item + pointer + (2 if self.learns_counts else 0)

    @property
    def learns_counts(self) -> bool:
        """Whether the network decides how much counted neighbours say."""
        return self.counted_events > 0 and self.counts_share == 0.0

    @property
    def components(self) -> tuple[str, ...]:
        """Names of what the network mixes, in the order of its gates."""
        sparse = (("pointer", self.pointer_width), ("neighbours", self.learns_counts))
        return ("softmax", *(name for name, size in sparse if size))

    @property
    def params(self) -> int:
        """Realised N."""
        return self.embedder_params + self.contextualizer_params

    @property
    def embedder_share(self) -> float:
        """Realised s."""
        return self.embedder_params / self.params

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)


@functools.lru_cache(maxsize=1024)
def size_model(
    params: float,
    embedder_share: float,
    *,
    d_item: int,
    aspect: float = 32.0,
    depth: int | None = None,
    embedder_depth: int | None = None,
    pointer: bool = True,
    neighbours: bool = False,
    counts_share: float = 0.0,
) -> Shape:
    """The model of N = `params` with embedder share s = `embedder_share`, and the sparse components asked for.

    N and the embedder's size are met within the larger of 3 % and one width unit (2 channels).
    `embedder_depth` None chooses: an MLP for small embedders, a transformer once its single layer would be at least
    half as wide as d_item; 0 always takes the MLP, 1 and more a transformer of that depth.
    Raises InfeasibleError for 0 < s < s_min(N) and for N below the minimum of this d_item; both messages name the
    bound. Ranges are checked with the configuration.
    """
    embedder = _size_embedder(params, embedder_share, d_item, aspect, embedder_depth)
    embedder = dataclasses.replace(
        embedder,
        pointer_width=d_item // 2 if pointer else 0,
        counted_events=LAST_EVENTS if neighbours else 0,
        counts_share=counts_share,
    )
    smallest = _smallest_stack(embedder.edge, depth or 1)
    if params * (1 - embedder_share) < smallest:
        least = math.ceil(smallest / (1 - embedder_share))
        raise InfeasibleError(
            f"N = {params:g} is below the minimum {least} for d_item {d_item}, s = {embedder_share:g}"
            + (f", depth {depth}" if depth else ""),
            key="params",
            fix="take a larger N or a smaller d_item",
        )
    budget = max(params - embedder.embedder_params, smallest)
    width, layers, hidden = _size_stack(budget, embedder.edge, aspect, depth)
    return dataclasses.replace(embedder, width=width, depth=layers, heads=_choose_heads(width), hidden=hidden)


def _size_embedder(params: float, share: float, d_item: int, aspect: float, embedder_depth: int | None) -> Shape:
    """A shape whose contextualizer is still empty."""
    bare = Shape(d_item=d_item, width=0, depth=0, heads=0, hidden=0)
    if share == 0:
        return bare
    budget = params * share
    smallest = _smallest_embedder(d_item, embedder_depth)
    # A share computed from the bound must not be refused for a rounding error.
    if budget < smallest * (1 - 1e-9):
        raise InfeasibleError(
            f"{share:g} is below s_min = {smallest / params:.3g}, the smallest embedder of N = {params:g}"
            f" at d_item {d_item}",
            key="embedder_share",
            fix="take 0 or at least s_min",
        )
    if embedder_depth is None:
        transformer = budget >= max(4 * d_item**2, _smallest_stack(2 * d_item, 1))
    else:
        transformer = embedder_depth > 0
    if not transformer:
        hidden = 2 * max(1, round(budget / (4 * d_item)))
        return dataclasses.replace(bare, embedder_kind="mlp", embedder_hidden=hidden)
    width, depth, hidden = _size_stack(budget, 2 * d_item, aspect, embedder_depth)
    return dataclasses.replace(
        bare,
        embedder_kind="transformer",
        embedder_width=width,
        embedder_depth=depth,
        embedder_heads=_choose_heads(width),
        embedder_hidden=hidden,
    )


def _size_stack(budget: float, fixed: int, aspect: float, depth: int | None) -> tuple[int, int, int]:
    """(width, depth, hidden) with fixed * width + depth (4 width^2 + 3 width hidden) as near `budget` as can be."""
    layers = depth if depth is not None else _choose_depth(budget, fixed, aspect)
    width = _on_grid(_ideal_width(budget, fixed, layers))
    while True:
        hidden = 2 * round((budget - fixed * width - 4 * layers * width**2) / (6 * layers * width))
        if hidden >= width or width == 2:
            return width, layers, max(2, hidden)
        width -= _grid_step(width - 1)


def _ideal_width(budget: float, fixed: int, depth: int) -> float:
    """Root of (4 + 3 * 8/3) depth w^2 + fixed w = budget."""
    square = (4 + 3 * _HIDDEN_RATIO) * depth
    return (math.sqrt(fixed**2 + 4 * square * budget) - fixed) / (2 * square)


def _choose_depth(budget: float, fixed: int, aspect: float) -> int:
    """The depth whose width / depth is nearest `aspect` on the log scale; falls with depth, so the walk ends."""
    depth = 1
    while _ideal_width(budget, fixed, depth) * _ideal_width(budget, fixed, depth + 1) > aspect**2 * depth * (depth + 1):
        depth += 1
    return depth


def _grid_step(width: float) -> int:
    """Distance between allowed widths: 2 channels for narrow models, 64 for wide ones."""
    for bound, step in ((16, 2), (64, 4), (128, 8), (256, 16), (512, 32)):
        if width < bound:
            return step
    return 64


def _on_grid(width: float) -> int:
    step = _grid_step(width)
    return max(2, step * round(width / step))


def _choose_heads(width: int) -> int:
    """Heads of an even dimension, near 16 for narrow, 32 for middle and 64 for wide models."""
    target = 16 if width < 64 else 32 if width < 256 else 64

    def cost(head_dim: int) -> tuple[float, int]:
        # Attention kernels on GPUs want multiples of 8.
        odd = 0.5 if width >= 64 and head_dim % 8 else 0.0
        return abs(math.log(head_dim / target)) + odd, head_dim

    return width // min((dim for dim in range(2, width + 1, 2) if width % dim == 0), key=cost)


def _block_params(width: int, depth: int, hidden: int) -> int:
    return depth * (4 * width**2 + 3 * width * hidden)


def _smallest_stack(fixed: int, depth: int) -> int:
    return 2 * fixed + _block_params(2, depth, 2)


def _smallest_embedder(d_item: int, embedder_depth: int | None) -> int:
    return _smallest_stack(2 * d_item, embedder_depth) if embedder_depth else 4 * d_item
