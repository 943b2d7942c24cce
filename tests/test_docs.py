"""The documents are true as far as a machine can tell: commands are ones that bfm takes, files and links exist,
snippets import."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


SMALLER = {"1e12": "4e8", "1e13": "1e10", "1e6": "1e5", "5e3": "500", "2e3": "300"}
"""What commands ask for -> what a test has time for."""
SHORT_SWEEP = (
    "parameters.window={value: 64}",
    "parameters.group_windows={value: 2}",
    "parameters.params={distribution: log_uniform_values, min: 5e2, max: 3e3}",
    "budget.ladder_flops=[1.2e9, 2.4e9]",
    "budget.total_flops=4e10",
    "budget.max_trials=14",
)


def shop(folder: Path) -> None:
    """The files that docs/data.md and docs/models.md speak of."""
    rng = np.random.default_rng(0)
    rows, items = 12_000, 80
    (folder / "logs").mkdir()
    log = {
        "customer_id": rng.integers(0, 250, rows),
        "created_at": rng.integers(1_600_000_000, 1_610_000_000, rows),
        "sku": rng.integers(0, items, rows),
        "quantity": rng.integers(1, 5, rows),
        "channel": rng.choice(["web", "store"], rows),
    }
    pq.write_table(pa.table(log), folder / "logs" / "a.parquet")
    pq.write_table(pa.table(log).slice(0, 500), folder / "new_log.parquet")
    products = {
        "sku": np.arange(items),
        "category": rng.choice(["tea", "toys"], items),
        "price": rng.uniform(1, 9, items),
        "title": [f"thing {item}" for item in range(items)],
        "tags": [["a", "b"][: 1 + item % 2] for item in range(items)],
    }
    pq.write_table(pa.table(products), folder / "products.parquet")
    yaml = re.search(r"```yaml\n(# shop.yaml.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    assert yaml is not None
    (folder / "shop.yaml").write_text(yaml.group(1))
    (folder / "config.yaml").write_text("params: 1e3\nembedder_share: 0.15\nwindow: 64\ngroup_windows: 2\nd_item: 16\n")


def run(bfm, words: list[str]) -> None:
    words = [SMALLER.get(word, word) for word in words]
    if words[0] == "init":
        # A budget that small has no ladder; what the tour proposes is what is swept, on a shorter one.
        words = ["1e12" if word == SMALLER["1e12"] else word for word in words]
    short = [part for override in SHORT_SWEEP for part in ("--set", override)] if words[0] == "sweep" else []
    code, out, err = bfm(*words, *short)
    assert code == 0, f"bfm {' '.join(words)}\n{out}\n{err}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", [["README.md"], ["docs/data.md", "docs/models.md"]], ids=["tour", "shop"])
def test_what_the_documents_tell_a_user_to_type_works(bfm, tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    shop(tmp_path)
    typed = [words[1:] for name in names for words in commands(ROOT / name) if words[0] == "bfm"]
    assert len(typed) >= 6
    for words in typed:
        run(bfm, words)
