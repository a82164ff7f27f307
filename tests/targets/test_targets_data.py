"""Target files and the precision option."""

import pytest

from vlm_edge.targets import load_target, parse_precision, resolve_precision, targets
from vlm_edge_runtime.errors import TargetError


def test_shipped_targets():
    assert {"cpu-fp32", "cpu-int4", "cpu-int8", "rtx-40", "jetson-orin-nano-jp62"} <= {target.name for target in targets()}
    int4 = load_target("cpu-int4")
    assert int4.precision["decoder"] == "int4" and int4.precision["embed_tokens"] == "int8"
    assert int4.options.accuracy_level == 4, "from the shared base"


def test_unknown_target_names_the_nearest_and_all():
    with pytest.raises(TargetError, match=r"Did you mean 'cpu-int4'.*cpu-fp32, cpu-int4, cpu-int8"):
        load_target("cpu_int4")
    with pytest.raises(TargetError, match="unknown target 'cpu'"):
        load_target("cpu")


def test_own_file(tmp_path):
    file = tmp_path / "robot.toml"
    file.write_text('name = "robot"\nextends = "cpu-int4"\n[precision]\nvision_encoder = "fp32"\n[options]\nweight_bits = 8\n')
    target = load_target(file)
    assert (target.name, target.backend) == ("robot", "ort-cpu")
    assert target.precision["vision_encoder"] == "fp32" and target.precision["decoder"] == "int4"
    assert target.options.weight_bits == 8 and target.options.scheme == "mse"


@pytest.mark.parametrize(
    "text,message",
    [
        ("name = 1", "not a valid target"),
        ("name = ", "not valid TOML"),
        ('name = "x"\nextends = "nothing"', "extends 'nothing'"),
        ('name = "x"\nextends = "cpu-int4"\nspeed = "fast"', "unknown field `speed`"),
        ('name = "x"\nextends = "cpu-int4"\n[options]\nweight_bits = 6', "weight_bits"),
        ('name = "x"\nextends = "cpu-int4"\n[precision]\ndecoder = "int3"', "decoder cannot be 'int3'"),
        ('name = "x"\nextends = "cpu"\n[precision]\ndecoder = "int4"', "names no precision for"),
        ('name = "x"\nextends = "cpu-int4"\nbackend = "tpu"', "backend"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(TargetError, match=message):
        load_target(file)


def test_missing_file(tmp_path):
    with pytest.raises(TargetError, match="no target file"):
        load_target(tmp_path / "absent.toml")


def test_precision_option():
    assert parse_precision("vision=int8, projector=fp32,decoder=int4") == {
        "vision_encoder": "int8",
        "projector": "fp32",
        "decoder": "int4",
    }
    assert set(parse_precision("int8").values()) == {"int8"}
    assert parse_precision(None) == {} and parse_precision({"text": "fp32"}) == {"text_encoder": "fp32"}


@pytest.mark.parametrize(
    "text,message",
    [
        ("decodr=int4", "Did you mean 'decoder'"),
        ("decoder=int5", "it can be: fp32, int8, int4"),
        ("decoder=fp16", "slower than fp32"),
        ("vision=int8,vision_encoder=fp32", "named twice"),
        ("vision=int8,fast", "is not GRAPH=PRECISION"),
        ("fast", "not a precision"),
        ("", "not a precision"),
    ],
)
def test_bad_precision(text, message):
    with pytest.raises(TargetError, match=message):
        parse_precision(text)


def test_the_head_follows_the_decoder():
    defaults = load_target("cpu-fp32").precision
    assert resolve_precision(defaults, "decoder=int4")["lm_head"] == "int8"
    assert resolve_precision(defaults, "decoder=int8")["lm_head"] == "int8"
    assert resolve_precision(load_target("cpu-int4").precision, "decoder=fp32")["lm_head"] == "fp32"
    assert resolve_precision(defaults, "decoder=int4,lm_head=int4")["lm_head"] == "int4"
