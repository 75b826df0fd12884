"""A stream of tokens, cut into windows that a language model can be fed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_quant.metrics import IGNORED


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Windows of one length over one or several documents, for a DataLoader.

    Each item is ``{"input_ids": (window,), "labels": (window,)}``; the labels are the tokens themselves, as
    transformers has it, and -100 where a token must not be counted: in the part that a window shares with the one
    before, which is there as context only, and in the padding of a last window that is too short. So every token of a
    document is predicted once at most: with ``stride == window`` all but the first of each window, with a smaller
    stride all but the first of each document.

    Args:
        tokens: token ids of one document (N,), or of several.
        window: tokens in a window.
        stride: how far apart windows begin; default: ``window``.
        drop_last: leave out a window that is too short, rather than pad it. Calibration wants that.
        pad: the token that fills up a short window; what a causal model says about the others does not depend on it.

    Raises:
        ValueError: for a window or a stride out of range, or if nothing is left.

    >>> windows = TokenWindows(torch.arange(10, 17), window=4, stride=3)
    >>> [(item["input_ids"].tolist(), item["labels"].tolist()) for item in windows]
    [([10, 11, 12, 13], [10, 11, 12, 13]), ([13, 14, 15, 16], [-100, 14, 15, 16])]
    """

    def __init__(
        self,
        tokens: Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor],
        window: int,
        stride: int | None = None,
        drop_last: bool = False,
        pad: int = 0,
    ) -> None:
        stride = window if stride is None else stride
        if window < 2 or not 1 <= stride <= window:
            raise ValueError(f"window={window} must be at least 2, and stride={stride} from 1 to the window")
        self.window, self.pad = window, pad
        self.documents = _documents(tokens)
        # document, start, and the first token that no window before has counted
        self.places: list[tuple[int, int, int]] = []
        for index, document in enumerate(self.documents):
            counted = 0
            for start in range(0, len(document), stride):
                left = len(document) - max(start + 1, counted)
                if left <= 0 or (drop_last and start + window > len(document)):
                    break
                self.places.append((index, start, counted))
                counted = min(start + window, len(document))
        if not self.places:
            raise ValueError(
                f"no window to cut: the longest document has {max(map(len, self.documents), default=0)} tokens; "
                f"lower window={window}" + (", or keep short windows with drop_last=False" if drop_last else "")
            )

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        document, start, counted = self.places[index]
        ids = self.documents[document][start : start + self.window]
        labels = ids.clone()
        labels[: max(0, counted - start)] = IGNORED
        short = self.window - len(ids)
        return {
            "input_ids": torch.nn.functional.pad(ids, (0, short), value=self.pad),
            "labels": torch.nn.functional.pad(labels, (0, short), value=IGNORED),
        }


def _documents(tokens: Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tokens, Tensor):
        return [tokens.long()] if tokens.dim() == 1 else list(tokens.long())
    if len(tokens) and isinstance(tokens[0], int):
        return [torch.tensor(tokens)]
    return [torch.as_tensor(document).long() for document in tokens]
