"""The environment of the tests on a GPU, which cuBLAS reads when it is first used."""

import os

# Without it, cuBLAS refuses trainer.deterministic=true.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
