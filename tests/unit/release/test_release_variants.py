"""Which variants a publisher ships, what is signed of them, and what it takes devices to hold."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from federated.errors import ReleaseError, WrongContent
from federated.manifest import sha256_hex
from federated.release import Artefact, Publisher, ReleaseClient, ReleaseRecord, Tried, Variant, with_variants
from federated.release.codecs import TWINS, decode, encode
from tests.unit.release.conftest import artefact_of
from tests.unit.release.weights import encoded, factors, values_in, versions

Device = Callable[..., ReleaseClient]
DIGEST = "a" * 64


def loss_from(truth: bytes, *, worth: float = 1.0) -> Callable[[bytes], float]:
    """A loss that grows with the relative distance from the truth."""
    right = values_in(truth)
    return lambda weights: 1.0 + worth * float(np.linalg.norm(values_in(weights) - right) / np.linalg.norm(right))


def shipped(tried: Sequence[Tried]) -> list[str]:
    return sorted(one.codec for one in tried if one.shipped)


def files_of(artefact: Artefact) -> list[tuple[str, bool]]:
    return sorted((one.codec, bool(one.source)) for one in artefact.variants)


def test_without_a_measurement_nothing_lossy_is_shipped() -> None:
    before, weights = versions(2)
    made, tried = with_variants(artefact_of(weights), held=[before])
    assert shipped(tried) == ["diff", "lossless"]
    assert {one.weights_digest for one in made.variants} == {made.manifest.weights_digest}
    assert (made.loss, {one.loss for one in tried}) == (None, {None})


@pytest.mark.parametrize(
    ("worth", "codecs"),
    [
        (0.0, ["int4"]),
        (0.1, ["int8"]),
        (0.9, ["bf16"]),
        (5.0, ["fp16"]),
        (1e6, []),
    ],
)
def test_the_smallest_full_file_within_the_tolerance(worth: float, codecs: list[str]) -> None:
    """int4 is about 0.08 off here, int8 0.004, bf16 0.002, fp16 0.0002; lossless is always there."""
    weights = encoded(factors(scale=1.0))
    made, tried = with_variants(artefact_of(weights), evaluate=loss_from(weights, worth=worth))
    assert shipped(tried) == sorted([*codecs, "lossless"])
    assert {one.codec for one in tried} == {"lossless", "fp16", "bf16", "int8", "int4"}
    measured = {one.codec: one.loss for one in tried}
    assert [one.loss for one in made.variants] == [measured[one.codec] for one in made.variants]
    assert made.loss == measured["lossless"] == 1.0


def test_a_wider_tolerance_takes_a_smaller_file() -> None:
    weights = encoded(factors())
    evaluate = loss_from(weights)
    assert "int4" not in shipped(with_variants(artefact_of(weights), evaluate=evaluate, tolerance=0.01)[1])
    assert "int4" in shipped(with_variants(artefact_of(weights), evaluate=evaluate, tolerance=0.2)[1])


def test_a_loss_that_is_no_number_admits_nothing() -> None:
    weights = encoded(factors())
    _, tried = with_variants(
        artefact_of(weights), evaluate=lambda one: 1.0 if one == weights else float("nan"), tolerance=9.0
    )
    assert shipped(tried) == ["lossless"]


def test_each_lossy_diff_comes_with_the_full_file_that_gives_the_same() -> None:
    before, weights = versions(2)
    line = encode(before, "int8").weights
    made, tried = with_variants(artefact_of(weights), held=[line, before], evaluate=loss_from(weights), tolerance=0.012)
    diffs = [one for one in made.variants if one.source and one.codec != "diff"]
    assert {(one.codec, one.source) for one in diffs} == {
        ("diff-int2", sha256_hex(line)),
        ("recode-int8", sha256_hex(before)),
    }
    full = {one.weights_digest: one.codec for one in made.variants if not one.source}
    assert [full[one.weights_digest] for one in diffs] == [TWINS[one.codec] for one in diffs]
    by_file = {one.file: one for one in made.variants}
    for name, data in made.files.items():
        source = {sha256_hex(one): one for one in (line, before)}.get(by_file[name].source)
        assert sha256_hex(decode(data, source)) == by_file[name].weights_digest
    assert {one.codec for one in tried if one.source == sha256_hex(before)} == {"diff", "recode-int8", "recode-int4"}


def test_the_smallest_diff_of_those_that_are_good_enough() -> None:
    before, weights = versions(2)
    options = {"held": [before], "evaluate": loss_from(weights)}
    sizes = {one.codec: one.nbytes for one in with_variants(artefact_of(weights), **options, tolerance=1.0)[1]}
    for tolerance, codec in [(1.0, min(TWINS, key=sizes.__getitem__)), (0.012, "diff-int2"), (1e-9, "diff")]:
        made, _ = with_variants(artefact_of(weights), **options, tolerance=tolerance)
        smallest = min((one for one in made.variants if one.source), key=lambda one: len(made.files[one.file]))
        assert smallest.codec == codec


def test_a_file_that_saves_nearly_nothing_is_not_shipped() -> None:
    """Random bits cannot be made fewer, and a diff from something else altogether is no shortcut."""
    rng = np.random.default_rng(0)
    noise = encoded({"x": rng.integers(0, 2**31, 4000, dtype=np.uint32).view(np.float32)})
    other = encoded({"x": rng.integers(0, 2**31, 4000, dtype=np.uint32).view(np.float32)})
    made, tried = with_variants(artefact_of(noise), held=[other])
    assert (made.variants, shipped(tried)) == ((), [])


def test_what_a_codec_cannot_hold_is_told_and_left_out() -> None:
    weights = encoded({"x": np.full(640, 1e6, dtype=np.float32)})
    _, tried = with_variants(artefact_of(weights), evaluate=lambda _: 1.0)
    assert [(one.nbytes, one.shipped) for one in tried if one.codec == "fp16"] == [(0, False)]
    with pytest.raises(ReleaseError, match="this codec cannot hold"):
        with_variants(artefact_of(weights), ["fp16"])


def test_named_codecs_are_shipped_whatever_they_are_worth() -> None:
    first, second, weights = versions(3)
    asked = ["fp16", "int8", "recode-int4", "diff-int2"]
    made, tried = with_variants(artefact_of(weights), asked, held=[second, first])
    expected = {("fp16", False), ("int8", False), ("recode-int4", True), ("int4", False), ("diff-int2", True)}
    assert set(files_of(made)) == expected
    assert files_of(made).count(("recode-int4", True)) == 2
    assert files_of(made).count(("diff-int2", True)) == 1  # one line goes on
    assert files_of(made).count(("int8", False)) == 2  # the version's own, and what the step ends at
    assert all(one.loss is None for one in tried)


def test_named_codecs_that_are_none() -> None:
    with pytest.raises(ReleaseError, match="no codec 'zip'; there are lossless, fp16"):
        with_variants(artefact_of(encoded(factors())), ["zip"])


def test_no_diff_from_the_weights_themselves() -> None:
    weights = encoded(factors())
    line = encode(weights, "int4").weights
    made, tried = with_variants(artefact_of(weights), held=[weights, line], evaluate=lambda _: 1.0)
    assert {one.source for one in tried} == {"", sha256_hex(line)}
    assert [one for one in made.variants if one.source == one.weights_digest] == []


def test_weights_that_are_not_canonical() -> None:
    with pytest.raises(ReleaseError, match="the weights are no canonical weights"):
        with_variants(artefact_of(b"junk"))


def test_other_files_stay() -> None:
    made, _ = with_variants(artefact_of(encoded(factors()), {"note.txt": b"hello"}))
    assert made.files["note.txt"] == b"hello"
    assert len(made.files) == 2


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (Variant("none.fprc", "int4", DIGEST), "variant 'none.fprc' is no file of the version"),
        (Variant("x.fprc", "INT4", DIGEST), "has codec 'INT4'"),
        (Variant("x.fprc", "int4", "abc"), "and weights 'abc'"),
        (Variant("x.fprc", "int4", DIGEST, "abc"), "starts from 'abc'; expected a SHA-256"),
        (Variant("x.fprc", "diff", DIGEST, "b" * 64), "ends at weights that no full file gives"),
    ],
)
def test_variants_that_cannot_be(variant: Variant, message: str) -> None:
    good = artefact_of(b"weights", {"x.fprc": b""})
    with pytest.raises(ReleaseError, match=message):
        Artefact(good.manifest, good.weights, good.files, (variant,))


def test_too_many_variants() -> None:
    good = artefact_of(b"weights", {"x.fprc": b""})
    for variants in ([Variant("x.fprc", "int4", DIGEST)] * 2, [Variant("x.fprc", "int4", DIGEST)] * 65):
        with pytest.raises(ReleaseError, match="expected at most 64, each a file of its own"):
            Artefact(good.manifest, good.weights, good.files, tuple(variants))


def test_a_record_as_plain_data() -> None:
    variants = (Variant("a", "int4", DIGEST, loss=0.25), Variant("b", "recode-int4", DIGEST, "b" * 64))
    record = ReleaseRecord("c" * 64, 1, "base", "d" * 64, files=("a", "b"), variants=variants, loss=1 / 3)
    custom = record.to_custom()
    assert custom["variants"] == [
        {"file": "a", "codec": "int4", "weights_digest": DIGEST, "loss": "0.25"},
        {"file": "b", "codec": "recode-int4", "weights_digest": DIGEST, "source": "b" * 64},
    ]
    assert custom["loss"] == "0.333333"  # canonical JSON, as TUF signs it, knows no fractions
    back = ReleaseRecord.from_custom(custom, "here")
    assert (back.variants, back.loss) == (variants, 0.333333)
    assert back.digests == {DIGEST, "d" * 64}


def test_a_record_from_before_there_were_variants() -> None:
    record = ReleaseRecord("c" * 64, 1, "base", "d" * 64, files=("a",))
    assert set(record.to_custom()) == {
        "version_id", "release_counter", "base_digest", "weights_digest", "adapter_id", "audit_head", "files",
    }  # fmt: skip
    assert ReleaseRecord.from_custom(record.to_custom(), "here") == record


def test_a_record_of_a_newer_library() -> None:
    """Unknown keys are passed over, and a codec that is not known here is nobody's fault."""
    record = ReleaseRecord("c" * 64, 1, "base", "d" * 64, files=("a",), variants=(Variant("a", "av7", DIGEST),))
    custom = record.to_custom()
    custom["variants"][0]["tomorrow"] = 1
    assert ReleaseRecord.from_custom(custom, "here") == record


@pytest.mark.parametrize(
    "variants",
    [
        5,
        [5],
        [{"file": "a"}],
        [{"file": 5, "codec": "int4", "weights_digest": DIGEST}],
        [{"file": "a", "codec": 5, "weights_digest": DIGEST}],
        [{"file": "a", "codec": "int4", "weights_digest": DIGEST, "source": 7}],
        [{"file": "a", "codec": "int4", "weights_digest": DIGEST, "loss": "much"}],
        [{"file": "a", "codec": "int4", "weights_digest": DIGEST, "loss": "nan"}],
        [{"file": "a", "codec": "int4", "weights_digest": DIGEST, "loss": "0" * 300}],
        [{"file": "a", "codec": "int4", "weights_digest": DIGEST, "loss": {}, "source": ""}, {"file": "a"}],
        [{"file": "a", "codec": "diff", "weights_digest": DIGEST, "source": "b" * 64}],
    ],
)
def test_records_that_somebody_with_a_key_made_up(variants: object) -> None:
    record = ReleaseRecord("c" * 64, 1, "base", "d" * 64, files=("a",))
    with pytest.raises(WrongContent, match="is no record of a release"):
        ReleaseRecord.from_custom(record.to_custom() | {"variants": variants}, "here")


def published(publisher: Publisher, weights: bytes, number: int, **options: object) -> Artefact:
    made, _ = with_variants(artefact_of(weights, round_number=number), **options)
    publisher.publish("stable", made)
    return made


def test_what_devices_hold_is_read_from_the_repository(publisher: Publisher) -> None:
    first, second = versions(2)
    assert publisher.held("stable") == []
    one = published(publisher, first, 1, evaluate=loss_from(first), tolerance=0.01)
    line = encode(first, "int8").weights
    assert publisher.held("stable") == [line, first]  # steps go on from the lossy line
    two = published(publisher, second, 2)
    assert publisher.held("stable") == [second]
    assert publisher.held("stable", two.version_id, one.version_id, "0" * 64) == [second, line, first]


def test_a_line_goes_on_over_versions(publisher: Publisher) -> None:
    """Each step starts from what the one before ended at, and what is held stays near each version."""
    for number, weights in enumerate(versions(5)):
        held = publisher.held("stable")
        made = published(publisher, weights, number, held=held, evaluate=loss_from(weights), tolerance=0.02)
        steps = [one for one in made.variants if one.codec == "diff-int2"]
        assert [one.source for one in steps] == [sha256_hex(one) for one in held[:1]]
        held = publisher.held("stable")
        assert len(held) <= 3
        assert loss_from(weights)(held[0]) <= 1.02


def test_files_that_are_gone_or_changed(publisher: Publisher) -> None:
    published(publisher, encoded(factors()), 1)
    (path,) = publisher.folder.glob("targets/stable/*/*.weights.safetensors")
    path.write_bytes(b"other")
    with pytest.raises(ReleaseError, match="is not what was signed; bring it back from a copy"):
        publisher.held("stable")
    path.unlink()
    with pytest.raises(ReleaseError, match="cannot read what devices hold: No such file"):
        publisher.held("stable")


def test_a_variant_that_gives_something_else(publisher: Publisher, tmp_path: Path) -> None:
    """Somebody published by hand, and wrote a wrong digest."""
    weights = encoded(factors())
    good = artefact_of(weights, {"x.fprc": encode(weights, "int8").data})
    publisher.publish("stable", Artefact(good.manifest, good.weights, good.files, (Variant("x.fprc", "int8", DIGEST),)))
    with pytest.raises(ReleaseError, match=r"x.fprc of version .* gives other weights than were signed"):
        publisher.held("stable")


def test_a_variant_of_a_newer_library_is_not_decoded(publisher: Publisher) -> None:
    weights = encoded(factors())
    good = artefact_of(weights, {"x.fprc": b"?"})
    publisher.publish("stable", Artefact(good.manifest, good.weights, good.files, (Variant("x.fprc", "av7", DIGEST),)))
    assert publisher.held("stable") == [weights]
