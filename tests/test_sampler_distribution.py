"""The sampler draws from the distribution its settings define: chi-square tests with fixed seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_engine.sampler import Feature, SamplingInputs, sample

V, DRAWS = 50, 24000
LOGITS = (np.random.default_rng(11).standard_normal(V) * 1.5).astype(np.float32)
SETTINGS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.6},
    "top-k": {"top_k": 12},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.08},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.03},
}


@jax.jit
def _draw(inputs):
    return sample(jnp.broadcast_to(LOGITS, (DRAWS, V)), inputs).tokens


def draw(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """DRAWS tokens: 40 positions of each of DRAWS / 40 seeds."""
    zeros = jnp.zeros(DRAWS)
    seed, position = np.divmod(np.arange(DRAWS), 40)
    inputs = SamplingInputs(
        temperature=zeros + temperature,
        top_p=zeros + top_p,
        min_p=zeros + min_p,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        repetition_penalty=zeros + 1,
        top_k=jnp.full(DRAWS, top_k, jnp.int32),
        seed=jnp.stack([jnp.asarray(seed, jnp.uint32), jnp.zeros(DRAWS, jnp.uint32)], axis=1),
        position=jnp.asarray(position, jnp.int32),
        prompt_len=jnp.zeros(DRAWS, jnp.int32),
        token_ids=jnp.zeros(1, jnp.int32),
        page_table=jnp.zeros((DRAWS, 1), jnp.int32),
        page_size=1,
        adjust_ids=jnp.full((DRAWS, 1), -1, jnp.int32),
        adjust_values=jnp.zeros((DRAWS, 1)),
        adjust_until=jnp.zeros((DRAWS, 1), jnp.int32),
        bans=jnp.full((DRAWS, 1, 4), -1, jnp.int32),
        mask=jnp.full((DRAWS, -(-LOGITS.size // 32)), -1, jnp.int32),
        features=jnp.int32(Feature.RANDOM | Feature.TRUNCATE),
    )
    return np.asarray(_draw(inputs))


def probabilities(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The exact distribution, by sorting, in float64."""
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


def chi_square_fits(tokens, p):
    """Whether the tokens' counts pass a chi-square test of p at the level 0.001; rare tokens are pooled."""
    if p[tokens].min() == 0:
        return False
    order = np.argsort(-p)
    wanted, counted = p[order] * len(tokens), np.bincount(tokens, minlength=V)[order]
    common = max(int((wanted >= 10).sum()), 2)
    wanted, counted = (np.append(x[: common - 1], x[common - 1 :].sum()) for x in (wanted, counted))
    statistic = ((counted - wanted) ** 2 / wanted).sum()
    # Wilson and Hilferty's cube root of the quantile; 3.0902 is the normal's 0.999 quantile.
    degrees = len(wanted) - 1
    critical = degrees * (1 - 2 / (9 * degrees) + 3.0902 * (2 / (9 * degrees)) ** 0.5) ** 3
    return statistic < critical


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_fit_the_exact_distribution(name):
    assert chi_square_fits(draw(**SETTINGS[name]), probabilities(**SETTINGS[name]))


@pytest.mark.parametrize("wrong", [{"top_p": 0.75}, {"top_p": 0.85}, {"top_p": 0.8, "temperature": 1.15}])
def test_the_test_can_tell_a_wrong_distribution(wrong):
    assert not chi_square_fits(draw(**wrong), probabilities(top_p=0.8))
