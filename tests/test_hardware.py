"""What fits which memory, for models without weights."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import BertConfig, LlamaConfig

from fedpilot import memory, planning
from fedpilot.commands.hardware import budgets_of, document
from fedpilot.config import hardware, setup
from fedpilot.config.hardware import Fit, Outlook, Planner, Precision, Step
from fedpilot.errors import ConfigError
from fedpilot.model import ModelSettings, Quantisation, build_model
from fedpilot.training import TrainingSettings
from tests.test_cli import fedpilot

BLOCKS = 4
TRAINING = TrainingSettings(1e-3, batch_size=4)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose activations of a block weigh more than the block."""
    folder = tmp_path_factory.mktemp("shape")
    BertConfig(
        vocab_size=50, hidden_size=24, num_attention_heads=4, num_hidden_layers=BLOCKS, intermediate_size=40,
        max_position_embeddings=64,
    ).save_pretrained(folder)  # fmt: skip
    return folder / "config.json"


@pytest.fixture(scope="module")
def planner(config: Path) -> Planner:
    settings = ModelSettings(str(config.parent), rank=8, max_length=64)
    return Planner(settings, TRAINING, 2)


ASKED = Step(micro_batch=4, length=64, dtype="float32", rank=8, recompute=False)


def test_two_passes_stand_for_all_but_for_a_number_that_each_holds(planner: Planner) -> None:
    small = replace(ASKED, micro_batch=1)
    traced = setup.profile_of(planner.sketch(ASKED.sketched), TRAINING, checkpointing=True, micro_batches=(1,))
    for trained in (2, BLOCKS):
        plan = planning.train_blocks(planner.spec, 0, 8, range(BLOCKS - trained, BLOCKS))
        plan = replace(plan, micro_batch=1)
        peak, flops = planner.price(small, trained)
        assert flops == memory.seconds(traced, plan, 1.0, 1)
        assert 0 <= memory.peak_bytes(traced, plan) - peak <= 8 * TRAINING.batch_size


@pytest.mark.parametrize(("dtype", "quantisation"), [("float32", None), ("bf16", None), ("float32", "nf4")])
def test_prices_are_those_of_a_trace_of_all_that_a_plan_can_be(
    planner: Planner, dtype: Precision, quantisation: Quantisation | None
) -> None:
    step = replace(ASKED, dtype=dtype, quantisation=quantisation)
    traced = setup.profile_of(planner.sketch(step.sketched), TRAINING, checkpointing=True)
    for trained, recomputed, loaded in ((1, 0, None), (3, 1, None), (BLOCKS, BLOCKS, None), (2, 0, 2)):
        prices = {
            (memory.peak_bytes(traced, plan), memory.seconds(traced, plan, 1.0, 1))
            for plan in planner._plans(step, trained, recomputed, loaded)
        }
        assert prices == {planner.price(step, trained, recomputed, loaded)}


def test_no_step_is_traced_whose_weights_alone_are_over_the_budget(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Step] = []
    monkeypatch.setattr(planner, "fit", lambda step, budget, change="": tried.append(step))
    monkeypatch.setattr(planner, "shallow", lambda step, budget, change: None)
    assert list(planner._changes(ASKED, 3 * planner.num_parameters)) == []
    kinds = {(step.dtype, step.quantisation) for step in tried}
    assert kinds == {("bf16", None), ("float32", "nf4"), ("bf16", "nf4")}


def test_nothing_helps_a_budget_below_the_weights_in_their_lightest_storage(planner: Planner) -> None:
    for dtype, quantisation in itertools.product(("float32", "bf16"), (None, "int8", "nf4")):
        step = replace(ASKED, dtype=dtype, quantisation=quantisation)
        model = build_model(
            replace(planner.settings, dtype=dtype, quantisation=quantisation), num_labels=2, device="fake"
        )
        frozen = sum(p.nbytes for p in model.base.parameters())
        bound = planner._lightest(step, exactly=True)
        assert 0.8 * frozen <= bound <= frozen
        assert planner._lightest(step) <= bound


def test_quantised_weights_come_after_bf16_and_before_a_lower_rank(planner: Planner) -> None:
    steps = (replace(ASKED, dtype="bf16"), replace(ASKED, quantisation="int8"))
    answer = planner.answer(ASKED, max(planner.price(step, 1)[0] for step in steps))
    kinds = [fit.change for fit in answer.changes]
    assert [kind for kind in kinds if "weights" in kind] == ["bf16 weights", "8-bit weights"]
    assert planner._steps("quantisation", replace(ASKED, quantisation="int8")) == [
        ("4-bit weights", replace(ASKED, quantisation="nf4"))
    ]
    assert planner._steps("quantisation", replace(ASKED, quantisation="nf4")) == []


def test_a_budget_trains_as_many_blocks_as_fit_and_one_byte_less_trains_fewer(planner: Planner) -> None:
    for trained in range(2, BLOCKS + 1):
        peak, _ = planner.price(ASKED, trained)
        exact, less = planner.fit(ASKED, peak), planner.fit(ASKED, peak - 1)
        assert exact is not None
        assert less is not None
        assert (exact.trained, exact.peak_bytes, less.trained) == (trained, peak, trained - 1)
    assert planner.fit(ASKED, planner.price(ASKED, 1)[0] - 1) is None


def test_no_more_blocks_are_recomputed_than_a_budget_asks_for(planner: Planner) -> None:
    again = replace(ASKED, recompute=True)
    plain, all_again = planner.price(ASKED, BLOCKS), planner.price(ASKED, BLOCKS, BLOCKS)
    assert all_again[0] < plain[0]
    between = planner.fit(again, (plain[0] + all_again[0]) // 2)
    assert between is not None
    assert between.trained == BLOCKS
    assert 0 < between.recomputed < BLOCKS
    assert plain[1] < between.flops < all_again[1]
    assert planner.price(again, BLOCKS, between.recomputed - 1)[0] > (plain[0] + all_again[0]) // 2


def test_the_share_of_the_adapter_counts_what_is_trained_at_the_rank_it_has(planner: Planner) -> None:
    ample = 2**40
    whole, half_rank = planner.fit(ASKED, ample), planner.fit(replace(ASKED, rank=4), ample)
    assert whole is not None
    assert half_rank is not None
    assert (whole.adapter_share, half_rank.adapter_share) == (1.0, 0.5)
    two = planner.fit(ASKED, planner.price(ASKED, 2)[0])
    assert two is not None
    assert two.adapter_share == pytest.approx(2 / BLOCKS)


def test_a_budget_that_is_left_out_is_offered_the_gentlest_change_of_each_kind(planner: Planner) -> None:
    budget = planner.price(ASKED, 1)[0] - 1
    answer = planner.answer(ASKED, budget)
    assert answer.left_out
    assert answer.needed_bytes == budget + 1
    kinds = [fit.change for fit in answer.changes]
    assert kinds[0] == "micro-batch 1"  # a quarter of the batch is one example
    assert "32 tokens" in kinds
    assert all(fit.peak_bytes <= budget for fit in answer.changes)


@pytest.mark.slow
def test_where_the_weights_do_not_fit_a_model_of_some_blocks_is_all_that_helps(tmp_path: Path) -> None:
    BertConfig(
        vocab_size=50, hidden_size=64, num_attention_heads=4, num_hidden_layers=6, intermediate_size=256,
        max_position_embeddings=64,
    ).save_pretrained(tmp_path)  # fmt: skip
    planner = Planner(ModelSettings(str(tmp_path), rank=2, max_length=16), replace(TRAINING, batch_size=2), 2)
    asked = Step(micro_batch=2, length=16, dtype="float32", rank=2, recompute=False)
    light = replace(asked, dtype="bf16", micro_batch=1, quantisation="nf4")
    small = planner.answer(asked, planner.price(light, 1, 0, 1)[0])
    assert small.budget_bytes < 2 * planner.num_parameters
    assert [(fit.loaded, fit.trained) for fit in small.changes] == [(1, 1)]
    assert small.changes[0].change == ("micro-batch 1 + bf16 weights + 4-bit weights + a model of some blocks (fedra)")
    assert planner.answer(asked, 1000).changes == ()


@pytest.fixture(scope="module")
def found(planner: Planner) -> Outlook:
    """An outlook without further traces: one budget has room for all, one for two blocks."""
    two, everything = (planner.price(ASKED, trained)[0] for trained in (2, BLOCKS))
    rungs = []
    for trained in range(1, BLOCKS + 1):
        (peak, flops), (again, more) = (planner.price(ASKED, trained, kept) for kept in (0, trained))
        rungs.append(hardware.Rung(trained, peak, again, flops, more))
    answers = tuple(planner.answer(ASKED, budget) for budget in (two, everything))
    return Outlook("shape", "a BERT", 1000, BLOCKS, rungs[-1].flops, ASKED, tuple(rungs), answers)


def test_the_document_names_blocks_bytes_and_operations(found: Outlook) -> None:
    read = json.loads(json.dumps(document(found, speed=1e6)))
    two, everything = read["budgets"]
    assert two["fits"][0]["blocks"] == [BLOCKS - 2, BLOCKS - 1]
    assert everything["fits"][0]["blocks"] == list(range(BLOCKS))
    assert everything["fits"][0]["flops_share"] == 1.0
    assert everything["fits"][0]["seconds"] == found.all_flops / 1e6
    peaks = [rung["peak_bytes"] for rung in read["smallest_budgets"]]
    assert peaks == sorted(peaks)
    assert peaks[1] == two["budget_bytes"]


def test_recomputing_is_offered_only_where_it_lets_more_blocks_in(found: Outlook) -> None:
    two, everything = found.answers
    assert [fit.change for fit in everything.fits] == ["as asked"[:0]]
    assert max(fit.trained for fit in two.fits) > 2
    assert all(isinstance(fit, Fit) and fit.peak_bytes <= two.budget_bytes for fit in two.fits)


def test_budgets_are_read_and_all_that_are_none_are_named() -> None:
    assert budgets_of("6 GiB, 100MB,4096") == [6 * 2**30, 100_000_000, 4096]
    with pytest.raises(ConfigError) as caught:
        budgets_of("6 GiB, much, 3 parsec")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a.toml", "--model", "llama-7b"], "give a recipe or --model"),
        (["a.toml", "--batch", "4"], "--batch goes with --model"),
        (["--model", "llama-7b", "--set", "run.rounds=1"], "--set changes a recipe"),
        (["--model", "llama-7b", "--memory", "lots"], "--memory must be bytes"),
        (["--model", "llama-7b", "--memory", "0"], "--memory must be more than 0 bytes"),
        (["--model", "llama-7b", "--batch", "16", "--micro-batch", "5"], "--micro-batch must divide --batch 16, got 5"),
        (["--model", "llama-7b", "--image-size", "28"], "--image-size must be left out"),
        (["--model", "llama-7b", "--length", "9000"], "at most the model's 4096 positions, got 9000"),
        (["--model", "llama-7b", "--task", "image-classification"], "model task must be one that llama can do"),
        (["--model", "llama-7b", "--task", "image-classification", "--length", "8"], "images take --image-size"),
        (["--model", "llama-7b", "--out", "plan.txt"], "--out must be a picture here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_planned_says_why(options: list[str], message: str) -> None:
    result = fedpilot("plan", *options)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"hidden_size": 3}')
    result = fedpilot("plan", "--model", str(tmp_path / "model.json"))
    assert result.exit_code == 2
    assert "config.json with its model_type" in result.output


def test_the_command_prints_json_alone_and_draws(config: Path, tmp_path: Path) -> None:
    shape = tmp_path / "my-shape.json"
    shape.write_text(config.read_text())
    options = ["--task", "sequence-classification", "--length", "16", "--batch", "2", "--out", str(tmp_path / "p.svg")]
    result = fedpilot("plan", "--model", str(shape), *options, "--memory", "1 GiB", "--json")
    assert result.exit_code == 0, result.output
    (answer,) = json.loads(result.stdout)["budgets"]
    assert answer["fits"][0]["trained"] == BLOCKS
    assert "<svg" in (tmp_path / "p.svg").read_text()


@pytest.mark.slow
def test_a_model_of_seven_billion_parameters_is_planned_from_its_shape(tmp_path: Path) -> None:
    result = fedpilot("plan", "--model", "llama-7b", "--dtype", "bf16", "--memory", "8 GiB,24 GiB", "--json")
    assert result.exit_code == 0, result.output
    read = json.loads(result.stdout)
    assert read["what"].startswith("llama, 32 blocks, 6,738.4 M parameters")
    assert read["weight_bytes"] == pytest.approx(2 * 6_738_415_616, rel=1e-3)
    small, large = read["budgets"]
    assert small["left_out"]
    assert [change["change"] for change in small["changes"]][-1].endswith("4-bit weights")
    assert not large["left_out"]
    assert large["fits"][-1]["trained"] == 32


def test_the_named_shapes_are_configurations(tmp_path: Path) -> None:
    for name in hardware.SHAPES:
        with hardware.source_of(name) as source:
            assert json.loads(Path(source, "config.json").read_text())["model_type"] in (
                "bert",
                "gpt2",
                "llama",
                "mistral",
            )
    assert LlamaConfig(**hardware.SHAPES["llama-7b"]).num_hidden_layers == 32
