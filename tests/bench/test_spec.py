from __future__ import annotations

import pytest

from elision.bench.spec import parse, parse_many
from elision.errors import OptionError, UnknownName
from elision.method import registry


def test_values_get_the_type_of_their_option() -> None:
    method = parse("taylorseer:interval=4,site=stack,factors_dtype=none,compute-after=none").method
    assert (method.interval, method.site, method.factors_dtype, method.compute_after) == (4, "stack", None, None)
    easy = parse("easycache:threshold=1,warmup_steps=3").method
    assert isinstance(easy.threshold, float)
    assert isinstance(easy.warmup_steps, int)
    assert parse("teacache:coefficients=flux").method.coefficients == "flux"
    assert parse("teacache:coefficients=(1.5,0.0),degree=2").method.coefficients == (1.5, 0.0)


@pytest.mark.parametrize("name", sorted(registry()))
def test_label_of_defaults_is_the_name_and_reads_back(name: str) -> None:
    cls = registry()[name]
    if not cls.needs_profile:
        assert parse(name).label == name
        assert parse(parse(name).label) == parse(name)


@pytest.mark.parametrize(
    "text",
    [
        "easycache:threshold=0.2,warmup_steps=4",
        "teacache:threshold=0.3,coefficients=(1.0,0.0)",
        "taylorseer:interval=3,factors_dtype=bfloat16",
        "teacache:profile=made.safetensors",
    ],
)
def test_label_reads_back(text: str) -> None:
    assert parse(text).label == text
    assert parse(parse(text).label) == parse(text)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("easycash", UnknownName, "did you mean 'easycache'"),
        ("easycache:treshold=0.1", UnknownName, "did you mean 'threshold'"),
        ("easycache:threshold=-1", OptionError, "at least 0"),
        ("easycache:threshold=high", OptionError, "not of type float"),
        ("taylorseer:interval=2.5", OptionError, "not a whole number"),
        ("taylorseer:site=moon", OptionError, "not one of"),
        ("taylorseer:interval", OptionError, "not option=value"),
        ("taylorseer:interval=", OptionError, "not option=value"),
    ],
)
def test_bad_text_raises_the_librarys_errors(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse(text)


def test_many_are_told_apart_from_options() -> None:
    labels = [s.label for s in parse_many("easycache:threshold=0.1,warmup_steps=4,taylorseer:interval=3,uniform stale")]
    assert labels == ["easycache:threshold=0.1,warmup_steps=4", "taylorseer:interval=3", "uniform", "stale"]
    assert [s.label for s in parse_many(["uniform", "taylorseer:interval=2;stale"])] == [
        "uniform",
        "taylorseer:interval=2",
        "stale",
    ]


def test_labels_do_not_tell_where_profiles_lie() -> None:
    spec = parse("teacache:profile=/some/where/made.safetensors")
    assert spec.profile == "/some/where/made.safetensors"
    assert spec.label == "teacache:profile=made.safetensors"


def test_none_is_refused() -> None:
    with pytest.raises(OptionError, match="no method given"):
        parse_many("")
