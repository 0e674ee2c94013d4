"""The model of times: its FLOPs and bytes against hand counts, against executed code and against
eager, its arithmetic, and its tables."""

import sys
from math import ceil
from pathlib import Path

import pytest
import torch

from fusedmoe.families import adatt_sp
from fusedmoe.speed.subjects import MAIN, SUBJECTS, build

pytest.importorskip("triton", reason="gpu_free: expected the package triton, which compiles without a device, got none")

from fusedmoe.kernels import network, tiles
from fusedmoe.kernels.lowering import inline_hidden, lower

from .executed import executed
from .launches import KERNELS
from .ptx import Counts

# Programs of bench/ import each other by name, as their folder's.
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "bench"))
import gpu_launches
import gpu_model
from gpu_launches import Launched
from tables import replace_between

BF16, LAYER, B = torch.bfloat16, "AdaTT T3m2", 4096
# Products of its two levels: six experts of 256 x 256 and of 128 x 256; gates of three units over
# six experts, each level.
EXPERTS = (2 * B * 6 * 256 * 256, 2 * B * 6 * 256 * 128)
GATES = 2 * B * 3 * 6 * 256


def launches(mode, form=gpu_model.LEVELS, layer=LAYER, rows=B):
    return gpu_model.launches_of(layer, mode, rows, form, BF16)


def test_products_of_a_forward():
    """3.2 and 1.6 GFLOP of experts. Gates may be computed again for each tile of columns, of which
    there are at most sixteen."""
    for one, experts in zip(launches("inference"), EXPERTS, strict=True):
        again, rest = divmod(one.products - experts, GATES)
        assert rest == 0 and 1 <= again <= 16
    assert [round(flops / 1e9, 1) for flops in EXPERTS] == [3.2, 1.6]


def test_hidden_layers_are_computed_again_for_each_tile_of_columns():
    """MMoE T3e8: eight experts of 256 -> 256 -> 128, whose first layer every tile of the last one's
    columns needs."""
    program = inline_hidden(build(SUBJECTS["MMoE T3e8"]).table)
    (one,) = launches("inference", layer="MMoE T3e8")
    columns = ceil(128 / gpu_model.tiles_of(program, B, gpu_model.LEVELS, BF16).columns)
    again, rest = divmod(one.products - 2 * B * 8 * 256 * (256 * columns + 128), 2 * B * 3 * 8 * 256)
    assert rest == 0 and 1 <= again <= columns


def test_products_of_a_backward():
    """y again, W^T dz, and that of the gates; dW in one launch more."""
    rows = [one for one in launches("training step") if one.name.startswith("backward_rows")]
    assert sum(one.products for one in rows) == 2 * sum(EXPERTS) + 2 * GATES
    (gradients,) = (one for one in launches("training step") if one.name == "gradients")
    assert gradients.products == sum(EXPERTS) + 2 * GATES


def test_bytes_of_tensors_once():
    """x or what stands below, experts and gates with their biases, two static weights a unit, and
    the units' outputs, in bfloat16."""
    weights = [6 * width * (256 + 1) + 3 * 6 * 256 + 3 * 2 for width in (256, 128)]
    gate_biases = sum(
        p.shape[0]
        for p in build(SUBJECTS[LAYER]).table.parameters
        if p.name.startswith("levels.0.gates") and p.name.endswith("bias")
    )
    expected = [
        2 * (B * width + weight + gate_biases + 3 * B * out)
        for width, weight, out in zip((256, 768), weights, (256, 128), strict=True)
    ]
    assert [one.once for one in launches("inference")] == expected


def test_rows_beyond_the_batch_are_multiplied_too():
    one, full = launches("inference", rows=1), launches("inference", rows=64)
    assert [part.products for part in one] == [part.products for part in full]
    assert all(few.moved < many.moved for few, many in zip(one, full, strict=True))


@pytest.mark.parametrize(
    ("most", "rows"), [(0, 80), pytest.param(256, 24, marks=pytest.mark.slow)], ids=["a launch a level", "one launch"]
)
def test_a_training_step_moves_the_bytes_of_its_plan(monkeypatch, most, rows):
    """Vectors and scalars, which do not pass through shared memory, are read by up to as many warps
    as a program has."""
    monkeypatch.setattr(tiles, "WHOLE_ROWS", most)
    layer = build(SUBJECTS[LAYER], BF16)
    table, program = layer.table, lower(layer.table)
    x = torch.randn(rows, table.inputs[0].slots, table.inputs[0].width, generator=torch.Generator().manual_seed(0)).to(
        BF16
    )
    lent = [(parameter.name, tensor.detach()) for parameter, tensor in zip(table.parameters, layer.params, strict=True)]
    params = [tensor for _, tensor in lent]
    with executed(lent) as kernels:
        out, _, saved = network.forward(x, params, table, False, True, backend="triton")
        network.backward(torch.ones_like(out), None, x, params, saved, table, backend="triton")
    got: list[Counts] = [counts for name in KERNELS for counts in kernels[name].launches]
    chosen = tiles.choose(program, BF16, rows, "sm_80")
    expected = gpu_launches.forward(program, chosen, rows, 2) + gpu_launches.backward(program, chosen.backward, rows, 2)
    for counts, one in zip(got, expected, strict=True):
        read = {name: count for name, count in counts.read.items() if name not in ("plan", "floats", "addresses")}
        several = sum(
            count
            for name, count in read.items()
            if name in ("p", "dw") or name.startswith("shared.") or name.endswith("bias")
        )
        most_moved = sum(read.values()) + counts.written.total()
        assert most_moved - several * (1 - 1 / chosen.warps) <= one.moved <= most_moved, one.name


def test_launches_against_eagers_operators():
    """AdaTT T3m2: 48 operators forward and 167 with backward, views left out, against 2 and 8
    launches; with towers 1 and at most 3 more.

    Of the 167, 66 are products (18 addmm, 36 mm, 12 bmm), 20 add gradients up, 19 sum those of
    biases and static weights, and 18 are the backward of select, which writes zeros around a slot's
    gradient. They are torch's choice: another version may have others.
    """
    assert gpu_model.counted(LAYER, "inference", 16, BF16).count == 48
    assert gpu_model.counted(LAYER, "training step", 16, BF16).count == 167
    for towers, more in (([], 0), ([64, 1], 1)):
        program = lower(adatt_sp(256, [[256], [128]], 3, 2, towers=towers))
        chosen = gpu_model.tiles_of(program, B, gpu_model.LEVELS, BF16)
        assert len(gpu_launches.forward(program, chosen, B, 2)) == 2 + more
        assert len(gpu_launches.backward(program, chosen, B, 2)) <= 4 * 2 + 3 * more
        assert len(gpu_launches.forward(program, gpu_model.tiles_of(program, 16, gpu_model.WHOLE, BF16), 16, 2)) == 1
    assert len(launches("training step")) == 2 + 6


def test_eagers_bytes_are_linear_in_the_rows():
    for mode in gpu_model.MODES:
        assert gpu_model.eager_of(LAYER, mode, 48, BF16) == gpu_model.counted(LAYER, mode, 48, BF16)


@pytest.mark.parametrize(
    ("programs", "sms", "share"),
    [(1, 132, 1 / 132), (132, 132, 1), (133, 132, 133 / 264), (264, 132, 1), (80, 108, 80 / 108)],
)
def test_fill(programs, sms, share):
    assert gpu_model.fill(programs, sms) == share


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_programs_that_share_an_sm_change_nothing(resident):
    """Full waves of r programs an SM, and a last one whose programs spread: the fullest SM has
    ceil(programs / SMs) of them."""
    sms = 108
    for programs in range(1, 1000):
        waves, rest = divmod(programs, sms * resident)
        assert waves * resident + ceil(rest / sms) == ceil(programs / sms)


def test_each_wall_by_hand():
    """On 66 of H100's 132 SMs: 989 TFLOP/s of which 0.8 is reached, 0.63 of that in narrow tiles;
    the memories are everybody's."""
    gpu = gpu_model.GPUS["H100"]
    one = Launched("", 66, 64, 989 * 10**6, 67 * 10**6, 335 * 10**4, 55 * 10**5)
    expected = {"products": 2.5e-6, "mixes": 2e-6, "HBM": 1e-6, "L2": 1e-6, "intake": 55e5 / (66 * 100e9)}
    assert gpu_model.walls(one, gpu, BF16) == pytest.approx(expected)
    assert gpu_model.walls(one._replace(rows=16), gpu, BF16)["products"] == pytest.approx(2.5e-6 / 0.63)
    assert gpu_model.walls(one, gpu, torch.float32)["products"] == pytest.approx(2.5e-6 * 989 / (495 / 3))
    time = gpu_model.time_of([one, one], gpu, BF16, 1e-6)
    assert time.seconds == pytest.approx(7e-6) and time.nearest == "products"


@pytest.mark.parametrize("layer", MAIN)
def test_more_rows_never_take_less_time(layer):
    for mode in gpu_model.MODES:
        for form in gpu_model.FORMS:
            for gpu in gpu_model.GPUS.values():
                times = [
                    gpu_model.time_of(launches(mode, form, layer, rows), gpu, BF16, 0.0).seconds
                    for rows in gpu_model.ROWS
                ]
                assert times == sorted(times)


def test_the_page_has_the_tables_that_the_model_writes():
    """`make model` writes them."""
    text = gpu_model.PAGE.read_text()
    assert replace_between(text, gpu_model.page(BF16), gpu_model.BEGIN, gpu_model.END, "docs/gpu_model.md") == text
