"""The plots: what there is to draw, and that marks stand at the values of the file."""

import itertools
import math

import bench_results as made
import pytest

from fusebert.bench.report.axes import place_apart
from fusebert.bench.report.plots import plots
from fusebert.bench.report.theme import DARK, LIGHT, render


def names_of(result):
    return [plot.name for plot in plots(made.typed(result))]


def test_what_there_is_to_draw():
    speed_ups = ["speed-up-attention", "speed-up-mlm_loss", "speed-up-layernorm"]
    rooflines = ["roofline", "roofline-share"]
    assert names_of(made.every_operator()) == [*speed_ups, *rooflines, "attention-rate", "mlm-loss-memory"]
    # One length makes no curve; a CPU's memory is not counted.
    assert names_of(made.every_operator("cpu", lengths=(64,))) == [*speed_ups, *rooflines]
    assert names_of(made.every_operator(lengths=(), vocabularies=())) == ["speed-up-layernorm", "roofline-share"]
    assert names_of(made.aot()) == []


def drawn(result, name, theme=LIGHT):
    """The axes of a plot, as drawn."""
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure(layout="constrained")
    (plot,) = [plot for plot in plots(made.typed(result)) if plot.name == name]
    plot.draw(figure, theme)
    return figure.axes


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_plot_is_drawn_on_its_paper(theme):
    pytest.importorskip("matplotlib")
    from io import BytesIO

    from PIL import Image

    for result in (made.every_operator(lengths=(64,), vocabularies=(1000,)), made.some_step()):
        for plot in plots(made.typed(result)):
            image = Image.open(BytesIO(render(plot, theme))).convert("RGB")
            assert image.width == 1024
            assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((0, image.height - 1))) == theme.paper
            assert len(image.getcolors(1 << 24)) > 20


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_roofline_has_each_rate_at_its_intensity():
    (axes,) = drawn(made.every_operator(), "roofline")
    found = lines(axes)
    assert set(found) == {"fusebert attention_varlen", "fusebert", "sdpa flash", "torch eager"}  # no bound, none wrong
    x, y = found["sdpa flash"].get_data()
    assert list(x) == [100, 100]  # 1e9 FLOPs, 1e7 bytes
    assert list(y) == pytest.approx([0.5, 0.5])  # TFLOP/s: 1e9 FLOPs in 2 ms
    assert found["fusebert"].get_color() == LIGHT.ours
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_ylabel() == "TFLOP/s"
    labels = [text.get_text() for text in axes.texts]
    assert "attention N=64" in labels
    assert "bfloat16 matrix product, 100 TFLOP/s" in labels


def test_speed_up_bars_start_at_one_and_end_at_the_ratio():
    axes = drawn(made.every_operator(), "speed-up-mlm_loss")[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["fusebert", "its matrix products", "torch eager"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.0, -0.5, -0.25])
    assert {bar.get_x() for bar in axes.patches} == {1.0}
    # Faster than ours: in the colour of that, not in that of slower ones; a bound is no contestant.
    from matplotlib.colors import to_hex

    assert to_hex(axes.patches[2].get_facecolor()) == LIGHT.slower
    assert axes.patches[1].get_hatch()
    assert axes.get_xscale() == "log"


def test_bars_say_what_is_wrong():
    for result, name in ((made.every_operator(), "speed-up-attention"), (made.some_step(), "tokens-per-s")):
        axes = drawn(result, name)[0]
        assert [text.get_text() for text in axes.texts if "WRONG" in text.get_text()] == ["WRONG: not timed"]


def test_a_curve_breaks_where_a_contestant_was_wrong():
    result = made.every_operator(lengths=(64, 128, 256))
    result["results"][1]["contestants"][1] = made.contestant("sdpa flash", "peer", None)
    (axes,) = drawn(result, "attention-rate")
    x, y = lines(axes)["sdpa flash"].get_data()
    assert list(x) == [64, 128, 256]
    assert y[0] == pytest.approx(0.5)
    assert math.isnan(y[1])
    assert "sdpa cudnn" not in lines(axes)


def test_memory_curve_has_the_logits_beside_it():
    (axes,) = drawn(made.every_operator(), "mlm-loss-memory")
    found = lines(axes)
    assert list(found["torch eager"].get_data()[1]) == pytest.approx([3.0, 3.0])
    assert list(found["float32 logits alone"].get_data()[1]) == pytest.approx([4e-4, 8e-4])  # 100 · V · 4 bytes


def test_step_bars_are_tokens_a_second():
    (axes,) = drawn(made.some_step(), "tokens-per-s")
    assert [bar.get_width() for bar in axes.patches] == [1e6, 4e5]


def test_loss_curve_is_a_mean_of_the_steps_before():
    result = made.train({"fusebert": [1.0], "transformers": [2.0]})
    result["contestants"][0]["losses"] = [float(i) for i in range(120)]
    (axes,) = drawn(result, "losses")
    x, y = lines(axes)["fusebert"].get_data()
    assert list(x)[:2] == [2, 4]
    assert list(y)[:2] == [0.5, 2.5]
    assert len(x) == 60


@pytest.mark.parametrize("wanted", [[0.1, 0.1, 0.1], [0.5], [], [0.0, 0.98, 0.99, 0.99], [0.2, 0.4, 0.6], [0.5] * 50])
def test_labels_are_placed_apart(wanted):
    placed = place_apart(wanted, 0.05, 0.0, 1.0)
    gaps = [b - a for a, b in itertools.pairwise(placed)]
    assert all(gap >= min(0.05, 1 / max(1, len(wanted) - 1)) - 1e-9 for gap in gaps)
    assert all(-1e-9 <= x <= 1 + 1e-9 for x in placed)
    if wanted == [0.2, 0.4, 0.6]:
        assert placed == wanted
