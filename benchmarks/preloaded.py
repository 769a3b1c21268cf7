"""What every start has behind it: all imports, and one model loaded, which fills the libraries' caches.

The process that starts are forked from imports this module.
"""

import tempfile
from importlib import import_module
from pathlib import Path

from components.models import load_policy
from tiny_models import make_policy, make_tokenizer, silence

STEPS = ("sft", "reward", "rl")
IMPORTED_LATE = ("deepspeed", "mlflow", "peft", "pyarrow.parquet")

silence()
for name in ("components.launch", *(f"components.{step}.step" for step in STEPS), *IMPORTED_LATE):
    import_module(name)
with tempfile.TemporaryDirectory() as scratch:
    load_policy(make_policy(Path(scratch) / "policy", make_tokenizer()))
