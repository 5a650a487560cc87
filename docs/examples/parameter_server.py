"""Asynchronous training with TensorFlow's ParameterServerStrategy: a chief, two workers and a parameter server."""

from pyspark.sql import SparkSession

import spark_nn


def train(ctx, rate, epochs):
    """Run on the chief alone; the workers and the parameter server are servers that it gives work."""
    import tensorflow as tf

    strategy = tf.distribute.ParameterServerStrategy(tf.distribute.cluster_resolver.TFConfigClusterResolver())
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        weights, bias = tf.Variable(tf.zeros([2])), tf.Variable(0.0)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.linalg.matvec(x, weights) + bias - y) ** 2)
        for variable, gradient in zip((weights, bias), tape.gradient(loss, (weights, bias))):
            variable.assign_sub(rate * gradient)

    for x, y in ctx.batches(50, epochs=epochs):
        coordinator.schedule(step, args=(tf.constant(x), tf.constant(y)))
    coordinator.join()
    return [*weights.numpy(), bias.numpy()]


def main(spark):
    rows = (
        spark.range(1000).selectExpr("rand(1) AS a", "rand(2) AS b").selectExpr("a", "b", "2 * a - 3 * b + 1 AS label")
    )
    return spark_nn.run(train, 0.2, 20, numWorkers=2, parameterServers=1, dataset=rows, inputCols=["a", "b"])


if __name__ == "__main__":
    print(*main(SparkSession.builder.master("local[4]").getOrCreate()))
