"""What a grid costs: `python benchmarks/tune.py`.

`CrossValidator` with 3 folds and 4 param maps, which trains 12 models, scores them, and trains the best one again, on
100,000 rows and two cores. Beside it the same 13 fits without the scoring: as `fitMultiple` trains them, a call per
fold; as 13 `fit` calls one after the other in one session, each with one worker or with two; and each the first of a
session, which is 13 times what one such call takes. "12 scored" is what the evaluations alone take, one after the
other, in a session that has scored before. The ratios are those of the first two lines to each other one. Every round
has sessions of its own, measured in turn; the table is their median, in seconds. Ratios travel between machines,
seconds do not.

With ``--search`` it shows another way to choose params: Optuna proposes them, four at a time, and one `fitMultiple`
trains the four side by side. That needs the extra ``examples``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

from peers import apart
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_nn import KerasEstimator
from spark_nn.doctor import requireJava

FEATURES = 20
FOLDS = 3
PHASES = ("check", "materialize", "wait", "start", "build", "trace", "train", "publish", "finish")


def builder():
    """The function that returns the model: nested, so that it travels by value from whatever process this is."""

    def build(units):
        import keras

        layers = [keras.layers.Dense(units, "relu"), keras.layers.Dense(units, "relu")]
        return keras.Sequential([*layers, keras.layers.Dense(1, "sigmoid")])

    return build


def session() -> SparkSession:
    """A session of two cores."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", False).getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    return spark


def rows_of(spark: SparkSession, rows: int) -> DataFrame:
    """Rows in memory, with the fold that each belongs to."""
    columns = [F.randn(number).alias(f"x{number}") for number in range(FEATURES)]
    df = spark.range(rows).select("id", *columns)
    df = df.withColumn("label", F.expr("cast(x0 * x1 + x2 + 0.5 * x3 > 0 as int)"))
    df = df.withColumn("fold", F.expr(f"cast(pmod(hash(id), {FOLDS}) as int)")).drop("id").cache()
    df.count()
    return df


def estimator(workers: int, epochs: int) -> KerasEstimator:
    """What is tuned."""
    return KerasEstimator(
        model=builder(),
        modelParams={"units": 32},
        optimizer="adam",
        loss="binary_crossentropy",
        inputCols=[f"x{number}" for number in range(FEATURES)],
        batchSize=256,
        epochs=epochs,
        numWorkers=workers,
        verbose=0,
    )


def grid(stage: KerasEstimator) -> list[Any]:
    """Four maps."""
    builder = ParamGridBuilder().addGrid(stage.learningRate, [1e-3, 1e-2])
    return builder.addGrid(stage.modelParams, [{"units": 32}, {"units": 64}]).build()


def phases(models: list[Any]) -> dict[str, float]:
    """Where the time of several fits went, in all."""
    return {phase: sum(model.summary.seconds.get(phase, 0.0) for model in models) for phase in PHASES}


def tuned(rows: int, epochs: int) -> dict[str, float]:
    """The grid under `CrossValidator`."""
    df = rows_of(session(), rows)
    stage = estimator(1, epochs)
    began = time.monotonic()
    evaluator = BinaryClassificationEvaluator()
    found = CrossValidator(
        estimator=stage,
        estimatorParamMaps=grid(stage),
        evaluator=evaluator,
        numFolds=FOLDS,
        foldCol="fold",
        collectSubModels=True,
        parallelism=4,
    ).fit(df)
    total = time.monotonic() - began
    scored = time.monotonic()
    for fold, models in enumerate(found.subModels):
        test = df.where(F.col("fold") == fold).cache()
        for model in models:
            evaluator.evaluate(model.transform(test))
    scoring = time.monotonic() - scored
    fits = [model for fold in found.subModels for model in fold] + [found.bestModel]
    return {**phases(fits), "total": total, "scoring": scoring}


def trained(rows: int, epochs: int, workers: int, together: bool) -> dict[str, float]:
    """The same fits without the scoring, the maps of a fold in one call or each in its own."""
    df = rows_of(session(), rows)
    stage = estimator(workers, epochs)
    began = time.monotonic()
    models = []
    for fold in range(FOLDS):
        train = df.where(F.col("fold") != fold).cache()
        if together:
            models += [model for _, model in stage.fitMultiple(train, grid(stage))]
        else:
            models += [stage.fit(train, params) for params in grid(stage)]
        train.unpersist()
    models.append(stage.fit(df, grid(stage)[0]))
    return {**phases(models), "total": time.monotonic() - began}


def first(rows: int, epochs: int) -> dict[str, float]:
    """The first fit of a session, 13 times."""
    df = rows_of(session(), rows)
    began = time.monotonic()
    model = estimator(1, epochs).fit(df.where("fold != 0"))
    total = time.monotonic() - began
    return {name: seconds * 13 for name, seconds in {**phases([model]), "total": total}.items()}


def search(rows: int, epochs: int, trials: int = 12, together: int = 4) -> None:
    """Optuna's choice, four trials at a time."""
    import optuna

    df = rows_of(session(), rows)
    train, test = df.where("fold != 0").cache(), df.where("fold = 0").cache()
    stage = estimator(1, epochs)
    evaluator = BinaryClassificationEvaluator()
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=1, constant_liar=True))
    for _ in range(trials // together):
        asked = [study.ask() for _ in range(together)]
        maps = [
            {
                stage.learningRate: trial.suggest_float("learningRate", 1e-4, 1e-1, log=True),
                stage.modelParams: {"units": trial.suggest_int("units", 16, 128, log=True)},
            }
            for trial in asked
        ]
        for place, model in stage.fitMultiple(train, maps):
            study.tell(asked[place], evaluator.evaluate(model.transform(test)))
    print(f"best of {trials}: AUC {study.best_value:.4f} with {study.best_params}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--search", action="store_true", help="choose params with Optuna, in place of the table")
    arguments = parser.parse_args()
    requireJava()
    sized = arguments.rows, arguments.epochs
    if arguments.search:
        search(*sized)
        return
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(arguments.rounds):
        rounds.append(
            {
                "CrossValidator": apart(tuned, *sized),
                "3 fitMultiple + fit": apart(trained, *sized, 1, True),
                "13 fits, 1 worker": apart(trained, *sized, 1, False),
                "13 fits, 2 workers": apart(trained, *sized, 2, False),
                "13 first fits": apart(first, *sized),
            }
        )
    print(f"\n{arguments.rows:,} rows x {FEATURES}, {arguments.epochs} epochs, median of {arguments.rounds}, seconds")
    print("phases are sums over the 13 fits, of which several may go on at the same time; total is wall time")
    print(f"{'':>20}" + "".join(f"{title:>12}" for title in (*PHASES, "total", "CV to", "fitM. to")))
    for name in rounds[0]:
        middle = {key: statistics.median(each[name][key] for each in rounds) for key in (*PHASES, "total")}
        ratios = [
            statistics.median(each[ours]["total"] / each[name]["total"] for each in rounds)
            for ours in ("CrossValidator", "3 fitMultiple + fit")
        ]
        values = [*(middle[key] for key in (*PHASES, "total")), *ratios]
        print(f"{name:>20}" + "".join(f"{value:12.2f}" for value in values))
    scoring = statistics.median(each["CrossValidator"]["scoring"] for each in rounds)
    print(f"{'12 scored':>20}" + " " * 12 * len(PHASES) + f"{scoring:12.2f}")


if __name__ == "__main__":
    main()
