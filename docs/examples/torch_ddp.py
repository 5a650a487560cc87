"""PyTorch's DistributedDataParallel over Gloo: linear regression on two workers."""

from pyspark.sql import SparkSession

import spark_nn


def train(ctx, rate, epochs):
    import torch
    from torch.nn.parallel import DistributedDataParallel

    ctx.initialize()  # torch.distributed.init_process_group
    layer = torch.nn.Linear(2, 1)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    model = DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    batches = ctx.batches(1000, epochs=epochs)  # 500 rows of each batch on either worker
    for epoch in range(epochs):
        for x, y in batches.epoch(epoch):
            optimizer.zero_grad()
            loss = ((model(torch.from_numpy(x))[:, 0] - torch.from_numpy(y)) ** 2).mean()
            loss.backward()
            optimizer.step()
        ctx.report(loss=loss)
    return [layer.weight.detach().numpy(), layer.bias.detach().numpy()]


def main(spark):
    rows = spark.range(4000).selectExpr("rand(1) AS a", "rand(2) AS b", "rand(3) AS noise")
    rows = rows.selectExpr("a", "b", "2 * a - 3 * b + noise AS label")
    return spark_nn.run(
        train, 0.3, 10, numWorkers=2, framework="torch", dataset=rows, inputCols=["a", "b"], shuffle=False
    )


if __name__ == "__main__":
    print(*main(SparkSession.builder.master("local[2]").getOrCreate()))
