"""What others are told of a fit: TensorBoard from the worker, MLflow from the driver."""
