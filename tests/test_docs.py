"""The documents are true as far as a machine can tell: commands are ones that bfm takes, files and links exist,
snippets import. What they tell a user to type is typed in test_docs_typed.py."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from bfm.cli import GROUPS, app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster" / "README.md"]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def commands(document: Path) -> list[list[str]]:
    """Words of every command in the bash blocks of a document."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= {";"}:
                    found += [words] if words else []
                    words = []
                else:
                    words.append(word)
    return found


def parse(words: list[str]) -> None:
    """As bfm would, without running; raises what the command line says."""
    verb = typer.main.get_command(app)
    while hasattr(verb, "commands"):
        name, *words = words
        verb = verb.commands[name]
    verb.make_context(name, words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_command_of_bfm_is_one_that_it_takes(document):
    for words in commands(document):
        program = Path(words[0]).name
        if program == "bfm":
            parse(words[1:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_targets_modules_and_files_that_commands_name_exist(document):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for words in commands(document):
        if words[0] == "make":
            assert words[1] in targets
        for module in re.findall(r"-m (ray_jobs\.\w+)", " ".join(words)):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists()
        for word in words:
            if re.match(r"(search_spaces|cluster|benchmarks|tests|ray_jobs)/[\w/.-]+\.(yaml|py)$", word):
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path) if path else document
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_python_snippets_import_what_there_is(document):
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.S):
        exec(compile("\n".join(re.findall(r"^(?:from|import) .*$", block, re.M)), str(document), "exec"), {})


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_every_verb_stands_in_a_group_of_the_help():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(typer.main.get_command(app).commands)
