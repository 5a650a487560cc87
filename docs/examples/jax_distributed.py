"""JAX on several processes: linear regression on two workers, the rows of a batch spread over them."""

from pyspark.sql import SparkSession

import spark_nn


def train(ctx, rate, epochs):
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    ctx.initialize()  # jax.distributed.initialize
    mesh = jax.make_mesh((jax.device_count(),), ("rows",))
    spread, everywhere = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())

    def loss_of(weights, x, y):
        return ((x @ weights[:2] + weights[2] - y) ** 2).mean()

    @jax.jit
    def step(weights, x, y):
        loss, gradient = jax.value_and_grad(loss_of)(weights, x, y)
        return weights - rate * gradient, loss

    weights = jax.device_put(np.zeros(3, np.float32), everywhere)
    batches = ctx.batches(1000, epochs=epochs)  # 500 rows of each batch on either worker
    for epoch in range(epochs):
        for block in batches.epoch(epoch):
            x, y = (jax.make_array_from_process_local_data(spread, part) for part in block)
            weights, loss = step(weights, x, y)
        ctx.report(loss=loss)
    return np.asarray(weights)


def main(spark):
    rows = spark.range(4000).selectExpr("rand(1) AS a", "rand(2) AS b", "rand(3) AS noise")
    rows = rows.selectExpr("a", "b", "2 * a - 3 * b + noise AS label")
    return spark_nn.run(
        train, 0.3, 10, numWorkers=2, framework="jax", dataset=rows, inputCols=["a", "b"], shuffle=False
    )


if __name__ == "__main__":
    print(main(SparkSession.builder.master("local[2]").getOrCreate()))
