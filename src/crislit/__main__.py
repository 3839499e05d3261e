"""crislit COMMAND ...: runs a command, as python -m crislit.COMMAND ... does."""

import difflib
import runpy
import sys
from pathlib import Path

COMMANDS = {
    "train": "train a network and evaluate every split",
    "evaluate": "evaluate a trained network",
    "predict": "segment what sentences refer to in images",
    "demo": "serve a web page that does the same",
    "convert": "convert checkpoints of the authors' code or of runs",
    "export": "export a network to ONNX",
    "check_data": "check custom data, summarize and draw it",
    "report": "tables and plots of measured runs",
    "figures": "figures 4 and 5 of the paper, attention to words, thresholds",
    "benchmark": "measure parameters, speed and memory",
}


def main() -> None:
    """Run the command that the first argument names; without one, list all."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, n=1)
        guess = f"did you mean {similar[0]}?" if similar else f"choose from {', '.join(COMMANDS)}"
        raise SystemExit(f"error: crislit has no command {name!r}: {guess}")
    sys.argv[1:] = arguments
    if not sys.flags.safe_path:
        sys.path.append(str(Path.cwd()))  # classes that a configuration names, as with `python -m`
    # As the main module, so that the processes of a run on several devices start the same command.
    runpy.run_module(f"crislit.{name}", run_name="__main__", alter_sys=True)


def overview() -> str:
    """Return the list of commands."""
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    example = 'example: crislit predict src/crislit/assets/examples/places.jpg "red disc"'
    ending = "crislit COMMAND --help explains a command. python -m crislit.COMMAND is the same."
    return "\n".join([example, "", "commands:", *lines, "", ending])


if __name__ == "__main__":
    main()
