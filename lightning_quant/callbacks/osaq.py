"""OSAQ: outliers absorbed in the null space of the inputs before weights are rounded (2026)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_quant.calibration import Hessian
from lightning_quant.callbacks.gptq import GPTQ, Rounded
from lightning_quant.callbacks.solving import Notes
from lightning_quant.solvers import Rounding, absorb_outliers, output_error, relative_error, row_reach


class OSAQ(GPTQ):
    r"""Adds to each weight what its inputs hardly feel and what makes its largest entries small, then rounds it.

    .. math::
        W \leftarrow W + \beta \mathcal N, \qquad \beta_i = \arg\min_b \; \tfrac12 \sum_j s_{ij} (W_{ij} + b^\top n_j)^2
        + \frac{1}{2 N} \sum_k ( \mu_1 + \mu_3 \frac{\lambda_k}{\tilde\lambda} ) b_k^2
        + \tfrac{\mu_2}{2} ( \sum_j b^\top n_j )^2, \qquad s_i = \text{softmax}(|W_i| / (\tau \max_j |W_{ij}|))

    where the rows of :math:`\mathcal N`, with columns :math:`n_j`, are the eigenvectors of the layer's Hessian whose
    smallest eigenvalues :math:`\lambda_k` (damped) hold a share :math:`\gamma` of all, and :math:`\tilde\lambda` is the
    geometric mean of all. Groups of inputs with scales of their own have outliers of their own. Nothing is left to do
    at inference, and no other layer is touched.

    The paper takes the directions of a null space for free (:math:`\mu_3 = 0`, a small :math:`\gamma`), but small
    models have next to none. Here a direction costs what the output feels of it, damped as for the solver because other
    inputs vary in other directions, and most may take part. On stories260K, at three bits, that takes the perplexity of
    GPTQ from 5.88 to 5.49, and at two bits from 59 to 45, where what is free alone gave 5.88 and 67; at four bits there
    is nothing to gain. On SmolLM2-135M, in groups of 128, it takes the perplexity of GPTQ from 62.9 to 55.2 at three
    bits, and from 244 to 167 at two; the damping was chosen on that text, but on the 4,096 tokens behind it they are
    411 and 286. Of its directions these hold a thousandth of the eigenvalues' sum: before queries, keys and values 35 %
    in the first of 30 blocks and 3 to 20 % in the others, before the output projection 65 % and 4 to 26 %, before gate
    and up 2 to 12 %, before down 2 to 52 %; in the median block 6, 12, 3 and 5 %. ``solved`` tells it of each layer.

    There is no published code; the regularizers and all constants are reconstructed, and :math:`\mu_3` is added.

    Reference: *OSAQ: Outlier Self-Absorption for Accurate Low-bit LLM Quantization*, 2026.

    Args:
        weights: format of the weights.
        activations: format of the layers' inputs, ``None`` for weight-only quantization.
        solver: ``"gptq"``, or ``"nearest"``.
        accept: which rows are rounded with the addition: those whose error against the original weight is then smaller
            (``"error"``, which rounds twice), those whose largest weights are (``"max"``), or ``"always"`` all.
        gamma: the share of the eigenvalues' sum that the directions may hold.
        tau: how sharply the largest weights are told from the others, in parts of the largest one.
        mu1: keeps the addition small.
        mu2: keeps the sum of a row where it is.
        mu3: keeps small what the output feels of the addition; ``None``: 25 for each value that the format has.
        arguments: see :class:`GPTQ`. With fewer than ``min_tokens`` calibration tokens for each input of a layer its
            null space is an accident, which is refused.

    Attributes:
        solved: what was noted of each layer in this process, among it the share of directions that hold a thousandth of
            the eigenvalues' sum (``null_space``), that of rows (``accepted``), and by how much the largest weights fell
            (``reach``).

    Raises:
        ValueError: for an unknown solver or ``accept``, for too few tokens, and where :class:`GPTQ` does.

    >>> callback = OSAQ(weights="int2_g128", calibration_samples=128)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    step: ClassVar[str] = "absorb"

    def __init__(
        self,
        weights: str = "int4_g128",
        activations: str | None = None,
        solver: Literal["gptq", "nearest"] = "gptq",
        accept: Literal["error", "max", "always"] = "error",
        gamma: float = 0.1,
        tau: float = 0.2,
        mu1: float = 1.0,
        mu2: float = 1e-3,
        mu3: float | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, **arguments)
        if solver not in ("gptq", "nearest"):
            raise ValueError(f"solver={solver!r} is neither 'gptq' nor 'nearest'")
        if accept not in ("error", "max", "always"):
            raise ValueError(f"accept={accept!r} is none of 'error', 'max' and 'always'")
        if not 0 <= gamma < 1 or tau <= 0 or mu1 <= 0 or mu2 < 0 or (mu3 or 0) < 0:
            raise ValueError(
                f"gamma={gamma} must be at least 0 and below 1, tau={tau} and mu1={mu1} above 0, mu2={mu2} and "
                f"mu3={mu3} at least 0"
            )
        self.rounded_by, self.accept = solver, accept
        self.absorbing: dict[str, Any] = {"gamma": gamma, "tau": tau, "mu1": mu1, "mu2": mu2, "mu3": mu3}

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {**super().arguments, "solver": self.rounded_by, "accept": self.accept, **self.absorbing}

    def solve(self, name: str, layer: nn.Module, statistics: Hessian) -> Notes:
        """Round one weight, unless its null space would be an accident."""
        if statistics.tokens < self.min_tokens * statistics.features:
            raise ValueError(
                f"{statistics.tokens} calibration tokens for {statistics.features} inputs: a null space of so few does "
                f"not generalise; raise calibration_samples, or lower min_tokens={self.min_tokens:g}"
            )
        return super().solve(name, layer, statistics)

    def round(self, weight: Tensor, hessian: Tensor, rounding: Rounding, keep: Tensor, statistics: Hessian) -> Rounded:
        """Round with the addition where it helps, and without it elsewhere."""
        group = rounding.scheme.group_size
        absorbing = self.absorbing
        if absorbing["mu3"] is None:
            absorbing = {**absorbing, "mu3": 25.0 * 2**rounding.scheme.bits}
        edit = absorb_outliers(weight.float(), hessian, **absorbing, damp=self.solver.damp, group=group)
        edited = weight + edit.edit
        before, after = row_reach(weight, group), row_reach(edited, group)
        if self.accept == "error":
            plain, found = (self._rounded(start, hessian, rounding, keep) for start in (weight, edited))
            judge = hessian + self.solver.damp * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)
            plain_errors, errors = (output_error(weight, x.values, judge) for x in (plain, found))
            chosen = errors < plain_errors
            if not found.state[0].dim():  # one scale for all rows
                chosen = (errors.sum() < plain_errors.sum()).expand(len(weight))
            found = _row_by_row(chosen, found, plain)
        else:
            chosen = after < before if self.accept == "max" else torch.ones_like(before, dtype=torch.bool)
            found = self._rounded(torch.where(chosen[:, None], edited, weight), hessian, rounding, keep)
        notes = {
            "null_space": edit.null_space,
            "accepted": float(chosen.double().mean()),
            "reach": float(after.mean() / before.mean()),
            "perturbation": relative_error(weight, edited, hessian),
        }
        return found._replace(notes=notes)

    def _rounded(self, weight: Tensor, hessian: Tensor, rounding: Rounding, keep: Tensor) -> Rounded:
        if self.rounded_by == "gptq":
            return self.solve_columns(weight, hessian, rounding, keep)
        return Rounded(rounding.nearest(weight), rounding.state, {})


def _row_by_row(chosen: Tensor, these: Rounded, those: Rounded) -> Rounded:
    def rows(a: Tensor, b: Tensor) -> Tensor:
        flags = chosen.reshape(-1, *[1] * (a.dim() - 1)) if a.dim() else chosen[0]
        return torch.where(flags, a, b)

    state = [rows(a, b) for a, b in zip(these.state, those.state, strict=True)]
    return Rounded(rows(these.values, those.values), state, {})
