"""Writes the page about the commands from their parsers."""

import argparse
import importlib
import itertools
import re
import runpy
import textwrap
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from omegaconf import OmegaConf
from scripts.pages.text import ROOT, code, escape, fill, join_blocks

from crislit.__main__ import COMMANDS
from crislit.experiments.tables import markdown

SCRIPTS = {
    "download_refer": "RefCOCO, RefCOCO+ and G-Ref",
    "ship_network": "a network that ships with the package",
    "wandb_dashboard": "a workspace in Weights & Biases",
}
"""Scripts with a parser that users call, and their purpose."""
INTRODUCTION = """
Call a command as `python -m crislit.COMMAND` or as `crislit COMMAND`; `--help` prints what this
page shows. A command that cannot use its input ends with one line and exit code 1.
"""


class CapturedParserError(Exception):
    """Ends a command when it parses its arguments."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def capture_parser(run: Callable[[], object]) -> argparse.ArgumentParser:
    """Return the parser of a command.

    Args:
        run: Calls the command.
    """

    def stop(parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        raise CapturedParserError(parser)

    parser = argparse.ArgumentParser
    with (
        mock.patch.object(parser, "parse_args", stop),
        mock.patch.object(parser, "parse_intermixed_args", stop),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of imports
        try:
            run()
        except CapturedParserError as captured:
            return captured.parser
    raise AssertionError("the command parsed no arguments")


def invocation(action: argparse.Action) -> str:
    """Return how an argument is written, the same for every version of Python."""
    choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices else ""
    default = action.dest.upper() if action.option_strings else action.dest
    value = str(action.metavar or choices or default) if action.nargs != 0 else ""
    if action.nargs in ("+", "*") and not value.endswith("..."):
        value += " ..."
    return " ".join(filter(None, [", ".join(action.option_strings), value]))


def usage(parser: argparse.ArgumentParser) -> str:
    """Return how a command is called, in one line unless its parser says otherwise."""
    if parser.usage:
        lines = (parser.usage % {"prog": parser.prog}).splitlines()
        return "\n".join(line.strip() for line in lines)
    positional = [action for action in parser._actions if not action.option_strings]
    words = [f"[{invocation(x)}]" if x.nargs in ("?", "*") else invocation(x) for x in positional]
    return " ".join([parser.prog, *words, "[options]"])


def parser_blocks(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the Markdown of a command's help."""
    description = re.sub(r"^python -m [^:]+: ", "", parser.description or "")
    first, _, rest = description.partition("\n")
    yield fill(first[:1].upper() + first[1:])
    if example := getattr(parser, "example", ""):
        yield from (f"    {example}", f"```text\n{usage(parser)}\n```")
    if rest.strip():
        yield from preformatted(rest)
    rows = [
        [code(invocation(x)), escape((x.help or "") % {**vars(x), "prog": parser.prog})]
        for x in parser._actions
        if x.dest != "help"
    ]
    yield markdown([["argument", "meaning"], *rows], left=2)
    if parser.epilog:
        yield from preformatted(parser.epilog)


def hydra_blocks(name: str) -> Iterator[str]:
    """Yield the Markdown of the help of ``train`` or ``evaluate``, without its keys."""
    config: Any = OmegaConf.load(ROOT / "conf" / f"{name}.yaml")
    example, _, text = config.hydra.help.header.partition("\n")
    yield f"    {example.removeprefix('example: ')}"
    yield fill(text.replace("any key below", f"[any key](configuration.md#{name})").strip())


def script_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a script."""
    file = ROOT / "scripts" / f"{name}.py"
    parser = capture_parser(partial(runpy.run_path, str(file), run_name="__main__"))
    parser.prog = f"python scripts/{name}.py"
    return parser


def shell_header(file: Path) -> str:
    """Return the comment at the top of a shell script."""
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    top = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return "\n".join(line[1:].removeprefix(" ") for line in top)


def commands_page() -> str:
    """Return the reference of all commands and of the scripts that users call."""
    blocks = ["# Commands", INTRODUCTION.strip()]
    for name in COMMANDS:
        blocks.append(f"## {name}")
        if name in ("train", "evaluate"):
            blocks += hydra_blocks(name)
            continue
        module = importlib.import_module(f"crislit.{name}")
        blocks += parser_blocks(capture_parser(partial(module.main, [])))
    blocks += ["## Scripts", "Scripts are part of the repository, not of the package."]
    for name, purpose in SCRIPTS.items():
        blocks += [f"### {name}.py: {purpose}", *parser_blocks(script_parser(name))]
    blocks.append("### gpu_acceptance.sh: tests and measures a GPU")
    blocks += preformatted(shell_header(ROOT / "scripts/gpu_acceptance.sh"))
    return join_blocks(blocks)


def preformatted(text: str) -> Iterator[str]:
    """Yield the Markdown of a help text: paragraphs, and code where lines are indented."""

    def is_code(line: str) -> bool:
        return line.startswith((" ", "python "))

    for paragraph in text.strip("\n").split("\n\n"):
        for indented, group in itertools.groupby(paragraph.splitlines(), is_code):
            lines = "\n".join(group)
            yield f"```text\n{textwrap.dedent(lines)}\n```" if indented else fill(escape(lines))
