import math
from types import SimpleNamespace

import pytest
import torch

from local_elasticity.base.errors import InputError
from local_elasticity.similarity import definitions as similarity
from local_elasticity.similarity.definitions import DEFINITIONS, define, get_definition, movements, s_rel, s_rel_of


def outputs(n_s=4, n_t=5, k=3, size=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    before, source = torch.randn(n_t, k, generator=g), torch.randn(n_s, k, generator=g)
    return (
        before,
        before + size * torch.randn(n_s, n_t, k, generator=g),
        source,
        source + size * torch.randn(n_s, k, generator=g),
    )


def self_outputs(n=4, k=3):
    """Outputs whose targets are the sources."""
    before, after, _, _ = outputs(n, n, k)
    return before, after, before, after[range(n), range(n)]


SLOW = {
    "l1": lambda p, q: sum(abs(b - a) for a, b in zip(p, q, strict=True)),
    "l2": lambda p, q: math.sqrt(sum((b - a) ** 2 for a, b in zip(p, q, strict=True))),
    "kl": lambda p, q: sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
    "kl_reverse": lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
    "suhe_published": lambda p, q: sum(abs(b - a) for a, b in zip(p, q, strict=True)) / len(p),
    "kl_published": lambda p, q: sum(a * (math.log(a) - b) for a, b in zip(p, q, strict=True)) / len(p),
}


def slow_softmax(z):
    e = [math.exp(float(x)) for x in z]
    e = [1.0, e[0]] if len(e) == 1 else e
    return [x / sum(e) for x in e]


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_definitions_equal_slow_loops(name, k):
    before, after, sb, sa = outputs(k=k)
    got = s_rel_of(before, after, sb, sa, name)
    below = SLOW["l2"] if name == "suhe_published" else SLOW[name]
    assert got.dtype == torch.float64
    for i in range(4):
        den = below(slow_softmax(sb[i]), slow_softmax(sa[i]))
        den /= math.sqrt(max(k, 2)) if name == "suhe_published" else 1
        for j in range(5):
            num = SLOW[name](slow_softmax(before[j]), slow_softmax(after[i, j]))
            eps = 0.0 if name in ("l1", "l2") else 1e-8
            assert float(got[i, j]) == pytest.approx(num / (den + eps), rel=1e-5)


def test_he_su_is_the_norm_of_the_raw_change():
    before, after, sb, sa = (x.double() for x in outputs())
    want = (after - before).norm(dim=-1) / (sa - sb).norm(dim=-1)[:, None]
    torch.testing.assert_close(s_rel_of(before, after, sb, sa, "he_su", outputs="values"), want)


@pytest.mark.parametrize("name", ["he_su", "l1", "l2", "kl", "kl_reverse", "kl_published"])
def test_t1_self_similarity_is_one(name):
    got = s_rel_of(*self_outputs(), name).diagonal()
    torch.testing.assert_close(got, torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=0)


def test_t1_self_similarity_of_the_mixed_norms():
    got = s_rel_of(*self_outputs(50), "suhe_published").diagonal()
    assert got.min() > 0.8164
    assert got.max() < 0.9429


def test_t6_softmax_layer_closed_form():
    g = torch.Generator().manual_seed(1)
    h = torch.nn.functional.normalize(torch.randn(6, 4, generator=g, dtype=torch.float64))
    v = torch.randn(3, 4, generator=g, dtype=torch.float64)
    e = torch.eye(3, dtype=torch.float64)[torch.tensor([0, 1, 2, 0, 1, 2])]
    before = h @ v.T
    p = before.softmax(-1)
    step = -1e-4 * torch.einsum("sk,sd,td->stk", p - e, h, h)
    after = before + step
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    quad = torch.einsum("sk,tkl,sl->st", p - e, fisher, p - e)
    want = (h @ h.T / h.square().sum(1)[:, None]) ** 2 * quad / quad.diagonal()[:, None]
    plain = (before, after, before, after[range(6), range(6)])
    for name in ("kl", "kl_reverse"):
        torch.testing.assert_close(s_rel_of(*plain, name, eps=0.0), want, rtol=1e-4, atol=0)
    moved = torch.einsum("tkl,sl->stk", fisher, p - e).norm(dim=-1)
    l2 = (h @ h.T).abs() / h.square().sum(1)[:, None] * moved / moved.diagonal()[:, None]
    torch.testing.assert_close(s_rel_of(*plain, "l2"), l2, rtol=1e-4, atol=0)
    still = -torch.special.xlogy(p, p).sum(1) + p.square().sum(1)
    torch.testing.assert_close(s_rel_of(*plain, "kl_published"), still / still[:, None], rtol=1e-4, atol=0)


def test_t6_closed_form_reached_as_the_step_shrinks():
    before, after, sb, sa = (x.double() for x in outputs())
    change, source_change = after - before, sa - sb

    def kl(size, name):
        return s_rel_of(before, before + size * change, sb, sb + size * source_change, name, eps=0.0)

    torch.testing.assert_close(kl(1e-6, "kl"), kl(1e-6, "kl_reverse"), rtol=1e-4, atol=0)
    torch.testing.assert_close(kl(1e-6, "kl"), kl(1e-5, "kl"), rtol=1e-4, atol=0)


def test_t8_inputs_are_left_as_they_were():
    states = outputs()
    copies = [x.clone() for x in states]
    for name in DEFINITIONS:
        s_rel_of(*states, name)
    assert all(torch.equal(a, b) for a, b in zip(states, copies, strict=True))


def test_t10_uniform_pseudo_kl():
    zero = torch.zeros(1, 3)
    impact = SimpleNamespace(
        before=zero,
        after=zero[None],
        source_before=zero,
        source_after=zero,
        change=zero[None],
        source_change=zero,
        outputs="logits",
    )
    numerators, denominators = movements(impact, "kl_published")
    assert float(numerators) == pytest.approx(-(math.log(3) + 1 / 3) / 3)
    assert float(denominators) == pytest.approx(float(numerators) + 1e-8, abs=1e-15)


def test_change_computed_without_cancellation_is_used():
    before = torch.randn(3, 4) * 10
    change = 1e-7 * torch.randn(3, 3, 4)
    impact = SimpleNamespace(
        before=before,
        after=before + change,
        source_before=before,
        source_after=before + change[range(3), range(3)],
        change=change,
        source_change=change[range(3), range(3)],
        outputs="logits",
    )
    p = before.double().softmax(-1)
    centred = change.double() - (p * change).sum(-1, keepdim=True)
    num = 0.5 * (p * centred.square()).sum(-1)
    torch.testing.assert_close(s_rel(impact, "kl", eps=0.0), num / num.diagonal()[:, None], rtol=1e-4, atol=0)
    num = change.double().norm(dim=-1)
    torch.testing.assert_close(s_rel(impact, "he_su"), num / num.diagonal()[:, None])


def test_probabilities_as_they_are_and_one_column_is_two_classes():
    states = [x.double() for x in outputs()]
    logits = s_rel_of(*states, "kl")
    torch.testing.assert_close(s_rel_of(*[x.softmax(-1) for x in states], "kl", outputs="probabilities"), logits)
    states = [x.double() for x in outputs(k=1)]
    for name in ("kl", "l1", "suhe_published"):
        got = s_rel_of(*[x.sigmoid() for x in states], name, outputs="probabilities")
        torch.testing.assert_close(got, s_rel_of(*states, name))


def test_kl_with_zero_probabilities():
    before, source = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.2, 0.8, 0.0]])
    after = torch.tensor([[[1.0, 0.0, 0.0]]])
    states = (before, after, source, torch.tensor([[0.8, 0.2, 0.0]]))
    den = 0.8 * math.log(4) - 0.2 * math.log(4)
    assert float(s_rel_of(*states, "kl", "probabilities", eps=0.0)) == pytest.approx(math.log(2) / den)
    assert s_rel_of(*states, "kl_reverse", "probabilities").isnan().all()  # an infinite movement


def test_undefined_ratios_are_nan():
    before, after, sb, sa = outputs()
    sa[1] = sb[1]
    for name in ("he_su", "l1", "l2"):
        got = s_rel_of(before, after, sb, sa, name)
        assert got[1].isnan().all()
        assert got[[0, 2, 3]].isfinite().all()
    assert s_rel_of(before, before.expand_as(after), sb, sb, "he_su").isnan().all()


def test_chunks_change_nothing(monkeypatch):
    states = outputs()
    whole = s_rel_of(*states, "kl")
    monkeypatch.setattr(similarity, "_CHUNK_NUMBERS", 1)
    assert torch.equal(s_rel_of(*states, "kl"), whole)


def test_own_definition():
    def root(change):
        return change.square().sum(-1)

    try:

        @define("own", on="change", eps=0.5, words="largest", denominator=root)
        def largest(change):
            return change.abs().amax(-1)

        before, after, sb, sa = (x.double() for x in outputs())
        want = (after - before).abs().amax(-1) / ((sa - sb).square().sum(-1) + 0.5)[:, None]
        torch.testing.assert_close(s_rel_of(before, after, sb, sa, "own"), want)
        assert get_definition("own").words == "largest"

        @define("own", on="outputs")
        def unreduced(before, after):
            return after - before

        with pytest.raises(InputError, match="last dimension"):
            s_rel_of(before, after, sb, sa, "own")
    finally:
        DEFINITIONS.pop("own", None)


def slow_bernoulli(z_before, z_after):
    total = 0.0
    for a, b in zip(z_before, z_after, strict=True):
        p, q = 1 / (1 + math.exp(-float(b))), 1 / (1 + math.exp(-float(a)))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total


@pytest.mark.parametrize("k", [1, 2, 5])
def test_bernoulli_kl_equals_slow_loops_for_logits_and_probabilities(k):
    states = [x.double() for x in outputs(k=k)]
    before, after, sb, sa = states
    got = s_rel_of(*states, "bernoulli_kl", independent=True)
    for i in range(4):
        for j in range(5):
            want = slow_bernoulli(before[j], after[i, j]) / (slow_bernoulli(sb[i], sa[i]) + 1e-8)
            assert float(got[i, j]) == pytest.approx(want, rel=1e-9)
    as_probabilities = s_rel_of(*[x.sigmoid() for x in states], "bernoulli_kl", "probabilities")
    torch.testing.assert_close(as_probabilities, got, rtol=1e-9, atol=0)
    own = s_rel_of(*self_outputs(k=k), "bernoulli_kl", eps=0.0).diagonal()
    torch.testing.assert_close(own, torch.ones(4).double(), rtol=1e-12, atol=0)


def test_bernoulli_kl_of_one_output_is_kl():
    states = outputs(k=1)
    torch.testing.assert_close(s_rel_of(*states, "bernoulli_kl"), s_rel_of(*states, "kl"), rtol=1e-12, atol=0)


def test_bernoulli_kl_of_tiny_changes_of_large_logits():
    before = torch.tensor([[30.0, -25.0, 0.5, 8.0]]).double().expand(3, 4)
    change = 1e-6 * torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    own = change[range(3), range(3)]
    p = before.sigmoid()
    want = 0.5 * (p * (1 - p) * change.square()).sum(-1)
    got = s_rel_of(before, before + change, before, before + own, "bernoulli_kl", eps=0.0)
    torch.testing.assert_close(got, want / want.diagonal()[:, None], rtol=1e-5, atol=0)


def test_bernoulli_kl_at_zero_and_one():
    sure = torch.tensor([[0.0, 1.0]])
    moved = torch.tensor([[0.0, 1.0], [0.1, 1.0]])
    source = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    states = (sure, moved[:, None], source, source + 0.1)
    got = s_rel_of(*states, "bernoulli_kl", "probabilities", eps=0.0)
    assert float(got[0]) == 0.0
    assert got[1].isnan()  # an infinite movement
    with pytest.raises(InputError, match="between 0 and 1"):
        s_rel_of(sure, moved[:, None], source, source + 0.6, "bernoulli_kl", "probabilities")
    with pytest.raises(InputError, match="values"):
        s_rel_of(*states, "bernoulli_kl", "values")


@pytest.mark.parametrize("name", ["kl", "kl_reverse", "l1", "l2", "kl_published", "suhe_published"])
def test_independent_outputs_are_refused_by_name(name):
    states = outputs()
    for refused in (
        lambda: s_rel_of(*states, name, independent=True),
        lambda: s_rel_of(*states, name, independent=True, limit=True),
    ):
        with pytest.raises(InputError, match=f"'{name}'.*bernoulli_kl"):
            refused()
    assert s_rel_of(*states, "bernoulli_kl", independent=True).isfinite().all()
    assert s_rel_of(*states, "he_su", independent=True).isfinite().all()


def test_an_impact_that_says_it_is_independent_is_refused():
    before, after, sb, sa = outputs()
    parts = {"before": before, "after": after, "source_before": sb, "source_after": sa, "outputs": "logits"}
    impact = SimpleNamespace(**parts, change=after - before, source_change=sa - sb, independent=True)
    for moved in (impact, similarity.at_limit(impact), similarity.at_limit(impact, together=True)):
        with pytest.raises(InputError, match="one distribution"):
            s_rel(moved, "kl")
        assert s_rel(moved, "bernoulli_kl", eps=0.0).isfinite().all()


STATES = outputs()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: s_rel(torch.zeros(3)), "an impact"),
        (lambda: movements(None), "an impact"),
        (lambda: similarity.at_limit(STATES), "an impact"),
        (lambda: s_rel_of(*STATES, ["kl"]), "name of a definition"),
        (lambda: s_rel_of(*STATES, None), "name of a definition"),
        (lambda: s_rel_of(*STATES, eps="small"), "eps"),
        (lambda: s_rel_of(*STATES, eps=True), "eps"),
        (lambda: s_rel_of(*STATES, eps=math.nan), "eps"),
        (lambda: s_rel_of(*STATES, eps=-1.0, limit=True), "eps"),
        (lambda: s_rel_of(*STATES, outputs=STATES[0]), "outputs in"),
        (lambda: s_rel_of(*STATES, outputs="logit"), "did you mean 'logits'"),
        (lambda: s_rel_of("abc", *STATES[1:]), "numbers for before"),
        (lambda: s_rel_of(STATES[0], None, *STATES[2:]), "numbers for after"),
        (lambda: s_rel_of(*STATES[:2], [[1, 2], [3]], STATES[3]), "numbers for source_before"),
        (lambda: s_rel_of(*STATES[:3], STATES[3] + 1j), "real numbers for source_after"),
        (lambda: s_rel_of(*(x[..., :0] for x in STATES)), "at least one"),
        (lambda: define(str), r"@define"),
        (lambda: define(""), "a name"),
        (lambda: define("new", on=["change"]), "on in"),
        (lambda: define("new", words=3), "words"),
        (lambda: define("new", denominator=3), "denominator"),
        (lambda: define("new")(3), "movement"),
        (lambda: define("new", eps=None), "eps"),
    ],
)
def test_wrong_arguments_are_refused_in_our_words(call, words):
    with pytest.raises(InputError, match=words) as refusal:
        call()
    assert all((refusal.value.expected, refusal.value.got, refusal.value.do))
    assert "new" not in DEFINITIONS


@pytest.mark.parametrize(
    ("movement", "words"),
    [
        (lambda before, after: before[7], "IndexError"),
        (lambda change: change, "TypeError"),
        (lambda before, after: 3.0, "float"),
        (lambda before, after: (after - before).norm(dim=-1) * 1j, "complex"),
    ],
)
def test_a_movement_that_fails_is_refused_by_its_name(movement, words):
    own = similarity.Definition("own", "outputs", movement, movement, 0.0, "own")
    with pytest.raises(InputError, match=f"(?s)'own'.*{words}"):
        s_rel_of(*STATES, own)


def test_bad_input_is_refused():
    states = outputs()
    with pytest.raises(InputError, match="did you mean 'he_su'"):
        get_definition("hesu")
    with pytest.raises(InputError, match="built-in"):
        define("kl")
    with pytest.raises(InputError, match="on in"):
        define("other", on="nothing")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="eps"):
        s_rel_of(*states, eps=-1.0)
    with pytest.raises(InputError, match="values"):
        s_rel_of(*states, "kl", "values")
    with pytest.raises(InputError, match="sum to 1"):
        s_rel_of(*states, "kl", "probabilities")
    with pytest.raises(InputError, match="outputs in"):
        s_rel_of(*states, "kl", "nothing")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n_s, n_t, K"):
        s_rel_of(states[0], states[1][:, :2], *states[2:])
