"""BERTScore: equal to bert-score, whatever the batch, and encoders of every kind, or refused by name."""

import random
import shutil

import numpy as np
import pytest
import torch

from cora_cli import embedded
from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics import comparable_signature
from cora_cli.evaluation.metrics.bertscore import BertScore, recommended_layer

from .helpers import PREDICTIONS, REFERENCES, UNRELATED


@pytest.fixture(scope="module")
def tiny_roberta(tmp_path_factory):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    # "t5" in the path makes bert-score's own loader expect a T5 model.
    directory = tmp_path_factory.mktemp("t5") / "encoder"
    directory.mkdir()
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(["hello world the cat " * 9], vocab_size=300, min_frequency=1, special_tokens=special)
    tokenizer.save_model(str(directory))
    RobertaTokenizer.from_pretrained(str(directory)).save_pretrained(directory)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    RobertaModel(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def test_bertscore_equals_bert_score_one_pair_at_a_time(bertscore):
    from bert_score import BERTScorer

    scorer = BERTScorer(model_type=str(embedded.encoder_directory()), num_layers=6, device="cpu")
    found = bertscore.statistics(PREDICTIONS, REFERENCES)[:, 0]
    for score, prediction, reference in zip(found, PREDICTIONS, REFERENCES, strict=True):
        expected = scorer.score([prediction], [reference])[2].item() if prediction and reference else 0.0
        assert score == pytest.approx(expected, abs=1e-5)


def test_bertscore_does_not_depend_on_the_batch(bertscore):
    # Unrelated words have negative similarities, which are below the similarity 0 of padding.
    generator = random.Random(0)
    pairs = [[" ".join(generator.choices(UNRELATED, k=generator.randint(1, 4))) for _ in range(2)] for _ in range(20)]
    pairs.append(["word " * 60, "y " * 80])
    predictions, references = map(list, zip(*pairs, strict=True))
    together = bertscore.statistics(predictions, references)[:, 0]
    alone = [bertscore.statistics([prediction], [reference])[0, 0] for prediction, reference in pairs]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    backwards = bertscore.statistics(predictions[::-1], references[::-1])[::-1, 0]
    np.testing.assert_allclose(together, backwards, atol=1e-5)


def test_bertscore_truncates_texts_beyond_the_encoders_positions(bertscore):
    reference = "a sentence about words"
    long, cut = "word " * 20_000, "word " * 510  # 512 positions, two of them special
    scores = bertscore.statistics([long, cut, "word " * 509], [reference] * 3)[:, 0]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert abs(scores[1] - scores[2]) > 1e-6


def test_texts_without_a_token_score_zero_and_stay_in_the_mean(bertscore):
    scores = bertscore.statistics(["", " \n", "\u200b", "same", "same"], ["a", "a", "a", "", "same"])[:, 0]
    assert scores.tolist() == pytest.approx([0, 0, 0, 0, 1], abs=1e-5)
    assert "|empty:0|" in bertscore.signature()


def test_the_bertscore_signature_shows_encoder_layer_and_content(bertscore, tiny_roberta, tmp_path):
    embedded_signature = bertscore.signature()
    assert embedded_signature.startswith("bertscore_f1|encoder:builtin:all-MiniLM-L6-v2|layer:6|scale:NOT-roberta-large-L17|")
    own = [BertScore(str(tiny_roberta), layer=layer).signature() for layer in (2, 3)]
    assert own[0].startswith(f"bertscore_f1|encoder:{tiny_roberta}|layer:2|scale:NOT-roberta-large-L17|weights:sha256-")
    assert own[0] != own[1]
    moved = BertScore(str(shutil.copytree(tiny_roberta, tmp_path / "elsewhere")), layer=2).signature()
    assert moved != own[0]
    assert comparable_signature(moved) == comparable_signature(own[0]) != comparable_signature(own[1])
    weights = {part for text in (embedded_signature, own[0]) for part in text.split("|") if part.startswith("weights:")}
    assert len(weights) == 2


def test_a_roberta_encoder_gets_its_position_offset_prefix_space_and_float32(tiny_roberta):
    from bert_score import BERTScorer
    from transformers import AutoTokenizer, RobertaModel

    metric = BertScore(str(tiny_roberta), layer=2)
    predictions, references = ["hello the cat", "cat " * 50], ["world cat", "hello world"]
    found = metric.statistics(predictions, references)[:, 0]
    assert "|max-tokens:32|prefix-space:yes|" in metric.signature()

    # The same with bert-score's own scorer, given a model and tokenizer that it cannot load itself.
    scorer = BERTScorer.__new__(BERTScorer)
    scorer._model = RobertaModel.from_pretrained(tiny_roberta, dtype=torch.float32, num_hidden_layers=2).eval()
    scorer._tokenizer = AutoTokenizer.from_pretrained(tiny_roberta, add_prefix_space=True, model_max_length=32)
    scorer._idf, scorer.device, scorer.all_layers, scorer._rescale_with_baseline = False, "cpu", False, False
    expected = [scorer.score([p], [r])[2].item() for p, r in zip(predictions, references, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_layer_comes_from_the_encoders_name():
    assert recommended_layer("roberta-large") == 17
    assert recommended_layer("FacebookAI/roberta-large@main") == 17
    assert recommended_layer("microsoft/deberta-v3-base") == 9
    with pytest.raises(CoraError, match="set --bertscore-layer"):
        recommended_layer("org/unheard-of")


def test_an_encoder_without_that_many_layers_is_refused(tiny_roberta):
    with pytest.raises(CoraError, match="has 3 layers, so layer 4"):
        BertScore(str(tiny_roberta), layer=4).signature()


def test_an_encoder_that_lacks_weights_is_refused(tiny_roberta, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in tiny_roberta.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CoraError, match=r"lacks 1 weights .* encoder.layer.0.output.dense.weight"):
        BertScore(str(tmp_path), layer=2).signature()


def test_an_encoder_of_t5_needs_no_decoder(tiny_roberta, tmp_path):
    from transformers import T5Config, T5EncoderModel, T5Model

    directory = tmp_path / "t5"
    directory.mkdir()
    for file in tiny_roberta.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            (directory / file.name).write_bytes(file.read_bytes())
    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=3, num_heads=2, pad_token_id=1)
    complete = T5Model(config)
    values = []
    for stored in (complete, T5EncoderModel(config)):
        stored.load_state_dict(complete.state_dict(), strict=False)
        stored.save_pretrained(directory)
        values.append(BertScore(str(directory), layer=2).statistics(["the cat"], ["hello world"]))
    assert values[0].tolist() == values[1].tolist()


@pytest.fixture
def bert(tmp_path):
    """A function that makes an encoder with a tokenizer of 300 bytes and special tokens, changed in place."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    def made(rows=300, change=lambda model: None, **special):
        vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **special).save_pretrained(tmp_path)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        model = BertModel(BertConfig(vocab_size=rows, max_position_embeddings=32, **sizes))
        change(model)
        model.save_pretrained(tmp_path)
        return BertScore(str(tmp_path), layer=1)

    return made


@pytest.mark.parametrize("special", [{}, {"pad_token": "<pad>"}], ids=["without", "beyond the embedding"])
def test_the_padding_token_of_an_encoder_does_not_matter(bert, special):
    texts = ["a", "longer words", "two"], ["b", "c d e f g h", "three"]
    metric = bert(rows=256, **special)
    alone = [metric.statistics([one], [other])[0] for one, other in zip(*texts, strict=True)]
    np.testing.assert_allclose(metric.statistics(*texts), alone, atol=1e-6)


def test_a_token_without_a_row_in_the_encoders_embedding_is_refused_by_name(bert):
    with pytest.raises(
        CoraError, match=r"encoder \S+: the token 'z' has the id 89, but the model's embedding has only 80 rows"
    ):
        bert(rows=80).statistics(["z"], ["A"])


def test_an_encoder_whose_weights_are_not_finite_is_refused_by_name(bert):
    damaged = bert(change=lambda model: model.encoder.layer[0].attention.self.query.weight.data.fill_(torch.nan))
    with pytest.raises(
        CoraError, match=r"encoder \S+: encoder\.layer\.0\.attention\.self\.query\.weight holds values that are not finite"
    ):
        damaged.statistics(["a b"], ["a c"])


def test_a_model_that_bert_score_does_not_support_is_refused_by_its_type(bert, tmp_path):
    from transformers import GPT2Config, GPT2Model

    metric = bert()
    GPT2Model(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=32)).save_pretrained(tmp_path)
    with pytest.raises(
        CoraError, match=r"encoder \S+ is a gpt2 model, which bert-score does not support; use an encoder such as"
    ):
        metric.statistics(["a"], ["b"])
