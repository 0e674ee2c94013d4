"""Census-Income (KDD): 99,762 people, three yes-or-no questions about each.

`README.md` beside this file names source and licence.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch

from fusedmoe.demo.dataset import Dataset, Part, split_rows, standardise

SOURCE = Path(__file__).parent / "census-income.test.gz"

COLUMNS = (
    *(
        "age",
        "class of worker",
        "detailed industry",
        "detailed occupation",
        "education",
        "wage per hour",
        "enrolled last week",
        "marital status",
    ),
    *(
        "major industry",
        "major occupation",
        "race",
        "hispanic origin",
        "sex",
        "member of a labor union",
        "reason for unemployment",
    ),
    *(
        "employment status",
        "capital gains",
        "capital losses",
        "dividends",
        "tax filer status",
        "previous region",
        "previous state",
    ),
    *(
        "detailed household and family",
        "detailed household summary",
        "instance weight",
        "migration in msa",
        "migration in region",
    ),
    *(
        "migration within region",
        "same house a year ago",
        "migration in sunbelt",
        "persons worked for employer",
        "family members under 18",
    ),
    *(
        "father's country",
        "mother's country",
        "own country",
        "citizenship",
        "self employed",
        "veteran's questionnaire",
        "veterans benefits",
    ),
    *("weeks worked", "year", "income"),
)
# Amounts of money are heavy-tailed (most are 0, some 99,999), so their logarithm is what gets
# standardised.
MONEY = ("wage per hour", "capital gains", "capital losses", "dividends")
NUMBERS = ("age", *MONEY, "persons worked for employer", "weeks worked")
# The instance weight says how the survey drew a row; it knows nothing about the person.
NEVER_INPUTS = ("education", "marital status", "income", "instance weight")
FIELDS = tuple(column for column in COLUMNS if column not in (*NUMBERS, *NEVER_INPUTS))

DEGREES = ("Bachelors degree", "Masters degree", "Prof school degree", "Doctorate degree")
TASKS = {
    "income": ("income", ("50000+",)),
    "marital": ("marital status", ("Never married",)),
    "education": ("education", DEGREES),
}


def read(source: Path = SOURCE) -> np.ndarray:
    """Return the rows as text [N, 42].

    Raises: ValueError for a line that does not have 42 columns.
    """
    rows = []
    with gzip.open(source, "rt", encoding="ascii") as lines:
        for number, line in enumerate(lines, 1):
            row = [cell.strip() for cell in line.split(",")]
            if len(row) != len(COLUMNS):
                raise ValueError(f"{source.name}, line {number}: expected {len(COLUMNS)} columns, got {len(row)}")
            rows.append(row)
    return np.array(rows)


def targets(rows: np.ndarray) -> np.ndarray:
    """Return the answers [N, 3] in the order of `TASKS`: 1 where the column begins with one of the
    task's positive values.
    """
    columns = []
    for column, positives in TASKS.values():
        cells = rows[:, COLUMNS.index(column)]
        columns.append(np.logical_or.reduce([np.char.startswith(cells, value) for value in positives]))
    return np.stack(columns, axis=1).astype(np.float32)


def fields(rows: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the categorical inputs as numbers [N, F], values in alphabetic order from 0, and the
    count of values of each field.
    """
    coded = [np.unique(rows[:, COLUMNS.index(column)], return_inverse=True) for column in FIELDS]
    return np.stack([codes for _, codes in coded], axis=1), tuple(len(values) for values, _ in coded)


def numbers(rows: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return the continuous inputs [N, 7], standardised over the rows `train`.

    Amounts of money as log(1 + amount).
    """
    values = rows[:, [COLUMNS.index(column) for column in NUMBERS]].astype(np.float64)
    money = [NUMBERS.index(column) for column in MONEY]
    values[:, money] = np.log1p(values[:, money])
    return standardise(values, train).astype(np.float32)


def load(seed: int, source: Path = SOURCE) -> Dataset:
    """Read Census-Income and split it by `seed`."""
    rows = read(source)
    parts = split_rows(len(rows), seed)
    codes, sizes = fields(rows)
    inputs, answers = numbers(rows, parts[0]), targets(rows)
    train, validation, test = (
        Part(*(torch.from_numpy(array[part]) for array in (codes, inputs, answers))) for part in parts
    )
    return Dataset("Census-Income", tuple(TASKS), True, sizes, train, validation, test)
