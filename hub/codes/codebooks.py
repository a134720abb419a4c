"""Residual k-means: each level's codebook says what the levels before it left of a vector.

Residual quantisation after Lee et al., arXiv 2203.01941, as TIGER (arXiv 2305.05065) uses it for ids of items, with k-means
for the codebooks. A vector gets the nearest centroid of the first level, what is left of it the nearest of the second, and
so on; so items that share their first codes are alike.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from training.tables.commands.handler import about


TENSOR = "codebooks"
BLOCK = 2**24
"""Distances that are held at once."""


@dataclass(frozen=True)
class Codebooks:
    """What makes vectors codes, and codes vectors.

    Attributes:
        centroids: `(levels, codes, width)` float32.
    """

    centroids: np.ndarray

    @property
    def levels(self) -> int:
        return len(self.centroids)

    @classmethod
    def train(cls, vectors: np.ndarray, levels: int, codes: int, seed: int = 0, iterations: int = 20) -> "Codebooks":
        """Learn the codebooks, level by level.

        Args:
            vectors: `(n, d)` float32; the same in another order may give other codebooks.
            levels, codes: how many codebooks, and centroids of each.
            seed: of the first centroids.
            iterations: of k-means.

        Raises:
            ValueError: for fewer vectors than codes.
        """
        if len(vectors) < codes:
            raise ValueError(f"{codes:,} codes need at least as many items and there are {len(vectors):,}; take fewer.")
        left = np.array(vectors, np.float32)
        centroids = []
        for level in tqdm(range(levels), desc="Training codebooks", unit="level", leave=False):
            clusters = faiss.Kmeans(
                left.shape[1],
                codes,
                niter=iterations,
                seed=seed + level,
                min_points_per_centroid=1,  # FAISS would print a warning; the report says how good the codes are
                max_points_per_centroid=len(left),
            )
            clusters.train(left)
            book = cls(np.array(clusters.centroids, np.float32)[None])
            centroids.append(book.centroids)
            left -= book.decode(book.encode(left))
        return cls(np.concatenate(centroids))

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """The codes of vectors, `(n, levels)` int32; those of each are the same whatever others stand beside it.

        Args:
            vectors: `(n, d)`.
        """
        books = self.centroids.astype(np.float64)  # float32's rounding depends on how many vectors there are
        codes = np.zeros((len(vectors), self.levels), np.int32)
        rows = max(1, BLOCK // books.shape[1])
        for first in range(0, len(vectors), rows):
            left = vectors[first : first + rows].astype(np.float64)
            for level, book in enumerate(books):
                # The vector's own length is the same for all centroids, and left out of the squared distance.
                nearest = ((book**2).sum(1) - 2 * left @ book.T).argmin(1)
                codes[first : first + rows, level] = nearest
                left -= book[nearest]
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The vectors that codes stand for, `(n, d)` float32; of fewer levels than there are, what those say.

        Args:
            codes: `(n, at most levels)`.
        """
        vectors = np.zeros((len(codes), self.centroids.shape[2]), np.float32)
        for level in range(codes.shape[1]):
            vectors += self.centroids[level, codes[:, level]]
        return vectors

    def save(self, path: Path) -> None:
        """Write one tensor, `codebooks`."""
        save_file({TENSOR: np.ascontiguousarray(self.centroids)}, path, {"shape": json.dumps(self.centroids.shape)})

    @classmethod
    def load(cls, path: str | Path) -> "Codebooks":
        """Read what `save` wrote.

        Raises:
            ValueError: for a file that holds something else.
        """
        with about(path, "Pass codebooks.safetensors of a folder that hub/semantic_ids.py wrote."):
            with safe_open(path, "numpy") as file:
                centroids = file.get_tensor(TENSOR)
            if centroids.ndim != 3 or not np.isfinite(centroids).all():
                raise ValueError(f"codebooks of shape {centroids.shape}, or not finite")
        return cls(centroids)
