"""--where: one expression over a table's columns, against the same question asked in Python; nothing in it is run."""

import pytest

from inputs.selection import Selection, selected

ROWS = [
    {"side": side, "age": age, "birads": birads, "split": split}
    for side, age, birads, split in (
        ("LEFT", "41", "3.0", "train"), ("RIGHT", "58.5", "4", "test"), ("RIGHT", "", "4", "train"),
        ("LEFT", "70", "2", "test"), ("NOT SAID", "NA", "3", "train"),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    "text, question",
    [
        ("", lambda r: True),
        ("side == 'RIGHT'", lambda r: r["side"] == "RIGHT"),
        ("side == RIGHT", lambda r: r["side"] == "RIGHT"),
        ("'RIGHT' == side", lambda r: r["side"] == "RIGHT"),
        ("side != 'NOT SAID'", lambda r: r["side"] != "NOT SAID"),
        ("Side in (LEFT, 'NOT SAID')", lambda r: r["side"] in ("LEFT", "NOT SAID")),
        ("side not in [LEFT]", lambda r: r["side"] != "LEFT"),
        ("birads == 3", lambda r: float(r["birads"]) == 3),
        ("birads in (2, '4')", lambda r: float(r["birads"]) in (2, 4)),
        ("41 <= age < 70", lambda r: r["age"] in ("41", "58.5")),
        ("age > -1", lambda r: r["age"] not in ("", "NA")),
        ("not (side == LEFT or age >= 58.5) and birads > 3", lambda r: r["age"] == ""),
        ("side == LEFT or side == RIGHT and birads < 4", lambda r: r["side"] == "LEFT"),
    ],
)
def test_rows_are_those_of_the_question(text, question):
    assert Selection(text).of(ROWS, "table.csv") == [question(row) for row in ROWS]


@pytest.mark.parametrize(
    "text, message",
    [
        ("sde == LEFT", "table.csv has no column sde; choose from side, age, birads, split"),
        ("side == left", "no row of table.csv has side 'left'; its values: 'LEFT', 'RIGHT', 'NOT SAID'"),
        ("side in (LEFT, UP)", "has side 'UP'"),
        ("side = LEFT", "is no expression; == compares"),
        ("side == NOT SAID", "is no expression"),
        ("side", "is not understood; it takes a column and a value"),
        ("__import__('os').getcwd() == x", "is no column and no value"),
        ("side == open('x')", "is no column and no value"),
        ("(lambda: 1)()", "is not understood"),
        ("side is LEFT", "it takes a column and a value"),
        ("side < 3", "side is not a number everywhere, it is 'LEFT'"),
        ("age < old", "'old' is no number"),
        ("(" * 5000 + "age > 1" + ")" * 5000, "is no expression"),
    ],
)
def test_what_is_no_question_is_refused_with_the_choices(text, message):
    with pytest.raises(ValueError) as error:
        Selection(text).of(ROWS, "table.csv")
    assert message in str(error.value) and str(error.value).startswith("--where ") and "\n" not in str(error.value)


def test_a_split_or_a_class_that_is_emptied_is_named():
    cells = [(row["split"], row["side"]) for row in ROWS]
    for text, message in (
        ("split == train", "no row of the split 'test' is left"),
        ("birads != 2", "none of the 1 rows of class LEFT in the split 'test' is left"),
        ("side != 'NOT SAID'", "none of the 1 rows of class NOT SAID in the split 'train' is left"),
    ):
        with pytest.raises(ValueError, match=message):
            selected(Selection(text), ROWS, "table.csv", cells, gone=False)
    kept, lines = selected(Selection("side != 'NOT SAID'"), ROWS, "table.csv", cells, gone=True)
    assert sum(kept) == 4 and "4 of 5 rows are left" in lines[0] and "no row of class NOT SAID is left" in lines[1]
    assert selected(Selection(), ROWS, "table.csv", cells, gone=False) == ([True] * 5, [])
