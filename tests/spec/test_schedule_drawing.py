"""Timelines drawn as text and as SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule import SCHEDULE_NAMES, UNIT, Costs, draw_svg, draw_text, make_schedule, simulate
from dstrain.runtime.spec.schedule.svg_drawing import COLOURS

FIRST = {first for first, _ in COLOURS.values()}
SVG = "{http://www.w3.org/2000/svg}"


def rank_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("rank ")]


def test_text_of_1f1b() -> None:
    timeline = simulate(make_schedule("1f1b", 2, 3), UNIT)
    assert draw_text(timeline, 43).splitlines() == [
        "1f1b: 2 ranks, 2 stages, 3 micro-batches,",
        "12 s, bubble 25.0 %",
        "rank 0 F0-F1-......B0----F2-B1----...B2----",
        "rank 1 ...F0-B0----F1-B1----F2-B2----......",
        "       0                               12 s",
        "F forward, B backward, . idle",
    ]


def test_later_stages_of_a_rank_are_in_lower_case() -> None:
    timeline = simulate(make_schedule("zb_v", 2, 3), UNIT)
    text = draw_text(timeline, 7 + 19 * 2)
    assert rank_lines(text) == [
        "rank 0 F0F1F2f0i0w0f1i1w1I0W0f2i2w2I1W1I2W2..",
        "rank 1 ..F0f0F1f1i0w0F2I0W0f2i1w1I1i2I2W1w2W2",
    ]
    assert draw_text(timeline, 120).endswith("W weight gradient, . idle, lower case: a rank's later stages")
    assert "3f0-" in draw_text(timeline, 120)


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize("width", [40, 80, 133, 400])
def test_text_is_to_scale_and_no_wider_than_asked(name: str, width: int) -> None:
    timeline = simulate(make_schedule(name, 4, 8), UNIT)
    lines = draw_text(timeline, width).splitlines()
    assert all(len(line) <= width for line in lines)
    drawn = rank_lines("\n".join(lines))
    assert len(drawn) == 4
    assert {len(line) for line in drawn} == {width}
    for line, idle in zip(drawn, timeline.idle_s, strict=True):
        share = line[7:].count(".") / (width - 7)
        gaps = 2 * len(timeline.spans[0])
        assert abs(share - idle / timeline.makespan_s) <= gaps / 2 / (width - 7)


def test_text_needs_some_width() -> None:
    with pytest.raises(UsageError, match="expected a width of at least 40, found 39"):
        draw_text(simulate(make_schedule("1f1b", 2, 3)), 39)


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_svg_has_every_action_at_its_time(name: str) -> None:
    timeline = simulate(make_schedule(name, 3, 5), Costs(0.010, 0.012, 0.007, 0.001))
    root = ElementTree.fromstring(draw_svg(timeline))
    cells = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    told = [str(rect.findtext(f"{SVG}title")).split(":")[0] for rect in cells]
    spans = [span for row in timeline.spans for span in row]
    assert told == [str(span.action) for span in spans]
    left = min(float(rect.attrib["x"]) for rect in cells)
    right = max(float(rect.attrib["x"]) + float(rect.attrib["width"]) for rect in cells)
    scale = (right - left) / timeline.makespan_s
    for rect, span in zip(cells, spans, strict=True):
        assert float(rect.attrib["x"]) == pytest.approx(left + span.start_s * scale, abs=0.02)
        assert float(rect.attrib["width"]) == pytest.approx((span.end_s - span.start_s) * scale, abs=0.02)
    assert all((rect.get("fill") in FIRST) == (span.action.stage < 3) for rect, span in zip(cells, spans, strict=True))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert f"bubble {100 * timeline.bubble:.1f} %" in str(texts[0])
    assert {"rank 0", "rank 1", "rank 2", "forward", "4"} <= set(texts)


def test_svg_is_valid_for_any_name_and_leaves_out_numbers_without_room() -> None:
    timeline = simulate(replace(make_schedule("1f1b", 2, 2000), name='<a & "b">\x01.csv'))
    root = ElementTree.fromstring(draw_svg(timeline))
    assert '<a & "b">\ufffd.csv' in str(root.findtext(f"{SVG}title"))
    assert not {"0", "1", "150"} - {"0"} & {text.text for text in root.iter(f"{SVG}text")}


@pytest.mark.parametrize(("micro_batches", "width"), [(5, 1000), (200, 64 + 8 * 400 + 12), (2000, 8000)])
def test_svg_is_wider_for_many_cells(micro_batches: int, width: int) -> None:
    root = ElementTree.fromstring(draw_svg(simulate(make_schedule("1f1b", 2, micro_batches))))
    assert root.attrib["width"] == str(width)
    assert root.attrib["viewBox"].split()[2] == str(width)
