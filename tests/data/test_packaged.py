from collections import Counter

import numpy as np
import pytest

from fedpilot.data import DataSettings, load
from fedpilot.data.packaged import bbc, vader


def test_vader_has_the_counted_rows_less_repeated_texts() -> None:
    columns = vader().train
    counts = Counter(zip(columns["domain"], columns["label"], strict=True))
    assert counts == {
        ("movie", "positive"): 4981,
        ("movie", "negative"): 5060,
        ("amazon", "positive"): 1719,
        ("amazon", "negative"): 1216,
        ("nyt", "positive"): 1088,
        ("nyt", "negative"): 1663,
        ("tweets", "positive"): 2300,
        ("tweets", "negative"): 1062,
    }
    assert len(set(columns["text"])) == 19_089
    first = columns["domain"].index("movie")  # type: ignore[union-attr]
    assert str(columns["text"][first]).startswith("The Rock is destined to be the 21st Century's new")
    assert columns["label"][first] == "positive"


def test_vader_keeps_its_domains_and_their_proportions() -> None:
    table = load(DataSettings("vader", test_fraction=0.2))
    assert table.label_names == ("negative", "positive")
    assert Counter(table.test.columns["domain"].tolist()) == {"movie": 2008, "tweets": 672, "amazon": 587, "nyt": 551}


def test_optdigits_comes_with_scikit_learn() -> None:
    table = load(DataSettings("optdigits", task="image-classification"))
    assert len(table.train) + len(table.test) == 1797
    assert table.label_names == tuple("0123456789")
    images = np.asarray(table.train.images)
    assert (images.dtype, images.shape[1:], images.max()) == (np.uint8, (8, 8), 255)


@pytest.mark.slow
def test_bbc_has_five_topics_with_headlines() -> None:
    columns = bbc().train
    assert Counter(columns["label"]) == {
        "business": 503,
        "entertainment": 369,
        "politics": 403,
        "sports": 505,
        "tech": 347,
    }
    assert columns["headline"][0] == "Ad sales boost Time Warner profit"
    assert "£15.8m" in "".join(map(str, columns["text"]))
    assert all(str(text).startswith(str(head)) for text, head in zip(columns["text"], columns["headline"], strict=True))


@pytest.mark.slow
def test_fashion_mnist_is_whole() -> None:
    table = load(DataSettings("fashion-mnist", task="image-classification"))
    assert np.bincount(table.train.labels).tolist() == [6000] * 10
    assert np.bincount(table.test.labels).tolist() == [1000] * 10
    assert table.label_names[9] == "ankle boot"
    # The published first training image is an ankle boot.
    assert table.train.labels[0] == 9
    assert np.asarray(table.train.images).shape == (60_000, 28, 28)
