"""Files damaged at random, loaded under a limit on memory: refused or read, never anything else.

A few hundred here; `python tests/storage/hostile.py SEED COUNT` does as many as wanted.
"""

import json
import subprocess
import sys
from pathlib import Path


def test_no_damage_escapes():
    script = Path(__file__).with_name("hostile.py")
    result = subprocess.run([sys.executable, script, "0", "400"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = json.loads(result.stdout)["outcomes"]
    assert sum(outcomes.values()) == 400
    assert all(outcomes[f"{word} {kind}"] > 0 for word in ("read", "refused") for kind in (".gguf", ".safetensors"))
