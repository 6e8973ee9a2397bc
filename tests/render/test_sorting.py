"""The order in which the tables of the page sort by a click, as the page's own script finds it."""

import json
import shutil
import subprocess
from importlib import resources

import pytest

NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="there is no node to run the script of the page")
@pytest.mark.parametrize(
    "rising",
    [
        ["0 B", "980.0 KiB", "1.2 MiB", "1.10 GiB"],
        ["< 0.001", "0.013", "0.905"],
        ["1e-05", "0.0001", "0.00333 (added)", "0.01", "3"],
        ["\u22120.5", "-0.135", "0.000 –", "+0.381", "1,536"],
        ["9 more records", "10 more seeds"],
    ],
)
def test_numbers_sort_by_value_whatever_stands_around_them(rising):
    script = resources.files("cora_cli.render.assets").joinpath("tables.js").read_text(encoding="utf-8")
    asked = f"console.log(JSON.stringify({json.dumps(rising)}.map(sortKey)))"
    page = f"globalThis.document = {{ querySelectorAll: () => [] }};\n{script}\n{asked}"
    found = subprocess.run([str(NODE), "-e", page], check=True, capture_output=True, text=True).stdout
    keys = json.loads(found)
    assert all(isinstance(key, int | float) for key in keys)
    assert keys == sorted(keys)
