"""Sharing a network as a folder, with a model card, and through a fake Hub."""

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import crislit
from crislit import convert
from crislit.checkpoints.checkpoint import Checkpoint, read_checkpoint, strip_folders, without_paths
from crislit.checkpoints.clip_weights import identify_weights
from crislit.errors import InputError
from crislit.inference.model_card import model_card
from crislit.inference.segmenter import Segmenter
from crislit.io.assets import shipped_weights
from crislit.models.build import build_cris
from tests.inference.test_segmenter import TINY
from tests.io.test_images import photo
from tests.runs import environment, run


@pytest.fixture(scope="module")
def trained(small_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    overrides = [f"data_root={small_shapes}", "batch_size=8", "image_size=64", "seed=3"]
    overrides += ["trainer.max_epochs=1", "model.clip_weights=null"]
    with pytest.MonkeyPatch.context() as patch:
        run(patch, folder, *overrides)
    return folder / "checkpoints/best.ckpt"


def test_a_shared_folder_holds_the_same_network_and_its_training(
    trained: Path, tmp_path: Path
) -> None:
    segmenter = crislit.load(trained, device="cpu")
    segmenter.save_pretrained(tmp_path / "net")
    names = sorted(path.name for path in (tmp_path / "net").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    again = Segmenter.from_pretrained(tmp_path / "net", device="cpu")
    assert isinstance(segmenter.model, crislit.CRIS)
    assert isinstance(again.model, crislit.CRIS)
    for name, value in segmenter.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    (result,), (expected,) = again(photo(), "star"), segmenter(photo(), "star")
    assert np.array_equal(result.probability, expected.probability)
    results = json.loads((trained.parents[1] / "results.json").read_text())
    assert again.about is not None
    assert again.about.results["splits"] == results["splits"]
    assert (again.about.steps, again.about.initial_weights) == (results["steps"], "random")
    again.save_pretrained(tmp_path / "copy", name="net")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "net" / name).read_bytes()


def test_a_shared_folder_names_no_path_of_this_machine(
    trained: Path, small_shapes: Path, tmp_path: Path
) -> None:
    crislit.load(trained, device="cpu").save_pretrained(tmp_path / "net")
    convert.main([str(trained), str(tmp_path / "converted")])
    files = ("net/config.json", "net/README.md", "converted/config.json")
    written = "".join((tmp_path / name).read_text() for name in files)
    assert str(small_shapes) not in written
    assert str(trained.parents[1]) not in written


def test_paths_of_custom_data_and_weights_are_reduced_to_file_names() -> None:
    config = {
        "data_root": "/home/me/data",
        "model": {"clip_weights": "/home/me/RN50.pt", "clip": "RN50-quickgelu"},
        "dataset": {
            "name": "custom",
            "file": "/home/me/a/mine.jsonl",
            "sentences": None,
            "images": "C:\\Users\\me\\photos",
        },
    }
    assert without_paths(config) == {
        "model": {"clip_weights": "RN50.pt", "clip": "RN50-quickgelu"},
        "dataset": {"name": "custom", "file": "mine.jsonl", "sentences": None, "images": "photos"},
    }
    assert strip_folders("/home/me/RN50.pt (sha256 0123)") == "RN50.pt (sha256 0123)"
    assert strip_folders("random") == "random"


def test_a_shared_folder_can_be_evaluated(
    trained: Path, small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crislit.load(trained, device="cpu").save_pretrained(tmp_path / "net")
    overrides = [f"checkpoint={tmp_path / 'net'}", f"data_root={small_shapes}"]
    overrides += ["split=val"]
    results = run(monkeypatch, tmp_path / "eval", *overrides, program="evaluate")
    expected = json.loads((trained.parents[1] / "results.json").read_text())["splits"]["val"]
    assert results["splits"]["val"]["mIoU"] == pytest.approx(expected["mIoU"], abs=1e-6)


def test_a_card_needs_the_complete_configuration(trained: Path) -> None:
    checkpoint = replace(read_checkpoint(trained), config={"seed": 3})
    message = "does not describe its training well enough .*: there is no dataset.name"
    with pytest.raises(InputError, match=message):
        model_card(checkpoint, "someone/net")


def test_the_card_lists_metrics_data_recipe_license_and_limits(trained: Path) -> None:
    checkpoint = read_checkpoint(trained)
    card = model_card(checkpoint, "someone/net")
    header, body = card.split("---\n", 2)[1:]
    assert "license: mit" in header
    results = json.loads((trained.parents[1] / "results.json").read_text())
    for split, values in results["splits"].items():
        (line,) = [line for line in body.splitlines() if line.startswith(f"| {split} |")]
        assert f"| {100 * values['mIoU']:.2f} |" in line
        assert f"| {100 * values['Pr@50']:.2f} |" in line
    training = ("`shapes`", "seed 3", "64 pixels", "Adam, ", " epochs, ", "encoders from: random")
    for words in (*training, "## Limits", "nothing about photos"):
        assert words in body, words
    assert 'from_pretrained("someone/net")' in body


def test_the_card_of_a_network_without_results_says_so(tmp_path: Path) -> None:
    model = build_cris(TINY)
    card = model_card(Checkpoint(model.config, {}, 64, 0.35, "random"), "net")
    assert "No results are stored" in card
    Segmenter(model, image_size=64, device="cpu").save_pretrained(tmp_path / "net")
    assert "No results are stored" in (tmp_path / "net/README.md").read_text()


def test_a_card_grants_and_claims_only_what_is_known(trained: Path) -> None:
    trained_on_shapes = read_checkpoint(trained)
    refcoco = {"name": "refcoco", "folder": "refcoco", "embedded": False}
    custom = {"name": "custom", "file": "mine.jsonl", "embedded": False}
    cases = {
        "crowd workers": {"dataset": refcoco},
        "Its training data is unknown": {"dataset": custom},
        "beyond what this card says": {},
    }
    for words, changes in cases.items():
        config = trained_on_shapes.config | changes
        unevaluated = replace(trained_on_shapes, config=config if changes else {}, results={})
        card = model_card(unevaluated, "net")
        assert words in card
        assert "license:" not in card
        assert "No license is given" in card
        assert 'from_pretrained("path/to/net")' in card
        assert ("exactly one object" in card) == (words == "crowd workers")
        licensed = model_card(replace(trained_on_shapes, config=config), "net", "cc-by-4.0")
        assert "license: cc-by-4.0" in licensed


@pytest.mark.parametrize(("count", "ending"), [(1, ""), (2, "s")])
def test_a_card_counts_in_the_singular_and_the_plural(
    count: int, ending: str, trained: Path
) -> None:
    checkpoint = read_checkpoint(trained)
    recipe = checkpoint.config["recipe"] | {"epochs": count}
    config = checkpoint.config | {"batch_size": count, "recipe": recipe}
    card = model_card(replace(checkpoint, config=config, steps=count), "net")
    for line in ("optimizer step{}\n", "sentence{} per step, ", "epoch{}, "):
        assert f"{count} {line.format(ending)}" in card


@pytest.mark.parametrize(
    "source", ["openai (sha256 1)", "RN50.pt (sha256 1)", "tiny-clip (sha256 1)", "unknown"]
)
def test_a_card_grants_no_license_for_initial_weights_of_others(source: str, trained: Path) -> None:
    checkpoint = replace(read_checkpoint(trained), initial_weights=source)
    assert "license:" not in model_card(checkpoint, "net")


def test_a_card_grants_a_license_for_our_own_weights(trained: Path) -> None:
    shipped = read_checkpoint(Path("shapes-tiny")).initial_weights
    tiny_clip = identify_weights("tiny-clip", shipped_weights()["tiny-clip"])
    for source in ("random", tiny_clip, shipped):
        checkpoint = replace(read_checkpoint(trained), initial_weights=source)
        assert "license: mit" in model_card(checkpoint, "net")


def test_an_unreachable_hub_is_one_line(trained: Path, tmp_path: Path) -> None:
    code = f"""
import crislit
from crislit.errors import InputError
push_to_hub = crislit.load({str(trained)!r}, device="cpu").push_to_hub
for transfer in (push_to_hub, crislit.Segmenter.from_pretrained):
    try:
        transfer("someone/net")
    except InputError as error:
        print(error)
"""
    done = python(code, "http://127.0.0.1:9", tmp_path / "home")
    first, second = done.stdout.splitlines()
    assert first.startswith("cannot publish someone/net: ")
    assert second.startswith("no network at someone/net: ")


def test_results_of_another_checkpoint_are_ignored(trained: Path) -> None:
    assert read_checkpoint(trained).results
    assert not read_checkpoint(trained.with_name("last.ckpt")).results


def test_no_file_is_overwritten(trained: Path, tmp_path: Path) -> None:
    segmenter = crislit.load(trained, device="cpu")
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"README\.md exists and is never overwritten"):
        segmenter.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_source_that_is_neither_a_folder_nor_a_repository_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="not a folder here, and the Hub did not provide it"):
        Segmenter.from_pretrained("someone/nothing")
    with pytest.raises(InputError, match="no network 'nothing'"):
        Segmenter.from_pretrained("nothing")


# -- The Hub


class Hub(BaseHTTPRequestHandler):
    """A minimal Hub: creates a repository, commits files to it and serves them."""

    files: dict[str, bytes]
    requests: list[str]

    def answer(self, content: Any, headers: dict[str, str] | None = None, code: int = 200) -> None:
        body = json.dumps(content).encode() if isinstance(content, (dict, list)) else content
        self.send_response(code)
        sent = {"Content-Length": str(len(body)), "X-Repo-Commit": "c" * 40, **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        repository = f"http://{self.headers['Host']}/someone/net"
        self.requests.append(self.path)
        if self.headers.get("Authorization") != "Bearer secret":
            self.answer({"error": "who are you?"}, code=401)
        elif self.path == "/api/repos/create":
            self.answer({"url": repository, "name": "someone/net"})
        elif "/preupload/" in self.path:
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": file["path"], **mode} for file in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitUrl": f"{repository}/commit/{'c' * 40}", "commitOid": "c" * 40}
            self.answer(commit | {"success": True})
        else:
            self.answer({})

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        if "/resolve/" in self.path and name in self.files:
            self.answer(self.files[name], {"ETag": f'"{name}"'})
        elif "/tree/" in self.path:
            sizes = {name: len(content) for name, content in self.files.items()}
            entries = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()]
            self.answer(entries)
        elif self.path.startswith("/api/models/"):
            self.answer({"id": "someone/net", "sha": "c" * 40, "siblings": []})
        else:
            self.answer({"error": "no such entry"}, {"X-Error-Code": "EntryNotFound"}, code=404)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("OwnHub", (Hub,), {"files": {}, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def python(code: str, hub: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose Hub is our server."""
    variables = [("HF_ENDPOINT", hub), ("HF_HUB_OFFLINE", "0"), ("HF_HOME", str(home))]
    variables += [("HF_HUB_DISABLE_XET", "1"), ("HF_HUB_DISABLE_TELEMETRY", "1")]
    variables += [("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1")]
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment(variables), capture_output=True, text=True, check=False
    )


def test_a_network_is_uploaded_and_downloaded(
    trained: Path, hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    address, handler = hub
    code = f"""
import crislit
print(crislit.load({str(trained)!r}, device="cpu").push_to_hub("someone/net", token="secret"))
segmenter = crislit.Segmenter.from_pretrained("someone/net", device="cpu")
total = sum(float(value.double().sum()) for value in segmenter.model.state_dict().values())
print(segmenter.about.initial_weights, segmenter.about.steps, total)
"""
    done = python(code, address, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert set(handler.files) == {"README.md", "config.json", "model.safetensors"}
    assert b"# someone/net" in handler.files["README.md"]
    checkpoint = read_checkpoint(trained)
    total = sum(float(value.double().sum()) for value in checkpoint.weights.values())
    url, initial_weights, steps, downloaded_total = done.stdout.split()
    assert url == f"{address}/someone/net"
    assert (initial_weights, steps) == ("random", str(checkpoint.steps))
    assert float(downloaded_total) == pytest.approx(total)


def test_missing_write_access_is_one_line(
    trained: Path, hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    code = f"""
import crislit
from crislit.errors import InputError
try:
    crislit.load({str(trained)!r}, device="cpu").push_to_hub("someone/net", token="wrong")
except InputError as error:
    print(error)
"""
    done = python(code, hub[0], tmp_path / "home")
    assert done.stdout.startswith("cannot publish someone/net: "), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    assert "hf auth login" in done.stdout
    assert hub[1].files == {}
