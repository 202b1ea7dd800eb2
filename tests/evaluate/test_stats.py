"""Means with intervals, and the tables made of records: every expected number is computed by hand."""

import json
import re

import numpy as np
import pytest

from latentmem.evaluate.stats import Estimate, harmonic, mean, of_means, ratio
from latentmem.evaluate.tables import summary

# --- intervals ------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_constant_is_the_constant():
    assert mean([0.25] * 6, "aabbcc") == Estimate(0.25, 0.25, 0.25, n=6, texts=3)
    assert mean([0.0] * 6, "aabbcc") == Estimate(0.0, 0.0, 0.0, n=6, texts=3)
    assert ratio([0.5, 1.0, 2.0], [1.0, 2.0, 4.0], "abc") == Estimate(0.5, 0.5, 0.5, n=3, texts=3)


def test_without_two_texts_there_is_no_interval_and_so_no_number():
    assert mean([], []) is None and mean([0.5], "a") is None and mean([0.5, 0.7, 0.9], "aaa") is None
    assert mean([0.5, 0.7], "ab") is not None


def test_a_ratio_to_nothing_is_no_number():
    assert ratio([1.0, 2.0], [0.0, 0.0], "ab") is None and ratio([], [], "") is None


def test_a_ratio_is_sum_over_sum_and_its_interval_is_finite():
    found = ratio([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 2.0], "abcd")
    assert found.mean == 2 / 3 and np.isfinite([found.low, found.high]).all() and found.low <= 2 / 3 <= found.high
    found = ratio([1.0, 0.0, 0.0], [2.0, 0.0, 0.0], "abc")  # most resamples have nothing below
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_a_harmonic_mean_is_of_the_means_and_not_a_mean_of_harmonic_means():
    assert harmonic(np.array([1.0, 0.5, 0.25])) == pytest.approx(3 / 7) and harmonic(np.array([1.0, 0.0])) == 0
    assert list(harmonic(np.array([[1.0, 1.0], [0.5, 1.0]]))) == [1.0, pytest.approx(2 / 3)]
    found = of_means(harmonic, [[1.0, 0.0], [0.0, 1.0]], "ab")
    assert found.mean == 0.5 and (found.low, found.high) == (0.0, 0.5)  # where one text is drawn twice one mean is 0
    assert (found.n, found.texts) == (2, 2)


def test_numbers_made_of_means_are_drawn_with_all_columns_together():
    values = [0.1, 0.4, 0.9, 0.3, 0.6, 0.2]
    double = of_means(lambda m: m[..., 0] / m[..., 1], [values, [v / 2 for v in values]], "abcdef")
    assert (double.mean, double.low, double.high) == (pytest.approx(2), pytest.approx(2), pytest.approx(2))
    assert of_means(lambda m: m[..., 0], [values], "aabbcc") == mean(values, "aabbcc")
    assert of_means(harmonic, [[1.0]], "a") is None
    with np.errstate(divide="ignore", invalid="ignore"):
        assert of_means(lambda m: m[..., 0] / m[..., 1], [[1.0, 1.0], [0.0, 0.0]], "ab") is None
    with pytest.raises(ValueError, match="got 2, 1 values and 2 groups"):
        of_means(harmonic, [[1.0, 1.0], [1.0]], "ab")


def test_an_interval_goes_to_infinity_where_what_stands_below_may_be_nothing():
    with np.errstate(divide="ignore"):
        found = of_means(lambda m: 1 / m[..., 0], [[1.0, 0.0, 0.0, 0.0]], "abcd")
    assert (found.mean, found.high) == (4.0, float("inf")) and 1 <= found.low < 4  # a third of the draws has no "a"


def test_a_mean_counts_questions_and_not_texts():
    found = mean([1.0, 0.0, 0.0, 0.0], "abbb")
    assert found.mean == 0.25 and (found.n, found.texts) == (4, 2)
    assert (found.low, found.high) == (0.0, 1.0)  # both draws of one text alone come up in a quarter of all


def test_values_and_texts_belong_together():
    with pytest.raises(ValueError, match="zip"):
        mean([1.0, 2.0], "a")
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0, 2.0], [1.0], "ab")


def test_questions_of_one_text_do_not_make_the_interval_smaller():
    values = [float(i % 2) for i in range(20)]
    alone = mean(values, range(20))
    five_each = mean([v for v in values for _ in range(5)], [i for i in range(20) for _ in range(5)])
    as_if_free = mean([v for v in values for _ in range(5)], range(100))
    assert (five_each.mean, five_each.low, five_each.high) == (alone.mean, alone.low, alone.high)
    assert (five_each.n, five_each.texts) == (100, 20)
    width = {name: e.high - e.low for name, e in (("together", five_each), ("free", as_if_free))}
    assert 1.9 < width["together"] / width["free"] < 2.6  # the square root of 5


def test_the_order_of_questions_changes_no_mean():
    draw = np.random.default_rng(0)
    values, groups = draw.random(60), draw.integers(0, 12, 60)
    found = mean(values.tolist(), groups.tolist())
    for _ in range(5):
        order = draw.permutation(60)
        again = mean(values[order].tolist(), groups[order].tolist())
        assert again.mean == pytest.approx(found.mean, abs=1e-12) and (again.n, again.texts) == (60, 12)
        assert again.low == pytest.approx(found.low, abs=0.02) and again.high == pytest.approx(found.high, abs=0.02)
    assert mean(values.tolist(), groups.tolist()) == found  # the same input, the same interval


@pytest.mark.parametrize("kind", ["mean", "ratio"])
def test_the_interval_holds_the_truth_in_ninety_five_percent_of_all_cases(kind):
    draw, inside, runs = np.random.default_rng(1), 0, 300
    for _ in range(runs):
        shared = np.repeat(draw.normal(0, 1, 40), 5)  # of a text
        values, groups = 2.0 + shared + draw.normal(0, 1, 200), np.repeat(np.arange(40), 5)
        if kind == "mean":
            found, truth = mean(values.tolist(), groups.tolist()), 2.0
        else:
            below = np.abs(draw.normal(4.0, 0.5, 200))
            found, truth = ratio((values * below / 4).tolist(), below.tolist(), groups.tolist()), 0.5
        inside += found.low <= truth <= found.high
        assert found.low <= found.mean <= found.high
    assert 0.90 <= inside / runs <= 0.98


# --- tables ---------------------------------------------------------------------------------------------------------

N = 100
VALUES = {  # row, fill, step -> hits, accuracies, log-likelihoods and share left of four questions: a1 a2 b1 b2
    ("floor", "", None): ([1, 0, 0, 0], [0.5, 0.0, 0.25, 0.25], [-4.0, -6.0, -8.0, -6.0], None),
    ("dead", "full", None): ([0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0], [-9.0, -9.0, -9.0, -9.0], None),
    ("oracle", "", None): ([1, 1, 1, 0], [1.0, 0.5, 1.0, 0.5], [-1.0, -2.0, -2.0, -3.0], None),
    ("window", "full", 0): ([1, 1, 1, 0], [1.0, 0.5, 1.0, 0.5], [-1.0, -2.0, -2.0, -3.0], [1.0, 1.0, 1.0, 1.0]),
    ("window", "full", 5): ([1, 0, 0, 0], [0.5, 0.0, 0.25, 0.25], [-5.0, -6.0, -8.0, -6.0], [0.0, 0.0, 0.5, 0.5]),
    ("ours", "full", 0): ([1, 1, 0, 1], [1.0, 0.25, 0.5, 0.5], [-1.5, -2.0, -2.5, -3.0], [1.0, 1.0, 1.0, 1.0]),
    ("ours", "full", 5): ([1, 0, 0, 0], [0.5, 0.25, 0.25, 0.5], [-3.0, -5.0, -4.0, -4.0], [0.5, 0.5, 0.25, 0.25]),
    ("ours", "empty", 0): ([1, 1, 1, 1], [1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0]),
}
OF = {"a1": "text-a", "a2": "text-a", "b1": "text-b", "b2": "text-b"}


def records(values=VALUES, *, size=N, stream=False, M=None, questions=OF):
    found = []
    for (row, fill, step), (hits, accuracies, logliks, left) in values.items():
        for i, (question, text) in enumerate(questions.items()):
            record = {"row": row, "N": 0 if row in ("floor", "oracle") else size, "fill": fill, "text": text}
            record |= {"question": question, "hit": hits[i], "accuracy": accuracies[i], "loglik": logliks[i]}
            record |= {"said": "words"} | ({} if step is None else {"step": step})
            record |= {} if left is None else {"left": left[i]}
            record |= {"M": (M or {}).get((fill, step), size)} if row == "ours" else {}
            found.append(record | ({"stream": True} if stream and step is not None else {}))
    return found


def line(found, kind, metric="accuracy", row="ours", fill="full", *, name=None, **more):
    """The one line with these properties."""
    wanted = {"kind": kind, "metric": metric, "row": row, "fill": fill, "filtered": False, "stream": False, **more}
    some = [x for x in found if all(getattr(x, key) == value for key, value in wanted.items())]
    some = [x for x in some if name is None or x.name == name]
    assert len(some) == 1, [x.name for x in some]
    return some[0]


def means(one):
    return {step: cell.mean for step, cell in one.cells.items()}


def interval(one, step):
    cell = one.cells[step]
    return (cell.low, cell.high)


@pytest.fixture(scope="module")
def found():
    return summary.lines(records())


def test_rows_are_means_over_questions(found):
    assert means(line(found, "row")) == {0: 2.25 / 4, 5: 1.5 / 4}
    assert means(line(found, "row", fill="empty")) == {0: 1.0}
    assert means(line(found, "row", "hit")) == {0: 3 / 4, 5: 1 / 4}
    assert means(line(found, "row", "loglik")) == {0: -9.0 / 4, 5: -4.0}
    assert means(line(found, "row", row="window")) == {0: 0.75, 5: 0.25}
    assert interval(line(found, "row"), 0) == (0.5, 0.625)  # the means of the two texts
    assert all((cell.n, cell.texts) == (4, 2) for cell in line(found, "row").cells.values())


def test_rows_that_no_step_changes_stand_there_once(found):
    for row, fill, accuracy, hit in (("floor", "", 0.25, 0.25), ("oracle", "", 0.75, 0.75), ("dead", "full", 0.0, 0.0)):
        assert means(line(found, "row", row=row, fill=fill)) == {0: accuracy}
        assert means(line(found, "row", "hit", row=row, fill=fill)) == {0: hit}


def test_relative_is_the_sum_of_ours_over_the_sum_of_the_oracle(found):
    assert means(line(found, "relative")) == {0: 2.25 / 3, 5: 1.5 / 3}
    assert means(line(found, "relative", "hit")) == {0: 3 / 3, 5: 1 / 3}
    assert interval(line(found, "relative", "hit"), 5) == (0.0, 0.5)  # text b: 0 of 1, text a: 1 of 2
    assert not [x for x in found if x.kind == "relative" and (x.metric == "loglik" or x.row != "ours")]


def test_the_bound_is_the_floor_plus_what_the_oracle_adds_times_what_is_left(found):
    # accuracy at step 5: .5 + .5 * .5, 0 + .5 * .5, .25 + .75 * .25, .25 + .25 * .25
    assert means(line(found, "bound")) == {0: 0.75, 5: (0.75 + 0.25 + 0.4375 + 0.3125) / 4}
    # hits: 1 + 0 * .5, 0 + 1 * .5, 0 + 1 * .25, 0 + 0 * .25
    assert means(line(found, "bound", "hit")) == {0: 0.75, 5: 1.75 / 4}
    # log-likelihood: -4 + 3 * .5, -6 + 4 * .5, -8 + 6 * .25, -6 + 3 * .25
    assert means(line(found, "bound", "loglik")) == {0: -2.0, 5: (-2.5 - 4.0 - 6.5 - 5.25) / 4}
    assert interval(line(found, "bound", "hit"), 5) == (0.125, 0.75)


def test_differences_are_paired_question_by_question(found):
    window = line(found, "paired", name="ours, memory full at first - window (last N tokens)")
    # at 0: 0, -.25, -.5, 0; at 5: 0, .25, 0, .25
    assert means(window) == {0: -0.75 / 4, 5: 0.5 / 4}
    assert interval(window, 0) == (-0.25, -0.125) and interval(window, 5) == (0.125, 0.125)
    floor = line(found, "paired", "loglik", name="ours, memory full at first - floor (closed book)")
    assert means(floor) == {0: (2.5 + 4.0 + 5.5 + 3.0) / 4, 5: (1.0 + 1.0 + 4.0 + 2.0) / 4}
    others = {(x.fill, x.name.split(" - ")[1]) for x in found if x.kind == "paired"}
    constants = {(fill, summary.NAMES[row]) for fill in ("full", "empty") for row in ("floor", "dead", "oracle")}
    assert others == constants | {("full", summary.NAMES["window"])}  # the window saw what a full memory saw


def test_questions_answered_closed_book_are_left_out_of_filtered_hits(found):
    some = [x for x in found if x.filtered]
    assert {x.metric for x in some} == {"hit"}
    assert means(line(found, "row", "hit", filtered=True)) == {0: 2 / 3, 5: 0.0}
    assert means(line(found, "row", "hit", row="oracle", fill="", filtered=True)) == {0: 2 / 3}
    assert means(line(found, "row", "hit", row="floor", fill="", filtered=True)) == {0: 0.0}
    assert means(line(found, "relative", "hit", filtered=True)) == {0: 1.0, 5: 0.0}
    assert means(line(found, "bound", "hit", filtered=True)) == {0: 2 / 3, 5: 0.75 / 3}
    assert line(found, "row", "hit", filtered=True).cells[0].n == 3
    window = line(found, "paired", "hit", filtered=True, name="ours, memory full at first - window (last N tokens)")
    assert means(window) == {0: 0.0, 5: 0.0}
    nothing_known = {**VALUES, ("floor", "", None): ([0] * 4, [0.0] * 4, [-9.0] * 4, None)}
    assert not [x for x in summary.lines(records(nothing_known)) if x.filtered]  # nothing to leave out


def test_what_is_left_of_text_and_how_full_the_memory_is():
    found = summary.lines(records(M={("full", 0): 100, ("full", 5): 100, ("empty", 0): 37}))
    assert means(line(found, "left", "left")) == {0: 1.0, 5: 0.375}
    assert interval(line(found, "left", "left"), 5) == (0.25, 0.5)
    assert means(line(found, "left", "left", row="window")) == {0: 1.0, 5: 0.25}
    assert means(line(found, "M/N", "left")) == {0: 1.0, 5: 1.0}
    assert means(line(found, "M/N", "left", fill="empty")) == {0: 0.37}
    assert {x.row for x in found if x.kind == "M/N"} == {"ours"}
    assert not [x for x in found if x.metric == "left" and x.row in summary.CONSTANT]


def test_filtered_hits_are_of_questions_that_were_asked_closed_book():
    asked = [r for r in records() if r["row"] != "floor" or r["question"] != "b1"]
    cell = line(summary.lines(asked), "row", "hit", filtered=True).cells[0]
    assert (cell.n, cell.texts) == (2, 2)


@pytest.mark.parametrize("rows", [("floor",), ("floor", "oracle"), ("floor", "dead")])
def test_rows_that_no_step_changes_make_a_table_of_one_column(rows):
    found = summary.lines([r for r in records() if r["row"] in rows])
    part = (N if "dead" in rows else 0, False)
    assert {(x.N, x.stream) for x in found} == {part} and {x.row for x in found} == set(rows)
    assert all(list(x.cells) == [0] for x in found)
    assert summary.markdown(found).startswith("## N = 100\n" if "dead" in rows else "## without a memory\n")


def test_capacities_and_streams_stand_apart():
    later = {("ours", "full", 0): VALUES["ours", "full", 5], ("ours", "full", 70): VALUES["ours", "full", 0]}
    larger = {("ours", "full", 0): VALUES["ours", "empty", 0], ("dead", "full", None): VALUES["floor", "", None]}
    found = summary.lines([*records(), *records(later, stream=True), *records(larger, size=200)])
    assert list(dict.fromkeys((x.N, x.stream) for x in found)) == [(100, False), (100, True), (200, False)]
    assert means(line(found, "row", N=100)) == {0: 2.25 / 4, 5: 1.5 / 4}
    assert means(line(found, "row", N=100, stream=True)) == {0: 1.5 / 4, 70: 2.25 / 4}
    assert means(line(found, "row", N=200)) == {0: 1.0}
    assert means(line(found, "row", row="dead", N=100)) == means(line(found, "row", row="dead", N=100, stream=True))
    assert means(line(found, "row", row="dead", N=200)) == {0: 0.25}
    for N, stream in ((100, True), (200, False)):  # the constants are set against all of them
        assert means(line(found, "row", row="oracle", fill="", N=N, stream=stream)) == {0: 0.75}
    assert means(line(found, "relative", N=100, stream=True)) == {0: 0.5, 70: 0.75}
    assert not [x for x in found if x.stream and x.row == "window"]
    assert [part.split("\n")[0] for part in summary.markdown(found).split("## N = ")[1:]] == [
        "100",
        "100, stream: one memory, texts of every age in it",
        "200",
    ]


def test_nothing_is_printed_that_has_no_interval():
    one = records(
        {key: tuple(v and v[:2] for v in values) for key, values in VALUES.items()}, questions={"a1": "text-a"}
    )
    assert summary.lines(one) == [] and summary.lines([]) == []
    partly = [r for r in records() if not (r["row"] == "window" and r["step"] == 5 and r["text"] == "text-b")]
    found = summary.lines(partly)
    assert means(line(found, "row", row="window")) == {0: 0.75}  # one text is left at step 5
    assert set(means(line(found, "paired", name="ours, memory full at first - window (last N tokens)"))) == {0}
    assert means(line(found, "row")) == {0: 2.25 / 4, 5: 1.5 / 4}
    blind = {**VALUES, ("oracle", "", None): ([0] * 4, [0.0] * 4, [-9.0] * 4, None)}
    assert not [x for x in summary.lines(records(blind)) if x.kind == "relative"]
    numbers = re.compile(r"-?\d+\.\d\d")
    for text in re.findall(r"\|([^|\n]*)", summary.markdown(found)):
        assert not numbers.search(text) or re.fullmatch(r" -?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\] ", text)


def test_the_order_of_records_changes_no_number():
    same = summary.lines(list(reversed(records())))
    for a, b in zip(sorted(summary.lines(records()), key=str), sorted(same, key=str), strict=True):
        assert (a.name, a.kind, a.metric) == (b.name, b.kind, b.metric)
        assert means(a) == pytest.approx(means(b))


def test_markdown_shows_every_line_under_its_heading(found):
    text = summary.markdown(found)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    assert headings == [
        "N = 100",
        "Hits",
        "Token accuracy",
        "Token accuracy, paired differences",
        "Log-likelihood of the gold answer, per token",
        "Hits, without questions answered closed book",
        "Share that is left of the text",
    ]
    accuracy = text.split("### Token accuracy\n")[1].split("###")[0].strip().splitlines()
    assert accuracy[:2] == ["| | n (texts) | t = 0 | t = 5 |", "| --- | --- | --- | --- |"]
    assert "| floor (closed book) | 4 (2) | 0.25 [0.25, 0.25] |  |" in accuracy
    assert "| ours, memory full at first | 4 (2) | 0.56 [0.50, 0.62] | 0.38 [0.38, 0.38] |" in accuracy
    assert "| ours, memory full at first / oracle | 4 (2) | 0.75 [0.67, 0.83] | 0.50 [0.50, 0.50] |" in accuracy
    assert "| bound for ours, memory full at first | 4 (2) | 0.75 [0.75, 0.75] " in text
    assert len(accuracy) == 2 + 4 + 2 + 2 * 2  # constants and window, ours twice, each with its share and its bound
    left = text.split("### Share that is left of the text\n")[1]
    assert "| ours, memory full at first: M/N | 4 (2) | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |" in left


def test_sections_show_each_line_once_and_leave_out_only_paired_differences_of_other_metrics(found):
    shown = [x for _, some in summary.sections(found) for x in some]
    hidden = [x for x in found if x not in shown]
    assert len(shown) == len({id(x) for x in shown})
    assert hidden and all(x.kind == "paired" and x.metric != "accuracy" for x in hidden)


def test_lines_as_json_lose_nothing(found):
    plain = json.loads(json.dumps(summary.as_json(found)))
    assert len(plain) == len(found)
    for one, data in zip(found, plain, strict=True):
        cells = {int(step): Estimate(**cell) for step, cell in data.pop("cells").items()}
        assert summary.Line(cells=cells, **data) == one


def test_the_terminal_shows_token_accuracy(found):
    ((title, table),) = summary.terminal(found)
    assert title == "Token accuracy, N = 100" and table.row_count == 6
    assert [column.header for column in table.columns] == ["texts written since", "0", "5"]
