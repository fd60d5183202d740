"""Every language in the table comes through `prepare` whole: tokens for its characters, its marks, its sentences."""

import itertools
import random
import string
import unicodedata

import pytest
from languages import LANGUAGES
from tokenizers import Tokenizer

from fusebert.train.corpus.prepare import prepare
from fusebert.train.corpus.settings import PrepareSettings

pytestmark = pytest.mark.filterwarnings("ignore:the text repeats too little")


def documents(language, count=24):
    """Documents of one to three sentences, all different."""
    orders = [order for n in (3, 2, 1) for order in itertools.permutations(language.sentences, n)]
    return [language.joined_by.join(orders[i % len(orders)]) for i in range(count)]


def prepared(tmp_path, texts, **options):
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return prepare(PrepareSettings(tmp_path / "out", [str(tmp_path / "a.txt")], workers=1, **options))


def all_ids(corpus):
    return [
        shard.tokens[a:b].tolist()
        for name in ("train", "heldout")
        for shard in corpus.split(name).shards
        for a, b in itertools.pairwise(shard.sentences)
    ]


def unknown_share(corpus):
    ids = [i for sentence in all_ids(corpus) for i in sentence]
    return ids.count(corpus.special.unk) / len(ids)


def letters(text):
    return "".join(text.split())


def normalised(text, source):
    """What the corpus should hold of ``text``, given the recorded decisions."""
    text = text.lower() if source["lowercase"] else text
    if source["accents"] == "strip":
        text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def test_the_table_is_wide_enough():
    assert len(LANGUAGES) >= 25
    assert len({language.script for language in LANGUAGES}) >= 15


@pytest.mark.parametrize("vocab_type", ["wordpiece", "bpe", "unigram"])
@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
def test_a_language_comes_through_whole(tmp_path, language, vocab_type):
    texts = documents(language)
    corpus = prepared(tmp_path, texts, vocab_type=vocab_type)
    source = corpus.manifest["source"]
    assert unknown_share(corpus) <= 0.001
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_path))
    found = [letters(sentence) for sentence in tokenizer.decode_batch(all_ids(corpus))]
    wanted = [letters(normalised(each, source)) for text in texts for each in language.sentences if each in text]
    assert sorted(found) == sorted(wanted)
    if language.script not in ("Latin", "Greek", "Hebrew"):
        stripped, kept = (normalised("".join(texts), {**source, "accents": each}) for each in ("strip", "keep"))
        assert source["accents"] == "keep" or stripped == kept


def test_all_languages_in_one_corpus(tmp_path):
    corpus = prepared(tmp_path, [text for language in LANGUAGES for text in documents(language)])
    assert unknown_share(corpus) <= 0.001


def test_thousands_of_ideographs(tmp_path):
    """As the characters of real text are distributed: the k-th has frequency 1 / k."""
    rng = random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(5000)]
    weights = [1 / (k + 1) for k in range(5000)]
    texts = ["".join(rng.choices(characters, weights, k=200)) + "。" for _ in range(500)]
    corpus = prepared(tmp_path, texts)
    assert unknown_share(corpus) < 0.001
    assert corpus.vocab_size > 4000


@pytest.mark.parametrize("alphabet", ["ACGT", string.ascii_letters + string.digits + "+/"], ids=["DNA", "base64"])
def test_unbroken_runs(tmp_path, alphabet):
    rng = random.Random(0)
    corpus = prepared(tmp_path, ["".join(rng.choices(alphabet, k=rng.randint(101, 3000))) for _ in range(60)])
    assert unknown_share(corpus) == 0
    assert corpus.manifest["source"]["lowercase"]


def test_the_learner_sees_the_words_that_the_encoder_sees(tmp_path):
    """Thai without spaces: common words become tokens, though every run is longer than 100 characters."""
    rng = random.Random(0)
    words = ["แม่น้ำ", "กว้าง", "เรือ", "บ้าน", "ทุกวัน", "เรา", "ข้าม", "ตลาด"]
    corpus = prepared(tmp_path, ["".join(rng.choices(words, k=60)) for _ in range(100)], vocab_size=300)
    assert unknown_share(corpus) == 0
    ids = all_ids(corpus)
    text = sum(len("".join(words)) / len(words) * 60 for _ in ids)
    assert sum(map(len, ids)) < text / 4


def test_marks_are_kept_or_stripped_as_told(tmp_path):
    texts = [f"The café on the corner has number {i} and a terrace." for i in range(30)]
    for accents, lowercase, there in (("auto", None, False), ("keep", None, True), ("strip", False, False)):
        options = {"accents": accents, "lowercase": lowercase, "overwrite": True}
        corpus = prepared(tmp_path, texts, vocab_size=200, **options)
        vocab = Tokenizer.from_file(str(corpus.tokenizer_path)).get_vocab()
        assert any("é" in token for token in vocab) is there
        assert corpus.manifest["source"]["accents"] == ("keep" if there else "strip")
        assert corpus.manifest["source"]["lowercase"] is (lowercase is not False)


def test_the_exported_tokenizer_keeps_marks(tmp_path):
    transformers = pytest.importorskip("transformers")
    from fusebert.model import BertConfig
    from fusebert.model.hf.tokenizer_files import tokenizer_files

    hindi = next(language for language in LANGUAGES if language.name == "Hindi")
    corpus = prepared(tmp_path, documents(hindi))
    config = BertConfig.preset("tiny", corpus.vocab_size)
    (tmp_path / "hf").mkdir()
    for name, content in tokenizer_files(corpus.tokenizer_path, config).items():
        (tmp_path / "hf" / name).write_bytes(content)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert type(loaded).__name__.startswith("BertTokenizer")
    text = hindi.sentences[1]
    ids = loaded(text)["input_ids"]
    assert (ids[0], ids[-1]) == (corpus.special.cls, corpus.special.sep)
    assert loaded.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")
