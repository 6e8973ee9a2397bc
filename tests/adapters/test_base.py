import shutil

import pytest

from cora_cli import writing
from cora_cli.adapters.base import say_different_bases
from cora_cli.models.references import resolve_model
from cora_cli.reading import read_json


@pytest.mark.parametrize("apart", [False, True])
def test_adapters_of_different_base_models_are_compared_with_a_word(tiny_sources, tmp_path, capsys, apart):
    other = shutil.copytree(tiny_sources[1], tmp_path / "other")
    if apart:
        path = other / "cora.json"
        writing.write_json(path, read_json(path) | {"base": "elsewhere", "base_sha256": "0" * 64})
    say_different_bases([resolve_model(tiny_sources[0]), resolve_model(str(other))])
    assert (f"{other} on elsewhere, which have other weights" in capsys.readouterr().err) == apart
