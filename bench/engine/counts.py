"""From a share to a number of images: the one file that rounds it.

Of a small data set a share comes to another share than was asked for, or to no image at all. What is computed, what is
refused and what is printed all ask here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def images_of(share: float, total: int) -> int:
    """How many of `total` images a share in [0, 1] is: the nearest whole number."""
    return round(share * total)


def least_share(total: int) -> float:
    """The smallest share, to two significant digits, that comes to one of `total` images."""
    digits = 1 - math.floor(math.log10(0.5 / total))
    share = math.ceil(0.5 / total * 10**digits) / 10**digits
    return share if images_of(share, total) else round(share + 10**-digits, digits)


def held_out_of(share: float, class_counts: Sequence[int]) -> list[int]:
    """How many training images of each class are set aside for the defender."""
    return [images_of(share, count) for count in class_counts]


def reserve_of(size: float, held_out: float, class_counts: Sequence[int]) -> int:
    """How many images the defender gets: a share of the training split, and no more than were set aside."""
    return min(images_of(size, sum(class_counts)), sum(held_out_of(held_out, class_counts)))
