"""Every command and every block of code in the README and the documentation works as it is printed."""

import ast
import doctest
import re
import shlex
import shutil
import sys

import lightning as L
import pytest
import yaml

from lightning_quant import PostTrainingQuantization
from lightning_quant.cli import main
from tests.docs.blocks import PAGES, REPOSITORY, blocks, save_files

START = REPOSITORY / "docs" / "start.md"
RUN_OR_READ = {"python", "pycon", "yaml", "sh", "make", "{toctree}", "{raw} html", ""}
MAKE = (REPOSITORY / "Makefile").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A reader's working directory: my_model.py of the first page, and the examples."""
    save_files(START, tmp_path)
    for file in (REPOSITORY / "examples").iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-quant"])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").is_file():
            del sys.modules[name]


def run_python(page, folder):
    """The Python blocks in one namespace, where ``model`` and its data are there, as a reader's own are."""
    from my_model import Data, Net

    namespace = {"__name__": "__main__", "model": Net(), "dm": Data(), "data": Data()}
    if page.stem == "models":  # one line out of a program
        namespace |= {"L": L, "PostTrainingQuantization": PostTrainingQuantization}
    for block in blocks(page):
        if block.language == "python" and not block.file:
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_of_a_kind_that_is_run_or_needs_no_running(page):
    for block in blocks(page):
        assert block.language in RUN_OR_READ, f"{page.name}:{block.line}"


def has(language):
    return [page for page in PAGES if any(block.language == language and not block.file for block in blocks(page))]


@pytest.mark.parametrize("page", has("python"), ids=lambda page: page.stem)
def test_python_blocks_run(page, folder):
    save_files(page, folder)
    run_python(page, folder)


@pytest.mark.parametrize("page", has("pycon"), ids=lambda page: page.stem)
def test_sessions_print_what_they_show(page):
    text = "\n".join(block.text for block in blocks(page) if block.language == "pycon")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0))
    assert runner.summarize().attempted and not runner.failures


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_blocks_name_callbacks_and_arguments_that_exist(page, folder, capsys):
    for number, block in enumerate(block for block in blocks(page) if block.language == "yaml"):
        config = {"model": "my_model.Net", "data": "my_model.Data"} | yaml.safe_load(block.text)
        (folder / f"block{number}.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(SystemExit) as stop:
            main(["validate", "--config", f"block{number}.yaml", "--print_config"])
        assert stop.value.code == 0, capsys.readouterr().err


def commands(page):
    """Every command in the shell blocks, without comments; a continued line is one command."""
    for block in blocks(page):
        if block.language in ("sh", "make"):
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


def real_weights(words):
    """Whether a command is for weights and images: evidence of tests/examples runs it."""
    return any("deit" in word for word in words)


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=lambda page: page.stem)
def test_commands_work(page, folder, capsys):
    save_files(page, folder)
    for program, *words in commands(page):
        if program == "make":
            for target in (word for word in words if "=" not in word):
                assert re.search(rf"^{target}: ", MAKE, re.MULTILINE), target
        elif program == "pip":
            (wanted,) = words[1:]
            extras = re.search(r"\[(.*)\]", wanted)
            project = (REPOSITORY / "pyproject.toml").read_text()
            assert wanted.startswith("lightning-quant")
            assert not extras or all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras[1].split(","))
        elif program == "python":
            assert (folder / words[0].removeprefix("examples/")).is_file()  # tests/examples runs each of them
        elif program == "lightning-quant" and not real_weights(words):
            assert exit_code(words) == 0, (words, capsys.readouterr().err)
        else:
            assert program == "lightning-quant", program


def exit_code(words):
    """What a command ends with."""
    try:
        main(words)
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_mistakes_that_are_shown_read_so(folder, capsys):
    (shown,) = (b.text for b in blocks(REPOSITORY / "docs" / "cli.md") if b.language == "" and "error:" in b.text)
    save_files(REPOSITORY / "docs" / "cli.md", folder)
    config = yaml.safe_load((folder / "w8a8.yaml").read_text())
    found = []
    for change in ({"class_path": "RepQVit"}, {"init_args": {"skip": ["hed"]}}, {}):
        config["trainer"]["callbacks"] = [{"class_path": "PostTrainingQuantization", **change}]
        (folder / "wrong.yaml").write_text(yaml.safe_dump(config))
        last = [] if change else ["--ckpt_path", "last.ckpt"]
        with pytest.raises(SystemExit):
            main(["validate", "--config", "wrong.yaml", "--trainer.logger=false", *last])
        found.append(capsys.readouterr().err)
    assert re.sub(r"there are \[.*\]", "there are []", "".join(found)) == re.sub(
        r"there are \[.*\]", "there are []", shown
    )


def test_the_verbs_of_the_page_are_those_of_the_command(capsys):
    main([])
    there = re.findall(r"^  (\w+)   ", capsys.readouterr().out, re.MULTILINE)
    table = re.search(r"\| verb \|.*?\n\n", (REPOSITORY / "docs" / "cli.md").read_text(), re.DOTALL)[0]
    rows = [row.split("|")[1] for row in table.splitlines()[2:] if row]
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == sorted(there)


def test_python_blocks_are_formatted_like_code():
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                ast.parse(block.text)
                assert max(map(len, block.text.splitlines())) <= 120, f"{page.name}:{block.line}"
