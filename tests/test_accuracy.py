"""The table of accuracies: a script that keeps what it has, figures that hold, and a page that shows just these."""

import statistics

import pytest
import yaml

from benchmarks import accuracy
from benchmarks.accuracy import found, main, measure, read, write
from benchmarks.accuracy_page import page
from benchmarks.accuracy_rows import ALL, DRAWN, DRAWS, ROUNDING, Method, Row, rows

FLOAT = Row("DeiT-Tiny", "float", "W32A32")
ROWS = [Row("DeiT-Tiny", method, "W4A4") for method in ("min-max", "RepQ-ViT", "RepQuant")]


def entry(row, top1=50.0):
    return {"draw": row.draw, "top1": top1, "seconds": 60, "core_seconds": 50, "settings": row.settings,
            "date": "2000-01-01", "versions": "torch"}  # fmt: skip


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script on files of its own, with three rows; what it measured, in order."""
    done = []

    def measured(row, scratch=None):
        done.append(row)
        return entry(row, top1=10.0 * len(done))

    references = tmp_path / "references.yaml"
    references.write_text("# by hand\nkept: [1]  # as it is\n\nmeasured: {}\n")
    monkeypatch.setattr(accuracy, "rows", lambda: ROWS)
    monkeypatch.setattr(accuracy, "measure", measured)
    monkeypatch.setattr(accuracy, "REFERENCES", references)
    monkeypatch.setattr(accuracy, "PAGE", tmp_path / "results.md")
    return done


def top1(script_rows):
    measured = read()
    return [found(measured, row)["top1"] for row in script_rows]


def test_every_row_is_written_at_once_and_what_stands_by_hand_stays(script, monkeypatch):
    seen, original = [], accuracy.write

    def watched(row, new):
        result = original(row, new)
        seen.append((found(read(), row), f"{new['top1']:.1f} %" in page(result)))
        return result

    monkeypatch.setattr(accuracy, "write", watched)
    assert main([]) == 0 and script == ROWS
    assert seen == [({**entry(row), "top1": 10.0 * n}, True) for n, row in enumerate(ROWS, 1)]
    assert accuracy.REFERENCES.read_text().startswith("# by hand\nkept: [1]  # as it is\n\nmeasured:\n")
    assert accuracy.PAGE.read_text() == page(read())


def test_rows_that_are_there_are_kept_unless_their_settings_changed(script, monkeypatch):
    main(["--only", "RepQ*"])
    assert script == ROWS[1:]
    main([])
    assert script == [*ROWS[1:], ROWS[0]] and top1(ROWS) == [30.0, 10.0, 20.0]
    monkeypatch.setitem(ALL, "RepQuant", Method("RepQuant", {"clip_steps": 5}))
    main([])
    assert script[3:] == ROWS[2:] and top1(ROWS) == [30.0, 10.0, 40.0]
    main(["--again", "--only", "min-max*"])
    assert script[4:] == ROWS[:1]


def test_an_interrupted_run_goes_on(script, monkeypatch, capsys):
    whole = accuracy.measure

    def interrupted(row):
        if row == ROWS[1]:
            raise KeyboardInterrupt
        return whole(row)

    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "measure", interrupted)
        assert main([]) == 1
    assert "interrupted in RepQ-ViT W4A4 DeiT-Tiny" in capsys.readouterr().out and script == ROWS[:1]
    assert main([]) == 0 and script == ROWS


def test_a_row_that_fails_is_told_and_the_others_are_measured(script, monkeypatch, capsys):
    whole = accuracy.measure

    def failing(row):
        if row == ROWS[0]:
            raise FileNotFoundError("needs the weights")
        return whole(row)

    monkeypatch.setattr(accuracy, "measure", failing)
    assert main([]) == 1 and script == ROWS[1:]
    assert "min-max W4A4 DeiT-Tiny: FAILED, FileNotFoundError: needs the weights" in capsys.readouterr().out


def test_progress_tells_what_came_out_and_what_is_left(script, capsys):
    write(ROWS[0], {**entry(ROWS[0]), "settings": "other"})
    main(["--only", "min-max*"])
    assert "about 1 min left" in capsys.readouterr().out.splitlines()[0]
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 rows to measure, 1 are there")
    assert lines[1] == "[1/2] RepQ-ViT W4A4 DeiT-Tiny: 20.0 % (60 s); 0 min elapsed, time left unknown"
    assert lines[2].endswith("that was all")


def test_a_pattern_that_matches_nothing_is_an_error(script, capsys):
    with pytest.raises(SystemExit):
        main(["--only", "RepQuandt*"])
    assert "matches no row: --list shows them" in capsys.readouterr().err


def test_the_list_measures_nothing(script, capsys):
    main(["--only", "RepQuant*"])
    capsys.readouterr()
    main(["--list"])
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        [row.method, row.bits] for row in ROWS
    ]
    assert len(script) == 1


def test_every_row_has_a_name_of_its_own_and_a_callback_with_its_bits():
    names = [row.name for row in rows()]
    assert len(set(names)) == len(names)
    for row in rows():
        callback = row.callback()
        if row.method != "float":
            given = [callback.formats.weights, callback.formats.activations]
            bits = [None if text is None else text.removeprefix("int").partition("_")[0] for text in given]
            assert "W{}A{}".format(*("32" if x is None else x for x in bits)) == row.bits


def test_settings_are_code_that_makes_the_same_callback():
    import lightning_quant

    for method in {row.method: row for row in rows() if row.method != "float"}.values():
        again = eval(method.settings.replace("intN", "int3"), vars(lightning_quant))
        callback = method.callback()
        formats = {"weights", "activations"}
        assert {k: v for k, v in again.arguments.items() if k not in formats} == {
            k: v for k, v in callback.arguments.items() if k not in formats
        }


# ---------------------------------------------------------------- what was measured


def measured_top1(row):
    there = found(read(), row)
    if there is None:
        pytest.skip(f"{row.name} is not measured yet")
    return there["top1"]


def test_the_page_shows_the_figures_that_are_there():
    assert accuracy.PAGE.read_text() == page(read()), "run `python -m benchmarks.accuracy --page`"


def test_the_float_model_is_the_one_that_the_references_know():
    by_hand = yaml.safe_load(accuracy.REFERENCES.read_text())["deit_tiny"]["float"]
    assert measured_top1(FLOAT) == pytest.approx(by_hand, abs=0.21)


def test_repquant_is_three_points_above_repq_vit_on_average_over_draws():
    plain, learned = ([measured_top1(Row("DeiT-Tiny", m, "W4A4", draw)) for draw in DRAWS] for m in DRAWN)
    assert statistics.mean(learned) >= statistics.mean(plain) + 3


def test_brecq_is_twenty_points_above_nearest_rounding_of_weights_at_three_bits():
    nearest, learned = (measured_top1(Row("DeiT-Tiny", method, "W3A32")) for method in ROUNDING)
    assert learned >= nearest + 20


def test_resnet20_at_four_bits_is_within_three_points_of_float():
    exact, learned = (measured_top1(Row("ResNet-20", *row)) for row in (("float", "W32A32"), ("QDrop", "W4A4")))
    assert learned >= exact - 3


@pytest.mark.evidence
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("method", "bits", "tolerance"), [("min-max", "W8A8", 0.6), ("RepQ-ViT", "W4A8", 1.0)])
def test_measured_again_a_row_is_what_it_was(method, bits, tolerance, assets, tmp_path, capsys):
    row = Row("DeiT-Tiny", method, bits)
    was, now = measured_top1(row), measure(row, tmp_path)["top1"]
    with capsys.disabled():
        print(f"\n  {row.name}: {now:.1f} measured again, {was:.1f} in the table", flush=True)
    assert now == pytest.approx(was, abs=tolerance)
