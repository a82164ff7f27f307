"""GPU targets: their data is whole and consistent, cards and files of one's own, precision words by hardware."""

import msgspec
import pytest

from vlm_edge.targets import load_target, parse_precision, resolve_precision, targets
from vlm_edge.targets.device import bounds, numbers
from vlm_edge.targets.import_table import load_table, table_for
from vlm_edge_runtime.errors import TargetError

GPUS = [target for target in targets() if target.device]
NATIVE = {"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization"}


def test_the_targets_of_the_issue_are_there():
    jetsons = {f"jetson-{name}{pack}" for name in ("orin-nano", "orin-nx", "agx-orin") for pack in ("", "-jp62")}
    wanted = {"cpu-x86", "cpu-arm64", "cuda-desktop", "rtx-30", "rtx-40", "rtx-50", "h100-h200", "jetson-thor"} | jetsons
    assert wanted <= {target.name for target in targets()}


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_data_agrees_with_itself(target):
    device, context = target.gpu()
    assert resolve_precision(target.precision, None, words=target.words)["decoder"] in target.words["decoder"]
    assert device.usable_bytes < device.memory_bytes == int(device.memory_gib * 2**30)
    assert context.buckets == sorted(set(context.buckets))
    assert ("fp8" in device.precisions) == (min(device.sm) >= 89), "Ada, Hopper and Blackwell have fp8"
    assert ("nvfp4" in device.precisions) == (min(device.sm) >= 100), "Blackwell has fp4"
    assert ("bf16" in device.precisions) == (min(device.sm) >= 80)
    if target.backend.startswith("tensorrt"):
        table = table_for(target.backend, device)
        assert set(device.imports) <= set(table.ops)
        assert device.accepts(device.oldest_tensorrt) and not device.accepts("8.6.1")
        assert set(device.imports) == (
            NATIVE if numbers(table.version) >= (10, 15) or target.backend == "tensorrt-rtx" else set()
        )


@pytest.mark.parametrize(
    "name,jetpack,tensorrt,table",
    [
        ("jetson-orin-nano", "7.2", "10.16.2.10", "tensorrt-10.16"),
        ("jetson-agx-orin-jp62", "6.2", "10.3.0.30", "tensorrt-10.3"),
        ("jetson-thor-jp71", "7.1", "10.13.3.9", "tensorrt-10.13"),
    ],
)
def test_a_jetpack_brings_its_tensorrt(name, jetpack, tensorrt, table):
    target = load_target(name)
    device = target.gpu()[0]
    assert device.jetpack == jetpack and device.memory_shared and device.accepts(tensorrt)
    assert table_for(target.backend, device) is load_table(table)
    assert target.precision["decoder"] == "int4" and target.precision["encoder"] == "fp16"


def test_cards_are_targets_with_a_memory_of_their_own():
    card, family = load_target("rtx-4090"), load_target("rtx-40")
    assert (card.name, card.backend, card.device.sm) == ("rtx-4090", "tensorrt-rtx", [89])
    assert (card.device.memory_gib, card.device.bandwidth_gbs) == (24, 1008)
    assert family.device.memory_gib == min(one.memory_gib for one in family.cards.values())
    assert family.device.bandwidth_gbs == min(one.bandwidth_gbs for one in family.cards.values())
    assert card.cards == {} and card.precision == family.precision
    older = load_target("jetson-orin-nano-4gb-jp62")
    assert older.device.jetpack == "6.2" and older.device.reserved_gib == 1.5
    with pytest.raises(TargetError, match="Did you mean 'rtx-4090'"):
        load_target("rtx4090")


def test_every_card_has_one_family():
    cards = [card for target in targets() for card in target.cards]
    assert len(cards) == len(set(cards)) and not set(cards) & {target.name for target in targets()}
    assert all(load_target(card).name == card for card in cards)


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "drone.toml"
    device, rest = "[device]\nmemory_gib = 8", "[context]\nbuckets = [512]\n[precision]\ndecoder = 'fp16'"
    file.write_text(f"name = 'drone'\nextends = 'jetson-orin-nx-jp62'\n{device}\n{rest}\n")
    target = load_target(file)
    device, context = target.gpu()
    assert (device.memory_gib, device.jetpack, context.buckets, context.max_batch) == (8, "6.2", [512], 1)
    assert target.precision["decoder"] == "fp16" and target.cards == {}


@pytest.mark.parametrize(
    "text,message",
    [
        ('extends = "rtx-40"\n[device]\nsm = [8]', "are not compute capabilities; write 8.7 as 87"),
        ('extends = "rtx-40"\n[device]\ntensorrt = "10.3"', "is not a range of versions"),
        ('extends = "rtx-40"\n[device]\nreserved_gib = 9', "cannot be reserved"),
        ('extends = "rtx-40"\n[device]\nimports = ["Softmax"]', "Invalid enum value 'Softmax'"),
        ('extends = "rtx-40"\n[context]\nbuckets = [4096, 1024]', "rising numbers of tokens"),
        ('extends = "rtx-40"\n[context]\nmax_batch = 0', "at least one row decodes"),
        ('extends = "rtx-40"\n[precision]\ndecoder = "nvfp4"', "decoder cannot be 'nvfp4' on this target"),
        ('extends = "cuda-desktop"\n[device]\ntensorrt = ">=10.3"', "which does not use it"),
        ('extends = "cpu-int4"\nbackend = "tensorrt"', "needs a \\[device\\] table"),
        ('extends = "rtx-40"\nbackend = "ort-cpu"', "has no \\[device\\] table"),
        ('extends = "rtx-40"\n[device]\nbandwidth_gbs = 0', "not a memory bandwidth"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "x.toml"
    file.write_text(f'name = "x"\n{text}\n')
    with pytest.raises(TargetError, match=message):
        load_target(file)


def test_ranges_of_versions():
    assert bounds(">=10.3,<10.4") == ("10.3", "10.4") and bounds(" >= 1.7 ") == ("1.7", "")
    assert numbers("10.16.1.11") == (10, 16, 1, 11) and numbers("1.7.1+cu13") == (1, 7, 1)
    device = load_target("jetson-orin-nano").gpu()[0]
    assert [device.accepts(version) for version in ("10.15.1", "10.16", "10.16.9.9", "10.17", "11.0")] == [0, 1, 1, 0, 0]
    assert msgspec.structs.replace(device, tensorrt=">=10.16").accepts("12.1")


def test_words_depend_on_backend_and_hardware():
    assert "fp8" in load_target("rtx-40").words["decoder"] and "fp8" not in load_target("rtx-30").words["decoder"]
    assert "fp16" in load_target("cuda-desktop").words["decoder"] and "fp16" not in load_target("cpu-int4").words["decoder"]
    thor = load_target("jetson-thor")
    assert parse_precision("decoder=nvfp4,vision=fp8", words=thor.words) == {"decoder": "nvfp4", "vision_encoder": "fp8"}
    with pytest.raises(TargetError, match="decoder cannot be 'fp8' on this target; it can be: fp32, fp16, bf16, int8, int8w"):
        parse_precision("decoder=fp8", words=load_target("jetson-agx-orin").words)
    with pytest.raises(TargetError, match="slower than fp32 on CPUs"):
        parse_precision("decoder=fp16")


def test_a_quantised_decoder_keeps_a_finer_head():
    orin = load_target("jetson-orin-nano")
    for word, head in (("int4", "fp16"), ("fp32", "fp32"), ("int8", "fp16"), ("int8w", "int8w"), ("fp16", "fp16")):
        assert resolve_precision(orin.precision, f"decoder={word}", words=orin.words)["lm_head"] == head
