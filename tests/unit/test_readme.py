"""README.md against the disk: its tree names every file and no other. The commands that guides show exist.

The tree is the ```text block under the heading "The tree", a line per file: name, then what it is for.
Commands are the lines of ```bash blocks; a block after `<!-- run -->` is also run, in a temporary folder
that has pipeline/ and .venv/ in it. Settings are the ```yaml blocks.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = ("README.md", "pipeline/README.md", "containers/README.md")
FOLDERS = ("pipeline", "components", "containers", "tests", "benchmarks", ".ci")
ELSEWHERE = {"cd", "cat", "curl", "docker", "export", "gcloud", "git", "kubectl", "ls", "open", "source"}
FENCE = re.compile(
    r"^(?P<run><!-- run -->\n+)?```(?P<language>\w*)\n(?P<body>.*?)^```$|^#+ (?P<heading>[^\n]+)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block, the heading it stands under, and whether it is marked to be run."""

    heading: str
    language: str
    body: str
    run: bool


def blocks(text: str) -> list[Block]:
    found, heading = [], ""
    for match in FENCE.finditer(text):
        if match["heading"]:
            heading = match["heading"].strip()
        else:
            found.append(Block(heading, match["language"], match["body"], bool(match["run"])))
    return found


def tree_entries(text: str) -> dict[str, str]:
    """The comment of every file that the tree names, by path."""
    trees = [block.body for block in blocks(text) if (block.heading, block.language) == ("The tree", "text")]
    assert len(trees) == 1, 'README.md needs one ```text block under the heading "The tree"'
    entries: dict[str, str] = {}
    folders: list[tuple[int, str]] = []
    for line in filter(str.strip, trees[0].splitlines()):
        name, _, comment = line.lstrip(" │├└─").partition(" ")
        column = line.index(name)
        folders = [(at, folder) for at, folder in folders if at < column]
        path = (folders[-1][1] if folders else "") + name
        if name.endswith("/"):
            folders.append((column, path))
            continue
        assert path not in entries, f"{path} is twice in the tree"
        entries[path] = comment.strip(" #")
    return entries


def files_on_disk(root: Path) -> set[str]:
    """Every file with something in it, under our folders and, as far as git knows them, at the top."""
    inside = (path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file())
    found = [path for path in inside if "__pycache__" not in path.parts and path.name != ".DS_Store"]
    if (root / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
        top = [root / name for name in listed.stdout.splitlines() if "/" not in name]
        found += [path for path in top if path.exists()]
    return {
        path.relative_to(root).as_posix()
        for path in found
        if path.name != "__init__.py" and path.stat().st_size
    }


def commands(body: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, as words, without variables set before them and redirections."""
    waiting = ""
    for line in body.replace("\\\n", " ").splitlines():
        waiting += line.removeprefix("$ ") + "\n"
        lexer = shlex.shlex(waiting, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            tokens = list(lexer)
        except ValueError:  # a quotation goes on in the next line
            continue
        waiting = ""
        yield from simple_commands(tokens)
    assert not waiting, f"no closing quotation: {waiting}"


def simple_commands(tokens: list[str]) -> Iterator[list[str]]:
    words: list[str] = []
    skip = False
    for token in [*tokens, ";"]:
        if token in ("&&", "||", "|", ";", "&"):
            while words and re.match(r"[A-Za-z_]\w*=", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []
        elif not skip and token[0] not in "<>":
            words.append(token)
        skip = token[0] in "<>"


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.M))


@cache
def help_text(subcommand: str) -> str | None:
    """What `plumbline <subcommand> --help` prints, and that of commands below it; None without such a sub-command."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from pipeline.cli import app

    wide = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    below = getattr(getattr(get_command(app), "commands", {}).get(subcommand), "commands", {})
    shown = [
        CliRunner().invoke(app, [subcommand, *words, "--help"], env=wide) for words in ([], *([name] for name in below))
    ]
    return "".join(result.output for result in shown) if shown[0].exit_code == 0 else None


def objection(words: list[str], makefile: str) -> str | None:
    """What does not exist in a command that README tells a person to type."""
    tool, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    ours = [word for word in words if word.startswith(tuple(f"{folder}/" for folder in FOLDERS))]
    missing = [word for word in ours if not (ROOT / word).exists()]
    if missing:
        return f"no such file: {missing[0]}"
    if tool == "make":
        targets = [word for word in arguments if "=" not in word and not word.startswith("-")]
        unknown = set(targets) - make_targets(makefile)
        return f"no such target of make: {unknown.pop()}" if unknown else None
    if tool == "plumbline":
        return plumbline_objection(arguments)
    if tool in ("python", "python3", "python3.11") and arguments[:1] == ["-m"]:
        return None if importlib.util.find_spec(arguments[1]) else f"no such module: {arguments[1]}"
    known = tool in ELSEWHERE or (ROOT / words[0]).is_file() or Path(sys.executable).with_name(tool).exists()
    return None if known else f"no such command: {words[0]}"


def plumbline_objection(arguments: list[str]) -> str | None:
    if not arguments or arguments[0].startswith("-"):
        return None
    text = help_text(arguments[0])
    if text is None:
        return f"no such sub-command of plumbline: {arguments[0]}"
    options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))
    used = [word.partition("=")[0] for word in arguments[1:] if re.match(r"--?[a-z]", word)]
    unknown = [option for option in used if option not in options]
    return f"plumbline {arguments[0]} has no option {unknown[0]}" if unknown else None


def readme() -> str:
    return (ROOT / "README.md").read_text("utf-8")


def scripts(guide: str, language: str) -> list[str]:
    text = (ROOT / guide).read_text("utf-8")
    return [block.body for block in blocks(text) if block.language == language]


def marked_scripts() -> list[str]:
    return [block.body for block in blocks(readme()) if block.language == "bash" and block.run]


def test_the_tree_names_every_file_and_no_other() -> None:
    entries, disk = tree_entries(readme()), files_on_disk(ROOT)
    assert len(disk) >= 30
    assert not sorted(disk - entries.keys()), "on disk and not in README's tree"
    assert not sorted(path for path in entries.keys() - disk if not (ROOT / path).is_file()), "not on disk"


def test_every_file_of_the_tree_has_a_comment() -> None:
    assert not [path for path, comment in tree_entries(readme()).items() if not comment]


@pytest.mark.parametrize("guide", GUIDES)
def test_every_command_of_a_guide_exists(guide: str) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    typed = [words for script in scripts(guide, "bash") for words in commands(script)]
    assert len(typed) >= 5
    assert not [f"{shlex.join(words)}: {reason}" for words in typed if (reason := objection(words, makefile))]


def test_the_readme_begins_with_the_two_commands() -> None:
    typed = [tuple(words) for script in scripts("README.md", "bash") for words in commands(script)]
    assert typed[:2] == [("make", "run"), ("make", "test")]


@pytest.mark.parametrize("guide", GUIDES)
def test_the_settings_of_a_guide_are_accepted(guide: str, tmp_path: Path) -> None:
    from pipeline.overrides import resolve

    shown = scripts(guide, "yaml")
    assert shown
    for number, settings in enumerate(shown):
        path = tmp_path / f"{number}.yaml"
        path.write_text(settings, "utf-8")
        resolve([path])


@pytest.mark.parametrize("script", marked_scripts())
def test_what_the_readme_marks_to_run_runs(script: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


SAMPLE = """# A project

## Start
```bash
$ make run ARGS="a=1"   # the demo
FOO=1 plumbline run -c a.yaml \\
    b=2 > log.txt && git status | cat
curl -d '{"a":
  1}' localhost
```

## The tree
```text
pipeline/            wires steps
  cli.py             # the commands
  configs/
    demo.yaml        what `make run` uses
components/
├── rl/
│   └── loop.py      the loop
└── models.py        load and save
.ci/run              what CI calls
README.md
```

<!-- run -->
```bash
echo hello
```
"""


def test_the_tree_is_read_by_indentation() -> None:
    assert tree_entries(SAMPLE) == {
        "pipeline/cli.py": "the commands",
        "pipeline/configs/demo.yaml": "what `make run` uses",
        "components/rl/loop.py": "the loop",
        "components/models.py": "load and save",
        ".ci/run": "what CI calls",
        "README.md": "",
    }


def test_commands_are_read_out_of_a_script() -> None:
    assert list(commands(blocks(SAMPLE)[0].body)) == [
        ["make", "run", "ARGS=a=1"],
        ["plumbline", "run", "-c", "a.yaml", "b=2"],
        ["git", "status"],
        ["cat"],
        ["curl", "-d", '{"a":\n  1}', "localhost"],
    ]


def test_only_a_marked_block_is_run() -> None:
    assert [(block.body, block.run) for block in blocks(SAMPLE) if block.language == "bash"][1:] == [
        ("echo hello\n", True)
    ]
    assert not blocks(SAMPLE)[0].run


def test_a_comment_in_a_block_is_no_heading() -> None:
    assert [block.heading for block in blocks("## A\n```bash\n# B\nls\n```\n```text\nc\n```\n")] == ["A", "A"]


def test_files_on_disk_leaves_out_what_is_empty_or_made(tmp_path: Path) -> None:
    for name in ("a.py", "__init__.py", "__pycache__/a.pyc"):
        (tmp_path / "pipeline" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pipeline" / name).write_text("x")
    (tmp_path / "pipeline" / "empty.py").touch()
    assert files_on_disk(tmp_path) == {"pipeline/a.py"}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("make nonsense", "no such target of make: nonsense"),
        ("make run nonsense", "no such target of make: nonsense"),
        ("plumblime run", "no such command: plumblime"),
        ("python -m no_such_module", "no such module: no_such_module"),
        ("cat pipeline/configs/no_such.yaml", "no such file: pipeline/configs/no_such.yaml"),
        ("plumbline nonsense", "no such sub-command of plumbline: nonsense"),
        ("plumbline run --nonsense", "plumbline run has no option --nonsense"),
        ("plumbline schedule --nonsense", "plumbline schedule has no option --nonsense"),
    ],
)
def test_a_command_that_does_not_exist_is_seen(command: str, reason: str) -> None:
    assert objection(command.split(), "VAR := 1\nrun: setup\n\tplumbline run\n") == reason


@pytest.mark.parametrize(
    "command",
    [
        "make run", "make -j2 run ARGS=x", "plumbline run --help", "plumbline schedule --every 1d",
        ".venv/bin/python -m pytest", ".ci/run",
    ],
)
def test_a_command_that_exists_passes(command: str) -> None:
    assert objection(command.split(), "run: setup\n\tplumbline run\n") is None
