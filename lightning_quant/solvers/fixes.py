"""What a column of a weight becomes: rounded to a number format, masked, both, or reduced to two values."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_quant.quantizers import Quantizer, RangeRule, build_quantizer

__all__ = ["Binarizing", "Fix", "Masking", "OnGrid", "Rounding", "settle"]


class Fix(ABC):
    """Decides the value of one column after another; used up by one weight.

    Attributes:
        span: how many columns it wants to see at once: they are never parted by the end of a block.
    """

    span: int = 1

    def start(self, weight: Tensor, order: Tensor) -> None:  # noqa: B027  most of them have nothing to prepare
        """Before the first column.

        Args:
            weight: the whole weight, (out, in), its columns where they belong.
            order: which of them is taken first, second, and so on: (in,).
        """

    def look_ahead(self, ahead: Tensor, position: int, spread: Tensor) -> None:  # noqa: B027
        """Before each column.

        Args:
            ahead: the columns from this one to the end of the block, as errors have left them: (out, columns).
            position: the number of this one in the order.
            spread: :math:`U_{ii}` of the columns ahead; :math:`w^2 / U_{ii}^2` is what it costs to lose a weight.
        """

    @abstractmethod
    def __call__(self, column: Tensor, position: int) -> Tensor:
        """The value of the column: (out,)."""


class Rounding(Fix):
    """Rounds to the nearest value of a weight's number format.

    The scales are found on the weight that the solver starts from. Those of groups are found when a group's turn comes,
    on what errors have made of it until then; ``static`` finds them too in the beginning.

    Args:
        quantizer: of the weight; what it knows is not looked at.
        rule: how ranges are found.
        static: find the scales of groups before the first column.

    Attributes:
        state: the scales, in the order of ``quantizer.state_names``.

    Raises:
        ValueError: if the format is dynamic.
    """

    def __init__(self, quantizer: Quantizer, rule: RangeRule | str = "minmax", static: bool = False) -> None:
        scheme = quantizer.scheme
        if scheme.dynamic:
            raise ValueError(f"{quantizer!r} is dynamic; a weight has static scales")
        self.scheme, self.rule = scheme, RangeRule.parse(rule)
        self.size = scheme.group_size
        self.grows = self.size is not None and not static
        self.span = self.size if self.size is not None and self.grows else 1
        self.state: list[Tensor] = []
        self._grid = self._blank()
        self._groups: list[int] = []

    def start(self, weight: Tensor, order: Tensor) -> None:
        """Find the scales, or make room for those of the groups."""
        if self.grows:
            if not torch.equal(order, torch.arange(len(order), device=order.device)):
                raise ValueError("columns out of their order need static_groups=True: a group is not in one place")
            shape = (len(weight), math.ceil(weight.shape[1] / (self.size or 1)))
            self.state = [torch.empty(shape, device=weight.device) for _ in self._grid.state_names]
        else:
            self.state = list(self._found(self._blank(self.size), weight))
        self._groups = [] if self.size is None else [place // self.size for place in order.tolist()]

    def look_ahead(self, ahead: Tensor, position: int, spread: Tensor) -> None:
        """Find the scales of a group whose turn has come."""
        if self.grows and position % self.span == 0:
            for scales, found in zip(self.state, self._found(self._blank(), ahead[:, : self.span]), strict=True):
                scales[:, position // self.span] = found

    def __call__(self, column: Tensor, position: int) -> Tensor:
        """Round a column."""
        return self._grid.simulate(column, *self._of(position))

    def nearest(self, weight: Tensor) -> Tensor:
        """The whole weight rounded without any solver, by scales found on it."""
        quantizer = self._blank(self.size)
        self.state = list(self._found(quantizer, weight))
        return quantizer.rounded(weight.double())

    def _of(self, position: int) -> list[Tensor]:
        return [value[:, self._groups[position]] for value in self.state] if self._groups else self.state

    def _blank(self, size: int | None = None) -> Quantizer:
        """An uncalibrated quantizer of the format; without a size, a group is a channel of its own."""
        scheme = self.scheme
        if scheme.granularity == "group" and size is None:
            scheme = type(scheme).parse(str(scheme).replace(f"_g{self.size}", "_channel"))
        return build_quantizer(scheme, axis=0)

    def _found(self, quantizer: Quantizer, weight: Tensor) -> tuple[Tensor, ...]:
        quantizer.to(weight.device).fit(weight, self.rule)
        return tuple(getattr(quantizer, name) for name in quantizer.state_names)


def settle(quantizer: Quantizer, state: Sequence[Tensor], values: Tensor) -> None:
    """Leave a solved weight in its quantizer: scales and codes.

    Args:
        quantizer: of the weight.
        state: its scales, in the order of ``quantizer.state_names``.
        values: the weight as it was solved, all of it values of the format.

    Example:
        >>> quantizer = build_quantizer("int4_asym_channel", axis=0)
        >>> rounding, weight = Rounding(quantizer), torch.randn(3, 5)
        >>> values = rounding.nearest(weight)
        >>> settle(quantizer, rounding.state, values)
        >>> torch.allclose(quantizer(weight), values.float())
        True
    """
    quantizer.reset()
    for name, value in zip(quantizer.state_names, state, strict=True):
        setattr(quantizer, name, value.float())
    quantizer.solve(quantizer.encode(values.float()))


class OnGrid(Fix):
    """Rounds to the grid that a quantizer has already, so that its scales go on to serve.

    Args:
        quantizer: of the weight, calibrated.
        rows: which rows of the weight are solved.
    """

    def __init__(self, quantizer: Quantizer, rows: slice = slice(None)) -> None:
        self.quantizer, self.size = quantizer, quantizer.scheme.group_size
        state = [getattr(quantizer, name) for name in quantizer.state_names]
        self.state = [part[rows] if part.dim() else part for part in state]
        self._order: list[int] = []

    def start(self, weight: Tensor, order: Tensor) -> None:
        """Note where the columns belong."""
        self._order = order.tolist()

    def __call__(self, column: Tensor, position: int) -> Tensor:
        """Round a column."""
        group = self._order[position] // self.size if self.size is not None else None
        return self.quantizer.simulate(column, *(part if group is None else part[:, group] for part in self.state))


class Masking(Fix):
    r"""Sets weights to 0, those whose loss costs least by :math:`w^2 / U_{ii}^2`, and leaves the others as they are.

    Args:
        density: which share of the weights is kept, over all rows of ``mask_block`` columns.
        pattern: ``(n, m)``: n of every m consecutive weights of a row are 0; in the place of a density.
        mask: a ready mask, (out, in), true where a weight is kept; in the place of both.
        mask_block: columns that are chosen from at once.
        then: how the kept weights are fixed; ``None`` leaves them as they are.

    Attributes:
        kept: the mask, (out, in), its columns in the order of the solver.

    Raises:
        ValueError: if not exactly one of density, pattern and mask is given, or the pattern does not divide the weight.
    """

    def __init__(
        self,
        density: float | None = None,
        pattern: tuple[int, int] | None = None,
        mask: Tensor | None = None,
        mask_block: int = 128,
        then: Fix | None = None,
    ) -> None:
        if sum(given is not None for given in (density, pattern, mask)) != 1:
            raise ValueError("give one of density, pattern and mask")
        if density is not None and not 0 <= density <= 1:
            raise ValueError(f"density={density} is no share from 0 to 1")
        if pattern is not None and not 0 < pattern[0] < pattern[1]:
            raise ValueError(f"pattern={pattern}: of every m weights 1 to m - 1 are 0, as in (2, 4)")
        self.density, self.pattern, self.mask, self.then = density, pattern, mask, then
        self.width = 1 if mask is not None else pattern[1] if pattern is not None else mask_block
        inner = 1 if then is None else then.span
        self.span = math.lcm(self.width, inner)
        self.kept = torch.empty(0, dtype=torch.bool)

    def start(self, weight: Tensor, order: Tensor) -> None:
        """Look at a ready mask, or make room for one."""
        if self.pattern is not None and weight.shape[1] % self.width:
            raise ValueError(f"{weight.shape[1]} inputs are no multiple of {self.width}: take another pattern, or skip")
        if self.pattern is not None and not torch.equal(order, torch.arange(len(order), device=order.device)):
            raise ValueError("a pattern holds for neighbours, so act_order must be False")
        self.kept = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        if self.mask is not None:
            self.kept = self.mask.to(weight.device)[:, order]
        if self.then is not None:
            self.then.start(weight, order)

    def look_ahead(self, ahead: Tensor, position: int, spread: Tensor) -> None:
        """Choose the weights to lose among the columns whose turn has come."""
        if self.mask is None and position % self.width == 0:
            score = (ahead[:, : self.width] / spread[: self.width]).square()
            self.kept[:, position : position + self.width] = self._chosen(score)
        if self.then is not None:
            self.then.look_ahead(ahead, position, spread)

    def __call__(self, column: Tensor, position: int) -> Tensor:
        """Set what is masked to 0."""
        fixed = column if self.then is None else self.then(column, position)
        return fixed * self.kept[:, position]

    def _chosen(self, score: Tensor) -> Tensor:
        if self.pattern is not None:
            lost = score.argsort(1)[:, : self.pattern[0]]
            return torch.ones_like(score, dtype=torch.bool).scatter_(1, lost, False)
        assert self.density is not None
        count = round((1 - self.density) * score.numel())
        kept = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
        kept[score.flatten().argsort()[:count]] = False
        return kept.reshape(score.shape)


class Binarizing(Fix):
    r"""Leaves two values in each row of a group, :math:`\pm \alpha` with :math:`\alpha = \text{mean} |w|`.

    Args:
        group: columns that share :math:`\alpha`; ``None`` finds one for the whole row in the beginning.

    Attributes:
        alpha: (out, groups).
    """

    def __init__(self, group: int | None = None) -> None:
        self.group, self.span = group, group or 1
        self.alpha = torch.empty(0)

    def start(self, weight: Tensor, order: Tensor) -> None:
        """Find one size for each row, or make room for those of the groups."""
        groups = 1 if self.group is None else -(-weight.shape[1] // self.group)
        self.alpha = weight.abs().mean(1, keepdim=True).repeat(1, groups)

    def look_ahead(self, ahead: Tensor, position: int, spread: Tensor) -> None:
        """Find the size of a group whose turn has come."""
        if self.group is not None and position % self.group == 0:
            self.alpha[:, position // self.group] = ahead[:, : self.group].abs().mean(1)

    def __call__(self, column: Tensor, position: int) -> Tensor:
        """The sign, times the size."""
        alpha = self.alpha[:, 0 if self.group is None else position // self.group]
        return torch.where(column < 0, -alpha, alpha)
