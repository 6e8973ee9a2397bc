import dataclasses

import pytest
import torch

from cora_cli.basis.choices import BasisChoices
from cora_cli.extraction.extract import extract_basis
from cora_cli.models.references import resolve_model
from cora_cli.reporting.plots import draw_variance
from cora_cli.reporting.variance import read_spectra


@pytest.fixture
def extract(square_models, tmp_path):
    def make(name, models=(0, 1), **choices):
        path = tmp_path / f"{name}.safetensors"
        sources = [resolve_model(str(square_models[model])) for model in models]
        extract_basis(sources, path, BasisChoices(rank=4, **choices), None, torch.device("cpu"))
        return path

    return make


def labels(*paths):
    return sorted({spectrum.label for spectrum in read_spectra(dict.fromkeys(paths))[0]})


def test_bases_that_were_extracted_otherwise_have_curves_of_their_own(extract):
    mean, gram, shared = extract("mean"), extract("gram", merge="gram"), extract("shared", share="projection")
    assert labels(mean) == ["svd, n=2"]
    assert labels(mean, gram) == ["svd, n=2, merge gram", "svd, n=2, merge mean"]
    assert labels(mean, shared) == ["svd, n=2, share module", "svd, n=2, share projection"]


def test_the_figure_says_that_a_line_is_of_several_bases(extract):
    spectra, _ = read_spectra(dict.fromkeys([extract("one"), extract("other", models=(1, 2))]))
    assert {spectrum.bases for spectrum in spectra} == {2}
    assert "which differ in their models alone: svd, n=2: 2." in draw_variance(spectra, "").caption
    assert "alone" not in draw_variance([dataclasses.replace(each, bases=1) for each in spectra], "").caption


def test_every_kind_of_layer_has_a_panel_or_is_counted_as_left_out(extract):
    spectra, _ = read_spectra({extract("one"): None})
    seven, many = ([dataclasses.replace(spectra[0], kind=f"kind{number}") for number in range(count)] for count in (7, 20))
    caption = draw_variance(seven, "").caption
    assert "kind6: " in caption
    assert "Not shown" not in caption
    assert "Not shown: 8 more kinds." in draw_variance(many, "").caption


def test_a_file_that_holds_another_basis_than_the_one_that_was_trained_with_has_no_curve(extract):
    path = extract("basis")
    spectra, (said,) = read_spectra({path: 2}, {path: {"0" * 64}})
    assert not spectra
    assert said.startswith(f"{path} holds another basis by now")
