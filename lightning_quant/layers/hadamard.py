"""Hadamard matrices, also of sizes that are no power of two, and the fast product with the large ones."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LARGEST_BASE = 1024  # of the orders that are looked for; a larger one would be multiplied densely


def hadamard(size: int) -> Tensor:
    """A matrix of ±1 (size, size), float64, whose rows are orthogonal.

    ``size`` is a power of two (Sylvester), or a power of two times an order of Paley's: ``q + 1`` for a prime
    ``q = 3 mod 4``, or ``2 (q + 1)`` for a prime ``q = 1 mod 4``. It is the Kronecker product of the two.

    Raises:
        ValueError: if there is none of this size, saying which sizes beside it there are.

    >>> hadamard(4).int()
    tensor([[ 1,  1,  1,  1],
            [ 1, -1,  1, -1],
            [ 1,  1, -1, -1],
            [ 1, -1, -1,  1]], dtype=torch.int32)
    >>> torch.equal(hadamard(12) @ hadamard(12).T, 12 * torch.eye(12).double())
    True
    """
    base, twos = factors(size)
    return torch.kron(paley(base), sylvester(twos))


def factors(size: int) -> tuple[int, int]:
    """``(K, 2^m)`` with ``K 2^m = size`` and the smallest K of which :func:`paley` has a matrix.

    Raises:
        ValueError: if there is none.

    >>> factors(576), factors(1536), factors(64)
    ((36, 16), (12, 128), (1, 64))
    """
    found = _factors(size)
    if found is None:
        lower = next(n for n in range(size, 0, -1) if _factors(n))
        upper = next(n for n in range(size, 2 * size) if _factors(n))
        raise ValueError(
            f"no Hadamard matrix of size {size} is known here: sizes are powers of two, and powers of two times one of "
            f"{', '.join(str(order) for order in paley_orders(size)[:8]) or '12'}, ...; beside {size} these are "
            f"{lower} and {upper}"
        )
    return found


def has_hadamard(size: int) -> bool:
    """Whether :func:`hadamard` has a matrix of this size.

    >>> has_hadamard(576), has_hadamard(172)
    (True, False)
    """
    return _factors(size) is not None


def paley_orders(limit: int) -> list[int]:
    """The orders up to a limit that Paley's constructions give with a prime.

    >>> paley_orders(40)
    [4, 8, 12, 20, 24, 28, 32, 36]
    """
    return [order for order in range(4, limit + 1, 4) if _construction(order)]


def sylvester(size: int) -> Tensor:
    """The symmetric Hadamard matrix of a power of two, (size, size).

    >>> sylvester(2)
    tensor([[ 1.,  1.],
            [ 1., -1.]], dtype=torch.float64)
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def paley(order: int) -> Tensor:
    """Paley's Hadamard matrix of an order, (order, order); not symmetric for all of them.

    Raises:
        ValueError: if his constructions have none with a prime.

    >>> paley(12).sum(0).int().tolist()
    [-10, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    kind = _construction(order)
    if kind == "I":
        q = order - 1
        border = torch.ones(q, dtype=torch.float64)
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = border, -border, _jacobsthal(q)
        return torch.eye(order, dtype=torch.float64) + skew
    if kind == "II":
        q = order // 2 - 1
        conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        conference[0, 1:] = conference[1:, 0] = 1
        conference[1:, 1:] = _jacobsthal(q)
        corner = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, corner) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
    raise ValueError(f"Paley has no Hadamard matrix of order {order} with a prime: {paley_orders(order + 8)}")


def fast_sylvester(x: Tensor) -> Tensor:
    """``x @ sylvester(n)`` for the last axis of n elements, in n log n additions.

    >>> x = torch.randn(3, 8).double()
    >>> torch.allclose(fast_sylvester(x), x @ sylvester(8))
    True
    """
    size = x.shape[-1]
    half = 1
    while half < size:
        pairs = x.unflatten(-1, (size // (2 * half), 2, half))
        first, second = pairs.unbind(-2)
        x = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half *= 2
    return x


@cache
def _factors(size: int) -> tuple[int, int] | None:
    twos = size & -size
    while size > 0 and twos >= 1:
        base = size // twos
        if base == 1 or (base <= LARGEST_BASE and _construction(base)):
            return base, twos
        twos //= 2
    return None


def _construction(order: int) -> str | None:
    if order % 4 == 0 and _is_prime(order - 1):  # then it is 3 mod 4
        return "I"
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        return "II"
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Whether ``i - j`` is a square modulo q: 1, not: -1, zero: 0."""
    legendre = -torch.ones(q, dtype=torch.float64)
    legendre[torch.arange(1, q).square() % q] = 1
    legendre[0] = 0
    index = torch.arange(q)
    return legendre[(index[:, None] - index[None, :]) % q]
