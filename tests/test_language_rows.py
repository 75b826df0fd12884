"""The rows of language models: each can be built, its settings say how, and the page shows what was measured."""

import lightning_quant
from benchmarks.accuracy_page import page
from benchmarks.language_rows import ALL_LANGUAGE, FORMATS, LanguageRow, language_rows


def test_every_row_is_there_once_and_can_be_built():
    rows = language_rows()
    assert len({row.name for row in rows}) == len(rows) > 80 and {row.model for row in rows} == {*FORMATS}
    for row in {(row.method, row.bits): row for row in rows}.values():
        built = row.callbacks()
        assert len(built) == (0 if row.method == "float" else len(ALL_LANGUAGE[row.method]))


def test_the_settings_are_code_that_makes_the_same_callbacks():
    for row in {row.method: row for row in language_rows() if row.method != "float"}.values():
        formats = {"weights", "activations", "pattern"}
        given = row.callbacks()[0]
        again = eval(row.settings, vars(lightning_quant))
        assert type(again) is type(given)
        assert {k: v for k, v in again.arguments.items() if k not in formats} == {
            k: v for k, v in given.arguments.items() if k not in formats
        }


def test_bits_and_patterns_become_formats():
    (callback,) = LanguageRow("SmolLM2-135M", "GPTQ", "W3A32").callbacks()
    assert callback.arguments["weights"] == "int3_asym_g128" and callback.arguments["activations"] is None
    (callback,) = LanguageRow("stories260K", "rotated", "W4A8").callbacks()
    assert callback.arguments["activations"] == "int8_token_dynamic"
    (callback,) = LanguageRow("stories260K", "Wanda", "50%").callbacks()
    assert callback.arguments["pattern"] in (0.5, "0.5")


def test_the_page_has_a_section_of_what_is_measured():
    entry = {"draw": 0, "perplexity": 6.604, "seconds": 60, "core_seconds": 50, "peak_mb": 777, "settings": "GPTQ()",
             "date": "2000-01-01", "versions": "torch"}  # fmt: skip
    text = page({"stories260K": {"GPTQ": {"W4A32": [entry], "W2A32": [{**entry, "perplexity": 516234.0}]}}})
    assert "### stories260K" in text and "### SmolLM2-135M" not in text
    assert "| GPTQ | 6.60 | – | 5.2e+05 | – | – | – | 50 s | 777 MB |" in text
