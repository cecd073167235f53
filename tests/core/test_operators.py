"""Operators over fields: against their equations in float64 and diffusers' guiders, alone, nested and routed."""

import json
from collections import Counter
from functools import partial

import pytest
import torch
from config_mistakes import DEMO
from danceopd_kernels.routed_velocity_mse import MAX_TEACHERS
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
)
from hypothesis import given
from hypothesis import strategies as st

from danceopd.config.expressions import expression
from danceopd.config.reading import load_config
from danceopd.core.conditioning import Conditioning, concatenate
from danceopd.core.expressions import Text
from danceopd.core.fields import Answers, SharedField, as_operator, counted, guided, routed, soft
from danceopd.core.objectives import velocity_loss
from danceopd.core.operators import (
    autoguided,
    by_sigma,
    compose,
    difference,
    guided_source,
    projected,
    rescaled,
    slider,
    teacher_at,
    without_layers,
    zero_star,
)
from danceopd.core.questions import Questions
from danceopd.core.rollout import sample
from danceopd.core.schedule import sigma_grid

EMPTY, BLURRY = torch.tensor([0.25]), torch.tensor([-1.5])
N = 5


def batch(n: int = N, dtype=torch.float64, texts=()):
    g = torch.Generator().manual_seed(n)
    latents, sigma = torch.randn(n, 2, 3, 3, generator=g, dtype=dtype), torch.linspace(1, 0.1, n)
    own = {name: torch.randn(n, 1, generator=g) for name in texts}
    return latents, sigma, Conditioning(torch.randn(n, 1, generator=g), texts=own or None)


def field(gain: float):
    """Something different for every prompt, noise level and gain."""

    def velocity(latents, sigma, c):
        prompt, level = (x.to(latents).view(-1, 1, 1, 1) for x in (c.prompt[:, 0], sigma))
        return (gain * latents + prompt).sin() + prompt * latents.cos() * level + gain

    return velocity


A, B, C = field(1.0), field(-0.7), field(2.3)


def said(latents, sigma, c, prompt):
    """The same samples with another prompt, one for all or one each."""
    prompt = prompt if prompt.dim() == 2 else prompt.expand(len(latents), 1)
    return latents, sigma, Conditioning(prompt)


def close(one, other, tolerance=1e-12):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def middle(sigma, low, high):
    return ((sigma >= low) & (sigma <= high)).view(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------ by their equations


def test_guidance_in_an_interval_with_another_prompt():
    x = batch()
    operator = guided_source(A, 4.0, BLURRY, interval=(0.3, 0.8))
    v, u = A(*x), A(*said(*x, BLURRY))
    close(operator(*x), torch.where(middle(x[1], 0.3, 0.8), u + 4 * (v - u), v))
    assert operator.evaluations(x[1]).tolist() == [1, 2, 2, 2, 1]


def test_an_interval_has_its_ends():
    sigma = sigma_grid(8, 5.0)[:-1]
    level = float(sigma[3])
    assert guided_source(A, 4.0, EMPTY, interval=(level, level)).evaluations(sigma).tolist() == [1, 1, 1, 2, 1, 1, 1, 1]


def test_each_samples_own_empty_prompt_comes_before_the_one_for_all():
    latents, sigma, c = x = batch()
    c.empty_prompt = torch.randn(N, 1)
    u = A(*said(*x, c.empty_prompt))
    close(guided_source(A, 3.0, Text("", EMPTY))(latents, sigma, c), u + 3 * (A(*x) - u))


def test_autoguidance():
    x = batch()
    w = B(*x)
    close(autoguided(A, B, 2.5)(*x), w + 2.5 * (A(*x) - w))
    close(
        autoguided(A, B, 2.5, interval=(0.0, 0.5))(*x),
        torch.where(middle(x[1], 0, 0.5), w + 2.5 * (A(*x) - w), A(*x)),
    )


def test_skip_layer_guidance():
    x = batch()
    u, v, skipped = A(*said(*x, EMPTY)), A(*x), B(*x)
    strong = guided_source(A, 4.0, EMPTY)
    operator = without_layers(strong, A, B, 2.8, interval=(0.3, 1.0))
    close(operator(*x), u + 4 * (v - u) + middle(x[1], 0.3, 1).double() * 2.8 * (v - skipped))
    assert operator.evaluations(x[1]).tolist() == [3, 3, 3, 3, 2]


def test_differences_of_one_base():
    x = batch()
    base = C(*x)
    close(difference(C, A, 1.5)(*x), base + 1.5 * (A(*x) - base))
    close(compose(C, [A, B], [0.8, -0.5])(*x), base + 0.8 * (A(*x) - base) - 0.5 * (B(*x) - base))
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        compose(C, [A, B], [1.0])


def test_a_base_that_cancels_is_not_asked():
    counter = Counter()
    x = batch()
    counting = [counted(f, counter, name) for f, name in ((C, "base"), (A, "a"), (B, "b"))]
    operator = compose(counting[0], counting[1:], [0.7, 0.3])
    close(operator(*x), 0.7 * A(*x) + 0.3 * B(*x))
    assert counter == {"a": N, "b": N}


def test_a_slider():
    x = batch(texts=("more", "less"))
    more, less = (A(*said(*x, x[2].texts[name])) for name in ("more", "less"))
    close(slider(A, "more", "less", 2.0)(*x), A(*x) + 2 * (more - less))
    close(slider(A, BLURRY, EMPTY, -1.0)(*x), A(*x) - (A(*said(*x, BLURRY)) - A(*said(*x, EMPTY))))


def test_the_mean():
    x = batch()
    close(soft([A, B, C])(*x), (A(*x) + B(*x) + C(*x)) / 3)


def test_two_sources_by_the_noise_level():
    counter = Counter()
    x = batch()
    high, low = (counted(f, counter, name) for f, name in ((A, "high"), (B, "low")))
    operator = by_sigma(high, low, float(x[1][2]))
    close(operator(*x), torch.where(middle(x[1], float(x[1][2]), 1), A(*x), B(*x)))
    assert counter == {"high": 3, "low": 2}
    assert operator.evaluations(x[1]).tolist() == [1] * N


def test_a_teacher_at_another_text():
    x = batch(texts=("longer",))
    close(teacher_at(A, "longer")(*x), A(*said(*x, x[2].texts["longer"])))
    close(teacher_at(A, BLURRY)(*x), A(*said(*x, BLURRY)))
    with pytest.raises(ValueError, match="no encoding of the text 'shorter'"):
        teacher_at(A, "shorter")(*x)
    with pytest.raises(ValueError, match="a text of its own already"):
        teacher_at(teacher_at(A, "longer"), "shorter")


# ------------------------------------------------------------------------------------------------- of each other


def test_guidance_of_a_sum_takes_the_prompt_from_all_of_it():
    x = batch()
    without = said(*x, EMPTY)

    def both(y):
        return C(*y) + 0.8 * (A(*y) - C(*y)) + 0.5 * (B(*y) - C(*y))

    operator = guided_source(compose(C, [A, B], [0.8, 0.5]), 3.0, EMPTY)
    close(operator(*x), both(without) + 3 * (both(x) - both(without)), 1e-11)
    assert operator.evaluations(x[1]).tolist() == [6] * N


def test_guidance_leaves_a_sliders_texts_and_replaces_a_teachers():
    x = batch(texts=("more", "less", "longer"))
    more, less, longer = (A(*said(*x, x[2].texts[name])) for name in ("more", "less", "longer"))
    u = A(*said(*x, EMPTY))
    move = 2 * (more - less)
    close(guided_source(slider(A, "more", "less", 2.0), 3.0, EMPTY)(*x), u + 3 * (A(*x) - u) + move, 1e-11)
    close(guided_source(teacher_at(A, "longer"), 3.0, EMPTY)(*x), u + 3 * (longer - u))
    close(teacher_at(guided_source(A, 3.0, EMPTY), "longer")(*x), u + 3 * (longer - u))
    close(teacher_at(slider(A, "more", "less", 2.0), "longer")(*x), longer + move)


def test_a_part_keeps_the_text_it_was_given():
    """A text that was given to a part is nearer to it than one of the whole; guidance replaces both."""
    x = batch(texts=("ink", "german"))
    ink, german, u = A(*said(*x, x[2].texts["ink"])), B(*said(*x, x[2].texts["german"])), said(*x, EMPTY)
    mixed = guided_source(teacher_at(A, "ink"), 1.0, EMPTY, rule=lambda cond, *_: cond)  # not linear
    for part in (teacher_at(A, "ink"), mixed):
        both = teacher_at(soft([part, B]), "german")
        close(both(*x), (ink + german) / 2)
        empty = (A(*u) + B(*u)) / 2
        close(guided_source(both, 3.0, EMPTY)(*x), empty + 3 * ((ink + german) / 2 - empty), 1e-11)


def test_guidance_of_guidance_multiplies():
    x = batch()
    u = A(*said(*x, EMPTY))
    twice = guided_source(guided_source(A, 3.0, EMPTY), 2.0, EMPTY)
    close(twice(*x), u + 6 * (A(*x) - u), 1e-11)
    assert twice.evaluations(x[1]).tolist() == [2] * N


def test_sums_of_combinations_that_are_not_linear():
    x = batch()
    without = said(*x, EMPTY)
    parts = [
        guided_source(A, 3.0, EMPTY, rule=zero_star, interval=(0.3, 1.0)),
        guided_source(B, 2.0, EMPTY, rule=partial(projected, eta=0.2, norm=3.0)),
    ]
    star, apg = zero_star(A(*x), A(*without), 3.0), projected(B(*x), B(*without), 2.0, 0.2, 3.0)
    star = torch.where(middle(x[1], 0.3, 1), star, A(*x))
    operator = compose(C, parts, [0.4, 0.9])
    close(operator(*x), C(*x) + 0.4 * (star - C(*x)) + 0.9 * (apg - C(*x)), 1e-11)
    assert operator.evaluations(x[1]).tolist() == [5, 5, 5, 5, 4]
    combined = guided_source(A, 3.0, EMPTY, rule=lambda cond, uncond, s: cond * s - uncond)
    close(combined(*x), 3 * A(*x) - A(*without))


@st.composite
def expressions(draw, depth=3):
    """A random operator of operators, and the function of the samples that it must be."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        leaf = draw(st.sampled_from([A, B, C]))
        return leaf, leaf
    scale = round(draw(st.floats(-2, 3)), 2)
    (p, f), (q, g), (r, h) = (draw(expressions(depth=depth - 1)) for _ in range(3))

    def without(x, text=EMPTY):
        return f(*said(*x, text))

    def mean_of_deviations(x):
        mixed = without(x) + 2 * (f(*x) - without(x))
        return rescaled(mixed, f(*x), 0.5)

    return draw(
        st.sampled_from(
            [
                (guided_source(p, scale, EMPTY), lambda *x: without(x) + scale * (f(*x) - without(x))),
                (autoguided(p, q, scale), lambda *x: g(*x) + scale * (f(*x) - g(*x))),
                (compose(p, [q, r], [scale, 0.5]), lambda *x: (0.5 - scale) * f(*x) + scale * g(*x) + 0.5 * h(*x)),
                (slider(p, BLURRY, EMPTY, scale), lambda *x: f(*x) + scale * (without(x, BLURRY) - without(x))),
                (soft([p, q, r]), lambda *x: (f(*x) + g(*x) + h(*x)) / 3),
                (by_sigma(p, q, 0.5), lambda *x: torch.where(middle(x[1], 0.5, 1), f(*x), g(*x))),
                (guided_source(p, 2.0, EMPTY, rescale=0.5), lambda *x: mean_of_deviations(x)),
            ]
        )
    )


@given(expressions())
def test_any_operator_of_operators_is_its_function(drawn):
    operator, by_hand = drawn
    x = batch()
    torch.testing.assert_close(operator(*x), by_hand(*x), rtol=1e-9, atol=1e-9)
    counter = Counter()
    counted(operator, counter, "asked")(*x)
    assert counter["asked"] == as_operator(operator).evaluations(x[1]).sum()


# -------------------------------------------------------------------------------------------- against diffusers


def guider(cls, **options):
    """One of diffusers' guiders in the middle of a drawing."""
    made = cls(**options)
    made.set_state(step=5, num_inference_steps=10, timestep=torch.tensor(500.0))
    return made


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_plain_guidance_is_diffusers(rescale):
    x = batch()
    theirs = guider(ClassifierFreeGuidance, guidance_scale=4.0, guidance_rescale=rescale)
    close(guided_source(A, 4.0, EMPTY, rescale=rescale)(*x), theirs.forward(A(*x), A(*said(*x, EMPTY))).pred)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_zero_star_is_diffusers(rescale):
    x = batch()
    theirs = guider(ClassifierFreeZeroStarGuidance, guidance_scale=4.0, guidance_rescale=rescale, zero_init_steps=1)
    ours = guided_source(A, 4.0, EMPTY, rule=zero_star, rescale=rescale)(*x)
    close(ours, theirs.forward(A(*x), A(*said(*x, EMPTY))).pred, 1e-5)  # its factor is worked out in float32


@pytest.mark.parametrize(("eta", "norm"), [(1.0, 0.0), (0.0, 2.5), (0.3, 100.0)])
def test_apg_is_diffusers(eta, norm):
    x = batch()
    theirs = guider(AdaptiveProjectedGuidance, guidance_scale=4.0, eta=eta, adaptive_projected_guidance_rescale=norm)
    ours = guided_source(A, 4.0, EMPTY, rule=partial(projected, eta=eta, norm=norm))(*x)
    close(ours, theirs.forward(A(*x), A(*said(*x, EMPTY))).pred)


def test_autoguidance_is_diffusers():
    x = batch()
    theirs = guider(AutoGuidance, guidance_scale=2.5, auto_guidance_layers=[1], dropout=1.0)
    close(autoguided(A, B, 2.5)(*x), theirs.forward(A(*x), B(*x)).pred)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize(("scale", "interval", "skips"), [
    (4.0, (0.0, 1.0), (0.0, 1.0)),
    (4.0, (0.5, 1.0), (0.0, 0.7)),  # the one, both, or the other
    (4.0, (0.0, 0.2), (0.8, 1.0)),  # neither in between
    (1.0, (0.0, 1.0), (0.3, 0.8)),
])  # fmt: skip
def test_skip_layer_guidance_is_diffusers(rescale, scale, interval, skips):
    """As the configuration puts it together, at each noise level with what is on there."""
    sections = {"scale": scale, "rescale": rescale, "skip_layers": {"layers": [1], "scale": 2.8, "interval": skips}}
    sections |= {"interval": interval} if scale != 1 else {}
    config = load_config(DEMO, [f"sources.x={json.dumps({'guided': {'source': 't2i', **sections}})}"])
    ours = expression(config, "x", lambda _, skipped: B if skipped else A, lambda _: Text("", EMPTY))
    latents, sigma, c = batch()
    for i, level in enumerate(sigma.tolist()):
        inside = [scale != 1 and interval[0] <= level <= interval[1], skips[0] <= level <= skips[1]]
        theirs = guider(
            SkipLayerGuidance,
            # Without guidance theirs begins at the skipped network, but in the original formulation, where 0 is none.
            guidance_scale=scale if inside[0] else 0.0,
            use_original_formulation=not inside[0],
            guidance_rescale=rescale,
            skip_layer_guidance_scale=2.8 if inside[1] else 0.0,
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
            skip_layer_guidance_layers=[1],
        )
        x = latents[i : i + 1], sigma[i : i + 1], c[torch.tensor([i])]
        close(ours(*x), theirs.forward(A(*x), A(*said(*x, EMPTY)), B(*x)).pred)
        assert as_operator(ours).evaluations(x[1]).tolist() == [1 + sum(inside)]


# ------------------------------------------------------------------------------------------------------- routed


class Network:
    """A network whose adapters are fields of another gain; it notes what it is asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents, sigma, c):
        self.calls.append(len(latents))
        one = [tuple(part[i : i + 1] for part in (latents, sigma, c)) for i in range(len(latents))]
        return torch.cat([field(m + 2.0)(*x) for m, x in zip(c.adapter.tolist(), one, strict=True)])

    def source(self, adapter: int, scale: float = 1.0) -> SharedField:
        return SharedField(self, guided(self, EMPTY), adapter, scale)


def questions_of(answers: Answers) -> Questions:
    rest = dict.fromkeys(("states", "sigma", "conditioning", "route", "sample"))
    return Questions(**rest, answers=answers, weight=torch.ones(len(answers)))


def loss_against(answers: Answers, target: torch.Tensor) -> None:
    velocity = torch.randn(target.shape, generator=torch.Generator().manual_seed(9), dtype=target.dtype)
    found = velocity_loss(velocity, questions_of(answers))
    torch.testing.assert_close(found.error, (velocity - target).square().flatten(1).mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_of_one_base_are_one_forward(dtype):
    """Sources, guided sources and operators over them, mixed in a batch: the network is asked once."""
    network = Network()
    base, ink, oil = (network.source(m) for m in (-1, 0, 1))
    sources = [
        network.source(0, 3.0),
        guided_source(ink, 4.0, EMPTY, interval=(0.4, 1.0)),
        compose(base, [ink, oil], [0.8, 0.6]),
        difference(base, ink, 1.5),
        slider(oil, BLURRY, EMPTY, 1.0),
        by_sigma(ink, oil, 0.5),
        guided_source(oil, 2.0, BLURRY, rule=zero_star),
    ]
    route = torch.tensor([6, 1, 0, 2, 3, 4, 5, 1, 0, 5])
    x = latents, sigma, c = batch(10, dtype)
    answers = routed(sources, route, *x)
    asked = [2 + 2, 2 + 1, 3, 2, 3, 1 + 1, 2]  # of source 1's two samples one lies outside its interval
    assert network.calls == [sum(asked)]
    alone = [sources[m](latents[i : i + 1], sigma[i : i + 1], c[i : i + 1]) for i, m in enumerate(route.tolist())]
    torch.testing.assert_close(answers.target(), torch.cat(alone), rtol=1e-4, atol=1e-4)
    loss_against(answers, torch.cat(alone))
    assert len(answers.velocities) == 1 + 3  # of its rows, and what three sources wrote


def test_two_terms_are_not_written_and_may_be_of_two_networks():
    strong, weak = Network(), Network()
    x = batch(6, torch.float32)
    sources = [autoguided(strong.source(0), weak.source(3), 2.0), strong.source(1), weak.source(2)]
    answers = routed(sources, torch.tensor([0, 1, 2, 0, 1, 2]), *x)
    assert strong.calls == weak.calls == [4]
    assert len({id(v) for v in (*answers.velocities, *answers.unconds)}) == 2
    x0 = [part[torch.tensor([0, 3])] for part in x]
    w = field(5.0)(*x0)
    torch.testing.assert_close(answers.target()[[0, 3]], w + 2 * (field(2.0)(*x0) - w), rtol=1e-5, atol=1e-5)
    loss_against(answers, answers.target())
    half = answers[torch.tensor([3, 1])]
    torch.testing.assert_close(half.target(), answers.target()[[3, 1]])
    torch.testing.assert_close(answers.to(torch.float64).target().float(), answers.target())


def test_more_networks_than_the_loss_takes_are_joined():
    x = batch(MAX_TEACHERS + 3, torch.float32)
    networks = [Network() for _ in range(MAX_TEACHERS + 3)]
    sources = [autoguided(networks[i].source(0), networks[i - 1].source(1), 2.0) for i in range(len(networks))]
    answers = routed(sources, torch.arange(len(networks)), *x)
    assert len(answers.velocities) == 1
    w = field(3.0)(*x)
    torch.testing.assert_close(answers.target(), w + 2 * (field(2.0)(*x) - w), rtol=1e-5, atol=1e-5)


def test_queries_of_samples_find_their_samples_texts():
    latents, sigma, c = batch(4, texts=("longer",))
    which = torch.tensor([2, 2, 0, 3, 3, 1])
    z, s = latents[which], sigma[which]
    answers = routed([teacher_at(A, "longer")], torch.zeros(6, dtype=torch.int64), z, s, c, which)
    close(answers.target(), A(*said(z, s, c, c.texts["longer"][which])))


def test_no_gradient_reaches_a_source():
    gain = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    x = batch()
    learns = lambda *y: gain * A(*y)  # noqa: E731
    x[0].requires_grad_()
    for operator in (
        guided_source(learns, 2.0, EMPTY),
        guided_source(learns, 2.0, EMPTY, rule=partial(projected, eta=0.0, norm=0.0), rescale=0.5),
        compose(learns, [A, B], [1.0, 2.0]),
        soft([learns, A]),
    ):
        assert not operator(*x).requires_grad
        assert not routed([operator], torch.zeros(N, dtype=torch.int64), *x).target().requires_grad
    assert gain.grad is None


def test_an_operator_can_be_drawn_from():
    noise = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    _, _, c = batch(3)
    source = by_sigma(A, guided_source(B, 2.0, EMPTY), 0.5)

    def by_hand(latents, sigma, c):
        x = latents, sigma, c
        u = B(*said(*x, EMPTY))
        return torch.where(middle(sigma, 0.5, 1), A(*x), u + 2 * (B(*x) - u))

    sigmas = sigma_grid(8, 3.0)
    torch.testing.assert_close(sample(source, noise, c, sigmas), sample(by_hand, noise, c, sigmas))


def test_texts_of_samples_are_joined_by_name():
    one = Conditioning(torch.ones(2, 2), texts={"x": torch.full((2, 3), 7.0)})
    two = Conditioning(torch.ones(1, 2), texts={"y": torch.full((1, 3), 7.0)})
    joined = concatenate([one, two, Conditioning(torch.ones(1, 2))])
    assert joined.texts["x"][:, 0].tolist() == [7, 7, 0, 0]
    assert joined.texts["y"][:, 0].tolist() == [0, 0, 7, 0]
    assert joined[torch.tensor([2])].texts["y"].tolist() == [[7, 7, 7]]

    def encoded(length):
        prompt = {"prompt_embeds": torch.ones(1, length, 2), "prompt_mask": torch.ones(1, length).bool()}
        return Conditioning(torch.ones(1, 2), texts={"x": prompt})

    both = concatenate([encoded(4), encoded(2), Conditioning(torch.ones(1, 2))]).texts["x"]
    assert both["prompt_mask"].sum(1).tolist() == [4, 2, 0]
