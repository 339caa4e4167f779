import contextlib
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpilot import assets
from fedpilot.assets import archives, conversion, downloads, gguf_files, onnx_files, store
from fedpilot.assets.registry import ASSETS, Asset
from fedpilot.errors import AssetError

MEMBERS = {"toy/model/config.json": b"{}", "toy/model/deep/vocab.txt": b"a\nb\n", "toy/code.py": b"1 / 0"}


def wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def sdist(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def debian(members: dict[str, bytes]) -> bytes:
    """An ar archive whose first member has an odd size, so that the padding is met."""
    raw = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.gz", sdist(members))):
        raw += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        raw += b"\n" * (len(content) % 2)
    return raw


CONTENT = wheel(MEMBERS)


def toy_asset(content: bytes = CONTENT, **changes: object) -> Asset:
    facts: dict[str, object] = {
        "kind": "model",
        "what": "a toy",
        "licence": "none",
        "channel": "wheel",
        "package": "toy",
        "version": "1.0",
        "file": "toy-1.0-py3-none-any.whl",
        "sha256": hashlib.sha256(content).hexdigest(),
        "wanted": {"toy/model/": ""},
    }
    return Asset(**(facts | changes))  # type: ignore[arg-type]


class Registry:
    """Stands for the package registry; counts what is asked of it."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.asked = 0

    def download(self, asset: Asset, directory: Path) -> Path:
        self.asked += 1
        path = directory / asset.file
        path.write_bytes(self.content)
        return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """An empty cache and a registry that serves the asset ``toy``."""
    monkeypatch.setenv("FEDPILOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ASSETS, "toy", toy_asset())
    registry = Registry(CONTENT)
    monkeypatch.setattr(downloads, "download", registry.download)
    return registry


def test_a_second_call_downloads_nothing(registry: Registry) -> None:
    first = assets.folder("toy")
    second = assets.folder("toy")
    assert first == second
    assert assets.fetch("toy").read_bytes() == CONTENT
    assert registry.asked == 1


def test_only_the_wanted_members_are_unpacked(registry: Registry) -> None:
    path = assets.folder("toy")
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert found == {"config.json", "deep/vocab.txt", store.MANIFEST}


def test_nothing_but_the_asset_is_left_in_the_cache(registry: Registry) -> None:
    assets.folder("toy")
    assert {entry.name for entry in assets.cache_folder().iterdir()} == {"toy", "packages"}


def test_a_download_with_another_hash_is_refused_with_both_hashes_and_a_remedy(registry: Registry) -> None:
    registry.content = b"something else"
    with pytest.raises(AssetError) as caught:
        assets.fetch("toy")
    message = str(caught.value)
    assert hashlib.sha256(CONTENT).hexdigest() in message
    assert hashlib.sha256(b"something else").hexdigest() in message
    assert "delete" in message
    assert not (assets.cache_folder() / "packages" / "toy-1.0-py3-none-any.whl").exists()


def test_a_package_that_was_changed_in_the_cache_is_refused(registry: Registry) -> None:
    path = assets.fetch("toy")
    path.write_bytes(CONTENT + b"!")
    with pytest.raises(AssetError, match="must have SHA-256"):
        assets.fetch("toy")


def test_a_package_that_somebody_put_into_the_cache_is_verified_before_its_first_use(registry: Registry) -> None:
    packages = assets.cache_folder() / "packages"
    packages.mkdir()
    (packages / "toy-1.0-py3-none-any.whl").write_bytes(b"broken")
    with pytest.raises(AssetError, match="must have SHA-256"):
        assets.folder("toy")
    assert registry.asked == 0


def test_an_unpacked_file_that_was_changed_or_removed_is_refused(registry: Registry) -> None:
    path = assets.folder("toy")
    (path / "config.json").write_text('{"evil": 1}')
    with pytest.raises(AssetError, match=r"config\.json must have SHA-256.*delete"):
        assets.folder("toy")
    (path / "config.json").unlink()
    with pytest.raises(AssetError, match="no such file"):
        assets.folder("toy")


def test_a_touched_file_with_the_same_content_is_accepted(registry: Registry) -> None:
    path = assets.folder("toy")
    for file in (path / "config.json", assets.fetch("toy")):
        os.utime(file, (1.0, 1.0))
    assert assets.folder("toy") == path
    assert assets.fetch("toy").read_bytes() == CONTENT


def test_hashing_is_remembered(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    assets.folder("toy")
    assets.fetch("toy")

    def refuse(*_: object) -> None:
        raise AssertionError("hashed again")

    monkeypatch.setattr(hashlib, "file_digest", refuse)
    assets.folder("toy")
    assets.fetch("toy")


def test_a_folder_of_an_older_pin_is_made_anew(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    assets.folder("toy")
    newer = wheel({"toy/model/config.json": b'{"newer": true}'})
    monkeypatch.setitem(ASSETS, "toy", toy_asset(newer, file="toy-1.1-py3-none-any.whl"))
    registry.content = newer
    path = assets.folder("toy")
    assert (path / "config.json").read_bytes() == b'{"newer": true}'
    assert not (path / "deep").exists()


def test_a_folder_with_an_unreadable_manifest_is_made_anew(registry: Registry) -> None:
    path = assets.folder("toy")
    (path / store.MANIFEST).write_text('{"source": "", "files": {"config.json": {"other": 1}}}')
    assert assets.folder("toy") == path
    assert json.loads((path / store.MANIFEST).read_text())["source"] == ASSETS["toy"].source


def test_whoever_loses_the_race_takes_the_winners_folder(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = archives.unpack

    def slow_unpack(package: Path, wanted: dict[str, str], target: Path) -> None:
        monkeypatch.setattr(archives, "unpack", unpack)
        assets.folder("toy")
        unpack(package, wanted, target)

    monkeypatch.setattr(archives, "unpack", slow_unpack)
    path = assets.folder("toy")
    assert (path / "config.json").read_bytes() == b"{}"
    assert {entry.name for entry in assets.cache_folder().iterdir()} == {"toy", "packages"}


FETCH_AT_ONCE = """
import sys, shutil, time
from pathlib import Path
from fedpilot import assets
from fedpilot.assets import downloads
from fedpilot.assets.registry import ASSETS, Asset

package, sha256, start = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
ASSETS["toy"] = Asset("model", "", "", "wheel", "toy", "1.0", package.name, sha256, {"toy/model/": ""})
downloads.download = lambda asset, directory: Path(shutil.copy(package, directory))
time.sleep(max(0.0, start - time.time()))
for _ in range(20):
    assert (assets.folder("toy") / "config.json").read_bytes() == b"{}"
"""


def test_two_processes_may_fetch_at_once(tmp_path: Path) -> None:
    package, cache = tmp_path / "toy-1.0-py3-none-any.whl", tmp_path / "cache"
    package.write_bytes(CONTENT)
    command = [sys.executable, "-c", FETCH_AT_ONCE, str(package), toy_asset().sha256, str(time.time() + 1.0)]
    environment = os.environ | {"FEDPILOT_CACHE": str(cache)}
    processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert {entry.name for entry in cache.iterdir()} == {"toy", "packages"}


def test_an_unknown_name_lists_the_known_ones_and_guesses(registry: Registry) -> None:
    with pytest.raises(AssetError, match=r"must be one of bbc, .*vader, got 'minilm_l6'; did you mean 'minilm-l6'\?"):
        assets.fetch("minilm_l6")
    with pytest.raises(AssetError, match="must be one of"):
        assets.prepare(["toy", "nothing"])
    assert registry.asked == 0


def test_a_data_set_is_no_model() -> None:
    with pytest.raises(AssetError, match="got the data set 'vader'"):
        assets.model("vader")


def test_a_model_source_is_a_packaged_name_a_folder_or_a_hub_id(registry: Registry, tmp_path: Path) -> None:
    assert assets.resolve("toy") == str(assets.cache_folder() / "toy")
    assert assets.resolve(str(tmp_path)) == str(tmp_path)
    assert assets.resolve("FacebookAI/roberta-base") == "FacebookAI/roberta-base"
    assert assets.resolve("gpt2") == "gpt2"
    with pytest.raises(AssetError, match="did you mean 'minilm-l6'"):
        assets.resolve("minilm-6")
    for path in ("./models/mine", "/models/mine", "models/mine/best"):
        with pytest.raises(AssetError, match="must be a packaged name, a folder that is there or a hub id"):
            assets.resolve(path)


def test_the_default_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDPILOT_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert assets.cache_folder() == tmp_path / ".cache" / "fedpilot"


def test_a_conversion_reads_the_assets_it_needs(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(raw: Path, final: Path, need: Path) -> None:
        final.mkdir()
        (final / "both").write_bytes((raw / "config.json").read_bytes() + (need / "deep" / "vocab.txt").read_bytes())

    monkeypatch.setitem(ASSETS, "converted", toy_asset(convert=convert, needs=("toy",)))
    assert (assets.folder("converted") / "both").read_bytes() == b"{}a\nb\n"


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_fetches_what_is_named(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert assets.main(["toy"]) == 0
    assert "downloading toy: toy 1.0" in caplog.text
    assert str(assets.cache_folder() / "toy") in caplog.text


def test_the_command_fails_with_one_sentence(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    assert assets.main(["nothing"]) == 1
    assert "asset must be one of" in caplog.text


def test_the_module_can_be_run() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fedpilot.assets", "nothing"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "asset must be one of" in result.stderr
    assert "Traceback" not in result.stderr


# --- downloading --------------------------------------------------------------------------------------------------


class Client:
    """Stands for pip and apt-get: notes each command, and answers with the next of its exit statuses."""

    def __init__(self, *statuses: int, file: str = "toy-1.0-py3-none-any.whl") -> None:
        self.statuses = list(statuses)
        self.file = file
        self.commands: list[list[str]] = []

    def run(self, command: Sequence[str], cwd: Path, **_: object) -> "subprocess.CompletedProcess[str]":
        self.commands.append(list(command))
        status = self.statuses.pop(0)
        if status == 0 and "update" not in command:
            (cwd / self.file).write_bytes(CONTENT)
        return subprocess.CompletedProcess(list(command), status, "", "WARNING: no\nERROR: no route\nhint")


@pytest.fixture
def use_client(monkeypatch: pytest.MonkeyPatch) -> Callable[[Client], Client]:
    def use(client: Client) -> Client:
        monkeypatch.setattr(downloads.subprocess, "run", client.run)
        return client

    return use


def test_a_wheel_comes_by_pip_without_its_requirements(use_client: Callable[[Client], Client], tmp_path: Path) -> None:
    client = use_client(Client(0))
    downloads.download(toy_asset(), tmp_path)
    command = client.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", "toy==1.0"} <= set(command)


def test_an_sdist_is_asked_for_by_name(use_client: Callable[[Client], Client], tmp_path: Path) -> None:
    client = use_client(Client(0))
    downloads.download(toy_asset(channel="sdist"), tmp_path)
    assert client.commands[0][client.commands[0].index("--no-binary") + 1] == "toy"


def test_apt_get_updates_its_lists_when_it_finds_nothing(
    use_client: Callable[[Client], Client], tmp_path: Path
) -> None:
    client = use_client(Client(100, 0, 0))
    downloads.download(toy_asset(channel="debian"), tmp_path)
    assert [command[1] for command in client.commands] == ["download", "update", "download"]
    assert client.commands[0][2] == "toy=1.0"


def test_a_failed_download_says_what_the_client_said_and_what_to_do(
    use_client: Callable[[Client], Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_client(Client(1))
    monkeypatch.setenv("FEDPILOT_CACHE", str(tmp_path))
    monkeypatch.setitem(ASSETS, "toy", toy_asset())
    with pytest.raises(AssetError, match=r"no route.*go online, or put toy-1.0-py3-none-any.whl into"):
        assets.fetch("toy")


def test_a_download_under_another_name_is_refused(use_client: Callable[[Client], Client], tmp_path: Path) -> None:
    use_client(Client(0, file="toy-2.0.whl"))
    with pytest.raises(AssetError, match=r"must bring toy-1.0-py3-none-any.whl, got toy-2.0.whl"):
        downloads.download(toy_asset(), tmp_path)


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match="needs the program apt-get"):
        downloads.download(toy_asset(channel="debian"), tmp_path)


# --- archives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pack"), [("a.whl", wheel), ("a.tar.gz", sdist), ("a.deb", debian)])
def test_every_kind_of_package_is_read(name: str, pack: Callable[[dict[str, bytes]], bytes], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pack(MEMBERS))
    archives.unpack(tmp_path / name, {"toy/model/": "m/", "toy/code.py": "renamed"}, tmp_path / "out")
    assert (tmp_path / "out" / "m" / "deep" / "vocab.txt").read_bytes() == b"a\nb\n"
    assert (tmp_path / "out" / "renamed").read_bytes() == b"1 / 0"


def test_a_package_that_lacks_a_member_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(CONTENT)
    with pytest.raises(AssetError, match=r"must contain toy/weights.bin"):
        archives.unpack(tmp_path / "a.whl", {"toy/weights.bin": "w", "toy/model/": ""}, tmp_path / "out")


def test_a_file_that_is_no_debian_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.deb").write_bytes(b"nothing of the kind")
    with pytest.raises(AssetError, match="must be a Debian package"):
        archives.unpack(tmp_path / "a.deb", {"x": "x"}, tmp_path / "out")


# --- conversions --------------------------------------------------------------------------------------------------


def test_every_pin_is_complete_and_its_needs_are_known() -> None:
    for asset in ASSETS.values():
        assert len(asset.sha256) == 64
        assert asset.version
        assert set(asset.needs) <= set(ASSETS)


def test_a_linear_layer_gets_its_name_and_its_orientation_back(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight, bias = np.arange(6, dtype=np.float32).reshape(3, 2), np.ones(2, dtype=np.float32)
    tied = np.zeros((1, 1, 3), dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "onnx::Add_9"], ["shifted"]),
            helper.make_node("MatMul", ["shifted", "onnx::MatMul_7"], ["product"]),
            helper.make_node("Add", ["net.fc.bias", "product"], ["y"]),
        ],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 2])],
        initializer=[
            numpy_helper.from_array(weight, "onnx::MatMul_7"),
            numpy_helper.from_array(bias, "net.fc.bias"),
            numpy_helper.from_array(tied, "onnx::Add_9"),
            numpy_helper.from_array(bias, "decoder.bias"),
        ],
    )
    onnx.save(helper.make_model(graph), tmp_path / "toy.onnx")
    weights = onnx_files.read(tmp_path / "toy.onnx", "net.")
    assert set(weights) == {"fc.weight", "fc.bias", "onnx::Add_9"}
    assert np.array_equal(weights["fc.weight"], weight.T)


def interleaved(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Rows in GGUF's order: as llama.cpp's converter permutes them."""
    array = weight.numpy()
    return array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)


def write_gguf(path: Path, weights: dict[str, torch.Tensor], tokens: list[str], merges: list[str]) -> None:
    """A decoder of one block, width 12, three heads of 4 with one key head, as a GGUF file."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(12)
    writer.add_feed_forward_length(20)
    writer.add_head_count(3)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    hugging_face = {name: kind for kind, name in gguf_files._NAMES.items()}
    for name, tensor in weights.items():
        stem = name.removesuffix(".weight")
        kind = hugging_face[stem.removeprefix("model.layers.0.")]
        heads = {"attn_q": 3, "attn_k": 1}.get(kind)
        array = tensor.numpy() if heads is None else interleaved(tensor, heads)
        prefix = "blk.0." if "layers" in name else ""
        writer.add_tensor(f"{prefix}{kind}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_decoder_out_of_gguf_computes_what_the_original_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokens = ["<s>", "<e>", "a", "b", "1", "2", "ab", "12"]
    torch.manual_seed(0)
    original = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=32,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    ).eval()
    weights = {name: value for name, value in original.state_dict().items() if name != "lm_head.weight"}
    write_gguf(tmp_path / "model.gguf", weights, tokens, ["a b", "1 2"])
    conversion.smollm2(tmp_path, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    batch = torch.tensor([[2, 3, 6, 5, 7]])
    with torch.no_grad():
        assert torch.equal(model(batch).logits, original(batch).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    # Digits stand apart, so their merge is never used; letters merge; control tokens are found in text.
    assert tokenizer("ab12<e>")["input_ids"] == [6, 4, 5, 1]
    assert tokenizer.pad_token == tokenizer.eos_token == "<e>"


@pytest.mark.parametrize("library", ["onnx", "gguf"])
def test_a_conversion_without_its_library_says_what_to_install(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    convert = conversion.dinov2_small if library == "onnx" else conversion.smollm2
    with pytest.raises(AssetError, match=rf"needs the package {library}, .*pip install 'fedpilot\[assets\]'"):
        convert(tmp_path, tmp_path / "out")


# --- the real packages --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unpacked(name: str, tmp_path: Path) -> Iterator[Path]:
    archives.unpack(assets.fetch(name), ASSETS[name].wanted, tmp_path)
    yield tmp_path


def graph_output(path: Path, feeds: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A value inside an ONNX graph, by the reference implementation."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    result: np.ndarray = ReferenceEvaluator(model).run([name], feeds)[0]
    return result


def last_output(path: Path, predicate: Callable[[object], bool]) -> str:
    import onnx

    return str([node.output[0] for node in onnx.load(path).graph.node if predicate(node)][-1])


def test_minilm_l3_computes_what_its_graph_does(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = assets.model("minilm-l3")
    model, info = AutoModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not any(info.values())
    texts = ["A man is eating food.", "The girl carries a baby through the whole town."]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    feeds = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = model.eval()(**feeds).last_hidden_state
    with unpacked("minilm-l3", tmp_path) as raw:
        graph = raw / "model.onnx"
        name = last_output(graph, lambda node: node.op_type == "LayerNormalization")  # type: ignore[attr-defined]
        expected = graph_output(graph, {key: value.numpy() for key, value in feeds.items()}, name)
    assert np.abs(hidden.numpy() - expected).max() < 1e-5


@pytest.mark.slow
def test_dinov2_computes_what_its_graph_does(tmp_path: Path) -> None:
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(assets.model("dinov2-s"), output_loading_info=True)
    assert not any(info.values())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.eval()(images).last_hidden_state
    with unpacked("dinov2-s", tmp_path) as raw:
        graph = raw / "model.onnx"
        name = last_output(graph, lambda node: "backbone.layernorm.bias" in node.input)  # type: ignore[attr-defined]
        expected = graph_output(graph, {"input_image": images.numpy()}, name)
    # 1.3e-5 was measured, on values up to 8.3.
    assert np.abs(hidden.numpy() - expected).max() < 1e-4


@pytest.mark.slow
def test_smollm2_knows_english_and_answers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.model("smollm2-135m")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def perplexity(text: str) -> float:
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return float(model.eval()(input_ids=tokens, labels=tokens).loss.exp())

    austen = (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
        "must be in want of a wife."
    )
    assert perplexity(austen) == pytest.approx(15.9, abs=0.1)
    assert perplexity(" ".join(sorted(austen.split()))) > 500
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answer[0]) == "The capital of France is Paris."


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads_out_of_the_package(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.model("smollm2-135m")
    with unpacked("smollm2-135m", tmp_path) as raw:
        theirs = AutoModelForCausalLM.from_pretrained(raw, gguf_file="model.gguf").state_dict()
        their_tokenizer = AutoTokenizer.from_pretrained(raw, gguf_file="model.gguf")
    ours = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].float()) for name in ours)
    text = "It was 1984, in 12 streets: don't we'll  go?\n\nÄrger 日本 <|im_start|>user\nhi<|im_end|>"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == their_tokenizer(text)["input_ids"]
