"""python -m crislit.demo: a web page that segments what sentences refer to in an image."""

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from crislit.errors import InputError, one_line_errors, require, see
from crislit.inference import add_trust, command_parser

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
EPILOG = """
shapes-tiny, the default network, knows drawn shapes only. For photos, train a network on photos
(python -m crislit.train), and give its checkpoint.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the page until interrupted."""
    parser = command_parser("demo", "", __doc__, EPILOG)
    add = parser.add_argument
    add("--checkpoint", default="shapes-tiny", help="network (default: the shipped shapes-tiny)")
    add("--host", default="127.0.0.1", help="address (default: this machine only; 0.0.0.0: all)")
    add("--port", type=int, help="port (default: the first free one from 7860)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    add_trust(parser)
    options = parser.parse_args(arguments)
    with one_line_errors():
        require(
            options.port is None or 0 < options.port < 65536,
            f"--port must be between 1 and 65535, got {options.port}",
        )
        # Imported here, because it takes seconds and the help does not need it.
        from crislit.inference import build_page, describe_network, load

        segmenter = load(options.checkpoint, device=options.device, trust=options.trust)
        # Uploads are stored in this folder, which is deleted at exit, also after SIGTERM.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        folder = tempfile.TemporaryDirectory(prefix="crislit-")
        os.environ["GRADIO_TEMP_DIR"] = folder.name
        description = describe_network(segmenter, options.checkpoint)
        page = build_page(segmenter, description)
        address = launch(page, options.host, options.port)
        print(f"network: {description}", file=sys.stderr)
        print(f"the page is at {address} until Ctrl-C", flush=True)
        page.block_thread()


def launch(page: Any, host: str, port: int | None) -> str:
    """Serve the page in another thread, and return its address.

    Args:
        page: A ``gradio.Blocks``.
        host: The address to serve at.
        port: The port; None for the first free one.

    Raises:
        InputError: If it cannot be served there.
    """
    from crislit.inference import MAX_UPLOAD_BYTES, STYLE, RequestFilter
    from crislit.io import EXAMPLES

    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            max_file_size=MAX_UPLOAD_BYTES,
            allowed_paths=[str(EXAMPLES)],  # Gradio allows those of the working directory
            app_kwargs={"middleware": [(RequestFilter, (), {})]},
            share=False,
            ssr_mode=False,
            footer_links=[],
            css=STYLE,
            quiet=True,
            prevent_thread_lock=True,
        )
    except Exception as error:  # Gradio requests its own page, and lets any exception through
        hint = (
            "; set NO_PROXY=localhost,127.0.0.1 to bypass the proxy"
            if any(map(os.environ.get, PROXIES))
            else ""
        )
        raise InputError(f"cannot serve at {host}: {error}{hint}{see('port')}") from error
    return str(address)


if __name__ == "__main__":
    main()
