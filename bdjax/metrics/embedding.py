"""Where images lie in a space of features: a map for the eye (t-SNE), and how well groups are apart (silhouette)."""

import numpy as np

DIMENSIONS, PERPLEXITY = 50, 30


def tsne(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Coordinates by t-SNE of the first 50 principal components; perplexity 30, or (N - 1) / 3 for fewer images.

    Started from the first two components, which is our choice. For looking at only: neither distances nor sizes of
    groups mean anything.

    Args: float [N, D], D at least 2.
    Returns: float32 [N, 2]; zeros where all features are equal.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # scikit-learn's own dependency

    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2), np.float32)
    size = min(DIMENSIONS, *features.shape)
    near = PCA(size, random_state=seed).fit_transform(features.astype(np.float64))
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    with threadpool_limits(1):  # its threads wait for each other by spinning: on a busy machine 20 times slower
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(near).astype(np.float32)


def silhouette(features: np.ndarray, groups: np.ndarray) -> float | None:
    """Mean of (b - a) / max(a, b): a, b an image's mean Euclidean distance to its own and to the nearest other group.

    Args: float [N, D]; groups [N].
    Returns: in [-1, 1], about 0 where the groups overlap; None without two groups of at least two images.
    """
    from sklearn.metrics import silhouette_score

    kinds, counts = np.unique(groups, return_counts=True)
    kept = np.isin(groups, kinds[counts > 1])
    if len(np.unique(groups[kept])) < 2:
        return None
    return float(silhouette_score(features[kept].astype(np.float64), groups[kept]))
