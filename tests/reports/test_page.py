"""The page: one file, escaped, well-formed, small, and either there or not."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from lightning_quant.layers import LayerPlan, Plan, quantize_layer
from lightning_quant.quantizers import Scheme
from lightning_quant.reports import (
    Findings,
    ModelErrors,
    Section,
    model_sizes,
    render,
    standard_sections,
    tag,
    title_of,
    write,
)

EVIL = "<script>alert(1)</script>"


class Checker(HTMLParser):
    """Fails on tags that are not closed, and collects tags and attributes."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        if name not in self.VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text.append(data)


class Chain(nn.Module):
    """Some linear layers in blocks, as deep as one likes."""

    def __init__(self, depth, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def findings(net=None, x=None, bits=4, **more):
    net = Chain(3) if net is None else net
    x = torch.randn(16, 8) if x is None else x
    layers = {name: module for name, module in net.named_modules() if type(module) is nn.Linear}
    for layer in layers.values():
        quantize_layer(layer, Scheme.parse(f"int{bits}_sym_channel"), Scheme.parse(f"int{bits}_asym"))
        layer.weight_quantizer.fit(layer.weight)
        layer.input_quantizer.freeze(torch.tensor(-1.0), torch.tensor(1.0))
    errors = ModelErrors(net)
    with torch.no_grad():
        errors.add(lambda: net(x))
    plan = Plan("Method", {"weights": f"int{bits}"}, {name: LayerPlan("int4", "int4") for name in layers})
    plan.skipped = more.pop("skipped", {})
    given = {"model": "Net", "plans": [("", plan)], "layers": errors.layers(), "output": errors.output_sqnr}
    given |= {"sizes": model_sizes(net), "before": {}, "after": {"accuracy": 0.5}, "made": {"date": "today"}}
    return Findings(**{**given, **more})


def page(found, extra=()):
    return render(title_of(found), standard_sections(found, extra))


def test_asks_for_nothing_from_elsewhere():
    html = page(findings())
    checked = Checker(html)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(checked.tags)
    assert not {"src", "href", "srcset", "action", "data", "poster"} & {name for name, _ in checked.attributes}
    for word in ("http://", "https://", "//cdn", "url(", "@import", "@font-face", "fetch(", "XMLHttp", "WebSocket"):
        assert word not in html


def test_names_are_text_whatever_they_are():
    net = nn.Sequential()
    net.add_module(EVIL.replace(".", ""), nn.Linear(8, 8))
    found = findings(
        net,
        model=EVIL,
        skipped={EVIL: f"a reason with {EVIL}"},
        after={EVIL: 1.0, 'b"onload=': 2.0},
        before={EVIL: 0.5},
        made={EVIL: EVIL},
    )
    found.plans[0][1].method = EVIL
    found.plans[0][1].arguments = {EVIL: EVIL}
    html = page(found, [Section("x" + EVIL, EVIL, {}, tag("p", EVIL, title=f'"{EVIL}'))])
    checked = Checker(html)
    assert checked.tags.count("script") == 1  # our own
    assert EVIL not in html
    assert EVIL in "".join(checked.text)


def test_pictures_say_what_they_are_and_tables_have_headings():
    html = page(findings())
    pictures = re.findall(r"<svg[^>]*>", html)
    assert len(pictures) == 2 + 3 * 2  # the depth twice, and weight and input of three layers
    assert all('role="img"' in picture and re.search(r'aria-label="[^"]{20,}"', picture) for picture in pictures)
    assert "<caption>" in html and 'scope="col"' in html and 'scope="row"' in html and '<html lang="en">' in html


def test_tells_its_story_in_order():
    found = findings(Chain(8), skipped={"head": "skip='head'"}, before={"accuracy": 0.75, "loss": 1.0})
    found.after = {"accuracy": 0.5, "loss": 2.0}
    html = page(found, [Section("kernels", "Kernels", {}, tag("p", "what ran"))])
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == [
        "Metrics",
        "Where the error is",
        "The 5 worst layers",
        "All layers",
        "Kernels",
        "What stayed float",
        "How this was made",
    ]
    assert html.index("0.750 <i>→</i> 0.500") < html.index("<h2>Metrics")
    assert "skip=&#x27;head&#x27;" in html
    # the worst layer leads everywhere, and the argument that spares the worst names all five
    worst = min(found.layers, key=lambda layer: layer.sqnr).name
    assert f"<code>{worst}</code> is hit hardest" in html
    rows = re.findall(r'<tr><td class="number wide".*?<code>(.*?)</code>', html)
    assert rows == [layer.name for layer in sorted(found.layers, key=lambda layer: layer.sqnr)]
    (advice,) = re.findall(r"overrides=\{.*?\}", html)
    assert advice.count("int8") == 5 and f"&quot;{worst}&quot;: &quot;int8&quot;" in advice


@pytest.mark.parametrize("bits", [4, 8])
def test_the_advice_can_be_taken(bits, tmp_path):
    """The argument that spares the worst layers is one that the callback takes, and it spares them."""
    import copy

    from lightning_quant import PostTrainingQuantization, QuantReport
    from tests.models import TinyTransformer, validate

    model = TinyTransformer()
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    first.blocks[0] = torch.compile(first.blocks[0], backend="eager")
    report, formats = QuantReport(tmp_path), {"weights": f"int{bits}", "activations": f"int{bits}", "ranges": "minmax"}
    validate(first, PostTrainingQuantization(**formats), report)
    worst = [layer["name"] for layer in json.loads((tmp_path / "report.json").read_text())["worst"]]
    (advice,) = re.findall(r'class="advice">.*?<code>(.*?)</code>', report.path.read_text("utf-8"))
    arguments = eval(f"dict({unescape(advice)})")
    validate(second, PostTrainingQuantization(**formats, **arguments), report)
    found = {layer["name"]: layer for layer in json.loads((tmp_path / "report.json").read_text())["layers"]}
    for name in (name.replace("_orig_mod.", "") for name in worst):
        spared = found.get(name, {"tensors": {}})["tensors"]
        assert all(tensor["bits"] == 8 for tensor in spared.values()) and bool(spared) == (bits == 4)


def test_facts_are_those_of_the_page(tmp_path):
    found = findings(skipped={"head": "why not"}, before={"accuracy": 0.75})
    path = write(tmp_path / "new" / "folder", title_of(found), standard_sections(found))
    facts = json.loads(path.with_name("report.json").read_text())
    assert path.name == "report.html" and path.parent == tmp_path / "new" / "folder"
    assert facts["metrics"] == {"accuracy": {"before": 0.75, "after": 0.5}}
    assert facts["left_float"]["layers"] == {"head": "why not"}
    assert facts["summary"]["bits"] == "W4A4" and facts["summary"]["quantized"] == 3
    by_name = {layer["name"]: layer for layer in facts["layers"]}
    for layer in found.layers:
        assert by_name[layer.name]["sqnr"] == layer.own
        assert by_name[layer.name]["tensors"]["input"]["format"] == "int4_asym_tensor"
    counts = facts["worst"][0]["histograms"]["weight"]
    assert sum(counts["counts"]) + counts["below"] + counts["above"] == 64


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_told_and_is_json(value, tmp_path):
    net = Chain(3)
    with torch.no_grad():
        net.blocks[1][0].bias[0] = value
    found = findings(net, after={"loss": value}, before={"loss": 1.0}, output=value)
    path = write(tmp_path, title_of(found), standard_sections(found))
    Checker(path.read_text("utf-8"))
    facts = json.loads(path.with_name("report.json").read_text(), parse_constant=pytest.fail)
    assert str(float(facts["summary"]["output_sqnr"])) == str(value)
    assert str(float(facts["metrics"]["loss"]["after"])) == str(value)


def test_a_perfect_layer_and_data_without_any_range():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.zero_()
    html = page(findings(net, torch.zeros(4, 8)))
    Checker(html)
    assert "exact" in html


def test_a_section_twice_is_told_twice(tmp_path):
    sections = [Section("kernels", "", {"n": n}, tag("p", n)) for n in (1, 2)]
    facts = json.loads(write(tmp_path, "t", sections).with_name("report.json").read_text())
    assert facts["kernels"] == {"n": 1} and facts["kernels_2"] == {"n": 2}


def test_150_layers_stay_small(tmp_path):
    """Under 5 MB both, with the deepest names and every layer shown."""
    found = findings(Chain(150, 64), torch.randn(64, 64))
    path = write(tmp_path, title_of(found), standard_sections(found))
    assert path.stat().st_size < 1_000_000
    assert path.with_name("report.json").stat().st_size < 1_000_000
    assert path.read_text("utf-8").count("<tr>") > 150


def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch):
    found = findings()
    write(tmp_path, "first", standard_sections(found))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    from pathlib import Path

    def fail(self, *args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write(tmp_path, "second", standard_sections(found))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
