"""Overlays, cut-outs and COCO contours: hand-made masks, and their way back."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from dataset.codecs import THINGS_STUFF
from utils.rendering import COLOUR, coco, contours, cut_out, overlay, run_lengths


def square() -> NDArray[np.uint8]:
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 10:17] = 1
    return mask


def ring() -> NDArray[np.uint8]:
    mask = np.zeros((20, 30), np.uint8)
    mask[2:12, 2:12] = 1
    mask[5:9, 5:9] = 0
    return mask


def decode(counts: list[int], size: list[int]) -> NDArray[np.uint8]:
    values = np.concatenate([np.full(length, number % 2, np.uint8) for number, length in enumerate(counts)])
    return values.reshape(size[1], size[0]).T


def read_back(annotations: list[dict[str, Any]], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    classes = np.zeros(shape, np.uint8)
    for each in annotations:
        segmentation = each["segmentation"]
        if isinstance(segmentation, dict):
            classes[decode(segmentation["counts"], segmentation["size"]) > 0] = each["category_id"]
        else:
            points = [np.array(line, np.int32).reshape(-1, 1, 2) for line in segmentation]
            cv2.fillPoly(classes, points, each["category_id"])
    return classes


def test_a_square_is_a_polygon_with_its_box_area_and_score() -> None:
    soft = np.full((20, 30), 0.75, np.float32)
    (found,) = contours(square(), soft)
    assert found["bbox"] == [10, 4, 7, 5]
    assert found["area"] == 35
    assert found["score"] == 0.75
    assert sorted(zip(found["segmentation"][0][::2], found["segmentation"][0][1::2], strict=True)) == [
        (10, 4), (10, 8), (16, 4), (16, 8),
    ]  # fmt: skip


def test_a_ring_keeps_its_hole() -> None:
    (found,) = contours(ring(), np.ones((20, 30), np.float32))
    assert found["area"] == 100 - 16
    assert np.array_equal(decode(**{key: found["segmentation"][key] for key in ("counts", "size")}), ring())


@pytest.mark.parametrize("seed", range(4))
def test_contours_are_the_mask_again(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.random((40, 60)).astype(np.float32), (0, 0), 2)
    classes = (noise > np.median(noise)).astype(np.uint8)
    classes[:, 30:] *= 2
    found = contours(classes, noise)
    assert np.array_equal(read_back(found, classes.shape), classes)
    assert sum(each["area"] for each in found) == (classes > 0).sum()


def test_an_empty_mask_has_no_contours_and_one_pixel_has_one() -> None:
    empty = np.zeros((5, 6), np.uint8)
    assert contours(empty, empty.astype(np.float32)) == []
    empty[4, 5] = 1
    (found,) = contours(empty, np.ones((5, 6), np.float32))
    assert found["bbox"] == [5, 4, 1, 1]
    assert found["segmentation"] == {"size": [5, 6], "counts": [29, 1]}


def test_run_lengths_start_outside() -> None:
    assert run_lengths(np.array([[True, False], [True, True]]), (2, 2)) == {"size": [2, 2], "counts": [0, 2, 1, 1]}
    assert run_lengths(np.zeros((2, 2), bool), (2, 2)) == {"size": [2, 2], "counts": [4]}


def test_a_coco_data_set_counts_from_one_and_names_its_classes() -> None:
    annotation = {"category_id": 1, "segmentation": [], "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0, "score": 1.0}
    pictures = [
        {"file_name": "a", "width": 3, "height": 2, "contours": [annotation, annotation]},
        {"file_name": "b", "width": 3, "height": 2, "contours": [annotation]},
    ]
    content = coco(pictures, None)
    assert [(each["id"], each["image_id"]) for each in content["annotations"]] == [(1, 1), (2, 1), (3, 2)]
    assert content["images"][1] == {"id": 2, "file_name": "b", "width": 3, "height": 2}
    assert content["categories"] == [{"id": 1, "name": "transparent"}]
    names = [each["name"] for each in coco([], THINGS_STUFF)["categories"]]
    assert names == ["things", "stuff"]


def test_an_overlay_tints_the_mask_alone_and_outlines_it() -> None:
    picture = np.full((20, 30, 3), 100, np.uint8)
    painted = overlay(picture, square())
    assert np.array_equal(painted[square() == 0], picture[square() == 0])
    assert tuple(painted[4, 10]) == COLOUR
    inside = painted[6, 13].astype(int)
    np.testing.assert_allclose(inside, (np.array(COLOUR) + 100) / 2, atol=1)
    assert np.array_equal(overlay(picture, np.zeros((20, 30), np.uint8)), picture)
    full = overlay(picture, np.ones((20, 30), np.uint8))
    np.testing.assert_allclose(full[0, 0].astype(int), inside, atol=1)  # no outline along the picture's own edge
    assert np.array_equal(overlay(picture, square(), opacity=0)[6, 13], picture[6, 13])


def test_an_overlay_of_classes_has_their_colours() -> None:
    classes = square() * 2
    painted = overlay(np.zeros((20, 30, 3), np.uint8), classes, THINGS_STUFF)
    assert tuple(painted[4, 10]) == tuple(THINGS_STUFF.colours[2])


def test_a_cut_out_has_the_mask_as_alpha() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    found = cut_out(picture, square())
    assert np.array_equal(found[..., :3], picture)
    assert np.array_equal(found[..., 3], square() * 255)
