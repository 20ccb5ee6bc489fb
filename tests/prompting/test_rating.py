"""`llmrec rating` from command line to run folder, on a small table with a pattern in it."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from llmrec import checkpoints
from llmrec.data.readers import load_dataset
from llmrec.evaluation.result import read_result
from llmrec.prompting.rating import configure, main, reader_of
from llmrec.prompting.rating_models import COUNTED
from llmrec.reporting.tables import main as compare

ROOT = Path(__file__).resolve().parents[2]
WORDS = "red green blue shoe boot hat coat scarf summer winter rain snow".split()
ENDS = ("item_mean", "bias", "transformer_mlp")
"""Models of which each makes its predictions in a way of its own."""
SMALL = {
    "data.min_user_interactions": 1,
    "model.width": 16,
    "model.heads": 1,
    "model.history": 10,
    "optim.epochs": 2,
    "optim.batch_size": 32,
}


def table(folder, missing=0, users=60, items=24, length=10):
    """Stars by a taste: users like either even or odd items, and some items are better."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(users):
        for place, item in enumerate(rng.permutation(items)[:length]):
            stars = 3 + (1.5 if item % 2 == user % 2 else -1.5) + (item % 3 - 1) * 0.5
            rows.append([f"u{user}", f"i{item}", int(np.clip(round(stars), 1, 5)), place])
    frame = pl.DataFrame(
        rows, schema=["user_id", "item_id", "rating", "position"], orient="row"
    ).with_columns(title=pl.col("item_id").map_elements(title, return_dtype=pl.String))
    hidden = pl.int_range(len(frame)).is_in(rng.permutation(len(frame))[:missing].tolist())
    frame = frame.with_columns(rating=pl.when(hidden).then(None).otherwise("rating"))
    frame.write_csv(folder / "made.csv")
    return folder / "made.csv"


def title(item):
    number = int(item[1:])
    return f"{WORDS[number % 3]} {WORDS[3 + number // 3 % 5]} {WORDS[8 + number % 4]}"


def argv(data, folder, **changes):
    named = {name.replace("__", "."): value for name, value in changes.items()}
    small = SMALL
    if named.get("model.name") in COUNTED:  # which refuse what only training reads
        small = {name: value for name, value in SMALL.items() if name.startswith("data.")}
    options = small | {"data.source": str(data), "run.folder": str(folder)} | named
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in options.items()
    ]


def rate(data, folder, **changes):
    assert main(argv(data, folder, **changes)) == 0
    return read_result(folder)


def refusal(data, folder, **changes):
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert main(argv(data, folder, **changes)) == 2
    return stderr.getvalue()


def rmse(result):
    return result.record["metrics"]["test"]["RMSE"]["mean"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return table(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", ["global_mean", "user_mean", "item_mean"])
def test_a_mean_s_row_is_the_mean_that_every_result_shows_beside_its_own(made, tmp_path, name):
    result = rate(made, tmp_path / "run", model__name=name)
    assert result.record["metrics"]["test"] == result.record["means"][name.replace("_", " ")]
    assert result.record["cost"]["trainable_parameters"] == 0
    assert result.label == name.replace("_", "-")


def test_what_taste_decides_a_transformer_finds_and_means_do_not(made, tmp_path, figure):
    found = {
        name: rmse(rate(made, tmp_path / name, model__name=name, **more))
        for name, more in (
            ("item_mean", {}),
            ("bias", {}),
            (
                "transformer_mlp",
                {
                    "model__dropout": 0.0,
                    "optim__epochs": 12,
                    "optim__lr": 0.01,
                    "optim__patience": 12,
                },
            ),
        )
    }
    figure("RMSE on the made table", {name: round(value, 3) for name, value in found.items()})
    assert found["transformer_mlp"] < 0.6 * found["item_mean"]
    assert found["transformer_mlp"] < 0.6 * found["bias"]


@pytest.mark.parametrize(
    ("tune", "head"),
    [("frozen", "regression"), ("full", "classification"), ("lora", "regression")],
)
def test_a_language_model_is_trained_and_scored(made, tmp_path, tiny_models, head, tune):
    result = rate(
        made, tmp_path / "run", model__name="language_model", model__head=head,
        encoder__model=str(tiny_models["bert"]), encoder__tune=tune, encoder__max_item_tokens=40,
        optim__training_pairs=64,
    )  # fmt: skip
    assert result.rates
    assert result.record["cost"]["training_pairs"] == 64
    assert result.record["cost"]["flops"] > 0
    config = configure(["--config", str(tmp_path / "run" / "config.yaml")])
    told = load_dataset(config.data).told_fingerprint()
    assert result.record["cost"]["encoder"]["weights"] == reader_of(config, told)
    predicted = result.per_user["predicted"]
    assert predicted.is_between(1, 5).all()
    assert predicted.n_unique() > 30  # one of its own for most of 60 cases


def test_the_result_names_protocol_selection_and_the_cases_left_out(tmp_path):
    data = table(tmp_path, missing=200)
    result = rate(data, tmp_path / "run", run__select="MAE")
    record, counts = result.record, result.record["data"]["counts"]
    assert record["protocol"]["selection"] == "MAE"
    assert "filter_seen" not in record["protocol"]
    assert counts["interactions_without_rating"] == 200
    assert counts["test_cases_without_rating"] + len(result.per_user) == 60
    assert counts["test_cases_without_rating"] > 0
    assert result.per_user["stars"].is_not_nan().all()
    assert record["cost"]["training_pairs"] + 200 < 600
    assert "RMSE" in (tmp_path / "run" / "card.md").read_text()


def test_a_prediction_of_five_stars_is_one_and_counts(tmp_path):
    # Everybody gives everything five stars: the only right answer lies at the scale's end.
    frame = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(8), 5).astype(str),
            "item_id": [f"i{i}" for _ in range(8) for i in range(5)],
            "rating": [5] * 40,
            "title": ["red shoe"] * 40,
        }
    )
    frame.write_csv(tmp_path / "made.csv")
    for name in ENDS:
        result = rate(tmp_path / "made.csv", tmp_path / name, model__name=name)
        assert result.per_user["predicted"].to_list() == [5.0] * 8
        assert result.record["metrics"]["test"]["RMSE"]["mean"] == 0.0
        assert result.record["metrics"]["test"]["AUC"]["mean"] is None  # nobody disliked anything


def test_a_refit_learns_from_validation_too_for_the_selected_epochs(made, tmp_path):
    result = rate(made, tmp_path / "run", run__fit_on="train+valid")
    cost = result.record["cost"]
    assert cost["refit_training_pairs"] == cost["training_pairs"] + 60
    assert cost["refit_epochs"] == cost["selected_epoch"]
    assert result.record["protocol"]["fit_on"] == "train+valid"
    mean = rate(made, tmp_path / "mean", run__fit_on="train+valid", model__name="global_mean")
    plain = rate(made, tmp_path / "plain", model__name="global_mean")
    assert mean.per_user["predicted"][0] != plain.per_user["predicted"][0]


def test_a_temporal_split_is_rated_as_well(tmp_path):
    data = table(tmp_path)
    frame = pl.read_csv(data)
    frame.with_columns(timestamp=1_000_000 + 1000 * pl.col("position")).write_csv(data)
    result = rate(
        data, tmp_path / "run", split__method="temporal", split__valid_share=0.2,
        split__test_share=0.2,
    )  # fmt: skip
    assert result.record["protocol"]["split"] == "temporal"
    assert len(result.per_user) > 0


def found(folder):
    """All that a run found, but for its times."""
    record = json.loads((folder / "result.json").read_text())
    weights = {
        path.parent.name: path.read_bytes() for path in folder.glob("checkpoints/*/*.safetensors")
    }
    return record["metrics"], record["per_user_sha256"], weights


RESUMED = {
    "optim__accumulate": 2, "run__checkpoint_steps": 5, "run__fit_on": "train+valid",
    "model__dropout": 0.3,
}  # fmt: skip
"""15 steps an epoch: three states in each of two epochs, then those of the refit."""


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    rate(made, folder, **RESUMED)
    return found(folder)


@pytest.mark.parametrize(
    "killed_after", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 6, 7))]
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    made, undisturbed, tmp_path, monkeypatch, killed_after
):
    saved, save = [], checkpoints.save_state

    def save_then_die(*arguments):
        save(*arguments)
        saved.append(1)
        if len(saved) == killed_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_state", save_then_die)
    assert main(argv(made, tmp_path / "run", **RESUMED)) == 130
    assert not (tmp_path / "run" / "result.json").exists()
    monkeypatch.undo()
    rate(made, tmp_path / "run", **RESUMED)
    assert found(tmp_path / "run") == undisturbed


def test_an_unfinished_run_of_other_ratings_is_not_resumed(tmp_path, monkeypatch):
    data = table(tmp_path)
    save = checkpoints.save_state

    def save_then_die(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_state", save_then_die)
    assert main(argv(data, tmp_path / "run")) == 130
    monkeypatch.undo()
    frame = pl.read_csv(data)
    frame.with_columns(rating=6 - pl.col("rating")).write_csv(data)
    assert "unfinished run with ratings and reviews" in refusal(data, tmp_path / "run")


def test_the_same_seed_gives_the_same_predictions_and_another_one_others(made, tmp_path):
    hashes = [
        rate(made, tmp_path / name, run__seed=seed).record["per_user_sha256"]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_finished_run_is_not_overwritten_unasked(made, tmp_path):
    rate(made, tmp_path / "run", model__name="bias")
    assert "--run.overwrite true" in refusal(made, tmp_path / "run", model__name="bias")
    rate(made, tmp_path / "run", model__name="bias", run__overwrite=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data__rating_column": "stars"}, "data.rating_column"),
        ({"encoder__tune": "full"}, "model.name=language_model"),
        ({"model__name": "language_model", "data__item_text": "none"}, "data.item_text"),
        ({"optim__training_pairs": 0}, "optim.training_pairs=0"),
        ({"optim__accumulate": 64}, "Lower optim.accumulate"),
        ({"model__name": "language_model", "encoder__cache_states": False}, "encoder.cache_states"),
        ({"model__name": "language_model", "model__template": "rating/star"}, "rating/stars"),
        ({"model__name": "language_model", "model__template": "chat/rating"}, "model.template"),
        ({"model__name": "svd"}, "model.name"),
        ({"model__name": "bias", "optim__lr": 0.5}, "optim.lr=0.5 means nothing to model.name"),
        ({"model__name": "bias", "model__head": "classification"}, "model.head"),
        ({"model__name": "bias", "run__select": "MAE"}, "run.select=MAE"),
        ({"model__name": "item_mean", "encoder__layers": 2}, "encoder.layers=2"),
        ({"model__name": "item_mean", "model__item_shrinkage": 1.0}, "model.item_shrinkage"),
        ({"run__select": "HR@10"}, "run.select"),
        ({"model__heed": 1}, "model.head"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_option(made, tmp_path, options, words):
    said = refusal(made, tmp_path / "run", **options)
    assert words in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_an_error(made, tmp_path):
    said = refusal(made, tmp_path / "run", optim__lr=1e30, optim__clip="off")
    assert "the loss is not finite in epoch 1, by step 15. Lower optim.lr=1e+30" in said


def test_damage_done_by_the_last_step_of_an_epoch_is_an_error_too(made, tmp_path):
    # One step an epoch: its loss is that of the untouched weights.
    said = refusal(made, tmp_path / "run", optim__lr=1e38, optim__clip="off", optim__batch_size=960)
    assert "not finite in epoch 1, by step 1" in said


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "rating").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_shipped_config_configures_and_names_its_own_command(path, tmp_path, monkeypatch):
    (tmp_path / "ml-100k").mkdir()  # the data need not be here
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path))
    configure(["--config", str(path)])
    head = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "llmrec/prompting/rating.py" in head
    assert f"--config {path.relative_to(ROOT).as_posix()}" in head


def test_every_rating_row_of_the_shipped_suite_configures(tmp_path, monkeypatch):
    (tmp_path / "ml-100k").mkdir()
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path))
    suite = yaml.safe_load((ROOT / "eval" / "ratings.yaml").read_text())
    rows = [row for row in suite["rows"].values() if row.pop("program", "train") == "rating"]
    assert len(rows) == 7
    shared = ["--optim.training_pairs=all", "--encoder.max_item_tokens=256"]
    assert " ".join(shared).replace("=", " ") in (ROOT / "eval" / "ratings.yaml").read_text()
    for number, row in enumerate(rows):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(suite["base"] | nested(row)))
        configure(["--config", str(file)])
        configure(["--config", str(file), *shared])  # as on a GPU


def nested(row):
    deep = {}
    for name, value in row.items():
        group, _, option = name.partition(".")
        deep[group] = {option: value} if option else value
    return deep


def test_the_offsets_own_shrinkage_is_read(made, tmp_path):
    plain = rate(made, tmp_path / "plain", model__name="bias")
    other = rate(made, tmp_path / "other", model__name="bias", model__item_shrinkage=50.0)
    assert rmse(plain) != rmse(other)


def test_ten_points_have_errors_but_no_auc(tmp_path):
    frame = pl.read_csv(table(tmp_path))
    frame.with_columns(rating=2 * pl.col("rating")).write_csv(tmp_path / "ten.csv")
    five = rate(tmp_path / "made.csv", tmp_path / "five", model__name="item_mean")
    ten = rate(tmp_path / "ten.csv", tmp_path / "ten", model__name="item_mean")
    assert rmse(ten) == pytest.approx(2 * rmse(five))
    assert five.record["metrics"]["test"]["AUC"]["mean"] is not None
    assert ten.record["metrics"]["test"]["AUC"] == {"mean": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"run__fit_on": "train+valid"}, "differ in fit_on (train and train+valid)"),
        ({"split__method": "temporal", "split__valid_share": 0.2, "split__test_share": 0.2},
         "differ in the test users and targets"),
    ],
)  # fmt: skip
def test_rating_runs_under_other_rules_share_no_table(tmp_path, capsys, options, words):
    data = table(tmp_path)
    frame = pl.read_csv(data)
    frame.with_columns(timestamp=1_000_000 + 1000 * pl.col("position")).write_csv(data)
    rate(data, tmp_path / "one", model__name="bias")
    rate(data, tmp_path / "two", model__name="item_mean", **options)
    assert compare([str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_find_what_one_does(made, tmp_path):
    options = argv(made, tmp_path / "two", model__dropout=0.0)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    script = [str(ROOT / "llmrec" / "prompting" / "rating.py"), *options]
    subprocess.run([*launch, *script], check=True, cwd=tmp_path)
    one = rate(made, tmp_path / "one", model__dropout=0.0)
    two = read_result(tmp_path / "two")
    assert two.record["environment"]["processes"] == 2
    assert two.per_user["predicted"].to_numpy() == pytest.approx(
        one.per_user["predicted"].to_numpy(), abs=1e-4
    )


@pytest.mark.slow
@pytest.mark.real_data
def test_ratings_of_ml_100k_beat_the_item_mean_clearly(data_root, tmp_path, figure, monkeypatch):
    monkeypatch.setenv("LLMREC_DATA", str(data_root))
    found = {}
    for name in ("bias", "transformer_mlp"):
        words = ["--config", str(ROOT / "configs" / "rating" / "ml-100k.yaml")]
        words += ["--model.name", name, "--run.folder", str(tmp_path / name)]
        assert main(words) == 0
        result = read_result(tmp_path / name)
        interval = result.record["metrics"]["test"]["RMSE"]
        found[name] = interval["mean"]
        assert interval["high"] < result.record["means"]["item mean"]["RMSE"]["mean"]
    figure("RMSE on ml-100k", {name: round(value, 4) for name, value in found.items()})
    assert found["transformer_mlp"] < found["bias"]
