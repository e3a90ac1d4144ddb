"""The β explorer says of each β what is true of its law, and of measured keys what they are."""

from __future__ import annotations

import gzip
import math
import re

import numpy as np
import pytest
import torch
from ipywidgets import HTML, SelectionSlider, Stack, Widget
from scipy.integrate import quad

from signlattice import alignment as cosines
from signlattice.alignment import GAUSSIAN_BETA
from signlattice.errors import InputError
from signlattice_paper.claims import load_claims
from signlattice_paper.densities import REGIMES, density, effective_rank
from signlattice_paper.explorer import beta as explorer
from signlattice_paper.explorer.frames import frame_svg
from signlattice_paper.figures.explorer_beta import BINS, EDGE, angle, fig_beta, marginal

CLAIMS = load_claims()
CITED = (
    CLAIMS["gaussian-floor"].paper_value,
    CLAIMS["uncentred-lands-at-090"].paper_value["uncentred"],
    *CLAIMS["uncentred-lands-at-090"].paper_value["centred"],
)


def laplace(n: int = 4000, d: int = 32) -> torch.Tensor:
    return torch.from_numpy(density(1 / math.sqrt(2)).sample(n, d, seed=3)).float()


def humps(n: int = 4000, d: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    noise = 0.35 * torch.randn(n, d, generator=generator)
    return torch.randint(2, (n, d), generator=generator) * 2.0 - 1 + noise


@pytest.fixture(scope="module")
def measured():
    return [marginal("raw", laplace()), marginal("learned", humps())]


@pytest.fixture(scope="module")
def stops(measured):
    return explorer.stops(measured, CITED)


@pytest.fixture(scope="module")
def frames(measured):
    return explorer.beta_frames(measured, CITED)


def words(frame) -> list[str]:
    """Texts of a frame's picture, as its SVG holds them."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", frame_svg(frame))


def test_stops_are_about_sixty_and_rise_from_a_half_towards_one(stops) -> None:
    values = [stop.beta for stop in stops]
    assert 55 <= len(values) <= 66
    assert values == sorted(set(values))
    assert values[0] == explorer.LOWEST == 0.5 and 0.999 < values[-1] < 1
    angles = [angle(value) for value in values]
    assert max(-np.diff(angles)) < 1.6, "no step is much longer than the others"


def test_stops_get_finer_towards_one(stops) -> None:
    values = [stop.beta for stop in stops]
    assert sum(0.9 <= v < 1 for v in values) > 1.5 * sum(0.5 <= v < 0.6 for v in values)


def test_stops_stand_at_every_named_law_and_all_measured_keys(stops, measured) -> None:
    values = [stop.beta for stop in stops]
    for name, value in REGIMES.items():
        assert value in values or name == "two-point"
    assert density(values[-1]).regime == "two-point"
    assert [stop.measured for stop in stops if stop.measured] == measured


def test_stops_or_laws_stand_where_the_cited_values_are(stops) -> None:
    for value in CITED:
        assert min(abs(angle(value) - angle(stop.beta)) for stop in stops) <= 0.1
    assert {0.919, 0.965} <= {stop.beta for stop in stops}


@pytest.mark.parametrize("value", [0.5, 0.62, 0.7071, GAUSSIAN_BETA, 0.83, 0.919, 0.965])
def test_beta_frames_have_the_laws_mean_magnitude_as_label_and_in_the_signs(
    frames, stops, value
) -> None:
    place = min(range(len(stops)), key=lambda i: abs(stops[i].beta - value))
    law = density(stops[place].beta)
    # in the angle of x/s, in which the density is bounded even where it has edges
    if math.isinf(law.b):
        moments = [2 * quad(lambda x: x**k * law.pdf(x), 0, np.inf)[0] for k in (0, 1, 2)]
    else:
        s = law.scale
        moments = [
            2
            * quad(
                lambda u: (s * np.sin(u)) ** k * law.pdf(s * np.sin(u)) * s * np.cos(u),
                0,
                math.pi / 2,
            )[0]
            for k in (0, 1, 2)
        ]
    assert moments == pytest.approx([1, law.beta, 1], abs=2e-5)
    assert float(frames[place].label) == pytest.approx(moments[1], abs=1e-4)
    told = dict(explorer.numbers(stops[place], law))
    assert told["each sign stands for"] == f"±{law.beta:.3f}"


def test_density_area_shaded_by_the_explorer_is_the_energy_that_signs_lose() -> None:
    for value in (0.6, 0.7979, 0.866, 0.95):
        law = density(value)
        x = law.quantile(np.linspace(0, 1, 200_001)[1:-1])
        assert np.mean((np.abs(x) - law.beta) ** 2) == pytest.approx(1 - value**2, abs=2e-3)


def test_numbers_of_a_law(stops) -> None:
    for stop in stops:
        if stop.measured:
            continue
        law = density(stop.beta)
        told = dict(explorer.numbers(stop, law))
        assert float(told["energy lost"][:-2]) == pytest.approx(100 * (1 - stop.beta**2), abs=0.051)
        assert float(told["moment ratio"]) == pytest.approx(stop.beta**2, abs=6e-4)
        if stop.beta <= GAUSSIAN_BETA:
            assert told["effective rank"] == "–"
        else:
            assert told["effective rank"] == f"{effective_rank(stop.beta):.2f}"


def test_numbers_of_energy_lost_and_rank_fall_along_the_slider(stops) -> None:
    laws = [stop for stop in stops if not stop.measured]
    told = [dict(explorer.numbers(stop, density(stop.beta))) for stop in laws]
    lost = [float(each["energy lost"][:-2]) for each in told]
    ranks = [float(t["effective rank"]) for t in told if t["effective rank"] != "–"]
    assert lost == sorted(lost, reverse=True) and ranks == sorted(ranks, reverse=True)


def test_numbers_of_measured_keys_are_their_own(stops) -> None:
    for keys, stop in zip((laplace(), humps()), (stop for stop in stops if stop.measured)):
        assert stop.beta == cosines.beta(keys) == stop.measured.beta
        told = dict(explorer.numbers(stop, density(stop.beta)))
        rms = keys.square().mean().sqrt()
        assert told["each sign stands for"] == f"±{keys.abs().mean() / rms:.3f}"
        assert told["moment ratio"] == f"{cosines.moment_ratio(keys):.3f}"
        # what is left of each key after its signs with the best scale
        scale = keys.abs().mean(-1, keepdim=True)
        left = (keys - scale * keys.sign()).square().sum(-1) / keys.square().sum(-1)
        assert told["energy lost"] == f"{100 * left.mean():.1f} %"


def test_marginal_has_the_histogram_of_the_keys() -> None:
    keys = 7 * laplace()
    found = marginal("raw", keys)
    inside = (keys.abs() <= EDGE * keys.square().mean().sqrt()).double().mean()
    assert (found.heights * np.diff(BINS)).sum() == pytest.approx(float(inside), abs=1e-6)
    centres = (BINS[1:] + BINS[:-1]) / 2
    law = density(REGIMES["Laplace"]).pdf(centres)
    assert np.abs(found.heights - law).max() < 0.03


def test_beta_frames_show_the_same_axis_with_all_marks(frames, measured) -> None:
    for frame in frames[::12]:
        shown = words(frame)
        assert f"β = {frame.label}" in shown
        for name in (*REGIMES, *(each.name for each in measured)):
            assert name in shown
        assert {"0.7979", "0.90", "0.919", "0.965"} <= set(shown)


def test_fig_beta_has_the_marks_of_the_paper_where_its_values_are(measured) -> None:
    figure = fig_beta(
        density(0.6),
        title="x",
        numbers=[],
        laws=REGIMES,
        cited=CITED,
        keys={each.name: each.beta for each in measured},
    )
    strip = figure.axes[-1]
    marks = {"v": [], "D": [], "o": []}
    for line in strip.get_lines():
        if line.get_marker() in marks:
            marks[line.get_marker()].append(math.cos(math.radians(line.get_xdata()[0])))
    assert sorted(marks["v"]) == pytest.approx(sorted(CITED))
    assert sorted(marks["D"]) == pytest.approx(sorted(each.beta for each in measured))
    assert marks["o"] == pytest.approx([0.6])


def test_fig_beta_labels_do_not_run_into_each_other(measured) -> None:
    figure = fig_beta(
        density(0.6),
        title="x",
        numbers=[],
        laws=REGIMES,
        cited=CITED,
        keys={each.name: each.beta for each in measured},
    )
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in figure.axes[-1].texts]
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_beta_frames_tell_the_picture_in_words(frames, stops) -> None:
    for frame, stop in zip(frames, stops):
        assert frame.alt.startswith(f"β {frame.label}, ")
        assert ("measured keys" in frame.alt) == (stop.measured is not None)
        assert "energy" in frame.alt and "–" not in frame.alt and "±" not in frame.alt
    told = {frame.label: frame.alt for frame in frames}
    assert "Laplace: a spike" in told["0.7071"] and "Gaussian: a bell" in told["0.7979"]
    assert "uniform: flat from minus 1.73" in told["0.8660"]
    assert "arcsine: a trough" in told["0.9003"]
    assert "two-point: all mass" in frames[-1].alt


def test_beta_explorer_is_light_and_linked(frames, monkeypatch) -> None:
    monkeypatch.setattr(explorer, "beta_frames", lambda measured, cited: frames)
    widget = explorer.beta_explorer({"raw": laplace(), "learned": humps()}, CITED)
    parts = all_within(widget)
    (slider,) = (w for w in parts if isinstance(w, SelectionSlider))
    (stack,) = (w for w in parts if isinstance(w, Stack))
    pictures = [w.value for w in parts if isinstance(w, HTML)]
    assert len(pictures) == len(slider.options)
    assert slider.description == "β" and slider.label == f"{GAUSSIAN_BETA:.4f}"
    assert stack.selected_index == slider.index
    assert len({len(option) for option in slider.options}) == 1, "the track keeps its length"
    assert len(gzip.compress("".join(pictures).encode())) < 120_000


def all_within(widget: Widget) -> list[Widget]:
    return [widget, *(w for child in getattr(widget, "children", ()) for w in all_within(child))]


@pytest.mark.parametrize(
    ("keys", "cited", "message"),
    [
        (torch.zeros(4, 8), (), "not all 0"),
        (torch.randn(8, generator=torch.Generator().manual_seed(0)), (), "expected [N, d]"),
        (torch.eye(16), (), "beta 0.25 (raw)"),
        (torch.ones(4, 8), (), "beta 1.0 (raw)"),
        (None, (0.3,), "beta 0.3 (cited)"),
    ],
)
def test_beta_explorer_refuses_what_the_axis_does_not_hold(keys, cited, message) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        explorer.beta_explorer({"raw": laplace(64) if keys is None else keys}, cited)
