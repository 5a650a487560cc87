"""From a DataFrame to NumPy batches: written once by the executors, streamed by each rank."""
