"""The losses that CLIP and SigLIP are trained by, over a matrix of cosines that is seen one tile at a time.

Both are over the N x N matrix of N pairs, as in a batch of training: an image or a text that is in several pairs is in
the sum as often, and only its own pair is right. The matrix that is seen has each of them once; what is left out is in
the weights. Sums are float64, their terms float32: a loss is that of float64 within 1e-5.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Loss", "SigmoidLoss", "SoftmaxLoss"]

Singles: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]


class Loss(Protocol):
    """Takes tiles of cosines in any order, each once, and then gives the mean over all pairs."""

    def add(self, tile: Singles, rows: slice, columns: slice) -> None:
        """Takes the cosines of the images `rows` and the texts `columns`, float32."""
        ...

    def mean(self, own: Singles) -> float:
        """The loss, where `own` [pairs] are the cosines of the pairs themselves; NaN where one of them is."""
        ...


class SoftmaxLoss:
    """CLIP's: the mean of two cross-entropies, of each image over all texts and of each text over all images.

    Radford et al. 2021, figure 3 (arXiv:2103.00020). `scale` multiplies the cosine: exp(logit_scale). A bias would
    cancel, so there is none. `right` is int64 [pairs, 2], image and text; `times` int64 [pairs], how often each is.
    """

    def __init__(self, scale: float, right: Ints, times: Ints) -> None:
        self._scale, self._right, self._times = np.float32(scale), right, times
        self._images, self._texts = (_LogSumExp(_weights(side, times)) for side in right.T)

    def add(self, tile: Singles, rows: slice, columns: slice) -> None:
        """See `Loss`."""
        logits = tile * self._scale
        self._images.add(logits, rows, self._texts.weights[columns])
        self._texts.add(logits.T, columns, self._images.weights[rows])

    def mean(self, own: Singles) -> float:
        """See `Loss`."""
        over_texts, over_images = self._images.result()[self._right[:, 0]], self._texts.result()[self._right[:, 1]]
        return float(np.average((over_texts + over_images) / 2 - own * self._scale, weights=self._times))


class SigmoidLoss:
    """SigLIP's: each of the N x N is told apart by itself, and the sum is divided by N.

    Zhai et al. 2023, algorithm 1 (arXiv:2303.15343). A logit is `scale` times the cosine plus `bias`; the others are
    those of `SoftmaxLoss`.
    """

    def __init__(self, scale: float, bias: float, right: Ints, times: Ints) -> None:
        self._scale, self._bias, self._times = np.float32(scale), np.float32(bias), times
        self._images, self._texts = (_weights(side, times) for side in right.T)
        self._sum = 0.0  # as if all of them were wrong

    def add(self, tile: Singles, rows: slice, columns: slice) -> None:
        """See `Loss`."""
        softplus = _softplus(tile * self._scale + self._bias)
        self._sum += float((softplus @ self._texts[columns]).astype(np.float64) @ self._images[rows])

    def mean(self, own: Singles) -> float:
        """See `Loss`."""
        # -log sigmoid(x) = softplus(-x) = softplus(x) - x
        logits = (own * self._scale + self._bias).astype(np.float64)
        return (self._sum - float(logits @ self._times)) / float(self._times.sum())


class _LogSumExp:
    """log sum exp of each row of a matrix that comes in tiles: the sum is kept relative to the largest so far."""

    def __init__(self, weights: Singles) -> None:
        self.weights = weights  # how often each row is there
        self._largest = np.full(len(weights), -np.inf, np.float32)
        self._sum = np.zeros(len(weights))

    def add(self, logits: Singles, rows: slice, weights: Singles) -> None:
        """Takes float32 [rows, n], where column i is there weights[i] times."""
        before = self._largest[rows]
        largest = np.maximum(before, logits.max(axis=1))
        terms = logits - largest[:, None]
        np.exp(terms, out=terms)
        self._sum[rows] = self._sum[rows] * np.exp(before - largest, dtype=np.float64) + terms @ weights
        self._largest[rows] = largest

    def result(self) -> npt.NDArray[np.float64]:
        logs: npt.NDArray[np.float64] = np.log(self._sum) + self._largest
        return logs


def _weights(side: Ints, times: Ints) -> Singles:
    """How often each image, or text, is in the pairs: float32, which holds whole numbers to 16 million."""
    return np.bincount(side, weights=times).astype(np.float32)


def _softplus(x: Singles) -> Singles:
    """log(1 + exp(x)), in place, without overflow."""
    positive = np.maximum(x, 0)
    np.abs(x, out=x)
    np.negative(x, out=x)
    np.exp(x, out=x)
    np.log1p(x, out=x)
    x += positive
    return x
