"""Writes the generated pages of the documentation: configuration, commands and results.

    python scripts/reference_pages.py                 # writes the three pages
    python scripts/reference_pages.py --check         # fails if one of them is out of date
    python scripts/reference_pages.py --docstrings    # lists public names without documentation

The configuration comes from ``conf/`` and its comments, the commands from their ``--help``, and the
results from ``results/``.
"""

import argparse
import csv
import importlib
import itertools
import json
import re
import runpy
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import griffe
from omegaconf import OmegaConf

from crislit.__main__ import COMMANDS
from crislit.errors import InputError, counted, one_line_errors, require
from crislit.experiments.claims import CONTRADICTED, SHOWN, claims_table
from crislit.experiments.report import CLAIMED
from crislit.experiments.runs import collect, group_by_setting
from crislit.experiments.tables import markdown, readme_tables
from crislit.io import write_text

ROOT = Path(__file__).resolve().parents[1]
GENERATED = "<!-- Written by scripts/reference_pages.py: do not edit this page. -->"
Row = Mapping[str, str]
"""A row of a CSV file."""


# -- Markdown


def fill(text: str) -> str:
    """Wrap a paragraph at 100 columns."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def escape(text: str) -> str:
    """Escape characters that Markdown or HTML would not show."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("|", "\\|")


def code(text: str) -> str:
    """Format text as code in a table's cell."""
    return f"`{text}`".replace("|", "\\|")


def join_blocks(blocks: Sequence[str]) -> str:
    """Return a page of blocks with an empty line between them."""
    return "\n\n".join([GENERATED, *blocks]) + "\n"


def preformatted(text: str) -> Iterator[str]:
    """Yield the Markdown of a help text: paragraphs, and code where lines are indented."""

    def is_code(line: str) -> bool:
        return line.startswith((" ", "python "))

    for paragraph in text.strip("\n").split("\n\n"):
        for indented, group in itertools.groupby(paragraph.splitlines(), is_code):
            lines = "\n".join(group)
            yield f"```text\n{textwrap.dedent(lines)}\n```" if indented else fill(escape(lines))


# -- Configuration

GROUPS = {
    **{"dataset": "shapes", "model": "tiny", "recipe": "shapes", "trainer": "auto"},
    **{"augment": "none", "logger": "csv", "ablation": "", "experiment": ""},
}
"""The groups in the order of the page, and their default choices."""
NOT_DEFAULTS = ("ablation", "experiment")
"""Groups that are not part of the defaults of a run."""
LINE = re.compile(r"( *)(- )?(?:override /)?([\w.]+):(?: .*?)??(?:\s+# (.*))?")
INTRODUCTION = """
Set a key with `KEY=VALUE`, and select a file of a group with `GROUP=CHOICE`:

    python -m crislit.train dataset=gshapes recipe.epochs=1 decoder.layers=2

With `-m`, commas make a sweep: `-m decoder.layers=1,2 seed=0,1`. The command line overrides the
files of `conf/`. Of the groups, a later one of this list overrides an earlier one: `augment`,
`logger`, `trainer`, `recipe`, `dataset`, `model`, `ablation`, `experiment`. A data set also selects
its recipe. `python -m crislit.train --cfg job` prints the complete configuration, and every run
stores its own in `.hydra/config.yaml`. [Extend](../extend.md) shows how to add files.

Hydra's own keys are not listed: `hydra.run.dir=FOLDER` chooses the folder of a run, and
`hydra/launcher=joblib` or `hydra/launcher=slurm` run the jobs of a sweep in parallel.
"""
OF_EVALUATION = """
The keys of `python -m crislit.evaluate`. The network comes from the checkpoint, and so does the
data set, unless `dataset=CHOICE` names another. `trainer=CHOICE` is the same as in training.
"""


@dataclass(frozen=True)
class ConfigFile:
    """A file of ``conf/``.

    Attributes:
        name: Its path in ``conf/``.
        title: The comment at its top.
        comments: The comment of each key that has one.
        values: Its values, with those of the files that it includes, as nested dictionaries.
        selects: The choices of other groups that it selects.
    """

    name: str
    title: str
    comments: Mapping[str, str]
    values: Mapping[str, Any]
    selects: Mapping[str, str]


def read_comments(text: str) -> dict[str, str]:
    """Return the comments beside or above the keys of a YAML file, by the keys' full names.

    The comments at the top of the file belong to no key. Entries of the defaults list are named
    ``defaults.GROUP``.
    """
    comments: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    above: list[str] = []
    lines = text.splitlines()
    for line in itertools.dropwhile(lambda line: line.startswith("#"), lines):
        if line.lstrip().startswith("#"):
            above.append(line.strip("# "))
            continue
        if match := LINE.fullmatch(line):
            indent = len(match[1]) + len(match[2] or "")
            path = [*(parent for parent in path if parent[0] < indent), (indent, match[3])]
            if comment := match[4] or " ".join(above):
                comments[".".join(name for _, name in path)] = comment
        above = []
    return comments


def read_title(text: str) -> str:
    """Return the comment at the top of a YAML file, up to its first command."""
    top = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    lines = (line[2:] for line in top if "@package" not in line)
    return " ".join(itertools.takewhile(lambda line: not line.startswith("python "), lines))


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries; the second wins."""
    merged = dict(first)
    for key, value in second.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def read_config_file(conf: Path, name: str) -> ConfigFile:
    """Read a file of ``conf/`` and those that it includes.

    Args:
        conf: The folder.
        name: ``train`` or ``dataset/shapes``.
    """
    text = (conf / f"{name}.yaml").read_text(encoding="utf-8")
    content: Any = OmegaConf.to_container(OmegaConf.create(text))
    defaults, _ = content.pop("defaults", []), content.pop("hydra", None)
    group = name.rpartition("/")[0].partition("/")[0]
    comments = read_comments(text)
    if group and "@package _global_" not in text:
        content, comments = {group: content}, {f"{group}.{k}": v for k, v in comments.items()}
    selects: dict[str, str] = {}
    for base in (x for x in defaults if group and isinstance(x, str)):
        included = read_config_file(conf, f"{group}/{base}")
        content, selects = merge(included.values, content), selects | {**included.selects}
    entries = [item for x in defaults if isinstance(x, dict) for item in x.items()]
    selects |= {k.removeprefix("override /"): x for k, x in entries if k.startswith("override /")}
    return ConfigFile(f"{name}.yaml", read_title(text), comments, content, selects)


def read_group(conf: Path, group: str) -> dict[str, ConfigFile]:
    """Return the choices of a group, the default one first.

    Raises:
        InputError: If a file has no comment at its top.
    """
    names = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    names.sort(key=lambda name: name != GROUPS[group])
    files = {name: read_config_file(conf, f"{group}/{name}") for name in names}
    for file in files.values():
        require(file.title, f"conf/{file.name} has no comment at its top: say what the choice is")
    return files


def flatten(values: Mapping[str, Any], whole: Collection[str], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their full names.

    Args:
        values: Nested dictionaries.
        whole: Names of dictionaries that are one value.
        prefix: Stands before the names.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        is_group = isinstance(value, dict) and value and name not in whole
        flat |= flatten(value, whole, f"{name}.") if is_group else {name: value}
    return flat


def format_value(value: Any) -> str:
    """Format a value as on the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {format_value(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(format_value, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value) if value != "" else '""'


def format_choices(values: Mapping[str, Any], count: int) -> str:
    """Format what a key's value is with each choice of a group.

    Args:
        values: The value of each choice that sets the key.
        count: The number of choices that the group has.
    """
    if all(value == choice for choice, value in values.items()):
        return "the choice"
    by_value: dict[str, list[str]] = {}
    for choice, value in values.items():
        by_value.setdefault(code(format_value(value)), []).append(code(choice))
    if len(by_value) == 1 and len(values) == count:
        return next(iter(by_value))
    return "; ".join(f"{value} ({', '.join(choices)})" for value, choices in by_value.items())


class Configuration:
    """All files of ``conf/``, and the meaning of each key.

    Args:
        conf: The folder.

    Raises:
        InputError: If a choice has no comment at its top.
    """

    def __init__(self, conf: Path) -> None:
        self.train, self.evaluate = (read_config_file(conf, x) for x in ("train", "evaluate"))
        self.groups = {group: read_group(conf, group) for group in GROUPS}
        self.explaining = [group for group in GROUPS if group not in NOT_DEFAULTS]
        files = [x for group in self.explaining for _, x in sorted(self.groups[group].items())]
        self.meanings: dict[str, str] = {}
        for file in [self.train, *files]:
            self.meanings = {**file.comments, **self.meanings}

    def meaning(self, key: str, file: ConfigFile) -> str:
        """Return what a key means.

        Args:
            key: Its full name.
            file: A file that sets it.

        Raises:
            InputError: If it has no comment.
        """
        meanings = file.comments if file is self.evaluate else self.meanings
        require(
            key in meanings,
            f"conf/{file.name}: the key {key} has no comment: write its meaning beside it",
        )
        return escape(meanings[key])

    def own_keys(self, file: ConfigFile) -> str:
        """Return the keys of a command's primary file, their defaults and meanings."""
        rows = [
            [code(key), self.default(key, value, file), self.meaning(key, file)]
            for key, value in flatten(file.values, ()).items()
        ]
        return markdown([["key", "default", "meaning"], *rows], left=3)

    def default(self, key: str, value: Any, file: ConfigFile) -> str:
        """Format the value of a key, and the values that choices of groups give it in training."""
        parts = [code(format_value(value))] if value != "???" else []
        return "; ".join(parts + (self.set_by_others(key) if file is self.train else []))

    def set_by_others(self, key: str, but: str = "") -> list[str]:
        """Format the values that choices of groups give a key.

        Args:
            key: Its full name.
            but: A group to leave out.
        """
        parts = []
        for group in self.explaining:
            by_value: dict[str, list[str]] = {}
            for choice, file in self.groups[group].items() if group != but else ():
                if key in (flat := flatten(file.values, self.meanings)):
                    by_value.setdefault(format_value(flat[key]), []).append(f"`{group}={choice}`")
            parts += [f"{code(value)} with {', '.join(x)}" for value, x in by_value.items()]
        return parts

    def key_table(self, group: str) -> str:
        """Return the keys of a group, their values and meanings."""
        choices = {name: flatten(x.values, self.meanings) for name, x in self.groups[group].items()}
        table = [["key", "value", "meaning"]]
        for key in dict.fromkeys(key for flat in choices.values() for key in flat if key != group):
            values = {name: flat[key] for name, flat in choices.items() if key in flat}
            parts = [format_choices(values, len(choices))]
            if key.startswith(f"{group}."):
                parts += self.set_by_others(key, group)
            meaning = self.meaning(key, self.groups[group][next(iter(values))])
            table.append([code(key), "; ".join(parts), meaning])
        return markdown(table, left=3)

    def choice_table(self, group: str) -> str:
        """Return the choices of a group."""
        table = [["choice", "what it is", "also selects"]]
        for name, file in self.groups[group].items():
            default = " (default)" if name == GROUPS[group] else ""
            selected = ", ".join(f"`{key}={choice}`" for key, choice in file.selects.items())
            table.append([f"`{group}={name}`{default}", describe(file), selected or "-"])
        if all(row[2] == "-" for row in table[1:]):
            table = [row[:2] for row in table]
        return markdown(table, left=3)


def describe(file: ConfigFile) -> str:
    """Return the comment at a file's top, with overrides as code."""
    override = r"[\w./]+=[^\s;]*\w"
    return re.sub(
        rf"(`[^`]+`)|((?:-m )?{override}(?: {override})*)",
        lambda match: match[1] or f"`{match[2]}`",
        escape(file.title),
    )


def experiment_table(file: ConfigFile) -> str:
    """Return what an experiment sets, with its comments."""
    values = {f"defaults.{key}": choice for key, choice in file.selects.items()}
    rows = [
        [code(key.removeprefix("defaults.")), code(format_value(value))]
        + [escape(file.comments.get(key, ""))]
        for key, value in {**values, **flatten(file.values, ())}.items()
    ]
    return markdown([["key", "value", "reason"], *rows], left=3)


def configuration_page(conf: Path) -> str:
    """Return the reference of all keys.

    Args:
        conf: The folder of the configuration.

    Raises:
        InputError: If a key or a choice has no comment.
    """
    files = Configuration(conf)
    blocks = ["# Configuration", INTRODUCTION.strip(), "## train", files.own_keys(files.train)]
    for group in GROUPS:
        blocks += [f"## {group}", files.choice_table(group)]
        if group == "trainer":
            blocks.append(
                "The keys are arguments of `lightning.Trainer`. Add others with "
                "`+trainer.NAME=VALUE`."
            )
        if group != "experiment":
            blocks.append(files.key_table(group))
            continue
        for name, file in files.groups[group].items():
            blocks += [f"### experiment={name}", experiment_table(file)]
    evaluation = ["## evaluate", OF_EVALUATION.strip(), files.own_keys(files.evaluate)]
    return join_blocks([*blocks, *evaluation])


# -- Commands

SCRIPTS = {
    "download_refer": "RefCOCO, RefCOCO+ and G-Ref",
    "ship_network": "a network that ships with the package",
    "wandb_dashboard": "a workspace in Weights & Biases",
}
"""Scripts with a parser that users call, and their purpose."""
COMMANDS_INTRODUCTION = """
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
    blocks = ["# Commands", COMMANDS_INTRODUCTION.strip()]
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


# -- Results

SHORT = ("mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", "blind", "ceiling")
RESULTS_INTRODUCTION = """
Every number on this page is in a file in `results/`, most of them with seed, commit and hardware.
[Get started](get_started.md#what-the-run-leaves-behind) explains the columns: *blind* is the mIoU
with the sentences of an image exchanged, and *ceiling* that of a perfect prediction at the
network's resolution. All of them, and Pr@X, are in percent; ± is the standard deviation over seeds.
The paper's own tables [were not run](reproduce.md).
"""
OLDER = """
These runs are older than the recipe of `make train`: they took three epochs, divided the rates by
10 after two, and did not limit gradients. They start from `tiny-clip`, as the paper's from CLIP.
With today's code:
"""
OLDER_RECIPE = (
    'recipe.epochs=3 "recipe.optimizer.milestones=[2]" recipe.optimizer.cooldown=0 '
    "trainer.gradient_clip_val=null rearrange=false"
)
SPEED_FORMS = ("for inference", "ONNX Runtime", "ONNX Runtime, int8")
SPEED_ROWS = {
    "evaluation, seven sentences per image": ("evaluation", SPEED_FORMS),
    "one image, one sentence": ("latency", SPEED_FORMS),
    "training, batch of 4": ("training", ("default",)),
    "`rearrange=true`": ("training", ("rearrange",)),
    "`dataset.sentences_per_image=4`": ("training", ("4 sentences an image",)),
    "both": ("training", ("rearrange, 4 sentences an image",)),
}
"""Rows of the table of speeds: part and candidates of the benchmark."""
OTHER_SPEEDS = {
    "loading a training sample, ms of one core": ("data", "whole sample, collated", 1e3, 1),
    "of these, decoding and warping the image": (
        *("data", "decode and cubic warp: the floor", 1e3, 1),
    ),
    "opening an index of RefCOCO's size, s": ("data", "index of RefCOCO's size, opened", 1, 1),
    "memory of the baseline's training, GB": ("memory", "plain", 1, 2),
    "memory with `recompute=true`, GB": ("memory", "recompute", 1, 2),
    "`import crislit`, s": ("start", "import crislit", 1, 2),
    "first mask of `python -m crislit.predict`, s": ("start", "crislit.predict", 1, 1),
    "mIoU of `shapes-tiny` on 40 images": ("agreement", "plain", 100, 2),
    "the same in 8 bits": ("agreement", "ONNX Runtime, int8", 100, 2),
}
"""Rows of the other measurements: part, candidate, factor and digits."""
NOTES = {
    "embedded_recipe.md": "which changes made the recipe of `make train` stronger, and which not",
    "speed_log.md": "what made the network faster, what did not, and where gradients agree",
    "speed_tables.md": "every form of the network on every measured device",
    "profiles.md": "the network part by part, before and after each change",
    "run_profile.md": "what a training step and an evaluation batch wait for",
    "scale.md": "estimates for more devices, machines and data workers",
    "versions.md": "the tests with the newest and the oldest versions of the dependencies",
}


def read_csv(name: str) -> list[dict[str, str]]:
    """Return the rows of a file in ``results/``."""
    with (ROOT / "results" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_json(name: str) -> dict[str, Any]:
    """Return the content of a JSON file in ``results/``."""
    content: dict[str, Any] = json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))
    return content


def percent(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Format columns in [0, 1] in percent."""
    return [f"{100 * float(row[name]):.2f}" if row[name] else "-" for name in names]


def origin(files: str, rows: Sequence[Row]) -> str:
    """Return where rows come from: files, seeds, commits and hardware."""

    def unique(name: str) -> str:
        return ", ".join(
            sorted({str(row[name]) for row in rows if row.get(name) not in (None, "")})
        )

    commits = sorted({row["commit"] for row in rows})
    commit = ", ".join(code(name[:7]) for name in commits)
    seed = f"Seed {unique('seed')}. " if unique("seed") else ""
    hardware = unique("hardware").replace(" 1 threads", " 1 thread")
    return fill(f"{files}. {seed}Commit {commit}. {hardware}.")


def split_table(rows: Sequence[Row]) -> str:
    """Return the metrics of one run on every split."""
    table = [["data", "split", "samples", *SHORT]]
    table += [[x["dataset"], x["split"], x["samples"], *percent(x, SHORT)] for x in rows]
    return markdown(table, left=2)


def run_sections() -> Iterator[str]:
    """Yield the sections about single runs."""
    rows = read_csv("make_train.csv")
    minutes = round(float(rows[0]["seconds"]) / 60)
    yield "## make train"
    yield fill(
        f"The run that `make train` starts, without the installation: {minutes} minutes, "
        f"{int(rows[0]['steps']):,} steps."
    )
    yield from ("    python -m crislit.train", origin("`make_train.csv`", rows), split_table(rows))
    yield "## shapes-tiny"
    yield fill(
        "The network that ships with the package, evaluated in its shipped form. "
        "[Model zoo](model_zoo.md) has its training."
    )
    yield "    python -m crislit.evaluate checkpoint=shapes-tiny"
    rows = read_csv("shapes_tiny.csv")
    yield from (origin("`shapes_tiny.csv`", rows), split_table(rows))


def table1_sections() -> Iterator[str]:
    """Yield table 1 on the embedded data, and the claims that it tests."""
    files = ("table1.csv", "random_weights.csv")
    groups = group_by_setting(collect(ROOT / "results" / name for name in files))
    tables = readme_tables(groups)
    yield from ("## Table 1 on the embedded data", fill(OLDER.strip()))
    sweep = "python -m crislit.train -m ablation='glob(*)' dataset=shapes,shapes+,gshapes"
    yield f"    {sweep} {OLDER_RECIPE}"
    yield from (origin("`table1.csv`, val", read_csv("table1.csv")), tables["table1-tiny"])
    runs = next(x for setting, x in groups.items() if setting.initial_weights != "random")
    claims = claims_table(runs)
    yield from ("### The paper's claims", fill(CLAIMED), fill(verdicts(claims)))
    yield markdown(claims, left=3)
    yield from ("### The full model on every split", tables["splits-tiny"])
    yield from ("### From random weights", fill("The full model without `tiny-clip`."))
    sweep = "python -m crislit.train -m ablation=con_dec3 seed=0,1,2 model.clip_weights=null"
    yield f"    {sweep} record=outputs/random.csv {OLDER_RECIPE}"
    rows = read_csv("random_weights.csv")
    yield from (origin("`random_weights.csv`", rows), tables["splits-tiny-random"])


def verdicts(claims: Sequence[Sequence[str]]) -> str:
    """Return which claims are shown and which are contradicted, without their comparisons."""
    whole = {(row[0], row[1]): row for row in reversed(claims[1:])}  # an average comes first
    parts = []
    for verdict in (SHOWN, CONTRADICTED):
        found = [f"{claim} ({data})" for (claim, data), row in whole.items() if row[-1] == verdict]
        parts.append(f"{verdict.capitalize()}: {', '.join(found) or 'none'}.")
    return " ".join([*parts, "A data set with one seed can show nothing."])


def pretraining_section() -> Iterator[str]:
    """Yield the section about tiny-clip."""
    recorded = read_json("tiny_clip.json")
    recalls = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    captions = recorded["retrieval"].items()
    rows = [[name.replace(" 1 objects", " 1 object"), *percent(x, recalls)] for name, x in captions]
    yield "## tiny-clip"
    yield fill(
        f"Retrieval among 300 scenes of val by the CLIP that ships with the package, in percent. "
        f"Its training took {round(recorded['seconds'] / 60)} minutes. Chance: 0.33, 1.67 and 3.33."
    )
    yield f"    {recorded['command'].rpartition(' ')[0]} outputs/tiny-clip.safetensors"
    yield origin("`tiny_clip.json`", [recorded])
    header = [f"{way}, R@{k}" for way in ("image to text", "text to image") for k in (1, 5, 10)]
    yield markdown([["captions of", *header], *rows], left=1)


def overfitting_section() -> Iterator[str]:
    """Yield the section about overfitting."""
    rows = read_csv("overfit.csv")
    yield "## Overfitting"
    yield fill(
        f"The full model, from random weights, trained and evaluated on the same "
        f"{rows[0]['samples']} sentences of real images in RefCOCO's layout. DATA is a folder with "
        "RefCOCO; our images are not part of the repository."
    )
    command = "python -m crislit.train experiment=overfit dataset=refcoco data_root=DATA"
    yield f"    {command} model.clip_weights=null"
    yield from (origin("`overfit.csv`", rows), split_table(rows))


def fine_tuning_table() -> str:
    """Return the runs of the page about fine-tuning."""
    rows = read_csv("fine_tuning.csv")
    names = ("mIoU", "oIoU", "Pr@50", "blind")
    table = [["start", "trained", "learning rate", *names]]
    for row in rows:
        overrides = dict(item.split("=", 1) for item in row["overrides"].split())
        start = row["initial_weights"].partition(" ")[0]
        start = f"checkpoint={overrides['checkpoint']}" if "checkpoint" in overrides else start
        rate = overrides.get("recipe.optimizer.learning_rate", "1e-3")
        trained = (
            [f"{int(row['steps']):,} steps", rate] if "checkpoint" not in overrides else 2 * ["-"]
        )
        table.append([code(start), *trained, *percent(row, names)])
    return markdown(table, left=1)


def fine_tuning_section() -> Iterator[str]:
    """Yield the section about fine-tuning."""
    rows = read_csv("fine_tuning.csv")
    yield "## Fine-tuning"
    yield fill(
        "One epoch of `gshapes` from different weights, evaluated on its val "
        f"({int(rows[0]['samples']):,} sentences, ceiling {percent(rows[0], ['ceiling'])[0]}). "
        "[Fine-tune](fine_tuning.md#learning-rates) has the command and how to repeat it."
    )
    yield from (origin("`fine_tuning.csv`", rows), fine_tuning_table())


def rounding_section() -> Iterator[str]:
    """Yield the section about runs that differ by rounding."""
    rows = read_csv("rounding.csv")
    runs = {(x["commit"], x["seconds"]): x["hardware"] for x in rows}
    scores = {(x["commit"], x["seconds"], x["split"]): percent(x, ["mIoU"])[0] for x in rows}
    splits = ("val", "testA", "testB")
    table = [["commit", "hardware", "seconds", *splits]]
    for (commit, seconds), hardware in runs.items():
        cells = [scores[commit, seconds, split] for split in splits]
        threads = hardware.replace(" 1 threads", " 1 thread")
        table.append([code(commit[:7]), threads, seconds, *cells])
    yield "## Rounding"
    yield fill(
        "The full model on `shapes` with seed 0 and the settings of table 1, at several commits, "
        "on one or two threads, with and without `rearrange`: mIoU of each split. "
        "Differences between single runs that are smaller than these decide nothing. "
        "`rounding.csv`."
    )
    yield markdown(table, left=2)


def kills_section() -> Iterator[str]:
    """Yield the section about interrupted runs."""
    rows = [*read_csv("kills.csv"), *read_csv("kills_two_processes.csv")]
    table = [["killed", "processes", "kills", "continued at step", "same weights"]]
    for key in dict.fromkeys((row["processes"], row["kind"]) for row in rows):
        kills = [row for row in rows if (row["processes"], row["kind"]) == key]
        steps = [int(row["went on at step"]) for row in kills]
        same = sum(row["same"] == "yes" for row in kills)
        between = f"{min(steps)} to {max(steps)} of {kills[0]['of steps']}"
        table.append([key[1], key[0], str(len(kills)), between, f"{same} of {len(kills)}"])
    yield "## Interrupted runs"
    yield fill(
        "Trainings killed with SIGKILL and continued with `resume=auto`: whether their weights are "
        "bit for bit those of a run without interruption."
    )
    script = "    python scripts/kill_and_resume.py --trials"
    logs = "outputs/kills.csv", "outputs/kills_two_processes.csv"
    yield f"{script} 20 --log {logs[0]}\n{script} 8 --processes 2 --log {logs[1]}"
    yield origin("`kills.csv`, `kills_two_processes.csv`", rows)
    yield markdown(table, left=1)


def speed_section() -> Iterator[str]:
    """Yield the section about speed."""
    rows = read_csv("speed.csv")
    cpu = {(row["part"], row["candidate"]): row for row in rows if row["device"] == "cpu"}
    gpu = "No GPU was measured. " if {row["device"] for row in rows} == {"cpu"} else ""
    table = [["", "baseline, s per sentence", "here", "ONNX Runtime", "8 bits"]]
    for label, (part, names) in SPEED_ROWS.items():
        ratios = [f"{float(cpu[part, name]['ratio']):.2f} x" for name in names]
        seconds = f"{float(cpu[part, 'plain']['value']):.2f}"
        table.append([label, seconds, *ratios, *["-"] * (3 - len(ratios))])
    yield "## Speed"
    yield fill(
        "RN50 at 416 pixels, compared with the baseline: the released implementation's forward "
        "pass, eager, float32, contiguous, one image and one sentence at a time. "
        f"{gpu}`scripts/gpu_acceptance.sh FOLDER` measures one."
    )
    yield "    python -m crislit.benchmark --rounds 10 --output outputs/speed"
    yield from (origin("`speed.csv`", list(cpu.values())), markdown(table, left=1))
    others = [
        [label, f"{factor * float(cpu[part, name]['value']):.{digits}f}"]
        for label, (part, name, factor, digits) in OTHER_SPEEDS.items()
    ]
    yield markdown([["other measurements", "value"], *others], left=1)


def untrusted_section() -> Iterator[str]:
    """Yield the section about untrusted input."""
    runs = {name: read_json(f"{name}.json") for name in ("fuzz", "fuzz_pickles")}
    table = [["file", "seed", "commit", "hardware", "inputs", "minutes", "crashes"]]
    for name, run in runs.items():
        facts = [str(run["seed"]), code(run["commit"][:7]), run["hardware"]]
        numbers = [f"{run['executions']:,}", str(run["seconds"] // 60), str(len(run["crashes"]))]
        table.append([code(f"{name}.json"), *facts, *numbers])
    page = read_json("page_load.json")
    yield "## Untrusted input"
    yield fill(
        "The readers of untrusted data sets and checkpoints, fuzzed from the files of "
        "`tests/io/hostile`; `scripts/fuzz_reader.py` says how to repeat it. A crash is any "
        "exception other than `InputError`, more than 10 seconds, or more than 2 GB."
    )
    yield markdown(table, left=4)
    yield fill(
        f"The web page answered {page['requests']} requests with {page['right_masks']} right masks "
        f"and {page['clear_refusals']} clear refusals in {page['seconds']:.0f} seconds; its memory "
        f"grew from {page['server_megabytes_before']} to {page['server_megabytes_after']} MB "
        "(`page_load.json`). [Security](security.md) lists what the tests show."
    )


def notes_section() -> Iterator[str]:
    """Yield the list of notes in ``results/``."""
    yield from ("## Notes", "`results/` also contains notes on how these numbers came about:")
    yield markdown([["file", "content"], *([code(k), x] for k, x in NOTES.items())], left=2)


def results_page() -> str:
    """Return all measured results."""
    sections: list[Callable[[], Iterator[str]]] = [
        *(run_sections, table1_sections, pretraining_section, fine_tuning_section),
        *(overfitting_section, rounding_section, kills_section, speed_section),
        *(untrusted_section, notes_section),
    ]
    blocks = [block for section in sections for block in section()]
    return join_blocks(["# Results", fill(RESULTS_INTRODUCTION.strip()), *blocks])


# -- Docstrings


def docstring_violations(source: Path, package: str = "crislit") -> list[str]:
    """List public names without a docstring, and functions whose docstring omits parameters.

    Public is what a package's ``__all__`` lists, and the public methods of its classes. A docstring
    mentions a parameter under ``Args:`` or in its text; it may omit one that is obvious, not two.

    Args:
        source: The folder of the package.
        package: The package, whose packages are checked, too.
    """
    root = griffe.load(package, search_paths=[str(source)], try_relative_path=False)
    packages = [root, *(x for x in root.modules.values() if x.is_init_module and x.exports)]
    found: list[str] = []
    for module in packages:
        for name in (x for x in map(str, module.exports or ()) if not x.startswith("__")):
            try:
                member = module[name]
                target = member.final_target if isinstance(member, griffe.Alias) else member
                found += object_violations(target)
            except (KeyError, griffe.AliasResolutionError):
                found.append(f"{module.path}.{name}: not found, define it alone in a statement")
    return list(dict.fromkeys(found))


def object_violations(item: griffe.Object) -> Iterator[str]:
    """Yield what is missing in the docstring of a name, and of its public methods."""
    if not item.docstring:
        yield f"{item.path}: no docstring"
        return
    text = item.docstring.value
    if isinstance(item, griffe.Class):
        constructor = item.members.get("__init__")
        if isinstance(constructor, griffe.Function):
            yield from parameter_violations(constructor, text)
        for name, method in item.members.items():
            if not name.startswith("_") and isinstance(method, griffe.Function):
                yield from object_violations(method)
    elif isinstance(item, griffe.Function):
        yield from parameter_violations(item, text)


def parameter_violations(function: griffe.Function, text: str) -> Iterator[str]:
    """Yield the parameters that a docstring does not mention, if there are at least two.

    Args:
        function: The function.
        text: The docstring of it or of its class.
    """
    names = [x.name.lstrip("*") for x in function.parameters if x.name not in ("self", "cls")]
    missing = [name for name in names if not name.startswith("_") and not mentions(text, name)]
    if len(missing) > 1:
        yield f"{function.path}: nothing about {', '.join(missing)}"


def mentions(text: str, name: str) -> bool:
    """Whether a text has a word of a parameter's name, in singular or plural."""
    words = (word.removesuffix("s") for word in name.split("_"))
    return any(re.search(rf"\b{word}", text, re.IGNORECASE) for word in words)


# -- Command


PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/configuration.md": lambda: configuration_page(ROOT / "conf"),
    "docs/reference/commands.md": commands_page,
    "docs/results.md": results_page,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare the pages")
    parser.add_argument("--docstrings", action="store_true", help="check the docstrings instead")
    options = parser.parse_args(arguments)
    with one_line_errors():
        if options.docstrings:
            violations = docstring_violations(ROOT / "src")
            print("".join(f"{line}\n" for line in violations), end="", flush=True)
            require(not violations, f"{counted(len(violations), 'docstring')} to complete")
            return
        pages = {name: build() for name, build in PAGES.items()}
        if options.check:
            check_pages(ROOT, pages)
            return
        for name, text in pages.items():
            write_text(ROOT / name, text)


def check_pages(root: Path, pages: Mapping[str, str]) -> None:
    """Compare pages with those on disk.

    Args:
        root: The folder of the repository.
        pages: The content of each page, by its path.

    Raises:
        InputError: If one of them differs.
    """
    old = [
        name
        for name, text in pages.items()
        if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != text
    ]
    if old:
        raise InputError(
            f"{', '.join(old)} is out of date: run `python scripts/reference_pages.py`"
        )


if __name__ == "__main__":
    main()
