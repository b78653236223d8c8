"""Distribution of images in feature space: a two-dimensional view (t-SNE) and the separation of groups (silhouette)."""

import numpy as np

DIMENSIONS, PERPLEXITY = 50, 30


def tsne(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Coordinates by t-SNE of the first 50 principal components; perplexity 30, or (N - 1) / 3 for fewer images.

    The initial coordinates are the first two components (our choice). The result is for visual inspection only:
    neither distances nor sizes of groups are meaningful.

    Args:
      features: float [N, D], D at least 2.
      seed: seed of the random numbers.

    Returns:
      float32 [N, 2]; zeros where all features are equal.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # scikit-learn's own dependency

    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2), np.float32)
    size = min(DIMENSIONS, *features.shape)
    components = PCA(size, random_state=seed).fit_transform(features.astype(np.float64))
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    with threadpool_limits(1):  # its threads busy-wait, which makes it 20 times slower on a loaded machine
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(components).astype(np.float32)


def silhouette(features: np.ndarray, groups: np.ndarray) -> float | None:
    """Mean silhouette (b - a) / max(a, b) over the images.

    a is an image's mean Euclidean distance to the other images of its group, b that to the nearest other group.

    Args:
      features: float [N, D].
      groups: group of each image, [N].

    Returns:
      A number in [-1, 1], about 0 where the groups overlap; None without two groups of at least two images.
    """
    from sklearn.metrics import silhouette_score

    names, counts = np.unique(groups, return_counts=True)
    counted = np.isin(groups, names[counts > 1])
    if len(np.unique(groups[counted])) < 2:
        return None
    return float(silhouette_score(features[counted].astype(np.float64), groups[counted]))
