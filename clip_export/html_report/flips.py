"""Rank flips: what was asked, what the right answer was, where it went, and what stands in its place, with pictures."""

from __future__ import annotations

from collections.abc import Sequence

from clip_export.html_report.contents import Item, RankFlip
from clip_export.html_report.markup import Html, cut, data_text, element
from clip_export.html_report.thumbnails import thumbnail

__all__ = ["flips"]

MAX_SHOWN = 12
_THUMBNAIL = 96


def flips(found: Sequence[RankFlip]) -> Html | None:
    """The first MAX_SHOWN, one card each; nothing where there are none."""
    if not found:
        return None
    more = f" The first {MAX_SHOWN} of {len(found):,} are shown." if len(found) > MAX_SHOWN else ""
    return element(
        "div",
        element("h4", "Largest rank flips"),
        element("p", f"Queries whose right answer changed its place most.{more}"),
        element("ol", [_card(flip) for flip in found[:MAX_SHOWN]], class_="flips"),
    )


def _card(flip: RankFlip) -> Html:
    moved = f"rank {flip.reference_rank:,} → {flip.found_rank:,}"
    told = f"from rank {flip.reference_rank:,} to {flip.found_rank:,}"
    parts = (
        ("query", flip.query),
        ("right answer", flip.right),
        ("first by the reference", flip.reference_first),
        ("first by the engine", flip.found_first),
    )
    items = [element("div", element("dt", name), element("dd", _item(item))) for name, item in parts]
    return element("li", element("p", moved, class_="rank", aria_label=told), element("dl", items))


def _item(item: Item) -> list[Html]:
    if item.image is None:
        return [element("q", data_text(item.text))]
    name = cut(item.text) or "the image"
    picture = element("img", src=thumbnail(item.image, _THUMBNAIL), alt=name, width=_THUMBNAIL, height=_THUMBNAIL)
    return [picture, *([element("small", data_text(item.text, limit=60))] if item.text else [])]
