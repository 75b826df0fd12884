"""How well a language model predicts its text, and how near its predictions are to those of its float twin."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lightning_quant.metrics.comparison import MeanComparison, at_least_single, require_same_shape, share

IGNORED = -100  # the label of a token that is not to be predicted, as in torch's cross entropy and in transformers


def next_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The predictions (N, V) that are judged, and the tokens (N,) that they should have given.

    Position ``t`` predicts the token at ``t + 1``. The last position has nothing to predict; labels of -100 are left
    out, and so is the first label, which nobody predicted.

    Args:
        logits: scores of the next token, (..., T, V).
        labels: the tokens themselves, (..., T).

    Raises:
        ValueError: if the two do not belong together.

    Example:
        >>> predictions, tokens = next_tokens(torch.zeros(1, 4, 9), torch.tensor([[5, 6, -100, 8]]))
        >>> predictions.shape, tokens
        (torch.Size([2, 9]), tensor([6, 8]))
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not belong to labels of shape {tuple(labels.shape)}: "
            f"there must be a row of logits for each token"
        )
    counted = labels[..., 1:] != IGNORED
    return logits[..., :-1, :][counted], labels[..., 1:][counted]


def perplexity(logits: Tensor, labels: Tensor) -> Tensor:
    """Exponential of the mean negative log likelihood of the next token; see :class:`Perplexity`.

    Args:
        logits: scores of the next token, (..., T, V).
        labels: the tokens themselves, (..., T); those of -100 are not judged.

    Example:
        >>> perplexity(torch.zeros(1, 5, 32), torch.arange(5)[None])
        tensor(32.0000, dtype=torch.float64)
    """
    return share(*_surprise(logits, labels)).exp()


class Perplexity(MeanComparison):
    r"""Perplexity of a language model over a stream of tokens.

    .. math:: \exp \left( - \frac{1}{N} \sum_{n=1}^N \log p(x_n \mid x_{<n}) \right)

    over all N tokens that have a label. It is a sum of logarithms, never the logarithm of a probability that has
    underflowed, so that a model broken by two bits has a large perplexity and not an infinite one.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``logits``: scores of the next token, (..., T, V)
    - ``labels``: the tokens themselves, (..., T); position ``t`` of the logits is judged by label ``t + 1``, and labels
      of -100 are not judged

    As output of ``forward`` and ``compute`` it returns a float64 scalar.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: in ``update``, if the shapes do not belong together.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.zeros(1, 5, 32), torch.arange(5)[None])
        >>> metric.compute()
        tensor(32.0000, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 1.0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add the surprise of one batch."""
        self.add(*_surprise(logits, labels))

    def compute(self) -> Tensor:
        """The perplexity over all tokens."""
        return super().compute().exp()


def prediction_divergence(quantized: Tensor, reference: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of predictions in nats; see :class:`PredictionDivergence`.

    Args:
        quantized: class scores of the quantized model, (..., C).
        reference: class scores of its float twin, in the same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> prediction_divergence(torch.zeros(2, 4), torch.tensor([[9.0, 0, 0, 0], [0, 0, 0, 0]]))
        tensor(0.6913, dtype=torch.float64)
    """
    return share(*_divergence(quantized, reference))


class PredictionDivergence(MeanComparison):
    r"""Mean Kullback-Leibler divergence of a model's predictions from those of its float twin, in nats.

    .. math:: \frac{1}{N} \sum_{n=1}^N \sum_c p_{nc} \, (\log p_{nc} - \log q_{nc})

    where :math:`p_n` is the softmax of the float model's class scores for prediction :math:`n` (a token, an image) and
    :math:`q_n` that of the quantized one's. It is 0 where the two are equal.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``quantized``: class scores of the quantized model, (..., C)
    - ``reference``: the same of its float twin

    As output of ``forward`` and ``compute`` it returns a float64 scalar.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: in ``update``, if the shapes differ.

    Example:
        >>> metric = PredictionDivergence()
        >>> metric.update(torch.zeros(2, 4), torch.tensor([[9.0, 0, 0, 0], [0, 0, 0, 0]]))
        >>> metric.compute()
        tensor(0.6913, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0

    def update(self, quantized: Tensor, reference: Tensor) -> None:
        """Add the divergences of one batch."""
        self.add(*_divergence(quantized, reference))


def _surprise(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The summed negative log likelihood, and of how many tokens."""
    predictions, tokens = next_tokens(logits, labels)
    losses = cross_entropy(at_least_single(predictions), tokens, reduction="none")
    return losses.double().sum(), tokens.numel()


def _divergence(quantized: Tensor, reference: Tensor) -> tuple[Tensor, int]:
    """The summed divergence, and of how many predictions."""
    require_same_shape(quantized, reference)
    q, p = (log_softmax(at_least_single(x), dim=-1) for x in (quantized, reference))
    each = kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return each.double().sum(), each.numel()
