"""Embeddings as features for scikit-learn.

make_pipeline(BertFeatures("runs/first/hf"), LogisticRegression(max_iter=1000)).fit(texts, labels)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .embed import Embedder, blocks
from .settings import ModelSettings

try:
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.utils.validation import check_is_fitted
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("BertFeatures needs scikit-learn: pip install scikit-learn") from error


class BertFeatures(TransformerMixin, BaseEstimator):
    """Texts → the vectors that ``fusebert embed`` gives them: a scikit-learn transformer. It learns nothing.

    Args:
        model: folder of the model.
        pooling, normalize: as of ``fusebert embed``.
        seqlen, tokens_per_batch, device, precision: as in `ModelSettings`.

    Attributes:
        n_features_out_: H, set by `fit`.

    Raises:
        UserError, ValueError: in `fit`: the model or an option cannot be used.
        TypeError: in `fit` and `transform`: the input is not a sequence of strings.
    """

    def __init__(
        self,
        model: str | Path = "runs/first/hf",
        pooling: str = "auto",
        normalize: bool | None = None,
        seqlen: int | None = None,
        tokens_per_batch: int | None = None,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        self.model = model
        self.pooling = pooling
        self.normalize = normalize
        self.seqlen = seqlen
        self.tokens_per_batch = tokens_per_batch
        self.device = device
        self.precision = precision

    def fit(self, X: Sequence[str], y: Any = None) -> BertFeatures:
        """Loads the model."""
        _texts(X)
        settings = ModelSettings(
            model=Path(self.model),
            seqlen=self.seqlen,
            tokens_per_batch=self.tokens_per_batch,
            device=self.device,
            precision=self.precision,
        )
        self.embedder_ = Embedder(settings, self.pooling, self.normalize)
        self.n_features_out_ = self.embedder_.size
        return self

    def transform(self, X: Sequence[str]) -> np.ndarray:
        """float32 [n, H], in the order of the texts ``X``."""
        check_is_fitted(self)
        vectors = [self.embedder_(block) for block in blocks(_texts(X))]
        return np.concatenate([np.empty((0, self.n_features_out_), dtype=np.float32), *vectors])

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """The names of the H columns."""
        check_is_fitted(self)
        return np.array([f"bertfeatures{i}" for i in range(self.n_features_out_)], dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.no_validation = True  # of numbers: there are none in the input
        return tags


def _texts(given: Any) -> list[str]:
    texts: list[Any] = [None] if isinstance(given, str) else list(given)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"X must be a sequence of strings, one for each text; got {type(given).__name__}")
    return texts
