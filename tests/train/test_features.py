"""Features of pictures against plain loops, and what whitening promises."""

import math

import numpy as np
import pytest
import torch

from worldline.train.features import PictureFeatures, _edges


def naive_edges(frame: np.ndarray) -> np.ndarray:
    """(8, h / 8 - 1, w / 8 - 1): the mean over a cell of 16 pixels of |g| cos^3, g looked at from 8 directions."""
    grey = frame.mean(axis=-1) / 255.0
    h, w = grey.shape
    found = np.zeros((8, h // 8 - 1, w // 8 - 1))
    for y in range(1, h - 1):
        for x in range(1, w - 1):
            gx, gy = (grey[y, x + 1] - grey[y, x - 1]) / 2, (grey[y + 1, x] - grey[y - 1, x]) / 2
            for k in range(8):
                # pairs of opposite directions: 0, 180, 45, 225, 90, 270, 135, 315 degrees
                cosine = math.cos(math.atan2(gy, gx) - math.pi / 4 * (k // 2) - math.pi * (k % 2))
                tuned = math.hypot(gx, gy) * max(0.0, cosine) ** 3
                for i in (y // 8 - 1, y // 8):
                    for j in (x // 8 - 1, x // 8):
                        if 0 <= i < h // 8 - 1 and 0 <= j < w // 8 - 1:
                            found[k, i, j] += tuned / 256
    return found


def pictures(count: int, seed: int) -> np.ndarray:
    """Bars of random place and angle on white, 32 pixels square."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    frames = np.full((count, 32, 32, 3), 255, dtype=np.uint8)
    for frame in frames:
        angle, (cy, cx) = rng.uniform(0, np.pi), rng.uniform(8, 24, 2)
        along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        frame[(abs(along) < 7) & (abs(across) < 2)] = (40, 90, 160)
    return frames


def test_edges_equal_plain_loops() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    found = _edges(torch.from_numpy(frames)).reshape(2, 8, 3, 3).numpy()
    np.testing.assert_allclose(found, [naive_edges(frame) for frame in frames], rtol=2e-4, atol=1e-6)


def test_edges_are_whitened_and_pixels_half_so() -> None:
    frames = pictures(400, seed=1)
    described = PictureFeatures(frames)
    features = described(torch.from_numpy(frames)).double()
    edges, coarse, pixels = described.sizes
    assert edges + coarse + pixels == features.shape[1]
    covariance = torch.cov(features[:, :edges].T)
    assert (covariance - torch.eye(edges)).abs().max() < 0.02
    large = torch.cov(features[:, edges : edges + coarse].T)
    assert (large - 2 * torch.eye(coarse)).abs().max() < 0.04
    variance = features[:, edges + coarse :].var(dim=0)
    assert float(variance.mean()) == pytest.approx(0.2, rel=0.01)
    assert 1 < float(variance.max() / variance[variance > 0].median()) < 60  # of pixels alone it is their square
    assert torch.equal(PictureFeatures(frames)(torch.from_numpy(frames)).double(), features)


def test_a_pictures_angle_is_told_from_edges_and_hardly_from_as_many_pixels() -> None:
    train, held_out = pictures(1500, seed=2), pictures(300, seed=3)
    described = PictureFeatures(train)

    def angle_of_longest_axis(frames: np.ndarray) -> np.ndarray:
        found = []
        for frame in frames:
            y, x = np.nonzero(frame[..., 0] < 255)
            spread = np.cov(x, y)
            found.append([spread[0, 0] - spread[1, 1], 2 * spread[0, 1]])
        return np.array(found)

    def skill(part: slice) -> float:
        x, x_new = (described(torch.from_numpy(f)).double()[:, part].numpy() for f in (train, held_out))
        y, y_new = angle_of_longest_axis(train), angle_of_longest_axis(held_out)
        weights = np.linalg.lstsq(x, y - y.mean(axis=0), rcond=None)[0]
        return 1 - np.square(x_new @ weights + y.mean(axis=0) - y_new).sum() / np.square(y_new - y.mean(axis=0)).sum()

    edges, coarse, _ = described.sizes
    assert skill(slice(0, edges)) > 0.9
    assert skill(slice(edges + coarse, 2 * edges + coarse)) < 0.5
