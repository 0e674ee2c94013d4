"""The main job on small data: every family trains in both arms, and what the table and the picture
say is measured as they claim.
"""

import copy
import gzip
import hashlib
import math
import runpy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedmoe
from fusedmoe import testing
from fusedmoe.__main__ import main
from fusedmoe.demo import census, command, synthetic, training
from fusedmoe.demo.dataset import Part, split_rows, standardise
from fusedmoe.demo.metrics import auc, explained_variance
from fusedmoe.demo.model import MODELS, TabularModel, expert_names, unit_names
from fusedmoe.demo.outcome import as_rich, scores
from fusedmoe.demo.picture import draw
from fusedmoe.families import FAMILIES


def auc_by_pairs(scores, labels):
    """The definition: over all pairs of a positive and a negative, 1 where the positive scores
    higher, 1/2 where they tie.
    """
    pairs = [
        (p, n) for p, a in zip(scores, labels, strict=True) if a for n, b in zip(scores, labels, strict=True) if not b
    ]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
def test_auc_is_the_share_of_pairs_in_order(rows):
    values, labels = (
        np.array([score for score, _ in rows], np.float32),
        np.array([label for _, label in rows], np.float32),
    )
    # The sum of ranks is exact in float64, so only the division rounds.
    assert auc(values, labels) == pytest.approx(auc_by_pairs(values, labels), rel=4 * 2.0**-53, abs=0)


@pytest.mark.parametrize(
    ("values", "labels", "what"), [([1.0, 2.0], [1, 1], "got 2 and 0"), ([1.0, math.nan], [0, 1], "got 1 that are not")]
)
def test_auc_refuses_what_has_no_answer(values, labels, what):
    with pytest.raises(ValueError, match=what):
        auc(np.array(values), np.array(labels))


def test_explained_variance():
    y = np.array([1.0, 2.0, 4.0])
    assert explained_variance(y, y) == 1.0
    assert explained_variance(np.full(3, y.mean()), y) == 0.0
    with pytest.raises(ValueError, match="one value only"):
        explained_variance(y, np.ones(3))


@pytest.fixture(scope="module")
def people():
    return census.load(seed=0)


def test_census_is_the_published_file():
    assert (
        hashlib.sha256(census.SOURCE.read_bytes()).hexdigest()
        == "5ac4cacd3ca9f1ecb10de1a0a41e4ac68fdc419e3fec190f5c0c6cc03b2ea659"
    )


def test_census_inputs_and_answers(people):
    parts = (people.train, people.validation, people.test)
    assert [len(part) for part in parts] == [69_833, 14_964, 14_965]
    answers = torch.cat([part.targets for part in parts])
    # The shares of positives that the data's description states, to the digit it states.
    assert [f"{share:.1%}" for share in answers.double().mean(0).tolist()] == ["6.2%", "43.2%", "14.7%"]
    assert len(census.FIELDS) + len(census.NUMBERS) + len(census.NEVER_INPUTS) == len(census.COLUMNS) == 42
    assert not {"instance weight", *(column for column, _ in census.TASKS.values())} & {*census.FIELDS, *census.NUMBERS}
    numbers = people.train.numbers.double()
    rounding = 2.0**-24 * numbers.abs().max()
    assert numbers.mean(0).abs().max() < rounding and (numbers.std(0, correction=0) - 1).abs().max() < rounding
    for field, size in enumerate(people.field_sizes):
        assert {int(part.fields[:, field].max()) for part in parts} <= set(range(size))


def test_census_refuses_a_line_of_another_length(tmp_path):
    path = tmp_path / "broken.gz"
    path.write_bytes(gzip.compress(b"1, 2, 3\n"))
    with pytest.raises(ValueError, match=r"broken.gz, line 1: expected 42 columns, got 3"):
        census.read(path)


def test_split_is_fixed_by_its_seed():
    first, again, other = split_rows(1000, 3), split_rows(1000, 3), split_rows(1000, 4)
    assert [len(part) for part in first] == [700, 150, 150]
    assert sorted(np.concatenate(first)) == list(range(1000))
    assert all((a == b).all() for a, b in zip(first, again, strict=True)) and not (first[0] == other[0]).all()


def test_a_constant_column_is_standardised_to_zero():
    assert not standardise(np.full((4, 1), 7.0), np.arange(3)).any()


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.9])
def test_synthetic_directions_have_the_correlation_asked_for(correlation):
    w = synthetic.directions(64, correlation, np.random.default_rng(0))
    roundings = 64 * 2.0**-53
    assert abs(w[0] @ w[1] - correlation) < roundings and np.abs((w * w).sum(1) - 1).max() < roundings


def test_synthetic_tasks_are_learnable_from_their_directions():
    """With the noise's variance as the only part that x does not explain, a table over w.x leaves
    little more than it.
    """
    data = synthetic.load(seed=0, rows=4000, width=16)
    w = synthetic.directions(16, synthetic.CORRELATION, np.random.default_rng(0))
    along, y = data.train.numbers.numpy() @ w.T, data.train.targets.numpy()
    for task in range(2):
        order = np.argsort(along[:, task])
        neighbours = (y[order[:-2], task] + y[order[2:], task]) / 2
        assert explained_variance(neighbours, y[order[1:-1], task]) > 0.9


@pytest.fixture(scope="module")
def small():
    return synthetic.load(seed=0, rows=1500, width=20)


def allowed(plain, data):
    """How far the fused outputs may be from the plain ones: each arm has the error that the rule of
    fusedmoe.testing allows it.
    """
    batch = data.test.rows(slice(0, training.BATCH))
    exact = Part(batch.fields, batch.numbers.double(), batch.targets.double())
    with torch.no_grad():
        truth, ours = copy.deepcopy(plain).double()(exact), plain(batch)
    return testing.error(ours, truth) + testing.bound(testing.error(ours, truth), truth, torch.float32)


@pytest.mark.parametrize("family", MODELS)
def test_every_family_trains_in_both_arms(family, small, tmp_path):
    plain, fused = training.make_arms(small, family, seed=0)
    assert not fusedmoe.fuse(fused.model).fused, "the second arm was not fused"
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), fused.model.parameters(), strict=True))
    outcome = command.run(family, small, steps=4, seed=0, console=command.Console(quiet=True))
    assert len(outcome.plain.losses) == len(outcome.fused.losses) == 4
    assert outcome.fused.losses[-1] < outcome.fused.losses[0]
    assert [tuple(w.shape) for w in outcome.mixing] == [
        (len(level.units), len(level.experts)) for level in outcome.table.levels
    ]
    assert outcome.outputs.absolute <= allowed(outcome.plain.model, small)
    # A row at a ReLU's kink may fall on either side of it. In a mean over N rows it weighs 1 / N.
    assert outcome.gradients.absolute < outcome.gradients.scale / len(small.test)
    assert as_rich(outcome).row_count == 4 + len(small.tasks)
    draw(outcome, tmp_path / "new" / "demo.png")
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_new_family_needs_no_line_here(monkeypatch):
    monkeypatch.setitem(FAMILIES, "another", FAMILIES["mmoe"])
    assert runpy.run_path(sys.modules[TabularModel.__module__].__file__)["MODELS"].keys() < FAMILIES.keys()


def test_the_picture_goes_where_git_does_not_look():
    assert command.parser().parse_args([]).picture.parts[0] == "build"


def test_gates_mix_to_one(small):
    arm, _ = training.make_arms(small, "mmoe", seed=0)
    (weights,) = training.mixing_weights(arm.model, small.test)
    assert weights.shape == (2, 8) and (weights.sum(1) - 1).abs().max() < 8 * 2.0**-24


def test_a_difference_between_the_arms_is_shown(small, monkeypatch):
    """A fuse that changed the numbers would stand in the table."""
    plain, _ = training.make_arms(small, "adatt_sp", seed=0)

    def faulty(model):
        with torch.no_grad():
            model.network.task_modules[0][1].bias += 0.5

    monkeypatch.setattr(fusedmoe, "fuse", faulty)
    outputs, gradients = training.compare(plain.model, small)
    assert abs(outputs.absolute - 0.5) < 2.0**-22 * outputs.scale and gradients.absolute > 0


def test_the_best_weights_by_validation_are_kept(small):
    plain, fused = training.make_arms(small, "shared_bottom", seed=0)
    training.train((plain, fused), small, steps=3, seed=0, tick=lambda: None)
    kept = training.loss_of(training.predict(plain.model, small.validation), small.validation, small.binary).item()
    assert kept == min(loss for _, loss in plain.validation)
    assert len(scores(plain, small)) == len(small.tasks)


def test_names_of_experts_and_units():
    tasks = ("a", "b")
    assert expert_names("ple", tasks, 5) == ["a a", "a b", "b a", "b b", "shared"]
    assert expert_names("cross_stitch", tasks, 2) == ["a", "b"]
    assert expert_names("mmoe", tasks, 3) == ["1", "2", "3"]
    assert (unit_names(tasks, 1), unit_names(tasks, 2), unit_names(tasks, 3), unit_names(tasks, 4)[-1]) == (
        ["all"],
        ["a", "b"],
        ["a", "b", "shared"],
        "4",
    )


def test_the_command_runs_on_the_census(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert (
        main(["demo", "--model", "MMoE", "--steps", "2", "--threads", "1", "--picture", str(tmp_path / "p.png")]) == 0
    )
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    for line in (
        "69,833 rows to train on",
        "training step",
        "inference batch",
        "test AUC, income",
        "test AUC, marital",
        "test AUC, education",
    ):
        assert line in shown
    assert (tmp_path / "p.png").exists()


def test_a_copy_of_the_file_is_read(tmp_path):
    path = tmp_path / "copy.gz"
    path.write_bytes(
        gzip.compress(b"".join(gzip.decompress(census.SOURCE.read_bytes()).splitlines(keepends=True)[:1000]))
    )
    data = command.load(str(path), seed=0)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [700, 150, 150]


def test_an_installation_without_the_data_says_where_they_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(census, "SOURCE", tmp_path / "none.gz")
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == command.NO_DATA + "\n"
    assert (
        "examples/census/census-income.test.gz" in command.NO_DATA
        and "python -m fusedmoe demo --data" in command.NO_DATA
    )


def test_a_file_of_something_else_is_named(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("1, 2, 3\n")
    assert main(["demo", "--data", str(path)]) == 2
    assert f"demo: --data {path}: Not a gzipped file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mmoo"], "expected one of single_task, shared_bottom, omoe"),
        (
            ["--data", "titanic"],
            "expected census, synthetic or a copy of census-income.test.gz, got 'titanic', which is no file",
        ),
        (["--steps", "0"], "expected a whole number of at least 1, got '0'"),
        (["--epochs", "1", "--quick"], "not allowed with"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["adatt-sp", "ADATT_SP", "adatt_sp"])
def test_families_are_found_with_hyphens_and_in_any_case(text):
    assert command.parser().parse_args(["--model", text]).model == "adatt_sp"


def test_the_command_line_lists_its_commands(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert main(["train"]) == 2
    shown = capsys.readouterr()
    assert (
        all(name in shown.out for name in ("demo", "bench", "doctor"))
        and "expected one of demo, bench, doctor, got 'train'" in shown.err
    )


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fusedmoe.demo.command", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo"]) == 2
    assert "pip install rich matplotlib" in capsys.readouterr().err
