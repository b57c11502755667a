"""The plots show what the metrics say; checked on the figures' artists."""

from __future__ import annotations

import re
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmoo.errors import ConfigError, DataError
from jaxmoo.report import (
    before_after,
    conflict_heatmap,
    held_out_curves,
    language_cosines,
    loss_curves,
    write_report,
)
from jaxmoo.runs.scores import SampleReply

SEEN = ["en", "es", "it", "ja", "ko", "zh", "fa", "pt"]
UNSEEN = ["de", "fr", "nl"]
BLOCKS = [f"layers.{i}" for i in range(22, 30)]


def make_rows(languages=SEEN, blocks=BLOCKS, steps=60, log_every=1) -> list[dict]:
    """Rows as a run writes them: falling losses, and conflict that rises with depth and time."""
    rng = np.random.default_rng(0)
    count = len(languages)
    rows = []
    for step in range(1, steps + 1):
        cosine = np.full((count, count), 0.3 - 0.4 * step / steps)
        np.fill_diagonal(cosine, 1)
        row = {
            "step": step,
            "loss": {
                c: 3 + 0.2 * i - step / steps + 0.1 * rng.normal() for i, c in enumerate(languages)
            },
            "cosine": cosine.tolist(),
        }
        if step % log_every == 0:
            row["blocks"] = {
                b: {"conflict_share": 0.6 * step / steps * (i + 1) / len(blocks)}
                for i, b in enumerate(blocks)
            }
        rows.append(row)
    return rows


def make_scores(codes, nll: float) -> dict[str, SimpleNamespace]:
    return {
        code: SimpleNamespace(nll=nll + 0.1 * i, bits_per_byte=(nll + 0.1 * i) / 2)
        for i, code in enumerate(codes)
    }


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5_000
    return struct.unpack(">II", data[16:24])


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# --- Training loss ---------------------------------------------------------------------------


def test_loss_curves_label_every_line_without_overlap(tmp_path):
    from matplotlib.text import Text

    figure = loss_curves(make_rows(), SEEN, tmp_path / "loss.png")
    assert png_size(tmp_path / "loss.png") == (1275, 720)
    (axes,) = figure.axes
    smooth = {line.get_label(): line for line in axes.lines if line.get_label() in SEEN}
    assert list(smooth) == SEEN
    assert len(axes.lines) == 2 * len(SEEN)  # each over its raw values
    assert len({line.get_color() for line in smooth.values()}) == len(SEEN)
    assert sorted(texts(axes)) == sorted(SEEN)
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the leader lines
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(axes.bbox.x1 < box.x0 and box.x1 < figure.bbox.x1 for box in boxes)
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert colours == {code: line.get_color() for code, line in smooth.items()}


def test_smoothing_keeps_the_level_and_lowers_the_noise(tmp_path):
    rng = np.random.default_rng(0)
    noisy = 2 + rng.normal(size=300)
    rows = [{"step": i, "loss": {"en": float(x)}} for i, x in enumerate(noisy)]
    rows[100]["loss"]["en"] = None  # was not finite
    (axes,) = loss_curves(rows, ["en"], tmp_path / "loss.png").axes
    raw, smooth = (line.get_ydata() for line in axes.lines)
    assert np.isnan(raw[100]) and np.isnan(smooth[100])
    assert np.nanstd(smooth) < np.nanstd(raw) / 3
    assert np.nanmean(smooth) == pytest.approx(np.nanmean(raw), abs=0.05)


def test_few_steps_are_not_smoothed(tmp_path):
    rows = make_rows(steps=3)
    (axes,) = loss_curves(rows, SEEN, tmp_path / "loss.png").axes
    line = next(line for line in axes.lines if line.get_label() == "en")
    assert line.get_ydata() == pytest.approx([row["loss"]["en"] for row in rows])


def test_one_outlier_does_not_flatten_the_picture(tmp_path):
    rows = make_rows(steps=400)
    rows[0]["loss"]["en"] = 1e4
    (axes,) = loss_curves(rows, ["es", "it"], tmp_path / "loss.png").axes
    assert axes.get_ylim()[1] < 5


def test_many_languages_get_a_panel_each(tmp_path):
    codes = [f"l{i:02}" for i in range(20)]
    figure = loss_curves(make_rows(codes, steps=5), codes, tmp_path / "loss.png")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == codes
    for axes, code in zip(panels, codes, strict=True):
        assert [line.get_label() for line in axes.lines if line.get_label() in codes] == [code]


# --- Conflict --------------------------------------------------------------------------------


def test_conflict_heatmap_has_a_line_per_block_in_model_order(tmp_path):
    rows = make_rows(steps=30, log_every=10)
    figure = conflict_heatmap(rows, tmp_path / "conflict.png")
    axes, bar = figure.axes
    (mesh,) = axes.collections
    shares = mesh.get_array()
    assert shares.shape == (8, 3)
    assert shares[0, 0] == pytest.approx(0.6 / 3 / 8) and shares[-1, -1] == pytest.approx(0.6)
    assert [label.get_text() for label in axes.get_yticklabels()] == BLOCKS
    assert axes.yaxis_inverted()
    assert mesh.get_clim() == (0, pytest.approx(0.6))
    assert bar.get_ylabel() == "conflicting language pairs"
    width, height = png_size(tmp_path / "conflict.png")
    assert width == 1275 and 500 < height < 700


def test_conflict_heatmap_averages_steps_that_do_not_fit(tmp_path):
    rows = make_rows(steps=300)
    figure = conflict_heatmap(rows, tmp_path / "conflict.png", max_columns=100)
    (mesh,) = figure.axes[0].collections
    assert mesh.get_array().shape == (8, 100)
    means = [
        np.mean([row["blocks"]["layers.29"]["conflict_share"] for row in rows[i : i + 3]])
        for i in range(0, 300, 3)
    ]
    np.testing.assert_allclose(mesh.get_array()[-1], means)


def test_conflict_heatmap_leaves_out_labels_of_too_many_blocks(tmp_path):
    blocks = [f"layers.{i}.mlp" for i in range(90)]
    figure = conflict_heatmap(make_rows(blocks=blocks, steps=2), tmp_path / "conflict.png")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == blocks[::3]
    assert png_size(tmp_path / "conflict.png")[1] <= 1500


def test_conflict_heatmap_of_one_step_and_of_missing_values(tmp_path):
    rows = [{"step": 7, "blocks": {"a": {"conflict_share": 0.2}, "b": {"conflict_share": None}}}]
    axes = conflict_heatmap(rows, tmp_path / "conflict.png").axes[0]
    (mesh,) = axes.collections
    assert mesh.get_array().mask.tolist() == [[False], [True]]
    assert [t for t in axes.get_xticks() if 6.5 <= t <= 7.5] == [7]


def test_language_cosines_compare_start_and_end(tmp_path):
    rows = make_rows(steps=50)
    figure = language_cosines(rows, SEEN, tmp_path / "cosines.png")
    first, last, _ = figure.axes
    assert first.get_title(loc="left") == "steps 1 to 5 (mean +0.28)"
    assert last.get_title(loc="left") == "steps 46 to 50 (mean \N{MINUS SIGN}0.08)"
    for axes in (first, last):
        (image,) = axes.images
        low, high = image.get_clim()
        assert low == -high  # white is a right angle
        assert image.get_array().mask.diagonal().all()  # a language and itself
        assert len(axes.texts) == 8 * 7
    assert set(texts(first)) == {".28"} and set(texts(last)) == {"\N{MINUS SIGN}.08"}
    assert png_size(tmp_path / "cosines.png")[0] > 1000


def test_losses_of_languages_that_take_part_in_some_steps(tmp_path):
    rows = make_rows(steps=40)
    for row in rows:
        row["loss"] = {
            c: x for i, (c, x) in enumerate(row["loss"].items()) if row["step"] % 2 ^ i % 2
        }
    figure = loss_curves(rows, SEEN, tmp_path / "loss.png")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for number, code in enumerate(SEEN):
        steps = lines[code].get_xdata()
        assert (steps % 2 != number % 2).all() and len(steps) == 20
        assert np.isfinite(lines[code].get_ydata()).all()


def test_language_cosines_of_an_absent_language(tmp_path):
    cosine = [[1.0, None], [None, 1.0]]
    rows = [{"step": 1, "cosine": cosine}]
    axes, _ = language_cosines(rows, ["en", "es"], tmp_path / "cosines.png").axes
    assert axes.images[0].get_array().mask.all()
    assert not axes.texts


# --- Before and after ------------------------------------------------------------------------


def test_before_after_shows_every_language_in_its_group(tmp_path):
    codes = SEEN + UNSEEN
    before, after = make_scores(codes, 3.0), make_scores(codes, 2.0)
    figure = before_after(before, after, SEEN, UNSEEN, tmp_path / "ba.png")
    seen, seen_bits, unseen, unseen_bits = figure.axes
    # Highest first, the mean below.
    assert [x.get_text() for x in seen.get_yticklabels()] == [*SEEN[::-1], "mean"]
    assert [x.get_text() for x in unseen.get_yticklabels()] == [*UNSEEN[::-1], "mean"]
    assert texts(seen)[:2] == ["3.70", "2.70"] and texts(seen)[-2:] == ["3.35", "2.35"]
    assert texts(seen_bits)[-2:] == ["1.68", "1.18"]
    assert texts(unseen)[-2:] == ["3.90", "2.90"]
    assert unseen_bits.get_xlabel() == "bits per byte"
    (legend,) = figure.legends
    assert [x.get_text() for x in legend.get_texts()] == ["before", "after"]


def test_held_out_curves_show_every_language_the_mean_and_the_worst(tmp_path):
    evaluations = {step: make_scores(SEEN + UNSEEN, 3.0 - step / 10) for step in (4, 0, 8)}
    figure = held_out_curves(evaluations, SEEN, UNSEEN, tmp_path / "curves.png")
    for axes, codes in zip(figure.axes, (SEEN, UNSEEN), strict=True):
        *each, worst, mean = axes.lines
        values = np.array([[evaluations[s][c].nll for c in codes] for s in (0, 4, 8)])
        np.testing.assert_array_equal([line.get_ydata() for line in each], values.T)
        np.testing.assert_array_equal(worst.get_ydata(), values.max(1))
        np.testing.assert_allclose(mean.get_ydata(), values.mean(1))
        assert mean.get_xdata().tolist() == [0, 4, 8] and texts(axes) == codes


def test_before_after_numbers_stay_inside_their_panels(tmp_path):
    before, after = make_scores(SEEN, 3.0), make_scores(SEEN, 2.95)
    after["fa"].nll = 9.0  # got worse
    figure = before_after(before, after, SEEN, [], tmp_path / "ba.png")
    assert len(figure.axes) == 2
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# --- Faults and the page ---------------------------------------------------------------------


def test_nothing_to_plot_is_an_error(tmp_path):
    path = tmp_path / "no.png"
    with pytest.raises(DataError, match="loss of every language"):
        loss_curves([{"step": 1, "loss": {"en": 1.0}}], ["en", "es"], path)
    with pytest.raises(DataError, match="single blocks"):
        conflict_heatmap([{"step": 1}], path)
    with pytest.raises(DataError, match="cosines between 2 languages"):
        language_cosines(make_rows(steps=2), ["en", "es"], path)
    with pytest.raises(DataError, match="before and after of es"):
        before_after(make_scores(["en", "es"], 2), make_scores(["en"], 1), ["en", "es"], [], path)
    assert not path.exists()


def test_missing_matplotlib_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"matplotlib.*not installed.*report=false"):
        conflict_heatmap(make_rows(steps=2), tmp_path / "conflict.png")


def test_report_is_one_self_contained_page(tmp_path):
    codes = SEEN + UNSEEN
    files = write_report(
        tmp_path / "report",
        rows=make_rows(),
        seen=SEEN,
        unseen=UNSEEN,
        before=make_scores(codes, 3.0),
        after=make_scores(codes, 2.0),
        evaluations={step: make_scores(codes, 3.0 - step / 60) for step in (0, 30, 60)},
        replies={"fa": [(SampleReply("<q>?", "آری", "no"), SampleReply("<q>?", "آری", "نه"))]},
        facts={"seed": "0", "model": "a & b"},
        heading="cagrad <layer>",
    )
    assert [path.name for path in files] == [
        "index.html",
        "before_after.png",
        "held_out.png",
        "loss.png",
        "conflict.png",
        "cosines.png",
    ]
    assert all(path.stat().st_size > 0 for path in files)
    page = files[0].read_text()
    assert page.count("data:image/png;base64,") == 5
    cells = ("&lt;q&gt;?", "آری", "no", "نه")
    assert "".join(f'<td dir="auto">{text}</td>' for text in cells) in page
    assert "<tr><td>seed</td><td>0</td></tr>\n<tr><td>model</td><td>a &amp; b</td></tr>" in page
    # What the pictures say, for those who do not see them.
    alts = re.findall(r'<img alt="([^"]*)"', page)
    assert "Mean of the 8 languages trained on: 3.350 before, 2.350 after" in alts[0]
    assert alts[1] == "Held-out loss of every language after steps 0, 30, 60."
    assert all(len(alt) > 40 for alt in alts)
    assert "http" not in page and "<h1>cagrad &lt;layer&gt;</h1>" in page
    for code in SEEN:
        assert f"<td>{code}</td>" in page
    for code in UNSEEN:
        assert f"<td>{code} (unseen)</td>" in page
    assert '<td>seen mean</td><td>3.350</td><td>2.350</td><td class="better">−1.000</td>' in page


def test_report_of_a_run_with_one_language_has_no_conflict_plots(tmp_path):
    scores = make_scores(["en"], 1.0)
    rows = make_rows(["en"], steps=2)
    files = write_report(tmp_path, rows=rows, seen=["en"], before=scores, after=scores)
    assert [path.name for path in files] == ["index.html", "before_after.png", "loss.png"]
    assert "better" not in files[0].read_text().partition("<table>")[2]
