"""A custom loop under TensorFlow's MultiWorkerMirroredStrategy: linear regression on two workers."""

import numpy as np
from pyspark.sql import SparkSession

import spark_nn


def train(ctx, rate, epochs):
    import keras
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # finds the cluster in TF_CONFIG
    with strategy.scope():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="zeros")])
        optimizer = keras.optimizers.SGD(rate)

    @tf.function
    def step(x, y):
        def of_a_replica(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x)[:, 0] - y) ** 2) / strategy.num_replicas_in_sync
            # The optimizer adds up the replicas' gradients.
            optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_weights), model.trainable_weights))
            return loss

        return strategy.reduce("SUM", strategy.run(of_a_replica, args=(x, y)), axis=None)

    batches = ctx.batches(1000, epochs=epochs)  # 500 rows of each batch on either worker
    for epoch in range(epochs):
        loss = np.mean([step(tf.constant(x), tf.constant(y)) for x, y in batches.epoch(epoch)])
        ctx.report(loss=loss)
    return [weight.numpy() for weight in model.weights]


def main(spark):
    rows = spark.range(4000).selectExpr("rand(1) AS a", "rand(2) AS b", "rand(3) AS noise")
    rows = rows.selectExpr("a", "b", "2 * a - 3 * b + noise AS label")
    return spark_nn.run(train, 0.3, 10, numWorkers=2, dataset=rows, inputCols=["a", "b"], shuffle=False)


if __name__ == "__main__":
    print(*main(SparkSession.builder.master("local[2]").getOrCreate()))
